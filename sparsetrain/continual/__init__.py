"""Continual pruning: one mask for domains that come one after the other, without keeping their data."""

from __future__ import annotations

from sparsetrain.continual.engine import ContinualPruner, Domain
from sparsetrain.continual.settings import Memory, validate_continual
from sparsetrain.continual.store import Store

__all__ = ["ContinualPruner", "Domain", "Memory", "Store", "validate_continual"]
