"""Masks of coupled groups under the one mask manager: every tensor of a unit loses its slices in the same call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from sparsetrain.errors import PatternError, TargetError
from sparsetrain.masks import MaskManager
from sparsetrain.patterns import Pattern, Sparsity
from sparsetrain.structure.groups import CoupledGroup
from sparsetrain.targets import Layout, Matched, Target, Targets, aliases


@dataclass(frozen=True)
class Coupled(Pattern):
    """Whole slices along dimensions 0 and 1 of a tensor, as its coupled groups have lost them.

    It checks and does not choose: what goes is chosen for whole groups (`prune_units`), never for one tensor alone.
    """

    def select(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Raises `PatternError`: a tensor of a coupled group is not pruned alone."""
        raise PatternError("this tensor shares units with others and is not pruned alone; use structure.prune_units")

    def check(self, mask: Tensor, sparsity: Sparsity) -> None:
        """What is dead are whole slices along dimension 0 or 1, and as many entries as asked."""
        alive = [mask.movedim(dim, 0).reshape(mask.shape[dim], -1).any(1) for dim in range(min(mask.ndim, 2))]
        whole = alive[0].view(-1, *[1] * (mask.ndim - 1))
        if len(alive) > 1:
            whole = whole & alive[1].view(1, -1, *[1] * (mask.ndim - 2))
        if not torch.equal(whole.expand_as(mask), mask):
            entry = (whole.expand_as(mask) != mask).nonzero()[0].tolist()
            raise PatternError(f"entry {entry} is pruned, and neither slice it lies in is pruned as a whole")
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
        wanted = {slot.tensor for group in self.groups for slot in group.slots if not slot.buffer}
        owners = {f"{name}.{key}" if name else key: (m, key) for name, m in model.named_modules() for key in m._parameters}
        found, skipped = [], {}
        for _, names in aliases(model):
            if wanted & set(names):
                module, key = owners[names[0]]
                found.append(Target(names[0], names[1:], module, key, Layout()))
            else:
                skipped[names[0]] = "in no coupled group that is pruned"
        return Matched(tuple(found), skipped)


def coupled_manager(model: nn.Module, groups: Iterable[CoupledGroup]) -> MaskManager:
    """A mask manager for every parameter that these groups cut, dense at first; raises `TargetError` for none.

    Example: ``coupled_manager(net, structure.of_kind("neuron"))``.
    """
    chosen = tuple(groups)
    if not chosen:
        raise TargetError("no coupled group is left whose units can go; look at Structure.groups, whose `fixed` says why")
    return MaskManager(model, _Members(groups=chosen), Coupled())


def dead_units(manager: MaskManager, group: CoupledGroup) -> Tensor:
    """Which units of a group are pruned, bool (units,). Raises `PatternError` where its tensors do not agree."""
    found: Tensor | None = None
    for slot in group.slots:
        if slot.buffer:
            continue
        tensor = manager[slot.tensor]
        if tensor.mask is None:
            dead = torch.zeros(group.units, dtype=torch.bool)
        else:
            gone = ~tensor.mask.movedim(slot.dim, 0).reshape(tensor.mask.shape[slot.dim], -1).any(1).cpu()
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


def prune_units(
    manager: MaskManager, groups: Iterable[CoupledGroup], dead: Mapping[str, Tensor], step: int = 0, why: str = "structured"
) -> int:
    """Make these units' slices masks, in every tensor of their groups; returns how many entries died or grew.

    Args:
        manager: of `coupled_manager`, with at least these groups.
        groups: all groups that may be pruned; those that ``dead`` does not name stay as they are.
        dead: group name -> bool (units,), True = goes.

    Raises `PatternError`, nothing being changed, for a group that would die (no unit left), one whose units are fixed and a
    shape that is not ``(units,)``; `TargetError` for an unknown name.

    Example: ``prune_units(manager, structure, {"fc1": norms < 0.1})``.
    """
    known = {group.name: group for group in groups}
    for name, units in dead.items():
        if name not in known:
            raise TargetError(f"{name!r} is no coupled group; there are {', '.join(known)}")
        known[name].require(units)
    gone = {n: dead[n].cpu() if n in dead else dead_units(manager, g) for n, g in known.items() if not g.fixed}
    changed = 0
    for tensor in manager:
        shape = tuple(tensor.target.parameter.shape)
        mask = torch.ones(shape, dtype=torch.bool)
        for name, units in gone.items():
            for slot in known[name].slots:
                if slot.tensor in (tensor.name, *tensor.target.aliases):
                    mask.index_fill_(slot.dim, slot.index[units].flatten(), False)
        old = torch.ones_like(mask) if tensor.mask is None else tensor.mask.cpu()
        if torch.equal(mask, old):
            continue
        sparsity = Fraction(int((~mask).sum()), mask.numel())
        change = manager.install(tensor.name, mask.to(tensor.target.parameter.device), sparsity, step=step, why=why)
        changed += change.died + change.grew
    return changed
