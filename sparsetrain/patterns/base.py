"""What every pattern is: the abstract class, exact sparsities and counts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from fractions import Fraction

import torch
from torch import Tensor

from sparsetrain.errors import PatternError

Sparsity = float | Fraction


def exact(sparsity: Sparsity) -> Fraction:
    """Return the sparsity as an exact fraction of its decimal text; raise `PatternError` outside [0, 1) or for NaN.

    Example: ``exact(0.29) * 100`` is exactly 29.
    """
    if not isinstance(sparsity, Fraction) and not math.isfinite(sparsity):
        raise PatternError(f"sparsity is {sparsity}; give a fraction of zeros in [0, 1), such as 0.9")
    value = sparsity if isinstance(sparsity, Fraction) else Fraction(repr(float(sparsity)))
    if not 0 <= value < 1:
        hint = f"; {float(value)} percent is {float(value) / 100}" if 1 < value < 100 else ""
        raise PatternError(f"sparsity {float(value)} is outside [0, 1): it is the fraction of zeros, such as 0.9{hint}")
    return value


class Pattern(ABC):
    """What a mask may look like. A subclass needs `select` and `check`; the rest has sensible defaults.

    ``scores`` and ``mask`` have the shape ``(out, in, *kernel)``; a mask is ``bool`` with ``True`` = alive.
    """

    #: Rows can be selected independently of each other, so a shard of rows selects its own mask.
    row_local: bool = False

    @abstractmethod
    def select(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Return the mask that prunes the lowest scores. Raises `PatternError` if the sparsity cannot be reached."""

    @abstractmethod
    def check(self, mask: Tensor, sparsity: Sparsity) -> None:
        """Raise `PatternError` unless the mask has exactly this pattern at exactly this sparsity."""

    def validate(self, shape: tuple[int, ...], sparsity: Sparsity) -> None:
        """Raise `PatternError` if a tensor of this shape cannot have this pattern at this sparsity."""
        if exact(sparsity) and not self.pruned(shape, sparsity):
            raise PatternError(
                f"{self} has {self.units(shape)} units in a tensor of shape {shape}: sparsity {float(sparsity):g} prunes none "
                "of them; ask for more, use smaller units, or leave the tensor out (targets.exclude)"
            )

    def units(self, shape: tuple[int, ...]) -> int:
        """How many units (weights, blocks, slices) the pattern compares in a tensor of this shape."""
        return math.prod(shape)

    def pruned(self, shape: tuple[int, ...], sparsity: Sparsity) -> int:
        """How many of those units are pruned."""
        return math.floor(exact(sparsity) * self.units(shape))

    def sparsity_of(self, zeros: Tensor) -> Fraction:
        """The highest sparsity a mask of this pattern can have that prunes nothing but zeros (a bool tensor)."""
        return Fraction(int(zeros.sum()), zeros.numel())

    @property
    def sparsity(self) -> Fraction | None:
        """The one sparsity this pattern can have, or None if it is free."""
        return None

    def __str__(self) -> str:
        return type(self).__name__.lower()


def require_bool(mask: Tensor) -> None:
    """Raise unless the mask is bool."""
    if mask.dtype != torch.bool:
        raise PatternError(f"a mask is a bool tensor (True = alive), this one is {mask.dtype}")


def require_count(found: int, expected: int, what: str) -> None:
    """Raise unless the number of pruned units is the one asked."""
    if found != expected:
        raise PatternError(f"{found} {what} are pruned, exactly {expected} were asked")
