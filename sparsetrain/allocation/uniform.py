"""Uniform: the same sparsity everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from sparsetrain.allocation.base import Allocation, Reduce, Share
from sparsetrain.patterns import Sparsity, exact


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every tensor gets the sparsity asked for. Simple, and unkind to small layers. Example: ``Uniform()(shares, 0.9)``."""

    pooled: ClassVar[bool] = False

    def __call__(self, shares: Sequence[Share], sparsity: Sparsity, reduce: Reduce | None = None) -> dict[str, Fraction]:
        """The same for all."""
        return {share.name: exact(sparsity) for share in shares}
