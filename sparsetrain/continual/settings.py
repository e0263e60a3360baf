"""What is remembered from domain to domain, and what continual pruning refuses before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from sparsetrain.allocation import Allocation
from sparsetrain.calibration import ranks, require_sums, require_whole
from sparsetrain.criteria import Criterion, Known, StatisticsCriterion
from sparsetrain.errors import RecipeError, nearest
from sparsetrain.masks import MaskManager, sharding
from sparsetrain.oneshot import validate_oneshot
from sparsetrain.oneshot.settings import to_prune
from sparsetrain.patterns import Sparsity
from sparsetrain.pruning import validate_allocation

Mode = Literal["accumulate", "fresh", "stasis", "joint"]


@dataclass(frozen=True)
class Memory:
    """What a domain leaves to the next one.

    Args:
        mode: ``"accumulate"``: the base weights, and statistics of all domains so far, no data. To compare with: ``"fresh"``:
            the base weights alone, so that every domain is pruned for itself (forgetting); ``"stasis"``: nothing, the pruned
            weights are pruned again (no weight ever comes back); ``"joint"``: the base weights and the data of all domains
            (an oracle).
        decay: what earlier statistics are multiplied by when a domain is added, in (0, 1].
        dtype: what statistics are kept in, ``"float32"`` or ``"bfloat16"``; sums are made in float32.
        folder: keeps base weights and statistics in memory-mapped files, one a block; None in main memory (and in checkpoints).
            Of one run alone, in one process: a folder that holds what another run has learned is refused.

    Raises `RecipeError` for anything else. Example: ``Memory(mode="fresh")``.
    """

    mode: Mode = "accumulate"
    decay: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        for key, known in (("mode", get_args(Mode)), ("dtype", ("float32", "bfloat16"))):
            value = getattr(self, key)
            if value not in known:
                raise RecipeError(f"memory.{key}={value!r}; use one of {', '.join(known)}.{nearest(str(value), known)}")
        if not 0 < self.decay <= 1:
            raise RecipeError(f"memory.decay={self.decay}: a factor in (0, 1]; 1 keeps all domains alike")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """What statistics are cast to; None: as they are measured, float32 at least."""
        return torch.bfloat16 if self.dtype == "bfloat16" else None


def validate_continual(
    manager: MaskManager, sparsity: Sparsity | None, criterion: Criterion, allocation: Allocation, memory: Memory
) -> None:
    """Raise what cannot work before anything is measured.

    `RecipeError` for criteria that watch training or whose statistics do not add up, for allocations that pool scores, for a
    model that is sharded, and on several ranks for mode ``"joint"`` and a folder.
    Example: ``validate_continual(manager, 0.5, Copal(), Uniform(), Memory())``.
    """
    kind = type(criterion).__name__
    require_unsharded(manager)
    if ranks() > 1 and memory.mode == "joint":
        raise RecipeError(
            f"memory.mode 'joint' keeps the data of all domains, and each of {ranks()} processes has its own, of which a "
            "checkpoint holds one; use one process"
        )
    if ranks() > 1 and memory.folder is not None:
        raise RecipeError(
            f"memory.folder={str(memory.folder)!r}: {ranks()} processes would write into one folder; leave it out, or use one "
            "process"
        )
    if allocation.pooled and not allocation.by_shape:
        raise RecipeError(
            f"allocation {type(allocation).__name__} gives every tensor another share in every domain; continual pruning keeps "
            "the shares: use 'uniform' or 'erk'"
        )
    if isinstance(criterion, StatisticsCriterion) and memory.mode == "accumulate" and not criterion.additive:
        raise RecipeError(
            f"criterion {kind} keeps no sums that could be added over domains; use 'copal', 'wanda', 'sparsegpt' or 'fisher', "
            "or memory.mode 'fresh'"
        )
    if not (isinstance(criterion, StatisticsCriterion) and criterion.needs == "gradient" and criterion.source != "training"):
        validate_oneshot(manager, sparsity, criterion, allocation)
        return
    require_whole(manager, criterion)
    require_sums(criterion)
    validate_allocation(manager, sparsity, allocation)
    criterion.prepare(manager.model, [Known.of(tensor) for tensor in to_prune(manager)])


def require_unsharded(manager: MaskManager) -> None:
    """Raise `RecipeError` where the model is sharded: base weights are kept of whole tensors.

    Example: ``require_unsharded(manager)``.
    """
    for tensor in manager:
        if sharding.local(tensor.target.parameter) is not tensor.target.parameter:
            raise RecipeError(
                f"continual pruning keeps the base weights of {tensor.name}, which is not possible while the model is sharded "
                "(FSDP2); use DDP, or one process"
            )
