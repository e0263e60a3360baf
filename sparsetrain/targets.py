"""Targets: names, types and patterns of names -> the tensors to prune, with sane defaults.

By default every weight of a supported layer is a target, except norms, biases, embeddings and the output head. An explicit
``include`` counts as asking: whatever it matches is a target, an embedding or a head as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from sparsetrain.errors import TargetError, nearest

_RECURRENT = r"weight_(ih|hh|hr)_l\d+(_reverse)?"
#: How a layer type stores its weight: parameter names, and whether inputs come first (transformers' Conv1D).
_LAYERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "Linear": (("weight",), False),
    "Bilinear": (("weight",), False),
    "Conv1d": (("weight",), False),
    "Conv2d": (("weight",), False),
    "Conv3d": (("weight",), False),
    "Embedding": (("weight",), False),
    "EmbeddingBag": (("weight",), False),
    "Conv1D": (("weight",), True),
    "MultiheadAttention": (("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), False),
    "RNN": ((_RECURRENT,), False),
    "LSTM": ((_RECURRENT,), False),
    "GRU": ((_RECURRENT,), False),
}
#: Why a weight stays dense although nobody asked for it.
UNSUPPORTED, REPLACED = "no supported layer", "replaced by a parametrization or torch.nn.utils.prune: remove that first"
_EMBEDDINGS = frozenset({"Embedding", "EmbeddingBag"})
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: What PEFT calls the factors beside a layer.
_ADAPTER = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B)(\.|$)")


@dataclass(frozen=True)
class Layout:
    """How a stored tensor is seen as ``(out, in, *kernel)``: as it is, or transposed when inputs come first.

    ``experts``: so many weights of one shape are stored in one tensor ``(experts, out, in)``; seen are the rows of all of
    them, ``(experts * out, in)``. 0: it is one weight.

    Example: ``Layout(transposed=True).view(torch.zeros(3, 5)).shape`` is ``(5, 3)``; the view is its own inverse.
    """

    transposed: bool = False
    experts: int = 0

    def view(self, tensor: Tensor) -> Tensor:
        """A view with outputs first (a copy where experts are transposed); applied twice it gives the stored order back."""
        if not self.experts:
            return tensor.transpose(0, 1) if self.transposed else tensor
        if tensor.ndim == 3:
            return (tensor.transpose(1, 2) if self.transposed else tensor).flatten(0, 1)
        stacked = tensor.reshape(self.experts, -1, tensor.shape[1])
        return stacked.transpose(1, 2) if self.transposed else stacked

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """The shape of that view."""
        if self.experts:
            experts, out, inputs = stored
            return (experts * inputs, out) if self.transposed else (experts * out, inputs)
        first = (stored[1], stored[0]) if self.transposed else tuple(stored[:2])
        return (*first, *stored[2:])


@dataclass(frozen=True)
class Target:
    """One tensor to prune: its plain name, the names it is tied to, and where it lives."""

    name: str
    aliases: tuple[str, ...]
    module: nn.Module = field(repr=False, compare=False)
    attribute: str
    layout: Layout

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now: looked up each time, since sharding and ``.to()`` replace parameters."""
        parameter = self.module._parameters.get(self.attribute)
        if parameter is None:
            raise TargetError(
                f"{self.name} is no parameter of its {type(self.module).__name__} any more: something replaced it "
                "(a parametrization, torch.nn.utils.prune, weight norm); remove that, or exclude the tensor"
            )
        return parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """The global shape as stored."""
        return tuple(self.parameter.shape)

    @property
    def view_shape(self) -> tuple[int, ...]:
        """The global shape ``(out, in, *kernel)``."""
        return self.layout.shape(self.shape)


@dataclass(frozen=True)
class Matched:
    """What was found: the targets, and every other parameter with the reason why it is left dense."""

    targets: tuple[Target, ...]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Targets:
    """Which tensors to prune.

    Args:
        include: regular expressions searched in the plain parameter names (``encoder.layers.0.fc1.weight``). Empty: every
            weight of a supported layer except embeddings, the output head and low-rank adapters. Given: exactly what matches.
        exclude: regular expressions searched in the names; what matches stays dense, whatever else says.
        embeddings: prune embeddings too (without naming them in ``include``).
        head: prune the output head too. The head is ``model.get_output_embeddings()`` where there is one, else the last
            Linear of the model, unless it sits in a ModuleList of like blocks or is the only target.

    Example: ``Targets(exclude=("conv1",), head=True)``.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: bool = False
    head: bool = False

    def __post_init__(self) -> None:
        for kind in ("include", "exclude"):
            given = getattr(self, kind)
            object.__setattr__(self, kind, (given,) if isinstance(given, str) else tuple(given))
            for pattern in getattr(self, kind):
                compile_regex(pattern, f"targets.{kind}")

    def match(self, model: nn.Module) -> Matched:
        """Find the tensors in a model, each once whatever its aliases. Raises `TargetError` if nothing matches."""
        names = aliases(model)
        heads = {} if self.head else {id(p): why for p, why in _heads(model)}
        found: list[Target] = []
        skipped: dict[str, str] = {}
        owners = _owners(model)
        for parameter, alias in names:
            owner = owners.get(id(parameter))
            reason = self._reason(parameter, alias, owner, heads)
            if reason is None and owner is not None:
                module, attribute, layout, _ = owner
                found.append(Target(alias[0], alias[1:], module, attribute, layout))
            else:
                skipped[alias[0]] = reason or UNSUPPORTED
        if not found:
            raise TargetError(self._nothing(model, skipped))
        everything = [name for target in found for name in (target.name, *target.aliases)]
        for pattern in self.include:
            if not any(re.search(pattern, name) for name in everything):
                dense = next((f"; {name} stays dense: {why}" for name, why in skipped.items() if re.search(pattern, name)), "")
                raise TargetError(f"targets.include {pattern!r} matches no target{dense}.{nearest(pattern, everything)}")
        return Matched(tuple(found), skipped)

    def _reason(
        self,
        parameter: nn.Parameter,
        names: tuple[str, ...],
        owner: tuple[nn.Module, str, Layout, str] | None,
        heads: dict[int, str],
    ) -> str | None:
        if any(re.search(pattern, name) for pattern in self.exclude for name in names):
            return "excluded (targets.exclude)"
        if parameter.ndim < 2 and not isinstance(parameter, nn.parameter.UninitializedParameter):
            return "a bias, norm or scale"
        if owner is None:
            replaced = any(re.search(r"(^|\.)parametrizations\.|_orig$|_[gv]$", name) for name in names)
            return REPLACED if replaced else UNSUPPORTED
        if self.include:
            asked = any(re.search(pattern, name) for pattern in self.include for name in names)
            return None if asked else "not included (targets.include)"
        if any(_ADAPTER.search(name) for name in names):
            return "a factor of a low-rank adapter"
        if not self.embeddings and owner[3] in _EMBEDDINGS:
            return "an embedding (targets.embeddings: true prunes it)"
        return heads.get(id(parameter))

    def _nothing(self, model: nn.Module, skipped: dict[str, str]) -> str:
        known = list(skipped)
        text = f"no tensor of {type(model).__name__} matches include={list(self.include)}, exclude={list(self.exclude)}"
        if self.include and known:
            text += f".{nearest(self.include[0], known)} Its tensors are {', '.join(known[:8])}"
            text += ", ..." if len(known) > 8 else ""
        elif known:
            text += "; left dense were " + ", ".join(f"{name}: {why}" for name, why in list(skipped.items())[:6])
        return text


def compile_regex(pattern: str, where: str) -> re.Pattern[str]:
    """Compile a regular expression of a recipe, or raise `TargetError` naming it and where it stands."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{where}: {pattern!r} is no regular expression ({error}); escape dots and brackets") from error


def plain_name(name: str) -> str:
    """Strip what wrappers put into names: ``torch.compile``, FSDP, activation checkpointing."""
    return _WRAPPERS.sub("", name)


def aliases(model: nn.Module) -> list[tuple[nn.Parameter, tuple[str, ...]]]:
    """Every parameter once, with all its plain names in order: tied weights are one parameter with several names."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        _, names = found.setdefault(id(parameter), (parameter, []))
        if plain_name(name) not in names:
            names.append(plain_name(name))
    return [(parameter, tuple(names)) for parameter, names in found.values()]


def _layer(module: nn.Module) -> str | None:
    for kind in type(module).__mro__:
        if kind.__name__ in _LAYERS:
            return kind.__name__
    return None


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, str, Layout, str]]:
    """Parameter id -> the supported layer that holds it; of a tied pair a layer that multiplies wins over an embedding."""
    owners: dict[int, tuple[nn.Module, str, Layout, str]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and _is_fused(module, parameter):
                layout = Layout(bool(module.is_transposed), int(parameter.shape[0]))
                owners[id(parameter)] = (module, attribute, layout, "Experts")
        kind = _layer(module)
        if kind is None:
            continue
        names, transposed = _LAYERS[kind]
        for attribute, parameter in module._parameters.items():
            if parameter is None or not any(re.fullmatch(name, attribute) for name in names):
                continue
            if id(parameter) not in owners or owners[id(parameter)][3] in _EMBEDDINGS:
                owners[id(parameter)] = (module, attribute, Layout(transposed), kind)
    return owners


def _is_fused(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter holds one weight of every expert, as transformers stores them since version 5."""
    return parameter.ndim == 3 and hasattr(module, "is_transposed") and getattr(module, "num_experts", 0) == parameter.shape[0]


def _heads(model: nn.Module) -> list[tuple[nn.Parameter, str]]:
    why = "the output head (targets.head: true prunes it)"
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        weight = getattr(head, "weight", None)
        if isinstance(weight, nn.Parameter):
            return [(weight, why)]
    repeated = {
        id(inner)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
        for inner in module.modules()
    }
    layers = [m for m in model.modules() if _layer(m) not in (None, *_EMBEDDINGS)]
    last = layers[-1] if len(layers) > 1 else None
    if isinstance(last, nn.Linear) and isinstance(last.weight, nn.Parameter) and id(last) not in repeated:
        return [(last.weight, why)]
    return []
