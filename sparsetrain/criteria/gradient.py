"""Criteria of gradients: what the loss says about a weight, to first order (and, for Fisher, to second).

* `Gradient`: ``|mean g|``, where the loss still pulls at a weight.
* `SNIP` (Lee et al. 2019, arXiv 1810.02340, sec. 4.1): ``|dL/dc| = |w g|`` at ``c = 1``, a mask ``c`` that multiplies the
  weights. The product is summed with its sign over the batches. (The paper divides by the sum over all weights: the ranking
  is the same.)
* `Taylor` (Molchanov et al. 2019, arXiv 1906.10771, eq. 8): ``mean over batches of (w g)^2``, the squared change of the loss
  if the weight goes; for a unit ``(sum over the unit of w g)^2`` (eq. 9).
* `Fisher` (Optimal Brain Damage, LeCun et al. 1990, with the diagonal of the empirical Fisher matrix as curvature): ``1/2 w^2
  mean over samples of g^2``.

``g`` is the gradient of the mean loss of a batch; `Fisher` takes every sample by itself, and as many backward passes.

When to use them: at initialization and early in training (`SNIP`), for units (`Taylor`), where weights differ in scale and
magnitudes cannot be compared (`Fisher`). How they fail: with too few batches the scores are noise; at a minimum of the
training loss mean gradients vanish, and `Gradient` and `SNIP` with them. The model is in eval mode while it is measured: at
initialization batch norms, which know no statistics yet, pass values on as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sparsetrain.criteria.base import Known, Seen, StatisticsCriterion, wide
from sparsetrain.errors import RecipeError, nearest
from sparsetrain.patterns import UnitPattern


def gradient(total: Tensor, count: Tensor) -> Tensor:
    """``|mean g|`` from the sum of gradients and their number.

    Example: ``gradient(torch.tensor([-6.]), torch.tensor(2.))`` is 3.
    """
    return (total / count).abs()


def snip(total: Tensor) -> Tensor:
    """``|sum of w g|`` from that signed sum. Example: ``snip(torch.tensor([-6.]))`` is 6."""
    return total.abs()


def taylor(squares: Tensor, count: Tensor) -> Tensor:
    """``mean of (w g)^2`` from the sum of squares. Example: ``taylor(torch.tensor([8.]), torch.tensor(2.))`` is 4."""
    return squares / count


def fisher(weight: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """``1/2 w^2 mean g^2`` from the sum of squared gradients of single samples; same shape as the weight.

    Example: ``fisher(torch.tensor([2.]), torch.tensor([6.]), torch.tensor(4.))`` is 3.
    """
    return 0.5 * wide(weight).square() * squares / count


def unit_sums(values: Tensor, pattern: UnitPattern) -> Tensor:
    """The sum over the unit each entry belongs to; same shape ``(out, in, *kernel)``.

    Example: ``unit_sums(torch.tensor([[1., 2.], [3., 4.]]), Slices(0))`` is ``[[3., 3.], [7., 7.]]``.
    """
    shape = tuple(values.shape)
    units = pattern.unit_scores(values)
    index = pattern.expand(torch.arange(units.numel(), device=values.device).view(units.shape), shape)
    return values.new_zeros(units.numel()).index_add_(0, index.flatten(), values.flatten())[index]


class Gradient(StatisticsCriterion):
    """The absolute mean gradient. Example: ``PruneFinetune(0.9, criterion="gradient")``."""

    def observe(self, seen: Seen) -> None:
        """Add the gradient."""
        if seen.gradient is not None:
            self.add(seen.tensor.name, total=wide(seen.gradient), count=_one(seen))

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        """``|mean g|``."""
        return gradient(**self.remembered(name))


class SNIP(StatisticsCriterion):
    """Connection sensitivity; meant to be asked once, at initialization. The paper takes one large batch.

    Example: ``PruneFinetune(0.9, criterion=SNIP(batches=1), allocation="global", schedule=OneShot("0st"))``.
    """

    def observe(self, seen: Seen) -> None:
        """Add ``w g``, with its sign."""
        if seen.gradient is not None:
            self.add(seen.tensor.name, total=wide(seen.weight) * wide(seen.gradient))

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        """``|sum of w g|``."""
        return snip(**self.remembered(name))


class Taylor(StatisticsCriterion):
    """First-order Taylor expansion of the squared change of the loss.

    Args:
        batches: how many batches are looked at, at least 1.
        form: ``"weight"``: every weight by itself; a unit scores the mean of its weights. ``"group"``: every unit (block,
            neuron, channel) as a whole, so that contributions of opposite sign cancel.

    Raises `RecipeError` for another form, and for ``"group"`` with a pattern that has no units.

    Example: ``PruneFinetune(0.5, pattern="neurons", criterion=Taylor(form="group"))``.
    """

    def __init__(self, batches: int = 16, form: Literal["weight", "group"] = "weight") -> None:
        super().__init__(batches)
        if form not in ("weight", "group"):
            raise RecipeError(
                f"Taylor form {form!r} is unknown; use 'weight' or 'group'.{nearest(str(form), ['weight', 'group'])}"
            )
        self.form = form

    def prepare(self, model: nn.Module, tensors: Sequence[Known]) -> None:
        """Refuse ``"group"`` where there are no units."""
        super().prepare(model, tensors)
        for tensor in tensors if self.form == "group" else ():
            if not isinstance(tensor.pattern, UnitPattern):
                raise RecipeError(
                    f"{tensor.name}: Taylor(form='group') scores whole units, and pattern {tensor.pattern} has none; use "
                    "form='weight', or a pattern of units ('neurons', 'channels', 'block:4x4')"
                )

    def observe(self, seen: Seen) -> None:
        """Add ``(w g)^2``, of the weight or of its unit."""
        if seen.gradient is None:
            return
        change = wide(seen.weight) * wide(seen.gradient)
        if self.form == "group" and isinstance(seen.tensor.pattern, UnitPattern):
            change = seen.tensor.view(unit_sums(seen.tensor.view(change), seen.tensor.pattern))
        self.add(seen.tensor.name, squares=change.square(), count=_one(seen))

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        """``mean of (w g)^2``."""
        return taylor(**self.remembered(name))


class Fisher(StatisticsCriterion):
    """The diagonal of the empirical Fisher matrix, from gradients of single samples.

    The expected rise of the loss when the weight goes, near a minimum, if weights did not influence each other (`OBS` knows
    that they do). Example: ``PruneFinetune(0.9, criterion=Fisher(batches=4))``.
    """

    per_sample = True

    def observe(self, seen: Seen) -> None:
        """Add ``g^2``."""
        if seen.gradient is not None:
            self.add(seen.tensor.name, squares=wide(seen.gradient).square(), count=_one(seen))

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        """``1/2 w^2 mean g^2``, of the weight as it is now."""
        return fisher(weight, **self.remembered(name))


def _one(seen: Seen) -> Tensor:
    return torch.ones((), device=seen.weight.device)
