"""COPAL-style sensitivity: how much a layer's output answers to a weight, kept over domains.

Malla, Choi and Choi 2024 ("COPAL: Continual Pruning in Large Language Generative Models", ICML, arXiv 2405.02347) ask how
sensitive the output ``y = W x`` of a layer is to infinitesimal changes of its input and of its weights. For changes in
proportion, ``dx = e x`` and ``dW = e W``, the gradient of ``||dy||^2`` points where that of ``||y||^2`` does:

    ``d ||W x||^2 / dW = 2 y x'``      so      ``score = |W| * A``,   ``A`` a mean of ``y x'`` over tokens and domains.

``abs_order`` says when its absolute value is taken, which the paper's abstract does not:

* ``"token"`` (the default): ``A = mean_t |y_t| |x_t|'``. Nothing cancels; with row-wise comparison as good as Wanda.
* ``"sequence"``: ``A = mean over tokens of |sum in a sample of y x'|``.
* ``"domain"``: ``|mean_t y x'|`` of each domain, then the mean over domains.
* ``"final"``: ``|mean over everything of y x'| = |W H|``, ``H = mean x x'``: the literal reading. Kept as ``H``, so that it
  stays exact when weights change between domains.

The later the absolute value, the more features cancel each other, and the worse the masks: ``sum_j W_ij (W H)_ij`` is only the
energy ``mean y_i^2`` of a row's output. This is a reading of the published abstract and figures; the paper's tables were not
reproduced, and there is no code by its authors.

`OutputFisher` is the squared kin: ``|W| * sqrt(mean_t (y_t x_t')^2)``, the diagonal of the Fisher information of a Gaussian
output.

When to use them: with `ContinualPruning`, which keeps ``A`` from domain to domain. Alone they are one-shot criteria as Wanda
is, at the price of one more product a layer. Patterns: all. Memory: ``4 * out * in`` bytes a layer, ``4 * in^2`` for
``"final"``.

How they fail: ``"domain"`` and ``"final"`` where features are correlated (see above); a layer whose outputs are all 0, whose
weights are then ranked by magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from sparsetrain.criteria.base import Seen, wide
from sparsetrain.criteria.inputs import InputCriterion, features
from sparsetrain.criteria.sparsegpt import add_outer, symmetric
from sparsetrain.errors import RecipeError, nearest

AbsOrder = Literal["token", "sequence", "domain", "final"]
_ORDERS = ("token", "sequence", "domain", "final")


def copal(weight: Tensor, sensitivity: Tensor) -> Tensor:
    """``|W| * |A|``, same shapes. Example: ``copal(torch.tensor([-2.0]), torch.tensor([3.0]))`` is 6."""
    return (weight * sensitivity).abs()


class _Sensitivity(InputCriterion):
    """What needs the outputs ``y = W x`` of the weights there are while data is shown, without bias."""

    of_weights = True

    def _products(self, seen: Seen) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs ``(groups, rows, in)`` and outputs ``(groups, rows, out of a group)``, in pieces."""
        module, made = seen.tensor.module, seen.output
        if made is not None and seen.weight.ndim == 2:  # what the layer gave need not be computed again
            for piece in self.pieces(seen):
                outputs = wide(made).reshape(1, piece.shape[1], -1)
                bias = getattr(module, "bias", None)
                yield piece, outputs if bias is None else outputs - wide(bias)
            return
        weight = seen.tensor.view(wide(seen.weight))
        for piece in self.pieces(seen):
            groups = piece.shape[0]
            matrix = weight.reshape(groups, weight.shape[0] // groups, -1).to(piece.dtype)
            yield piece, piece @ matrix.mT

    def _grow(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        memory = self.memory.setdefault(name, {})
        if "outer" not in memory:
            memory["outer"] = like.new_zeros(shape)
        return memory["outer"]


class Copal(_Sensitivity):
    """The weight times its output sensitivity.

    Args:
        batches: how many batches are looked at, at least 1.
        abs_order: when the absolute value is taken: per ``"token"``, ``"sequence"``, ``"domain"``, or at the end (``"final"``).

    Raises `RecipeError` for another ``abs_order``. Example: ``ContinualPruning(0.5, criterion=Copal(abs_order="token"))``.
    """

    def __init__(self, batches: int = 16, abs_order: AbsOrder = "token") -> None:
        super().__init__(batches)
        if abs_order not in _ORDERS:
            raise RecipeError(
                f"Copal abs_order={abs_order!r}; use one of {', '.join(_ORDERS)}.{nearest(str(abs_order), _ORDERS)}"
            )
        self.abs_order = abs_order
        self.of_weights = abs_order != "final"

    def observe(self, seen: Seen) -> None:
        """Add ``|y||x|'``, ``|sum y x'|`` of each sample, ``y x'``, or ``x x'``."""
        super().observe(seen)
        name = seen.tensor.name
        if self.abs_order == "final":
            for piece in self.pieces(seen):
                add_outer(self._grow(name, piece, (*piece.shape[::2], piece.shape[2])), piece)
            return
        for inputs, outputs in self._products(seen):
            outer = self._grow(name, inputs, (*outputs.shape[::2], inputs.shape[2]))
            if self.abs_order == "token":
                outer.baddbmm_(outputs.abs().mT, inputs.abs())
            elif self.abs_order == "domain":
                outer.baddbmm_(outputs.mT, inputs)
            else:
                for i, o in self._samples(seen, inputs, outputs):
                    outer += torch.matmul(o.mT, i).abs_()

    def _samples(self, seen: Seen, inputs: Tensor, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of each sample of a piece; where samples have no dimension of their own (experts), every row is one."""
        module, given = seen.tensor.module, seen.input
        assert given is not None  # there would be no piece
        rows = math.prod(given.shape[1:-1])
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # the positions of one image, whatever a piece holds
            image = given[:1] if given.ndim == len(module.kernel_size) + 2 else given
            rows = next(features(module, torch.empty_like(image, device="meta"))).shape[1]
        return zip(torch.split(inputs, rows, 1), torch.split(outputs, rows, 1), strict=True)

    def settled(self, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over tokens; ``"domain"`` takes the absolute value now."""
        found = super().settled(memory)
        return {key: value.abs() for key, value in found.items()} if self.abs_order == "domain" else found

    def rate(self, matrix: Tensor, name: str) -> Tensor:
        """``|W| * |A|``."""
        outer = self.remembered(name)["outer"].to(matrix)
        self.require_finite(name, outer)
        return copal(matrix, matrix @ symmetric(outer) if self.abs_order == "final" else outer)


class OutputFisher(_Sensitivity):
    """The weight times the root mean square of what it adds to its layer's output energy.

    Args:
        batches: how many batches are looked at, at least 1.

    Example: ``ContinualPruning(0.5, criterion="output_fisher")``.
    """

    def observe(self, seen: Seen) -> None:
        """Add ``(y^2)(x^2)'``."""
        super().observe(seen)
        for inputs, outputs in self._products(seen):
            outer = self._grow(seen.tensor.name, inputs, (*outputs.shape[::2], inputs.shape[2]))
            outer.baddbmm_(outputs.square().mT, inputs.square())

    def rate(self, matrix: Tensor, name: str) -> Tensor:
        """``|W| * sqrt(A)``."""
        outer = self.remembered(name)["outer"].to(matrix)
        self.require_finite(name, outer)
        return copal(matrix, outer.sqrt())
