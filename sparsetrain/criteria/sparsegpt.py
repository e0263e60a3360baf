"""SparseGPT: prune column by column, and let the columns not yet reached make up for what went.

Frantar and Alistarh 2023 (arXiv 2301.00774, sec. 3). For one layer, ``H = X X' + damp * mean(diag X X') * 1`` of its inputs
``X``, and ``R`` the upper Cholesky factor of the inverse, ``H^-1 = R' R``. Going through the columns ``j`` of the weight

    ``error_j = w_j / R_jj`` where ``w_j`` is pruned, else 0;    ``w_k <- w_k - error_j R_jk`` for all later columns ``k``,

which is the exact minimum of ``||W X - W' X||^2`` over the columns that are left, for every row at once. The mask is chosen on
weights already moved, by ``w_j^2 / R_jj^2``, one block of columns at a time; for N:M one group at a time. Columns whose input
is always 0 (dead) score 0 and move nothing; what the mask keeps of them stays as it is (the published code makes it 0 as well).

Counts are exact. What a tensor is to lose is spread over its column blocks in proportion to what is alive there, block ``b``
getting ``floor(n c_b) - floor(n c_(b-1))`` of ``n``, ``c_b`` being the share of the living up to its end; with
``unstructured:row`` so in each row. (The published code prunes, in every block, the weight at the threshold too: one more.)

When to use it: one-shot at 50 % and above and 2:4, where Wanda begins to lose. Works with ``unstructured`` (the published
choice), ``unstructured:row``, N:M, blocks and ``channels``; not with ``neurons``, whose rows have nothing left that could move.

Cost: a Cholesky factorization and ``out * in^2`` multiplications a layer. Memory: ``4 * in^2`` bytes a layer while it
calibrates. Layers that share one matrix ``memory["outer"]``, one after the other, factorize it once.

Knobs: ``refine`` steps of conjugate gradients move what is left on to the minimum for the mask that was found
(`sparsetrain.criteria.refine`): columns reached early could not make up for those that went later. A few steps do; 0 is as
published. A larger ``damp`` moves weights less. It is raised tenfold, up to 1, until the factorization succeeds; ``notes`` says
so by tensor, and a warning once.

How it fails: calibration data unlike what the model will see (the update fits it); fewer tokens than inputs, where ``damp``
alone says how far weights move.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsetrain.criteria.base import Known, Seen, wide
from sparsetrain.criteria.columns import Choice, choice_for, require_columns
from sparsetrain.criteria.inputs import InputCriterion
from sparsetrain.criteria.refine import refine
from sparsetrain.errors import DivergedError, RecipeError
from sparsetrain.patterns import NM, Pattern, Sparsity

#: Block rows of the symmetric matrix ``X X'`` of which only the upper part is computed.
_BLOCK_ROWS = 4
#: Up to this size a triangle is inverted by substitution, above it by halves.
_LEAF = 128


def add_outer(outer: Tensor, values: Tensor) -> None:
    """Add ``X X'`` of (groups, samples, columns) to the upper triangle of (groups, columns, columns), in place.

    Below the diagonal blocks nothing is written: five eighths of the multiplications. Example: `symmetric` fills the rest in.
    """
    columns = outer.shape[-1]
    height = -(-columns // _BLOCK_ROWS)
    for start in range(0, columns, height):
        rows = slice(start, min(start + height, columns))
        outer[:, rows, start:].baddbmm_(values[:, :, rows].mT, values[:, :, start:])


def symmetric(outer: Tensor) -> Tensor:
    """A new matrix with the upper triangle mirrored. Example: ``[[1, 2], [0, 3]]`` gives ``[[1, 2], [2, 3]]``."""
    return outer.triu().add_(outer.triu(1).mT)


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """Upper ``R`` with ``H^-1 = R' R``; None unless ``H`` (groups, n, n) is positive definite.

    Turned round, ``H = U U'`` with ``U`` upper takes one Cholesky factorization, and ``R = U^-1``: the inverse is never formed.
    Example: ``H = [[4]]`` gives ``[[0.5]]``.
    """
    lower, broken = torch.linalg.cholesky_ex(hessian.flip(-1, -2))
    if bool(broken.any()):
        return None
    _invert_lower(lower)
    factor = lower.flip(-1, -2)
    return factor if _all_finite(factor) else None


def _invert_lower(lower: Tensor) -> None:
    """In place, by halves: ``[[A, 0], [B, C]]`` becomes ``[[A^-1, 0], [-C^-1 B A^-1, C^-1]]``."""
    size = lower.shape[-1]
    if size <= _LEAF:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False))
        return
    half = size // 2
    first, below, second = lower[..., :half, :half], lower[..., half:, :half], lower[..., half:, half:]
    _invert_lower(first)
    _invert_lower(second)
    below.copy_(second @ (below @ first).neg_())


def _all_finite(values: Tensor) -> bool:
    """By their sum, which costs one read and no memory, and one by one only where that is not."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def sweep(weights: Tensor, factor: Tensor, choice: Choice) -> Tensor:
    """Go through the columns: prune as ``choice`` says and move what is left, in place; returns what was pruned (bool).

    Shapes: ``weights`` (groups, columns, rows), columns first so that each lies in one piece; ``factor`` (groups, columns,
    columns). Updates are lazy at two levels: those of a panel of columns reach the rest of its block at once, and those of a
    block the rest of the tensor (sec. 3.2).
    """
    columns = weights.shape[1]
    pruned = torch.zeros(weights.shape, dtype=torch.bool, device=weights.device)
    for start in range(0, columns, choice.block):
        stop = min(start + choice.block, columns)
        block, gone, corner = weights[:, start:stop], pruned[:, start:stop], factor[:, start:stop, start:stop]
        pivots = corner.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        errors = torch.zeros_like(block, memory_format=torch.contiguous_format)
        # Row j: what the errors of all columns do to column j; not yet known ones are 0 and do nothing.
        pushes = corner.triu(1).mT.contiguous()
        if not choice.by_panel:
            gone.copy_(_choose(choice, start, stop, block, pivots))
        for a in range(0, stop - start, choice.panel):
            b = min(a + choice.panel, stop - start)
            if a:
                block[:, a:b].baddbmm_(pushes[:, a:b, :a], errors[:, :a], alpha=-1)
            if choice.by_panel:
                gone[:, a:b].copy_(_choose(choice, start + a, start + b, block[:, a:b], pivots[:, a:b]))
            known = errors[:, a:b]
            parts = (block[:, a:b], pushes[:, a:b, a:b], gone[:, a:b] / pivots[:, a:b], known)
            for column, push, share, error in zip(*(torch.split(part, 1, dim=1) for part in parts), strict=True):
                torch.mul(column.baddbmm_(push, known, alpha=-1), share, out=error)
        block.mul_(~gone)
        if stop < columns:
            weights[:, stop:].baddbmm_(factor[:, start:stop, stop:].mT, errors, alpha=-1)
    return pruned


def _choose(choice: Choice, start: int, stop: int, block: Tensor, pivots: Tensor) -> Tensor:
    """What goes of some columns; the choice sees scores as the pattern does, ``(out, columns)``."""
    groups, columns, rows = block.shape
    scores = (block / pivots).square_().mT.reshape(groups * rows, columns)
    return choice.select(start, stop, scores).view(groups, rows, columns).mT


@dataclass(frozen=True)
class _Factorized:
    """``R`` of one matrix (groups, n, n), infinite on the diagonal where a column is dead, and what that took."""

    outer: Tensor
    ordered: bool
    factor: Tensor
    hessian: Tensor | None
    note: str


def _order(pattern: Pattern, shape: tuple[int, ...]) -> Tensor | slice:
    """In what order the columns of ``(out, in * kernel)`` are visited: N:M groups inputs at one position of the kernel."""
    if not isinstance(pattern, NM) or math.prod(shape[2:]) == 1:
        return slice(None)
    return torch.arange(math.prod(shape[1:])).view(shape[1], -1).mT.flatten()


class SparseGPT(InputCriterion):
    """Optimal Brain Surgeon column by column, with its update of what is left.

    Args:
        batches: how many batches are looked at, at least 1; together more tokens than the widest layer has inputs.
        damp: what is added to the diagonal of ``X X'``, as a share of its mean, in (0, 1].
        block: columns a mask is chosen for at a time, at least 1 (whole groups and whole units of the pattern: a little
            less, or more).
        refine: steps of conjugate gradients on the mask at the end, 0 or more.

    ``notes``: tensor -> what had to be done to factorize its matrix. Raises `RecipeError` for what is out of range, and, when
    bound to a model, for patterns that leave nothing to move.

    Example: ``PruneFinetune(0.5, criterion=SparseGPT(batches=32), schedule=OneShot("10%"))``.
    """

    def __init__(self, batches: int = 16, damp: float = 0.01, block: int = 128, refine: int = 0) -> None:
        super().__init__(batches)
        if not 0 < damp <= 1:
            raise RecipeError(f"SparseGPT damp={damp}: a share of the mean diagonal in (0, 1], such as 0.01")
        if block < 1:
            raise RecipeError(f"SparseGPT block={block}: a block has at least 1 column")
        if refine < 0:
            raise RecipeError(f"SparseGPT refine={refine}: a number of steps, 0 or more")
        self.damp = damp
        self.block = block
        self.refine = refine
        self.notes: dict[str, str] = {}
        self._last: _Factorized | None = None

    def prepare(self, model: nn.Module, tensors: Sequence[Known]) -> None:
        """Refuse layers that are no matrices of their inputs, and patterns that leave nothing to move."""
        super().prepare(model, tensors)
        for tensor in tensors:
            require_columns(tensor.pattern, tensor.name)

    def observe(self, seen: Seen) -> None:
        """Add ``X X'``."""
        super().observe(seen)
        self._last = None
        for piece in self.pieces(seen):
            groups, _, columns = piece.shape
            memory = self.memory.setdefault(seen.tensor.name, {})
            if "outer" not in memory:
                memory["outer"] = piece.new_zeros(groups, columns, columns)
            add_outer(memory["outer"], piece)

    def reset(self) -> None:
        """Forget everything but the notes."""
        super().reset()
        self._last = None

    def rate(self, matrix: Tensor, name: str) -> Tensor:
        """``|w_ij| / sqrt([H^-1]_jj)``, the root of what removing the weight alone costs: `Wanda` if inputs do not correlate.

        Allocations go by it; masks are chosen by `solve`.
        """
        found = self._factorized(name, slice(None), matrix)
        cost: Tensor = matrix.abs() / torch.linalg.vector_norm(found.factor, dim=1, keepdim=True)
        return cost

    def solve(
        self, weight: Tensor, pattern: Pattern, sparsity: Sparsity, *, name: str, alive: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Mask and moved weights, both of the weight's shape; None where nothing goes or something has to come back.

        Raises `DivergedError` for weights or inputs that are not finite, `DataError` for inputs that were all 0,
        `RecipeError` for a pattern without columns and a matrix that cannot be factorized.
        """
        require_columns(pattern, name)
        shape = tuple(weight.shape)
        order = _order(pattern, shape)
        living = None if alive is None else alive.flatten(1)[:, order]
        choice = choice_for(pattern, shape, sparsity, living, self.block)
        if choice is None:
            return None
        seen = wide(weight).flatten(1)[:, order]
        self._require_finite(seen, name, "Its weights were not finite before: find what diverged")
        found = self._factorized(name, order, seen)
        dense = self.matrix(seen, name).mT
        moved = dense.clone(memory_format=torch.contiguous_format)
        gone = sweep(moved, found.factor, choice)
        if found.hessian is not None:
            moved = refine(moved, dense, ~gone, found.hessian, self.refine)
        back = order.argsort() if isinstance(order, Tensor) else order
        mask, values = (part.mT.reshape(seen.shape)[:, back].view(shape) for part in (~gone, moved))
        values = values.to(weight.dtype)
        self._require_finite(values, name, f"Raise damp, which is {self.damp:g}")
        return mask, values

    def _require_finite(self, values: Tensor, name: str, way: str) -> None:
        if not _all_finite(values):
            raise DivergedError(f"SparseGPT: {name} has weights that are not finite. {way}; nothing was pruned in it")

    def _factorized(self, name: str, order: Tensor | slice, like: Tensor) -> _Factorized:
        """The factor of a tensor's matrix, on the device and in the dtype of ``like``; damped as much as it takes."""
        outer, ordered, last = self.remembered(name)["outer"], isinstance(order, Tensor), self._last
        if last is None or last.outer is not outer or last.ordered != ordered or last.factor.dtype != like.dtype:
            last = self._factorize(name, outer, order, like)
        self._last = last
        if last.note:
            if not self.notes:
                warnings.warn(f"SparseGPT: {name}: {last.note}; others are told in notes", stacklevel=2)
            self.notes[name] = last.note
        else:
            self.notes.pop(name, None)
        return last

    def _factorize(self, name: str, outer: Tensor, order: Tensor | slice, like: Tensor) -> _Factorized:
        self.require_usable(name, outer.diagonal(dim1=1, dim2=2))
        hessian = symmetric(outer)[:, order][:, :, order].to(like)
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        mean, dead = diagonal.mean(1, keepdim=True), diagonal == 0
        diagonal.copy_(torch.where(dead, diagonal.mean(), diagonal))
        added, damp = 0.0, self.damp
        while True:
            diagonal.add_(mean, alpha=damp - added)
            factor = inverse_factor(hessian)
            if factor is not None:
                break
            if damp >= 1:
                raise RecipeError(
                    f"SparseGPT: the matrix of the inputs of {name} is not positive definite even with damp=1; are they finite "
                    "and of a sane size? Give it more data (batches), or use criterion 'wanda'. Nothing was pruned in it"
                )
            added, damp = damp, min(1.0, 10 * damp)
        note = "" if damp == self.damp else f"damp {self.damp:g} raised to {damp:g}: not positive definite before"
        factor.diagonal(dim1=1, dim2=2).masked_fill_(dead, torch.inf)
        return _Factorized(outer, isinstance(order, Tensor), factor, hessian if self.refine else None, note)
