"""Cutting tensors: parameters and buffers, what optimizers and averaged copies remember, and what modules know of sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.swa_utils import AveragedModel

from sparsetrain.errors import TargetError

#: Tensor -> dimension -> the slices that stay, in their order.
Cuts = Mapping[str, Mapping[int, Tensor]]
Undo = list[Callable[[], Any]]

#: Names under which layers know the size of a dimension of their weight.
_SIZES = {
    "Linear": {0: "out_features", 1: "in_features"},
    "Conv1D": {0: "nx", 1: "nf"},
    "Embedding": {1: "embedding_dim"},
    "EmbeddingBag": {1: "embedding_dim"},
    **{f"Conv{n}d": {0: "out_channels", 1: "in_channels"} for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": {0: "in_channels", 1: "out_channels"} for n in (1, 2, 3)},
}
#: What Adafactor remembers: means along a dimension, of which the entries that go were 0.
_MEANS = frozenset({"row_var", "col_var"})
_NORM_SIZES = ("num_features", "num_channels", "num_parameters", "normalized_shape")


def inner(model: nn.Module) -> nn.Module:
    """The model that a wrapper holds (compiled, DDP, an averaged copy): its tensors have plain names.

    Example: ``inner(AveragedModel(net))`` is the averaged copy of ``net``.
    """
    while True:
        if isinstance(model, AveragedModel | nn.parallel.DistributedDataParallel):
            held: object = model.module
        else:
            held = model._modules.get("_orig_mod")
        if not isinstance(held, nn.Module):
            return model
        model = held


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have. Example: ``sorted(all_tensors(nn.Linear(1, 1)))``."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def put_back(undo: Undo) -> None:
    """Undo everything, last things first. Example: ``put_back(undo)`` after a failed `cut_tensors`."""
    while undo:
        undo.pop()()


def cut_tensors(model: nn.Module, cuts: Cuts, undo: Undo, optimizers: Iterable[Optimizer] = ()) -> None:
    """Keep some slices of parameters and buffers, and of what optimizers remember of them; parameters stay the same objects.

    Raises `TargetError` for an optimizer whose memory has other shapes; ``undo`` then puts back what was cut.
    """
    for name, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in list(store.items()):
                dims = cuts.get(f"{name}.{key}" if name else key)
                if tensor is None or dims is None:
                    continue
                if isinstance(tensor, nn.Parameter):
                    for optimizer in optimizers:
                        _cut_memory(optimizer, tensor, dims, undo)
                    _cut_parameter(tensor, dims, undo)
                else:
                    undo.append(partial(module._buffers.__setitem__, key, tensor))
                    module._buffers[key] = kept(tensor, dims)
    for module in model.modules():
        _know_sizes(module, undo)


def _cut_parameter(parameter: nn.Parameter, dims: Mapping[int, Tensor], undo: Undo) -> None:
    gradient = parameter.grad
    undo.append(partial(setattr, parameter, "grad", gradient))  # undone last: a gradient has the shape of its parameter
    undo.append(partial(setattr, parameter, "data", parameter.data))
    undo.append(partial(setattr, parameter, "grad", None))
    parameter.grad = None
    parameter.data = kept(parameter.data, dims)
    parameter.grad = None if gradient is None else kept(gradient, dims)


def kept(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """The slices that stay, in memory of their own. Example: ``kept(torch.eye(2), {0: torch.tensor([1])})``."""
    for dim, index in dims.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous()


def _cut_memory(optimizer: Optimizer, parameter: nn.Parameter, dims: Mapping[int, Tensor], undo: Undo) -> None:
    if not any(parameter is owned for group in optimizer.param_groups for owned in group["params"]):
        return
    if isinstance(optimizer, LBFGS):
        undo.append(partial(optimizer.state.update, dict(optimizer.state)))
        optimizer.state.clear()  # one flat history of all parameters: nobody can cut it
        undo.append(partial(setattr, optimizer, "_numel_cache", getattr(optimizer, "_numel_cache", None)))
        optimizer._numel_cache = None
        return
    memory: dict[str, Any] = optimizer.state.get(parameter, {})
    for key, value in memory.items():
        if not isinstance(value, Tensor) or not value.ndim or (value.numel() == 1 and value.ndim != parameter.ndim):
            continue  # one number for the whole parameter; a mean over one column is one of its means all the same
        pairs = list(zip(value.shape, parameter.shape, strict=False))
        if value.ndim != parameter.ndim or not all(mine in (1, its) for mine, its in pairs):
            raise TargetError(
                f"{type(optimizer).__name__} remembers {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}: nobody knows how to cut that; compact at the end of training, or use AdamW or SGD"
            )
        undo.append(partial(memory.__setitem__, key, value))
        memory[key] = kept(value, {dim: index for dim, index in dims.items() if value.shape[dim] == parameter.shape[dim]})
        if key in _MEANS:
            for dim, index in dims.items():
                if value.shape[dim] < parameter.shape[dim]:
                    memory[key] = memory[key] * (parameter.shape[dim] / len(index))


def _know_sizes(module: nn.Module, undo: Undo) -> None:
    own, averages = module._parameters.get("weight"), module._buffers.get("running_mean")
    weight = averages if own is None else own  # norms without weights have averages of the same size
    if weight is None:
        return
    for kind in type(module).__mro__:
        for dim, name in _SIZES.get(kind.__name__, {}).items():
            groups = int(getattr(module, "groups", 1))
            if groups > 1:  # outputs of a group go together, and the group with them
                each = module.out_channels // groups  # type: ignore[operator]
                now = weight.shape[0] // each
                set_size(module, "groups", now, undo)
                set_size(module, "in_channels", now * weight.shape[1], undo)
                set_size(module, "out_channels", weight.shape[0], undo)
                return
            set_size(module, name, weight.shape[dim], undo)
    for name in _NORM_SIZES:
        known = getattr(module, name, None)
        if weight.ndim == 1 and known is not None:
            set_size(module, name, tuple(weight.shape) if isinstance(known, tuple) else weight.shape[0], undo)


def set_size(module: nn.Module, name: str, value: Any, undo: Undo) -> None:
    """Set what a module knows of a size, if it knows it and differs."""
    known = getattr(module, name, None)
    if known is not None and known != value:
        undo.append(partial(setattr, module, name, known))
        setattr(module, name, value)
