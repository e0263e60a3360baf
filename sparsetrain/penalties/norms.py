"""Units that live and die as a whole, and their norms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsetrain.errors import RecipeError, TargetError

#: w_u of each unit: (units,), one for all, or None for `default_weight`.
Weights = float | Tensor | None


@dataclass(frozen=True)
class Part:
    """What units own of one tensor: unit ``u`` has the slices ``index[u]`` along ``dim``.

    Args:
        tensor: floating, of any shape with a dimension; a parameter stays the model's own and is never copied.
        dim: the dimension that is cut, 0 <= dim < tensor.ndim.
        index: int64 (units, slices a unit), no slice twice; None: every slice is a unit. Slices not named are left alone.

    Raises `TargetError` for a tensor that is empty or not floating, a dimension or slice that is not there, or a slice named
    twice.

    Example: ``Part(linear.weight, 0)`` are the rows of a layer, ``Part(linear.weight, 1)`` its columns.
    """

    tensor: Tensor
    dim: int
    index: Tensor | None = None
    #: The first slice where all of them follow each other, else -1.
    start: int = field(init=False)
    #: The other dimensions, units and slices a unit.
    others: tuple[int, ...] = field(init=False)
    units: int = field(init=False)
    each: int = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(self.tensor.shape)
        if not self.tensor.is_floating_point():
            raise TargetError(f"a tensor of {self.tensor.dtype} has no norm to shrink; give floating tensors")
        if not 0 <= self.dim < len(shape):
            raise TargetError(f"a tensor of shape {shape} has no dimension {self.dim}; count from 0")
        if not self.tensor.numel():
            raise TargetError(f"a tensor of shape {shape} has no entries; leave it out")
        start = 0
        if self.index is not None:
            if self.index.ndim != 2 or self.index.dtype != torch.int64 or not self.index.numel():
                raise TargetError(f"index is {self.index.dtype} {tuple(self.index.shape)}; it is int64 (units, slices a unit)")
            flat = self.index.flatten()
            low, high = int(flat.min()), int(flat.max())
            if low < 0 or high >= shape[self.dim]:
                raise TargetError(f"slices {low} to {high} of dimension {self.dim} of shape {shape}: they are not all there")
            if len(set(flat.tolist())) < flat.numel():
                raise TargetError(f"a slice of dimension {self.dim} of shape {shape} is in two units; it can die with one only")
            start = low if torch.equal(flat, torch.arange(low, low + flat.numel(), device=flat.device)) else -1
        units, each = (shape[self.dim], 1) if self.index is None else self.index.shape
        others = tuple(d for d in range(len(shape)) if d != self.dim)
        for name, value in (("start", start), ("others", others), ("units", units), ("each", each)):
            object.__setattr__(self, name, value)

    def slices(self, tensor: Tensor | None = None) -> Tensor:
        """The tensor, or a view of those slices that follow each other and make up the units; or so of one shaped like it."""
        tensor = self.tensor if tensor is None else tensor
        count = self.units * self.each
        if self.start < 0 or count == tensor.shape[self.dim]:
            return tensor
        return tensor.narrow(self.dim, self.start, count)

    def fold(self, values: Tensor) -> Tensor:
        """One value a slice of ``slices()`` -> (units, slices a unit)."""
        return values[self._where()] if self.start < 0 else values.view(self.units, self.each)

    def spread(self, values: Tensor, rest: float) -> Tensor:
        """One value a unit -> one a slice of ``slices()``, ``rest`` for those of no unit, shaped to broadcast with it."""
        if self.start < 0:
            every = values.new_full((self.tensor.shape[self.dim],), rest)
            every[self._where()] = values[:, None]
            values = every
        elif self.each > 1:
            values = values.repeat_interleave(self.each)
        return values if self.dim == len(self.others) else values.view(-1, *[1] * (len(self.others) - self.dim))

    def rows(self, tensor: Tensor) -> Tensor:
        """The units' entries of a tensor shaped like this one: (units, entries a unit), for reading."""
        first = self.slices(tensor).movedim(self.dim, 0)
        return (first if self.start >= 0 else first[self._where()]).reshape(self.units, -1)

    def put(self, rows: Tensor) -> None:
        """Write back what ``rows`` gave, in place."""
        first = self.slices().movedim(self.dim, 0)
        if self.start >= 0:
            first.copy_(rows.reshape(first.shape))
        else:
            first[self._where()] = rows.reshape(self.units, self.each, *first.shape[1:]).to(first.dtype)

    def _where(self) -> Tensor:
        assert self.index is not None
        return self.index.to(self.tensor.device)


@dataclass(frozen=True)
class Units:
    """Units and all that they own: a neuron has a row of one weight, an entry of its bias and a column of the next weight.

    From a coupled group of `sparsetrain.structure`, with the model's parameters by name::

        Units(tuple(Part(parameters[s.tensor], s.dim, s.index) for s in group.slots if not s.buffer))

    Make it once, not every step: making it checks every index. All parts are on one device.

    Raises `TargetError` for no parts, parts that do not agree how many units there are, or a tensor with two parts: where
    both its rows and its columns are cut, an entry is in two units, and none of the formulas here holds. Leave one part out.

    Example: ``Units((Part(fc1.weight, 0), Part(fc1.bias, 0), Part(fc2.weight, 1)))``.
    """

    parts: tuple[Part, ...]
    #: Number of units, and of entries in each.
    count: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        counts = [part.units for part in self.parts]
        if len(set(counts)) != 1:
            raise TargetError(f"parts have {counts} units: give one part or more, all of as many units")
        if len({id(part.tensor) for part in self.parts}) < len(counts):
            raise TargetError("one tensor has two parts, so that an entry is in two units; leave one of the parts out")
        sizes = (part.each * (part.tensor.numel() // part.tensor.shape[part.dim]) for part in self.parts)
        object.__setattr__(self, "count", counts[0])
        object.__setattr__(self, "size", sum(sizes))


def unit_norms(units: Units) -> Tensor:
    """``||W_u||_2``, over all parts of each unit: (units,), in float32 at least, differentiable.

    The gradient of a unit of zeros is zero. Squares are summed as they are: in float32 a norm below 1e-22 is 0, one above 1e19
    is infinite.

    Example: ``unit_norms(Units((Part(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 0),)))`` is ``[5, 0]``.
    """
    total = _squares(units)
    if not total.requires_grad:
        return total.sqrt_()
    alive = total > 0
    return torch.where(alive, torch.where(alive, total, 1.0).sqrt(), 0.0)


def unit_sizes(units: Units) -> Tensor:
    """Entries in each unit: int64 (units,). Example: 3 for each unit of ``Units((Part(torch.ones(2, 3), 0),))``."""
    return torch.full((units.count,), units.size, device=units.parts[0].tensor.device)


def default_weight(units: Units) -> float:
    """``w_u = sqrt(entries)``, so that units of all sizes are penalized alike (Yuan & Lin 2006, section 2).

    Example: 2.0 for ``Units((Part(torch.ones(5, 4), 0),))``.
    """
    return math.sqrt(units.size)


def unit_weights(units: Units, weights: Weights, what: str = "weights") -> float | Tensor:
    """w_u: one for all, or (units,) beside the units and in float32 at least.

    Raises `RecipeError` for another shape, or a value that is negative or not finite. Example: ``unit_weights(units, None)``.
    """
    if isinstance(weights, Tensor):
        if weights.shape != (units.count,) or not bool(((weights >= 0) & weights.isfinite()).all()):
            raise RecipeError(
                f"{what} of shape {tuple(weights.shape)} for {units.count} units: give one number for each, at least "
                "0 and finite"
            )
        return weights.to(units.parts[0].tensor.device, wide(weights.dtype))
    weight = default_weight(units) if weights is None else weights
    require_size(what, weight)
    return weight


def require_size(what: str, value: float) -> None:
    """Raise `RecipeError` for a number below 0 or not finite. Example: ``require_size("threshold", 0.1)``."""
    if not 0 <= value < math.inf:
        raise RecipeError(f"{what} {value}: give a number of at least 0, and finite")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float32 at least. Example: ``wide(torch.bfloat16)`` is ``torch.float32``."""
    return torch.promote_types(dtype, torch.float32)


def _squares(units: Units) -> Tensor:
    """Sums of squares (units,), a fresh tensor. Beside a training step each small operation counts, so there are few."""
    total: Tensor | None = None
    for part in units.parts:
        tensor, dims = part.slices(), part.others
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.to(torch.float32)
        if dims and part.dim:
            squares = (tensor * tensor).sum(dims)
        else:  # one pass, nothing allocated; along later dimensions vector_norm is six times slower
            norms = torch.linalg.vector_norm(tensor, dim=dims) if dims else tensor
            squares = norms * norms
        if part.start < 0 or part.each > 1:
            squares = part.fold(squares).sum(1)
        total = squares if total is None else total + squares
    assert total is not None
    return total
