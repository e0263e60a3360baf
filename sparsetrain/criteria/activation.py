"""Criteria of activations: a neuron that is seldom or weakly active goes first.

* `ActivationMean`: ``mean of |a|`` over samples and positions, ``a = activation(output of the layer)`` (Molchanov et al.
  2017, arXiv 1611.06440, sec. 2.2, "mean activation").
* `APoZ` (Hu et al. 2016, arXiv 1607.03250, eq. 1): the average percentage of zeros of ``relu(output)``; ``score = 1 - APoZ``.

All weights of a neuron (a row of the weight, a filter of a convolution) get the neuron's score. So the pattern is usually
``neurons``; ``unstructured`` and blocks rank rows too. Patterns that compare the weights of one row (``unstructured:row``,
``2:4``, ``channels``) would find only ties, and are refused.

How they fail: what lies between the layer and its activation (a norm) is not seen; ``activation="identity"`` then says at
least what the layer does. Layers whose outputs are not the rows of one weight (embeddings, recurrent layers, attention's
packed projection, bilinear layers) are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.criteria.base import Known, Seen, StatisticsCriterion, wide
from sparsetrain.errors import RecipeError, nearest
from sparsetrain.patterns import Slices

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "identity": lambda output: output}
#: Layers whose outputs are the rows of their weight, by name as `Targets` knows them.
_LAYERS = frozenset({"Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D"})


def activation_mean(total: Tensor, count: Tensor) -> Tensor:
    """``mean |a|`` of each neuron. Example: ``activation_mean(torch.tensor([6.]), torch.tensor(4.))`` is 1.5."""
    return total / count


def apoz(zeros: Tensor, count: Tensor) -> Tensor:
    """``1 - APoZ`` of each neuron. Example: ``apoz(torch.tensor([3.]), torch.tensor(4.))`` is 0.25."""
    return 1 - zeros / count


class _OfNeurons(StatisticsCriterion):
    """What is measured of each neuron's output, and spread over its weights."""

    needs: ClassVar[Literal["gradient", "output", "input"]] = "output"

    def prepare(self, model: nn.Module, tensors: Sequence[Known]) -> None:
        """Refuse layers whose outputs are not the weight's rows, and patterns that compare within a row."""
        super().prepare(model, tensors)
        kind = type(self).__name__
        for tensor in tensors:
            layer = type(tensor.module).__name__
            if not any(base.__name__ in _LAYERS for base in type(tensor.module).__mro__):
                raise RecipeError(
                    f"{tensor.name}: criterion {kind} scores rows of a weight by the outputs of its layer, and those of "
                    f"{layer} are other things; leave it out (targets.exclude), or use criterion 'taylor'"
                )
            if tensor.pattern.row_local or tensor.pattern == Slices(1):
                raise RecipeError(
                    f"{tensor.name}: criterion {kind} gives all weights of a row one score, and pattern {tensor.pattern} "
                    "compares weights of one row: it would find only ties; use pattern 'neurons', or criterion 'taylor'"
                )

    def _rows(self, seen: Seen, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over samples and positions, in a shape that broadcasts with the stored weight, and how many they are."""
        # Linear: (..., out); convolutions: (..., out, *positions), as many positions as the kernel has dimensions.
        rows = values.movedim(-(seen.weight.ndim - 1), 0).flatten(1)
        shape = [-1] + [1] * (seen.weight.ndim - 1)
        return seen.tensor.view(rows.sum(1).view(shape)), torch.tensor(float(rows.shape[1]), device=rows.device)


class ActivationMean(_OfNeurons):
    """The mean absolute activation of each neuron.

    Args:
        batches: how many batches are looked at, at least 1.
        activation: what follows the layer: ``"relu"``, ``"gelu"`` or ``"identity"``.

    Raises `RecipeError` for another one. Example: ``PruneFinetune(0.5, pattern="neurons", criterion="activation")``.
    """

    def __init__(self, batches: int = 16, activation: Literal["relu", "gelu", "identity"] = "relu") -> None:
        super().__init__(batches)
        if activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise RecipeError(f"activation {activation!r} is unknown; use one of {known}.{nearest(activation, _ACTIVATIONS)}")
        self.activation = activation

    def observe(self, seen: Seen) -> None:
        """Add ``|a|``."""
        if seen.output is not None:
            total, count = self._rows(seen, _ACTIVATIONS[self.activation](wide(seen.output)).abs())
            self.add(seen.tensor.name, total=total, count=count)

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        """``mean |a|``, of the neuron of each weight."""
        return activation_mean(**self.remembered(name)).expand_as(weight).clone()


class APoZ(_OfNeurons):
    """How often each neuron is active after a ReLU. Example: ``PruneFinetune(0.5, pattern="neurons", criterion="apoz")``."""

    def observe(self, seen: Seen) -> None:
        """Count the zeros."""
        if seen.output is not None:
            zeros, count = self._rows(seen, (seen.output <= 0).float())
            self.add(seen.tensor.name, zeros=zeros, count=count)

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        """``1 - APoZ``, of the neuron of each weight."""
        return apoz(**self.remembered(name)).expand_as(weight).clone()
