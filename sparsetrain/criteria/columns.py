"""What goes of a few columns at a time, so that the whole tensor ends with exactly the counts of its pattern.

`SparseGPT` chooses its mask block by block of columns, on weights that earlier blocks have moved, and so cannot rank the whole
tensor. What a tensor is to lose is spread over the blocks beforehand, in proportion to what is alive in them: of ``n`` units,
``floor(n c_b) - floor(n c_(b-1))`` go in block ``b``, where ``c_b`` is the share of the living units up to its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsetrain.errors import RecipeError
from sparsetrain.patterns import NM, Block, Pattern, Slices, Sparsity, Unstructured, exact
from sparsetrain.selection import prune_lowest

Select = Callable[[int, int, Tensor], Tensor]
#: Columns whose mutual updates are made one by one; those of longer runs are made together.
_PANEL = 16


@dataclass(frozen=True)
class Choice:
    """``select(start, stop, scores)`` says what goes of the columns from ``start`` to ``stop`` (True = goes).

    ``scores`` and the result have the shape ``(out, stop - start)``. It is asked once a ``block`` of columns, or, with
    ``by_panel``, once a ``panel`` of those of which a block is made.
    """

    block: int
    panel: int
    by_panel: bool
    select: Select


def require_columns(pattern: Pattern, name: str) -> None:
    """Raise `RecipeError` unless a pattern can be chosen by columns and leaves something in each row that can move."""
    if isinstance(pattern, Unstructured | NM | Block) or pattern == Slices(1):
        return
    raise RecipeError(
        f"{name}: SparseGPT moves the weights that are left in a row to make up for those that go, and pattern {pattern} "
        "leaves none (or is not chosen column by column); use 'channels', blocks, N:M or 'unstructured', or criterion 'wanda'"
    )


def choice_for(pattern: Pattern, shape: tuple[int, ...], sparsity: Sparsity, alive: Tensor | None, block: int) -> Choice | None:
    """How to choose a mask of this pattern and sparsity for a weight ``(out, in, *kernel)``; None if nothing is to go.

    ``alive``: its present mask as a matrix, ``(out, in * kernel)``, columns in the order they are visited. None is also the
    answer where more is pruned than asked for, so that something has to come back.

    Example: ``choice_for(NM(2, 4), (8, 32), 0.5, None, 128)`` chooses 4 columns at a time.
    """
    if not exact(sparsity):
        return None
    if isinstance(pattern, NM):
        pattern.validate(shape, sparsity)
        width = pattern.group
        select: Select | None = _by_groups(pattern, alive)
        return None if select is None else Choice(max(1, block // width) * width, width, True, select)
    width = 1
    if pattern == Unstructured("row"):
        select = _by_rows(math.floor(exact(sparsity) * math.prod(shape[1:])), shape, alive)
    else:
        unit = pattern if isinstance(pattern, Block) else _channel(shape) if isinstance(pattern, Slices) else None
        width = 1 if unit is None else unit.cols
        select = _by_units(unit, pattern.pruned(shape, sparsity), shape, alive)
    return None if select is None else Choice(max(1, block // width) * width, _PANEL, False, select)


def _channel(shape: tuple[int, ...]) -> Block | None:
    """An input channel as a block of the matrix: all outputs, all kernel positions."""
    rows, columns = shape[0], math.prod(shape[2:])
    return Block(rows, columns) if rows * columns > 1 else None


def _by_groups(pattern: NM, alive: Tensor | None) -> Select:
    def select(start: int, stop: int, scores: Tensor) -> Tensor:
        order = _dead_first(scores, alive, start, stop).argsort(dim=1, stable=True)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, : pattern.group - pattern.keep], True)

    return select


def _by_rows(each: int, shape: tuple[int, ...], alive: Tensor | None) -> Select | None:
    """Exactly ``each`` of every row."""
    rows, columns = shape[0], math.prod(shape[1:])
    living = torch.ones(1, columns, dtype=torch.bool) if alive is None else alive
    upto = torch.cat([living.new_zeros(len(living), 1, dtype=torch.int64), living.cumsum(1)], dim=1)
    whole = upto[:, -1:]
    new = each - (columns - whole)
    if bool((new < 0).any()):
        return None
    goal = new * upto // whole.clamp_min(1) + (torch.arange(columns + 1, device=upto.device) - upto)

    def select(start: int, stop: int, scores: Tensor) -> Tensor:
        order = _dead_first(scores, alive, start, stop).argsort(dim=1, stable=True)
        place = torch.empty_like(order).scatter_(1, order, torch.arange(stop - start, device=order.device).expand_as(order))
        return place < (goal[:, stop] - goal[:, start]).to(place.device).unsqueeze(1).expand(rows, 1)

    return select


def _by_units(unit: Block | None, count: int, shape: tuple[int, ...], alive: Tensor | None) -> Select | None:
    """Exactly ``count`` units of the whole tensor: single weights (no ``unit``), or blocks of the matrix."""
    columns = math.prod(shape[1:])
    width = 1 if unit is None else unit.cols
    living = torch.ones(shape[0], columns, dtype=torch.bool) if alive is None else alive
    grid = living if unit is None else unit.unit_scores(living.float()) > 0
    upto: list[int] = [0, *grid.sum(0).cumsum(0).tolist()]
    new = count - (grid.numel() - upto[-1])
    if new < 0:
        return None

    def goal(column: int) -> int:
        """How many are gone before this column: those that are dead already, and their share of the new ones."""
        at = -(-column // width)
        return at * len(grid) - upto[at] + new * upto[at] // upto[-1]

    def select(start: int, stop: int, scores: Tensor) -> Tensor:
        values = _dead_first(scores, alive, start, stop)
        gone = _lowest(values if unit is None else unit.unit_scores(values), goal(stop) - goal(start))
        return gone if unit is None else ~unit.expand(~gone, tuple(scores.shape))

    return select


def _lowest(values: Tensor, count: int) -> Tensor:
    """Exactly ``count`` entries, the lowest (True), of as few as a block of columns has."""
    if values.is_cpu and values.dtype == torch.float32 and 0 < count <= values.numel():
        flat = values.mT.reshape(-1)  # as they lie in memory
        found = values <= float(np.partition(flat.numpy(), count - 1)[count - 1])
        if int(torch.count_nonzero(found)) == count:  # else some are equal to the highest of them (or no numbers)
            return found
    return ~prune_lowest(values, count)


def _dead_first(scores: Tensor, alive: Tensor | None, start: int, stop: int) -> Tensor:
    return scores if alive is None else scores.masked_fill(~alive[:, start:stop], -math.inf)
