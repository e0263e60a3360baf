"""Dynamic sparse training: masks move where they should, counts and patterns hold at every step, resume is exact."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparsetrain.callbacks import dynamic_sparse, growth_rules
from sparsetrain.callbacks.dense_gradient import DenseGradients
from sparsetrain.callbacks.dynamic_sparse import DynamicSparse
from sparsetrain.callbacks.growth_rules import Update, move, random_growth
from sparsetrain.errors import PatternError, RecipeError, SparsetrainError
from sparsetrain.masks import MaskManager, Override
from sparsetrain.pruning import prune
from sparsetrain.schedules import Cubic, OneShot
from sparsetrain.targets import Targets

from .promises import assert_pattern, assert_zeros, same_bits
from .ranks import Group
from .toys import TARGETS, Task, loaders, task, trainer, weights

SIZES = {"fc1.weight": 128, "fc2.weight": 256}
OFTEN = Update(every="3st", fraction=0.5, end="80%")  # after steps 3, 6, ... 18 of 24, annealed to 0 at 19
STEPS = [3, 6, 9, 12, 15, 18]


def method(rule: str, pattern: str = "unstructured", **settings: Any) -> DynamicSparse:
    return DynamicSparse(**({"sparsity": 0.5, "rule": rule, "pattern": pattern, "update": OFTEN} | settings))


class History(Callback):
    """Masks, weights and optimizer memory after every step, as copies; stands behind the method in the list."""

    def __init__(self, of: DynamicSparse) -> None:
        self.of = of
        self.masks: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.memory: list[dict[str, Tensor]] = []

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Task)
        plain = {t.name.removeprefix("net."): t.full_mask().clone() for t in self.of.masks}
        self.masks.append(plain)
        self.weights.append({n: w.clone() for n, w in weights(module).items()})
        states = {n: trainer.optimizers[0].state.get(module.net.get_parameter(n), {}) for n in TARGETS}
        self.memory.append({n: state["exp_avg"].clone() for n, state in states.items() if "exp_avg" in state})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == len(self.masks):
            self._look(trainer, pl_module)

    def dead(self, step: int) -> dict[str, int]:
        return {n: int((~m).sum()) for n, m in self.masks[step].items()}

    def moves(self) -> list[int]:
        """The steps at which any mask changed."""
        pairs = zip(self.masks, self.masks[1:], strict=False)
        return [i for i, (a, b) in enumerate(pairs, 1) if any(not torch.equal(a[n], b[n]) for n in a)]


def run(of: DynamicSparse, *others: Callback, module: Task | None = None, **settings: Any) -> History:
    history = History(of)
    fitter = trainer(of, history, *others, **settings)
    fitter.fit(module or task(), *loaders())
    assert of.verification is not None
    assert of.verification.ok
    return history


# -- counts and patterns ----------------------------------------------------------------------------------------------

#: Pattern -> what `promises` calls it, the sparsity asked of each tensor; ERK's: 24 of 128 + 256 over dimensions 24 and 32.
SERVED: dict[str, tuple[str, dict[str, float]]] = {
    "unstructured": ("unstructured", {"fc1.weight": 46 / 128, "fc2.weight": 146 / 256}),
    "unstructured:row": ("unstructured:row", {"fc1.weight": 0.5, "fc2.weight": 0.5}),
    "2:4": ("2:4", {"fc1.weight": 0.5, "fc2.weight": 0.5}),
    "neurons": ("neurons", {"fc1.weight": 0.5, "fc2.weight": 0.5}),
}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("pattern", SERVED)
@pytest.mark.parametrize("rule", ["set", "rigl"])
def test_the_population_is_constant_and_the_masks_move(rule: str, pattern: str, clip: float | None) -> None:
    kind, asked = SERVED[pattern]
    own = {"allocation": "uniform"} if pattern in ("unstructured:row", "neurons") else {}
    history = run(method(rule, pattern, **own), gradient_clip_val=clip)
    for masks, values in zip(history.masks, history.weights, strict=True):
        for name, mask in masks.items():
            assert_pattern(mask, kind, asked[name])
            assert_zeros(values[name], (~mask).flatten().nonzero().flatten(), name)
    assert set(history.moves()) <= set(STEPS)
    assert len(history.moves()) >= 3
    if rule == "set":
        assert [int((history.masks[2][n] & ~history.masks[3][n]).sum()) > 0 for n in SIZES] == [True, True]


def test_granet_follows_the_schedule_and_regrows() -> None:
    of = method("granet", sparsity=0.8)
    history = run(of)
    # Cubic from 0 to 0.8 over 19 steps, of 384 weights: floor(384 * 0.8 * (1 - (1 - t/19)^3)), counted by hand at t = 3, 9, 19.
    dead = [sum(history.dead(step).values()) for step in range(25)]
    assert dead[:3] == [0, 0, 0]
    assert dead[3] == dead[5] == 123
    assert dead[9] == 262
    assert dead[19] == dead[24] == 307
    assert sorted(dead) == dead
    assert history.dead(24) != {"fc1.weight": 102, "fc2.weight": 204}  # one threshold over both tensors
    grown = [c for c in of.masks.changes if c.why == "granet" and c.grew == c.died > 0]
    assert {c.step for c in grown} <= set(STEPS)
    assert len(grown) >= 4


def test_granet_may_start_sparse_and_prune_each_tensor_alike() -> None:
    history = run(method("granet", sparsity=0.75, allocation="uniform", schedule=Cubic("0st", "18st", "3st", initial=0.5)))
    assert history.dead(0) == {"fc1.weight": 64, "fc2.weight": 128}
    assert history.dead(24) == {"fc1.weight": 96, "fc2.weight": 192}


def test_sparse_momentum_moves_weights_between_tensors() -> None:
    history = run(method("sparse_momentum"))
    assert {sum(history.dead(step).values()) for step in range(25)} == {192}
    assert len({history.dead(step)["fc1.weight"] for step in range(25)}) > 2
    assert history.moves() == STEPS


# -- where connections grow -------------------------------------------------------------------------------------------


class Dense(Task):
    """A task that computes the dense gradient of every batch for itself, without any hook, before training does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        apart = copy.deepcopy(self.net)
        for parameter in apart.parameters():
            parameter.grad = None
        loss = F.cross_entropy(apart(batch[0]), batch[1])
        grads = torch.autograd.grad(loss, [apart.get_parameter(n) for n in TARGETS])
        every = self.trainer.accumulate_grad_batches
        if batch_idx % every == 0:
            self.dense = {n: torch.zeros_like(g) for n, g in zip(TARGETS, grads, strict=True)}
        for name, grad in zip(TARGETS, grads, strict=True):
            self.dense[name] += grad / every
        if batch_idx % every == every - 1:
            self.__dict__.setdefault("seen", []).append(self.dense)
        return super().training_step(batch, batch_idx)


class ByHand(Dense):
    """Manual optimization that leaves no gradient behind."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad()


def best(mask: Tensor, weight: Tensor, gradient: Tensor, fraction: float) -> Tensor:
    """RigL's update by sorting lists."""
    alive = mask.flatten().nonzero().flatten().tolist()
    strength, growth = weight.abs().flatten().tolist(), gradient.abs().flatten().tolist()
    count = int(fraction * len(alive))
    kept = set(sorted(alive, key=lambda i: strength[i])[count:])
    grown = sorted(set(range(mask.numel())) - kept, key=lambda i: -growth[i])[:count]
    return torch.tensor([i in kept or i in grown for i in range(mask.numel())]).view(mask.shape)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


LOOPS: dict[str, tuple[type[Dense], dict[str, Any]]] = {
    "plain": (Dense, {}),
    "clipped": (Dense, {"gradient_clip_val": 0.05}),
    "accumulated": (Dense, {"accumulate_grad_batches": 2}),
    "clipped and accumulated": (Dense, {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}),
    "manual": (ByHand, {}),
}


def assert_grown_where_the_gradient_is(loop: str, every: str) -> None:
    kind, settings = LOOPS[loop]
    torch.manual_seed(0)
    module = kind(optimizer=sgd)
    of = method("rigl", update=Update(every=every, fraction=0.6, end="10st"))
    history = History(of)
    trainer(of, history, max_epochs=3, **settings).fit(module, *loaders())
    for step, fraction in (
        (2, 0.542705),
        (4, 0.392705),
        (6, 0.207295),
        (8, 0.057295),
    ):  # 0.3 (1 + cos(36, 72, 108, 144 degrees))
        for name in TARGETS:
            before, gradient = history.masks[step - 1][name], module.seen[step - 1][name]
            # Weights before the update: those it has dropped are zero by now, and were the weakest.
            weight = of.before[step][name]
            assert torch.equal(history.masks[step][name], best(before, weight, gradient, fraction)), f"{name} at step {step}"


@pytest.fixture
def weights_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the method keep the weights it finds at an update."""
    real = growth_rules.move

    def spy(manager: MaskManager, rule: str, growth: Any, fraction: float, step: int) -> Any:
        model: Any = manager.model
        [of] = [c for c in model.trainer.callbacks if isinstance(c, DynamicSparse)]
        of.__dict__.setdefault("before", {})[step] = {n: w.clone() for n, w in weights(model).items()}
        return real(manager, rule, growth, fraction, step)

    monkeypatch.setattr(growth_rules, "move", spy)


@pytest.mark.usefixtures("weights_before")
@pytest.mark.parametrize("every", ["1st", "2st"])  # listening all the time, and now and then
@pytest.mark.parametrize("loop", LOOPS)
def test_rigl_grows_where_the_dense_gradient_is_largest(loop: str, every: str) -> None:
    assert_grown_where_the_gradient_is(loop, every)


@pytest.mark.usefixtures("weights_before")
@pytest.mark.parametrize("off", ["listen", "restart"])
def test_gradients_not_overheard_are_noticed(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseGradients, off, lambda *args: None)
    error, message = (RecipeError, "no target had a gradient") if off == "listen" else (AssertionError, "at step 2")
    with pytest.raises(error, match=message):
        assert_grown_where_the_gradient_is("clipped and accumulated", "1st")


@pytest.mark.parametrize("loop", LOOPS)
def test_sparse_momentum_remembers_dense_gradients(loop: str) -> None:
    kind, settings = LOOPS[loop]
    torch.manual_seed(0)
    module = kind(optimizer=sgd)
    of = method("sparse_momentum", update=Update(every="2st", fraction=0.5, end="10st", momentum=0.5))
    trainer(of, max_epochs=2, **settings).fit(module, *loaders())
    for name in TARGETS:
        expected = sum(gradients[name] * 2.0**-age for age, gradients in enumerate(reversed(module.seen)))
        torch.testing.assert_close(of.method_state()["momentum"][f"net.{name}"], expected, rtol=1e-4, atol=1e-6)
    assert int((of.method_state()["momentum"]["net.fc2.weight"][~of.masks.masks["net.fc2.weight"]] != 0).sum()) > 100


def test_what_grows_starts_at_zero_without_memory_and_what_stays_goes_on() -> None:
    history = run(method("set"))
    for step in STEPS[:4]:
        for name in TARGETS:
            before, now = history.masks[step - 1][name], history.masks[step][name]
            fresh, stays = now & ~before, now & before
            assert fresh.any()
            for values in (history.weights, history.memory):
                assert not values[step][name][fresh].any()
                assert values[step][name][stays].all()
                assert values[step + 1][name][fresh].any()  # and it trains


def test_an_overflowing_step_puts_the_update_off() -> None:
    class Overflow(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.global_step == 5:  # the step before the update after step 6
                pl_module.net.fc2.weight.grad[0, 0] = math.inf

    amp = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=64.0))  # type: ignore[attr-defined]
    history = run(method("rigl"), Overflow(), module=task(optimizer=sgd), plugins=[amp])
    assert history.moves()[:3] == [3, 7, 9]


# -- resume -----------------------------------------------------------------------------------------------------------


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        path = self.folder / f"{trainer.global_step:02d}.ckpt"
        if trainer.global_step and not path.exists():
            trainer.save_checkpoint(path)


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def fit(rule: str, *others: Callback, checkpoint: Path | None = None, seed: int = 7) -> dict[str, Any]:
    of, losses = method(rule, update=Update(every="3st", fraction=0.5, end="11st")), Losses()
    run = trainer(of, losses, *others, accumulate_grad_batches=2, gradient_clip_val=0.5)
    seed_everything(seed, verbose=False)
    module = task(seed=0 if checkpoint is None else 99, dropout=0.3, scheduler=True)
    run.fit(module, *loaders(), ckpt_path=checkpoint, weights_only=True)
    state = of.method_state()
    memory = {
        f"{i}.{k}": v for i, s in enumerate(run.optimizers[0].state.values()) for k, v in s.items() if isinstance(v, Tensor)
    }
    masks = {n: m.view(torch.uint8) for n, m in of.masks.masks.items()}
    bits = [module.state_dict(), memory, masks, state.pop("momentum")]
    return {"bits": bits, "same": [of.masks.changes, state], "losses": losses.seen}


def assert_same_run(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    for one, other in zip(resumed["bits"], whole["bits"], strict=True):
        same_bits(one, other)
    assert resumed["same"] == whole["same"]
    assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]


@pytest.mark.parametrize("rule", ["set", "rigl", "granet", "sparse_momentum"])
def test_resume_equals_uninterrupted(rule: str, tmp_path: Path) -> None:
    whole = fit(rule, Save(tmp_path))
    assert {3, 6, 9} <= {change.step for change in whole["same"][0]}
    assert bool(whole["bits"][3]) == (rule == "sparse_momentum")
    for step in (1, 2, 3, 5, 6, 7, 10):
        assert_same_run(fit(rule, checkpoint=tmp_path / f"{step:02d}.ckpt", seed=1234), whole)


@pytest.mark.parametrize(("rule", "forgets"), [("rigl", "done"), ("sparse_momentum", "momentum")])
def test_a_run_that_forgets_is_another(rule: str, forgets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(rule, Save(tmp_path))
    real = DynamicSparse.method_state
    monkeypatch.setattr(DynamicSparse, "method_state", lambda self: real(self) | {forgets: 0 if forgets == "done" else {}})
    fit(rule, Save(tmp_path / "more"))
    monkeypatch.setattr(DynamicSparse, "method_state", real)
    with pytest.raises(AssertionError):
        assert_same_run(fit(rule, checkpoint=tmp_path / "more" / "07.ckpt", seed=1234), whole)


# -- masks that are there already ---------------------------------------------------------------------------------------


def test_a_second_fit_goes_on_with_its_masks() -> None:
    of, module = method("rigl"), task()
    run(of, module=module)
    ended = {n: m.clone() for n, m in of.masks.masks.items()}
    history = run(of, module=module)
    assert all(torch.equal(m, ended[f"net.{n}"]) for n, m in history.masks[0].items())
    assert history.moves()


@pytest.mark.parametrize("sparsity", [0.7, None])
def test_masks_of_another_method_are_taken_over(sparsity: float | None) -> None:
    module = task()
    manager = MaskManager(module)
    prune(manager, 0.7, allocation="global")
    started = {n.removeprefix("net."): m.clone() for n, m in manager.masks.items()}
    of = method("rigl", sparsity=sparsity)
    of.use(module, manager)
    history = run(of, module=module)
    assert all(torch.equal(m, started[n]) for n, m in history.masks[0].items())
    assert history.dead(24) == history.dead(0)
    assert of.asked() == (None if sparsity is None else pytest.approx(268 / 384))


# -- what cannot work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rule": "riggle"}, RecipeError, "known are set, rigl.*Did you mean 'rigl'"),
        ({"allocation": "global"}, RecipeError, "'erk' or 'uniform'"),
        ({"schedule": Cubic()}, RecipeError, "only 'granet'"),
        ({"rule": "granet", "schedule": "cubic"}, RecipeError, "only 'granet' follows one"),
        ({"sparsity": 0.0}, RecipeError, "nothing would be sparse"),
        ({"rule": "granet", "sparsity": None}, RecipeError, "nothing would be sparse"),
        ({"rule": "granet", "pattern": "2:4"}, RecipeError, "2:4 has only one sparsity.*'rigl'"),
        ({"rule": "granet", "pattern": "unstructured:row"}, RecipeError, "allocation 'uniform'"),
        ({"rule": "sparse_momentum", "pattern": "2:4"}, RecipeError, "use 'unstructured', or rule 'rigl'"),
        ({"rule": "sparse_momentum", "pattern": "neurons"}, RecipeError, "use 'unstructured', or rule 'rigl'"),
        ({"pattern": "2:4", "allocation": "erk"}, RecipeError, "leave allocation 'erk' out"),
        ({"sparsity": 90}, PatternError, "outside"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(settings: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        DynamicSparse(**({"sparsity": 0.5} | settings))


@pytest.mark.parametrize("settings", [{"fraction": 0.0}, {"fraction": 1.5}, {"momentum": 1.0}, {"every": "soon"}, {"end": "x"}])
def test_impossible_updates_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        Update(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "2:4", "sparsity": 0.75}, "always has sparsity 0.5"),
        ({"pattern": "neurons", "sparsity": 0.01, "allocation": "uniform"}, "fc1.weight: .*prunes none"),
        ({"sparsity": None}, "how sparse"),
        ({"update": Update(every="30st")}, "never move"),
        ({"rule": "granet", "schedule": OneShot("24st")}, "run ends at 24"),
    ],
)
def test_what_does_not_fit_the_model_or_the_run_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsetrainError, match=message):
        trainer(method("rigl", **settings) if "rule" not in settings else method(**settings)).fit(task(), *loaders())


def test_another_sparsity_than_that_of_the_masks_is_refused() -> None:
    module = task()
    manager = MaskManager(module)
    prune(manager, 0.5)
    of = method("rigl", sparsity=0.75)
    of.use(module, manager)
    with pytest.raises(RecipeError, match="prunes 288 of 384 weights, and the masks there are prune 192"):
        trainer(of).fit(module, *loaders())


def test_sharded_models_and_single_sparsities_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = task()
    with pytest.raises(RecipeError, match=r"fc1.weight: .*drop its override"):
        method("granet").use(module, MaskManager(module, overrides={"fc1": Override(sparsity=0.25)}))
    monkeypatch.setattr(dynamic_sparse, "local", lambda parameter: parameter.detach())
    with pytest.raises(RecipeError, match="sharded over ranks"):
        trainer(method("rigl")).fit(task(), *loaders())


def test_masks_that_never_move_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(
        UserWarning, match=r"masks of net.fc1.weight, net.fc2.weight never moved in 6 updates.*raise update.fraction"
    ):
        run(method("rigl", sparsity=0.97, update=Update(every="3st", fraction=0.05, end="80%")))
    monkeypatch.setattr(growth_rules, "drop_and_grow", lambda pattern, mask, *args: mask)
    with pytest.warns(UserWarning, match="never moved"):
        history = run(method("set"))
    assert not history.moves()  # what every other test here asserts would not hold


def test_zeros_that_are_no_masks_are_told() -> None:
    module = task()
    with torch.no_grad():
        module.net.fc2.weight[:3] = 0.0
    with pytest.warns(UserWarning, match=r"fc2.weight is 19% zero already.*adopt"):
        run(method("set"), module=module)


def test_a_fit_after_the_last_update_changes_nothing() -> None:
    of, module = method("rigl"), task()
    fitter = trainer(of, max_epochs=3)
    fitter.fit(module, *loaders())
    ended = {n: m.clone() for n, m in of.masks.masks.items()}
    fitter.fit_loop.max_epochs = 4
    of.update = Update(every="3st", fraction=0.5, end="20st")
    fitter.fit(module, *loaders())  # no warning: no update was due
    assert fitter.global_step == 32
    assert all(torch.equal(m, ended[n]) for n, m in of.masks.masks.items())


def test_a_run_cut_short_is_told() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 7

    with pytest.warns(UserWarning, match=r"after 2 of 6 updates of the masks, at sparsity 0\.5000"):
        run(method("rigl"), Stop())


# -- transposed storage, and ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "neurons", "unstructured:row"])
def test_transposed_layers_move_by_their_outputs(pattern: str) -> None:
    model = nn.Sequential(Conv1D(6, 8))  # stored as (8 in, 6 out)
    manager = MaskManager(model, Targets(head=True), pattern)
    [tensor] = manager
    manager.update(tensor.name, 0.5, tensor.target.parameter.detach().abs())
    before = tensor.full_mask().clone()
    moved = move(manager, "set", {tensor.name: random_growth(tensor, "x")}, 0.7, 1)
    assert moved[tensor.name] == int((before & ~tensor.full_mask()).sum()) > 0
    assert_pattern(tensor.full_mask().T, pattern, 0.5)


def on_two_ranks(folder: Path) -> list[dict[str, Tensor]]:
    """Clipped, where gradients are overheard before ranks exchange them; then without that exchange."""
    found = []
    reduce = DDPStrategy.reduce
    for rule, exchange in (("rigl", True), ("sparse_momentum", True), ("rigl", False)):
        if not exchange:
            DDPStrategy.reduce = lambda self, tensor, *args, **kwargs: tensor  # type: ignore[assignment, method-assign]
        of = method(rule, update=Update(every="2st", fraction=0.5, end="100%"))
        run = trainer(of, gradient_clip_val=0.5, devices=2, strategy=DDPStrategy(), max_epochs=1)
        run.fit(task(), *loaders())
        found.append({n: m.clone() for n, m in of.masks.masks.items()} | {"moved": torch.tensor(of.facts()["moved"])})
    DDPStrategy.reduce = reduce  # type: ignore[method-assign]
    return found


def test_two_ranks_grow_the_same_connections(tmp_path: Path) -> None:
    one, other = Group(on_two_ranks, tmp_path).results()
    for run in range(3):
        same = all(torch.equal(one[run][n], other[run][n]) for n in one[run])
        assert same == (run < 2), "the last run, without exchange, must differ"
        assert int(one[run]["moved"]) > 20


def test_final_sparsities_add_up_to_what_was_asked() -> None:
    for rule in ("rigl", "granet"):
        of = method(rule, sparsity=0.8)
        of.use(task())
        assert of.asked() == pytest.approx(Fraction(307, 384) if rule == "rigl" else 0.8)
