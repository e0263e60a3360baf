"""One line an epoch, for logs and pipes where a live progress bar would be noise."""

from __future__ import annotations

import time
from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer

from sparsetrain.callbacks.base import SparsityCallback


class EpochLines(Callback):
    """Prints epoch, step, validation metrics, sparsity and the time left, at most once every ``seconds``.

    Example: ``Trainer(callbacks=[EpochLines()], enable_progress_bar=False)``.
    """

    def __init__(self, seconds: float = 2.0, write: Callable[[str], None] = print) -> None:
        self.seconds = seconds
        self.write = write
        self._began = self._last = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()
        self._last = 0.0
        self._first_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the run is."""
        now = time.monotonic()
        final = trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs > 0
        if not trainer.is_global_zero or (now - self._last < self.seconds and not final):
            return
        self._last = now
        parts = [
            f"epoch {trainer.current_epoch + 1}" + (f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""),
            f"step {trainer.global_step}",
        ]
        parts += [f"{name} {float(v):.4f}" for name, v in trainer.callback_metrics.items() if name.startswith("val/")]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SparsityCallback) and callback.manager is not None:
                parts.append(f"sparsity {callback.sparsity_now():.4f}")
        total, done = trainer.estimated_stepping_batches, trainer.global_step - self._first_step
        if 0 < total < float("inf") and done:
            left = (now - self._began) / done * (total - trainer.global_step)
            parts.append(f"{left:.0f} s left")
        self.write("  ".join(parts))
