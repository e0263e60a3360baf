"""Uniform+: the same sparsity everywhere, but the ends of the network are spared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from sparsetrain.allocation.base import Allocation, Reduce, Share
from sparsetrain.allocation.filling import fill
from sparsetrain.errors import RecipeError
from sparsetrain.patterns import Sparsity


@dataclass(frozen=True)
class UniformPlus(Allocation):
    """Uniform, but the first convolution stays dense and the last fully connected layer is at most 80 % sparse.

    Gale et al. 2019 (arXiv 1902.09574, sec. 5); Lee et al. 2021 (LAMP, arXiv 2010.07611) call it Uniform+. The other tensors
    share what remains equally. First and last are those of the tensors that are pruned, in the model's order: ``first`` holds
    where the first one is a convolution, ``last`` where the last one is a matrix (the output head is a target only with
    ``targets.head``). Both are the most that is pruned of it, in [0, 1]; 1 lifts the cap.

    Raises `RecipeError` for a cap outside [0, 1], `PatternError` for a budget that the caps do not allow.

    Example: ``UniformPlus(last=0.9)(shares, 0.95)``.
    """

    by_shape: ClassVar[bool] = True

    first: float = 0.0
    last: float = 0.8

    def __post_init__(self) -> None:
        for name, cap in (("first", self.first), ("last", self.last)):
            if not 0 <= cap <= 1:
                raise RecipeError(
                    f"UniformPlus {name}={cap} is outside [0, 1]: it is the most that may be pruned of that layer"
                )

    def __call__(self, shares: Sequence[Share], sparsity: Sparsity, reduce: Reduce | None = None) -> dict[str, Fraction]:
        """Uniform between the caps."""
        for share in shares:
            self.check(share.pattern, share.name)
        caps = [1.0] * len(shares)
        if shares and len(shares[-1].shape) == 2:
            caps[-1] = self.last
        if shares and len(shares[0].shape) > 2:
            caps[0] = self.first
        capped = ", ".join(f"{share.name} at most {cap:g}" for share, cap in zip(shares, caps, strict=True) if cap < 1)
        why = f" (uniform_plus prunes {capped})" if capped else ""
        return fill(shares, sparsity, lambda t: [min(t, cap) for cap in caps], why=why)
