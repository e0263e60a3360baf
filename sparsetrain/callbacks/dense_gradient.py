"""The gradient of one optimizer step with the entries of pruned weights still in it, for methods that grow by it.

Backward computes it anyway. Usually it is simply there after the step; where gradients of pruned entries are erased as soon as
they exist (clipping, optimizers that mix entries, manual optimization), it is overheard right before, batch by batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.masks.sharding import local


class DenseGradients:
    """Overhears gradients where it must, from `listen` to `stop`, and then costs one copy of them; see `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def listen(self, trainer: Trainer, manager: MaskManager) -> None:
        """Begin, before a backward pass; nothing happens where nothing is erased, or where it listens already."""
        for tensor in manager:
            if tensor.erases_gradient and tensor.name not in self._sums:
                total = self._sums[tensor.name] = torch.zeros_like(local(tensor.target.parameter.detach()))
                tensor.tap = partial(_hear, tensor, total, trainer.scaler)

    def restart(self) -> None:
        """Gradients are zeroed: what was heard belongs to an earlier step."""
        for total in self._sums.values():
            total.zero_()

    def stop(self, manager: MaskManager) -> None:
        """End, and give the memory back."""
        if self._sums:
            self._sums = {}
            for tensor in manager:
                tensor.tap = None

    def take(self, trainer: Trainer, tensor: MaskedTensor) -> Tensor | None:
        """The dense gradient of this step, the sum over accumulated batches (and ranks, up to a factor), or None."""
        if tensor.name in self._sums:
            # Overheard before the ranks exchange theirs.
            reduced: Any = trainer.strategy.reduce(self._sums[tensor.name].clone(), reduce_op="sum")
            return reduced  # type: ignore[no-any-return]
        grad = tensor.target.parameter.grad
        return grad.to_dense() if grad is not None and grad.is_sparse else grad

    def remember(self, trainer: Trainer, manager: MaskManager, means: dict[str, Tensor], keep: float) -> None:
        """``mean <- keep * mean + gradient`` for every tensor; a gradient that is not finite (a step AMP skips) is left out."""
        for tensor in manager:
            gradient = self.take(trainer, tensor)
            if gradient is None or not bool(gradient.isfinite().all()):
                continue
            if tensor.name not in means:
                means[tensor.name] = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
            means[tensor.name].mul_(keep).add_(gradient)


def _hear(tensor: MaskedTensor, total: Tensor, scaler: Any, grad: Tensor) -> None:
    dense = grad.to_dense() if grad.is_sparse else grad
    dense = dense if scaler is None else dense / scaler.get_scale()
    # What is alive comes with the sum over earlier batches in it; what is pruned was erased there.
    total.copy_(dense if tensor.mask is None else torch.where(tensor.mask, dense, total + dense))
