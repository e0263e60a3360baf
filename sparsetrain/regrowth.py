"""Regrowth: the weakest connections of a tensor die, others grow in their place, and its pattern stays exact throughout.

One update of dynamic sparse training (SET, Mocanu et al. 2018, arXiv 1707.04780; RigL, Evci et al. 2020, arXiv 1911.11134,
algorithm 1) drops the ``k`` connections of lowest strength ``|w|``, then grows the ``k`` of highest growth score among all that
are dead by then. A connection that was dropped a moment ago is one of those: if it is chosen, nothing has happened to it.

Strengths are at least 0; scores are finite; of equal ones the lower row-major index dies first. All tensors have the shape
``(out, in, *kernel)``; masks are bool, True = alive. Pure functions, no randomness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from sparsetrain.errors import PatternError
from sparsetrain.patterns import NM, Pattern, UnitPattern, Unstructured
from sparsetrain.selection import keep_n_of_m, prune_lowest, prune_lowest_rows


def annealed(fraction: float, step: int, end: int) -> float:
    """``fraction / 2 * (1 + cos(pi * step / end))``, 0 from ``end`` on (RigL, sec. 3, "Update schedule").

    Example: ``annealed(0.3, 50, 100)`` is 0.15.
    """
    return fraction / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0


def movable(pattern: Pattern, mask: Tensor) -> int:
    """How many connections an update takes its fraction of: the alive weights, blocks or slices; with scope ``row`` those of
    one row.

    Example: ``movable(Unstructured(), torch.tensor([[True, False]]))`` is 1.
    """
    if isinstance(pattern, UnitPattern):
        return int(torch.count_nonzero(pattern.unit_scores(mask.float())))
    alive = int(torch.count_nonzero(mask))
    return alive // mask.shape[0] if pattern == Unstructured("row") else alive


def drop_and_grow(
    pattern: Pattern, mask: Tensor, strength: Tensor, growth: Tensor, drop: int, grow: int | None = None
) -> Tensor:
    """The mask after one update: ``drop`` connections die, then ``grow`` are grown (by default as many).

    What one connection is depends on the pattern: a weight; with scope ``row`` a weight of every row; a block or slice, scored
    by the means of its entries. In N:M weights are exchanged inside their group: the weakest alive for the best dead, in the
    ``drop`` groups whose weakest is weakest, once in each group at most.

    Raises `PatternError` for more than there are, for a ``grow`` of its own where the pattern fixes it, for a pattern it does
    not know, and for NaN. Example: ``drop_and_grow(Unstructured(), mask, weight.abs(), gradient.abs(), 10)``.
    """
    grown = drop if grow is None else grow
    if grown != drop and pattern != Unstructured():
        raise PatternError(f"pattern {pattern} keeps its sparsity: it cannot drop {drop} and grow {grown}; use 'unstructured'")
    if isinstance(pattern, NM):
        return _exchange(pattern, mask, strength, growth, drop)
    if isinstance(pattern, UnitPattern):
        alive = pattern.unit_scores(mask.float()) > 0
        units = _renew(alive, pattern.unit_scores(strength), pattern.unit_scores(growth), drop, grown)
        return pattern.expand(units, tuple(mask.shape))
    if not isinstance(pattern, Unstructured):
        raise PatternError(f"pattern {pattern} says not how to drop and grow; use 'unstructured', N:M, blocks or slices")
    return _renew(mask, strength, growth, drop, grown, rows=pattern.row_local)


def _renew(alive: Tensor, strength: Tensor, growth: Tensor, drop: int, grow: int, rows: bool = False) -> Tensor:
    size = alive.shape[1:].numel() if rows else alive.numel()
    counts = torch.count_nonzero(alive.flatten(1), dim=1) if rows else torch.count_nonzero(alive)
    living = int(counts.min())
    if living != int(counts.max()):
        raise PatternError(f"rows with {living} to {int(counts.max())} alive weights; scope 'row' has as many in each")
    dead = size - living + drop
    if not 0 <= drop <= living or not 0 <= grow <= dead:
        raise PatternError(f"cannot drop {drop} of {living} connections and grow {grow} of the {dead} then dead")
    prune = prune_lowest_rows if rows else prune_lowest
    kept = prune(strength.masked_fill(~alive, -math.inf), dead)
    return prune(growth.masked_fill(kept, math.inf), dead - grow)


def _exchange(pattern: NM, mask: Tensor, strength: Tensor, growth: Tensor, count: int) -> Tensor:
    keep, size = pattern.keep, pattern.group
    kept = keep_n_of_m(strength.masked_fill(~mask, -math.inf), keep - 1, size)
    swapped = keep_n_of_m(growth.masked_fill(mask, -math.inf).masked_fill(kept, math.inf), keep, size)
    # One weight a group is about to go; the groups where it is weakest go first.
    going = strength.masked_fill(kept | ~mask, 0.0).movedim(1, -1)
    weakest = going.reshape(*going.shape[:-1], -1, size).sum(-1)
    stays = prune_lowest(weakest, max(0, min(count, weakest.numel())))
    return torch.where(stays.repeat_interleave(size, -1).movedim(-1, 1), mask, swapped)


def share_out(total: int, weights: Sequence[float], room: Sequence[int]) -> list[int]:
    """Split ``total`` in proportion to ``weights``, nobody above its ``room``; what does not fit goes to the others.

    Whole numbers by largest remainder, earlier ones first among equals; they add up to ``total`` exactly. Weights that are all
    0 count as equal. Raises `PatternError` if there is not room enough, or for a weight that is negative or not finite.

    Example: ``share_out(10, [1.0, 3.0, 1.0], [9, 4, 9])`` is ``[3, 4, 3]``.
    """
    if not 0 <= total <= sum(room) or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise PatternError(f"cannot share {total} out over room for {list(room)} by weights {list(weights)}")
    given = [0] * len(room)
    unsettled = [i for i, free in enumerate(room) if free]
    while unsettled:
        left, exact = total - sum(given), [Fraction(weights[i]) for i in unsettled]
        exact = exact if any(exact) else [Fraction(1)] * len(exact)
        quotas = {i: left * w / sum(exact) for i, w in zip(unsettled, exact, strict=True)}
        full = [i for i in unsettled if quotas[i] >= room[i]]
        if not full:
            given = [math.floor(quotas[i]) if i in quotas else count for i, count in enumerate(given)]
            for i in sorted(unsettled, key=lambda i: given[i] - quotas[i])[: total - sum(given)]:
                given[i] += 1
            break
        for i in full:
            given[i] = room[i]
        unsettled = [i for i in unsettled if i not in full]
    return given


def removals(alive: Sequence[int], sizes: Sequence[int], shares: Sequence[float], rate: float) -> list[int]:
    """How many weights each tensor gives up: ``ceil(rate * alive)`` (Dettmers and Zettlemoyer 2019, arXiv 1907.04840, sec. 3).

    As in the authors' code a tensor with less than 20 % zeros that would grow (its share above the mean) gives up no larger a
    share than it has zeros. No tensor gives up its last weight.

    Example: ``removals([50, 90], [100, 100], [0.4, 0.6], 0.5)`` is ``[25, 9]``.
    """
    mean = sum(shares) / len(shares) if shares else 0.0
    result = []
    for living, size, share in zip(alive, sizes, shares, strict=True):
        zeros = (size - living) / size
        own = min(zeros, rate) if zeros < 0.2 and share > mean else rate
        result.append(max(0, min(math.ceil(own * living), living - 1)))
    return result
