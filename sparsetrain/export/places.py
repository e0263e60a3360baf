"""Which layers of a model can run in another format, which cannot though they have zeros, and putting layers in place."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sparsetrain.errors import ExportError
from sparsetrain.export.layers import FastLayer, build, kind_of, matrix_of
from sparsetrain.targets import REPLACED, aliases

#: Fewer zeros than this cannot make anything 5 % faster.
LEAST_ZEROS = 0.05


@dataclass(frozen=True)
class Place:
    """A layer and every name it is reached by (a layer may be used twice)."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


def require_plain(model: nn.Module) -> None:
    """Raise `ExportError` where a parameter is computed from others: it cannot be copied, or its zeros are not seen.

    Example: ``require_plain(torch.nn.Linear(2, 2))`` raises nothing.
    """
    for name, module in model.named_modules():
        replaced = list(module.parametrizations) if is_parametrized(module) else []
        # prune and the older weight_norm keep weight_orig, or weight_g and weight_v, and set weight anew before each call.
        plain = ((key, re.sub(r"_(orig|[gv])$", "", key)) for key in module._parameters)
        replaced += [short for key, short in plain if short != key and short in vars(module)]
        if replaced:
            raise ExportError(f"{f'{name}.{replaced[0]}'.removeprefix('.')} is {REPLACED}")


def device_of(model: nn.Module) -> str:
    """The kind of device a model is on, ``cpu`` without tensors. Example: ``device_of(torch.nn.Linear(2, 2))`` is ``"cpu"``."""
    return next(chain(model.parameters(), model.buffers()), torch.empty(0)).device.type


def survey(model: nn.Module) -> tuple[list[Place], dict[str, str]]:
    """The layers with zeros that can run in another format; and the tensors with zeros that stay dense, and why.

    Example: ``survey(torch.nn.Sequential(torch.nn.Linear(4, 4)))`` is ``([], {})``: hardly any weight is exactly zero.
    """
    found: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    fused: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(name)
        modules[id(module)] = module
        if isinstance(module, nn.TransformerEncoderLayer):
            fused |= {
                id(child): "the fused path of TransformerEncoderLayer reads the weight itself" for child in module.children()
            }
    places: list[Place] = []
    left: dict[str, str] = {}
    taken: set[int] = set()
    for key, names in found.items():
        module = modules[key]
        weight = module._parameters.get("weight")
        if weight is None or kind_of(module) is None or _zeros(weight) < LEAST_ZEROS:
            continue
        taken.add(id(weight))
        reason = fused.get(key) or _why_not(module, weight)
        if reason is None:
            places.append(Place(tuple(names), module))
        else:
            left[f"{names[0]}.weight".removeprefix(".")] = reason
    for parameter, names_of in aliases(model):
        if id(parameter) not in taken and parameter.ndim > 1 and _zeros(parameter) >= LEAST_ZEROS:
            left[names_of[0]] = "neither a plain Linear, a Conv1D nor a 1x1 convolution"
    return places, left


def _zeros(weight: Tensor) -> float:
    if isinstance(weight, nn.parameter.UninitializedParameter) or not weight.numel():
        return 0.0
    return float((weight.detach() == 0).float().mean())


def _why_not(module: nn.Module, weight: Tensor) -> str | None:
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__} (sharded or quantized): gather it first"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which another layer would not run: remove them first"
    return None


def put(model: nn.Module, place: Place, layer: nn.Module) -> nn.Module:
    """Set a layer at each of its names; returns the model, which is the layer itself where the place is the whole model."""
    for name in place.names:
        if not name:
            return layer
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return model


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares every tensor with the model, so that layers can be replaced in one of the two.

    Example: ``twin(model).fc1.weight is model.fc1.weight``.
    """
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def probe(module: nn.Module, batch: int, image: tuple[int, int] | None) -> Tensor:
    """Random input of a layer: ``batch`` vectors, or ``batch`` images of a 1x1 convolution."""
    weight = module.get_parameter("weight")
    shape = (batch, matrix_of(module).shape[1], *(image or (3, 3) if kind_of(module) == "pointwise" else ()))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def tolerance_of(dtype: torch.dtype, tolerance: float) -> float:
    """The tolerance, or 8 roundings of a type (bfloat16, float16) where that is more."""
    return max(tolerance, 8 * torch.finfo(dtype).eps)


def convert(module: nn.Module, form: str, tolerance: float, image: tuple[int, int] | None = None) -> tuple[FastLayer, float]:
    """The layer in a format, and how far its outputs are from the dense ones: ``max |y - y_dense|``.

    Raises `ExportError` where it cannot be made, does not run, or differs by more than ``tolerance * max |y_dense|``.
    """
    try:
        layer = build(module, form)
        x = probe(module, 5, image)
        with torch.no_grad():
            pairs = [(layer(part), module(part)) for part in (x, x[:1])]
        kept, given = layer.state_dict(), module.state_dict()  # looked at after it ran
    except (RuntimeError, TypeError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{form} does not run here: {str(error).splitlines()[0]}") from error
    if kept.keys() != given.keys() or not all(torch.equal(kept[name], given[name]) for name in given):
        raise ExportError(f"{form} does not hold the weights it was given (a weight that is not finite?)")
    return layer, max(require_equal(a, b, form, tolerance) for a, b in pairs)


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returned, in order.

    Example: ``tensors_of({"logits": y, "n": 3})`` is ``[y]``.
    """
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for item in output for t in tensors_of(item)] if isinstance(output, list | tuple) else []


def require_equal(found: Tensor, dense: Tensor, what: str, tolerance: float) -> float:
    """``max |found - dense|``. Raises `ExportError` above ``tolerance * max |dense|``, or where only one is a number."""
    if found.shape != dense.shape or found.dtype != dense.dtype:
        raise ExportError(
            f"{what} gives {found.dtype} of shape {tuple(found.shape)}, the dense model {dense.dtype} of {tuple(dense.shape)}"
        )
    if not dense.numel():
        return 0.0
    # Where both are the same infinity or both NaN nothing differs.
    same = (found == dense) | (found.isnan() & dense.isnan())
    difference = float((found - dense).abs().masked_fill(same, 0).max())
    scale = float(dense.abs().masked_fill(~dense.isfinite(), 0).max())
    if not difference <= tolerance_of(dense.dtype, tolerance) * scale:
        raise ExportError(
            f"{what} differs from the dense output by {difference:.3g}, where that is at most {scale:.3g}: more than the "
            f"tolerance {tolerance_of(dense.dtype, tolerance):g}; leave that format out, or allow more if it is rounding"
        )
    return difference
