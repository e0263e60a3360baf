"""What a model costs without some units: parameters, or multiplications of one sample, as the compact model would have them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsetrain.structure.groups import CoupledGroup

Measure = Literal["parameters", "flops"]


class Budget:
    """The cost of the weights that groups cut, as units go.

    Args:
        model: whose parameters are counted.
        groups: what may go.
        positions: weight name -> how often a sample uses it, of `positions`; None counts every parameter once.

    A weight with ``r`` rows and ``c`` columns left costs ``positions * r * c * kernel``: rows and columns of different groups
    do not add up, they multiply. Weights that no group cuts cost nothing here. ``full`` is the cost with all units; set it to
    that of a larger model to count what that has lost already.

    Example: ``Budget(net, structure).gone({"fc1": torch.arange(300) < 100})``.
    """

    def __init__(self, model: nn.Module, groups: Iterable[CoupledGroup], positions: Mapping[str, int] | None = None) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        cuts = {group.name: [slot for slot in group.slots if not slot.buffer] for group in groups}
        names = dict.fromkeys(slot.tensor for slots in cuts.values() for slot in slots)
        self.shapes = {n: tuple(parameters[n].shape) for n in names if positions is None or n in positions}
        self.uses = {n: 1 if positions is None else positions[n] for n in self.shapes}
        #: Group -> for each tensor and dimension how many slices a unit has.
        self.slices = {
            name: [(s.tensor, s.dim, s.index.shape[1]) for s in slots if s.tensor in self.shapes]
            for name, slots in cuts.items()
        }
        self.full = self.cost({})

    def cost(self, dead: Mapping[str, int]) -> float:
        """What is left when so many units of each group are gone. Example: ``budget.cost({"fc1": 100})``."""
        return self._cost(self._sizes(dead))

    def gone(self, dead: Mapping[str, Tensor]) -> float:
        """The share of ``full`` that is gone, in [0, 1]. Example: 0.0 for no dead units."""
        return 1 - self.cost(_counts(dead)) / self.full

    def saved(self, dead: Mapping[str, Tensor]) -> dict[str, float]:
        """What one more unit of each group would save. Example: ``budget.saved({})["fc1"]``."""
        sizes = self._sizes(_counts(dead))
        return {name: self._saved(sizes, [name], 1) for name in self.slices}

    def choose(
        self,
        scores: Mapping[str, Tensor],
        dead: Mapping[str, Tensor],
        share: float,
        at_least: int = 1,
        alike: Sequence[Sequence[str]] = (),
        multiple: int = 1,
    ) -> dict[str, Tensor]:
        """Let the units of lowest score go, after those that are ``dead``, until ``share`` of ``full`` is gone.

        What counts is the score of a unit for each bit of cost that it saves, as the costs are when it goes. No group falls
        below ``at_least`` units; ties go to the group named first, and its lower unit. If not enough can go, all that can do.

        Args:
            scores: group -> (units,), at least 0.
            dead: group -> bool (units,).
            share: in [0, 1].
            at_least: units left in each group.
            alike: groups that lose as many units as each other, each its own least ones; others go by themselves.
            multiple: units go so many at a time, so that a multiple is left wherever one goes (the first time fewer may go).

        Returns group -> bool (units,), the dead ones included. Example: ``budget.choose(norms, nothing, 0.5)``.
        """
        together = {name for names in alike for name in names}
        families = [[n for n in names if n in dead] for names in alike] + [[n] for n in dead if n not in together]
        families = [names for names in families if names]
        order = {n: [u for u in scores[n].argsort(stable=True).tolist() if not dead[n][u]] for n in dead}
        values = {name: scores[name].tolist() for name in dead}
        first = dict.fromkeys(dead, 0)  # how many of the order have gone
        sizes = self._sizes(_counts(dead))
        left = self._cost(sizes)
        while left > (1 - share) * self.full + 1e-6:
            best: tuple[float, float, list[str], int] | None = None
            for names in families:
                lives = min(len(order[name]) - first[name] for name in names)
                take = (lives - 1) % multiple + 1
                if lives - take < at_least:
                    continue
                saved = self._saved(sizes, names, take)
                lost = sum(values[n][u] for n in names for u in order[n][first[n] : first[n] + take])
                if saved > 0 and (best is None or lost / saved < best[0]):
                    best = (lost / saved, saved, names, take)
            if best is None:
                break
            left -= best[1]
            for name in best[2]:
                first[name] += best[3]
                self._shrink(sizes, name, best[3])
        gone = {name: torch.tensor(order[name][: first[name]], dtype=torch.int64) for name in dead}
        return {name: units.clone().index_fill_(0, gone[name], True) for name, units in dead.items()}

    def _sizes(self, counts: Mapping[str, int]) -> dict[str, list[int]]:
        sizes = {name: list(shape) for name, shape in self.shapes.items()}
        for group, count in counts.items():
            self._shrink(sizes, group, count)
        return sizes

    def _shrink(self, sizes: dict[str, list[int]], group: str, count: int) -> None:
        for tensor, dim, each in self.slices[group]:
            sizes[tensor][dim] -= count * each

    def _cost(self, sizes: Mapping[str, list[int]]) -> float:
        return float(sum(self.uses[name] * math.prod(size) for name, size in sizes.items()))

    def _saved(self, sizes: dict[str, list[int]], groups: Sequence[str], count: int) -> float:
        """What goes with so many units of each of these groups: only what they cut changes."""
        cut = {tensor for group in groups for tensor, _, _ in self.slices[group]}
        own = {tensor: list(sizes[tensor]) for tensor in cut}
        for group in groups:
            self._shrink(own, group, count)
        return self._cost({tensor: sizes[tensor] for tensor in cut}) - self._cost(own)


def positions(model: nn.Module, call: Callable[[], Any]) -> dict[str, int]:
    """How often ``call``, a forward pass on one sample, uses each weight of Linear layers and convolutions.

    Returns weight name -> positions: 100 for a convolution that makes 10 x 10 outputs.
    Example: ``positions(net, lambda: net(image))``.
    """
    used: dict[str, int] = {}

    def count(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(output, Tensor) and isinstance(weight, Tensor):
            outputs = weight.shape[1 if type(module).__name__ == "Conv1D" else 0]
            used[name] = used.get(name, 0) + output.numel() // outputs

    kinds = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")
    handles = [
        module.register_forward_hook(partial(count, f"{name}.weight" if name else "weight"))
        for name, module in model.named_modules()
        if any(kind.__name__ in kinds for kind in type(module).__mro__)
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return used


def alike(groups: Iterable[CoupledGroup]) -> list[list[str]]:
    """Groups of one kind and size that are the same layer of other blocks: their names differ in numbers only.

    Example: ``[["h.0.mlp", "h.1.mlp"]]`` for two blocks.
    """
    families: dict[tuple[str, str, int], list[str]] = {}
    for group in groups:
        families.setdefault((re.sub(r"\d+", "#", group.name), group.kind, group.units), []).append(group.name)
    return list(families.values())


def _counts(dead: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(units.sum()) for name, units in dead.items()}
