"""Checkpoints that survive: written whole or not at all, and never over a good one with a diverged model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from sparsetrain.callbacks.files import written
from sparsetrain.errors import DivergedError


class AtomicCheckpoints(TorchCheckpointIO):
    """Write to a temporary file beside the target, flush it to disk, then rename: a kill or a full disk leaves the old one.

    Raises `RecipeError` when the disk refuses, saying that the previous checkpoint is intact. Example:
    ``Trainer(plugins=[AtomicCheckpoints()])``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Save whole, or leave what was there."""
        with written(Path(path)) as partial:
            torch.save(checkpoint, partial)


class StopOnDivergence(Callback):
    """Stop when the loss is NaN or infinite, and never save weights that are: raises `DivergedError`."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss of every batch."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all()):
            raise DivergedError(self._message(trainer, f"the loss is {float(loss.float().mean()):g}"))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at every weight before it replaces a good one."""
        for name, value in checkpoint.get("state_dict", {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise DivergedError(self._message(trainer, f"{name} holds NaN or infinity"))

    def _message(self, trainer: Trainer, what: str) -> str:
        return (
            f"training diverged at step {trainer.global_step} (epoch {trainer.current_epoch}): {what}; lower the "
            "learning rate, clip gradients (trainer.gradient_clip_val), or prune more slowly"
        )
