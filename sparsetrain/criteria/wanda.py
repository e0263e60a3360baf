"""Wanda and RIA: a weight matters as much as what it multiplies.

* `Wanda` (Sun et al. 2023, arXiv 2306.11695, eq. 1): ``score_ij = |W_ij| * ||X_j||_2``, ``X_j`` being feature ``j`` of the
  layer's input over all samples and positions.
* `RIA` (Zhang et al. 2024, "Plug-and-Play", ICLR, eq. 3): ``score_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) *
  ||X_j||_2 ^ power``: a weight counts relative to its column and its row, so that no input and no output is cut off.

When to use them: one-shot pruning of a trained model, at the price of a few forward passes; no gradient is needed and no other
weight moves. The score does not say which weights are compared. Wanda's authors compare within each output row: that is
pattern ``unstructured:row``; ``2:4``, ``4:8``, blocks and slices work as well. RIA's authors compare over the whole layer,
pattern ``unstructured``.

Memory: 4 bytes an input feature of each layer.

How they fail: inputs without outlier features, where Wanda is magnitude; data for calibration that is unlike what the model
will see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.criteria.base import Seen
from sparsetrain.criteria.inputs import InputCriterion
from sparsetrain.errors import RecipeError


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """``|W_ij| * ||X_j||``; shapes ``(..., out, in)`` and ``(..., in)``.

    Example: ``wanda(torch.tensor([[-2.0, 1.0]]), torch.tensor([1.0, 3.0]))`` is ``[[2, 3]]``.
    """
    return weight.abs() * norms.unsqueeze(-2)


def ria(weight: Tensor, norms: Tensor, power: float = 0.5) -> Tensor:
    """``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j|| ^ power``; shapes as in `wanda`.

    In a row or column of zeros the share is 0. Example: ``ria(torch.tensor([[1.0, 3.0]]), torch.tensor([4.0, 1.0]))`` is
    ``[[(1 + 1/4) * 2, (1 + 3/4) * 1]]``.
    """
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    shares = size / size.sum(-2, keepdim=True).clamp_min(tiny) + size / size.sum(-1, keepdim=True).clamp_min(tiny)
    return shares * norms.pow(power).unsqueeze(-2)


class Wanda(InputCriterion):
    """The weight times the norm of its input.

    Args:
        batches: how many batches are looked at, at least 1.

    Example: ``PruneFinetune(0.5, pattern="unstructured:row", criterion="wanda", schedule=OneShot("10%"))``.
    """

    def observe(self, seen: Seen) -> None:
        """Add ``||X_j||^2``."""
        super().observe(seen)
        for piece in self.pieces(seen):
            self.add(seen.tensor.name, squares=piece.square().sum(1))

    def rate(self, matrix: Tensor, name: str) -> Tensor:
        """``|W_ij| * ||X_j||``."""
        return wanda(matrix, self.norms(name).to(matrix))

    def norms(self, name: str) -> Tensor:
        """``||X_j||`` by group and feature; raises `DataError` if all are 0, `DivergedError` if one is not finite."""
        squares = self.remembered(name)["squares"]
        self.require_usable(name, squares)
        return squares.sqrt()


class RIA(Wanda):
    """The weight relative to its row and its column, times a power of the norm of its input.

    Args:
        batches: how many batches are looked at, at least 1.
        power: of the norm, 0 or more; 0.5 is the authors', 0 looks at weights alone.

    Raises `RecipeError` for a power out of range. Example: ``PruneFinetune(pattern="2:4", criterion="ria")``.
    """

    elementwise = False

    def __init__(self, batches: int = 16, power: float = 0.5) -> None:
        super().__init__(batches)
        if not 0 <= power < float("inf"):
            raise RecipeError(f"RIA power={power}: give a number of 0 or more: 0.5 is the authors', 0 looks at weights alone")
        self.power = power

    def rate(self, matrix: Tensor, name: str) -> Tensor:
        """``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j|| ^ power``."""
        return ria(matrix, self.norms(name).to(matrix), self.power)
