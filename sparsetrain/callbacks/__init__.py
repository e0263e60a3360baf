"""Callbacks: one file a method. They say *when*; the mask manager does the rest."""

from __future__ import annotations

from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.callbacks.continual_pruning import ContinualPruning
from sparsetrain.callbacks.depth_pruning import DepthPruning
from sparsetrain.callbacks.distillation import Distillation
from sparsetrain.callbacks.dynamic_sparse import DynamicSparse
from sparsetrain.callbacks.group_lasso import GroupLasso
from sparsetrain.callbacks.group_penalty import Penalty
from sparsetrain.callbacks.groups import Groups
from sparsetrain.callbacks.growth_rules import Update
from sparsetrain.callbacks.keep_masks import KeepMasks
from sparsetrain.callbacks.lottery import LotteryTickets
from sparsetrain.callbacks.nm_training import NMTraining
from sparsetrain.callbacks.oneshot import OneShotPruning
from sparsetrain.callbacks.packnet import PackNet
from sparsetrain.callbacks.prune_finetune import PruneFinetune
from sparsetrain.callbacks.recovery import Guard, Recovery
from sparsetrain.callbacks.rewinding import Rewind
from sparsetrain.callbacks.spacenet import SpaceNet
from sparsetrain.callbacks.sparse_lora import SparseLoRA
from sparsetrain.callbacks.structured import StructuredCallback
from sparsetrain.callbacks.supermask import Supermask
from sparsetrain.callbacks.tickets import Control, Lost, TicketRounds
from sparsetrain.callbacks.variational_dropout import VariationalDropout
from sparsetrain.callbacks.weight_noise import Noise

__all__ = [
    "NAMES",
    "ContinualPruning",
    "Control",
    "DepthPruning",
    "Distillation",
    "DynamicSparse",
    "GroupLasso",
    "Groups",
    "Guard",
    "KeepMasks",
    "Lost",
    "LotteryTickets",
    "NMTraining",
    "Noise",
    "OneShotPruning",
    "PackNet",
    "Penalty",
    "PruneFinetune",
    "Recovery",
    "Rewind",
    "SpaceNet",
    "SparseLoRA",
    "SparsityCallback",
    "StructuredCallback",
    "Supermask",
    "TicketRounds",
    "Update",
    "VariationalDropout",
]

NAMES: dict[str, type[SparsityCallback]] = {
    "PruneFinetune": PruneFinetune,
    "LotteryTickets": LotteryTickets,
    "DynamicSparse": DynamicSparse,
    "NMTraining": NMTraining,
    "OneShotPruning": OneShotPruning,
    "GroupLasso": GroupLasso,
    "VariationalDropout": VariationalDropout,
    "ContinualPruning": ContinualPruning,
    "PackNet": PackNet,
    "Supermask": Supermask,
    "SpaceNet": SpaceNet,
    "KeepMasks": KeepMasks,
    "SparseLoRA": SparseLoRA,
}
