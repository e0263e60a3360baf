"""What layers are given and give, shown to a criterion while the model runs.

Layers that are given the very same tensor in a forward pass (query, key and value; gate and up) are measured once and share
their statistics: a criterion of inputs takes nothing else from what it is shown. Experts that are fused into one tensor
``(experts, out, in)`` are measured one by one, as the products with their slices happen. An expert that is given nothing counts
as an average one: it is pruned by magnitude.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.calibration.data import tensors_in
from sparsetrain.calibration.experts import Products
from sparsetrain.calibration.rest import agree, is_finite, ranks, sum_over_ranks
from sparsetrain.criteria import Known, Seen, StatisticsCriterion
from sparsetrain.criteria.base import wide
from sparsetrain.errors import DataError, DivergedError, RecipeError, SparsetrainError, TargetError
from sparsetrain.masks.tensor import MaskedTensor

#: Layers that multiply what they are given, by name as `Targets` knows them.
_MULTIPLY = frozenset({"Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D"})


class Reached(BaseException):
    """The model has run as far as it is needed; not an error, and no ``except Exception`` of a model may stop it."""

    def __init__(self, result: Any = None) -> None:
        super().__init__()
        self.result = result


class NotShared(Exception):
    """Layers that were given one tensor once are given different ones now: each must be measured for itself."""


def require_visible(model: nn.Module, tensors: Sequence[MaskedTensor], criterion: StatisticsCriterion) -> None:
    """Raise `RecipeError` naming the first tensor whose input cannot be seen, where the criterion needs it."""
    if criterion.needs != "input":
        return
    inside = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for tensor in tensors:
        module = tensor.target.module
        kind = type(inside.get(id(module), module)).__name__
        multiplies = any(base.__name__ in _MULTIPLY for base in type(module).__mro__) or tensor.target.layout.experts
        if id(module) in inside or not multiplies:
            raise RecipeError(
                f"{tensor.name}: criterion {type(criterion).__name__} needs what a weight is multiplied by, which {kind} does "
                "not show; leave it out (targets.exclude), or use criterion 'magnitude'"
            )


class LayerWatch:
    """Shows a criterion the inputs (or outputs) of layers.

    Args:
        tensors: whose layers.
        criterion: ``needs`` says what is shown, ``"input"`` or ``"output"``.
        share: measure layers that are given the very same tensor once.
        alike: names of experts that are tensors of their own; see `calibration.siblings`.

    ``with watch.on(): ...`` installs it; `forward` goes around every forward pass; `finish` ends it. Example::

        watch = LayerWatch(list(manager), criterion)
        with watch.on():
            with watch.forward("batch 0"):
                model(x)
        watch.finish(criterion)
    """

    def __init__(
        self,
        tensors: Sequence[MaskedTensor],
        criterion: StatisticsCriterion,
        share: bool = True,
        alike: Iterable[Sequence[str]] = (),
    ) -> None:
        self.tensors = list(tensors)
        self.criterion = criterion
        self.share = share and criterion.needs == "input" and not criterion.of_weights
        self.parts = {t.name: criterion.parts(t) for t in tensors}
        groups = [parts for parts in self.parts.values() if len(parts) > 1]
        groups += [[self.parts[name][0] for name in names if name in self.parts] for names in alike]
        #: Experts of which one may stand for another.
        self.groups = groups if criterion.needs == "input" else []
        #: Who is measured for whom.
        self.leader: dict[str, str] = {}
        self.expected: Counter[str] | None = None
        self._calls: Counter[str] = Counter()
        #: What layers were given in this pass: the tensor, what version of it, and who was measured on it.
        self._live: list[tuple[weakref.ref[Tensor], int, str]] = []
        self._silent = {part.name for parts in self.parts.values() for part in parts}
        #: Where there are experts: the squared mean of ``|x|`` over features, summed over all that a layer was given.
        self._power: dict[str, float] = {}
        self._where = ""
        self._stop = False

    # -- while the model runs ---------------------------------------------------------------------------------------------

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hooks on every layer, and eyes on the products of fused experts."""
        needs_input = self.criterion.needs == "input"
        with ExitStack() as stack:
            for tensor in self.tensors:
                module = tensor.target.module
                if tensor.target.layout.experts and needs_input:
                    continue
                if needs_input and not self.criterion.of_weights:
                    handle = module.register_forward_pre_hook(self._before(tensor), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(self._after(tensor), with_kwargs=True)
                stack.callback(handle.remove)
            fused = [t for t in self.tensors if t.target.layout.experts] if needs_input else []
            if fused:
                stack.enter_context(Products(fused, self._see_expert))
            yield

    @contextmanager
    def forward(self, where: str, stop: bool = False) -> Iterator[None]:
        """Around one forward pass; ``stop`` ends it (by `Reached`) once every layer has been called, if the first pass called
        each of them once; where it did not, nobody knows which call is the last.

        Raises `DivergedError` for values that are not finite, `NotShared` where layers go different ways.
        """
        self._calls, self._live, self._where = Counter(), [], where
        once = Counter(part.name for parts in self.parts.values() for part in parts)
        self._stop = stop and self.expected == once
        try:
            yield
        finally:
            self._live = []
        self._settle()

    def _settle(self) -> None:
        if self.expected is None:
            self.expected = Counter(self._calls)
        for name, leader in self.leader.items():
            if self._calls[name] != self._calls[leader]:
                raise NotShared

    def _before(self, tensor: MaskedTensor) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = next(tensors_in([args, kwargs]), None)
            if given is not None:
                self._see(self.parts[tensor.name][0], given)

        return hook

    def _after(self, tensor: MaskedTensor) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given, made = next(tensors_in([args, kwargs]), None), next(tensors_in(output))
            if self.criterion.needs == "output":
                self._see(self.parts[tensor.name][0], made)
            elif given is not None:
                self._see(self.parts[tensor.name][0], given, made)

        return hook

    def _see_expert(self, tensor: MaskedTensor, index: int, given: Tensor) -> None:
        part = self.parts[tensor.name][index]
        if given.numel():
            self._calls[part.name] += 1
            self.leader[part.name] = part.name
            self._observe(part, given)

    def _see(self, known: Known, values: Tensor, output: Tensor | None = None) -> None:
        name = known.name
        self._calls[name] += 1
        now = _version(values)
        same = next((who for ref, then, who in self._live if ref() is values and then == now), None) if self.share else None
        if name not in self.leader:
            # Only who has been there from the first time on may be measured for another.
            fresh = same is not None and self._calls[same] == self._calls[name] == 1 and same not in (self.expected or ())
            self.leader[name] = same if same is not None and fresh and self._fits(known, same) else name
        leader = self.leader[name]
        if leader == name:
            self._observe(known, values, output)
            if now is not None:
                self._live.append((weakref.ref(values), now, name))
        elif same != leader:
            raise NotShared
        if self._stop and self.expected is not None and all(self._calls[n] >= c for n, c in self.expected.items()):
            raise Reached

    def _fits(self, known: Known, leader: str) -> bool:
        other = self.parts[leader][0]
        mine, its = known.view(known.parameter), other.view(other.parameter)
        return type(known.module) is type(other.module) and mine.ndim == its.ndim == 2 and mine.shape[1] == its.shape[1]

    def _observe(self, known: Known, values: Tensor, output: Tensor | None = None) -> None:
        what = self.criterion.needs
        if not values.numel():
            return
        if not is_finite(values):
            raise DivergedError(
                f"calibration: the {what} of {known.name} is not finite in {self._where}; find what diverged, or what is wrong "
                "with that batch"
            )
        if known.name in self._silent and bool(values.any()):
            self._silent.discard(known.name)
        if self.groups:
            now = float(wide(values).abs().mean(-1).square().sum())  # not of squares: one outlier feature is not usual
            self._power[known.name] = self._power.get(known.name, 0.0) + now
        seen = {what: values.detach()} | ({} if output is None else {"output": output.detach()})
        with torch.autocast(values.device.type, enabled=False):  # whatever the model runs in, sums are wide
            self.criterion.observe(Seen(known, known.parameter.detach(), **seen))

    # -- at the end -------------------------------------------------------------------------------------------------------

    def finish(self, problem: SparsetrainError | None = None) -> list[str]:
        """Add up over ranks, give every layer its statistics; returns the names of experts that were given nothing.

        Those rank by magnitude: as if they had seen, in every input alike, what the other experts saw on average.

        Raises `TargetError` for a layer that no batch used, `DataError` where all inputs of a layer are zero, and on every
        rank the ``problem`` that one of them has.
        """
        if problem is None:
            self.criterion.finish()
        leaders = agree(problem, self.leader)
        parts = {part.name: part for tensor in self.parts.values() for part in tensor}
        # What was measured for another counts for that one too, also where other ranks measured them apart.
        by = {name: self.leader.get(name, name) for name in parts}
        power = {name: self._power[by[name]] for name in parts if by[name] in self._power}
        everyone = agree(None, ({name for name in parts if by[name] in self._silent}, power))
        silent = set.intersection(*(names for names, _ in everyone))
        memory = self.criterion.memory
        if any(other != self.leader for other in leaders):
            for name, leader in self.leader.items():
                if name != leader and leader in memory:
                    memory[name] = {key: value.clone() for key, value in memory[leader].items()}
        if ranks() > 1:
            sum_over_ranks(self.criterion, only=parts)
        for name, leader in self.leader.items():
            if name not in memory and leader in memory:
                memory[name] = dict(memory[leader])
        if self.criterion.needs != "input":
            return []
        seen = {name for name in parts if name in memory}
        for name in (name for name in parts if name in seen & silent):
            raise DataError(
                f"all inputs of {name} are zero in the calibration data: nothing tells its weights apart; give other data, "
                "leave it out (targets.exclude), or use criterion 'magnitude'"
            )
        for group in self.groups:
            known = [part.name for part in group if part.name in seen]
            idle = [part for part in group if part.name not in memory] if known else []  # of none seen `require_seen` tells
            total = sum(found.get(name, 0.0) for name in known for _, found in everyone)
            for part in idle:
                eye = torch.eye(part.view(part.parameter).shape[1], device=part.parameter.device)
                self.criterion.observe(Seen(part, part.parameter.detach(), input=math.sqrt(total / len(known)) * eye))
        idle_names = [name for name in parts if name in memory and name not in seen]
        if idle_names:
            self.criterion.finish()
        return idle_names


def require_seen(criterion: StatisticsCriterion, tensors: Sequence[MaskedTensor]) -> None:
    """Raise `TargetError` for a tensor that no batch used."""
    for tensor in tensors:
        if not all(part.name in criterion.memory for part in criterion.parts(tensor)):
            raise TargetError(
                f"criterion {type(criterion).__name__} cannot score {tensor.name}: no batch used its layer; leave it out "
                "(targets.exclude), or use criterion 'magnitude'"
            )


def _version(values: Tensor) -> int | None:
    """How often a tensor was written to in place; None if nobody counts."""
    return None if values.is_inference() else values._version
