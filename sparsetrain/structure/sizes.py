"""What modules know of sizes: whole numbers that have to change with the tensors, found by trying.

Layers of torch say theirs under known names (`cutting`). Elsewhere (attention modules that count heads, or split by a width)
whole numbers that equal a size of what was cut are tried, and set where the model then computes what the masked one did.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsetrain.structure.cutting import Undo, set_size
from sparsetrain.structure.groups import CoupledGroup, Structure

#: At most so many sets of sizes are tried.
_TRIALS = 64


class Unsettled(Exception):
    """No sizes were found with which the model computes what it did; says what it does instead."""


@dataclass(frozen=True)
class _Size:
    """A whole number of a module that may be a size of what was cut; ``likely``: it counts heads."""

    module: str
    name: str
    value: int
    likely: bool
    kind: str

    @property
    def sort(self) -> tuple[str, str, bool]:
        return self.kind, self.name, self.likely


def settle_sizes(
    model: nn.Module,
    structure: Structure,
    dead: Mapping[str, Tensor],
    difference: Callable[[], float],
    allowed: float,
    undo: Undo,
) -> tuple[float, dict[str, dict[str, int]]]:
    """Set the sizes with which the model computes what it did; those that count heads first, then others that fit.

    Args:
        model: after the cut.
        structure: of the model before it.
        dead: group name -> bool (units,), what was cut.
        difference: how far outputs are from what they were.
        allowed: how far they may be.
        undo: is given what puts sizes back.

    Returns the difference and module -> attribute -> value. Raises `Unsettled`, sizes being as before.
    """
    sizes = list(_sizes(model, structure, dead))
    problem: Exception | None = None
    least = float("inf")
    for chosen in _trials(sizes):
        tried: Undo = []
        for size in chosen:
            set_size(model.get_submodule(size.module), size.name, size.value, tried)
        try:
            found = difference()
        except Exception as error:  # code that counts on the old sizes may fail in any way
            problem, found = error, float("inf")
        if found <= allowed:
            undo += tried
            told: dict[str, dict[str, int]] = {}
            for size in chosen:
                told.setdefault(size.module, {})[size.name] = size.value
            return found, told
        least = min(least, found)
        for step in reversed(tried):
            step()
    if least == float("inf") and problem is None:
        raise Unsettled("the model's outputs have another shape")
    if problem is None or least < float("inf"):
        raise Unsettled(f"the model's outputs change by {least:.3g} (allowed {allowed:.3g})")
    line = (str(problem).splitlines() or [""])[0]
    raise Unsettled(f"the model stops with {type(problem).__name__}: {line[:100]}") from problem


def _trials(sizes: Sequence[_Size]) -> Iterator[list[_Size]]:
    """Sets of sizes to try, all modules of one class alike: with what counts heads, and without."""
    likely = sorted({size.sort for size in sizes if size.likely})
    others = sorted({size.sort for size in sizes if not size.likely})
    every = (some for count in range(len(others) + 1) for some in itertools.combinations(others, count))
    more = list(itertools.islice(every, _TRIALS))  # 20 numbers have a million sets
    sets = [(*first, *some) for first in ([likely, []] if likely else [[]]) for some in more]
    for kinds in sets:
        yield [size for size in sizes if size.sort in kinds]


def _sizes(model: nn.Module, structure: Structure, dead: Mapping[str, Tensor]) -> Iterator[_Size]:
    """Whole numbers, in the modules around what was cut, that count units or equal a width that is another now."""
    seen: set[tuple[str, str]] = set()
    for name, units in dead.items():
        group = structure[name]
        left = group.units - int(units.sum())
        if group.kind in ("input", "filter", "residual") or left == group.units:
            continue
        widths = {slot.index.numel(): slot.index.shape[1] * left for slot in group.slots}
        for around in _around(group):
            module = model.get_submodule(around)
            for key, value in vars(module).items():
                if type(value) is not int or (around, key) in seen:
                    continue
                counts = re.search(r"head", key) and not re.search(r"dim|size|group|layer", key)
                if counts and value * left % group.units == 0 and value >= group.units:
                    seen.add((around, key))
                    yield _Size(around, key, value * left // group.units, True, type(module).__name__)
                elif value in widths:
                    seen.add((around, key))
                    yield _Size(around, key, widths[value], False, type(module).__name__)


def _around(group: CoupledGroup) -> list[str]:
    """The modules that hold the layers of a group, up to the one that holds them all."""
    layers = [slot.tensor.rpartition(".")[0].split(".") for slot in group.slots]
    common = 0
    while all(len(parts) > common + 1 and parts[common] == layers[0][common] for parts in layers):
        common += 1
    found = {".".join(parts[:depth]) for parts in layers for depth in range(common, len(parts))}
    return sorted(found)
