"""The two things a domain leaves to the next: base weights, which are never overwritten, and statistics, which add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrain.calibration import is_finite
from sparsetrain.continual.settings import Memory
from sparsetrain.continual.store import Content, Store
from sparsetrain.criteria import Criterion, Known, StatisticsCriterion
from sparsetrain.criteria.base import wide
from sparsetrain.errors import DivergedError, MaskStateError
from sparsetrain.masks import MaskChange, MaskedTensor, MaskManager, sharding
from sparsetrain.patterns import Sparsity, exact
from sparsetrain.pruning import scores_of, solution


class Remembering:
    """Base weights and statistics of a manager's tensors, by segment.

    Args:
        manager: the masks.
        criterion: whose statistics they are.
        memory: what is remembered, and where it is kept.
    """

    def __init__(self, manager: MaskManager, criterion: Criterion, memory: Memory) -> None:
        self.manager, self.score, self.memory = manager, criterion, memory
        folder = None if memory.folder is None else Path(memory.folder)

        def store(name: str, dtype: torch.dtype | None = None, back: int = 1) -> Store:
            return Store(dtype, None if folder is None else folder / name, back)

        # Of weights two generations back are kept: a domain and the training after it make one each, and the last checkpoint
        # of a domain may be older than both.
        self.base, self.sums = store("base", back=2), store("statistics", memory.torch_dtype)
        self._before = store("before")
        #: Segment -> its tensors, as the first domain found them.
        self.segments: dict[str, list[str]] = {}
        #: Weights that died and that came back in the domain at hand, over all ranks.
        self.changed = (0, 0)
        self._touched: list[str] = []
        self._known: set[str] = set()
        self._old: dict[str, Sparsity] = {}
        self._weight, self._step, self._why = 1.0, 0, ""

    def claim(self) -> None:
        """Raise `RecipeError` if the folder is not this run's alone."""
        self.base.claim()
        self.sums.claim()

    def begin(self, weight: float, step: int, why: str) -> None:
        """A domain begins; ``weight`` of its statistics, ``step`` and ``why`` are recorded with the changes."""
        self.changed, self._touched, self._known = (0, 0), [], set(self.segments)
        self._old = {tensor.name: tensor.sparsity for tensor in self.manager}
        self._weight, self._step, self._why = weight, step, why

    @contextmanager
    @torch.no_grad()
    def unpruned(self) -> Iterator[None]:
        """The base weights in the model, inside the ``with``: data that the model makes itself (a policy that plays) is then
        made by what is pruned, not by what earlier domains have left of it. Not with ``"stasis"``, which has no base.
        """
        touched = []
        try:
            for segment in self.segments if self.memory.mode != "stasis" else ():
                parameters = {name: self.manager[name].target.parameter for name in self.segments[segment]}
                self._before.put(segment, {name: {"weight": p.detach()} for name, p in parameters.items()})
                touched.append(segment)
                for name, values in self.base.load(segment).items():
                    parameters[name].copy_(values["weight"])
            yield
        finally:
            for segment in touched:
                for name, values in self._before.load(segment, pending=True).items():
                    self.manager[name].target.parameter.copy_(values["weight"])
            self._before.discard()

    def bring_back(self, segment: str, tensors: Sequence[MaskedTensor]) -> None:
        """Write the base weights of a segment into the model; in a first domain, remember them.

        Raises `MaskStateError` if the model runs its blocks otherwise than in the first domain.
        """
        names = [tensor.name for tensor in tensors]
        way = "the data runs the model another way. Give data of the same form, or start again from the first domain"
        if self._known and segment not in self._known:
            raise MaskStateError(
                f"{segment} was not measured by itself in the first domain (but {', '.join(sorted(self._known)[:3])}, ...): "
                + way
            )
        if self.segments.setdefault(segment, names) != names:
            raise MaskStateError(f"{segment} holds other targets than in the first domain ({', '.join(names[:3])}, ...): {way}")
        there = {tensor.name: {"weight": tensor.target.parameter.detach()} for tensor in tensors}
        self._before.put(segment, {t.name: there[t.name] | ({} if t.mask is None else {"mask": t.mask}) for t in tensors})
        self._touched.append(segment)
        if self.memory.mode == "stasis":
            return
        if segment not in self.base:
            self.base.put(segment, there)
            return
        with torch.no_grad():
            for name, values in self.base.load(segment).items():
                self.manager[name].target.parameter.copy_(values["weight"])

    def choose(
        self,
        segment: str,
        tensors: Sequence[MaskedTensor],
        own: dict[str, Sparsity],
        unseen: Sequence[str] = (),
        alike: Sequence[Sequence[str]] = (),
    ) -> None:
        """Add what was measured to what is remembered, and choose the masks of a segment by it.

        ``unseen``: experts that no sample was routed to; ``alike``: names of experts that are tensors of their own.
        """
        if isinstance(self.score, StatisticsCriterion):
            found = self._settled(tensors, unseen, alike)
            fresh = {name: values for name, values in found.items() if name in unseen}
            known = {name: values for name, values in found.items() if name not in unseen}
            if self.memory.mode == "accumulate":
                known = self._added(self.sums.load(segment), known)
                self.sums.put(segment, known)
            self.score.memory = fresh | known
        died, revived = self.changed
        for tensor in tensors:
            if exact(own[tensor.name]) or tensor.mask is not None:
                change = self._prune(tensor, own[tensor.name])
                died, revived = died + change.died, revived + change.grew
        self.changed = (died, revived)

    def _settled(self, tensors: Sequence[MaskedTensor], unseen: Sequence[str], alike: Sequence[Sequence[str]]) -> Content:
        """The domain's means by tensor (and expert); what several share stays shared."""
        assert isinstance(self.score, StatisticsCriterion)
        memory = self.score.memory
        if self.score.needs == "input":  # an expert counts by how often it is used
            rows, done = {name: values["rows"] for name, values in memory.items()}, set[str]()
            totals: dict[Any, Tensor] = {}
            for names in [*([part.name for part in Known.parts(tensor)] for tensor in tensors), *alike]:
                here = [name for name in names if name in rows]
                seen = [rows[name] for name in here if name not in unseen]  # the others' are made up
                if len(here) > 1 and seen:
                    key = tuple(map(id, seen))
                    totals.setdefault(key, torch.stack(seen).sum())
                    for name in here:
                        if name not in done:
                            memory[name] = memory[name] | {"rows": totals[key]}
                    done.update(here)
        made: dict[tuple[int, ...], dict[str, Tensor]] = {}
        for values in memory.values():
            made.setdefault(_identity(values), self.score.settled(values))
        return {name: made[_identity(values)] for name, values in memory.items()}

    def _added(self, old: Content, new: Content) -> Content:
        """``decay * old + weight * new``; what only one of them knows counts 0 in the other. Shared tensors stay so."""
        made: dict[Any, dict[str, Tensor]] = {}
        found = {}
        for name in {**old, **new}:
            was, now = old.get(name, {}), new.get(name, {})
            key = (_identity(was), _identity(now))
            if key not in made:
                made[key] = {k: wide(value) * self.memory.decay for k, value in was.items()}
                for k, value in now.items():
                    added = wide(value) * self._weight
                    made[key][k] = added + made[key][k].to(added.device) if k in was else added
            found[name] = made[key]
        return found

    def _prune(self, tensor: MaskedTensor, sparsity: Sparsity) -> MaskChange:
        """A new mask from the base weights in the model, and the weights that go with it."""
        parameter = tensor.target.parameter.detach()
        alive = tensor.mask if self.memory.mode == "stasis" else None
        found = solution(tensor, self.score, sparsity, alive)
        if found is None:
            scores = ranked(scores_of(tensor, self.score, self._step), parameter, tensor.mask)
            if alive is not None:
                scores = scores.masked_fill(~alive, -torch.inf)
            mask = sharding.select(tensor.pattern, scores, tensor.target.parameter, tensor.target.layout, sparsity)
            moved = self.score.compensate(parameter.clone(), mask, name=tensor.name)
            found = (mask, parameter.clone() if moved is None else moved)
        change = self.manager.install(tensor.name, found[0], sparsity, step=self._step, why=self._why)
        self.manager.write(tensor.name, found[1])
        return change

    def commit(self) -> None:
        """The domain is done: what was put replaces what was there."""
        self.base.commit()
        self.sums.commit()
        self._before.discard()

    @torch.no_grad()
    def undo(self) -> None:
        """The domain has failed: weights and masks as they were before it, and nothing of it is remembered."""
        for segment in self._touched:
            for name, values in self._before.load(segment, pending=True).items():
                parameter = self.manager[name].target.parameter
                mask = values.get("mask")
                alive = torch.ones_like(parameter, dtype=torch.bool) if mask is None else mask.to(parameter.device)
                sparsity = 0 if mask is None else self._old[name]
                self.manager.install(name, alive, sparsity, step=self._step, why="undone")
                self.manager.write(name, values["weight"].to(parameter.device))
        for store in (self.base, self.sums, self._before):
            store.discard()
        self.segments = {name: names for name, names in self.segments.items() if name in self._known}

    @torch.no_grad()
    def absorb(self, domain: str) -> dict[str, float]:
        """Make the survivors' present values those of the base; returns tensor -> ``||new - old|| / ||old||`` of the base.

        Raises `DivergedError`, naming the ``domain`` after which they were trained, for values that are not finite.
        """
        for name in (name for names in self.segments.values() for name in names):
            if not is_finite(self.manager[name].target.parameter.detach()):
                raise DivergedError(
                    f"{name} holds NaN or infinity after training on domain {domain!r}: nothing was taken over. Take weights "
                    "from before it diverged"
                )
        drift = {}
        for segment in self.segments if self.memory.mode != "stasis" else ():
            content = {}
            for name, values in self.base.load(segment).items():
                tensor, old = self.manager[name], values["weight"]
                now = tensor.target.parameter.detach().to(old.device)
                new = now if tensor.mask is None else torch.where(tensor.mask.to(old.device), now, old)
                content[name] = {"weight": new}
                drift[name] = float((new - old).norm() / old.norm().clamp_min(torch.finfo(old.dtype).tiny))
            self.base.put(segment, content)
        self.base.commit()
        return drift

    def state_dict(self) -> dict[str, Any]:
        """Everything, or where its files are."""
        return {"segments": dict(self.segments), "base": self.base.state_dict(), "sums": self.sums.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.segments = {name: list(names) for name, names in state["segments"].items()}
        self.base.load_state_dict(state["base"])
        self.sums.load_state_dict(state["sums"])


def ranked(scores: Tensor, weight: Tensor, alive: Tensor | None) -> Tensor:
    """Scores whose zeros are told apart: those alive before first, then by magnitude; all below every positive score.

    Example: ``ranked(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([1.0, 9.0, 2.0]), None)`` ranks entry 0 lowest.
    """
    nothing = scores == 0
    if not bool(nothing.any()) or bool((scores < 0).any()):
        return scores
    size = weight.abs().to(scores)
    order = size / (size.max() * 2).clamp_min(torch.finfo(scores.dtype).tiny) - 2
    order = order + (0.0 if alive is None else alive.to(scores))
    return torch.where(nothing, order, scores)


def _identity(values: dict[str, Tensor]) -> tuple[int, ...]:
    return tuple(id(tensor) for tensor in values.values())
