"""Compaction: pruned units are taken out of every tensor, and of everything that is kept beside it.

Parameters stay the same objects with fewer entries, so that optimizers, schedules of the learning rate and hooks keep theirs;
their gradients, and what optimizers and averaged copies remember of each entry, are cut the same way. Layers that read inputs
of the model, some of which are gone, pick the others themselves. What modules know of their sizes is set anew (`sizes`). The
compact model then computes what the masked one did, or everything is put back.

Masks are not cut: detach the mask manager before (``manager.detach()``), and make a new one for what is to be pruned after.
Buffers aside, what goes has to be zero, in the model and in averaged copies: comparing outputs of one sample would not show
all (a neuron that its activation cuts off there).
Adafactor limits and scales updates by means over whole tensors, which are others without their zeros: it trains on a little
differently than it would have on the masked model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.calibration import at_rest, runner
from sparsetrain.calibration.data import first_sample
from sparsetrain.errors import PatternError, TargetError
from sparsetrain.masks import sharding
from sparsetrain.structure.cutting import Undo, all_tensors, cut_tensors, inner, put_back, set_size
from sparsetrain.structure.groups import Slot, Structure
from sparsetrain.structure.picking import all_inputs, can_pick, pick_inputs
from sparsetrain.structure.recording import outputs_of, require_numbers
from sparsetrain.structure.sizes import Unsettled, settle_sizes


@dataclass
class Compacted:
    """What was taken out, and all that it takes to take it out of a model built anew (`compact_again`).

    ``before``, ``after``: parameters; ``units``: group -> (left, of). ``difference``: the greatest absolute difference between
    outputs of the masked and the compact model on the sample, and ``scale`` the greatest absolute output. ``kept``: tensor ->
    dimension -> slices; ``picked``: layer -> inputs; ``sizes``: module -> attribute -> value.
    """

    before: int = 0
    after: int = 0
    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    difference: float = 0.0
    scale: float = 0.0
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict, repr=False)
    picked: dict[str, Tensor] = field(default_factory=dict, repr=False)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)


def compact(
    model: nn.Module,
    structure: Structure,
    dead: Mapping[str, Tensor],
    sample: Any,
    *,
    run: Callable[[Any], Any] | None = None,
    optimizers: Iterable[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    tolerance: float = 1e-4,
) -> Compacted:
    """Take pruned units out of a model, in place. A mask manager that is attached has to be detached before.

    Args:
        model: with the pruned units' slices exactly zero in every parameter (`prune_units`).
        structure: of `find_structure` on this model, as it is now.
        dead: group name -> bool (units,), True = goes.
        sample: a batch, to compare on its first sample.
        run: gives a batch to the model; by default a mapping by name, of a tuple the first entry, a tensor as it is.
        optimizers: whose memory is cut along.
        copies: averaged models of the same parameter names, with the same zeros (``manager.follow``), cut along.
        tolerance: how far outputs may move, relative to the greatest output; at least four units of their rounding.

    Raises, model and all else as before: `PatternError` for a group that would die or is fixed, for slices that are not zero
    in the model or a copy, and where the compact model computes something else; `TargetError` for optimizers whose memory
    nobody can cut, a structure of another model, a copy of another model, outputs with NaN and a sharded model (FSDP2).

    Example: ``compact(net, structure, {"fc1": dead}, images, optimizers=[optimizer])``.
    """
    undo: Undo = []
    try:
        return take_out(model, structure, dead, sample, run, (optimizers, copies), tolerance, undo)
    except Unsettled as problem:
        put_back(undo)
        raise PatternError(
            f"without the pruned units the model computes something else than with them masked: {problem}. Leave the groups "
            "out in which this happens, or keep the model masked"
        ) from problem
    except BaseException:
        put_back(undo)
        raise


def take_out(
    model: nn.Module,
    structure: Structure,
    dead: Mapping[str, Tensor],
    sample: Any,
    run: Callable[[Any], Any] | None,
    beside: tuple[Iterable[Any], Iterable[Any]],
    tolerance: float,
    undo: Undo,
) -> Compacted:
    """`compact`, which leaves it to the caller to put back what went wrong (or was a trial); raises `Unsettled` too."""
    model = inner(model)
    call, given = run or runner(model), first_sample(sample)
    result = Compacted(before=sum(p.numel() for p in model.parameters()))
    result.kept, result.picked = _plan(model, structure, dead)
    optimizers, copies = (list(some) for some in beside)
    _require_zero(model, structure, dead, "the model")
    for copy in copies:
        require_same(copy, result, f"the copy ({type(copy).__name__})")
        _require_zero(inner(copy), structure, dead, f"the copy ({type(copy).__name__})")

    def outputs() -> list[Tensor]:
        with at_rest(model, [], gradients=False):
            return [value.clone() for value in outputs_of(call(given))]

    def difference() -> float:
        found = outputs()
        if [v.shape for v in found] != [v.shape for v in expected]:
            return float("inf")
        return max(_greatest((a - b).masked_fill(a == b, 0.0)) for a, b in zip(found, expected, strict=True))

    expected = outputs()
    if not expected:
        raise TargetError("the model returns no tensor of numbers that could be compared; give a `run` that does")
    require_numbers(expected)
    result.scale = max(_greatest(value[torch.isfinite(value)]) for value in expected)
    rounding = max(torch.finfo(value.dtype).eps for value in expected)
    _shrink(model, result, undo, optimizers)
    allowed = max(tolerance, 4 * rounding) * max(result.scale, 1e-12)
    result.difference, result.sizes = settle_sizes(model, structure, dead, difference, allowed, undo)
    for copy in copies:
        _shrink(copy, result, undo)
    result.after = sum(p.numel() for p in model.parameters())
    result.units = {g.name: (g.units - int(dead[g.name].sum()), g.units) for g in structure if g.name in dead}
    return result


def compact_again(model: nn.Module, compacted: Compacted, optimizers: Iterable[Optimizer] = ()) -> None:
    """Take the same slices out of a model built anew, so that weights saved after `compact` fit it.

    Its own weights need not be zero there: they are about to be replaced.
    Raises `TargetError`, nothing being changed, for a tensor that is not there or smaller.
    Example: ``compact_again(net, saved)``.
    """
    require_same(model, compacted, "this model")
    undo: Undo = []
    try:
        _shrink(model, compacted, undo, optimizers)
    except BaseException:
        put_back(undo)
        raise


def remaining(structure: Structure, dead: Mapping[str, Tensor], compacted: Compacted) -> Structure:
    """The structure of the compact model: the units that are left, under the names they had, as its tensors number them.

    Args:
        structure: of the model before.
        dead: what was taken out, as `compact` was given it.
        compacted: what `compact` returned.

    Example: ``remaining(structure, {"fc1": dead}, compact(net, structure, {"fc1": dead}, images))``.
    """
    places: dict[tuple[str, int], Tensor] = {}
    for name, dims in compacted.kept.items():
        for dim, index in dims.items():
            place = torch.zeros(int(index.max()) + 1, dtype=torch.int64)
            place[index.cpu()] = torch.arange(len(index))
            places[name, dim] = place

    def renumbered(slot: Slot, alive: Tensor) -> Slot:
        place = places.get((slot.tensor, slot.dim))
        index = slot.index[alive]
        return replace(slot, index=index if place is None else place[index])

    groups = []
    for group in structure:
        alive = ~dead[group.name].cpu() if group.name in dead else torch.ones(group.units, dtype=torch.bool)
        slots = tuple(renumbered(slot, alive) for slot in group.slots)
        one = "it has one unit, and the layer would go with it" if int(alive.sum()) == 1 else ""
        groups.append(replace(group, units=int(alive.sum()), slots=slots, fixed=group.fixed or one))
    return replace(structure, groups=tuple(groups))


def require_same(model: nn.Module, compacted: Compacted, what: str) -> None:
    """Raise `TargetError` where a model has not the tensors that are cut."""
    tensors = all_tensors(inner(model))
    for name, dims in compacted.kept.items():
        for dim, index in dims.items():
            if name not in tensors or tensors[name].ndim <= dim or tensors[name].shape[dim] <= int(index.max()):
                raise TargetError(
                    f"{name} is cut along dimension {dim}, which {what} has not, or not as long; build the same model as before"
                )


def _greatest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _plan(
    model: nn.Module, structure: Structure, dead: Mapping[str, Tensor]
) -> tuple[dict[str, dict[int, Tensor]], dict[str, Tensor]]:
    """What stays of each tensor, and which inputs layers come to pick."""
    tensors = all_tensors(model)
    gone: dict[str, dict[int, Tensor]] = {}
    picked: dict[str, Tensor] = {}
    for name, units in dead.items():
        structure[name].require(units)
        for slot in structure[name].slots if bool(units.any()) else ():
            tensor = tensors.get(slot.tensor)
            if tensor is None or tensor.ndim <= slot.dim or tensor.shape[slot.dim] <= int(slot.index.max()):
                raise TargetError(f"{slot.tensor} is not what it was when the structure was found; use find_structure again")
            if isinstance(tensor, nn.Parameter) and sharding.local(tensor) is not tensor:
                raise TargetError(f"{slot.tensor} is sharded (FSDP2); compact the model in one process, after training")
            size = tensor.shape[slot.dim]
            flags = gone.setdefault(slot.tensor, {}).setdefault(slot.dim, torch.zeros(size, dtype=torch.bool))
            flags[slot.index[units.cpu()].flatten()] = True
            if structure[name].kind == "input":
                picked[slot.tensor.rpartition(".")[0]] = (~flags).nonzero().flatten()
    kept = {tensor: {dim: (~flags).nonzero().flatten() for dim, flags in dims.items()} for tensor, dims in gone.items()}
    for layer in picked:
        if not can_pick(model.get_submodule(layer)):
            kind = type(model.get_submodule(layer)).__name__
            raise TargetError(f"inputs of {layer} ({kind}) cannot go: only Linear and convolutions can pick their inputs")
    return kept, picked


def _require_zero(model: nn.Module, structure: Structure, dead: Mapping[str, Tensor], what: str) -> None:
    """Raise `PatternError` where something that goes is not zero; what buffers remember of it does not matter."""
    tensors = all_tensors(model)
    for name, units in dead.items():
        for slot in structure[name].slots if bool(units.any()) else ():
            value = tensors[slot.tensor].detach()
            index = slot.index[units.cpu()]
            taken = value.index_select(slot.dim, index.flatten().to(value.device))
            if slot.buffer or not bool(taken.any()):
                continue
            nonzero = taken.movedim(slot.dim, 0).reshape(*index.shape, -1).ne(0).flatten(1).any(1).cpu()
            unit = int(units.cpu().nonzero().flatten()[nonzero][0])
            raise PatternError(
                f"unit {unit} of group {name} would go, and {slot.tensor} of {what} is not zero there (dimension {slot.dim}): "
                "the model would compute something else. prune_units makes a unit zero in all its tensors, and "
                "manager.follow(copy) in those of an averaged copy"
            )


def _shrink(model: nn.Module, what: Compacted, undo: Undo, optimizers: Iterable[Optimizer] = ()) -> None:
    model = inner(model)
    cut_tensors(model, what.kept, undo, list(optimizers))
    for name, index in what.picked.items():
        layer = model.get_submodule(name)
        before = layer._buffers.get("picked")
        pick_inputs(layer, index.to(next(layer.parameters()).device))
        undo.append(partial(all_inputs, layer, before))
    for name, sizes in what.sizes.items():
        for key, value in sizes.items():
            set_size(model.get_submodule(name), key, value, undo)
