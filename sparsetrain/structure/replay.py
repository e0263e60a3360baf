"""The model run on copies of the sample, with layers that make what they are told, and features changed in some copies."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.calibration.data import mapped
from sparsetrain.errors import SparsetrainError
from sparsetrain.structure.layers import Layer
from sparsetrain.structure.recording import Call, Forward, Recorded, changed, depends, given_to, outputs_of, patched

#: What the model returns is read like a layer of this name.
OUTPUT = "the model's output"


class _Enough(BaseException):
    """All that can change has been seen."""


@dataclass(frozen=True)
class Change:
    """Features of a layer that change: ``rows`` (copies, features), bool; of one column: everything it makes.

    ``alike``: one row, for all copies, where a layer makes the same for every sample (positions).
    """

    layer: str
    rows: Tensor = field(repr=False)
    alike: bool = False


@dataclass
class Seen:
    """Reader -> (copies, features), bool: what changed in front of it; and the last place where anything did."""

    hits: dict[str, Tensor] = field(default_factory=dict)
    latest: int = 0


class World:
    """A model in which layers that multiply, and whatever nobody knows, make the same random numbers whatever they are given.

    Parameters beside the layers are random too, norms hand on what they are given, and grouped convolutions have weights of 1
    and no bias.
    So nothing depends on the weights: zeros of a model that is pruned already, or scales that begin at 0, hide nothing. What
    one world does not show (a gate that is closed), its ``mirror`` does, in which all these numbers have the other sign.

    Args:
        recorded: the model's run on one sample.
        mirror: all made numbers with the other sign.
        real: what the layers made for the sample instead of random numbers, for models that take no others.
        silent: layer -> features, bool (features,), that it makes 0.
    """

    def __init__(
        self, recorded: Recorded, mirror: bool, real: bool = False, silent: Mapping[str, Tensor] | None = None
    ) -> None:
        self.recorded = recorded
        self.silent = silent or {}
        self.sign = -1.0 if mirror else 1.0
        self.real = real
        self.calls: dict[str, list[Call]] = {name: [] for name in recorded.calls}
        self._noise: dict[tuple[str, int, int], Tensor] = {}
        self._random = torch.Generator().manual_seed(0)
        owned = {id(p) for layer in recorded.layers for p in layer.module.parameters()}
        beside = [p for p in recorded.model.parameters() if id(p) not in owned and p.is_floating_point()]
        #: What parameters are in this world.
        self._beside = {} if real else {p: self._scaled(p) for p in beside}
        self._place = 0
        self._at = ""
        self._number: Counter[str] = Counter()

        def told(layer: Layer, original: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call = self._next(layer, "nothing")
                given = [t.clone() for t in given_to(layer, args, kwargs)]
                if layer.held:
                    made = mapped(call.made, lambda t: self._told(layer, t))
                else:
                    made = original(*args, **kwargs) if layer.role == "group" else given[0]
                self.calls[layer.name].append(Call(call.place, given, made, call.given_axes, call.made_axes))
                return mapped(made, torch.clone)

            return forward

        with self._running(told):
            self.outputs = [value.clone() for value in outputs_of(recorded.run(recorded.copies(1)))]

    def _scaled(self, parameter: Tensor) -> Tensor:
        """What scales features has one sign; what multiplies them leaves their size about as it is."""
        value = _some(parameter, self._random)
        return self.sign * (value.abs() if value.ndim < 2 else value / value.shape[-1] ** 0.5)

    def _told(self, layer: Layer, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        made = self.sign * value if self.real else self.sign * _some(value, self._random)
        if layer.name in self.silent:
            features = self.silent[layer.name].nonzero().flatten().to(made.device)
            made.index_fill_(features_at(layer, made, layer.outputs), features, 0.0)
        return made

    def probe(self, change: Change, watch: Collection[str] | None = None, last: float = math.inf) -> Seen:
        """What changes with features of a layer, in each copy; only in front of ``watch``, and no further than ``last``."""
        copies = 2 if change.alike else len(change.rows)
        seen = self._go(copies, change, change.layer, watch, last, self.calls[change.layer][0].place)
        return Seen({name: hit[:1] for name, hit in seen.hits.items()}, seen.latest) if change.alike else seen

    def probe_parameter(self, parameter: nn.Parameter, name: str, dim: int, row: Tensor) -> dict[str, Tensor]:
        """Reader -> (1, features): what changes with some slices of a parameter."""
        value, shape = self._beside.get(parameter, parameter.data), [1] * parameter.ndim
        shape[dim] = -1
        moved = self.sign * _size(value) * self._uneven((name, -1, 0), value) * row.view(shape).to(value)
        known = dict(self._beside)
        self._beside[parameter] = value + moved
        try:
            return {reader: hit[:1] for reader, hit in self._go(2, None, name, None, math.inf, 0).hits.items()}
        finally:
            self._beside = known

    # -- running ----------------------------------------------------------------------------------------------------------

    def _go(
        self, copies: int, change: Change | None, cause: str, watch: Collection[str] | None, last: float, begin: int
    ) -> Seen:
        seen = Seen()

        def note(name: str, now: Tensor, then: Tensor, axis: int | None, features: int) -> None:
            if (watch is None or name in watch) and self._place > begin and then.is_floating_point() and then.numel():
                self._compare(seen, name, now, then, (axis, features, copies))

        def again(layer: Layer, original: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call = self._next(layer, cause)
                if self._place > last:
                    raise _Enough
                made = original(*args, **kwargs) if layer.role == "group" else None
                given = given_to(layer, args, kwargs)
                for at, now in enumerate(given):
                    if tuple(now.shape) != _grown(call.given[at].shape, call.given_axes[at], copies):
                        raise depends(layer.name, cause)
                if made is not None:
                    note(layer.name, made, call.made, call.made_axes[0], features_at(layer, call.made, layer.outputs))
                    return made
                for at, now in enumerate(given if layer.role != "embed" else ()):
                    name, features = (layer.name if not at else f"{layer.name} (input {at})"), _anyhow(now)
                    if layer.role in ("multiply", "scale"):
                        now, then = (_picked(layer, t) for t in (now, call.given[at]))
                        features = features_at(layer, now, layer.inputs or layer.outputs)
                        note(name, now, then, call.given_axes[at], features)
                    else:
                        note(name, now, call.given[at], call.given_axes[at], features)
                return self._made(layer, call, copies, change, given)

            return forward

        with self._running(again):
            try:
                made = outputs_of(self.recorded.run(self.recorded.copies(copies)))
            except _Enough:
                return seen
            except SparsetrainError:
                raise
            except Exception as error:  # code that counts on certain numbers may fail in any way
                raise depends(self._at, cause, f", and it stops with {type(error).__name__}: {error}") from error
        self._place += 1
        for at, (now, then) in enumerate(zip(made, self.outputs, strict=True)):
            note(f"{OUTPUT} {at}" if at else OUTPUT, now, then, self.recorded.axes[at], _anyhow(then))
        return seen

    @contextmanager
    def _running(self, how: Callable[[Layer, Forward], Forward]) -> Iterator[None]:
        self._place = 0
        self._number.clear()
        with ExitStack() as stack:
            groups = [layer.module for layer in self.recorded.layers if layer.role == "group"]
            plain = {p: torch.full_like(p.data, float(p.ndim > 1)) for module in groups for p in module.parameters()}
            for parameter, value in (self._beside | plain).items():
                stack.callback(setattr, parameter, "data", parameter.data)
                parameter.data = value
            stack.enter_context(patched(self.recorded.layers, how))
            yield

    def _next(self, layer: Layer, cause: str) -> Call:
        """What is known of this call of a layer: in this world, or, while that is made, from the model's own run."""
        number = self._number[layer.name]
        self._number[layer.name] += 1
        self._place += 1
        self._at = layer.name
        known = self.calls[layer.name] if len(self.calls[layer.name]) > number else self.recorded.calls[layer.name]
        if number >= len(known):
            raise depends(layer.name, cause)
        return known[number]

    def _made(self, layer: Layer, call: Call, copies: int, change: Change | None, given: list[Tensor]) -> Any:
        number, axes = self._number[layer.name] - 1, iter(enumerate(call.made_axes))
        if change is not None and change.layer == layer.name:
            return mapped(call.made, lambda t: self._changed(layer, t, change, copies, (number, *next(axes))))
        if not layer.held:
            return given[0].clone()
        return mapped(call.made, lambda t: repeated(t, copies, next(axes)[1]))

    def _changed(self, layer: Layer, value: Tensor, change: Change, copies: int, where: tuple[int, int, int | None]) -> Tensor:
        """What a layer makes, with its features changed in each copy."""
        number, at, axis = where
        if not value.is_floating_point():
            return repeated(value, copies, axis)
        shape = [len(change.rows)] + [1] * value.ndim
        if change.rows.shape[1] > 1 or layer.outputs == 1:
            shape[features_at(layer, value, layer.outputs) + 1] = change.rows.shape[1]
        rows = change.rows.to(value).view(shape)
        moved = value + _size(value) * self._uneven((layer.name, number, at), value) * rows
        if change.alike or axis is None:
            return repeated(moved[0], copies, axis)
        return moved.movedim(0, axis).flatten(axis, axis + 1)

    def _uneven(self, key: tuple[str, int, int], like: Tensor) -> Tensor:
        """Factors from 1 to 2 of either sign: a softmax over positions does not see what is added to all of them."""
        if key not in self._noise:
            self._noise[key] = _some(like, torch.Generator().manual_seed(0))
        return self._noise[key]

    def _compare(self, seen: Seen, name: str, now: Tensor, then: Tensor, how: tuple[int | None, int, int]) -> None:
        """Note in front of which features copies of the sample differ from it."""
        axis, features, copies = how
        each = now.unsqueeze(0) if axis is None else _apart(now, axis, copies)
        far = changed(each, then)
        hit = far.movedim(features + 1, 1).flatten(2).any(2) if far.ndim > 2 else far.reshape(len(far), -1)
        if not bool(hit.any()):
            return
        seen.latest = max(seen.latest, self._place)
        hit = hit.expand(copies, -1).cpu()
        seen.hits[name] = seen.hits[name] | hit if name in seen.hits else hit


def features_at(layer: Layer, value: Tensor, count: int) -> int:
    """Where the features of a layer are; norms of images have them behind the batch, norms of vectors at the end."""
    likely = 1 if layer.role == "scale" and re.match("Batch|Group|Instance|PReLU", type(layer.module).__name__) else layer.axis
    for axis in (likely, -1, 1):
        if -value.ndim <= axis < value.ndim and value.shape[axis] == count:
            return axis % value.ndim
    raise depends(layer.name, f"it ({tuple(value.shape)} has not its {count} features)")


def repeated(value: Tensor, copies: int, axis: int | None) -> Tensor:
    """Copies along a dimension, one after the other. Example: ``repeated(torch.eye(2), 3, 0).shape`` is (6, 2)."""
    if axis is None:
        return value.clone()
    sizes = [-1] * (value.ndim + 1)
    sizes[axis] = copies
    return value.unsqueeze(axis).expand(sizes).flatten(axis, axis + 1).contiguous()


def _apart(value: Tensor, axis: int, copies: int) -> Tensor:
    """What `repeated` put one after the other, as (copies, ...)."""
    shape = tuple(value.shape)
    return value.reshape(*shape[:axis], copies, -1, *shape[axis + 1 :]).movedim(axis, 0)


def _some(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers from 1 to 2 of either sign: far enough from 0 that it shows when an activation cuts them off."""
    noise = torch.rand(like.shape, generator=generator).mul_(2).sub_(1)
    return (noise.sign() + noise).to(like)


def _grown(shape: torch.Size, axis: int | None, copies: int) -> tuple[int, ...]:
    return tuple(size * copies if dim == axis else size for dim, size in enumerate(shape))


def _anyhow(value: Tensor) -> int:
    """Where the features of something may be that nobody knows."""
    return (1 if value.ndim == 4 else -1) % max(value.ndim, 1)


def _picked(layer: Layer, value: Tensor) -> Tensor:
    """What a layer reads of what it is given, which is not all after inputs were taken out (`pick_inputs`)."""
    picked = layer.module._buffers.get("picked")
    return value if picked is None else value.index_select(layer.axis, picked)


def _size(value: Tensor) -> float:
    """A change that everything notices."""
    finite = value[torch.isfinite(value)].abs()
    return 1 + 4 * (float(finite.max()) if finite.numel() else 0.0)
