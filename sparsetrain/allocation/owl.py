"""OWL: blocks of the model with more outlier scores stay denser."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sparsetrain.allocation.base import Allocation, Reduce, Share
from sparsetrain.allocation.filling import fill
from sparsetrain.errors import RecipeError
from sparsetrain.patterns import Sparsity, exact


def outlier_share(scores: Sequence[Tensor], factor: float) -> float:
    """The share of entries above ``factor`` times their mean, over all tensors together (Yin et al. 2023, eq. 1).

    Entries that are pruned already (``-inf``) count as 0.

    Example: ``outlier_share([torch.tensor([1.0, 1.0, 7.0])], 2)`` is 1/3.
    """
    values = [tensor.clamp_min(0.0) for tensor in scores]
    total = sum(tensor.numel() for tensor in values)
    mean = sum(float(tensor.sum(dtype=torch.float64)) for tensor in values) / total
    return sum(int(torch.count_nonzero(tensor > factor * mean)) for tensor in values) / total


def owl_sparsities(outliers: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Sparsities of blocks from their outlier shares ``D``: ``S_l = S + mean(r) - r_l``, ``r_l = 2 spread (D_l - min D) /
    (max D - min D)``, ``mean`` weighted by ``sizes`` so that the whole has sparsity ``S`` (the authors' blocks are all alike).

    Where ``S`` is too close to 0 or 1 for that, all move towards ``S`` until none is below 0, or keeps less than half of what
    it would keep at ``S``. Equal shares give ``S`` for all.

    Example: ``owl_sparsities([0.0, 0.1], [1, 1], 0.7, 0.08)`` is ``[0.78, 0.62]``.
    """
    low, high = min(outliers), max(outliers)
    if high == low:
        return [sparsity] * len(outliers)
    kept = [2 * spread * (share - low) / (high - low) for share in outliers]
    mean = sum(k * size for k, size in zip(kept, sizes, strict=True)) / sum(sizes)
    moves = [mean - k for k in kept]
    if not min(moves) < 0 < max(moves):  # no spread, or one too small for these numbers
        return [sparsity] * len(outliers)
    room = min(1.0, (1 - sparsity) / 2 / max(moves), sparsity / -min(moves))
    return [max(0.0, sparsity + room * move) for move in moves]


def blocks_of(names: Iterable[str]) -> dict[str, str]:
    """Tensor name -> the block it belongs to, by names alone.

    A block is an item of the outermost list that holds modules alike: ``model.layers.3`` of ``model.layers.3.mlp.up.weight``,
    if another number in place of 3 has a tensor that is called the same from there on. A tensor in no such list is its own
    block.

    Example: ``blocks_of(["h.0.a.weight", "h.1.a.weight", "head.weight"])`` has the values ``h.0``, ``h.1``, ``head.weight``.
    """
    cuts = {name: list(_cuts(name)) for name in names}
    numbers: dict[tuple[str, str], set[str]] = {}
    for stem, number, rest in (cut for found in cuts.values() for cut in found):
        numbers.setdefault((stem, rest), set()).add(number)
    lists = {stem for (stem, _), found in numbers.items() if len(found) > 1}
    return {
        name: next((f"{stem}.{number}" for stem, number, _ in found if stem in lists), name) for name, found in cuts.items()
    }


def _cuts(name: str) -> Iterator[tuple[str, str, str]]:
    """What is before, at and behind each number in a name."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdigit():
            yield ".".join(parts[:at]), part, ".".join(parts[at + 1 :])


@dataclass(frozen=True)
class OWL(Allocation):
    """All tensors of a block (a layer of a transformer) get one sparsity: the less, the more outliers their scores have.

    Outlier-weighed layerwise sparsity, Yin et al. 2023 (arXiv 2310.05175, sec. 3): outliers are scores above ``factor`` times
    the mean of their block; see `outlier_share` and `owl_sparsities`. Made for the scores of Wanda (or SparseGPT) on a
    calibrated model and for 60 % and above. Blocks are found by the tensors' names (`blocks_of`). The counts are exact:
    ``floor(sparsity * total)`` entries go, as far as whole units allow.

    Args:
        factor: how many times the mean an outlier is, above 1; the authors take 5 and 7.
        spread: half of the widest difference in sparsity between two blocks, in [0, 0.5); theirs is 0.08.

    Raises `RecipeError` outside of that and for patterns of one sparsity (2:4), `PatternError` for a budget that leaves no
    unit to some tensor.

    Example: ``prune(manager, 0.7, criterion=calibrated, allocation=OWL(spread=0.1))``.
    """

    factor: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 1):
            raise RecipeError(f"OWL factor={self.factor}: how many times the mean an outlier is, above 1, such as 5")
        if not 0 <= self.spread < 0.5:
            raise RecipeError(f"OWL spread={self.spread}: half of the widest difference in sparsity, in [0, 0.5), such as 0.08")

    def __call__(self, shares: Sequence[Share], sparsity: Sparsity, reduce: Reduce | None = None) -> dict[str, Fraction]:
        """One sparsity a block; every rank gathers each tensor once and sees all of it."""
        for share in shares:
            self.check(share.pattern, share.name)
        if not shares:
            return {}
        members: dict[str, list[Share]] = {}
        block = blocks_of(share.name for share in shares)
        for share in shares:
            members.setdefault(block[share.name], []).append(share)
        outliers = [outlier_share([share.gathered() for share in group], self.factor) for group in members.values()]
        sizes = [sum(share.numel for share in group) for group in members.values()]
        found = dict(zip(members, owl_sparsities(outliers, sizes, float(exact(sparsity)), self.spread), strict=True))
        lost = [found[block[share.name]] for share in shares]
        return fill(shares, sparsity, lambda t: [min(1.0, t * each) for each in lost], end=2.0)
