"""Whether layers form a chain: each reads the one before, and nothing else. Asked of the network itself, with one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsetrain.errors import TargetError


def require_chain(network: nn.Module, layers: dict[str, nn.Module], inputs: Tensor) -> None:
    """Raise `TargetError` unless every layer is called once, in this order, on what comes from the layer before alone.

    And unless every neuron reaches the inputs that are its own, and no others. Shortcuts and branches are found by
    differentiation: the output of each layer is cut off, so that whatever reaches a later one from further back has gone
    around; so are mixed neurons. The network is left as it was.

    Example: ``require_chain(LeNet300(), {"fc1": net.fc1, "fc2": net.fc2, "fc3": net.fc3}, images)``.
    """
    names = list(layers)
    outputs: list[Tensor] = []

    def before(place: int, given: tuple[Any, ...]) -> None:
        name = names[place]
        if place != len(outputs):
            raise TargetError(
                f"{name} is called as number {len(outputs) + 1}, and is target {place + 1}: name targets in order"
            )
        if not place or not isinstance(given[0], Tensor):
            return
        read: list[Tensor | None] = [None] * (place + 1)
        if given[0].requires_grad:
            total, sources = given[0].float().sum(), [start, *outputs]
            read = list(torch.autograd.grad(total, sources, retain_graph=True, allow_unused=True))
        around = [names[i - 1] if i else "the input" for i, found in enumerate(read[:-1]) if found is not None]
        if around or read[-1] is None:
            problem = f"reads {around[0]} too, around it" if around else "does not read it"
            raise TargetError(
                f"{name} follows {names[place - 1]} and {problem}: the layers are no chain, in which neurons could be "
                "reserved; use a plain network (MLP, LeNet5Caffe), or PackNet"
            )
        if _mixed(layers[names[place - 1]], layers[name], outputs[-1], given[0]):
            raise TargetError(
                f"neurons are mixed between {names[place - 1]} and {name} (LayerNorm, an excluded layer): those of one task "
                "would reach another; use a network without what is between, or PackNet"
            )

    def after(result: Tensor) -> Tensor:
        outputs.append((1 + result.detach().abs()).requires_grad_())  # positive: ReLU lets every neuron through
        return outputs[-1].clone()  # which the network may write to in place

    handles = []
    for place, module in enumerate(layers.values()):
        handles.append(module.register_forward_pre_hook(lambda _, given, place=place: before(place, given)))
        handles.append(module.register_forward_hook(lambda _, given, result: after(result)))
    modes = {module: module.training for module in network.modules()}
    start = inputs.detach().clone().requires_grad_()
    try:
        network.eval()
        with torch.enable_grad():
            network(start)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if len(outputs) < len(names):
        raise TargetError(f"{names[len(outputs)]} is not called in the forward pass; leave it out (targets.exclude)")


def _mixed(before: nn.Module, layer: nn.Module, outputs: Tensor, inputs: Tensor) -> bool:
    """Whether an input of ``layer`` depends on another neuron of the layer before than the one it belongs to.

    Two neurons differ in a bit of their numbers: for every bit, inputs of the neurons that have it are differentiated with
    respect to those that have not, and the other way round. What is mixed shows at one of them.
    """
    neurons = _neurons_last(before, outputs).shape[-1]
    columns = _neurons_last(layer, inputs).float()
    copies, odd = divmod(columns.shape[-1], neurons)
    if odd:
        return True
    numbers = torch.arange(neurons, device=outputs.device)
    for bit in range((neurons - 1).bit_length()):
        for side in (0, 1):
            own = (numbers >> bit) & 1 == side
            total = columns[..., own.repeat_interleave(copies)].sum()
            (found,) = torch.autograd.grad(total, outputs, retain_graph=True)
            if bool(_neurons_last(before, found)[..., ~own].any()):
                return True
    return False


def _neurons_last(layer: nn.Module, values: Tensor) -> Tensor:
    return values.movedim(1, -1) if isinstance(layer, _ConvNd) else values
