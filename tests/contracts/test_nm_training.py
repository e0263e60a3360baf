"""N:M training keeps the promises while dense weights live on behind the sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from sparsetrain.callbacks import PruneFinetune, nm_training
from sparsetrain.callbacks.nm_training import NMTraining
from sparsetrain.errors import DivergedError, MaskStateError, PatternError, RecipeError
from sparsetrain.masks import MaskManager, Override
from sparsetrain.schedules import Clock, OneShot
from sparsetrain.targets import Targets

from .promises import assert_pattern, same_bits, zeros_of
from .test_resume import STEPS, SaveAlways, Trace
from .toys import Reader, Task, adamw, loaders, task, trainer, weights

HALF = (64, 128)  # 2:4 of 128 and of 256 weights


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AdamW": ({}, {}),
    "SGD": ({"optimizer": sgd}, {}),
    "Muon": ({"optimizer": lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2])}, {}),
    "accumulate": ({"optimizer": sgd}, {"accumulate_grad_batches": 3}),
    "clip norm": ({"optimizer": sgd}, {"gradient_clip_val": 0.1}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "bf16-true": ({}, {"precision": "bf16-true"}),
    "LR schedule": ({"scheduler": True, "dropout": 0.3}, {"val_check_interval": 0.25}),
}


class Masks(Callback):
    """The pattern and the masks that the zeros form after every step, and what the forward pass saw."""

    def __init__(self, pattern: str = "2:4") -> None:
        self.pattern = pattern
        self.seen: list[Tensor] = []
        self.forward: set[tuple[int, ...]] = set()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.net.register_forward_pre_hook(lambda *_: self.forward.add(tuple(zeros_of(weights(pl_module).values()))))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for weight in weights(pl_module).values():
            assert_pattern(weight != 0, self.pattern, 0.5)
        self.seen.append(pl_module.net.fc2.weight.detach() != 0)

    @property
    def moves(self) -> list[int]:
        """Entries of fc2 whose mask changed, step by step."""
        return [int((a ^ b).sum()) for a, b in zip(self.seen, self.seen[1:], strict=False)]


def nothing(*args: Any, **kwargs: Any) -> None:
    """Does nothing."""


@pytest.mark.parametrize("reader_first", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_everybody_sees_exact_2_to_4_and_masks_move(name: str, reader_first: bool) -> None:
    of_task, of_trainer = RUNS[name]
    reader, masks, method = Reader(), Masks(), NMTraining(freeze="75%", decay=0.01)
    module = task(**of_task)
    order = [reader, masks, method] if reader_first else [method, masks, reader]
    run = trainer(*order, **of_trainer)
    run.fit(module, *loaders())
    assert set.union(*reader.seen.values()) == {HALF}
    assert len(reader.seen) == 6
    assert masks.forward == {HALF}
    assert sum(masks.moves) > 0
    assert not any(masks.moves[-4:])  # the last quarter has fixed masks
    assert not method.hidden
    assert method.verification is not None
    assert method.verification.ok  # optimizer memory clear, too
    assert [(c.step, c.died, c.why) for c in method.masks.changes if c.tensor == "net.fc1.weight"] == [
        (0, 64, "straight-through 2:4"),
        (round(run.global_step * 0.75), 0, "masks fixed"),
    ]


def test_without_hiding_the_weights_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NMTraining, "_hide", nothing)
    with pytest.raises(AssertionError, match="groups of 4 with"):
        trainer(Masks(), NMTraining("2:4")).fit(task(), *loaders())


def early(optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> list[Any]:
    """Dense weights from the beginning of ``step``, whose closure runs the forward pass."""
    return [optimizer.register_step_pre_hook(lambda *_: before()), optimizer.register_step_post_hook(lambda *_: after())]


def reveal_all(self: NMTraining, optimizer: Optimizer) -> None:
    for tensor in self.masks:
        tensor.target.parameter.detach().add_(self.hidden[tensor.name])
        self._open.append(tensor)


def test_dense_weights_a_moment_too_early_reach_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nm_training, "around_step", early)
    monkeypatch.setattr(NMTraining, "_reveal", reveal_all)
    masks = Masks()
    trainer(masks, NMTraining(freeze="75%")).fit(task(optimizer=partial(torch.optim.SGD, lr=0.1)), *loaders())
    assert masks.forward != {HALF}


def test_momentum_belongs_to_the_dense_weights_until_masks_are_fixed() -> None:
    class Memory(Callback):
        def __init__(self) -> None:
            self.remembered: list[int] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            weight = pl_module.net.fc2.weight
            buffer = trainer.optimizers[0].state[weight]["exp_avg"]
            self.remembered.append(int(torch.count_nonzero(buffer[weight == 0])))

    memory = Memory()
    trainer(NMTraining(freeze="18st"), memory).fit(task(), *loaders())
    assert min(memory.remembered[:17]) > 100  # 128 are pruned; a dead tanh unit has no gradient
    assert memory.remembered[17:] == [0] * 7


@pytest.mark.parametrize("off", [(nm_training, "forget"), (MaskManager, "attach")])
def test_a_handover_that_forgets_a_part_is_noticed(off: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*off, nothing)
    monkeypatch.setattr("sparsetrain.masks.manager.needs_masked_gradients", lambda optimizer: True)
    monkeypatch.setattr("sparsetrain.masks.tensor.MaskedTensor.mask_gradient", nothing)
    with pytest.raises(PatternError, match="pruned"):
        trainer(NMTraining(freeze="75%")).fit(task(), *loaders())


def test_hidden_weights_are_what_was_pruned() -> None:
    """Masks begin as the largest magnitudes, and nothing is lost: weight + hidden is the dense weight."""
    module, method = task(), NMTraining(freeze="90%")
    dense = module.net.fc1.weight.detach().clone()

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert torch.equal(pl_module.net.fc1.weight + method.hidden["net.fc1.weight"], dense)
            kept = pl_module.net.fc1.weight.detach().abs().view(-1, 4).sort(1).values[:, 2:]
            assert torch.equal(kept, dense.abs().view(-1, 4).sort(1).values[:, 2:])

    trainer(method, Look(), max_epochs=1).fit(module, *loaders())


def test_clipping_does_not_see_the_decay() -> None:
    """The norm clipped is that of the straight-through gradient; a huge decay does not shrink the step of the living."""
    norms: dict[float, list[float]] = {}
    for decay in (0.0, 0.5):
        found = norms.setdefault(decay, [])

        class Norm(Task):
            def configure_gradient_clipping(self, optimizer: Any, *args: Any, _found: Any = found, **kwargs: Any) -> None:
                _found.append(float(torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)))

        torch.manual_seed(0)
        trainer(NMTraining(decay=decay), max_steps=1).fit(Norm(optimizer=sgd), *loaders())
    assert norms[0.0] == norms[0.5]


# -- AMP, manual optimization, averages -----------------------------------------------------------------------------------


def test_a_skipped_step_changes_nothing() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    masks, method = Masks(), NMTraining(freeze="75%")
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    trainer(masks, method, plugins=[plugin], max_epochs=4).fit(task(), *loaders())
    assert scaler.get_scale() < 2.0**30, "no step was skipped"
    assert not any(masks.moves[:5])
    assert masks.forward == {HALF}
    assert method.verification is not None
    assert method.verification.ok


class TwoOptimizers(Task):
    """Manual optimization, two optimizers with steps of their own rhythm; one with a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return sgd(self.net.fc1.parameters()), adamw([*self.net.fc2.parameters(), *self.net.head.parameters()])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()

        def closure() -> Tensor:
            assert tuple(zeros_of(weights(self).values())) == HALF
            self.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        first.step(closure=closure)
        if batch_idx % 2:
            closure()
            second.step()


def test_manual_optimization_with_two_optimizers() -> None:
    torch.manual_seed(0)
    module, method, masks = TwoOptimizers(), NMTraining(freeze="75%"), Masks()
    trainer(method, masks).fit(module, *loaders())
    assert sum(masks.moves) > 0
    assert method.phase == "fixed"


def test_the_averaged_model_is_exactly_2_to_4() -> None:
    for freeze in ("50%", "100%"):
        average = EMAWeightAveraging(decay=0.9)
        module = task(optimizer=sgd)
        trainer(average, NMTraining(freeze=freeze, decay=0.1), max_epochs=4).fit(module, *loaders())
        for weight in weights(module).values():  # the average now
            assert_pattern(weight != 0, "2:4", 0.5)


# -- stages, phases, ends ---------------------------------------------------------------------------------------------


class Zeros(Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(zeros_of([pl_module.net.fc2.weight])[0])


def test_n_falls_in_stages() -> None:
    """Dense for 2 steps, then 7:8, 6:8 ... 2:8 at steps 2, 5, 8 ... 17: 32 of 256 weights more each time."""
    zeros = Zeros()
    method = NMTraining("2:8", start="2st", decrease_until="17st", freeze="20st")
    trainer(method, zeros).fit(task(), *loaders())
    expected = [0] + [32 * i for i in (1, 2, 3, 4, 5) for _ in range(3)] + [192] * 8
    assert zeros.seen == expected
    curve = method.curves(Clock(24, 8))[0.75]
    assert curve.points == ((2, 0.125), (5, 0.25), (8, 0.375), (11, 0.5), (14, 0.625), (17, 0.75))
    assert method.asked() == 0.75


def test_other_patterns_and_dense_layers_by_override() -> None:
    module = task()
    method = NMTraining("1:4", freeze="75%", overrides={"fc1": Override(sparsity=0.0)})
    trainer(method).fit(module, *loaders())
    assert zeros_of(weights(module).values()) == [0, 192]
    assert method.asked() == pytest.approx(192 / 384)


class StopAt5(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 5


@pytest.mark.parametrize(
    ("start", "says"),
    [("50%", "before the first mask: the model is dense"), ("0st", "at 3:4, with masks that still moved")],
)
def test_an_early_end_is_said_aloud(start: str, says: str) -> None:
    method = NMTraining("2:4", start=start, decrease_until="75%", freeze="80%")
    with pytest.warns(UserWarning, match=says):
        trainer(method, StopAt5()).fit(task(), *loaders())


def test_a_second_fit_goes_on_and_another_model_begins_anew() -> None:
    method, module, masks = NMTraining("2:4", freeze="20st"), task(), Masks()
    with pytest.warns(UserWarning, match="still moved"):
        trainer(method, masks, StopAt5()).fit(module, *loaders())
    dense = module.net.fc1.weight.detach() + method.hidden["net.fc1.weight"]
    assert torch.count_nonzero(dense) == 128
    trainer(method, masks).fit(module, *loaders())
    assert method.phase == "fixed"
    fixed = module.net.fc1.weight == 0
    trainer(method, masks).fit(module, *loaders())
    assert torch.equal(module.net.fc1.weight == 0, fixed)
    other = task(seed=3)
    trainer(method, masks).fit(other, *loaders())
    assert not torch.equal(other.net.fc1.weight == 0, fixed)


def test_pruning_once_and_retraining_is_prune_finetune() -> None:
    """ASP (Mishra et al. 2021): magnitude 2:4 once, the schedule again with the mask fixed."""
    module, masks = task(), Masks()
    largest = module.net.fc1.weight.detach().abs().view(-1, 4).argsort(1)[:, 2:].sort(1).values
    trainer(PruneFinetune(pattern="2:4", schedule=OneShot()), masks).fit(module, *loaders())
    assert not any(masks.moves)
    kept = (module.net.fc1.weight.detach() != 0).view(-1, 4).nonzero()[:, 1].view(-1, 2)
    assert torch.equal(kept, largest)


# -- resume -------------------------------------------------------------------------------------------------------------


def fit(callbacks: list[Callback], checkpoint: Path | None = None, optimizer: Any = adamw) -> dict[str, Any]:
    method = NMTraining("2:4", decay=0.05, start="2st", decrease_until="6st", freeze="10st")
    trace = Trace()
    run = trainer(method, EMAWeightAveraging(decay=0.8), *callbacks, trace, accumulate_grad_batches=2, val_check_interval=0.5)
    seed_everything(7 if checkpoint is None else 1234, verbose=False)
    module = task(seed=0 if checkpoint is None else 99, dropout=0.3, scheduler=True, optimizer=optimizer)
    run.fit(module, *loaders(), ckpt_path=checkpoint, weights_only=True)
    state = [v for s in run.optimizers[0].state.values() for v in s.values() if isinstance(v, Tensor)]
    return {
        "weights": module.state_dict(),
        "optimizer": {str(i): v for i, v in enumerate(state)},
        "masks": {n: m.view(torch.uint8) for n, m in method.masks.masks.items()},
        "changes": method.masks.changes,
        "losses": trace.losses,
    }


def assert_same(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    for part in ("weights", "optimizer", "masks"):
        same_bits(whole[part], resumed[part])
    assert resumed["changes"] == whole["changes"]
    assert resumed["losses"] == whole["losses"][len(whole["losses"]) - len(resumed["losses"]) :]


@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_resume_equals_uninterrupted(optimizer: Any, tmp_path: Path) -> None:
    whole = fit([SaveAlways(tmp_path)], optimizer=optimizer)
    assert [c.why for c in whole["changes"] if c.tensor == "net.fc1.weight"] == [
        "straight-through 3:4", "straight-through 2:4", "masks fixed"
    ]  # fmt: skip
    steps = [1, 2, 4, 6, 7, 9, 10, 11]
    assert max(steps) < STEPS
    for step in steps:
        assert_same(fit([], tmp_path / f"{step:02d}-step.ckpt", optimizer=optimizer), whole)


def test_without_hidden_weights_resume_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit([SaveAlways(tmp_path)])

    def forgetful(self: NMTraining, state: dict[str, Any]) -> None:
        load(self, state)
        for hidden in self.hidden.values():
            hidden.zero_()

    load = NMTraining.load_method_state
    monkeypatch.setattr(NMTraining, "load_method_state", forgetful)
    with pytest.raises(AssertionError):
        assert_same(fit([], tmp_path / "07-step.ckpt"), whole)


def test_a_checkpoint_of_another_pattern_is_refused(tmp_path: Path) -> None:
    run = trainer(NMTraining("1:4", freeze="75%"))
    run.fit(task(), *loaders())
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(MaskStateError, match=r"fc1\.weight.*saved as 1:4"):
        trainer(NMTraining("2:4"), max_epochs=4).fit(task(), *loaders(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


# -- what cannot work -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: NMTraining("unstructured"), PatternError, "unstructured is no N:M pattern"),
        (lambda: NMTraining(decay=-0.1), RecipeError, "decay is -0.1"),
        (lambda: NMTraining(decay=float("nan")), RecipeError, "decay is nan"),
    ],
)
def test_refused_when_it_is_built(build: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build()


@pytest.mark.parametrize(
    ("method", "of_task", "error", "says"),
    [
        (NMTraining("2:4", start="50%", freeze="40%"), {}, RecipeError, r"start \(step 12\).*freeze \(step 10\)"),
        (NMTraining("2:4", decrease_until="23st", freeze="22st"), {}, RecipeError, r"decrease_until \(step 23\)"),
        (NMTraining("2:4", freeze="99st"), {}, RecipeError, "freeze is at step 99, the run ends at 24"),
        (NMTraining("2:4"), {"optimizer": partial(torch.optim.LBFGS, lr=0.1)}, RecipeError, "LBFGS"),
        (NMTraining("2:5"), {}, PatternError, r"net\.fc1\.weight: 2:5 needs an input dimension that divides by 5"),
        (NMTraining("2:4", overrides={"fc2": Override("unstructured")}), {}, PatternError, r"fc2\.weight: unstructured"),
        (NMTraining("2:4", overrides={"fc2": Override(sparsity=0.75)}), {}, PatternError, r"fc2\.weight: 2:4 always has"),
        (NMTraining("2:4", overrides={"": Override(sparsity=0.0)}), {}, RecipeError, "nothing would be pruned"),
    ],
)
def test_refused_when_it_meets_the_run(method: NMTraining, of_task: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        trainer(method).fit(task(**of_task), *loaders())


class Twice(torch.optim.SGD):
    """Evaluates its closure before and after its step."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return closure()


def test_an_optimizer_that_looks_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="Twice evaluates its closure more than once"):
        trainer(NMTraining("2:4")).fit(task(optimizer=partial(Twice, lr=0.1)), *loaders())


def test_sparse_gradients_are_refused() -> None:
    class Lookup(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(4, 4, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            out: Tensor = self.table(batch[1]).sum()
            return out

        def configure_optimizers(self) -> Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(RecipeError, match=r"table\.weight has sparse gradients"):
        trainer(NMTraining("2:4", targets=Targets(embeddings=True))).fit(Lookup(), loaders()[0])


def test_weights_that_become_nan_end_the_run_by_name() -> None:
    with pytest.raises(DivergedError, match=r"net\.fc\d\.weight: .*NaN"):
        trainer(NMTraining("2:4")).fit(task(optimizer=partial(torch.optim.SGD, lr=float("nan"))), *loaders())
