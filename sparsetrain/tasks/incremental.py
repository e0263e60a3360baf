"""Image classification in tasks that come one after another, each with classes of its own; one head holds all of them.

The two scenarios of van de Ven and Tolias (2019, arXiv 1904.07734; Nature Machine Intelligence 2022) with growing classes:

* ``task``: whoever asks says which task it is; only that task's classes compete, in training and in evaluation;
* ``class``: nobody says; all classes seen so far compete in evaluation. In training all of them do too (``compete="seen"``),
  or only those of the task that is trained, and of samples replayed with it (``compete="current"``); or these against the logit
  0 in place of every other class (``compete="zero"``), which gives the logits of separate tasks one scale.

A class that does not compete has the logit minus infinity: it gets no gradient, and is never the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from sparsetrain.errors import DataError, RecipeError, nearest
from sparsetrain.tasks.classification import Classification

_Batch = tuple[Tensor, Tensor]
SCENARIOS = ("task", "class")
RIVALS = ("seen", "current", "zero")


class IncrementalClassification(Classification):
    """`Classification` whose classes come in tasks. Which classes a task has, the data module says.

    Used with a data module of several domains (``names``, ``current``, ``[index]``) its current domain is the task; any other
    data module is a task by itself. A task's classes are the ``classes`` of its data module (`VisionData` has them), or the
    labels of its training set. ``current_classes`` has those of the task at work; ``seen_classes`` (bool, num_classes) marks
    all that were trained, and is saved with the weights. A method may set ``replay``, which adds old samples to a training
    batch.

    Where classes are evaluated that were not trained yet, they compete too: the loss stays finite.

    Args:
        network: returns logits (N, num_classes), of all classes that will ever come.
        scenario: "task" or "class", as the module's text says.
        compete: in training, in scenario "class": "seen", "current" or "zero".
        num_classes: by default the network's own ``num_classes``.
        optimizer: as in `Classification`.
        lr_schedule: as in `Classification`, over each task anew.
        warmup: as in `Classification`.
        label_smoothing: as in `Classification`, over the classes that compete.

    Raises:
        RecipeError: for an unknown scenario; where there is no data module to say the classes.
        DataError: for a class the network has no output for, a task without data, a label that is not of the task.

    Example: ``trainer.fit(IncrementalClassification(LeNet300()), VisionData("mnist", classes=[0, 1]))``.
    """

    seen_classes: Tensor

    def __init__(
        self,
        network: nn.Module,
        scenario: Literal["task", "class"] = "task",
        compete: Literal["seen", "current", "zero"] = "seen",
        num_classes: int | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_schedule: Literal["constant", "cosine", "linear"] | LRSchedulerCallable = "constant",
        warmup: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(network, num_classes, optimizer, lr_schedule, warmup, label_smoothing)
        for what, given, known in (("scenario", scenario, SCENARIOS), ("compete", compete, RIVALS)):
            if given not in known:
                raise RecipeError(f"{what}={given!r} is not one of {', '.join(known)}.{nearest(str(given), known)}")
        self.scenario = scenario
        self.compete = compete
        self.current_classes: list[int] = []
        self.replay: Callable[[Tensor, Tensor], _Batch] | None = None
        self.register_buffer("seen_classes", torch.zeros(self.num_classes, dtype=torch.bool))

    def setup(self, stage: str) -> None:
        """Ask the data module for the classes of the task."""
        super().setup(stage)
        self.current_classes = classes_of(getattr(self.trainer, "datamodule", None), self.num_classes)

    def on_train_start(self) -> None:
        """They are trained, no method has refused them: they count as seen from now on."""
        self.seen_classes[self.current_classes] = True

    def rivals(self, training: bool, labels: Tensor) -> Tensor:
        """Which classes compete now, bool (num_classes,)."""
        mine = torch.zeros_like(self.seen_classes)
        mine[self.current_classes] = True
        if self.scenario == "task":
            return mine
        if training and self.compete != "seen":
            mine[labels] = True  # replayed samples bring their classes along
            return mine
        return mine | self.seen_classes

    def training_step(self, batch: _Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch over the classes that compete."""
        inputs, labels = batch if self.replay is None else self.replay(*batch)
        logits, rivals = self.network(inputs), self.rivals(True, labels)
        if self.scenario == "class" and self.compete == "zero":
            logits, rivals = logits.masked_fill(~rivals, 0.0), torch.ones_like(rivals)
        loss = self._loss(logits, labels, rivals, self.label_smoothing)
        self.log_training(loss)
        return loss

    def _evaluate(self, batch: _Batch, stage: str, accuracy: MulticlassAccuracy) -> None:
        inputs, labels = batch
        logits, rivals = self.network(inputs), self.rivals(False, labels)
        accuracy.update(logits.masked_fill(~rivals, -math.inf), labels)
        loss = self._loss(logits, labels, rivals)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), sync_dist=True, add_dataloader_idx=False)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=len(labels), add_dataloader_idx=False)

    def _loss(self, logits: Tensor, labels: Tensor, rivals: Tensor, smoothing: float = 0.0) -> Tensor:
        # The columns that compete, by themselves: with infinite logits label smoothing would be infinite too.
        columns = rivals.nonzero().flatten()
        places = rivals.cumsum(0) - 1
        strange = labels[~rivals[labels]]
        if len(strange):
            raise DataError(
                f"label {int(strange[0])} is in the batch, and the classes of this task are {self.current_classes}; give the "
                "data module the classes it has, or use scenario 'class'"
            )
        return F.cross_entropy(logits.index_select(1, columns), places[labels], label_smoothing=smoothing)


def classes_of(data: Any, num_classes: int) -> list[int]:
    """The classes of the task a data module stands for, ascending; of its current domain if it has several.

    Raises `RecipeError` without a data module, `DataError` where it has no samples or classes beyond ``num_classes``.

    Example: ``classes_of(VisionData(classes=[3, 2]), 10)`` is ``[2, 3]`` (after its ``setup``).
    """
    if data is None:
        raise RecipeError(
            "IncrementalClassification asks the data module for the classes of the task, and there is none: give "
            "datamodule=, such as VisionData('mnist', classes=[0, 1])"
        )
    member = data[data.current] if hasattr(data, "names") and hasattr(data, "current") else data
    found = getattr(member, "classes", None)
    if not found:
        tensors = getattr(getattr(member, "train_set", None), "tensors", None)
        if tensors is None or not len(tensors[-1]):
            raise DataError(
                f"{type(member).__name__} has no data to tell the classes of this task by; give it a list 'classes', or a "
                "train_set of (inputs, labels)"
            )
        found = list(set(tensors[-1].tolist()))
    unknown = [label for label in found if not 0 <= int(label) < num_classes]
    if unknown:
        raise DataError(f"class {unknown[0]} of this task has no output: the network has {num_classes}; give it more")
    return sorted(int(label) for label in found)
