"""Image classification: cross-entropy and accuracy."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from sparsetrain.errors import RecipeError
from sparsetrain.tasks.training import Task

_Batch = tuple[Tensor, Tensor]


class Classification(Task):
    """Train ``network`` on ``(inputs, labels)`` batches; the state dict has its plain names under ``network.``.

    Logs "train/loss" and "lr" per step, "val/loss", "val/accuracy", "test/loss", "test/accuracy" per epoch.

    Args:
        network: returns logits (N, num_classes).
        num_classes: by default the network's own ``num_classes``.
        optimizer: builds the optimizer from the parameters.
        lr_schedule: "constant"; "cosine" or "linear" to zero over ``trainer.estimated_stepping_batches``, set after every
            optimizer step; or a callable that builds a scheduler from the optimizer, stepped once an epoch
            (``ReduceLROnPlateau`` watches "val/loss").
        warmup: fraction of all optimizer steps, in [0, 1), over which the rate rises linearly; not with a callable.
        label_smoothing: in [0, 1), as in ``torch.nn.functional.cross_entropy``; training loss only.

    Raises:
        RecipeError: from the constructor for an argument out of its range; when training starts for a schedule over an
            unbounded number of steps.

    Example: ``Classification(LeNet300(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), lr_schedule="cosine")``.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_schedule: Literal["constant", "cosine", "linear"] | LRSchedulerCallable = "constant",
        warmup: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(optimizer, lr_schedule, warmup)
        classes = num_classes if num_classes is not None else getattr(network, "num_classes", None)
        if not isinstance(classes, int) or classes < 2:
            raise RecipeError(f"num_classes={classes} for {type(network).__name__}; pass num_classes=, at least 2")
        if not 0 <= label_smoothing < 1:
            raise RecipeError(f"label_smoothing={label_smoothing} must be in [0, 1)")
        self.network = network
        self.num_classes = classes
        self.label_smoothing = label_smoothing
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (N, num_classes)."""
        logits: Tensor = self.network(inputs)
        return logits

    def training_step(self, batch: _Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        inputs, labels = batch
        loss = F.cross_entropy(self.network(inputs), labels, label_smoothing=self.label_smoothing)
        self.log_training(loss)
        return loss

    def validation_step(self, batch: _Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log "val/loss" and "val/accuracy"; for a second loader (``VisionData(monitor_test=True)``) the same of "test"."""
        if dataloader_idx == 0:
            self._evaluate(batch, "val", self.val_accuracy)
        else:
            self._evaluate(batch, "test", self.test_accuracy)

    def test_step(self, batch: _Batch, batch_idx: int) -> None:
        """Log "test/loss" and "test/accuracy"."""
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: _Batch, stage: str, accuracy: MulticlassAccuracy) -> None:
        inputs, labels = batch
        logits = self.network(inputs)
        accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), sync_dist=True, add_dataloader_idx=False)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=len(labels), add_dataloader_idx=False)
