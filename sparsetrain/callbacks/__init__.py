"""Callbacks: one file a method. They say *when*; the mask manager does the rest."""

from __future__ import annotations

from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.callbacks.keep_masks import KeepMasks
from sparsetrain.callbacks.prune_finetune import PruneFinetune
from sparsetrain.callbacks.recovery import Recovery

__all__ = ["NAMES", "KeepMasks", "PruneFinetune", "Recovery", "SparsityCallback"]

NAMES: dict[str, type[SparsityCallback]] = {"PruneFinetune": PruneFinetune, "KeepMasks": KeepMasks}
