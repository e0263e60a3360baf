"""The length of a run in optimizer steps, as far as its trainer knows."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer

from sparsetrain.schedules import Clock


def clock_of(trainer: Trainer) -> Clock:
    """The length of a run as far as the trainer knows it; see `current_step` for what a step is."""
    batches = trainer.num_training_batches
    if not trainer.lightning_module.automatic_optimization:
        known = math.isfinite(batches) and trainer.max_epochs not in (None, -1)
        total = int(batches) * int(trainer.max_epochs or 0) if known else None
        return Clock(total, int(batches) if math.isfinite(batches) else None)
    total_steps = trainer.estimated_stepping_batches
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else None
    return Clock(int(total_steps) if math.isfinite(total_steps) and total_steps >= 0 else None, per_epoch)
