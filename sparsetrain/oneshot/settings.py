"""How one-shot pruning is done, and what it refuses before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from sparsetrain.allocation import Allocation
from sparsetrain.calibration import Offload, is_finite, require_sums, require_visible, require_whole
from sparsetrain.criteria import Criterion, StatisticsCriterion
from sparsetrain.errors import DivergedError, PatternError, RecipeError, nearest
from sparsetrain.masks import MaskedTensor, MaskManager, sharding
from sparsetrain.patterns import Sparsity, exact
from sparsetrain.pruning import final_sparsity, require_solvable, validate_allocation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Streaming:
    """How data is taken through the blocks.

    Args:
        batch: samples in a forward pass, at least 1: what bounds the memory that activations need.
        inputs: what a block is measured on: outputs of the ``"pruned"`` blocks before it (as published), or of the
            ``"dense"`` ones, which takes one pass instead of two.
        dtype: blocks run in ``"bfloat16"``, ``"float16"`` or ``"float32"``; None: as they are. Statistics are float32, and
            the weights that are pruned stay as they are.
        offload: where hidden states wait: ``"cpu"``, ``"disk"`` (memory-mapped), None: on the model's device.

    Raises `RecipeError` for anything else. Example: ``Streaming(batch=8, dtype="bfloat16")``.
    """

    batch: int = 2
    inputs: Literal["pruned", "dense"] = "pruned"
    dtype: str | None = None
    offload: Offload = None

    def __post_init__(self) -> None:
        if not isinstance(self.batch, int) or self.batch < 1:
            raise RecipeError(f"batch={self.batch}: a whole number of samples goes through a block at a time, at least 1")
        for key, known in (("inputs", ("pruned", "dense")), ("dtype", (None, *DTYPES)), ("offload", (None, "cpu", "disk"))):
            value = getattr(self, key)
            if value not in known:
                text = ", ".join(map(str, known))
                raise RecipeError(f"{key}={value!r}; use one of {text}.{nearest(str(value), map(str, known))}")


def validate_oneshot(manager: MaskManager, sparsity: Sparsity | None, criterion: Criterion, allocation: Allocation) -> None:
    """Raise what cannot work before anything is measured: see `prune_oneshot`.

    Example: ``validate_oneshot(manager, 0.5, Wanda(), Uniform())``.
    """
    if isinstance(criterion, StatisticsCriterion):
        kind = type(criterion).__name__
        if criterion.source == "training":
            raise RecipeError(
                f"criterion {kind} watches training, and one-shot pruning sees none; use 'wanda', or PruneFinetune"
            )
        if criterion.needs == "gradient":
            raise RecipeError(
                f"criterion {kind} needs gradients of the loss, and blocks are run one by one without it; use criterion "
                "'wanda' or 'sparsegpt', or calibrate(...) and prune(...) (in Lightning: PruneFinetune with schedule OneShot)"
            )
        require_whole(manager, criterion)
        require_sums(criterion)
        require_visible(manager.model, to_prune(manager), criterion)
    validate_allocation(manager, sparsity, allocation)
    require_solvable(manager, criterion)
    if not any(exact(final_sparsity(tensor, sparsity)) for tensor in manager):
        raise RecipeError("every target is asked for sparsity 0: nothing would be pruned; raise sparsity or drop overrides")
    criterion.prepare(manager.model, [part for tensor in to_prune(manager) for part in criterion.parts(tensor)])


def to_prune(tensors: Iterable[MaskedTensor]) -> list[MaskedTensor]:
    """Those that are not to stay dense by an override of their own."""
    return [tensor for tensor in tensors if tensor.goal != 0 or tensor.mask is not None]


def require_sane(tensor: MaskedTensor) -> None:
    """Raise `DivergedError` for weights that are not finite, `PatternError` for zeros that are no masks."""
    weight = sharding.local(tensor.target.parameter.detach())
    if not is_finite(weight):
        raise DivergedError(f"{tensor.name} holds NaN or infinity: nothing was pruned; take weights from before it diverged")
    zeros = 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel()) if tensor.mask is None else 0.0
    if zeros > 0.01:
        raise PatternError(
            f"{tensor.name} is {zeros:.0%} zero already, and these zeros are no masks: nothing was pruned. To keep them, start "
            "from MaskManager.adopt(model, pattern); to prune to another pattern, start from the dense weights; or leave the "
            "tensor out (targets.exclude)"
        )
