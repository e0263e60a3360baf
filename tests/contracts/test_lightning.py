"""Promises 1 and 6 through Lightning's Trainer: one callback more, and nothing else changes but the zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.callbacks import KeepMasks, PruneFinetune
from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.schedules import Cubic, OneShot, Piecewise, Rounds

from .promises import zeros_of
from .toys import Net, Reader, Task, adamw, loaders, task, trainer, weights

#: floor(0.5 * 128), floor(0.5 * 256): what every reader must see when half is pruned at step 0.
HALF = (64, 128)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.05, max_iter=3)


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "nesterov": ({"optimizer": sgd}, {}),
    "closure": ({"optimizer": lbfgs}, {}),
    "accumulate": ({}, {"accumulate_grad_batches": 3}),
    "clip norm": ({"optimizer": sgd}, {"gradient_clip_val": 0.1}),
    "clip value": ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "bf16-true": ({}, {"precision": "bf16-true"}),
    "LR schedule": ({"scheduler": True}, {}),
    "validate often": ({"dropout": 0.5}, {"val_check_interval": 0.25}),
}


@pytest.mark.parametrize("reader_first", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_readers_see_exact_zeros_everywhere(name: str, reader_first: bool) -> None:
    of_task, of_trainer = RUNS[name]
    reader, prune = Reader(), PruneFinetune(sparsity=0.5, schedule=OneShot("0st"))
    module = task(**of_task)
    trainer(*([reader, prune] if reader_first else [prune, reader]), **of_trainer).fit(module, *loaders())
    places = {"batch start", "before zero_grad", "batch end", "validation", "epoch end", "train end"}
    assert reader.seen == {place: {HALF} for place in places}
    assert prune.verification is not None
    assert prune.verification.ok
    assert zeros_of(p for n, p in module.net.named_parameters() if "weight" not in n) == [0, 0, 0]
    assert zeros_of([module.net.head.weight]) == [0]


@pytest.mark.parametrize("name", RUNS)
def test_without_the_manager_readers_see_revived_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskManager, "attach", lambda self, *optimizers, **settings: self)
    monkeypatch.setattr(MaskedTensor, "bind", lambda self, *args: self.target.parameter)
    reader = Reader()
    of_task, of_trainer = RUNS[name]
    run = trainer(reader, PruneFinetune(sparsity=0.5, schedule=OneShot("0st")), **of_trainer)
    with pytest.raises(PatternError, match="pruned weights are not zero"):
        run.fit(task(**of_task), *loaders())
    assert reader.seen["batch end"] != {HALF}


def test_sixteen_bit_scaler_with_skipped_steps() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    reader, prune = Reader(), PruneFinetune(sparsity=0.5, schedule=OneShot("0st"))
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    trainer(reader, prune, plugins=[plugin], max_epochs=4).fit(module := task(), *loaders())
    assert scaler.get_scale() < 2.0**30, "no step was skipped"
    assert scaler.get_scale() > 1.0
    assert not torch.equal(module.net.fc1.weight, task().net.fc1.weight)
    assert set.union(*reader.seen.values()) == {HALF}


class TwoOptimizers(Task):
    """Manual optimization, two optimizers with steps of their own rhythm."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return sgd(self.net.fc1.parameters()), adamw([*self.net.fc2.parameters(), *self.net.head.parameters()])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for index, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            if index == 0 or batch_idx % 2:
                optimizer.step()
            assert tuple(zeros_of(weights(self).values())) in {HALF, (0, 0)}
        return loss


@pytest.mark.parametrize("start", ["0st", "1ep"])
def test_manual_optimization_with_two_optimizers(start: str) -> None:
    torch.manual_seed(0)
    module, prune = TwoOptimizers(), PruneFinetune(sparsity=0.5, schedule=OneShot(start))
    trainer(prune).fit(module, *loaders())
    assert tuple(zeros_of(weights(module).values())) == HALF
    assert {change.step for change in prune.masks.changes} == {0 if start == "0st" else 8}


@pytest.mark.parametrize("schedule", [Rounds(rounds=3, start="4st", every="6st"), Cubic("2st", "20st", "3st")], ids=str)
@pytest.mark.parametrize("order", ["average first", "average last"])
@pytest.mark.parametrize("kind", ["EMA", "SWA", "SWA with batch norm"])
def test_the_averaged_model_is_exactly_as_sparse(kind: str, order: str, schedule: Any, tmp_path: Path) -> None:
    average: Any = EMAWeightAveraging(decay=0.9) if kind == "EMA" else StochasticWeightAveraging(0.01, 1)
    prune = PruneFinetune(sparsity=0.75, schedule=schedule)
    module = task(norm=kind.endswith("norm"))
    run = trainer(*([average, prune] if order == "average first" else [prune, average]), max_epochs=4)
    run.fit(module, *loaders())
    assert tuple(zeros_of(weights(module).values())) == (96, 192)
    if kind == "EMA":
        assert isinstance(average, WeightAveraging)
        run.save_checkpoint(tmp_path / "last.ckpt")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        for state in (saved["state_dict"], saved["current_model_state"]):
            assert zeros_of([state["net.fc1.weight"], state["net.fc2.weight"]]) == [96, 192]


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_without_followers_the_average_is_dense(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskManager, "follow", lambda self, copy: self)
    average: Any = EMAWeightAveraging(decay=0.9) if kind == "EMA" else StochasticWeightAveraging(0.01, 1)
    reader = Reader()
    schedule = Rounds(rounds=3, start="4st", every="6st")
    # The reader stands after the average, which hands its weights over in the last hook of training.
    with pytest.raises(PatternError, match="pruned weights are not zero"):
        trainer(PruneFinetune(sparsity=0.75, schedule=schedule), average, reader, max_epochs=4).fit(task(), *loaders())
    assert reader.seen["train end"] != {(96, 192)}


def test_sparsity_is_absolute() -> None:
    """Asked for 0.5 in each of three epochs it is 0.5, not 1 - 0.5^3 = 0.875."""
    reader = Reader()
    prune = PruneFinetune(sparsity=0.5, schedule=Piecewise({"0st": 0.5, "1ep": 0.5, "2ep": 0.5}))
    trainer(reader, prune).fit(task(), *loaders())
    assert set.union(*reader.seen.values()) == {HALF}
    assert [(c.died, c.grew) for c in prune.masks.changes] == [(64, 0), (128, 0)]


def test_rounds_count_the_survivors() -> None:
    """Three rounds of one half: 1/2, 3/4, 7/8 of 128 and of 256 weights, at the steps asked for."""
    prune = PruneFinetune(sparsity=0.875, schedule=Rounds(prune_rate=0.5, start="2st", every="1ep"))
    trainer(prune).fit(task(), *loaders())
    fc1 = [(c.step, c.died) for c in prune.masks.changes if c.tensor == "net.fc1.weight"]
    assert fc1 == [(2, 64), (10, 32), (18, 16)]


@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_second_fit_goes_on(same_trainer: bool) -> None:
    reader, prune = Reader(), PruneFinetune(sparsity=0.5, schedule=OneShot("0st"))
    module, data = task(), loaders()
    run = trainer(prune, reader, max_epochs=2)
    run.fit(module, *data)
    masks = {name: mask.clone() for name, mask in prune.masks.masks.items()}
    before = module.net.fc1.weight.detach().clone()
    if same_trainer:
        run.fit_loop.max_epochs = 4
    else:
        run = trainer(prune, reader, max_epochs=2)
    run.fit(module, *data)
    assert not torch.equal(before, module.net.fc1.weight)
    assert all(torch.equal(masks[name], mask) for name, mask in prune.masks.masks.items())
    assert set.union(*reader.seen.values()) == {HALF}


def test_the_same_callback_on_a_second_model() -> None:
    prune = PruneFinetune(sparsity=0.5, schedule=OneShot("0st"))
    first, second = task(seed=1), task(seed=2)
    trainer(prune).fit(first, *loaders())
    kept = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    trainer(prune).fit(second, *loaders())
    assert prune.masks.model is second
    for module in (first, second):
        assert tuple(zeros_of(weights(module).values())) == HALF
    assert all(torch.equal(kept[name], tensor) for name, tensor in first.state_dict().items())
    assert not torch.equal(first.net.fc1.weight == 0, second.net.fc1.weight == 0)


def test_a_checkpoint_is_one_of_the_plain_model(tmp_path: Path) -> None:
    module = task()
    run = trainer(PruneFinetune(sparsity=0.5, schedule=OneShot("0st")))
    run.fit(module, *loaders())
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(task().state_dict())
    plain = Net()
    plain.load_state_dict({n.removeprefix("net."): v for n, v in saved["state_dict"].items()}, strict=True)
    assert tuple(zeros_of([plain.fc1.weight, plain.fc2.weight])) == HALF
    other = Task.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert tuple(zeros_of(weights(other).values())) == HALF


def test_fine_tuning_a_pruned_checkpoint_keeps_every_zero() -> None:
    module = task()
    trainer(PruneFinetune(sparsity=0.5, schedule=OneShot("0st"))).fit(module, *loaders())
    fresh = task(seed=5)
    fresh.load_state_dict(module.state_dict())
    zeros = fresh.net.fc1.weight == 0
    reader = Reader()
    trainer(KeepMasks(), reader).fit(fresh, *loaders())
    assert set.union(*reader.seen.values()) == {HALF}
    assert torch.equal(fresh.net.fc1.weight == 0, zeros)


def test_validating_and_testing_touch_nothing() -> None:
    module, data = task(), loaders()
    prune = PruneFinetune(sparsity=0.5, schedule=OneShot("0st"))
    run = trainer(prune)
    run.validate(module, data[1], verbose=False)
    assert prune.manager is None
    run.fit(module, *data)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run.validate(module, data[1], verbose=False)
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


def test_two_methods_in_one_trainer_are_refused() -> None:
    with pytest.raises(RecipeError, match="both set masks"):
        trainer(PruneFinetune(0.5), KeepMasks()).fit(task(), *loaders())


def test_a_broken_promise_fails_the_run() -> None:
    prune = PruneFinetune(sparsity=0.5, schedule=OneShot("0st"))
    module = task()
    run = trainer(prune)
    run.fit(module, *loaders())
    mask = prune.masks.masks["net.fc1.weight"].view(-1)
    mask[0] ^= True
    with pytest.raises(PatternError, match=r"net\.fc1\.weight.*exactly 64"):
        prune.on_fit_end(run, module)
    mask[0] ^= True
    module.net.fc1.weight.data.fill_(float("nan"))
    with pytest.raises(PatternError, match=r"net\.fc1\.weight"):
        prune.on_fit_end(run, module)


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_less_than_asked_is_said_aloud() -> None:
    prune = PruneFinetune(sparsity=0.5, schedule=Rounds(rounds=3, start="2st", every="8st"))
    with pytest.warns(UserWarning, match="after 1 of 3 changes"):
        trainer(StopAt(5), prune).fit(task(), *loaders())


def test_a_run_that_never_starts_is_not_silently_dense() -> None:
    with pytest.warns(UserWarning, match="sparsity 0"):
        trainer(PruneFinetune(sparsity=0.5, schedule=OneShot("2st")), max_time={"seconds": 0}).fit(task(), *loaders())
