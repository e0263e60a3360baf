"""SpaceNet: tasks keep to their neurons, old logits stay without being told the task, and killed runs go on bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsetrain.callbacks.spacenet import SpaceNet
from sparsetrain.data import VisionData
from sparsetrain.data.domains import DomainSequence
from sparsetrain.errors import DataError, PatternError, RecipeError, SparsetrainError, TargetError
from sparsetrain.incremental import FrozenEntries
from sparsetrain.incremental.samples import SampleMemory
from sparsetrain.incremental.spaces import Spaces
from sparsetrain.masks import MaskManager
from sparsetrain.tasks import MLP, Classification, SmallResNet
from sparsetrain.tasks.incremental import IncrementalClassification

from .promises import same_bits
from .test_task_incremental import OPTIMIZERS, everything, stored, take_over
from .toys import trainer

PAIRS = ([0, 1], [2, 3], [4, 5])


class Conv(nn.Module):
    """Two convolutions, a hidden layer, a head."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3)
        self.conv2 = nn.Conv2d(12, 18, 3, stride=2)
        self.fc1 = nn.Linear(72, 24)
        self.fc2 = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        logits: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return logits


class Odd(nn.Module):
    """Three layers, and between the first two something that mixes neurons, or a shortcut around the second."""

    num_classes = 10

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 30), nn.Linear(30, 30), nn.Linear(30, 10)
        self.norm = nn.LayerNorm(30)

    def forward(self, x: Tensor) -> Tensor:
        first = self.fc1(x.flatten(1))
        first = torch.relu(self.norm(first) if self.kind == "layernorm" else first)
        second = torch.relu(self.fc2(first))
        logits: Tensor = self.fc3(second + first if self.kind == "shortcut" else second)
        return logits


class Streamed(LightningDataModule):
    """Says its classes and has no tensors to keep samples of."""

    classes = (0, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([(torch.ones(64), 0), (torch.zeros(64), 1)], batch_size=2)  # type: ignore[arg-type]


def sequence() -> DomainSequence:
    return DomainSequence({str(task): VisionData("digits", classes=task, validation=0, batch_size=32) for task in PAIRS})


def model(optimizer: str = "sgd", conv: bool = False, compete: Any = "zero") -> IncrementalClassification:
    torch.manual_seed(5)
    network = Conv() if conv else MLP(64, [30, 21], 10)
    return IncrementalClassification(network, "class", compete, optimizer=OPTIMIZERS[optimizer])


def fit(method: SpaceNet, module: Any, data: DomainSequence, task: int, *more: Any, **options: Any) -> None:
    data.enter(task)
    trainer(method, *more, **({"max_epochs": 3, "limit_val_batches": 0} | options)).fit(module, datamodule=data)


def logits(module: IncrementalClassification, data: DomainSequence, task: int) -> Tensor:
    data[task].setup("test")
    with torch.no_grad():
        answers: Tensor = module(data[task].test_set.tensors[0])[:, PAIRS[task]]  # type: ignore[attr-defined]
    return answers


def odd(kind: str) -> IncrementalClassification:
    torch.manual_seed(5)
    return IncrementalClassification(Odd(kind), "class", "zero", optimizer=OPTIMIZERS["adamw"])


def remembers(optimizer: str, conv: bool = False, kind: str | None = None, **options: Any) -> IncrementalClassification:
    method, module, data = SpaceNet(sparsity=0.5), odd(kind) if kind else model(optimizer, conv), sequence()
    known: list[Tensor] = []
    for task in range(3):
        fit(method, module, data, task, **options)
        known.append(logits(module, data, task))
        for old, before in enumerate(known):
            assert torch.equal(logits(module, data, old), before), f"task {old} has changed"
    assert max(answers.argmax(1).float().std().item() for answers in known) > 0.2  # something was learned
    return module


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("conv", [False, True])
def test_old_logits_stay_without_being_told_the_task(optimizer: str, conv: bool) -> None:
    remembers(optimizer, conv, max_epochs=6 if conv else 3)


def test_with_clipping_too() -> None:
    remembers("adamw", gradient_clip_val=0.1)


def nothing(*args: Any, **kwargs: Any) -> None:
    """Does nothing."""


def reserve_nothing(self: Spaces, importance: Any, share: Any) -> None:
    _close(self, importance, share)
    for neurons in self.reserved.values():
        neurons[:] = False


_close = Spaces.close


@pytest.mark.parametrize(
    ("kind", "name", "replacement"), [(FrozenEntries, "restore", nothing), (Spaces, "close", reserve_nothing)]
)
def test_with_freezing_or_reserving_off_old_logits_change(
    kind: Any, name: str, replacement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, name, replacement)
    with pytest.raises(AssertionError, match="task 0 has changed"):
        remembers("adamw")


def test_the_network_stays_as_sparse_as_it_was_planned() -> None:
    method, module, data = SpaceNet(neurons=0.3, sparsity=0.75), model(), sequence()
    alive: dict[str, Tensor] = {}
    for task in range(3):
        fit(method, module, data, task)
        now = {n: m.clone() for n, m in method.masks.masks.items()}
        # A task selects 9 of 30 and 6 of 21 neurons: a quarter of 9 x 64 and of 6 x 9 connections, and 2 x 6 in the head.
        grown = {n: int(m.sum()) - (int(alive[n].sum()) if alive else 0) for n, m in now.items()}
        assert grown == {"network.fc1.weight": 144, "network.fc2.weight": 13, "network.fc3.weight": 12}
        for name, mask in now.items():
            assert not bool(module.get_parameter(name)[~mask].any())
            assert not alive or bool(mask[alive[name]].all())
        alive = now
        assert method.verification is not None
        assert method.verification.ok
    assert method.facts()["reserved"] == {"network.fc1.weight": 27, "network.fc2.weight": 18}


def test_connections_move_while_a_task_trains() -> None:
    still, moving = SpaceNet(fraction=0.0), SpaceNet(fraction=0.3, every="4st")
    modules = model(), model()
    for method, module in zip((still, moving), modules, strict=True):
        fit(method, module, sequence(), 0)
    assert {change.why for change in still.masks.changes} == {"task 1 begins"}
    moved = [change for change in moving.masks.changes if change.why == "drop and grow"]
    assert {change.step for change in moved} == {4, 8, 12, 16, 20}
    assert all(change.died == change.grew for change in moved)


def test_old_samples_are_replayed() -> None:
    scores = []
    for memory in (0, 20):
        method, module, data = SpaceNet(memory=memory), model("adam", compete="seen"), sequence()
        for task in range(3):
            fit(method, module, data, task, max_epochs=6)
        assert module.replay is None
        assert method.facts()["samples"] == 6 * memory
        right = []
        for task in range(3):
            images, labels = data[task].test_set.tensors  # type: ignore[attr-defined]
            right.append(module(images)[:, :6].argmax(1) == labels)
        scores.append(float(torch.cat(right).float().mean()))
    assert scores[1] > scores[0] + 0.15
    method.use(model(compete="seen"))  # another model: everything begins anew
    assert method.facts()["samples"] == 0


@pytest.mark.parametrize("memory", [0, 5])
def test_a_run_killed_between_tasks_goes_on_bit_for_bit(memory: int) -> None:
    one, module, data = SpaceNet(neurons=0.3, reserve=0.5, memory=memory), model("adam"), sequence()
    fit(one, module, data, 0)
    saved = stored({"model": module.state_dict(), "method": one.state_dict()})
    fit(one, module, data, 1)
    other, again = SpaceNet(neurons=0.3, reserve=0.5, memory=memory), model("adam")
    take_over(other, again, saved)  # type: ignore[arg-type]
    fit(other, again, sequence(), 1)
    same_bits(module.state_dict(), again.state_dict())
    assert one.facts() == other.facts()


@pytest.mark.parametrize(("step", "batches"), [(5, 1), (14, 1), (4, 2), (5, 2)])
def test_a_run_killed_inside_a_task_goes_on_bit_for_bit(step: int, batches: int, tmp_path: Path) -> None:
    made = [(SpaceNet(every="6st", memory=5), model("adam"), sequence()) for _ in range(2)]
    keep = [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1) for _ in made]
    one, module, data = made[0]
    fit(one, module, data, 0)
    fit(one, module, data, 1, keep[0], enable_checkpointing=True, accumulate_grad_batches=batches)
    other, again, fresh = made[1]
    fresh.enter(1)
    options: dict[str, Any] = {"limit_val_batches": 0, "enable_checkpointing": True, "accumulate_grad_batches": batches}
    trainer(other, keep[1], max_epochs=3, **options).fit(again, datamodule=fresh, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    same_bits(module.state_dict(), again.state_dict())
    assert one.facts() == other.facts()


def test_batches_of_one_step_see_other_old_samples_each(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []

    def watched(self: SampleMemory, inputs: Tensor, labels: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        more, theirs = extend(self, inputs, labels, key)
        drawn.append(more[len(inputs) :].numpy().tobytes())
        return more, theirs

    extend = SampleMemory.extend
    monkeypatch.setattr(SampleMemory, "extend", watched)
    method, module, data = SpaceNet(memory=20), model(compete="seen"), sequence()
    fit(method, module, data, 0, max_epochs=1)
    fit(method, module, data, 1, max_epochs=2, accumulate_grad_batches=3)
    assert len(set(drawn)) == len(drawn) == 18


@pytest.mark.parametrize("memory", [0, 5])
def test_a_network_without_free_neurons_takes_no_task_and_stays_as_it_was(memory: int) -> None:
    method, module, data = SpaceNet(neurons=0.6, memory=memory), model(compete="seen" if memory else "zero"), sequence()
    fit(method, module, data, 0, max_epochs=1)
    method.spaces.reserved["network.fc1.weight"][:] = False  # the first layer has room, the second has not
    before = everything(method, module)
    for _ in range(2):
        with pytest.raises(PatternError, match=r"fc2.weight: the network is full: 9 of 21 neurons are free, a task takes 12"):
            fit(method, module, data, 1, max_epochs=1)
        assert everything(method, module) == before
    assert method.order.names == data.names[:1]


def test_a_new_object_does_not_know_what_is_reserved() -> None:
    module, data = model(), sequence()
    fit(SpaceNet(), module, data, 0, max_epochs=1)
    with pytest.raises(RecipeError, match=r"fc1.weight: \d+ of 1920 weights are exactly 0, .* the same SpaceNet object"):
        fit(SpaceNet(), module, data, 1, max_epochs=1)


def test_a_trainer_that_has_finished_trains_no_second_task() -> None:
    method, module, data = SpaceNet(), model(), sequence()
    runner = trainer(method, max_epochs=1, limit_val_batches=0)
    runner.fit(module, datamodule=data)
    data.enter(1)
    with pytest.raises(RecipeError, match=r"no step was trained on '\[2, 3\]': the trainer had reached max_epochs"):
        runner.fit(module, datamodule=data)
    assert method.order.names == data.names[:1]


def test_samples_that_cannot_be_kept_are_told_before_the_training() -> None:
    method, module = SpaceNet(memory=5), model(compete="seen")
    data = DomainSequence({"streamed": Streamed()})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(DataError, match="memory=5: Streamed has no train_set to keep samples of"):
        fit(method, module, data, 0)
    same_bits(before, dict(module.state_dict()))
    assert method.order.names == []
    fit(SpaceNet(), module, data, 0, max_epochs=4)  # without a memory it is enough


def test_weights_begin_wherever_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which mixes with the CPU as little as a GPU does."""
    written: dict[str, torch.device] = {}
    monkeypatch.setattr(MaskManager, "install", nothing)
    monkeypatch.setattr(MaskManager, "write", lambda _, name, values: written.update({name: values.device}))
    method, module, data = SpaceNet(), model(), sequence()
    method.use(module.to("meta"))
    runner = trainer(method)
    runner.strategy.connect(module)
    runner.datamodule = data  # type: ignore[attr-defined]
    method._allocate(runner, [0, 1], 1)
    assert written == dict.fromkeys(method.masks.tensors, torch.device("meta"))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: SpaceNet(neurons=1.0), RecipeError, "neurons=1.0"),
        (lambda: SpaceNet(reserve=1.2), RecipeError, "reserve=1.2"),
        (lambda: SpaceNet(fraction=math.nan), RecipeError, "fraction=nan"),
        (lambda: SpaceNet(sparsity=1.0), PatternError, "sparsity 1.0 is outside"),
        (lambda: SpaceNet(memory=-2), SparsetrainError, "memory=-2"),
        (lambda: SpaceNet().use(nn.Linear(4, 2)), TargetError, "one layer only"),
        (lambda: SpaceNet().spaces, PatternError, "no model yet"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(
    make: Callable[[], Any], error: type[SparsetrainError], says: str
) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("shortcut", "fc3.weight follows network.fc2.weight and reads network.fc1.weight too, around it"),
        ("layernorm", "neurons are mixed between network.fc1.weight and network.fc2.weight"),
    ],
)
def test_what_is_no_chain_is_found_before_the_first_step_and_would_forget(
    kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, module = SpaceNet(), odd(kind)
    for _ in range(2):
        with pytest.raises(TargetError, match=says):
            fit(method, module, sequence(), 0)
        assert module.global_step == 0
    monkeypatch.setattr("sparsetrain.callbacks.spacenet.require_chain", nothing)
    with pytest.raises(AssertionError, match="task 0 has changed"):
        remembers("adamw", kind=kind)


def test_statistics_of_free_neurons_are_refused() -> None:
    module = IncrementalClassification(SmallResNet(depth=8, widths=[6], in_channels=1), "class", "zero")
    method = SpaceNet()
    for _ in range(2):
        with pytest.raises(TargetError, match=r"bn1 keeps running statistics.* SpaceNet needs a network without"):
            fit(method, module, sequence(), 0)


def test_classes_must_be_said() -> None:
    with pytest.raises(RecipeError, match="use the task IncrementalClassification"):
        fit(SpaceNet(), Classification(MLP(64, [8], 10)), sequence(), 0)


def test_old_samples_need_classes_that_compete() -> None:
    module = IncrementalClassification(MLP(64, [8], 10), "task")
    with pytest.raises(RecipeError, match=r"memory=5 replays samples of old classes.* scenario 'class'"):
        fit(SpaceNet(memory=5), module, sequence(), 0)
