"""Training-time sparsity on PyTorch Lightning: masks that hold through every optimizer step.

In plain PyTorch two lines make a model sparse and keep it so; this example runs as it stands::

    import torch, sparsetrain
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    manager = sparsetrain.MaskManager(model, pattern="2:4").attach(optimizer)
    sparsetrain.prune(manager, 0.5)

In Lightning one callback does: ``Trainer(callbacks=[sparsetrain.PruneFinetune(sparsity=0.9)])``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsetrain.allocation import Allocation
from sparsetrain.calibration import calibrate, watch
from sparsetrain.continual import ContinualPruner, Memory
from sparsetrain.criteria import Criterion, Magnitude, Random
from sparsetrain.errors import SparsetrainError
from sparsetrain.masks import MaskManager, Override, load_masks
from sparsetrain.oneshot import OneShotReport, Streaming, prune_oneshot
from sparsetrain.patterns import NM, Block, Pattern, Slices, Unstructured
from sparsetrain.pruning import prune
from sparsetrain.schedules import Cosine, Cubic, Exponential, Linear, OneShot, Piecewise, Rounds, Schedule
from sparsetrain.targets import Targets

if TYPE_CHECKING:
    from sparsetrain.callbacks import (
        ContinualPruning,
        Control,
        DepthPruning,
        Distillation,
        DynamicSparse,
        GroupLasso,
        Groups,
        Guard,
        KeepMasks,
        Lost,
        LotteryTickets,
        NMTraining,
        Noise,
        OneShotPruning,
        PackNet,
        Penalty,
        PruneFinetune,
        Recovery,
        Rewind,
        SpaceNet,
        SparseLoRA,
        SparsityCallback,
        Supermask,
        TicketRounds,
        Update,
        VariationalDropout,
    )
    from sparsetrain.data import DomainSequence, RolloutData, TextClassificationData, TextData, VisionData
    from sparsetrain.tasks import (
        CausalLM,
        Classification,
        IncrementalClassification,
        PolicyGradient,
        SequenceClassification,
        perplexity,
        save_pretrained,
    )

#: Names that need Lightning, imported when they are first asked for: plain PyTorch users do not wait for it.
_LIGHTNING = {
    "CausalLM": "tasks",
    "Classification": "tasks",
    "ContinualPruning": "callbacks",
    "Control": "callbacks",
    "DepthPruning": "callbacks",
    "Distillation": "callbacks",
    "DomainSequence": "data",
    "DynamicSparse": "callbacks",
    "GroupLasso": "callbacks",
    "Groups": "callbacks",
    "Guard": "callbacks",
    "IncrementalClassification": "tasks",
    "KeepMasks": "callbacks",
    "LotteryTickets": "callbacks",
    "Lost": "callbacks",
    "NMTraining": "callbacks",
    "Noise": "callbacks",
    "OneShotPruning": "callbacks",
    "PackNet": "callbacks",
    "Penalty": "callbacks",
    "PolicyGradient": "tasks",
    "PruneFinetune": "callbacks",
    "Recovery": "callbacks",
    "Rewind": "callbacks",
    "RolloutData": "data",
    "SequenceClassification": "tasks",
    "SpaceNet": "callbacks",
    "SparseLoRA": "callbacks",
    "SparsityCallback": "callbacks",
    "Supermask": "callbacks",
    "TextClassificationData": "data",
    "TextData": "data",
    "TicketRounds": "callbacks",
    "Update": "callbacks",
    "VariationalDropout": "callbacks",
    "VisionData": "data",
    "perplexity": "tasks",
    "save_pretrained": "tasks",
}

__all__ = [
    "NM",
    "Allocation",
    "Block",
    "CausalLM",
    "Classification",
    "ContinualPruner",
    "ContinualPruning",
    "Control",
    "Cosine",
    "Criterion",
    "Cubic",
    "DepthPruning",
    "Distillation",
    "DomainSequence",
    "DynamicSparse",
    "Exponential",
    "GroupLasso",
    "Groups",
    "Guard",
    "IncrementalClassification",
    "KeepMasks",
    "Linear",
    "Lost",
    "LotteryTickets",
    "Magnitude",
    "MaskManager",
    "Memory",
    "NMTraining",
    "Noise",
    "OneShot",
    "OneShotPruning",
    "OneShotReport",
    "Override",
    "PackNet",
    "Pattern",
    "Penalty",
    "Piecewise",
    "PolicyGradient",
    "PruneFinetune",
    "Random",
    "Recovery",
    "Rewind",
    "RolloutData",
    "Rounds",
    "Schedule",
    "SequenceClassification",
    "Slices",
    "SpaceNet",
    "SparseLoRA",
    "SparsetrainError",
    "SparsityCallback",
    "Streaming",
    "Supermask",
    "Targets",
    "TextClassificationData",
    "TextData",
    "TicketRounds",
    "Unstructured",
    "Update",
    "VariationalDropout",
    "VisionData",
    "calibrate",
    "load_masks",
    "perplexity",
    "prune",
    "prune_oneshot",
    "save_pretrained",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _LIGHTNING:
        raise AttributeError(f"module 'sparsetrain' has no attribute {name!r}")
    return getattr(import_module(f"sparsetrain.{_LIGHTNING[name]}"), name)
