"""Compaction: pruned units are taken out of every tensor, and of everything that is kept beside it.

Parameters stay the same objects with fewer entries, so that optimizers, schedules of the learning rate and hooks keep theirs;
their gradients, and what optimizers and averaged copies remember of each entry, are cut the same way. Layers that read inputs
of the model, some of which are gone, pick the others themselves. What modules know of their sizes is set anew (`sizes`). The
compact model then computes what the masked one did, or everything is put back.

Masks are not cut: detach the mask manager before (``manager.detach()``), and make a new one for what is to be pruned after.
Adafactor limits and scales updates by means over whole tensors, which are others without their zeros: it trains on a little
differently than it would have on the masked model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
from sparsetrain.structure.groups import Structure
from sparsetrain.structure.picking import all_inputs, can_pick, pick_inputs
from sparsetrain.structure.recording import outputs_of
from sparsetrain.structure.sizes import Unsettled, settle_sizes


@dataclass
class Compaction:
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
) -> Compaction:
    """Take pruned units out of a model, in place.

    Args:
        model: with the pruned units' slices zero.
        structure: of `find_structure` on this model, as it is now.
        dead: group name -> bool (units,), True = goes.
        sample: a batch, to compare on its first sample.
        run: gives a batch to the model; by default a mapping by name, of a tuple the first entry, a tensor as it is.
        optimizers: whose memory is cut along.
        copies: averaged models of the same parameter names, cut along.
        tolerance: how far outputs may move, relative to the greatest output; at least four units of their rounding.

    Raises, model and all else as before: `PatternError` for a group that would die or is fixed, and where the compact model
    computes something else; `TargetError` for optimizers whose memory nobody can cut, a structure of another model, a copy
    of another model and a sharded model (FSDP2).

    Example: ``compact(net, structure, {"fc1": dead}, images, optimizers=[optimizer])``.
    """
    undo: Undo = []
    try:
        return take_out(model, structure, dead, sample, run, (optimizers, copies), tolerance, undo)
    except Unsettled as problem:
        put_back(undo)
        raise PatternError(
            f"without the pruned units the model computes something else than with them masked: {problem}. Are the pruned "
            "slices zero? Leave the groups out in which this happens, or keep the model masked"
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
    beside: tuple[Iterable[Optimizer], Iterable[nn.Module]],
    tolerance: float,
    undo: Undo,
) -> Compaction:
    """`compact`, which leaves it to the caller to put back what went wrong (or was a trial); raises `Unsettled` too."""
    model = inner(model)
    call, given = run or runner(model), first_sample(sample)
    result = Compaction(before=sum(p.numel() for p in model.parameters()))
    result.kept, result.picked = _plan(model, structure, dead)

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
    result.scale = max(_greatest(value[torch.isfinite(value)]) for value in expected)
    rounding = max(torch.finfo(value.dtype).eps for value in expected)
    _shrink(model, result, undo, beside[0])
    allowed = max(tolerance, 4 * rounding) * max(result.scale, 1e-12)
    result.difference, result.sizes = settle_sizes(model, structure, dead, difference, allowed, undo)
    for copy in beside[1]:
        require_same(copy, result, f"the copy ({type(copy).__name__})")
        _shrink(copy, result, undo)
    result.after = sum(p.numel() for p in model.parameters())
    result.units = {g.name: (g.units - int(dead[g.name].sum()), g.units) for g in structure if g.name in dead}
    return result


def compact_again(model: nn.Module, compaction: Compaction, optimizers: Iterable[Optimizer] = ()) -> None:
    """Take the same slices out of a model built anew, so that weights saved after `compact` fit it.

    Raises `TargetError`, nothing being changed, for a tensor that is not there or smaller.
    Example: ``compact_again(net, saved)``.
    """
    require_same(model, compaction, "this model")
    undo: Undo = []
    try:
        _shrink(model, compaction, undo, optimizers)
    except BaseException:
        put_back(undo)
        raise


def require_same(model: nn.Module, compaction: Compaction, what: str) -> None:
    """Raise `TargetError` where a model has not the tensors that are cut."""
    tensors = all_tensors(inner(model))
    for name, dims in compaction.kept.items():
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


def _shrink(model: nn.Module, what: Compaction, undo: Undo, optimizers: Iterable[Optimizer] = ()) -> None:
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
