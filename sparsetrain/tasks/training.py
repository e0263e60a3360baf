"""What every task shares: an optimizer, a learning rate that is a function of the optimizer step, cheap logging.

Every ``self.log`` costs a good part of a small network's training step, so the training step logs only when Lightning
is about to write (every ``Trainer(log_every_n_steps)`` steps) and on the last batch of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import lightning.pytorch as pl
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from sparsetrain.errors import RecipeError, nearest

SHAPES = ("constant", "cosine", "linear")
LRSchedule = Literal["constant", "cosine", "linear"] | LRSchedulerCallable


class Task(pl.LightningModule):
    """Base of the tasks here; a subclass has ``training_step`` and what it evaluates.

    Args:
        optimizer: builds the optimizer from the parameters.
        lr_schedule: "constant"; "cosine" or "linear" to zero over ``trainer.estimated_stepping_batches``, set after every
            optimizer step; or a callable that builds a scheduler from the optimizer, stepped once an epoch
            (``ReduceLROnPlateau`` watches "val/loss").
        warmup: fraction of all optimizer steps, in [0, 1), over which the rate rises linearly; not with a callable.

    Raises:
        RecipeError: from the constructor for an argument out of its range; when training starts for a schedule over an
            unbounded number of steps.

    Example: ``class Mine(Task): ...``, with ``super().__init__(torch.optim.AdamW, "cosine", warmup=0.1)``.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_schedule: LRSchedule = "constant", warmup: float = 0.0) -> None:
        super().__init__()
        if isinstance(lr_schedule, str) and lr_schedule not in SHAPES:
            known = ", ".join(SHAPES)
            raise RecipeError(f"lr_schedule={lr_schedule!r} is not one of {known}.{nearest(lr_schedule, SHAPES)}")
        if not 0 <= warmup < 1:
            raise RecipeError(f"warmup={warmup} must be in [0, 1)")
        if warmup and not isinstance(lr_schedule, str):
            raise RecipeError(f"warmup={warmup} needs lr_schedule to be one of {', '.join(SHAPES)}, not a callable")
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.warmup = warmup

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Rotary frequencies stay float32 in a model that is cast to half precision, as transformers loads such a model.

        Rounded they would be off by a radian a thousand positions on, and what is saved and loaded again would have others.
        """
        before = {(m, n): b for m in self.modules() for n, b in m._buffers.items() if n.endswith("inv_freq") and b is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for (module, name), exact in before.items():
            now = module._buffers[name]
            if now is not None and now.dtype.itemsize < exact.dtype.itemsize:
                module._buffers[name] = exact.to(now.device)
        return self

    def log_training(self, loss: Tensor) -> None:
        """Log "train/loss" and "lr" where Lightning is about to write them, and on the last batch of an epoch."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (every and (self.global_step + 1) % every == 0) or self.trainer.is_last_batch:
            self.log("train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False)
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=False)

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
