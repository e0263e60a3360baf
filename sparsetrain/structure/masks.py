"""Masks of coupled groups under the one mask manager: every tensor of a unit loses its slices in the same call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from sparsetrain.errors import PatternError, TargetError, nearest
from sparsetrain.masks import MaskManager, sharding
from sparsetrain.patterns import Pattern, Sparsity
from sparsetrain.structure.cutting import inner
from sparsetrain.structure.groups import CoupledGroup, Slot
from sparsetrain.targets import Layout, Matched, Target, Targets, aliases, plain_name


@dataclass(frozen=True)
class Coupled(Pattern):
    """Whole slices along the dimensions of a tensor, as its coupled groups have lost them.

    It checks and does not choose: what goes is chosen for whole groups (`prune_units`), never for one tensor alone.
    """

    def select(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Raises `PatternError`: a tensor of a coupled group is not pruned alone."""
        raise PatternError("this tensor shares units with others and is not pruned alone; use structure.prune_units")

    def check(self, mask: Tensor, sparsity: Sparsity) -> None:
        """What is dead are whole slices along some dimension, and as many entries as asked."""
        whole = torch.ones_like(mask)
        for dim, size in enumerate(mask.shape):
            alive = mask.movedim(dim, 0).reshape(size, -1).any(1)
            whole &= alive.view(-1, *[1] * (mask.ndim - 1 - dim))
        if not torch.equal(whole, mask):
            entry = (whole != mask).nonzero()[0].tolist()
            raise PatternError(f"entry {entry} is pruned, and no slice it lies in is pruned as a whole")
        dead, asked = int((~mask).sum()), Fraction(sparsity) * mask.numel()
        if dead != asked:
            raise PatternError(f"{dead} of {mask.numel()} entries are pruned, {float(asked):g} were asked")

    def validate(self, shape: tuple[int, ...], sparsity: Sparsity) -> None:
        """Any share will do."""

    def pruned(self, shape: tuple[int, ...], sparsity: Sparsity) -> int:
        """How many entries go."""
        return math.floor(Fraction(sparsity) * math.prod(shape))

    def __str__(self) -> str:
        return "coupled"


@dataclass(frozen=True)
class _Members(Targets):
    """The parameters that coupled groups cut, biases and norms too."""

    groups: tuple[CoupledGroup, ...] = ()

    def match(self, model: nn.Module) -> Matched:
        wanted: dict[str, list[Slot]] = {}
        for slot in (slot for group in self.groups for slot in group.slots if not slot.buffer):
            wanted.setdefault(plain_name(slot.tensor), []).append(slot)
        owners = {plain_name(_of(name, key)): (m, key) for name, m in model.named_modules() for key in m._parameters}
        found, skipped = [], {}
        for parameter, names in aliases(model):
            slots = [slot for name in names for slot in wanted.pop(name, [])]
            if not slots:
                skipped[names[0]] = "in no coupled group that is pruned"
                continue
            for slot in slots:
                _require_slices(parameter.shape, slot)
            module, key = owners[names[0]]
            found.append(Target(names[0], names[1:], module, key, Layout()))
        if wanted:
            few = ", ".join(list(wanted)[:4]) + (", ..." if len(wanted) > 4 else "")
            raise TargetError(
                f"the coupled groups cut {few}, which {type(model).__name__} has not; use find_structure on this model"
            )
        return Matched(tuple(found), skipped)


def _require_slices(shape: Sequence[int], slot: Slot) -> None:
    if len(shape) <= slot.dim or shape[slot.dim] <= int(slot.index.max()):
        raise TargetError(
            f"{slot.tensor} has shape {tuple(shape)}, and a coupled group slice {int(slot.index.max())} of its dimension "
            f"{slot.dim}: the groups are of another model, or of this one before it was compacted; use find_structure on it"
        )


def _of(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


class CoupledManager(MaskManager):
    """A mask manager for every parameter that some coupled groups cut; made by `coupled_manager`.

    Units of these groups are pruned by `prune_units`, and what else a `MaskManager` does it does too.
    """

    #: All groups it may prune, by name.
    groups: dict[str, CoupledGroup]


def coupled_manager(model: nn.Module, groups: Iterable[CoupledGroup]) -> CoupledManager:
    """A mask manager for every parameter that these groups cut, dense at first.

    Args:
        model: in which `find_structure` found the groups, wrapped (compiled, DDP, an averaged copy) or not.
        groups: all that may be pruned.

    Raises `TargetError` for no groups, and for groups that cut what the model has not.

    Example: ``coupled_manager(net, structure.of_kind("neuron"))``.
    """
    chosen = tuple(groups)
    if not chosen:
        raise TargetError("no coupled group is left whose units can go; look at Structure.groups, whose `fixed` says why")
    manager = CoupledManager(inner(model), _Members(groups=chosen), Coupled())
    manager.groups = {group.name: group for group in chosen}
    return manager


def dead_units(manager: MaskManager, group: CoupledGroup) -> Tensor:
    """Which units of a group are pruned, bool (units,). Raises `PatternError` where its tensors do not agree.

    Example: ``int(dead_units(manager, manager.groups["fc1"]).sum())``.
    """
    found: Tensor | None = None
    for slot in group.slots:
        if slot.buffer:
            continue
        tensor = manager[slot.tensor]
        _require_slices(tensor.fitting().shape, slot)
        mask = tensor.full_mask()
        gone = ~mask.movedim(slot.dim, 0).reshape(mask.shape[slot.dim], -1).any(1).cpu()
        dead = gone[slot.index].all(1)
        torn = gone[slot.index].any(1) & ~dead
        if bool(torn.any()):
            raise PatternError(f"unit {int(torn.nonzero()[0])} of group {group.name} is pruned in part in {slot.tensor}")
        if found is not None and not torch.equal(found, dead):
            unit = int((found != dead).nonzero()[0])
            raise PatternError(
                f"unit {unit} of group {group.name} is pruned in {slot.tensor} and not in others, or the other way round: "
                "masks of coupled tensors conflict; prune whole units (prune_units)"
            )
        found = dead
    assert found is not None
    return found


def prune_units(manager: CoupledManager, dead: Mapping[str, Tensor], step: int = 0, why: str = "structured") -> int:
    """Make these units' slices masks, in every tensor of their groups; returns how many entries died or grew.

    Args:
        manager: of `coupled_manager`.
        dead: group name -> bool (units,), True = goes; groups that it does not name stay as they are.
        step: when, for the manager's record of changes.
        why: what for, for that record.

    Raises, nothing being changed, `PatternError` for a group that would die (no unit left), one whose units are fixed and a
    shape that is not ``(units,)``; `TargetError` for a name that is no group of the manager, and for a model that was
    compacted under it.

    Example: ``prune_units(manager, {"fc1": norms < 0.1})``.
    """
    for name, units in dead.items():
        if name not in manager.groups:
            few = ", ".join(list(manager.groups)[:8]) + (", ..." if len(manager.groups) > 8 else "")
            raise TargetError(f"{name!r} is no group of this manager; there are {few}.{nearest(name, manager.groups)}")
        manager.groups[name].require(units)
    masks = {tensor.name: torch.ones(tensor.fitting().shape, dtype=torch.bool) for tensor in manager}
    for name, group in manager.groups.items():
        units = dead[name].cpu() if name in dead else dead_units(manager, group)
        for slot in group.slots:
            if not slot.buffer:
                mask = masks[manager[slot.tensor].name]
                _require_slices(mask.shape, slot)
                mask.index_fill_(slot.dim, slot.index[units].flatten(), False)
    ready = []
    for name, mask in masks.items():
        tensor, sparsity = manager[name], Fraction(int((~mask).sum()), mask.numel())
        tensor.pattern.check(mask, sparsity)
        old = tensor.full_mask()
        if not torch.equal(mask.to(old.device), old):
            ready.append((name, sharding.take_local(mask.to(old.device), tensor.target.parameter), sparsity))
    changes = [manager.install(name, mask, sparsity, step=step, why=why) for name, mask, sparsity in ready]
    return sum(change.died + change.grew for change in changes)
