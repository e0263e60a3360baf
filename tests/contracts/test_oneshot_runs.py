"""OneShotPruning in Lightning runs: masks kept, resume exact, a second fit, two ranks with the same masks, FSDP2 refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparsetrain.calibration import layers as in_layers
from sparsetrain.callbacks.oneshot import OneShotPruning
from sparsetrain.criteria import SparseGPT, Wanda
from sparsetrain.errors import DataError, DivergedError, PatternError, RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.oneshot import Streaming, prune_oneshot
from sparsetrain.targets import Targets
from tests.unit.test_calibration import Manual, Measured, Stream

from . import ranks as on
from .promises import same_bits, zeros_of
from .ranks import RANKS, Group, said
from .test_resume import SaveAlways, Trace
from .toys import TARGETS, Reader, Task, loaders, task, trainer

METHODS: dict[str, Callable[[], OneShotPruning]] = {
    "at once": lambda: OneShotPruning(pattern="2:4", criterion=Wanda(batches=4)),
    "later, moving weights": lambda: OneShotPruning(0.6, criterion=SparseGPT(batches=4), start="5st"),
    "all scores first": lambda: OneShotPruning(0.7, criterion=Wanda(batches=4), allocation="global", start="50%"),
    "no data": lambda: OneShotPruning(0.7, criterion="magnitude", start="1st", streaming=Streaming(batch=2)),
}


class Stops(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 4


def fit(method: OneShotPruning, folder: Path | None = None, checkpoint: Path | None = None) -> dict[str, Any]:
    trace = Trace()
    run = trainer(method, trace, *([SaveAlways(folder)] if folder else []), accumulate_grad_batches=2, val_check_interval=0.5)
    seed_everything(7, verbose=False)
    module = task(seed=0 if checkpoint is None else 99, dropout=0.3, scheduler=True)
    run.fit(module, *loaders(), ckpt_path=checkpoint, weights_only=True)
    return {
        "weights": module.state_dict(),
        "masks": {n: m.view(torch.uint8) for n, m in method.masks.masks.items()},
        "changes": {"all": torch.tensor([[c.step, c.died, c.grew] for c in method.masks.changes])},
        "losses": trace.losses,
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("name", METHODS)
def test_resume_equals_uninterrupted_from_every_checkpoint(name: str, tmp_path: Path) -> None:
    whole = fit(METHODS[name](), tmp_path)
    assert len({int(step) for step in whole["changes"]["all"][:, 0]}) == 1
    assert 0 not in zeros_of([whole["weights"][f"net.{n}"] for n in TARGETS])
    checkpoints = sorted(tmp_path.glob("*step.ckpt"))
    assert len(checkpoints) == 12
    for checkpoint in checkpoints[:-1]:
        resumed = fit(METHODS[name](), checkpoint=checkpoint)
        for part in ("weights", "masks", "changes"):
            same_bits(whole[part], resumed[part])
        assert resumed["losses"] == whole["losses"][len(whole["losses"]) - len(resumed["losses"]) :]
        assert torch.equal(resumed["random"], whole["random"])


def test_who_remembers_does_not_prune_again_and_who_forgets_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(METHODS["later, moving weights"](), tmp_path)
    remembers, forgets = (METHODS["later, moving weights"]() for _ in range(2))
    fit(remembers, checkpoint=tmp_path / "08-step.ckpt")
    assert remembers.report is None
    monkeypatch.setattr(OneShotPruning, "load_method_state", lambda self, state: None)
    fit(forgets, checkpoint=tmp_path / "08-step.ckpt")
    assert forgets.report is not None


def test_masks_are_seen_from_the_first_batch_to_the_last_and_through_a_second_fit() -> None:
    method, reader, module = METHODS["at once"](), Reader(), task()
    trainer(method, reader, max_epochs=1).fit(module, *loaders())
    assert set(reader.seen) >= {"batch start", "validation", "train end"}
    assert {zeros for seen in reader.seen.values() for zeros in seen} == {(64, 128)}
    assert method.verification is not None
    assert method.verification.ok
    assert method.facts()["one_shot"]["samples"] == 16
    masks = {name: mask.clone() for name, mask in method.masks.masks.items()}
    changes = len(method.masks.changes)
    trainer(method, max_epochs=1).fit(module, *loaders())
    same_bits(masks, method.masks.masks)
    assert len(method.masks.changes) == changes
    other = task(seed=5)
    trainer(method, max_epochs=1).fit(other, *loaders())  # another model is pruned anew
    assert zeros_of([other.net.get_parameter(n) for n in TARGETS]) == [64, 128]
    third = task(seed=6)
    method.use(third, MaskManager(third, pattern="2:4"))  # so it is with a manager that was given
    trainer(method, max_epochs=1).fit(third, *loaders())
    assert zeros_of([third.net.get_parameter(n) for n in TARGETS]) == [64, 128]


def test_training_up_to_the_change_is_the_same_with_any_criterion() -> None:
    def weight(criterion: Any) -> Tensor:
        method, found = OneShotPruning(0.5, criterion=criterion, start="5st"), {}
        method.before_first_change = lambda t: found.update(weight=t.lightning_module.net.fc1.weight.detach().clone())
        run, module = trainer(method, max_epochs=1), task(dropout=0.3)
        run.fit(module, *loaders())
        return torch.cat([found["weight"].flatten(), torch.get_rng_state().float()])

    assert torch.equal(weight("magnitude"), weight("sparsegpt"))


class Noisy(Dataset[Any]):
    """Samples that are others every time."""

    def __init__(self) -> None:
        self.plain: Any = loaders()[0].dataset

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> Any:
        x, y = self.plain[index]
        return x + torch.randn_like(x), y


class Draws(Callback):
    """Takes from torch's stream before training begins, and reads it when the method is done with a step."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.states: list[Tensor] = []

    def on_fit_start(self, *args: Any) -> None:
        torch.rand(self.count)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.states.append(torch.get_rng_state())


def test_what_is_measured_depends_on_the_seed_alone_and_moves_no_stream() -> None:
    def measured(count: int, start: str) -> tuple[dict[str, Tensor], Draws]:
        method, draws = OneShotPruning(0.5, criterion=Wanda(batches=1), start=start), Draws(count)
        seed_everything(7, verbose=False)
        trainer(method, draws, max_epochs=1).fit(task(), DataLoader(Noisy(), batch_size=4), loaders()[1])
        return {n: m.view(torch.uint8) for n, m in method.masks.masks.items()}, draws

    (first, _), (second, _) = measured(0, "0st"), measured(3, "0st")
    same_bits(first, second)
    early, late = measured(0, "3st")[1], measured(0, "6st")[1]
    assert all(torch.equal(one, other) for one, other in zip(early.states, late.states, strict=True))


def test_measuring_is_no_training_step() -> None:
    torch.manual_seed(0)
    module, method = Measured(), OneShotPruning(0.5, criterion=Wanda(batches=2), start="5st")
    trainer(method, max_epochs=1).fit(module, *loaders())
    assert module.logged == [(8, 32)]  # 8 batches of 4, whatever was measured
    assert "log" not in module.__dict__


@pytest.mark.filterwarnings("ignore:.*`__len__` could be inaccurate")
def test_data_that_cannot_be_read_apart_from_training_is_refused_before_training() -> None:
    manual, streamed, (train, validation) = Manual(), task(), loaders()
    for module, data, error, says in (
        (manual, train, RecipeError, r"Wanda runs training_step.*Manual steps its optimizers itself"),
        (streamed, DataLoader(Stream(), batch_size=4), DataError, r"apart from training.*DataLoader"),
    ):
        before = module.net.fc1.weight.detach().clone()
        with pytest.raises(error, match=says):
            trainer(OneShotPruning(0.5, start="5st")).fit(module, data, validation)
        assert torch.equal(before, module.net.fc1.weight)


def test_what_cannot_work_is_refused_when_it_is_set_up() -> None:
    for method, says in [
        (OneShotPruning(0.5, criterion="taylor"), "needs gradients"),
        (OneShotPruning(0.5, pattern="neurons", criterion="sparsegpt"), "neurons"),
        (OneShotPruning(0.0), "nothing would be pruned"),
        (OneShotPruning(pattern="2:4", allocation="erk"), "2:4 always has sparsity 0.5, ERK"),
    ]:
        module = task()
        with pytest.raises(RecipeError, match=says):
            trainer(method).fit(module, *loaders())
    with pytest.raises(PatternError, match="how sparse"):
        trainer(OneShotPruning()).fit(task(), *loaders())
    late = OneShotPruning(0.5, start="90st")
    with pytest.raises(RecipeError, match="90st"):
        trainer(late, max_epochs=1).fit(task(), *loaders())


def test_zeros_that_are_no_masks_are_refused_and_adopted_ones_kept() -> None:
    def halved() -> Task:
        module = task()
        with torch.no_grad():
            module.net.fc1.weight[:8] = 0
        return module

    module = halved()
    with pytest.raises(PatternError, match=r"fc1\.weight is 50% zero already.*MaskManager\.adopt"):
        trainer(OneShotPruning(0.6)).fit(module, *loaders())
    method = OneShotPruning(0.6)
    method.use(module, MaskManager.adopt(module))
    trainer(method).fit(module, *loaders())
    assert int(torch.count_nonzero(module.net.fc1.weight[:8])) == 0
    assert zeros_of([module.net.get_parameter(n) for n in TARGETS]) == [76, 153]


def test_a_run_that_ends_before_it_is_time_is_told() -> None:
    run = trainer(OneShotPruning(0.5, criterion="magnitude", start="6st"), max_epochs=3)
    run.callbacks.append(Stops())  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"nothing was pruned: training ended before step 6; train longer"):
        run.fit(task(), *loaders())


# -- two ranks --------------------------------------------------------------------------------------------------------------


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) for _ in range(4)]


def pruned(data: list[Tensor], criterion: str, wrap: on.Wrap = on.alone, allocation: str = "uniform") -> dict[str, Tensor]:
    model = wrap(stack())
    manager = MaskManager(model, Targets(head=True), "unstructured")
    prune_oneshot(manager, data, 0.5, criterion=criterion, allocation=allocation, streaming=Streaming(batch=4))
    return {t.name: t.full_mask() for t in manager} | {f"w.{t.name}": t.target.parameter.detach().clone() for t in manager}


CASES = [("wanda", "uniform"), ("wanda", "global"), ("sparsegpt", "uniform")]


def lightning(rank: int) -> dict[str, Any]:
    callback = OneShotPruning(0.5, criterion=Wanda(batches=2), start="2st")
    model = on.fit_plainly(callback, max_steps=4)
    assert callback.report is not None
    return {"masks": callback.masks.masks, "weights": dict(model.state_dict()), "samples": callback.report.samples}


def work(folder: Path) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    mine = batches()[rank::RANKS]
    found: dict[str, Any] = {f"{c} {a}": pruned(mine, c, on.ddp, a) for c, a in CASES}
    keep, in_layers.sum_over_ranks = in_layers.sum_over_ranks, lambda criterion, only: None
    found["without sums"] = pruned(mine, "wanda", on.ddp)
    in_layers.sum_over_ranks = keep
    found["empty"] = said(lambda: pruned(mine if rank else [], "wanda", on.ddp))
    found["diverged"] = said(lambda: pruned([torch.full((4, 8), torch.nan)] if rank else mine, "wanda", on.ddp))
    found["sharded"] = said(lambda: pruned(mine, "wanda", on.fsdp))
    found["lightning"] = lightning(rank)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return Group(work, tmp_path_factory.mktemp("ranks")).results()


@pytest.mark.parametrize(("criterion", "allocation"), CASES)
def test_two_ranks_are_one(criterion: str, allocation: str, ranks: list[dict[str, Any]]) -> None:
    one = pruned(batches(), criterion, allocation=allocation)
    first, second = (rank[f"{criterion} {allocation}"] for rank in ranks)
    same_bits(first, second)
    for name, value in one.items():
        if value.dtype == torch.bool:
            assert int((first[name] != value).sum()) <= 2, name  # sums in another order
        else:
            assert float((first[name] - value).abs().max()) < 1e-3 or int(((first[name] == 0) != (value == 0)).sum()) <= 2


def test_without_the_sums_the_ranks_disagree(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["without sums"] for rank in ranks)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_problem_of_one_rank_is_told_by_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["empty"].startswith(f"{DataError.__name__}: criterion Wanda needs data")
        assert rank["diverged"].startswith(f"{DivergedError.__name__}: calibration: the input of 0.weight is not finite")
        assert "sharded (FSDP2)" in rank["sharded"]


def test_lightning_under_ddp(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["lightning"] for rank in ranks)
    same_bits(first["masks"], second["masks"])
    same_bits(first["weights"], second["weights"])
    assert first["samples"] == second["samples"] == 8
