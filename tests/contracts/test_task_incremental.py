"""Old tasks stay as they were, bit for bit, whatever later tasks do; killed and appended runs go on as if never stopped."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from sparsetrain.callbacks.packnet import PackNet
from sparsetrain.callbacks.supermask import Supermask
from sparsetrain.data import VisionData
from sparsetrain.data.domains import DomainSequence
from sparsetrain.errors import DataError, DivergedError, PatternError, RecipeError, SparsetrainError, TargetError
from sparsetrain.incremental import FrozenEntries, Rest
from sparsetrain.incremental.supermask import Scored
from sparsetrain.masks import MaskManager
from sparsetrain.masks.state import unpack_bits
from sparsetrain.targets import Targets
from sparsetrain.tasks import Classification
from sparsetrain.tasks.incremental import IncrementalClassification

from .promises import assert_pattern, same_bits
from .ranks import Group
from .toys import trainer

Method = PackNet | Supermask
PAIRS = ([0, 1], [2, 3], [4, 5])


class Net(nn.Module):
    """Digits through two hidden layers with a norm between."""

    num_classes = 10

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 24)
        self.norm = nn.BatchNorm1d(24)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(24, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.relu(self.norm(self.fc1(x.flatten(1)))))
        logits: Tensor = self.head(torch.relu(self.fc2(hidden)))
        return logits


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.005, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.005, weight_decay=0.1),
}
METHODS: dict[str, Callable[[], Method]] = {
    "packnet": lambda: PackNet(),
    "packnet, per task": lambda: PackNet(share=0.4, rest="per_task", restart="zero"),
    "packnet, neurons": lambda: PackNet(pattern="neurons", rest="per_task"),
    "winning": lambda: Supermask(sparsity=0.6),
    "winning, per task": lambda: Supermask(sparsity=0.6, rest="per_task"),
    "fixed": lambda: Supermask("fixed", sparsity=0.6, score_lr=0.01),
    "fixed, threshold": lambda: Supermask("fixed", score_lr=0.001),
}
KINDS = ["packnet", "packnet, per task", "winning", "fixed, threshold"]


def sequence(*tasks: list[int], batch_size: int = 32) -> DomainSequence:
    return DomainSequence(
        {
            f"{i}: {task}": VisionData("digits", classes=task, validation=0, batch_size=batch_size)
            for i, task in enumerate(tasks or PAIRS)
        }
    )


def model(optimizer: str = "sgd", **settings: Any) -> IncrementalClassification:
    torch.manual_seed(5)
    return IncrementalClassification(Net(**settings), optimizer=OPTIMIZERS[optimizer])


def fit(
    method: Method | None, module: LightningModule, data: DomainSequence, task: int, *more: Callback, **options: Any
) -> None:
    data.enter(task)
    runner = trainer(*([method] if method else []), *more, **({"max_epochs": 2, "limit_val_batches": 0} | options))
    runner.fit(module, datamodule=data)


def logits(method: Method, module: IncrementalClassification, data: DomainSequence, task: int) -> Tensor:
    """What a task answers over its own classes, on images of its own."""
    with method.serving(task, data.names[task]), torch.no_grad():
        module.eval()
        data[task].setup("test")
        images = data[task].test_set.tensors[0]  # type: ignore[attr-defined]
        answers: Tensor = module(images)[:, data[task].classes]  # type: ignore[attr-defined]
        module.train()
    return answers


def remembers(method: Method, optimizer: str = "sgd", **options: Any) -> float:
    """Train all tasks; fail if an old one has changed. Returns the accuracy over all tasks at the end."""
    module, data = model(optimizer), sequence()
    known: list[Tensor] = []
    for task in range(len(PAIRS)):
        fit(method, module, data, task, **options)
        known.append(logits(method, module, data, task))
        for old, before in enumerate(known):
            now = logits(method, module, data, old)
            assert torch.equal(now.view(torch.int32), before.view(torch.int32)), f"task {old} has changed"
    right = []
    for task, answers in enumerate(known):
        labels = data[task].test_set.tensors[1]  # type: ignore[attr-defined]
        right.append(answers.argmax(1) == torch.searchsorted(torch.tensor(PAIRS[task]), labels))
    return float(torch.cat(right).float().mean())


# ---------------------------------------------------------------- nothing is forgotten


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_old_tasks_answer_as_they_did_bit_for_bit(method: str, optimizer: str) -> None:
    accuracy = remembers(METHODS[method](), optimizer)
    assert accuracy > 0.6  # and something was learned


@pytest.mark.parametrize("method", ["packnet", "winning"])
@pytest.mark.parametrize(
    "options", [{"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str
)
def test_old_tasks_stay_with_clipping_accumulation_and_amp(method: str, options: dict[str, Any]) -> None:
    remembers(METHODS[method](), "adamw", **options)


def nothing(*args: Any, **kwargs: Any) -> None:
    """Does nothing."""


@pytest.mark.parametrize(
    ("what", "sabotaged", "method", "optimizer"),
    [
        ("frozen entries", (FrozenEntries, "restore", nothing), "packnet", "adamw"),
        ("frozen entries", (FrozenEntries, "restore", nothing), "winning", "sgd"),
        ("statistics of norms", (Rest, "hold_norms", nothing), "packnet", "sgd"),
        ("the rest", (Rest, "begin", nothing), "packnet", "adam"),
        ("copies of the rest", (Rest, "_write", nothing), "packnet, per task", "adam"),
        ("weights of earlier masks", (Scored, "take", lambda s, w: setattr(s, "dense", w.clone())), "winning", "adamw"),
    ],
)
def test_with_freezing_off_old_tasks_change(
    what: str, sabotaged: tuple[Any, str, Any], method: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*sabotaged)
    with pytest.raises(AssertionError, match="task 0 has changed"):
        remembers(METHODS[method](), optimizer)


def test_unserved_an_old_task_is_not_what_it_was() -> None:
    method, module, data = PackNet(), model(), sequence()
    fit(method, module, data, 0)
    before = logits(method, module, data, 0)
    fit(method, module, data, 1)
    module.eval()
    with torch.no_grad():
        assert not torch.equal(module(data[0].test_set.tensors[0])[:, [0, 1]], before)  # type: ignore[attr-defined]


def test_serving_leaves_the_weights_as_they_were() -> None:
    for method in (PackNet(rest="per_task"), Supermask(sparsity=0.6, rest="per_task")):
        module, data = model(), sequence()
        for task in (0, 1):
            fit(method, module, data, task)
        before = copy.deepcopy(module.state_dict())
        with method.serving(0, data.names[0]):
            assert not torch.equal(module.network.norm.bias, before["network.norm.bias"])
        same_bits(before, module.state_dict())
        with method.serving(2, data.names[2]):  # not trained yet: the network as it is
            same_bits(before, module.state_dict())


@pytest.mark.parametrize("method", KINDS)
def test_before_the_first_task_a_network_is_served_as_it_is(method: str) -> None:
    made, module, data = METHODS[method](), model(), sequence()
    made.use(module)
    before = copy.deepcopy(module.state_dict())
    with made.serving(0, data.names[0]):
        same_bits(before, module.state_dict())
    assert bool(module.network.fc1.weight.any())


# ---------------------------------------------------------------- counts and patterns


def test_owners_add_up_to_one_network() -> None:
    method, module, data = PackNet(), model(), sequence()
    for task in range(3):
        fit(method, module, data, task)
    # A third of 64 x 24 + 24 x 16 = 1920 each; biases 40, norm 48, head 170.
    assert method.facts() == {"owned": dict.fromkeys(data.names, 640), "free": 0, "numbers": 1920 + 258}
    assert method.verification is not None
    assert method.verification.ok


@pytest.mark.parametrize("pattern", ["unstructured:row", "1:4", "neurons"])
def test_each_task_of_packnet_has_the_pattern(pattern: str) -> None:
    method, module, data = PackNet(pattern=pattern, rest="per_task"), model(), sequence()
    for task in range(3):
        fit(method, module, data, task)
        for name, owners in method.owners.items():
            mine = owners == task + 1
            if pattern == "1:4":
                assert set(mine.view(len(mine), -1, 4).sum(-1).flatten().tolist()) == {1}
            elif pattern == "neurons":
                assert set(mine.sum(1).tolist()) == {0, mine.shape[1]}
                assert int(mine.all(1).sum()) == {"fc1": (8, 8, 8), "fc2": (5, 5, 6)}[name.split(".")[1]][task]
            else:
                assert set(mine.sum(1).tolist()) == {{"fc1": (21, 21, 22), "fc2": (8, 8, 8)}[name.split(".")[1]][task]}
        dead = {n: int((module.get_parameter(n) == 0).sum()) for n in method.owners}
        assert dead == {n: int((o == 0).sum()) for n, o in method.owners.items()}


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("neurons", 0.25), ("unstructured", 0.7)])
def test_every_mask_has_the_pattern(pattern: str, sparsity: float) -> None:
    method, module, data = Supermask(sparsity=sparsity, pattern=pattern, score_lr=0.05), model(), sequence()
    for task in range(2):
        fit(method, module, data, task)
    for name, masks in method.task_masks.items():
        both = [unpack_bits(bits, tuple(module.get_parameter(name).shape)) for bits in masks]
        for mask in both:
            assert_pattern(mask, pattern, sparsity)
        assert not torch.equal(*both)
        assert not bool(module.get_parameter(name)[~both[1]].any())


def test_fixed_weights_never_move() -> None:
    method, module, data = Supermask("fixed", sparsity=0.6, score_lr=0.01), model("adamw"), sequence()
    start = {n: module.get_parameter(n).detach().clone() for n in ("network.fc1.weight", "network.fc2.weight")}
    for task in range(2):
        fit(method, module, data, task)
        for name, before in start.items():
            now = module.get_parameter(name).detach()
            assert torch.equal(now[now != 0], before[now != 0])
            assert 0 < int((now != 0).sum()) < now.numel()


def test_a_head_shared_by_tasks_is_the_first_ones() -> None:
    """Two domains with the same classes, as in domain-incremental learning: the head stays, the trunk goes on."""
    method, module, data = PackNet(), model("adamw"), sequence([0, 1], [1, 0], [0, 2])
    fit(method, module, data, 0)
    head, first = module.network.head.weight.detach().clone(), logits(method, module, data, 0)
    fit(method, module, data, 1)
    assert torch.equal(module.network.head.weight, head)
    fit(method, module, data, 2)
    moved = (module.network.head.weight != head).any(1).nonzero().flatten().tolist()
    assert moved == [2]
    assert torch.equal(logits(method, module, data, 0), first)


# ---------------------------------------------------------------- resuming


def stored(value: Any) -> Any:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def take_over(method: Method, module: LightningModule, saved: dict[str, Any]) -> None:
    """As a recipe over domains does at the start of a stage."""
    method.use(module)
    module.load_state_dict(saved["model"])
    method.masks.load_state_dict(saved["method"]["masks"])
    method.load_method_state(saved["method"]["method"])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_between_tasks_goes_on_bit_for_bit(method: str) -> None:
    one, module, data = METHODS[method](), model("adam", dropout=0.2), sequence()
    fit(one, module, data, 0)
    saved = stored({"model": module.state_dict(), "method": one.state_dict()})
    fit(one, module, data, 1)
    other, again, fresh = METHODS[method](), model("adam", dropout=0.2), sequence()
    take_over(other, again, saved)
    fit(other, again, fresh, 1)
    same_bits(module.state_dict(), again.state_dict())
    for task in (0, 1):
        assert torch.equal(logits(one, module, data, task), logits(other, again, fresh, task))
    assert one.facts() == other.facts()


def test_killed_between_tasks_a_model_without_classes_is_served_at_once() -> None:
    """No classes: the head is one of the rest, and each task has a copy of it."""

    def plain() -> LightningModule:
        torch.manual_seed(5)
        return Classification(Net(), optimizer=OPTIMIZERS["adam"])

    def answers(method: PackNet, module: LightningModule) -> Tensor:
        with method.serving(0, data.names[0]), torch.no_grad():
            result: Tensor = module.eval()(data[0].test_set.tensors[0])  # type: ignore[attr-defined]
            module.train()
        return result

    method, module, data = PackNet(rest="per_task"), plain(), sequence()
    fit(method, module, data, 0)
    data[0].setup("test")
    first = answers(method, module)
    fit(method, module, data, 1)
    saved = stored({"model": module.state_dict(), "method": method.state_dict()})
    other, again = PackNet(rest="per_task"), plain()
    take_over(other, again, saved)
    assert torch.equal(answers(method, module), first)
    assert torch.equal(answers(other, again), first)
    same_bits(module.state_dict(), again.state_dict())
    with method.serving(0, data.names[0]):
        assert not torch.equal(module.network.head.weight, again.network.head.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("step", [5, 17])
def test_a_run_killed_inside_a_task_goes_on_bit_for_bit(method: str, step: int, tmp_path: Path) -> None:
    one, module, data = METHODS[method](), model("adam", dropout=0.2), sequence()
    fit(one, module, data, 0)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    data.enter(1)
    trainer(one, keep, max_epochs=2, enable_checkpointing=True, limit_val_batches=0).fit(module, datamodule=data)
    other, again, fresh = METHODS[method](), model("adam", dropout=0.2), sequence()
    fresh.enter(1)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(other, keep, max_epochs=2, enable_checkpointing=True, limit_val_batches=0).fit(
        again, datamodule=fresh, ckpt_path=str(tmp_path / f"step={step}.ckpt")
    )
    same_bits(module.state_dict(), again.state_dict())
    for task in (0, 1):
        assert torch.equal(logits(one, module, data, task), logits(other, again, fresh, task))


# ---------------------------------------------------------------- what cannot be


def test_a_full_network_takes_no_task() -> None:
    for method, says in (
        (PackNet(share=1), r"fc1.weight, task '1: \[2, 3\]': the network is full: earlier tasks own every weight"),
        (PackNet(pattern="1:2"), "the network is full: a group has 0 of 2 weights left"),
    ):
        module, data = model(), sequence(*PAIRS)
        tasks = 1 if method.share == 1 else 2
        for task in range(tasks):
            fit(method, module, data, task)
        with pytest.raises(PatternError, match=says):
            fit(method, module, data, tasks)


def everything(method: Any, module: nn.Module) -> bytes:
    """What a method remembers and the weights of its model."""
    file = io.BytesIO()
    torch.save({"method": method.method_state(), "masks": method.masks.state_dict(), "model": module.state_dict()}, file)
    return file.getvalue()


def full(method: Any) -> None:
    method.owners["network.fc2.weight"].fill_(1)  # fc1 has room


def lost(method: Any) -> None:
    method._scored["network.fc2.weight"].scores.data.fill_(math.nan)


@pytest.mark.parametrize(
    ("make", "spoil", "error", "says"),
    [
        (lambda: PackNet(share=1), nothing, PatternError, "the network is full"),
        (lambda: PackNet(share=0.4), full, PatternError, r"fc2.weight, task '1: \[2, 3\]': the network is full"),
        (lambda: Supermask(sparsity=0.6), lost, DivergedError, "fc2.weight"),
    ],
)
def test_a_refused_task_leaves_everything_as_it_was(
    make: Callable[[], Method], spoil: Callable[[Any], None], error: type[SparsetrainError], says: str
) -> None:
    method, module, data = make(), model(), sequence()
    fit(method, module, data, 0)
    spoil(method)
    before = everything(method, module)
    for _ in range(2):
        with pytest.raises(error, match=says):
            fit(method, module, data, 1)
        assert everything(method, module) == before
    assert method.order.names == data.names[:1]


@pytest.mark.parametrize("method", METHODS)
def test_a_new_object_does_not_know_what_is_packed(method: str) -> None:
    module, data = model(), sequence()
    fit(METHODS[method](), module, data, 0)
    before = copy.deepcopy(module.network.state_dict())
    says = (
        r"fc1.weight: \d+ of 1536 weights are exactly 0, .* Pass the same (PackNet|Supermask) object for all tasks, or resume"
    )
    for _ in range(2):
        with pytest.raises(RecipeError, match=says):
            fit(METHODS[method](), module, data, 1)
    same_bits(before, module.network.state_dict())


def test_a_zero_by_chance_is_no_packed_network() -> None:
    module = model()
    with torch.no_grad():
        module.network.fc1.weight[0, :15] = 0  # of 1536: just below one in a hundred
    fit(PackNet(), module, sequence(), 0)


@pytest.mark.parametrize("method", KINDS)
def test_a_trainer_that_has_finished_trains_no_second_task(method: str) -> None:
    made, module, data = METHODS[method](), model(), sequence()
    runner = trainer(made, max_epochs=1, limit_val_batches=0)
    for task in (0, 1):
        data.enter(task)
        if task:
            with pytest.raises(RecipeError, match=r"no step was trained on '1: \[2, 3\]'.* make a new Trainer for each task"):
                runner.fit(module, datamodule=data)
        else:
            runner.fit(module, datamodule=data)
    assert made.order.names == data.names[:1]
    fit(made, module, data, 1)
    assert made.order.ended == 2


def test_whole_units_need_statistics_of_their_own() -> None:
    for _ in range(2):  # and the second time too
        with pytest.raises(
            TargetError, match=r"norm keeps running statistics.* PackNet with pattern neurons needs rest='per_t"
        ):
            (refused := PackNet(pattern="neurons")).use(network := Net())
    with pytest.raises(TargetError, match="norm keeps running statistics"):
        refused.use(network)
    network.norm = nn.Identity()  # type: ignore[assignment]
    PackNet(pattern="neurons").use(network)
    PackNet(pattern="unstructured:row").use(Net())


def test_frozen_statistics_of_free_neurons_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: at the end of the first task the variance of the neurons it left is on its way to 0, and stays there."""
    monkeypatch.setattr(Rest, "refuse_norms", nothing)
    method, module, data = PackNet(pattern="neurons", prune_at="2st"), model(), sequence()
    fit(method, module, data, 0, max_epochs=10)
    free = (method.owners["network.fc1.weight"] == 0).all(1)
    variance = module.network.norm.running_var.clone()
    assert float(variance[free].max()) < 0.01 < float(variance[~free].max())
    fit(method, module, data, 1, max_epochs=10)
    assert torch.equal(module.network.norm.running_var, variance)


def test_a_method_is_given_no_manager() -> None:
    for method in (PackNet(), Supermask(sparsity=0.5)):
        with pytest.raises(RecipeError, match=f"{type(method).__name__} makes its own masks"):
            method.use(network := Net(), MaskManager(network))


def test_a_task_is_trained_once_and_in_order() -> None:
    method, module, data = PackNet(), model(), sequence()
    fit(method, module, data, 0)
    with pytest.raises(RecipeError, match=r"task '0: \[0, 1\]' was trained before and is frozen"):
        fit(method, module, data, 0)


@pytest.mark.parametrize("make", [PackNet, lambda: Supermask(sparsity=0.5)])
def test_without_a_sequence_there_are_no_tasks(make: Callable[[], Method]) -> None:
    with pytest.raises(RecipeError, match="give the trainer a DomainSequence"):
        trainer(make(), max_epochs=1, limit_val_batches=0).fit(model(), datamodule=VisionData("digits", classes=[0, 1]))


def test_averages_are_refused() -> None:
    with pytest.raises(RecipeError, match="cannot train with averaged weights"):
        fit(PackNet(), model(), sequence(), 0, EMAWeightAveraging(decay=0.9))


def test_a_task_that_ends_before_it_prunes_says_so() -> None:
    method, module, data = PackNet(prune_at="400st"), model(), sequence()
    with pytest.raises(RecipeError, match=r"prune_at='400st' is step 400 of the 18 of task"):
        fit(method, module, data, 0)
    assert method.order.names == []

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 3

    method, module = PackNet(), model()
    with pytest.warns(UserWarning, match="training ended before prune_at='50%': pruned at the end"):
        fit(method, module, data, 0, Stop(), min_epochs=0)
    assert method.facts()["owned"] == {data.names[0]: 640}


def test_resumed_where_it_ends_a_task_prunes_all_the_same(tmp_path: Path) -> None:
    data = sequence()
    keep = [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1) for _ in range(2)]
    fit(PackNet(), model(), data, 0, keep[0], enable_checkpointing=True)
    method = PackNet()
    runner = trainer(method, keep[1], max_steps=5, max_epochs=-1, limit_val_batches=0, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="training ended before prune_at='50%': pruned at the end"):
        runner.fit(module := model(), datamodule=data, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert method.facts()["owned"] == {data.names[0]: 640}
    assert int((module.network.fc1.weight != 0).sum()) == 512


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: PackNet(share=0), RecipeError, r"share=0: give the share .* in \(0, 1\], or 'even'"),
        (lambda: PackNet(share=1.5), RecipeError, "share=1.5"),
        (lambda: PackNet(share=0.5, pattern="1:4"), RecipeError, "pattern 1:4 says how much a task takes"),
        (lambda: PackNet(pattern="neurons", restart="zero"), RecipeError, "set restart='random'"),
        (lambda: PackNet(rest="all"), RecipeError, "rest='all'"),  # type: ignore[arg-type]
        (lambda: Supermask(), PatternError, "say how sparse a task's mask is"),
        (lambda: Supermask("fixed", pattern="neurons"), PatternError, "only fixed weights under 'unstructured'"),
        (lambda: Supermask("fixed", score_lr=0.0), RecipeError, "score_lr=0.0"),
        (lambda: Supermask("trained", sparsity=0.5), RecipeError, "weights='trained'"),  # type: ignore[arg-type]
        (lambda: Supermask(sparsity=0.3, pattern="2:4").use(Net()), PatternError, "fc1.weight: 2:4 always has sparsity 0.5"),
        (lambda: PackNet(pattern="1:5").use(Net()), PatternError, "fc1.weight: 1:5 needs an input dimension"),
        (lambda: PackNet(targets=Targets(head=True)).use(Net()), TargetError, "targets.head: false"),
        (lambda: PackNet().order, PatternError, "has no model yet"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(
    make: Callable[[], Any], error: type[SparsetrainError], says: str
) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_task_of_an_unknown_class() -> None:
    data = sequence([0, 1], [11])
    method, module = PackNet(), model()
    fit(method, module, data, 0)
    with pytest.raises(DataError, match=r"domain '1: \[11\]': classes=\[11\]: 'digits' has no training sample of label 11"):
        fit(method, module, data, 1)


# ---------------------------------------------------------------- two ranks


def two_tasks(strategy: str) -> dict[str, Any]:
    """Two tasks of two methods on however many ranks there are."""
    found: dict[str, Any] = {}
    for name in ("packnet", "winning"):
        method, module, data = METHODS[name](), model("adam"), sequence(batch_size=16 if strategy == "ddp" else 32)
        known = []
        for task in range(2):
            several = {"strategy": DDPStrategy(), "devices": 2} if strategy == "ddp" else {}
            fit(method, module, data, task, max_epochs=1, **several)
            known.append(logits(method, module, data, task))
        found[name] = {
            "weights": module.state_dict(),
            "state": method.method_state(),
            "kept": torch.equal(logits(method, module, data, 0), known[0]),
        }
    return found


def on_a_rank(folder: Path) -> dict[str, Any]:
    return two_tasks("ddp")


def test_two_ranks_have_the_same_tasks_and_keep_them(tmp_path: Path) -> None:
    ranks = Group(on_a_rank, tmp_path).results()
    alone = two_tasks("auto")
    for name, one in alone.items():
        first, second = (rank[name] for rank in ranks)
        same_bits(first["weights"], second["weights"])
        assert first["kept"]
        assert second["kept"]
        assert one["kept"]
        kept = "owners" if name == "packnet" else "dense"
        same_bits(first["state"][kept], second["state"][kept])
    # Ranks add gradients in another order than one process does; the first task's owners are the same all the same.
    owners = [state["packnet"]["state"]["owners"] for state in (ranks[0], alone)]
    agree = [float((owners[0][n] == owners[1][n]).float().mean()) for n in owners[0]]
    assert min(agree) > 0.9
