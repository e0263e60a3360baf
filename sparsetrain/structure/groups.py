"""Coupled groups: which slices of which tensors live and die together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sparsetrain.errors import PatternError, TargetError, nearest

Kind = Literal["neuron", "filter", "head", "residual", "input"]


@dataclass(frozen=True)
class Slot:
    """The slices of one tensor that belong to each unit: ``index`` (units, slices a unit), int64, along ``dim``."""

    tensor: str
    dim: int
    index: Tensor = field(repr=False)
    buffer: bool = False


@dataclass(frozen=True)
class CoupledGroup:
    """Units of one kind: unit ``u`` is slice ``slot.index[u]`` of every slot, and lives or dies as a whole.

    ``name``: of the first layer that makes its features (of inputs: that reads them), with a number where a layer makes
    several kinds. ``kind``: a ``filter`` is made by a convolution; a ``head`` is several features that one layer reads, a
    ``neuron`` one; ``residual`` are features that several layers add to one after the other (what a gate makes of them, as in
    squeeze and excitation, is no addition); nobody makes an ``input``.
    ``fixed``: why no unit of it can go, empty if units can.
    """

    name: str
    kind: Kind
    units: int
    slots: tuple[Slot, ...]
    fixed: str = ""

    def slices(self, tensor: str) -> list[Slot]:
        """Its slots in one tensor. Example: ``[slot.dim for slot in group.slices("fc1.weight")]`` is ``[0]``."""
        return [slot for slot in self.slots if slot.tensor == tensor]

    def require(self, dead: Tensor) -> None:
        """Raise `PatternError` unless these units, bool (units,), can go and some are left.

        Example: ``group.require(torch.arange(group.units) < 2)``.
        """
        if dead.dtype != torch.bool or tuple(dead.shape) != (self.units,):
            raise PatternError(
                f"group {self.name} has {self.units} units, and was given {str(dead.dtype).removeprefix('torch.')} "
                f"{tuple(dead.shape)}; give bool ({self.units},), True = goes"
            )
        if self.fixed and bool(dead.any()):
            raise PatternError(f"no unit of group {self.name} can go: {self.fixed}")
        if bool(dead.all()):
            raise PatternError(
                f"all {self.units} units of group {self.name} would go, and the layer with them; keep at least one"
            )


@dataclass(frozen=True)
class Structure:
    """All coupled groups of a model.

    ``shared``: tensors that no group cuts, though features go through them, and why. ``unused``: layers that the sample never
    called, which are in no group. Tied tensors go by the name that ``named_parameters()`` gives them.
    """

    groups: tuple[CoupledGroup, ...]
    shared: dict[str, str]
    unused: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[CoupledGroup]:
        return iter(self.groups)

    def __getitem__(self, name: str) -> CoupledGroup:
        for group in self.groups:
            if group.name == name:
                return group
        known = [group.name for group in self.groups]
        few = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise TargetError(f"{name!r} is no coupled group; there are {few}.{nearest(name, known)}")

    def of_kind(self, *kinds: Kind) -> list[CoupledGroup]:
        """The groups of some kinds whose units can go. Example: ``structure.of_kind("neuron", "filter")``."""
        return [group for group in self.groups if group.kind in kinds and not group.fixed]
