"""LAMP: a global threshold on scores that are relative to what a tensor would keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from sparsetrain.allocation.base import Allocation, Reduce, Scores, Share
from sparsetrain.allocation.global_threshold import Global
from sparsetrain.errors import RecipeError
from sparsetrain.patterns import Pattern, Sparsity, Unstructured


def lamp_scores(scores: Tensor) -> Tensor:
    """``s_u^2 / sum of s_v^2 over all v with s_v >= s_u`` of one tensor, float64, same shape (Lee et al. 2021, eq. 4).

    Among equals the lower index counts as the smaller. Pruned entries (``-inf``) stay so; a tensor of zeros scores zero but for
    its last entry, which scores 1 as the best entry of every tensor does.
    Raises `RecipeError` for negative or infinite scores, whose squares do not rank them.

    Example: ``lamp_scores(torch.tensor([3.0, 1.0, 2.0]))`` is ``[9/9, 1/14, 4/13]``.
    """
    flat = scores.detach().flatten().double()
    ranked = torch.sort(flat, stable=True)
    alive = ranked.values > -math.inf
    values = torch.where(alive, ranked.values, 0.0)
    if bool((values < 0).any()) or bool(values.isinf().any()):
        raise RecipeError(
            "allocation 'lamp' squares scores, and some are negative or infinite: their squares would rank them wrongly; use "
            "criterion 'magnitude', or allocation 'global'"
        )
    # A ratio: the scale is free, and squares of tiny scores must not vanish.
    squares = (values / values.max().clamp_min(1e-300)).square() if len(values) else values
    lamp = squares / squares.flip(0).cumsum(0).flip(0).clamp_min(1e-300)
    lamp[-1:] = 1.0
    return torch.empty_like(flat).scatter_(0, ranked.indices, torch.where(alive, lamp, -math.inf)).view(scores.shape)


@dataclass(frozen=True)
class LAMP(Allocation):
    """One threshold over all tensors on scores relative to what a tensor keeps, ``s^2 / (sum of squares not smaller)``.

    Layer-adaptive pruning, Lee et al. 2021 (arXiv 2010.07611). ``s`` is the criterion's score, ``|w|`` with magnitude. A
    tensor's best weight scores 1, so that no layer dies and none needs a budget by hand. The counts are exact:
    ``floor(sparsity * total)``. Unstructured patterns only, over whole tensors. Needs 8 bytes a weight while it runs.

    Raises `RecipeError` for other patterns and for negative or infinite scores.

    Example: ``LAMP()(shares, 0.9)``.
    """

    def check(self, pattern: Pattern, name: str) -> None:
        """Raise `RecipeError` unless single weights of a whole tensor are compared."""
        if pattern != Unstructured():
            raise RecipeError(
                f"{name}: allocation 'lamp' ranks single weights of whole tensors, pattern {pattern} does not; use pattern "
                "'unstructured', or allocation 'erk' or 'global'"
            )

    def __call__(self, shares: Sequence[Share], sparsity: Sparsity, reduce: Reduce | None = None) -> dict[str, Fraction]:
        """The counts that the threshold gives; every rank gathers each tensor once and counts all of it."""
        for share in shares:
            self.check(share.pattern, share.name)
        known = [_known(lamp_scores(share.gathered().cpu())) for share in shares]
        relative = [replace(s, scores=v, gathered=v) for s, v in zip(shares, known, strict=True)]
        return Global()(relative, sparsity)


def _known(values: Tensor) -> Scores:
    return lambda: values
