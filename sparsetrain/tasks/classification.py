"""Image classification: cross-entropy, accuracy, and a learning rate that is a function of the optimizer step.

Every ``self.log`` costs a good part of a small network's training step, so the training step logs only when Lightning
is about to write (every ``Trainer(log_every_n_steps)`` steps) and on the last batch of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torchmetrics.classification import MulticlassAccuracy

from sparsetrain.errors import RecipeError, nearest

SHAPES = ("constant", "cosine", "linear")
_Batch = tuple[Tensor, Tensor]


class Classification(pl.LightningModule):
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
        super().__init__()
        classes = num_classes if num_classes is not None else getattr(network, "num_classes", None)
        if not isinstance(classes, int) or classes < 2:
            raise RecipeError(f"num_classes={classes} for {type(network).__name__}; pass num_classes=, at least 2")
        if isinstance(lr_schedule, str) and lr_schedule not in SHAPES:
            known = ", ".join(SHAPES)
            raise RecipeError(f"lr_schedule={lr_schedule!r} is not one of {known}.{nearest(lr_schedule, SHAPES)}")
        if not (0 <= warmup < 1 and 0 <= label_smoothing < 1):
            raise RecipeError(f"warmup={warmup}, label_smoothing={label_smoothing}: both must be in [0, 1)")
        if warmup and not isinstance(lr_schedule, str):
            raise RecipeError(f"warmup={warmup} needs lr_schedule to be one of {', '.join(SHAPES)}, not a callable")
        self.network = network
        self.num_classes = classes
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.warmup = warmup
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
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (every and (self.global_step + 1) % every == 0) or self.trainer.is_last_batch:
            self.log("train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False)
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=False)
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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its schedule."""
        optimizer = self.optimizer(self.parameters())
        if not isinstance(self.lr_schedule, str):
            scheduler = self.lr_schedule(optimizer)
            config: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
            if isinstance(scheduler, ReduceLROnPlateau):
                config["monitor"] = "val/loss"
        elif self.lr_schedule == "constant" and not self.warmup:
            return optimizer
        else:
            steps = self.trainer.estimated_stepping_batches
            if not 0 < steps < math.inf:
                raise RecipeError(f"lr_schedule={self.lr_schedule!r} over {steps} steps; set max_epochs= or max_steps=")
            factor = lr_factor(self.lr_schedule, int(steps), self.warmup)
            config = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]


def lr_factor(shape: str, steps: int, warmup: float = 0.0) -> Callable[[int], float]:
    """Return the factor of the learning rate at each optimizer step 0 ... steps; 0 at ``steps`` unless constant.

    With w = ceil(warmup * steps): (step + 1) / (w + 1) while step < w; then, with t = (step - w) / (steps - w), 1 for
    "constant", 1 - t for "linear", (1 + cos(pi t)) / 2 for "cosine" (Loshchilov and Hutter 2017, one cycle).

    Example: ``lr_factor("linear", 100)(50)`` gives 0.5.
    """
    warm = min(math.ceil(warmup * steps), steps - 1)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        progress = min(1.0, (step - warm) / (steps - warm))
        if shape == "linear":
            return 1 - progress
        return (1 + math.cos(math.pi * progress)) / 2 if shape == "cosine" else 1.0

    return factor
