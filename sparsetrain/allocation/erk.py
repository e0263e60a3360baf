"""ERK: the Erdos-Renyi-Kernel densities of sparse training; large layers are sparser than small ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from sparsetrain.allocation.base import Allocation, Reduce, Share
from sparsetrain.allocation.filling import fill
from sparsetrain.errors import RecipeError
from sparsetrain.patterns import Sparsity, Unstructured


@dataclass(frozen=True)
class ERK(Allocation):
    """Densities proportional to ``((out + in + kh + kw) / (out * in * kh * kw)) ** power``, scaled to the budget.

    Evci et al. 2020 (RigL, arXiv 1911.11134, sec. 3). A layer whose density would pass 1 stays dense, and the others give what
    it cannot take. ``power`` in [0, inf): 1 is the paper's, 0 is uniform, between them is softer.

    Raises `RecipeError` for a power outside that range, `PatternError` for a budget that leaves no unit to some tensor.

    Example: ``ERK()(shares, 0.9)``.
    """

    by_shape: ClassVar[bool] = True

    power: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.power) and self.power >= 0):
            raise RecipeError(f"ERK power={self.power}; give a number of 0 or more: 1 is the paper's, 0 is uniform")

    def __call__(self, shares: Sequence[Share], sparsity: Sparsity, reduce: Reduce | None = None) -> dict[str, Fraction]:
        """The counts of those densities; looks at shapes alone, so that every rank finds the same."""
        for share in shares:
            self.check(share.pattern, share.name)
        raw = [(sum(share.shape) / share.numel) ** self.power for share in shares]
        least = min(raw, default=1.0)
        # At t = 0 the largest layer, too, is just dense.
        return fill(shares, sparsity, lambda t: [max(0.0, 1 - (1 - t) * (density / least)) for density in raw])


def erk_sparsities(shapes: Sequence[tuple[int, ...]], sparsity: Sparsity, power: float = 1.0) -> list[Fraction]:
    """ERK for bare shapes ``(out, in, *kernel)`` and unstructured masks; the counts sum to ``floor(sparsity * total)``.

    Raises as `ERK` does. Example: ``erk_sparsities([(300, 784), (100, 300), (10, 100)], 0.9)``.
    """
    shares = [Share.without_scores(str(i), Unstructured(), shape) for i, shape in enumerate(shapes)]
    return list(ERK(power)(shares, sparsity).values())
