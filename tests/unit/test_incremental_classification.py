"""Classes in tasks: which compete when, what the loss is, and what cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.data import VisionData
from sparsetrain.data.domains import DomainSequence
from sparsetrain.errors import DataError, RecipeError, SparsetrainError
from sparsetrain.tasks import MLP
from sparsetrain.tasks.incremental import IncrementalClassification, classes_of


class Fixed(nn.Module):
    """Says the same logits of four classes to everything."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([1.0, 3.0, 2.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), 4)


def data(*classes: int) -> VisionData:
    return VisionData("digits", classes=list(classes) or None, validation=0, batch_size=40)


def quiet(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **({"max_epochs": 1, "limit_train_batches": 2} | options),
    )


@pytest.mark.parametrize(
    ("scenario", "compete", "training", "columns"),
    [
        ("task", "seen", True, [2, 3]),
        ("task", "seen", False, [2, 3]),
        ("class", "seen", True, [0, 2, 3]),
        ("class", "seen", False, [0, 2, 3]),
        ("class", "current", True, [2, 3]),
        ("class", "current", False, [0, 2, 3]),
        ("class", "zero", True, [2, 3]),
        ("class", "zero", False, [0, 2, 3]),
    ],
)
def test_who_competes(scenario: Any, compete: Any, training: bool, columns: list[int]) -> None:
    module = IncrementalClassification(Fixed(), scenario, compete)
    module.current_classes = [2, 3]
    module.seen_classes[[0, 2, 3]] = True
    rivals = module.rivals(training, torch.tensor([3, 2]))
    assert rivals.nonzero().flatten().tolist() == columns
    loss = module._loss(module(torch.zeros(2, 1)), torch.tensor([3, 2]), rivals, smoothing=0.2)
    logits, places = torch.tensor([[1.0, 3.0, 2.0, 0.5]])[:, columns], [columns.index(3), columns.index(2)]
    spread = logits.log_softmax(1)[0]
    by_hand = [-(0.8 * float(spread[place]) + 0.2 * float(spread.mean())) for place in places]
    assert loss.item() == pytest.approx(sum(by_hand) / 2, rel=1e-6)


def test_replayed_samples_bring_their_classes() -> None:
    module = IncrementalClassification(Fixed(), "class", "current")
    module.current_classes = [2, 3]
    assert module.rivals(True, torch.tensor([2, 0])).tolist() == [True, False, True, True]


def step(module: IncrementalClassification, batch: tuple[Tensor, Tensor]) -> Tensor:
    module.log_training = lambda loss: None  # type: ignore[method-assign]
    return module.training_step(batch, 0)


def test_against_zero_other_classes_are_constant() -> None:
    module = IncrementalClassification(Fixed(), "class", "zero")
    module.current_classes = [2]
    loss = step(module, (torch.zeros(1, 1), torch.tensor([2])))
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 3) - 2, rel=1e-6)
    loss.backward()
    assert module.network.logits.grad.nonzero().flatten().tolist() == [2]


def test_rows_that_do_not_compete_have_no_gradient() -> None:
    module = IncrementalClassification(Fixed())
    module.current_classes = [1, 2]
    step(module, (torch.zeros(1, 1), torch.tensor([1]))).backward()
    share = 1 / (1 + math.exp(3 - 2))
    assert module.network.logits.grad.tolist() == pytest.approx([0, -share, share, 0])


def test_replay_is_asked_for_training_only() -> None:
    module = IncrementalClassification(Fixed(), "class", "seen")
    module.current_classes = [1]
    module.seen_classes[:2] = True
    module.replay = lambda x, y: (torch.cat([x, x]), torch.tensor([1, 0]))
    loss = step(module, (torch.zeros(1, 1), torch.tensor([1])))
    both = F.cross_entropy(torch.tensor([[1.0, 3.0]] * 2), torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(both.item(), rel=1e-6)


def test_a_sequence_is_learned_and_told_apart() -> None:
    sequence = DomainSequence({"low": data(0, 1), "high": data(6, 8)})
    torch.manual_seed(0)
    module = IncrementalClassification(MLP(64, [32], 10), optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    for place in range(2):
        sequence.enter(place)
        quiet(limit_train_batches=None, max_epochs=3).fit(module, datamodule=sequence)
        assert module.current_classes == [[0, 1], [6, 8]][place]
        assert module.seen_classes.nonzero().flatten().tolist() == [[0, 1], [0, 1, 6, 8]][place]
    found = [quiet().test(module, datamodule=sequence[place], verbose=False)[0] for place in range(2)]
    assert found[1]["test/accuracy"] > 0.95
    assert module.current_classes == [6, 8]
    module.scenario = "class"
    without = [quiet().test(module, datamodule=sequence[place], verbose=False)[0] for place in range(2)]
    for place, classes in enumerate(([0, 1], [6, 8])):
        images, labels = sequence[place].test_set.tensors
        with torch.no_grad():
            logits = module.network(images)
        for row, rivals in ((found, classes), (without, [0, 1, 6, 8])):
            answers = torch.tensor(rivals)[logits[:, rivals].argmax(1)]
            assert row[place]["test/accuracy"] == pytest.approx(float((answers == labels).float().mean()))
    assert all(math.isfinite(row["test/loss"]) for row in (*found, *without))
    again = IncrementalClassification(MLP(64, [32], 10))
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.seen_classes, module.seen_classes)


def test_a_task_never_seen_is_measured_all_the_same() -> None:
    module = IncrementalClassification(MLP(64, [8], 10), "class")
    quiet().fit(module, datamodule=data(0, 1))
    found = quiet().test(module, datamodule=data(4, 5), verbose=False)[0]
    assert math.isfinite(found["test/loss"])
    assert module.seen_classes.nonzero().flatten().tolist() == [0, 1]


class Bare(LightningDataModule):
    """No list of classes; a training set, or none."""

    def __init__(self, labels: list[int] | None) -> None:
        super().__init__()
        if labels is not None:
            self.train_set = torch.utils.data.TensorDataset(torch.zeros(len(labels), 4), torch.tensor(labels))


def test_the_labels_say_the_classes_where_nothing_else_does() -> None:
    assert classes_of(Bare([3, 1, 3]), 4) == [1, 3]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: IncrementalClassification(Fixed(), "tasks"), RecipeError, "scenario='tasks'.*Did you mean 'task'"),  # type: ignore[arg-type]
        (lambda: IncrementalClassification(Fixed(), "class", "all"), RecipeError, "compete='all' is not one of seen, current"),  # type: ignore[arg-type]
        (lambda: classes_of(None, 4), RecipeError, "give datamodule="),
        (lambda: classes_of(Bare([0, 4]), 4), DataError, "class 4 of this task has no output: the network has 4"),
        (lambda: classes_of(Bare([]), 4), DataError, "Bare has no data to tell the classes of this task by"),
        (lambda: classes_of(Bare(None), 4), DataError, "Bare has no data"),
    ],
)
def test_what_cannot_be(make: Callable[[], Any], error: type[SparsetrainError], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_label_of_another_task_is_told() -> None:
    module = IncrementalClassification(Fixed())
    module.current_classes = [0, 1]
    with pytest.raises(DataError, match=r"label 3 is in the batch, and the classes of this task are \[0, 1\]"):
        step(module, (torch.zeros(2, 1), torch.tensor([1, 3])))
