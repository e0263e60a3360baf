"""Calibration: nothing is left behind, every way it cannot work is refused, and inside Lightning it is no training step."""

from __future__ import annotations

import inspect
import textwrap
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import BatchEncoding
from transformers.pytorch_utils import Conv1D

from sparsetrain.calibration import calibrate, first_alone, rebatch, samples, watch
from sparsetrain.callbacks import PruneFinetune
from sparsetrain.criteria import (
    NAMES,
    PLATON,
    SNIP,
    ActivationMean,
    Fisher,
    Gradient,
    Movement,
    Seen,
    StatisticsCriterion,
    Taylor,
)
from sparsetrain.errors import DataError, DivergedError, RecipeError, TargetError
from sparsetrain.masks import MaskManager
from sparsetrain.pruning import prune
from sparsetrain.schedules import OneShot
from sparsetrain.targets import Targets
from tests.contracts.toys import Task, loaders, task, trainer

STATISTICS = [name for name, kind in NAMES.items() if issubclass(kind, StatisticsCriterion)]
CALIBRATED = [name for name in STATISTICS if NAMES[name].source == "calibration"]
#: Neurons suit criteria of outputs; SparseGPT has nothing to move there.
PATTERN = {"sparsegpt": "unstructured"}
WATCHING = [name for name in STATISTICS if NAMES[name].source == "training"]


class Awkward(nn.Module):
    """Everything that calibration could leave behind: norms in training, noise in eval, gradients pending, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.norm, self.drop, self.fc2 = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.norm.eval()
        self.fc1.weight.requires_grad_(False)
        self.fc2.weight.grad = torch.full((3, 6), 7.0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.fc2(self.drop(self.norm(torch.relu(self.fc1(x)))) + 0.1 * torch.randn(6))
        return result


def batches(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)) for _ in range(count)]


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "needed": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "random": torch.get_rng_state(),
        "enabled": torch.is_grad_enabled(),
    }


def differences(one: Any, other: Any) -> list[str]:
    if isinstance(one, dict):
        return [f"{key}: {d}" for key in one for d in differences(one[key], other[key])]
    same = torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other or one == other
    return [] if same else [f"{one} != {other}"]


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("broken", [False, True])
def test_calibration_leaves_everything_as_it_was(name: str, broken: bool) -> None:
    model = Awkward()
    manager, criterion = MaskManager(model, pattern=PATTERN.get(name, "neurons")), NAMES[name]()
    assert isinstance(criterion, StatisticsCriterion)
    before = snapshot(model)
    data = [*batches(), (torch.full((2, 4), torch.nan), torch.zeros(2).long())] if broken else batches()
    try:
        calibrate(manager, criterion, DataLoader(data, batch_size=None, shuffle=True), loss_of(model))
        assert not broken
    except DivergedError:
        assert broken
    assert differences(before, snapshot(model)) == []
    assert len({t.requires_grad for memory in criterion.memory.values() for t in memory.values()}) <= 1


def test_the_snapshot_would_notice() -> None:
    model = Awkward()
    before = snapshot(model)
    model.train()
    loss_of(model)(batches()[0]).backward()
    found = " ".join(differences(before, snapshot(model)))
    for part in ("state: norm.running_mean", "state: calls", "grads: fc2.weight", "modes: norm", "random"):
        assert part in found


def test_the_criterion_does_not_see_gradients_that_were_pending() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.full((1, 2), 100.0)
    criterion = Gradient()
    calibrate(MaskManager(model), criterion, [torch.tensor([[1.0, -2.0]])], lambda batch: model(batch).sum())
    assert criterion.score(model.weight, name="weight").tolist() == [[1.0, 2.0]]
    assert model.weight.grad.tolist() == [[100.0, 100.0]]


def test_only_as_many_batches_as_asked_and_a_fresh_start_each_time() -> None:
    model = nn.Linear(2, 1, bias=False)
    manager, criterion = MaskManager(model), SNIP(batches=2)
    with torch.no_grad():
        model.weight.fill_(1.0)
    endless = iter(lambda: torch.ones(1, 2), None)
    for _ in range(2):
        assert calibrate(manager, criterion, endless, lambda batch: model(batch).sum()) == 2
        assert criterion.score(model.weight, name="weight").tolist() == [[2.0, 2.0]]
    assert calibrate(manager, Fisher(batches=2), [torch.ones(5, 2)] * 9, lambda batch: model(batch).sum()) == 10


def test_a_progress_bar_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(4, 3)
    assert calibrate(MaskManager(model), Taylor(), batches(), loss_of(model), progress=True) == 3


# -- what cannot work -------------------------------------------------------------------------------------------------------


def test_no_data() -> None:
    model = nn.Linear(4, 3)
    empty = DataLoader(TensorDataset(torch.zeros(3, 4), torch.zeros(3).long()), batch_size=8, drop_last=True)
    with pytest.raises(DataError, match=r"Taylor needs data.*gives no batches.*drop_last"):
        calibrate(MaskManager(model), Taylor(), empty, loss_of(model))


@pytest.mark.parametrize("name", STATISTICS)
def test_data_that_was_never_shown(name: str) -> None:
    model = nn.Linear(4, 4)
    way = "calibration.watch" if name in WATCHING else "calibration.calibrate"
    with pytest.raises(RecipeError, match=rf"weight from data and has seen none: .*{way}"):
        prune(MaskManager(model, pattern=PATTERN.get(name, "neurons")), 0.5, criterion=name)
    assert model.weight.all()


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    data = [batches()[0], (torch.full((2, 4), torch.inf), torch.zeros(2).long())]
    with pytest.raises(DivergedError, match=r"gradient of 0\.weight is not finite in batch 1, where the loss is nan"):
        calibrate(
            MaskManager(
                model,
            ),
            Gradient(),
            data,
            loss_of(model),
        )
    with pytest.raises(DivergedError, match=r"output of 0\.weight is not finite in batch 1"):
        calibrate(MaskManager(model), ActivationMean(), data, lambda batch: model(batch[0]))


@pytest.mark.parametrize("batch", [(torch.ones(3, 2), torch.ones(2)), {"a": torch.tensor(1.0)}, "text", []])
def test_a_batch_that_cannot_be_cut(batch: Any) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(DataError, match=r"cannot be cut into single samples.*whole batches"):
        calibrate(MaskManager(model), Fisher(), [batch], lambda batch: model(torch.ones(1, 2)).sum())


def test_how_batches_are_cut() -> None:
    pair = namedtuple("pair", "x y")
    x, y = torch.arange(4.0).view(2, 2), torch.tensor([5, 6])
    first, second = samples({"input": x, "rest": [pair(x, y), torch.tensor(9)], "note": "kept"})
    assert first["input"].tolist() == [[0.0, 1.0]]
    assert second["rest"][0].y.tolist() == [6]
    assert (int(second["rest"][1]), second["note"]) == (9, "kept")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model, batch: model(batch[0]),  # no loss
        lambda model, batch: model(batch[0]).sum().detach(),
        lambda model, batch: torch.ones((), requires_grad=False),
        lambda model, batch: None,
    ],
)
def test_a_loss_without_gradients(wrong: Callable[..., Any]) -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(RecipeError, match=r"SNIP needs gradients of a loss: one number"):
        calibrate(MaskManager(model), SNIP(), batches(), lambda batch: wrong(model, batch))


@pytest.mark.parametrize("name", ["taylor", "apoz"])
def test_a_layer_that_no_batch_uses_is_named(name: str) -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(4, 3)})
    manager = MaskManager(model, Targets(head=True), "neurons")
    criterion: Any = NAMES[name]()
    with pytest.raises(TargetError, match=r"cannot score idle\.weight: no batch used its layer.*exclude"):
        calibrate(manager, criterion, batches(), loss_of(model["used"]))


def test_too_few_batches_asked_for() -> None:
    with pytest.raises(RecipeError, match="criterion Taylor: batches=0; it needs at least 1"):
        Taylor(batches=0)


# -- what layers are given ---------------------------------------------------------------------------------------------------


class Inputs(StatisticsCriterion):
    """Sums what layers are given."""

    needs = "input"

    def observe(self, seen: Seen) -> None:
        assert seen.input is not None
        self.add(seen.tensor.name, total=seen.input.flatten(0, -2).sum(0), calls=torch.ones(()))

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        return self.remembered(name)["total"].expand_as(weight)


class Uses(nn.Module):
    """A layer used twice, one given its input by name, a transposed one, and two that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.named, self.turned = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), Conv1D(3, 2)
        self.one, self.tied = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.tied.weight = self.one.weight
        for layer in (self.twice, self.named, self.one):
            nn.init.eye_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.named(input=self.twice(self.twice(x) + 1))
        return self.turned(self.one(y) + 10) + self.tied(x).sum()


def test_what_layers_are_given_however_they_are_called() -> None:
    model, criterion = Uses(), Inputs()
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # sums (4, 6) over two rows
    assert calibrate(MaskManager(model, Targets(head=True)), criterion, [x, x], model) == 2
    totals = {name: (memory["total"].tolist(), float(memory["calls"])) for name, memory in criterion.memory.items()}
    assert totals == {
        "twice.weight": ([2 * (4 + 4 + 2), 2 * (6 + 6 + 2)], 4.0),
        "named.weight": ([2 * 6.0, 2 * 8.0], 2.0),
        "turned.weight": ([2 * 26.0, 2 * 28.0], 2.0),
        # through its first layer alone: that is where the weight is at home
        "one.weight": ([2 * 6.0, 2 * 8.0], 2.0),
    }


def test_inputs_that_are_not_finite_or_all_zero_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    manager = MaskManager(model, Targets(head=True))
    with pytest.raises(DivergedError, match=r"input of 0\.weight is not finite in batch 1"):
        calibrate(manager, Inputs(), [torch.ones(1, 2), torch.full((1, 2), torch.inf)], model)
    with pytest.raises(DataError, match=r"all inputs of 0\.weight are zero.*'magnitude'"):
        calibrate(manager, Inputs(), [torch.zeros(1, 2)], model)


def test_layers_whose_input_cannot_be_seen_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    with pytest.raises(RecipeError, match=r"0\.weight: criterion Inputs needs what a weight is multiplied by, which Embedding"):
        calibrate(MaskManager(model, Targets(embeddings=True)), Inputs(), [torch.zeros(1, dtype=torch.long)], model)


def test_batches_are_cut_and_put_together_in_order() -> None:
    x = torch.arange(7.0).view(7, 1)
    sizes = [len(b) for b in rebatch([x[:5], x[5:6], x[6:]], 4)]
    assert sizes == [4, 3]  # 0-3, then 4, 5 and 6
    assert torch.equal(torch.cat(rebatch([x[:5], x[5:6], x[6:]], 4)), x)
    assert [len(b) for b in first_alone(rebatch([x], 3))] == [1, 2, 3, 1]
    words = [{"ids": torch.zeros(1, n), "note": "a"} for n in (3, 3, 4)]
    assert [tuple(b["ids"].shape) for b in rebatch(words, 4)] == [(2, 3), (1, 4)]  # lengths differ
    uneven = (torch.zeros(3, 2), torch.zeros(2))
    assert rebatch([uneven], 2)[0] is uneven  # nobody says how many samples these are
    kind = BatchEncoding({"ids": torch.zeros(2, 3)})  # read as `kind.ids`
    assert [(b.ids.shape[0], type(b)) for b in rebatch([kind, kind], 4)] == [(4, BatchEncoding)]
    assert [b.ids.shape[0] for b in rebatch([kind], 1)] == [1, 1]
    assert kind.ids.shape[0] == 2
    arrays = [{"ids": torch.zeros(1, 2), "note": np.zeros(2)} for _ in range(2)]
    assert len(rebatch(arrays, 2)) == 2  # who knows whether they are the same
    assert first_alone([]) == []


# -- in a loop of one's own -------------------------------------------------------------------------------------------------


def test_the_example_of_calibrate_runs_as_it_stands() -> None:
    text = inspect.getdoc(calibrate)
    assert text is not None
    found: dict[str, Any] = {}
    exec(textwrap.dedent(text.split("as it stands::")[1]), found)
    assert found["manager"].sparsity() == 0.5
    assert found["manager"].verify(strict=True).ok


@pytest.mark.parametrize("name", WATCHING)
def test_a_loop_that_watches_its_steps(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager, criterion = MaskManager(model).attach(optimizer), NAMES[name]()
    assert isinstance(criterion, StatisticsCriterion)
    for batch in batches(6):
        optimizer.zero_grad()
        loss_of(model)(batch).backward()
        watch(manager, criterion, optimizer.param_groups[0]["params"])
        optimizer.step()
    prune(manager, 0.5, criterion=criterion)
    assert manager.verify(strict=True).ok
    assert manager.sparsity() == 0.5
    watch(manager, other := Movement(), [])
    assert not other.memory


def test_watching_takes_in_all_of_a_step_or_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    manager, criterion = MaskManager(model), PLATON()
    model[0].weight.grad, model[1].weight.grad = torch.ones(2, 2), torch.full((2, 2), torch.nan)
    with pytest.raises(DivergedError, match=r"gradient of 1\.weight is not finite"):
        watch(manager, criterion)
    assert not criterion.memory


def test_statistics_are_saved_and_taken_back() -> None:
    criterion, other = Movement(), Movement()
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.ones(1, 2)
    watch(MaskManager(model), criterion)
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other.memory["weight"]["scores"], criterion.memory["weight"]["scores"])
    other.memory["weight"]["scores"].zero_()
    assert criterion.memory["weight"]["scores"].all()  # no reference is kept


# -- inside Lightning -------------------------------------------------------------------------------------------------------


class Measured(Task):
    """Counts and logs in its training step, which takes the batch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        self.steps = 0
        self.logged: list[Any] = []

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        logits = self(batch[0])
        self.accuracy.update(logits, batch[1])
        self.log("train/accuracy", self.accuracy)
        return {"loss": F.cross_entropy(logits, batch[1])}

    def on_train_epoch_end(self) -> None:
        self.logged.append((self.accuracy._update_count, int(self.accuracy.tp.sum() + self.accuracy.fn.sum())))


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "fisher", "apoz"])
def test_measuring_is_no_training_step(criterion: str) -> None:
    torch.manual_seed(0)
    module, method = Measured(), PruneFinetune(0.5, "neurons", criterion, schedule=OneShot("5st"))
    trainer(method, max_epochs=1).fit(module, *loaders())
    assert module.logged == [(8, 32)]  # 8 batches of 4, whatever was measured
    assert "log" not in module.__dict__
    assert method.verification is not None
    assert method.verification.ok


def test_training_up_to_the_first_change_is_the_same_with_any_criterion() -> None:
    def weights(criterion: str) -> tuple[Tensor, Tensor]:
        method = PruneFinetune(0.5, "unstructured", criterion, schedule=OneShot("5st"))
        found = {}
        method.before_first_change = lambda t: found.update(weight=t.lightning_module.net.fc1.weight.detach().clone())
        run, module = trainer(method, max_epochs=1), task(dropout=0.3)
        seed_everything(3, verbose=False)
        run.fit(module, *loaders())
        return found["weight"], torch.get_rng_state()

    first, *others = (weights(name) for name in ("magnitude", "fisher", "platon", "movement"))
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


class Manual(Task):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def test_manual_optimization_is_refused_where_it_would_step_and_fine_where_it_is_watched() -> None:
    def weights_after(criterion: str) -> tuple[PruneFinetune, LightningModule]:
        torch.manual_seed(0)
        module, method = Manual(), PruneFinetune(0.5, "unstructured", criterion, schedule=OneShot("5st"))
        trainer(method, max_epochs=1).fit(module, *loaders())
        return method, module

    with pytest.raises(
        RecipeError, match=r"Fisher runs training_step.*Manual steps its optimizers itself.*'movement', 'platon'"
    ):
        weights_after("fisher")
    method, _ = weights_after("platon")
    assert method.masks.sparsity() == 0.5


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from TensorDataset(*loaders()[0].dataset.tensors)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return 32


@pytest.mark.filterwarnings("ignore:.*`__len__` could be inaccurate")
def test_a_stream_is_refused_before_training() -> None:
    module, stream, validation = task(), DataLoader(Stream(), batch_size=4), loaders()[1]
    before = module.net.fc1.weight.detach().clone()
    with pytest.raises(DataError, match=r"apart from training.*DataLoader.*'movement', 'platon'"):
        trainer(PruneFinetune(0.5, criterion="taylor", schedule=OneShot("5st"))).fit(module, stream, validation)
    assert torch.equal(before, module.net.fc1.weight)
    trainer(PruneFinetune(0.5, criterion="platon", schedule=OneShot("5st"))).fit(module, stream, validation)


class NoLoss(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if self.global_step < 3 else None


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_training_step_without_a_loss_is_told() -> None:
    torch.manual_seed(0)
    with pytest.raises(RecipeError, match=r"NoLoss\.training_step returns NoneType: .*needs a loss"):
        trainer(PruneFinetune(0.5, criterion="snip", schedule=OneShot("3st"))).fit(NoLoss(), *loaders())


def test_another_model_starts_anew() -> None:
    method = PruneFinetune(0.5, criterion="movement", schedule=OneShot("5st"))
    trainer(method, max_epochs=1).fit(task(), *loaders())
    assert isinstance(method.criterion, Movement)
    assert method.criterion.memory
    early = PruneFinetune(0.5, criterion=method.criterion, schedule=OneShot("0st"))
    with pytest.raises(RecipeError, match="has seen none"):
        trainer(early, max_epochs=1).fit(task(), *loaders())
