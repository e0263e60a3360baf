"""One run of the model on one sample: what every layer was given and made, in which order, and where the samples lie in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.calibration.data import mapped, tensors_in
from sparsetrain.calibration.driver import with_forward
from sparsetrain.errors import TargetError
from sparsetrain.structure.layers import Layer

Forward = Callable[..., Any]

_DEPENDS = (
    "what the model does depends on its data, and nobody knows which features belong together; take the module in which that "
    "happens as a whole (leave_out=[its name]), or give a `run` that does without it"
)


@dataclass
class Call:
    """One call of a layer: the tensors it was given and what it made; along which dimension each has samples (None: none)."""

    place: int
    given: list[Tensor]
    made: Any
    given_axes: list[int | None] = field(default_factory=list)
    made_axes: list[int | None] = field(default_factory=list)


@dataclass
class Recorded:
    """A model that ran once: its layers that were called, in order, with their calls, and the axes of its outputs."""

    model: nn.Module
    layers: list[Layer]
    unused: list[str]
    run: Callable[[Any], Any]
    sample: Any
    calls: dict[str, list[Call]]
    axes: list[int | None]

    def copies(self, many: int) -> Any:
        """The sample so many times, along dimension 0 of each of its tensors."""
        return mapped(self.sample, lambda t: t.repeat(many, *[1] * (t.ndim - 1)) if t.ndim else t)


def record(model: nn.Module, layers: Sequence[Layer], run: Callable[[Any], Any], sample: Any) -> Recorded:
    """Run the model on a sample, and on two copies of it to see which dimension counts samples.

    Raises `TargetError` where the model stops, makes NaN, or does something else for two samples than for one, or for one
    the second time.
    """
    found = Recorded(model, list(layers), [], run, sample, {}, [])
    outputs, calls = _once(found, 1, "one sample of the batch it was given (samples are counted along dimension 0)")
    if not outputs:
        raise TargetError(
            "the model returns no tensor of numbers, so that nobody can see what it computes; give a `run` that does"
        )
    require_numbers(outputs)
    _require_alike(outputs, _once(found, 1, "the same sample the second time")[0])
    twice, doubled = _once(found, 2, "two copies of the sample (they lie along dimension 0)")
    found.axes = [_axis(a.shape, b.shape, "the model's output") for a, b in zip(outputs, twice, strict=True)]
    if all(axis is None for axis in found.axes):
        raise TargetError(
            f"the model makes {tuple(outputs[0].shape)} of one sample and of two alike: it has no dimension of samples, so "
            "that copies of a sample cannot be told apart; give a `run` that adds one, or returns all outputs, not a mean"
        )
    for name, mine in calls.items():
        others = doubled.get(name, [])
        if len(others) != len(mine):
            raise TargetError(
                f"{name or 'the model'} is called {len(mine)} times for one sample, {len(others)} for two: {_DEPENDS}"
            )
        for one, two in zip(mine, others, strict=True):
            one.given_axes = [_axis(a.shape, b.shape, name) for a, b in zip(one.given, two.given, strict=True)]
            pairs = zip(tensors_in(one.made), tensors_in(two.made), strict=True)
            one.made_axes = [_axis(a.shape, b.shape, name) for a, b in pairs]
    found.layers = [_as_used(layer, calls[layer.name]) for layer in layers if layer.name in calls]
    found.layers.sort(key=lambda layer: calls[layer.name][0].place)
    found.unused = [layer.name for layer in layers if layer.name not in calls]
    found.calls = calls
    return found


def require_numbers(outputs: Sequence[Tensor]) -> None:
    """Raise `TargetError` for NaN, which equals nothing. Example: ``require_numbers([torch.ones(2)])``."""
    if any(bool(value.isnan().any()) for value in outputs):
        raise TargetError(
            "the model makes NaN of the sample, so that nobody can compare what it computes; give a sample, and weights, of "
            "which it makes numbers"
        )


def _require_alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    alike = len(first) == len(second) and all(
        a.shape == b.shape and not (a.numel() and bool(changed(b, a).any())) for a, b in zip(first, second, strict=True)
    )
    if not alike:
        raise TargetError(
            "the model makes something else each time it is given the same sample (randomness in forward), so that nobody can "
            "see what depends on what; give a `run` that does without, e.g. decodes the mean"
        )


def changed(now: Tensor, then: Tensor) -> Tensor:
    """Where something differs by more than rounding, bool. Example: ``changed(torch.ones(2), torch.zeros(2)).all()``."""
    least = max(1e-4, 4 * torch.finfo(then.dtype).eps) * (1 + float(then.abs().max()))
    return (now - then).abs_() > least


def _once(what: Recorded, many: int, on: str) -> tuple[list[Tensor], dict[str, list[Call]]]:
    calls: dict[str, list[Call]] = {}
    place = 0

    def seen(layer: Layer, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal place
            made = original(*args, **kwargs)
            place += 1
            given = [t.clone() for t in given_to(layer, args, kwargs)]
            calls.setdefault(layer.name, []).append(Call(place, given, mapped(made, torch.clone)))
            return made

        return forward

    try:
        with patched(what.layers, seen):
            return [value.clone() for value in outputs_of(what.run(what.copies(many)))], calls
    except Exception as error:  # code that was never given so many samples may fail in any way
        raise TargetError(
            f"the model stops on {on}: {type(error).__name__}: {error}; give a batch as the model takes it, or a `run` that "
            "does"
        ) from error


def _as_used(layer: Layer, calls: Sequence[Call]) -> Layer:
    """What has one weight a feature, and yet makes something of another shape, is nothing that anybody knows."""
    if layer.role not in ("scale", "pass"):
        return layer
    alike = all(isinstance(call.made, Tensor) and call.given and call.made.shape == call.given[0].shape for call in calls)
    return layer if alike else replace(layer, role="opaque", writes=(), outputs=0)


def _axis(one: Sequence[int], two: Sequence[int], name: str) -> int | None:
    """The dimension that two samples make twice as long; None where there is none."""
    if tuple(one) == tuple(two):
        return None
    grown = [dim for dim, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    if len(one) == len(two) and len(grown) == 1 and two[grown[0]] == 2 * one[grown[0]]:
        return grown[0]
    raise TargetError(f"{name or 'the model'} has {tuple(one)} for one sample and {tuple(two)} for two of them: {_DEPENDS}")


def depends(name: str, cause: str, stops: str = "") -> TargetError:
    """What to raise where other features in one layer change the way another is called."""
    return TargetError(f"{name or 'the model'} is called otherwise when features of {cause} change{stops}: {_DEPENDS}")


def given_to(layer: Layer, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a layer reads: the first, and all of them where nobody knows what it does with them."""
    given = list(tensors_in([args, kwargs]))
    return given if layer.role == "opaque" else given[:1]


def outputs_of(made: Any) -> list[Tensor]:
    """What a model returns, of which features are outputs: its logits where it has some, else every tensor of numbers."""
    logits = getattr(made, "logits", None)
    values = [logits] if isinstance(logits, Tensor) else tensors_in(made)
    return [value for value in values if value.is_floating_point()]


@contextmanager
def patched(layers: Sequence[Layer], how: Callable[[Layer, Forward], Forward]) -> Iterator[None]:
    """Let layers do something else; those whose ``forward`` was replaced before get that back."""
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # which passes by the layers inside
        for layer in layers:
            stack.enter_context(with_forward(layer.module, how(layer, layer.module.forward)))
        yield
