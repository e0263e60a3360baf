"""Patterns over whole units: blocks and slices."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.errors import PatternError
from sparsetrain.patterns.base import Pattern, Sparsity, require_bool, require_count
from sparsetrain.selection import prune_lowest


class UnitPattern(Pattern):
    """A pattern that prunes whole units (blocks, slices), ranked by the mean of their scores."""

    @abstractmethod
    def unit_scores(self, scores: Tensor) -> Tensor:
        """One score a unit; a unit that is dead throughout (all ``-inf``) scores ``-inf``, other dead entries count 0."""

    @abstractmethod
    def expand(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Spread one bool a unit over the entries it stands for."""

    def sparsity_of(self, zeros: Tensor) -> Fraction:
        """Share of the units that are zero throughout."""
        alive = self.unit_scores((~zeros).float())
        return Fraction(int((alive == 0).sum()), alive.numel())

    def select(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Prune ``floor(sparsity * units)`` units with the lowest mean score."""
        shape = tuple(scores.shape)
        units = self.unit_scores(scores)
        return self.expand(prune_lowest(units, self.pruned(shape, sparsity)), shape)

    def check(self, mask: Tensor, sparsity: Sparsity) -> None:
        """Every unit is alive or dead as a whole, and the number of dead units is exact."""
        require_bool(mask)
        shape = tuple(mask.shape)
        # Only a mean of 0 is exact on every device: a unit is dead if nothing in it lives, alive if nothing in it is dead.
        dead, alive = self.unit_scores(mask.float()) == 0, self.unit_scores((~mask).float()) == 0
        mixed = (~(dead | alive)).nonzero()
        if len(mixed):
            raise PatternError(f"unit {tuple(mixed[0].tolist())} of {self} is neither wholly alive nor wholly pruned")
        require_count(int(dead.sum()), self.pruned(shape, sparsity), str(self))


def _dead_as_zero(scores: Tensor) -> tuple[Tensor, Tensor]:
    dead = scores == -math.inf
    return torch.where(dead, torch.zeros((), dtype=scores.dtype, device=scores.device), scores), dead


@dataclass(frozen=True)
class Block(UnitPattern):
    """Blocks of ``rows x cols`` of the matrix ``(out, in * kernel)``; blocks at a ragged edge are smaller.

    A block scores the mean of its entries, so that a smaller block at the edge competes fairly. The count is in blocks:
    with ragged edges the share of zero *weights* can differ a little from the sparsity asked, and is reported.

    Example: ``Block(2, 2).select(torch.arange(16.).view(4, 4), 0.5)`` prunes the two upper blocks.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.rows * self.cols < 2:
            raise PatternError(f"a block of {self.rows}x{self.cols} is no block; use 4x4, 1x8, ... or 'unstructured'")

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return math.ceil(shape[0] / self.rows), math.ceil(math.prod(shape[1:]) / self.cols)

    def units(self, shape: tuple[int, ...]) -> int:
        """The number of blocks."""
        return math.prod(self._grid(shape))

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Mean score of each block, shape ``(ceil(out/rows), ceil(in*kernel/cols))``."""
        values, dead = _dead_as_zero(scores.flatten(1).to(torch.promote_types(scores.dtype, torch.float32)))
        mean = self._pool(values)
        return mean.masked_fill_(self._pool((~dead).to(mean.dtype)) == 0, -math.inf) if bool(dead.any()) else mean

    def _pool(self, matrix: Tensor) -> Tensor:
        # avg_pool2d divides a ragged window by the entries it really has (ceil_mode, no padding counted).
        window = (min(self.rows, matrix.shape[0]), min(self.cols, matrix.shape[1]))
        return F.avg_pool2d(matrix[None, None], window, stride=window, ceil_mode=True, count_include_pad=False)[0, 0]

    def expand(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Repeat each block's bool over its entries."""
        columns = math.prod(shape[1:])
        full = units.repeat_interleave(self.rows, 0)[: shape[0]].repeat_interleave(self.cols, 1)[:, :columns]
        return full.reshape(shape)

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.cols}"


@dataclass(frozen=True)
class Slices(UnitPattern):
    """Whole slices along ``dim`` of one tensor: 0 = output neurons or filters, 1 = input features or channels.

    A slice scores the mean of its entries. Tensors that must shrink together with it are another matter: this pattern
    zeroes slices of single tensors.

    Example: ``Slices(0).select(torch.tensor([[3., 1.], [2., 4.], [0., 1.]]), 0.34)`` prunes the last row.
    """

    dim: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        if self.dim not in (0, 1):
            raise PatternError(f"Slices dim {self.dim!r} is unknown; 0 = outputs (neurons, filters), 1 = inputs (channels)")

    def units(self, shape: tuple[int, ...]) -> int:
        """The number of slices."""
        return shape[self.dim]

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Mean score of each slice, shape ``(size of dim,)``."""
        matrix = scores.movedim(self.dim, 0).flatten(1).to(torch.promote_types(scores.dtype, torch.float32))
        values, dead = _dead_as_zero(matrix)
        return values.mean(1).masked_fill_(dead.all(1), -math.inf)

    def expand(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Repeat each slice's bool over its entries."""
        view = [1] * len(shape)
        view[self.dim] = -1
        return units.view(view).expand(shape).contiguous()

    def __str__(self) -> str:
        return "neurons" if self.dim == 0 else "channels"
