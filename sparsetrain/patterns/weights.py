"""Patterns over single weights: unstructured and N:M."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from sparsetrain.errors import PatternError
from sparsetrain.patterns.base import Pattern, Sparsity, exact, require_bool, require_count
from sparsetrain.selection import keep_n_of_m, prune_lowest, prune_lowest_rows


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight may go. ``scope`` says which weights are compared: the whole ``tensor``, or each output ``row``.

    Scope ``row`` prunes ``floor(sparsity * row length)`` weights in every row (as Wanda does, arXiv 2306.11695, sec. 3).

    Example: ``Unstructured().select(torch.tensor([[3., 1.], [2., 4.]]), 0.5)`` keeps 3 and 4.
    """

    scope: Literal["tensor", "row"] = "tensor"

    def __post_init__(self) -> None:
        if self.scope not in ("tensor", "row"):
            raise PatternError(f"Unstructured scope {self.scope!r} is unknown; use 'tensor' or 'row'")

    @property
    def row_local(self) -> bool:  # type: ignore[override]
        """Rows are independent exactly when they are the scope of comparison."""
        return self.scope == "row"

    def select(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Prune the lowest scores of the tensor, or of each row."""
        if self.scope == "tensor":
            return prune_lowest(scores, self.pruned(tuple(scores.shape), sparsity))
        return prune_lowest_rows(scores, math.floor(exact(sparsity) * math.prod(scores.shape[1:])))

    def pruned(self, shape: tuple[int, ...], sparsity: Sparsity) -> int:
        """``floor(sparsity * n)``, in each row when rows are compared."""
        if self.scope == "tensor":
            return super().pruned(shape, sparsity)
        return shape[0] * math.floor(exact(sparsity) * math.prod(shape[1:]))

    def sparsity_of(self, zeros: Tensor) -> Fraction:
        """Share of zeros in the tensor, or in the row that has the fewest."""
        if self.scope == "tensor":
            return super().sparsity_of(zeros)
        rows = zeros.flatten(1)
        return Fraction(int(rows.sum(1).min()), rows.shape[1])

    def check(self, mask: Tensor, sparsity: Sparsity) -> None:
        """The number of zeros is exact: in the tensor, or in every row."""
        require_bool(mask)
        if self.scope == "tensor":
            require_count(int(mask.numel() - mask.sum()), self.pruned(tuple(mask.shape), sparsity), "weights")
            return
        rows = mask.flatten(1)
        dead = rows.shape[1] - rows.sum(1)
        expected = math.floor(exact(sparsity) * rows.shape[1])
        wrong = (dead != expected).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise PatternError(f"row {row} has {int(dead[row])} pruned weights, {self} asks for exactly {expected}")

    def __str__(self) -> str:
        return "unstructured" if self.scope == "tensor" else "unstructured:row"


@dataclass(frozen=True)
class NM(Pattern):
    """``keep`` of every ``group`` neighbours along the input dimension stay alive; as text ``2:4`` = keep 2 of 4.

    Other tools (wanda, sparsegpt) write how many to *prune*; the two readings agree only at 2:4, 4:8 and the like. In a
    convolution the neighbours are input channels at one kernel position, in an embedding they lie along the embedding
    dimension (the input dimension of the output head an embedding is tied to).

    Example: ``NM(2, 4).select(torch.tensor([[3., 1., 2., 4.]]), 0.5)`` keeps 3 and 4.
    """

    keep: int
    group: int
    row_local = True

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.group:
            raise PatternError(f"{self.keep}:{self.group} is not an N:M pattern: it needs 0 < keep < group, such as 2:4")

    @property
    def sparsity(self) -> Fraction:
        """``1 - keep / group``."""
        return 1 - Fraction(self.keep, self.group)

    def sparsity_of(self, zeros: Tensor) -> Fraction:
        """Its one sparsity as soon as there are zeros."""
        return self.sparsity if bool(zeros.any()) else Fraction(0)

    def validate(self, shape: tuple[int, ...], sparsity: Sparsity) -> None:
        """N:M is dense or at ``1 - keep/group``; the input dimension must divide by ``group``."""
        value = exact(sparsity)
        # As floats: 2/3 as a decimal text is not the fraction 2/3, and is all a recipe can say.
        if float(value) not in (0.0, float(self.sparsity)):
            raise PatternError(
                f"{self} always has sparsity {float(self.sparsity):g}, {float(value):g} was asked; ask for "
                f"{float(self.sparsity):g} (or leave the sparsity out), choose another keep:group, or use 'unstructured'"
            )
        if value and (len(shape) < 2 or shape[1] % self.group):
            size = shape[1] if len(shape) > 1 else None
            raise PatternError(
                f"{self} needs an input dimension that divides by {self.group}, this one is {size} (shape {shape}); "
                "leave the tensor out (targets.exclude) or give it another pattern (overrides)"
            )

    def select(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Keep the ``keep`` highest of every group."""
        self.validate(tuple(scores.shape), sparsity)
        return keep_n_of_m(scores, self.keep, self.group) if sparsity else torch.ones_like(scores, dtype=torch.bool)

    def check(self, mask: Tensor, sparsity: Sparsity) -> None:
        """Every group has exactly ``keep`` alive."""
        require_bool(mask)
        self.validate(tuple(mask.shape), sparsity)
        if not sparsity:  # a dense tensor need not divide by the group
            require_count(int((~mask).sum()), 0, "weights")
            return
        last = mask.movedim(1, -1)
        alive = last.reshape(*last.shape[:-1], -1, self.group).sum(-1)
        wrong = (alive != self.keep).nonzero()
        if len(wrong):
            where = tuple(wrong[0].tolist())
            raise PatternError(
                f"group {where[-1]} of row {where[0]} keeps {int(alive[where])} of {self.group}, {self} keeps {self.keep}"
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"
