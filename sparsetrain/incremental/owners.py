"""Owner maps: which task each weight belongs to, one byte a weight (PackNet, Mallya and Lazebnik 2018, arXiv 1711.05769).

0 is free, t is task t (from 1). A task may take free weights alone; what it has taken is its own for good. Task j sees the
weights of owners 1 ... j: exactly the network it ended with. Pure torch; tensors have the shape ``(out, in, *kernel)``.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from sparsetrain.errors import PatternError
from sparsetrain.patterns import NM, Pattern, UnitPattern, Unstructured

FREE = 0
#: The highest owner a byte can name.
LAST_TASK = 255


def serving_mask(owners: Tensor, task: int) -> Tensor:
    """The weights task ``task`` sees, bool: those of owners 1 ... task.

    Example: ``serving_mask(torch.tensor([0, 1, 2], dtype=torch.uint8), 1)`` is ``[False, True, False]``.
    """
    return (owners > FREE) & (owners <= task)


def claim(scores: Tensor, owners: Tensor, pattern: Pattern, share: Fraction | None) -> tuple[Tensor, Fraction]:
    """The mask of the weights that the next task takes, and the sparsity at which it has its pattern exactly.

    It takes the free weights of highest score, ``max(1, floor(share * free))`` of them; with scope ``row`` that many of each
    row, with blocks and slices that many of the units. N:M takes ``keep`` of every ``group``, free ones all of them.

    Args:
        scores: finite, higher is more important.
        owners: uint8, the same shape.
        pattern: what the mask of one task may look like.
        share: of what is free, in (0, 1]; None for a pattern that has one sparsity only.

    Raises `PatternError` when too little is free: the network is full.

    Example: ``claim(weight.abs(), owners, Unstructured(), Fraction(1, 2))``.
    """
    free = owners == FREE
    candidates = scores.masked_fill(~free, -math.inf)
    total, left = _room(pattern, free)
    if isinstance(pattern, NM):
        if left < pattern.keep:
            raise PatternError(
                f"the network is full: a group has {left} of {pattern.group} weights left, {pattern} takes {pattern.keep} for "
                f"each task; it holds {pattern.group // pattern.keep} tasks, use a larger group or a smaller keep"
            )
        sparsity = pattern.sparsity
    else:
        if share is None or not 0 < share <= 1:
            raise PatternError(f"share {share} of the free weights is outside (0, 1]; give one such as 0.5")
        if not left:
            raise PatternError("the network is full: earlier tasks own every weight; give them smaller shares")
        sparsity = Fraction(total - max(1, math.floor(share * left)), total)
    mask = pattern.select(candidates, sparsity)
    pattern.check(mask, sparsity)
    if bool((mask & ~free).any()):
        raise PatternError(f"{pattern} would take weights that an earlier task owns; all tasks need the same pattern")
    return mask, sparsity


def _room(pattern: Pattern, free: Tensor) -> tuple[int, int]:
    """How many the pattern compares (weights, those of a row, of a group, or units), and how many of them are free."""
    if isinstance(pattern, UnitPattern):
        taken = pattern.unit_scores((~free).float())
        return taken.numel(), int(torch.count_nonzero(taken == 0))
    if isinstance(pattern, NM):
        last = free.movedim(1, -1)
        return pattern.group, int(last.reshape(*last.shape[:-1], -1, pattern.group).sum(-1).min())
    if pattern == Unstructured("row"):
        return math.prod(free.shape[1:]), int(free.flatten(1).sum(1).min())
    return free.numel(), int(free.sum())
