"""The rules of dynamic sparse training: their settings, what each can serve, what tensors start with, and one update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sparsetrain.allocation.erk import erk_sparsities
from sparsetrain.criteria import random_scores
from sparsetrain.errors import RecipeError
from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.patterns import Pattern, Sparsity, UnitPattern, Unstructured, exact
from sparsetrain.regrowth import drop_and_grow, movable, removals, share_out
from sparsetrain.schedules import Clock


@dataclass(frozen=True)
class Update:
    """When masks move, and how much: ``fraction`` (in (0, 1]) of the connections ``every`` so often, annealed to 0 at ``end``.

    ``momentum``, in [0, 1): how much of the running mean of gradients a step keeps, for rule ``sparse_momentum``.

    Example: ``Update(every="100st", fraction=0.3, end="75%")``.
    """

    every: str = "100st"
    fraction: float = 0.3
    end: str = "75%"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1 or not 0 <= self.momentum < 1:
            raise RecipeError(
                f"update.fraction is {self.fraction} and update.momentum {self.momentum}; they are shares in (0, 1] and [0, 1)"
            )
        for duration in (self.every, self.end):
            Clock(1, 1).steps(duration)

    def steps(self, clock: Clock) -> tuple[list[int], int]:
        """The steps after which masks move, and the step where the fraction is 0. Raises `RecipeError` if there are none."""
        every, end = max(1, clock.steps(self.every)), clock.steps(self.end)
        last = end if clock.total_steps is None else min(end, clock.total_steps)
        if every >= last:
            raise RecipeError(
                f"{self}: the first update would be after step {every}, the last may be before step {last}: masks would never "
                "move. Shorten update.every, or train longer"
            )
        return list(range(every, last, every)), end


#: Rule -> its own settings: those of the papers.
RULES = {
    "set": Update(),
    "rigl": Update(),
    "granet": Update(fraction=0.5),
    "sparse_momentum": Update(every="1ep", fraction=0.5, end="100%"),
}


def is_pooled(rule: str, allocation: str | None) -> bool:
    """Whether tensors share one budget: under ``sparse_momentum``, and under the one threshold of ``granet``."""
    return rule == "sparse_momentum" or (rule == "granet" and allocation != "uniform")


def refuse(rule: str, pattern: Pattern, allocation: str | None, where: str = "") -> None:
    """Raise `RecipeError` for a pattern that the rule, or the allocation asked for, cannot serve."""
    what = f"{where}pattern {pattern}"
    if rule == "sparse_momentum" and pattern != Unstructured():
        raise RecipeError(
            f"{what} fixes how much is kept where, and rule 'sparse_momentum' moves it; use 'unstructured', or rule 'rigl'"
        )
    if rule == "granet" and pattern.sparsity is not None:
        raise RecipeError(f"{what} has only one sparsity, and rule 'granet' raises it step by step; use rule 'rigl'")
    if rule == "granet" and is_pooled(rule, allocation) and pattern.row_local:
        raise RecipeError(f"{what} cannot follow the one threshold of rule 'granet'; use allocation 'uniform'")
    if pattern.sparsity is not None and allocation == "erk":
        raise RecipeError(f"{what} has the same sparsity in every tensor; leave allocation 'erk' out")


def spread(manager: MaskManager, sparsity: Sparsity | None, uniform: bool) -> dict[str, Fraction]:
    """The sparsity of each tensor for one over all, by ERK or uniform; tensors that nothing says it for are left out.

    A tensor with a goal of its own (an override), or a pattern with only one sparsity, has that.
    """
    plan: dict[str, Fraction] = {}
    for tensor in manager:
        own = tensor.goal if tensor.goal is not None else tensor.pattern.sparsity
        if own is not None:
            # What was asked of a pattern with only one sparsity must be that one; its validation says so.
            plan[tensor.name] = exact(sparsity if tensor.goal is None and sparsity is not None else own)
    free = [tensor for tensor in manager if tensor.name not in plan]
    if sparsity is None or not free:
        return plan
    if uniform:
        return plan | {tensor.name: exact(sparsity) for tensor in free}
    shares = erk_sparsities([tensor.target.view_shape for tensor in free], sparsity)
    # A tensor whose share is less than one row's weight, one block or one slice stays dense.
    return plan | {
        t.name: share if t.pattern.pruned(t.target.view_shape, share) else Fraction(0)
        for t, share in zip(free, shares, strict=True)
    }


def require_budget(manager: MaskManager, plan: dict[str, Fraction]) -> None:
    """Raise `RecipeError` unless the masks that are there prune as many weights as planned."""
    sizes = {t.name: math.prod(t.target.shape) for t in manager}
    have, asked = (
        math.floor(sum(sparsity * sizes[name] for name, sparsity in of.items()))
        for of in ({t.name: t.sparsity for t in manager}, plan)
    )
    if have != asked:
        raise RecipeError(
            f"the sparsity asked for prunes {asked} of {sum(sizes.values())} weights, and the masks there are prune {have}: "
            "leave sparsity out to keep theirs, or use rule 'granet' to prune on"
        )


def random_growth(tensor: MaskedTensor, key: str) -> Tensor:
    """Random scores ``(out, in, *kernel)``, a function of the key alone; one a unit where units live and die as a whole."""
    shape, pattern, device = tensor.target.view_shape, tensor.pattern, tensor.target.parameter.device
    if isinstance(pattern, UnitPattern):
        units = pattern.unit_scores(torch.ones(shape, device=device)).shape
        return pattern.expand(random_scores(tuple(units), key).to(device), shape)
    return random_scores(shape, key).to(device)


def move(manager: MaskManager, rule: str, growth: dict[str, Tensor], fraction: float, step: int) -> dict[str, int]:
    """One update of the masks by growth scores ``(out, in, *kernel)``; returns how many weights of each tensor moved.

    Tensors without scores stay as they are; so do dense ones, but under ``sparse_momentum``.
    """
    redistributes = rule == "sparse_momentum"
    tensors = [t for t in manager if t.name in growth and (t.mask is not None or redistributes)]
    masks = [t.target.layout.view(t.full_mask()) for t in tensors]
    alive = [movable(t.pattern, mask) for t, mask in zip(tensors, masks, strict=True)]
    if redistributes:
        sizes = [mask.numel() for mask in masks]
        shares = [float(growth[t.name][mask].double().mean()) for t, mask in zip(tensors, masks, strict=True)]
        drop = removals(alive, sizes, shares, fraction)
        grow = share_out(sum(drop), shares, [size - n + d for size, n, d in zip(sizes, alive, drop, strict=True)])
    else:
        # Rounded as the authors' codes do.
        drop = grow = [math.ceil(fraction * n) if rule == "granet" else math.floor(fraction * n) for n in alive]
    moved = {}
    for tensor, mask, out, back in zip(tensors, masks, drop, grow, strict=True):
        layout = tensor.target.layout
        strength = layout.view(tensor.target.parameter.detach().abs())
        new = layout.view(drop_and_grow(tensor.pattern, mask, strength, growth[tensor.name], out, back)).contiguous()
        sparsity = Fraction(new.numel() - int(new.sum()), new.numel()) if redistributes else tensor.sparsity
        change = manager.install(tensor.name, new, sparsity, step=step, why=rule)
        moved[tensor.name] = max(change.died, change.grew)
    return moved
