"""Supermasks: real-valued scores decide which weights of one network a task uses, and are learned straight through.

The network sees ``W~ = m(s) * W``, where ``m`` keeps the highest scores of a pattern, or those above a threshold. Backward
takes ``m`` for the identity, so that ``dL/ds = dL/dW~ * W`` and ``dL/dW = dL/dW~ * m`` (Piggyback, Mallya et al. 2018,
arXiv 1801.06519, sec. 3; WSN, Kang et al. 2022, ICML). Pure torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain.errors import DivergedError, PatternError
from sparsetrain.masks import MaskedTensor
from sparsetrain.masks.erase import Eraser
from sparsetrain.masks.optimizer_state import needs_masked_gradients, per_weight_state
from sparsetrain.nm import around_step
from sparsetrain.patterns import Pattern


@dataclass
class Scored:
    """One tensor and its scores, stored layout. ``dense`` are the weights behind the mask, ``frozen`` those that stay."""

    dense: Tensor
    scores: nn.Parameter
    mask: Tensor
    frozen: Tensor

    @staticmethod
    def begin(dense: Tensor, scores: Tensor, frozen: Tensor) -> Scored:
        """Before the first mask: copies, on the device of the weights."""
        start = nn.Parameter(scores.detach().clone().to(dense))
        return Scored(dense.detach().clone(), start, torch.ones_like(frozen), frozen)

    def score_gradient(self, grad: Tensor, scale: float = 1.0) -> None:
        """Give the scores their straight-through gradient, from that of the masked weights (times ``scale``)."""
        self.scores.grad = grad * self.dense / scale

    def weight_gradient(self, grad: Tensor) -> None:
        """Leave, of the gradient of the masked weights, what moves the weights: those in the mask that are not frozen."""
        grad.mul_(self.mask & ~self.frozen)

    def take(self, weight: Tensor) -> None:
        """The weights as a step has left them; frozen ones stay, bit for bit."""
        self.dense = torch.where(self.frozen, self.dense, weight)


def initial_scores(shape: tuple[int, ...], key: tuple[int | str, ...]) -> Tensor:
    """Uniform in plus or minus ``1 / sqrt(fan_in)``, a function of the key alone (as torch initializes a layer's weights).

    Example: ``initial_scores((300, 784), (0, "fc1.weight"))``.
    """
    words = [word for part in key for word in ([part] if isinstance(part, int) else part.encode())]
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return (2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1) * bound


def chosen(scores: Tensor, pattern: Pattern, sparsity: Fraction | None, threshold: float) -> tuple[Tensor, Fraction]:
    """The mask of scores ``(out, in, *kernel)`` and its sparsity: the pattern's at ``sparsity``, or, for None, all above
    ``threshold``.

    Raises `DivergedError` where scores are not finite, or none is above the threshold.

    Example: ``chosen(torch.tensor([[1.0, 3.0]]), Unstructured(), None, 2.0)[0]`` is ``[[False, True]]``.
    """
    if sparsity is not None:
        try:
            return pattern.select(scores, sparsity), sparsity
        except PatternError as error:
            raise DivergedError(f"{error}; lower score_lr") from error
    mask = scores > threshold
    dead = int((~mask).sum())
    if dead == mask.numel():
        raise DivergedError(f"no score is above the threshold {threshold}: the task would have no weight left; lower score_lr")
    return mask, Fraction(dead, mask.numel())


class StraightThrough:
    """Around every optimizer step: the optimizer steps dense weights, scores step by Adam, the model holds masked weights.

    Args:
        tensors: the tensors with their scores.
        choose: gives the mask (stored layout) of a tensor from its scores, and its sparsity.
        score_lr: Adam's learning rate for the scores.

    Gradients may be those of an AMP scaler that the optimizer handles itself; a step it skips moves nothing. What optimizers
    remember of frozen weights is erased. Example: see `Supermask`, which attaches one for each task.
    """

    def __init__(
        self,
        tensors: list[tuple[MaskedTensor, Scored]],
        choose: Callable[[MaskedTensor, Scored], tuple[Tensor, Fraction]],
        score_lr: float,
    ) -> None:
        self.tensors = tensors
        self.choose = choose
        self.scores = Adam([scored.scores for _, scored in tensors], lr=score_lr)
        self._open: list[tuple[MaskedTensor, Scored]] = []
        self._handles: list[RemovableHandle] = []
        self._erase = Eraser()

    def attach(self, *optimizers: Optimizer) -> None:
        """Work around the steps of these optimizers."""
        for optimizer in optimizers:
            self._handles += around_step(optimizer, partial(self._reveal, optimizer), partial(self._hide, optimizer))

    def detach(self) -> None:
        """Take every hook off; the model keeps the masked weights it holds."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _reveal(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "found_inf", None):
            return
        scale = getattr(optimizer, "grad_scale", None)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for tensor, scored in self.tensors:
            parameter = tensor.target.parameter
            if id(parameter) not in owned or parameter.grad is None:
                continue
            scored.score_gradient(parameter.grad, 1.0 if scale is None else float(scale))
            scored.weight_gradient(parameter.grad)
            parameter.detach().copy_(scored.dense)
            self._open.append((tensor, scored))

    @torch.no_grad()
    def _hide(self, optimizer: Optimizer) -> None:
        if self._open:
            self.scores.step()
            self.scores.zero_grad()
        for tensor, scored in self._open:
            weight = tensor.target.parameter.detach()
            scored.take(weight)
            if not needs_masked_gradients(optimizer):
                self._erase(per_weight_state(optimizer, tensor.target.parameter), ~scored.frozen)
            scored.mask, tensor.sparsity = self.choose(tensor, scored)
            tensor.mask = scored.mask
            weight.copy_(scored.dense)
            self._erase([weight], scored.mask)
        self._open.clear()

    def state_dict(self) -> dict[str, Any]:
        """What Adam remembers of the scores."""
        return deepcopy(self.scores.state_dict())
