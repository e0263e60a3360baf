"""Frozen entries: parts of parameters that no optimizer step moves by one bit, and of which no optimizer remembers anything.

Zeroing their gradients is not enough: weight decay, momentum from before and orthogonalized updates move them all the same. So
the values are put back after every step, bit for bit, and what the optimizer remembers of them is erased. Where entries
influence each other (LBFGS, Muon, clipping by norm) their gradients are erased too, as soon as they exist. Pure torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain.errors import TargetError
from sparsetrain.masks.erase import Eraser, erase
from sparsetrain.masks.optimizer_state import needs_masked_gradients, per_weight_state
from sparsetrain.masks.sharding import local


@dataclass
class _Held:
    parameter: nn.Parameter
    moves: Tensor  # bool, False = frozen
    kept: Tensor  # the values that stay


class FrozenEntries:
    """Keeps entries of parameters as they are now, through the steps of the optimizers it is attached to.

    Costs a copy of each parameter that has frozen entries, and one byte an entry.

    Example::

        frozen = FrozenEntries()
        frozen.freeze(layer.weight, layer.weight != 0)
        frozen.attach(optimizer)
    """

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self._handles: list[RemovableHandle] = []
        self._erase = Eraser()

    def freeze(self, parameter: nn.Parameter, entries: Tensor | None = None) -> None:
        """Hold these entries (bool, the parameter's shape; None: all) at their values of now, with those held before.

        Raises `TargetError` for entries of another shape, and for a parameter that is sharded over ranks.
        """
        if local(parameter) is not parameter:
            raise TargetError("a parameter is sharded over ranks: entries cannot be frozen under FSDP2; use ddp")
        moves = torch.zeros_like(parameter, dtype=torch.bool) if entries is None else ~entries
        if moves.shape != parameter.shape:
            raise TargetError(f"entries of shape {tuple(moves.shape)} for a parameter of shape {tuple(parameter.shape)}")
        known = self._held.get(id(parameter))
        if known is not None:
            moves &= known.moves
        if not bool(moves.all()):
            self._held[id(parameter)] = _Held(parameter, moves.contiguous(), parameter.detach().clone())

    def attach(self, *optimizers: Optimizer, mask_gradients: bool | None = None) -> None:
        """Hold through the steps of these optimizers, from now on.

        ``mask_gradients``: erase the gradients of frozen entries too; by default only for optimizers that need it. Say True
        where gradients are clipped by their norm.
        """
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_post_hook(lambda opt, *_: self.restore(opt)))
        if any(needs_masked_gradients(o) for o in optimizers) if mask_gradients is None else mask_gradients:
            for held in self._held.values():
                if held.parameter.requires_grad:
                    self._handles.append(_mask_gradient(held))

    def keep(self, *handles: RemovableHandle) -> None:
        """Take these hooks off too when everything is released."""
        self._handles += handles

    def release(self) -> None:
        """Take every hook off and hold nothing any more; values stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._held.clear()

    @torch.no_grad()
    def restore(self, optimizer: Optimizer | None = None) -> None:
        """Put the held values back, and erase what an optimizer remembers of them."""
        for held in self._held.values():
            parameter = held.parameter.detach()
            parameter.copy_(torch.where(held.moves, parameter, held.kept))
            if optimizer is not None and not needs_masked_gradients(optimizer):
                self._erase(per_weight_state(optimizer, held.parameter), held.moves)


def _mask_gradient(held: _Held) -> RemovableHandle:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            erase(parameter.grad, held.moves)

    handle: RemovableHandle = held.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle
