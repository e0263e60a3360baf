"""Group lasso in a run: units go, the asked budget is reached, what is compact is the same network, and resuming is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sparsetrain.callbacks import GroupLasso, Groups, Guard, Penalty, group_lasso, group_penalty, structured
from sparsetrain.errors import MaskStateError, RecipeError, TargetError
from sparsetrain.structure import find_structure

from .promises import same_bits
from .test_resume import SaveAlways, Trace
from .toys import Net, Task, adamw, loaders, task, trainer

#: fc1 (8 -> 16), fc2 (16 -> 16) and head (16 -> 3), with biases: what the units of fc1 and fc2 cut.
FULL = 8 * 16 + 16 + 16 * 16 + 16 + 16 * 3
SPAN = ("2st", "9st")


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3)


def method(sparsity: float | None = 0.6, compact: str | None = None, **settings: Any) -> GroupLasso:
    return GroupLasso(sparsity, **({"span": SPAN, "penalty": Penalty(every=1)} | settings), compact=compact)


def fit(
    lasso: GroupLasso, *others: Callback, checkpoint: Path | None = None, seed: int = 7, optimizer: Any = adamw, **settings: Any
) -> dict[str, Any]:
    trace = Trace()
    run = trainer(lasso, *others, trace, **({"val_check_interval": 0.5, "max_epochs": 2} | settings))
    seed_everything(seed, verbose=False)
    module = task(seed=0 if checkpoint is None else 99, dropout=0.3, scheduler=optimizer is not plain, optimizer=optimizer)
    run.fit(module, *loaders(), ckpt_path=checkpoint, weights_only=True)
    memory = [{k: v for k, v in state.items() if isinstance(v, Tensor)} for state in run.optimizers[0].state.values()]
    return {
        "module": module,
        "weights": module.state_dict(),
        "optimizer": {f"{i}.{k}": v for i, state in enumerate(memory) for k, v in state.items()},
        "masks": {n: m.view(torch.uint8) for n, m in lasso.masks.masks.items()},
        "importance": lasso.method_state()["importance"],
        "strength": lasso.strength,
        "left": lasso.left(),
        "changes": lasso.masks.changes,
        "losses": trace.losses,
        "random": torch.get_rng_state(),
    }


def counted(module: Task) -> int:
    """What is left, by looking: a unit lives if its row, its bias and its column are not all zero."""
    net = module.net
    first = ((net.fc1.weight != 0).any(1) | (net.fc1.bias != 0)) & (net.fc2.weight != 0).any(0)
    second = ((net.fc2.weight != 0).any(1) | (net.fc2.bias != 0)) & (net.head.weight != 0).any(0)
    one, two = int(first.sum()), int(second.sum())
    return 8 * one + one + one * two + two + two * 3


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize(("kind", "weights"), [("adaptive", "cost"), ("prox", "cost"), ("prox", "size")])
def test_the_asked_share_of_parameters_is_gone(kind: Any, weights: Any, optimizer: Any) -> None:
    lasso = method(penalty=Penalty(kind, every=1 if kind == "adaptive" else 2, weights=weights))
    found = fit(lasso, optimizer=optimizer)
    left = counted(found["module"])
    assert left <= 0.4 * FULL
    if kind == "adaptive":  # one unit more would have been too few: the largest costs 8 + 1 + 16
        assert left > 0.4 * FULL - 25
    assert lasso.gone() == pytest.approx(1 - left / FULL)
    assert lasso.facts()["structure"]["units"] == {n: list(pair) for n, pair in found["left"].items()}
    assert lasso.verification is not None
    assert lasso.verification.ok


def test_the_metric_of_adam_needs_its_steps() -> None:
    found = fit(method(penalty=Penalty("prox_metric", every=1, strength=0.2)), optimizer=adamw)
    assert counted(found["module"]) <= 0.4 * FULL
    assert {change.why for change in found["changes"]} & {"group lasso"}


def test_flops_are_another_budget() -> None:
    """A convolution over 6 x 6 positions costs 36 times its weights; the layer behind it, once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 40), nn.ReLU(), nn.Linear(40, 2))
    lasso = GroupLasso(0.5, budget="flops", groups=Groups(sample=torch.zeros(1, 1, 8, 8)))
    lasso.use(net)
    assert lasso.cost is not None
    assert lasso.cost.full == 8 * 9 * 36 + 8 * 36 * 40 + 40 * 2
    half = {"0": torch.arange(8) < 4, "3": torch.arange(40) < 30}
    assert lasso.cost.cost({name: int(units.sum()) for name, units in half.items()}) == 4 * 9 * 36 + 4 * 36 * 10 + 10 * 2


def test_it_is_the_penalty_that_makes_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(lasso: GroupLasso) -> set[str]:
        return {change.why for change in fit(lasso)["changes"]}

    strong: dict[str, Any] = {"sparsity": None, "penalty": Penalty("prox", every=1, strength=30.0)}
    assert why(method(**strong)) == {"group lasso"}
    monkeypatch.setattr(group_lasso, "shrink", lambda *args: None)
    with pytest.warns(UserWarning, match="no unit became zero with strength 30"):
        assert why(method(**strong)) == set()
    assert why(method(penalty=Penalty("prox", every=1))) == {"budget"}


class BeforeTheEnd(Callback):
    """The norms of all units' outgoing weights, before the step that ends the span."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 8:
            weights = [pl_module.net.fc2.weight.detach(), pl_module.net.head.weight.detach()]
            self.norms = torch.cat([weight.norm(dim=0) for weight in weights])


def test_units_are_small_before_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a long way ahead those next in line have shrunk; without the operator none has."""

    def smallest() -> float:
        seen = BeforeTheEnd()
        fit(method(0.5, span=("2st", "10st")), seen)
        return float(seen.norms[seen.norms > 0].min())

    monkeypatch.setattr(group_lasso, "AHEAD", 0.5)
    shrunk = smallest()
    monkeypatch.setattr(group_lasso, "shrink", lambda *args: None)
    assert shrunk < 0.7 * smallest()


@pytest.mark.parametrize("kind", ["subgradient", "ssl", "hoyer", "growing"])
def test_every_kind_of_penalty_shrinks_what_it_is_for(kind: Any) -> None:
    """Against the run without: Hoyer makes the small units smaller, the others all of those that are to go."""
    seen = {}
    for strength in (1e-12, 0.3 if kind in ("hoyer", "growing") else 0.03):
        watch = BeforeTheEnd()
        found = fit(method(penalty=Penalty(kind, strength=strength, every=1)), watch, optimizer=plain)
        assert counted(found["module"]) <= 0.4 * FULL
        seen[strength] = watch.norms.sort().values[:8].sum()
    without, with_it = seen.values()
    assert with_it < 0.9 * without


# -- compaction ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["3st", "end"])
def test_the_compact_run_is_the_masked_run(when: str) -> None:
    """Without dropout, whose random numbers depend on shapes, both learn the same."""
    outputs, sizes = {}, {}
    for compact in (when, None):
        lasso = method(compact=compact)
        module = task(dropout=0.0, scheduler=True, optimizer=sgd).double()
        generator = torch.Generator().manual_seed(3)
        x, y = torch.randn(32, 8, generator=generator).double(), torch.randint(3, (32,), generator=generator)
        data = DataLoader(TensorDataset(x, y), batch_size=4)
        trainer(lasso, max_epochs=2).fit(module, data, data)
        outputs[compact] = module.eval()(x)
        sizes[compact] = tuple(module.net.fc2.weight.shape)
        assert lasso.left()["net.fc1"][0] == (sizes[compact][1] if compact else lasso.left()["net.fc1"][0])
    torch.testing.assert_close(outputs[when], outputs[None], rtol=0, atol=1e-9)
    assert sizes[when] != sizes[None] == (16, 16)


def test_the_compact_weights_load_into_a_plain_network(tmp_path: Path) -> None:
    lasso = method(compact="3st")
    run = trainer(lasso, max_epochs=2)
    module = task(scheduler=True)
    run.fit(module, *loaders())
    run.save_checkpoint(tmp_path / "final.ckpt")
    hidden, second = lasso.left()["net.fc1"][0], lasso.left()["net.fc2"][0]
    plain = Net()
    plain.fc1, plain.fc2, plain.head = nn.Linear(8, hidden), nn.Linear(hidden, second), nn.Linear(second, 3)
    state = torch.load(tmp_path / "final.ckpt", weights_only=True)["state_dict"]
    plain.load_state_dict({name.removeprefix("net."): value for name, value in state.items()}, strict=True)
    x = torch.randn(4, 8)
    assert torch.equal(plain.eval()(x), module.eval()(x))


METHODS: dict[str, Callable[[], tuple[GroupLasso, ...]]] = {
    "masked": lambda: (method(),),
    "compact": lambda: (method(compact="3st"),),
    "controlled": lambda: (method(compact="2st", penalty=Penalty("prox", every=1, warmup="2st")),),
    "growing": lambda: (method(penalty=Penalty("growing", every=1, strength=0.05)),),
    "guarded": lambda: (method(guard=Guard("val/accuracy", 0.05)),),
}


@pytest.mark.parametrize("name", METHODS)
def test_resume_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [*METHODS[name](), EMAWeightAveraging(decay=0.8)]

    whole = fit(*callbacks(), SaveAlways(tmp_path))
    if name == "compact":
        assert (
            len({tuple(torch.load(c, weights_only=True)["state_dict"]["net.fc2.weight"].shape) for c in tmp_path.iterdir()})
            >= 3
        )
    for checkpoint in sorted(tmp_path.iterdir()):
        if checkpoint.name.startswith("16-") and "step" not in checkpoint.name:
            continue  # there the run is over
        again = fit(*callbacks(), checkpoint=checkpoint, seed=1234)
        for part in ("weights", "optimizer", "masks", "importance"):
            same_bits(whole[part], again[part])
        assert (again["strength"], again["left"]) == (whole["strength"], whole["left"]), checkpoint.name
        assert again["losses"] == whole["losses"][len(whole["losses"]) - len(again["losses"]) :], checkpoint.name


def test_without_what_it_remembers_resume_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(method(compact="3st"), SaveAlways(tmp_path))
    with monkeypatch.context() as off:
        off.setattr(GroupLasso, "load_method_state", lambda self, state: None)
        again = fit(method(compact="3st"), checkpoint=tmp_path / "04-step.ckpt", seed=1234)
        assert again["losses"] != whole["losses"][len(whole["losses"]) - len(again["losses"]) :]
    monkeypatch.setattr(GroupLasso, "catch_up", lambda self, saved, copies: None)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(method(compact="3st"), checkpoint=tmp_path / "04-step.ckpt", seed=1234)


def test_a_model_that_has_lost_more_is_refused(tmp_path: Path) -> None:
    lasso = method(compact="3st")
    fit(lasso, SaveAlways(tmp_path))
    with pytest.raises(MaskStateError, match="lost more units than the checkpoint's had"):
        lasso.catch_up([])


def test_a_second_fit_goes_on_from_the_compact_model(tmp_path: Path) -> None:
    lasso = method(compact="3st")
    module = task(scheduler=True)
    trainer(lasso, max_epochs=2).fit(module, *loaders())
    left = lasso.left()
    trainer(lasso, max_epochs=2).fit(module, *loaders())
    assert lasso.left() == left
    other = task(seed=1, scheduler=True)
    trainer(lasso, max_epochs=2).fit(other, *loaders())
    assert lasso.left()["net.fc1"][1] == 16
    assert lasso.gone() >= 0.6


def test_the_average_shrinks_along() -> None:
    lasso, average = method(compact="3st"), EMAWeightAveraging(decay=0.8)
    module = task(scheduler=True)
    trainer(lasso, average, max_epochs=2).fit(module, *loaders())
    assert average._average_model is not None
    copy = average._average_model.module
    assert copy.net.fc2.weight.shape == module.net.fc2.weight.shape != (16, 16)


# -- limits and mistakes --------------------------------------------------------------------------------------------------


class Best(Callback):
    """Before the first validation, which is after 4 steps: once it was better than any accuracy can be."""

    def __init__(self, lasso: GroupLasso) -> None:
        self.lasso = lasso

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.lasso._best = 2.0


def test_the_guard_holds_it_back() -> None:
    def gone(margin: float) -> float:
        lasso = method(
            None, penalty=Penalty("prox", every=1, strength=30.0), guard=Guard("val/accuracy", margin), span=("9st", "14st")
        )
        fit(lasso, Best(lasso))
        return lasso.gone()

    with pytest.warns(UserWarning, match="no unit became zero"):
        assert gone(0.5) == 0.0
    assert gone(3.0) > 0.0


def test_no_group_falls_below_its_least() -> None:
    lasso = method(None, penalty=Penalty("prox", every=1, strength=1e4), groups=Groups(at_least=3))
    fit(lasso)
    assert lasso.left() == {"net.fc1": (3, 16), "net.fc2": (3, 16)}


def test_groups_that_are_left_out_stay_whole() -> None:
    lasso = method(0.2, groups=Groups(exclude=("fc1",)))
    fit(lasso)
    assert set(lasso.left()) == {"net.fc2"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupLasso(), r"needs sparsity.*or a penalty with a strength"),
        (lambda: method(1.0), r"1\.0|\[0, 1\)"),
        (lambda: method(budget="seconds"), r"budget='seconds'; there are parameters, flops"),
        (lambda: Penalty("proxx"), r"kind='proxx'.*kinds are adaptive, prox, "),
        (lambda: Penalty("prox", strength=-1.0), r"strength=-1\.0: a positive number"),
        (lambda: Penalty(strength=1.0), r"'adaptive' follows the budget and takes no strength"),
        (lambda: Penalty(every=0), r"every=0"),
        (lambda: Penalty("ssl", l1=0.5), r"l1=0\.5 with kind 'ssl'"),
        (lambda: Guard("val/loss", -1.0), r"margin=-1\.0"),
        (lambda: Groups(kinds=("filters",)), r"kinds has 'filters'.*filter"),
        (lambda: Groups(kinds=()), r"kinds is empty"),
        (lambda: Groups(at_least=0), r"at_least=0"),
        (
            lambda: GroupLasso(penalty=Penalty("ssl", strength=0.1)),
            r"'ssl' is a term of the loss and makes nothing zero",
        ),
        (lambda: method(penalty=Penalty("prox"), groups=Groups(alike=True)), r"groups\.alike needs penalty 'adaptive'"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"span": ("5st", "5st")}, r"from step 5 to step 5"),
        ({"span": ("5st", "50st")}, r"to step 50 of 16"),
        ({"sparsity": 0.99}, r"with at_least=1, multiple=1 in 2 groups at most 0\.9"),
        ({"sparsity": 0.8, "groups": Groups(multiple=8)}, r"multiple=8 in 2 groups at most 0\.6"),
        ({"compact": "0st"}, r"never"),
        ({"groups": Groups(kinds=("head",))}, r"no group of kind head.*net\.fc1 \(neuron\): not asked for"),
        ({"guard": Guard("val/f1", 0.1)}, r"guard\.monitor 'val/f1' is not logged; logged are val/accuracy"),
        ({"penalty": Penalty("prox_metric", strength=0.1)}, r"in the metric of Adam's steps, and SGD has none"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((RecipeError, TargetError), match=message):
        fit(method(**settings), optimizer=sgd)


def test_weights_nobody_trains_are_refused() -> None:
    module = task(scheduler=False)
    module.make_optimizer = lambda parameters: torch.optim.SGD(module.net.fc1.parameters(), lr=0.1)
    with pytest.raises(RecipeError, match="weights that no optimizer trains"):
        trainer(method(), max_epochs=2).fit(module, *loaders())


def test_steps_that_overflow_are_not_counted() -> None:
    """As under AMP: the gradient of a step that is skipped says nothing of importance."""
    reading = group_penalty.Reading(net := Net(), find_structure(net, torch.zeros(1, 8))["fc1"])
    net(torch.ones(2, 8)).sum().backward()
    reading.watch(0.5)
    before = reading.importance.clone()
    assert net.fc2.weight.grad is not None
    net.fc2.weight.grad[0, 0] = float("inf")
    reading.watch(0.5)
    assert torch.equal(reading.importance, before)
    assert float(before.max()) > 0


def test_importance_is_what_the_loss_would_miss_to_first_order() -> None:
    """Of unit u: the square of ``sum_i w_i dL/dw_i``, which autograd gives as the derivative by a factor of the unit."""
    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(6, 8).double()
    reading = group_penalty.Reading(net, find_structure(net, x)["fc1"])
    factor = torch.ones(16, dtype=torch.float64, requires_grad=True)
    hidden = torch.relu(net.fc1(x)) * factor
    loss = net.head(torch.tanh(net.fc2(hidden))).square().sum()
    (derivative,) = torch.autograd.grad(loss, factor, retain_graph=True)
    loss.backward()
    reading.watch(0.0)
    torch.testing.assert_close(reading.importance, derivative.square().float())


@pytest.mark.parametrize("kind", ["adaptive", "prox"])
def test_it_goes_with_accumulation_and_manual_optimization(kind: Any) -> None:
    lasso = method(penalty=Penalty(kind, every=1), span=("2st", "6st"))
    fit(lasso, accumulate_grad_batches=2)
    assert lasso.gone() >= 0.6

    class Manual(Task):
        def __init__(self) -> None:
            super().__init__(optimizer=sgd)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return loss

    lasso = method(penalty=Penalty(kind, every=1), compact="3st")
    module = Manual()
    trainer(lasso, max_epochs=2).fit(module, *loaders())
    assert lasso.gone() >= 0.6
    assert module.net.fc2.weight.shape != (16, 16)


def test_frozen_weights_are_refused_before_anything_shrinks() -> None:
    for penalty in (Penalty(every=1), Penalty("subgradient", every=1, strength=0.1)):
        module = task(scheduler=True, optimizer=sgd)
        module.net.head.requires_grad_(False)
        with pytest.raises(RecipeError, match="weights that no optimizer trains"):
            trainer(method(penalty=penalty), max_epochs=2).fit(module, *loaders())
        assert bool((module.net.fc2.weight != 0).all())


def test_a_checkpoint_of_other_groups_is_refused(tmp_path: Path) -> None:
    fit(method(groups=Groups(kinds=("neuron", "input"))), SaveAlways(tmp_path))
    with pytest.raises(MaskStateError, match=r"shrank net\.fc1.*inputs.*this run net\.fc1"):
        fit(method(), checkpoint=tmp_path / "05-step.ckpt", seed=1234)


def test_what_the_guard_holds_back_to_the_end_is_told_and_not_pruned() -> None:
    def gone(margin: float) -> float:
        lasso = method(guard=Guard("val/accuracy", margin), span=("9st", "14st"))
        fit(lasso, Best(lasso))
        return lasso.gone()

    with pytest.warns(UserWarning, match=r"0\.6 were asked; it is held back by the guard"):
        assert gone(0.5) == 0.0
    assert gone(3.0) >= 0.6


def test_streams_and_loaders_without_a_first_sample() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            for _ in range(8):
                yield torch.randn(8), torch.tensor(1)

    lasso = method(0.2, span=("1st", "3st"))
    trainer(lasso, max_epochs=1).fit(task(optimizer=sgd), DataLoader(Stream(), batch_size=2), loaders()[1])
    assert lasso.gone() >= 0.2
    with pytest.raises(RecipeError, match=r"training data are a dict.*example_input_array"):
        trainer(method(), max_epochs=1).fit(task(), {"one": loaders()[0]}, loaders()[1])


class Tied(nn.Module):
    """A tied head reads the embedding's features under another name than they are cut by."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        e = self.emb(x)
        logits: Tensor = self.head(e + self.mid(e))
        return logits


def test_a_tied_head_reads_too() -> None:
    net = Tied()
    group = find_structure(net, torch.arange(6)[None])["emb"]
    reads = group_penalty.Reading(net, group).reads
    assert reads is not None
    assert {id(part.tensor) for part in reads.parts} == {id(net.emb.weight), id(net.mid.weight)}


def test_a_guard_that_sees_nothing_or_nan_is_no_open_door() -> None:
    assert Guard("val/accuracy", 0.1).trips(float("nan"), 0.9)
    with pytest.raises(RecipeError, match="guard watches a metric of validation"):
        fit(method(guard=Guard("val/accuracy", 0.1)), limit_val_batches=0)


def test_a_second_fit_shrinks_again() -> None:
    lasso = method(None, penalty=Penalty("prox", every=1, strength=14.0))
    module = task(scheduler=True)
    trainer(lasso, max_epochs=2).fit(module, *loaders())
    left = sum(count for count, _ in lasso.left().values())
    trainer(lasso, max_epochs=2).fit(module, *loaders())
    assert sum(count for count, _ in lasso.left().values()) < left


def test_what_cannot_be_taken_out_stays_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise TargetError("nobody knows how to cut that")

    monkeypatch.setattr(structured, "compact", refuse)
    lasso = method(compact="3st")
    with pytest.raises(TargetError, match="nobody knows"):
        fit(lasso)
    assert lasso.masks.optimizers
