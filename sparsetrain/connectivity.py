"""Linear mode connectivity: does the error rise on the straight line between two networks?

Two networks that training led into the same basin have no barrier between them. Frankle et al. 2020 (arXiv 1912.05671, sec. 2)
call a network stable to the noise of SGD when two copies of it, trained with other data orders, end with a barrier below 2 %
of error, and find that pruned networks match the accuracy of dense ones when they are stable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.errors import MaskStateError, RecipeError, nearest


@dataclass(frozen=True)
class Barrier:
    """The error at ``alphas`` along the line (1 is the first network), and the height of its barrier in the same unit."""

    alphas: tuple[float, ...]
    errors: tuple[float, ...]
    barrier: float


def interpolate(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """``alpha a + (1 - alpha) b`` of two state dicts, each tensor in its own type; the ends are the given ones bit for bit.

    Floating-point buffers (the running statistics of BatchNorm) are interpolated like weights; integers and booleans are
    taken from the nearer end (in the middle from ``a``). Where a weight is pruned in one network only, it is half-way gone in
    the middle.

    Raises `MaskStateError` for state dicts of two models, `RecipeError` for ``alpha`` outside [0, 1].
    Example: ``interpolate({"w": torch.ones(1)}, {"w": torch.zeros(1)}, 0.25)["w"]`` is 0.25.
    """
    if not 0 <= alpha <= 1:
        raise RecipeError(f"alpha {alpha} is outside [0, 1]: 1 is the first network, 0 the second")
    for name in [*a, *b]:
        if name not in a or name not in b or a[name].shape != b[name].shape:
            shapes = [tuple(side[name].shape) if name in side else None for side in (a, b)]
            other = nearest(name, (b if name in a else a).keys() - {name})
            raise MaskStateError(
                f"these are networks of two models: {name} has shape {shapes[0]} in the first, {shapes[1]} in the other."
                + other
            )
    nearer = a if alpha >= 0.5 else b
    ends = {1.0: a, 0.0: b}
    if alpha in ends:
        return {name: value.detach().clone() for name, value in ends[alpha].items()}
    mixed = {}
    for name, value in nearer.items():
        if value.is_floating_point() or value.is_complex():
            mixed[name] = torch.lerp(b[name].detach(), a[name].detach().to(b[name]), alpha).to(value)
        else:
            mixed[name] = value.detach().clone()
    return mixed


def barrier(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], evaluate: Callable[[dict[str, Tensor]], float], points: int = 11
) -> Barrier:
    """The error barrier: ``max_alpha E(alpha a + (1 - alpha) b) - (E(a) + E(b)) / 2`` (arXiv 1912.05671, sec. 2).

    Args:
        a: state dict of the first network.
        b: state dict of the second one, of the same names and shapes.
        evaluate: error (or loss) of a state dict, lower is better.
        points: how many alphas, equally spaced from 0 to 1, at least 3; the paper takes 30.

    The ends count in the maximum, so that the barrier is at least half the difference between them and 0 where the line lies
    below both. Raises `RecipeError` for fewer points or an error that is no number.
    Example: ``barrier(one.state_dict(), other.state_dict(), lambda state: test_error(model, state)).barrier``.
    """
    if points < 3:
        raise RecipeError(f"points={points}: a barrier lies between the ends, so it takes 3 points at least")
    alphas = tuple(i / (points - 1) for i in range(points))
    errors = tuple(float(evaluate(interpolate(a, b, alpha))) for alpha in alphas)
    bad = [alpha for alpha, error in zip(alphas, errors, strict=True) if not math.isfinite(error)]
    if bad:
        raise RecipeError(f"the error at alpha {bad[0]:g} is no number; evaluate what is always finite, such as 1 - accuracy")
    return Barrier(alphas, errors, max(errors) - (errors[0] + errors[-1]) / 2)
