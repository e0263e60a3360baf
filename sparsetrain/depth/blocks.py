"""Residual blocks: found by what they do, bypassed, ranked by what bypassing costs.

A residual block computes ``x + f(x)`` (often with a norm or a ReLU after it), so a network without it still makes sense: the
block hands its input through. Found are blocks whatever their class: neighbours of the same class in a ``Sequential`` or
``ModuleList`` whose output has the shape and dtype of their input, and still depends on it when all their matrices are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsetrain.errors import DivergedError, TargetError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Block:
    """A residual block: its name in the model, and how many outputs it returns as a tuple (0: one tensor)."""

    name: str
    outputs: int = 0


def find_blocks(model: nn.Module, run: Callable[[], Any]) -> list[Block]:
    """The outermost residual blocks of a model, in its order.

    ``run`` is a forward pass; candidates get random inputs and have zero matrices meanwhile, so its result means nothing.
    Example: ``find_blocks(net, lambda: net(images))``.
    """
    candidates: dict[str, nn.Module] = {}
    for name, container in model.named_modules():
        for key, child in container.named_children() if isinstance(container, _CONTAINERS[:2]) else ():
            alike = sum(type(other) is type(child) for other in container.children()) > 1
            if alike and not isinstance(child, _CONTAINERS) and any(child.children()):
                candidates[f"{name}.{key}" if name else key] = child
    calls: dict[str, list[int | None]] = {name: [] for name in candidates}
    handles = [handle for name, module in candidates.items() for handle in _probe(module, calls[name])]
    try:
        with _zeroed(p for module in candidates.values() for p in module.parameters() if p.ndim > 1), torch.enable_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    found = {name: set(verdicts) for name, verdicts in calls.items()}
    blocks = [Block(name, next(iter(kinds)) or 0) for name, kinds in found.items() if len(kinds) == 1 and None not in kinds]
    return [b for b in blocks if not any(b.name.startswith(f"{outer.name}.") for outer in blocks)]


def _probe(module: nn.Module, calls: list[int | None]) -> list[RemovableHandle]:
    """Note for every call of a module how many outputs it returns if it is a residual block (0: a tensor), else None."""
    given: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _stream(args, kwargs)
        if x is None or not x.is_floating_point():
            return given.append(None)
        base = x if x.requires_grad else x.detach().requires_grad_()
        given.append(base)
        # Any positive value will do; what comes from blocks before may be zero, where a ReLU has no slope.
        own = base + (_positive(x) - base).detach()
        return tuple(own if a is x else a for a in args), {k: own if v is x else v for k, v in kwargs.items()}

    def after(_: nn.Module, args: Any, output: Any) -> None:
        calls.append(_outputs(given.pop(), output))

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]


def _outputs(x: Tensor | None, output: Any) -> int | None:
    several = isinstance(output, tuple)
    y = output[0] if several and output else output
    if x is None or not isinstance(y, Tensor) or (y.shape, y.dtype) != (x.shape, x.dtype) or not y.requires_grad:
        return None
    if several and any(value is not None for value in output[1:]):  # somebody may use them
        return None
    # Weighted: the plain sum of a layer norm's outputs does not depend on its input.
    slope = torch.autograd.grad((y * _positive(y)).sum(), x, retain_graph=True, allow_unused=True)[0]
    return None if slope is None or not bool(slope.any()) else len(output) if several else 0


@contextmanager
def _zeroed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    kept = {id(p): (p, p.data) for p in parameters}
    try:
        for parameter, values in kept.values():
            parameter.data = torch.zeros_like(values)
        yield
    finally:
        for parameter, values in kept.values():
            parameter.data = values


def _positive(like: Tensor) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


def _stream(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """What flows through a block: the first tensor it is given."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _through(outputs: int, *args: Any, **kwargs: Any) -> Any:
    x = _stream(args, kwargs)
    return (x, *[None] * (outputs - 1)) if outputs else x


class PassThrough(nn.Module):
    """In the place of a removed block: returns its input as the block would. Example: ``PassThrough()(x) is x``."""

    def __init__(self, outputs: int = 0) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor given."""
        return _through(self.outputs, *args, **kwargs)


def install_bypass(model: nn.Module, blocks: Iterable[Block]) -> list[nn.Module]:
    """Let blocks hand their input through, parameters untouched (they get no gradients); returns those that did not yet.

    Example: ``install_bypass(net, [Block("layer1.1")])``.
    """
    fresh = {model.get_submodule(b.name): b for b in blocks if "forward" not in vars(model.get_submodule(b.name))}
    for module, block in fresh.items():
        module.forward = partial(_through, block.outputs)
    return list(fresh)


@contextmanager
def bypass(model: nn.Module, blocks: Iterable[Block]) -> Iterator[None]:
    """Blocks hand their input through inside the ``with``; those that did before still do after it.

    Example: ``with bypass(net, [Block("layer1.1")]): loss = evaluate()``.
    """
    fresh = install_bypass(model, blocks)
    try:
        yield
    finally:
        for module in fresh:
            del module.forward


def sensitivity(model: nn.Module, blocks: Iterable[Block], evaluate: Callable[[], float]) -> dict[str, float]:
    """Name -> by how much ``evaluate()`` (a loss) rises when that block alone is bypassed; infinite for a loss that then is.

    Raises `DivergedError` for a loss that is not finite at all. Example: ``sensitivity(net, blocks, lambda: float(net(x)))``.
    """
    before, found = evaluate(), {}
    if not math.isfinite(before):
        raise DivergedError(f"the loss is {before} before any block is bypassed: nothing can be compared")
    for block in blocks:
        with bypass(model, [block]):
            after = evaluate()
        found[block.name] = after - before if math.isfinite(after) else math.inf
    return found


def choose(
    model: nn.Module, blocks: Sequence[Block], count: int, evaluate: Callable[[], float], greedy: bool = True
) -> dict[str, float]:
    """The ``count`` least important blocks in the order they go, each with its sensitivity; of equals the earlier first.

    ``greedy`` measures anew after each, with those chosen bypassed (count times as many evaluations), else once. Raises
    `TargetError` if there are not more blocks than ``count``.

    Example: ``choose(net, find_blocks(net, run), 2, evaluate)``.
    """
    if not 0 < count < len(blocks):
        names = ", ".join(block.name for block in blocks) or "none"
        raise TargetError(f"{count} residual blocks are to go, found are {len(blocks)} ({names}); at least one must stay")
    chosen: dict[str, float] = {}
    while len(chosen) < count:
        with bypass(model, [b for b in blocks if b.name in chosen]):
            measured = sensitivity(model, [b for b in blocks if b.name not in chosen], evaluate)
        order = sorted(measured, key=lambda name: measured[name])
        chosen |= {name: measured[name] for name in order[: 1 if greedy else count]}
    return chosen
