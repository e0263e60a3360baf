"""Turning ideal shares into counts of whole units that meet one budget, exactly and the same way at every budget.

An allocation that does not look at scores is a *path*: at position ``t`` each tensor has lost a share that only rises with
``t``. The counts at ``t`` are those shares rounded to whole units; the budget is met at the last ``t`` that it allows, and what
rounding leaves goes to earlier tensors first. So counts never fall when the budget rises, as a gradual schedule needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from sparsetrain.allocation.base import Share
from sparsetrain.errors import PatternError
from sparsetrain.patterns import Block, Sparsity, Unstructured, exact

Path = Callable[[float], Sequence[float]]


def unit_counts(share: Share) -> tuple[int, int]:
    """How many units a tensor's pattern prunes one by one, and the entries of the largest of them.

    Example: a (300, 784) tensor has (235200, 1) unstructured, (784, 300) by ``unstructured:row``, (300, 784) by neurons.
    """
    pattern, shape = share.pattern, share.shape
    if isinstance(pattern, Unstructured) and pattern.scope == "row":
        return math.prod(shape[1:]), shape[0]
    units = pattern.units(shape)
    if isinstance(pattern, Block):
        return units, min(pattern.rows, shape[0]) * min(pattern.cols, math.prod(shape[1:]))
    return units, math.ceil(share.numel / units)


def fill(shares: Sequence[Share], sparsity: Sparsity, path: Path, end: float = 1.0, why: str = "") -> dict[str, Fraction]:
    """Tensor name -> sparsity for the budget ``floor(sparsity * total)`` of entries, along ``path`` from 0 to ``end``.

    Unstructured tensors meet the budget exactly. Rows, blocks and slices never exceed it, and miss it by less than the unit
    that would be next (a ragged block counts as a whole one). Every tensor keeps one unit at least.

    ``path(t)`` gives the share in [0, 1] that each tensor has lost at ``t``, nothing at 0, and never falls with ``t``.
    Raises `PatternError` for a budget that cannot be reached; ``why`` is added to it.

    Example: ``fill(shares, 0.9, lambda t: [t] * len(shares))`` gives every tensor 0.9.
    """
    if not shares:
        return {}
    total = sum(share.numel for share in shares)
    budget = math.floor(exact(sparsity) * total)
    units, sizes = zip(*(unit_counts(share) for share in shares), strict=True)

    def counts(t: float) -> list[int]:
        return [min(n - 1, math.floor(lost * n + 0.5)) for lost, n in zip(path(t), units, strict=True)]

    def cost(found: Sequence[int]) -> int:
        return sum(count * size for count, size in zip(found, sizes, strict=True))

    low, high = 0.0, end
    if cost(counts(end)) <= budget:
        low = end
        more = [min(n - 1, c + (lost * n > c)) for n, c, lost in zip(units, counts(end), path(end), strict=True)]
    else:
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (middle, high) if cost(counts(middle)) <= budget else (low, middle)
        more = counts(high)
    found = counts(low)
    left = budget - cost(found)
    for index, size in enumerate(sizes):
        # The longest run that fits: skipping a large unit for a small one would not be undone when the budget rises.
        take = min(more[index] - found[index], left // size)
        found[index] += take
        left -= take * size
        if found[index] < more[index]:
            break
    if found == more and left >= min(sizes):
        raise PatternError(
            f"sparsity {float(sparsity):g} of {total} weights cannot be reached: these {len(shares)} tensors can lose "
            f"{(budget - left) / total:.4g} together{why or ', and each keeps one unit at least'}; ask for a lower sparsity, "
            "or leave small tensors out (targets.exclude)"
        )
    return {share.name: Fraction(count, n) for share, count, n in zip(shares, found, units, strict=True)}
