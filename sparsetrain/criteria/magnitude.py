"""Magnitude: small weights matter least (Han et al. 2015, arXiv 1506.02626, sec. 3).

Formula: ``score = |w|``. Needs no data. Works with every pattern; a block or slice scores the mean of its weights' scores.
"""

from __future__ import annotations

from torch import Tensor

from sparsetrain.criteria.base import Criterion


def magnitude(weight: Tensor) -> Tensor:
    """``|w|``, same shape. Example: ``magnitude(torch.tensor([-2., 1.]))`` is ``[2., 1.]``."""
    return weight.detach().abs()


class Magnitude(Criterion):
    """The absolute value of the weight; the baseline that scheduled pruning is hard to beat with."""

    def score(self, weight: Tensor, *, name: str = "", step: int = 0) -> Tensor:
        """``|w|``."""
        return magnitude(weight)
