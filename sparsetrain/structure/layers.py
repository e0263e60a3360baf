"""What the modules of a model do with features: multiply them, scale them, or something nobody knows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from sparsetrain.errors import TargetError, nearest

Role = Literal["multiply", "embed", "group", "scale", "pass", "opaque"]

_LINEAR = {"Linear": (0, 1, -1), "Conv1D": (1, 0, -1)}
_CONV = {f"Conv{n}d": (0, 1, 1) for n in (1, 2, 3)} | {f"ConvTranspose{n}d": (1, 0, 1) for n in (1, 2, 3)}
_EMBEDDINGS = frozenset({"Embedding", "EmbeddingBag"})
#: Layers whose weights are no single matrix of features, or are used without calling the modules inside.
_OPAQUE = frozenset({"MultiheadAttention", "RNNBase", "RNNCellBase", "Bilinear"})


@dataclass(frozen=True)
class Cut:
    """A tensor that has a feature's entries, and along which dimension; ``buffer``: it is one, not a parameter."""

    name: str
    dim: int
    buffer: bool = False


@dataclass(frozen=True)
class Layer:
    """One module: what it does, along which axis of activations its features lie, and what is cut with them.

    ``inputs``, ``outputs``: how many features it reads and makes, 0 where that is not its business. ``reads`` and ``writes``
    are what loses a slice with an input or an output feature.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    role: Role
    axis: int = -1
    inputs: int = 0
    outputs: int = 0
    reads: tuple[Cut, ...] = ()
    writes: tuple[Cut, ...] = ()

    @property
    def held(self) -> bool:
        """While features are traced it makes what it made for the sample, whatever it is given."""
        return self.role in ("multiply", "embed", "opaque")


@dataclass(frozen=True)
class Loose:
    """A parameter that a module uses by itself, beside the modules it has: a class token, a table of positions."""

    name: str
    parameter: nn.Parameter = field(repr=False, compare=False)


def find_layers(model: nn.Module, leave_out: Collection[str] = ()) -> tuple[list[Layer], list[Loose]]:
    """Every module that has to do with features, outermost where nobody knows what is inside; and the loose parameters.

    ``leave_out``: names of modules that are taken as a whole. Raises `TargetError` for a name that no module has, and for
    one text instead of several.
    Example: the roles of ``nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))`` are ``multiply`` and ``scale``.
    """
    layers: list[Layer] = []
    loose: list[Loose] = []
    inside: list[str] = []
    modules = dict(model.named_modules())
    if isinstance(leave_out, str):
        raise TargetError(f"leave_out is {leave_out!r}, one text; give a list of names: leave_out=[{leave_out!r}]")
    for name in leave_out:
        if name not in modules:
            raise TargetError(f"leave_out names {name!r}, and the model has no such module.{nearest(name, modules)}")
    for name, module in modules.items():
        if any(not outer or name.startswith(f"{outer}.") for outer in inside):
            continue
        layer = Layer(name, module, "opaque") if name in leave_out else _layer(name, module)
        if layer is not None:
            layers.append(layer)
            inside += [name] if layer.role == "opaque" else []
        elif len(list(module.children())):
            own = [(key, p) for key, p in module._parameters.items() if p is not None and p.numel() > 1]
            loose += [Loose(_of(name, key), p) for key, p in own]
    return layers, loose


def _layer(name: str, module: nn.Module) -> Layer | None:
    kinds = {kind.__name__ for kind in type(module).__mro__}
    weight = module._parameters.get("weight")
    for table in (_LINEAR, _CONV):
        for kind in kinds & table.keys():
            if weight is None:  # a parametrization, weight norm: the tensor that would be cut is another
                return Layer(name, module, "opaque")
            return _multiplying(name, module, weight, *table[kind])
    if kinds & _EMBEDDINGS and weight is not None:
        return Layer(name, module, "embed", outputs=weight.shape[1], writes=(Cut(_of(name, "weight"), 1),))
    if kinds & _OPAQUE:
        return Layer(name, module, "opaque")
    return None if len(list(module.children())) else _leaf(name, module)


def _leaf(name: str, module: nn.Module) -> Layer | None:
    """A norm, or whatever else has one number a feature."""
    parameters = {key: p for key, p in module._parameters.items() if p is not None and p.numel() > 1}
    buffers = {key: b for key, b in module._buffers.items() if b is not None and b.ndim and b.numel() > 1}
    norm = "norm" in type(module).__name__.lower()
    sizes = {tuple(p.shape) for p in (parameters or (buffers if norm else {})).values()}
    if not sizes:
        return Layer(name, module, "pass") if norm else None
    if len(sizes) > 1 or len(next(iter(sizes))) > 1:
        return Layer(name, module, "opaque") if parameters else None
    (size,) = next(iter(sizes))
    cuts = [Cut(_of(name, key), 0) for key in parameters]
    cuts += [Cut(_of(name, key), 0, True) for key, buffer in buffers.items() if tuple(buffer.shape) == (size,)]
    return Layer(name, module, "scale", outputs=size, writes=tuple(cuts))


def _multiplying(name: str, module: nn.Module, weight: Tensor, out: int, into: int, axis: int) -> Layer:
    groups = int(getattr(module, "groups", 1))
    known = {"weight": weight, "bias": module._parameters.get("bias")}
    beside = {key: p for key, p in module._parameters.items() if key not in known and p is not None and p.numel() > 1}
    if any(p.shape != weight.shape for p in beside.values()) or (groups > 1 and (out or beside)):
        return Layer(name, module, "opaque")
    keys = ["weight", *beside]
    writes = tuple(Cut(_of(name, key), out) for key in keys)
    writes += (Cut(_of(name, "bias"), 0),) if known["bias"] is not None else ()
    if groups > 1:  # each group of outputs sees its own inputs: features go through it
        return Layer(name, module, "group", axis, outputs=weight.shape[0], writes=writes)
    reads = tuple(Cut(_of(name, key), into) for key in keys)
    return Layer(name, module, "multiply", axis, weight.shape[into], weight.shape[out], reads, writes)


def _of(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key
