"""What would end in silence is refused or told: each of these runs once looked fine and was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from sparsetrain.callbacks import KeepMasks, PruneFinetune, Recovery
from sparsetrain.errors import PatternError, RecipeError, TargetError
from sparsetrain.masks import MaskManager, Override
from sparsetrain.pruning import prune
from sparsetrain.schedules import OneShot, Rounds
from sparsetrain.targets import Targets

from .promises import same_bits
from .toys import Task, loaders, task, trainer


class NoOptimizer(Task):
    """Steps optimizers of its own that Lightning never hears of."""

    def configure_optimizers(self) -> Any:
        return None


def test_a_run_without_optimizers_is_refused() -> None:
    run = trainer(PruneFinetune(0.5, schedule=OneShot("0st")))
    with pytest.raises(RecipeError, match="returns no optimizer"), pytest.warns(UserWarning, match="configure_optimizers"):
        run.fit(NoOptimizer(), *loaders())


def test_zeros_that_are_no_masks_are_told() -> None:
    module = task()
    with torch.no_grad():
        module.net.fc1.weight[:2] = 0
    with pytest.warns(UserWarning, match=r"fc1\.weight is .*% zero already.*MaskManager\.adopt"):
        trainer(PruneFinetune(0.6, schedule=OneShot("5st"))).fit(module, *loaders())


def test_the_zeros_of_a_model_can_be_kept_from_the_start() -> None:
    module = task()
    with torch.no_grad():
        module.net.fc1.weight[:2] = 0
    method = PruneFinetune(0.6, schedule=OneShot("5st"))
    method.use(module, MaskManager.adopt(module))
    trainer(method).fit(module, *loaders())
    assert int(torch.count_nonzero(module.net.fc1.weight[:2])) == 0
    assert all(change.grew == 0 for change in method.masks.changes)


def test_a_method_and_its_ready_manager_say_the_same() -> None:
    module = task()
    manager = MaskManager(module, Targets(exclude=("fc2",)), "unstructured:row")
    with pytest.raises(PatternError, match=r"asked for pattern neurons, and its manager has unstructured:row"):
        PruneFinetune(0.6, pattern="neurons").use(module, manager)
    with pytest.raises(PatternError, match=r"which are not the targets of its manager"):
        PruneFinetune(0.6, targets=Targets(head=True)).use(module, manager)
    with pytest.raises(PatternError, match=r"overrides \(fc1\), which its manager knows nothing of"):
        KeepMasks(overrides={"fc1": Override(sparsity=0.3)}).use(module, manager)
    method = PruneFinetune(0.6, pattern="unstructured:row", targets=Targets(exclude=("fc2",)))
    assert method.use(module, manager) is manager
    assert PruneFinetune(0.6).use(module, manager) is manager  # it did not ask for anything else


def test_a_replaced_layer_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    manager = MaskManager(model)
    prune(manager, 0.5)
    manager.verify(strict=True)
    model[0] = nn.Linear(8, 8)
    with pytest.raises(TargetError, match=r"0\.weight is no longer in the model"):
        manager.verify()


def test_a_sparsity_that_prunes_nothing_is_refused() -> None:
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 4))
    with pytest.raises(PatternError, match=r"sparsity 0\.1 prunes none"):
        prune(MaskManager(model, pattern="neurons"), 0.1)
    # under one threshold a single tensor may well lose nothing
    prune(MaskManager(nn.Sequential(nn.Linear(100, 90), nn.Linear(90, 2), nn.Linear(2, 2))), 0.01, allocation="global")


def test_global_slices_reach_what_is_asked_when_one_tensor_would_die() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.mul_(0.01)
    manager = MaskManager(model, pattern="neurons")
    prune(manager, 0.6, allocation="global")
    # 7 of 8 neurons of the weak tensor (448 of 512 weights); the rest of 921 comes from the others, within one neuron of 64
    assert 921 - 64 < sum(dead for dead, _ in manager.counts().values()) <= 921


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"mode": "maximum"}, "'maximum'"), ({"patience": 0}, "patience"), ({"tolerance": float("nan")}, "tolerance")],
)
def test_recovery_checks_its_settings(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recovery(**wrong)


def test_recovery_needs_a_validation_before_the_first_round() -> None:
    method = PruneFinetune(0.5, schedule=Rounds(rounds=2, start="0st"), recovery=Recovery())
    with pytest.raises(RecipeError, match="first round after step 0"):
        trainer(method).fit(task(), *loaders())


def test_no_sparsity_for_all_and_an_override_for_one() -> None:
    from sparsetrain.masks import Override

    method = PruneFinetune(0.0, allocation="global", schedule=OneShot("2st"), overrides={"fc1": Override(sparsity=0.5)})
    trainer(method).fit(task(), *loaders())
    assert [row.asked for row in method.masks.verify().rows] == [0.5, 0.0]


class Stream(IterableDataset[Any]):
    """Batches without a known number, the same every epoch."""

    def __iter__(self) -> Any:
        data = loaders()[0].dataset
        return iter([data[i] for i in range(len(data))])  # type: ignore[arg-type]


class Keep(Callback):
    """A checkpoint at the end of the second epoch."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "second.ckpt"

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def test_data_of_unknown_length_resume_at_the_next_epoch(tmp_path: Path) -> None:
    def fit(checkpoint: Path | None) -> tuple[Task, int]:
        module = task()
        run = trainer(PruneFinetune(0.5, schedule=OneShot("3st")), Keep(tmp_path), max_epochs=4, val_check_interval=1.0)
        run.fit(module, DataLoader(Stream(), batch_size=4), loaders()[1], ckpt_path=checkpoint, weights_only=True)
        return module, run.global_step

    whole, steps = fit(None)
    resumed, resumed_steps = fit(tmp_path / "second.ckpt")
    assert resumed_steps == steps
    same_bits(whole.state_dict(), resumed.state_dict())
