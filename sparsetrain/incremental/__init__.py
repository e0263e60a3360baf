"""Learning tasks one after another in one network: who owns which weight, what stays frozen, what tasks share. Pure torch."""

from __future__ import annotations

from sparsetrain.incremental.frozen import FrozenEntries
from sparsetrain.incremental.owners import FREE, LAST_TASK, claim, serving_mask
from sparsetrain.incremental.rest import Rest, head_of

__all__ = ["FREE", "LAST_TASK", "FrozenEntries", "Rest", "claim", "head_of", "serving_mask"]
