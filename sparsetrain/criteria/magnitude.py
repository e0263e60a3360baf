"""Magnitude: small weights matter least (Han et al. 2015, arXiv 1506.02626, sec. 3).

Formula: ``score = |w|`` (``norm="l1"``) or ``w^2`` (``"l2"``). Needs no data. Works with every pattern; a block or slice scores
the mean of its weights' scores, so that the norm decides how whole units are ranked (filters by their L1 norm: Li et al. 2017,
arXiv 1608.08710, sec. 3.1). Single weights rank the same under both.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sparsetrain.criteria.base import Criterion, wide
from sparsetrain.errors import RecipeError, nearest


def magnitude(weight: Tensor, norm: Literal["l1", "l2"] = "l1") -> Tensor:
    """``|w|`` or, in float32 at least, ``w^2``; same shape.

    Example: ``magnitude(torch.tensor([-2., 1.]))`` is ``[2., 1.]``.
    """
    return weight.detach().abs() if norm == "l1" else wide(weight).square()


class Magnitude(Criterion):
    """The absolute value of the weight; the baseline that scheduled pruning is hard to beat with.

    Args:
        norm: ``"l1"`` ranks a block or slice by its mean ``|w|``, ``"l2"`` by its mean ``w^2``.

    Raises `RecipeError` for another norm. Example: ``prune(manager, 0.5, criterion=Magnitude(norm="l2"))``.
    """

    def __init__(self, norm: Literal["l1", "l2"] = "l1") -> None:
        if norm not in ("l1", "l2"):
            raise RecipeError(f"magnitude norm {norm!r} is unknown; use 'l1' or 'l2'.{nearest(str(norm), ['l1', 'l2'])}")
        self.norm = norm

    def score(self, weight: Tensor, *, name: str = "", step: int = 0) -> Tensor:
        """``|w|`` or ``w^2``."""
        return magnitude(weight, self.norm)
