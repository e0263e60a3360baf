"""Layers that read only some of their inputs: what stays of a layer whose other inputs nobody makes and nobody needs."""

from __future__ import annotations

from torch import Tensor, nn

from sparsetrain.errors import TargetError


class _Picking:
    """Takes the inputs in ``picked`` (int64) along ``_axis`` and does what its base class does with them."""

    picked: Tensor
    _axis = -1

    def forward(self, given: Tensor) -> Tensor:
        result: Tensor = super().forward(given.index_select(self._axis, self.picked))  # type: ignore[misc]
        return result


class PickingLinear(_Picking, nn.Linear):
    """A Linear that reads some entries of the last dimension."""


class PickingConv1d(_Picking, nn.Conv1d):
    """A convolution that reads some channels."""

    _axis = 1


class PickingConv2d(_Picking, nn.Conv2d):
    """A convolution that reads some channels."""

    _axis = 1


class PickingConv3d(_Picking, nn.Conv3d):
    """A convolution that reads some channels."""

    _axis = 1


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: PickingLinear,
    nn.Conv1d: PickingConv1d,
    nn.Conv2d: PickingConv2d,
    nn.Conv3d: PickingConv3d,
}


def can_pick(layer: nn.Module) -> bool:
    """Whether a layer may come to read some inputs only."""
    return type(layer) in _KINDS or type(layer) in _KINDS.values()


def pick_inputs(layer: nn.Module, index: Tensor) -> None:
    """Let a layer, whose weight has been cut to these inputs, pick them from what it is given; again on what it picks.

    Parameter names stay; the buffer ``picked`` joins them. Raises `TargetError` for layers of another class.
    Example: ``pick_inputs(nn.Linear(2, 5), torch.tensor([0, 3]))`` reads 2 of 4 inputs.
    """
    if not can_pick(layer):
        raise TargetError(f"{type(layer).__name__} cannot come to read some of its inputs only; leave them all in")
    if type(layer) in _KINDS:
        layer.__class__ = _KINDS[type(layer)]
        layer.register_buffer("picked", index.clone())
    else:
        layer.picked = layer.picked[index.to(layer.picked.device)]  # type: ignore[index,arg-type]


def all_inputs(layer: nn.Module, before: Tensor | None) -> None:
    """Undo `pick_inputs`: ``before`` is what it picked then, None for everything."""
    if before is not None:
        layer.picked = before
        return
    layer.__class__ = next(plain for plain, picking in _KINDS.items() if isinstance(layer, picking))
    del layer._buffers["picked"]
