"""Penalties as a term of the loss, for autograd: the subgradient way, to compare the proximal operators with.

How it fails: the gradient of a norm has the same size however small the unit is, so units oscillate around zero and never are
zero; whoever trains with these needs a threshold afterwards. The proximal operators give exact zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsetrain.errors import RecipeError, TargetError
from sparsetrain.penalties.norms import Part, Units, Weights, require_size, unit_norms, unit_weights, wide


def group_lasso(units: Units, weights: Weights = None) -> Tensor:
    """``sum_u w_u ||W_u||_2`` (Yuan & Lin 2006, eq. 2.1), a scalar. The gradient of a unit of zeros is zero.

    ``weights``: w_u, at least 0: (units,) or one for all; None: the square root of the number of entries in a unit.

    Raises `RecipeError` for weights of another shape, negative or not finite.
    Example: ``loss + 1e-3 * group_lasso(Units((Part(linear.weight, 0),)))``.
    """
    return (unit_norms(units) * unit_weights(units, weights)).sum()


def sparse_group_lasso(units: Units, entries: float, groups: float, weights: Weights = None) -> Tensor:
    """``entries * sum |w| + groups * sum_u w_u ||W_u||_2`` over what the units own (Simon et al. 2013), a scalar.

    ``entries``, ``groups``: strengths, at least 0; ``weights`` and what raises as for `group_lasso`.
    Example: ``loss + sparse_group_lasso(units, entries=1e-4, groups=9e-4)``.
    """
    require_size("strength of entries", entries)
    require_size("strength of groups", groups)
    total = groups * group_lasso(units, weights)
    for part in units.parts:
        tensor = part.slices()
        sizes = tensor.to(wide(tensor.dtype)).abs()
        sums = sizes.sum(part.others) if part.others else sizes  # one a slice
        total = total + entries * part.fold(sums).sum()
    return total


def ssl(weight: Tensor, filters: float, channels: float) -> Tensor:
    """``filters * sum_n ||W[n]|| + channels * sum_c ||W[:, c]||`` (Wen et al. 2016, arXiv 1608.03665), a scalar.

    ``weight``: (outputs, inputs, ...), of a convolution or a linear layer; the sum over layers is the caller's. Norms are not
    weighted by size, as in the paper.

    Raises `TargetError` for a weight with fewer than two dimensions, `RecipeError` for a strength that is negative or not
    finite. Example: ``ssl(conv.weight, 1e-4, 1e-4)``.
    """
    if weight.ndim < 2:
        raise TargetError(f"a tensor of shape {tuple(weight.shape)} has no filters and channels; give a layer's weight")
    require_size("strength of filters", filters)
    require_size("strength of channels", channels)
    rows, columns = (group_lasso(Units((Part(weight, dim),)), 1.0) for dim in (0, 1))
    return filters * rows + channels * columns


def group_hoyer_square(units: Units) -> Tensor:
    """``(sum_u ||W_u||)^2 / sum_u ||W_u||^2``, a scalar from 1 to the number of units (Yang et al. 2020, arXiv 1908.09979).

    About how many units count; it does not change when all weights are scaled, so that it drives small units to zero and leaves
    large ones alone. Of units that are all zero it is 0, with zero gradient. The sum over layers is the caller's.

    Example: 2.0 for ``Units((Part(torch.eye(2), 0),))``.
    """
    norms = unit_norms(units)
    largest = norms.detach().amax()
    norms = norms / torch.where(largest > 0, largest, 1.0)  # squares of squares would underflow
    total = norms.square().sum()
    return norms.sum().square() / torch.where(largest > 0, total, 1.0)


def growing_strengths(chosen: Tensor, step: int, delta: float, every: int, ceiling: float = 1.0) -> Tensor:
    """``min(ceiling, delta * floor(step / every))`` for the units that are to go (Wang et al. 2021, arXiv 2012.09243).

    Args:
        chosen: bool (units,); in the paper the units of lowest L1 norm in the trained network.
        step: optimizer steps since the growth began; the result depends on nothing else, so that a resumed run agrees.
        delta: growth at a time, above 0.
        every: steps between, at least 1.
        ceiling: where it stops.

    Returns float32 (units,), for `growing_l2`; 0 for units that are to stay.
    Raises `RecipeError` for a step below 0, ``every`` below 1, or values not above 0.

    Example: ``growing_strengths(torch.tensor([True, False]), step=25, delta=1e-4, every=10)`` is ``[2e-4, 0]``.
    """
    if step < 0 or every < 1 or not 0 < delta < math.inf or not 0 < ceiling < math.inf:
        raise RecipeError(
            f"growing_strengths step={step} delta={delta} every={every} ceiling={ceiling}: delta and ceiling are above 0, "
            "every is at least 1, step at least 0"
        )
    return chosen.to(torch.float32) * min(ceiling, delta * (step // every))


def growing_l2(units: Units, strengths: Tensor) -> Tensor:
    """``1/2 sum_u l_u ||W_u||_2^2``, a scalar; its gradient is ``l_u W_u`` (Wang et al. 2021, arXiv 2012.09243).

    ``strengths``: l_u (units,), at least 0, from `growing_strengths`; `RecipeError` for others.
    Example: ``loss + growing_l2(units, strengths)``.
    """
    return 0.5 * (unit_weights(units, strengths, "strengths") * unit_norms(units).square()).sum()
