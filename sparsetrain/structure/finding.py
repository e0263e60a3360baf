"""Finding the structure of a model: what lives and dies together, and whether a unit of it can really go."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsetrain.calibration import at_rest, runner
from sparsetrain.calibration.data import first_sample
from sparsetrain.errors import SparsetrainError
from sparsetrain.structure.compaction import take_out
from sparsetrain.structure.components import Components
from sparsetrain.structure.cutting import Undo, inner, put_back
from sparsetrain.structure.groups import CoupledGroup, Structure
from sparsetrain.structure.layers import find_layers
from sparsetrain.structure.sizes import Unsettled
from sparsetrain.structure.tracing import Tracer


def find_structure(
    model: nn.Module, sample: Any, run: Callable[[Any], Any] | None = None, leave_out: Collection[str] = ()
) -> Structure:
    """Find what lives and dies together in a model, by running it on one sample.

    Args:
        model: any module; it is not changed.
        sample: a batch as the model takes it, of which the first sample is used: images, token numbers, a mapping.
        run: gives a batch to the model; by default a mapping by name, of a tuple the first entry, a tensor as it is.
        leave_out: names of modules taken as a whole: nothing in them can go, nor what goes in or comes out.

    Of every group one unit is taken out on trial; groups without which the model stops, or computes something else than with
    the unit masked, are ``fixed`` (a shortcut padded to a fixed width, slopes that count heads), and so are those that touch
    layers nobody knows how to cut (recurrent ones, fused experts, ``MultiheadAttention``), norms over all their units, and
    what nothing depends on. It makes no difference whether units are zero already.

    Raises `TargetError` for a model that cannot be run on copies of the sample, or does other things for other data.

    Example: ``find_structure(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 4))["0"].units`` is 8.
    """
    model = inner(model)
    layers, loose = find_layers(model, leave_out)
    with at_rest(model, [], gradients=False):
        found = Components(Tracer(model, layers, run or runner(model), first_sample(sample)), loose).structure()
    return replace(found, groups=tuple(_tried(model, found, group, sample, run) for group in found))


def _tried(
    model: nn.Module, structure: Structure, group: CoupledGroup, sample: Any, run: Callable[[Any], Any] | None
) -> CoupledGroup:
    """The group, fixed if the model is another without its first unit."""
    if group.fixed:
        return group
    if group.units < 2:
        return replace(group, fixed="it has one unit, and the layer would go with it")
    one = torch.arange(group.units) == 0
    tensors = dict(model.named_parameters(remove_duplicate=False))
    cut = [tensors[slot.tensor] for slot in group.slots if not slot.buffer]
    undo: Undo = [partial(setattr, parameter, "data", parameter.data) for parameter in cut]
    try:
        for slot in group.slots:
            if not slot.buffer:
                data = tensors[slot.tensor].data
                tensors[slot.tensor].data = data.index_fill(slot.dim, slot.index[0].to(data.device), 0.0)
        take_out(model, structure, {group.name: one}, sample, run, ((), ()), 1e-4, undo)
    except (Unsettled, SparsetrainError) as problem:
        return replace(group, fixed=f"without one of its units {problem}")
    finally:
        put_back(undo)
    return group
