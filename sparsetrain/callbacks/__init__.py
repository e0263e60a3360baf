"""Callbacks: one file a method. They say *when*; the mask manager does the rest."""

from __future__ import annotations

from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.callbacks.depth_pruning import DepthPruning
from sparsetrain.callbacks.dynamic_sparse import DynamicSparse
from sparsetrain.callbacks.growth_rules import Update
from sparsetrain.callbacks.keep_masks import KeepMasks
from sparsetrain.callbacks.lottery import LotteryTickets
from sparsetrain.callbacks.nm_training import NMTraining
from sparsetrain.callbacks.prune_finetune import PruneFinetune
from sparsetrain.callbacks.recovery import Recovery
from sparsetrain.callbacks.rewinding import Rewind
from sparsetrain.callbacks.tickets import Control, Lost, TicketRounds

__all__ = [
    "NAMES",
    "Control",
    "DepthPruning",
    "DynamicSparse",
    "KeepMasks",
    "Lost",
    "LotteryTickets",
    "NMTraining",
    "PruneFinetune",
    "Recovery",
    "Rewind",
    "SparsityCallback",
    "TicketRounds",
    "Update",
]

NAMES: dict[str, type[SparsityCallback]] = {
    "PruneFinetune": PruneFinetune,
    "LotteryTickets": LotteryTickets,
    "DynamicSparse": DynamicSparse,
    "NMTraining": NMTraining,
    "KeepMasks": KeepMasks,
}
