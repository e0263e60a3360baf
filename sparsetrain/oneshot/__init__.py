"""One-shot pruning: a trained model is pruned block by block on a few samples, in minutes and without gradients."""

from __future__ import annotations

from sparsetrain.oneshot.engine import prune_oneshot
from sparsetrain.oneshot.report import OneShotReport, OneShotRow
from sparsetrain.oneshot.settings import Streaming, validate_oneshot

__all__ = ["OneShotReport", "OneShotRow", "Streaming", "prune_oneshot", "validate_oneshot"]
