"""Global: the scores of all tensors are compared with each other, and each tensor gets what the one threshold leaves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from sparsetrain.allocation.base import Allocation, Reduce, Share
from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.patterns import Pattern, Sparsity, UnitPattern, Unstructured, exact
from sparsetrain.selection import global_threshold


@dataclass(frozen=True)
class Global(Allocation):
    """One threshold over all tensors: ``floor(sparsity * total)`` entries go, ties to earlier tensors first.

    No tensor loses its last weight. Blocks and slices compare their mean scores; the longest run of lowest units that fits
    the budget of entries is pruned. Needs patterns of one kind that can be ranked over tensors (``unstructured``, or all
    blocks, or all slices).

    Example: ``Global()(shares, 0.9)``.
    """

    def check(self, pattern: Pattern, name: str) -> None:
        """Raise `RecipeError` if a tensor's pattern cannot be ranked against other tensors."""
        if pattern.row_local or not isinstance(pattern, UnitPattern | Unstructured):
            raise RecipeError(
                f"{name}: pattern {pattern} cannot follow a global threshold, its sparsity is fixed row by row or group by "
                "group; use allocation 'uniform', or pattern 'unstructured'"
            )

    def __call__(self, shares: Sequence[Share], sparsity: Sparsity, reduce: Reduce | None = None) -> dict[str, Fraction]:
        """The counts that the one threshold gives."""
        for share in shares:
            self.check(share.pattern, share.name)
        if not shares:
            return {}
        total = sum(share.numel for share in shares)
        budget = math.floor(exact(sparsity) * total)
        if all(isinstance(share.pattern, Unstructured) for share in shares):
            if budget > total - len(shares):
                raise PatternError(
                    f"sparsity {float(sparsity):g} of {total} weights leaves {total - budget} for {len(shares)} tensors, and "
                    "each keeps one at least; ask for a lower sparsity, or leave small tensors out (targets.exclude)"
                )
            return _global_weights(shares, budget, reduce)
        if len({type(share.pattern) for share in shares}) > 1:
            kinds = ", ".join(sorted({str(share.pattern) for share in shares}))
            raise RecipeError(
                f"allocation 'global' cannot rank patterns of several kinds ({kinds}) against each other; use 'uniform'"
            )
        return _global_units(shares, budget)


def _global_weights(shares: Sequence[Share], budget: int, reduce: Reduce | None) -> dict[str, Fraction]:
    threshold = global_threshold([share.scores for share in shares], budget, reduce)
    counts = list(threshold.counts)
    if reduce is not None:
        below, equal = (reduce(torch.tensor(v, dtype=torch.int64)).tolist() for v in (threshold.below, threshold.equal))
        left = budget - sum(below)
        for index, (low, tied) in enumerate(zip(below, equal, strict=True)):
            counts[index] = low + min(left, tied)
            left -= min(left, tied)
    full = [share for share, count in zip(shares, counts, strict=True) if count == share.numel]
    if not full:
        return {s.name: Fraction(c, s.numel) for s, c in zip(shares, counts, strict=True)}
    # A dead layer cuts the network in two: it keeps its best weight, the others give one more.
    kept = {share.name: Fraction(share.numel - 1, share.numel) for share in full}
    rest = [share for share in shares if share.name not in kept]
    return kept | _global_weights(rest, budget - sum(share.numel - 1 for share in full), reduce)


def _global_units(shares: Sequence[Share], budget: int) -> dict[str, Fraction]:
    scores, sizes, owner = [], [], []
    for index, share in enumerate(shares):
        assert isinstance(share.pattern, UnitPattern)
        unit = share.pattern.unit_scores(share.gathered()).flatten().double().cpu()
        ones = torch.ones(share.shape)
        # Every unit's own number of entries: its mean over the tensor of ones is 1, so count by expanding an index.
        index_of = share.pattern.expand(torch.arange(len(unit)).view(share.pattern.unit_scores(ones).shape), share.shape)
        scores.append(unit)
        sizes.append(torch.bincount(index_of.flatten(), minlength=len(unit)))
        owner.append(torch.full((len(unit),), index))
    for unit in scores:
        # The best unit of every tensor stays: a dead layer cuts the network in two. Others give what it would have given.
        unit[len(unit) - 1 - int(unit.flip(0).argmax())] = math.inf
    ranked = torch.sort(torch.cat(scores), stable=True)
    fits = (torch.cat(sizes)[ranked.indices].cumsum(0) <= budget) & (ranked.values < math.inf)
    chosen = torch.cat(owner)[ranked.indices[fits]]
    return {share.name: Fraction(int((chosen == i).sum()), len(scores[i])) for i, share in enumerate(shares)}
