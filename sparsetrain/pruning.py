"""Prune: criterion scores, allocation says how much where, the manager selects, checks and installs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from sparsetrain.allocation import Allocation, Share, get_allocation
from sparsetrain.criteria import Criterion, get_criterion
from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.masks import MaskManager, sharding
from sparsetrain.masks.tensor import MaskChange, MaskedTensor
from sparsetrain.patterns import Block, Sparsity, Unstructured, exact


def final_sparsity(tensor: MaskedTensor, sparsity: Sparsity | None) -> Sparsity:
    """What a tensor is to reach: its override, else what was asked for all, else the one sparsity its pattern has.

    Raises `PatternError` if nothing says. Example: 0.5 for a 2:4 tensor when ``sparsity`` is None.
    """
    if tensor.goal is not None:
        return tensor.goal
    if sparsity is not None:
        return sparsity
    if tensor.pattern.sparsity is None:
        raise PatternError(f"{tensor.name}: how sparse? Pattern {tensor.pattern} can have any sparsity; give one, such as 0.9")
    return tensor.pattern.sparsity


def validate(manager: MaskManager, sparsity: Sparsity | None, together: bool = False) -> None:
    """Raise `PatternError` naming the first tensor that cannot reach what is asked of it; nothing is changed.

    ``together``: tensors without a goal of their own share a budget, so that one of them may well lose nothing.
    """
    for tensor in manager:
        final = final_sparsity(tensor, sparsity)
        if together and tensor.goal is None and tensor.pattern.sparsity is None:
            exact(final)
            continue
        try:
            tensor.pattern.validate(tensor.target.view_shape, final)
        except PatternError as error:
            raise PatternError(f"{tensor.name}: {error}") from error


def validate_allocation(manager: MaskManager, sparsity: Sparsity | None, allocation: Allocation) -> None:
    """Raise what `validate` does, and what the allocation refuses of patterns and budget, by name; nothing is changed.

    Example: ``validate_allocation(manager, 0.9, ERK())``.
    """
    validate(manager, sparsity, together=allocation.pooled)
    shared = [tensor for tensor in manager if tensor.goal is None]
    for tensor in shared:
        allocation.check(tensor.pattern, tensor.name)
    if shared and sparsity:
        allocation.validate([Share.without_scores(t.name, t.pattern, t.target.view_shape) for t in shared], sparsity)


@torch.no_grad()
def prune(
    manager: MaskManager,
    sparsity: Sparsity | None = None,
    *,
    criterion: Criterion | str = "magnitude",
    allocation: Allocation | str = "uniform",
    own: Mapping[str, Sparsity] | None = None,
    only: Collection[str] | None = None,
    regrow: bool = True,
    step: int = 0,
    why: str = "prune",
) -> list[MaskChange]:
    """Prune a manager's tensors to an absolute sparsity (not a share of what is left).

    Pruned weights stay pruned. A sparsity below the present one regrows as many as it must, as zeros, by index.

    Args:
        manager: the masks.
        sparsity: fraction of zeros in [0, 1); may be left out where the pattern has only one (2:4 is 0.5).
        criterion: a `Criterion` or its name; one that needs data has been shown some (`sparsetrain.calibration`).
        allocation: an `Allocation` or its name.
        own: sparsities of single tensors, outside the common budget; by default the goals their overrides set.
        only: names of the tensors to prune now, which then share the budget; by default all.
        regrow: False leaves a tensor as it is that would be less sparse than now.
        step, why: recorded with the change.

    Raises `PatternError` for a sparsity that cannot be reached, `RecipeError` or `TargetError` for a criterion that cannot
    score this model or has seen no data.

    Example: ``prune(manager, 0.9, criterion="magnitude", allocation="global")``.
    """
    score, spread = get_criterion(criterion), get_allocation(allocation)
    tensors = [t for t in manager if only is None or t.name in only]
    if own is None:
        own = {t.name: t.goal for t in tensors if t.goal is not None}
        validate(manager, sparsity, together=spread.pooled)
        score.prepare(manager.model, [part for t in tensors for part in score.parts(t)])
    require_solvable(tensors, score)
    # A score that looks at other weights is of the model as it is before any of them goes.
    asked = [t for t in tensors if own.get(t.name, 1) or t.mask is not None]
    ahead = {} if score.elementwise else {t.name: scores_of(t, score, step) for t in asked}

    def scores(tensor: MaskedTensor) -> Tensor:
        return ahead[tensor.name] if tensor.name in ahead else scores_of(tensor, score, step)

    plan = _plan(tensors, sparsity, spread, own, scores)
    if not regrow:
        plan = {name: max(manager[name].sparsity, exact(value)) for name, value in plan.items()}
    changes = []
    for tensor in tensors:
        if plan[tensor.name] or tensor.mask is not None:
            solved = _solve(manager, tensor, score, plan[tensor.name], step, why)
            if solved is not None:
                changes.append(solved)
                continue
            before = None if type(score).compensate is Criterion.compensate else tensor.target.parameter.detach().clone()
            changes.append(manager.update(tensor.name, plan[tensor.name], scores(tensor), step=step, why=why))
            if before is not None and changes[-1].died:
                _compensate(manager, tensor, score, sharding.local(before))
    return changes


@torch.no_grad()
def allocate(
    manager: MaskManager,
    sparsity: Sparsity | None = None,
    *,
    criterion: Criterion | str = "magnitude",
    allocation: Allocation | str = "uniform",
    own: Mapping[str, Sparsity] | None = None,
    step: int = 0,
) -> dict[str, Sparsity]:
    """The sparsity that `prune` would give each tensor, nothing changed; ``own`` and the rest as there.

    Example: ``allocate(manager, 0.9, allocation="erk")``; its result is an ``own`` for `prune`.
    """
    score = get_criterion(criterion)
    goals = {t.name: t.goal for t in manager if t.goal is not None} if own is None else own
    return _plan(list(manager), sparsity, get_allocation(allocation), goals, lambda t: scores_of(t, score, step))


def _plan(
    tensors: Sequence[MaskedTensor],
    sparsity: Sparsity | None,
    spread: Allocation,
    own: Mapping[str, Sparsity],
    scores: Callable[[MaskedTensor], Tensor],
) -> dict[str, Sparsity]:
    shared = [t for t in tensors if t.name not in own]
    reduce = sharding.reducer([t.target.parameter for t in shared])
    by_goal: dict[Sparsity, list[MaskedTensor]] = {}
    for tensor in shared:
        by_goal.setdefault(final_sparsity(tensor, sparsity), []).append(tensor)
    plan = {t.name: own[t.name] for t in tensors if t.name in own}
    for goal, alike in by_goal.items():
        plan |= spread([_share(t, scores, whole=reduce is None) for t in alike], goal, reduce)
    return plan


def require_solvable(tensors: Iterable[MaskedTensor], criterion: Criterion) -> None:
    """Raise `RecipeError` for fused experts whose pattern reaches over several of them, where a criterion solves one by one."""
    if type(criterion).solve is Criterion.solve:
        return
    for tensor in tensors:
        experts, pattern = tensor.target.layout.experts, tensor.pattern
        rows = tensor.target.view_shape[0] // max(1, experts)
        apart = pattern.row_local or pattern == Unstructured() or (isinstance(pattern, Block) and rows % pattern.rows == 0)
        if experts and tensor.goal != 0 and not apart:
            raise RecipeError(
                f"{tensor.name}: {type(criterion).__name__} prunes its {experts} experts one by one ({rows} outputs each), and "
                f"{pattern} has units that reach over several; use N:M, 'unstructured', blocks whose height divides {rows}, "
                "or criterion 'wanda'"
            )


def solution(
    tensor: MaskedTensor, criterion: Criterion, sparsity: Sparsity, alive: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Mask and moved weights, as stored, where a criterion chooses both at once (`SparseGPT`); None where it only scores.

    ``alive``: the mask within which it chooses, None for all weights. Nothing is changed.
    """
    if type(criterion).solve is Criterion.solve:
        return None
    view = tensor.target.layout.view
    weight = view(tensor.target.parameter.detach())
    living = None if alive is None else view(alive)
    names = [part.name for part in criterion.parts(tensor)]
    # Experts divide what the tensor is to lose as evenly as whole numbers allow.
    size = tensor.pattern.units((len(weight) // len(names), *weight.shape[1:]))
    bounds = [math.floor(exact(sparsity) * size * i) for i in range(len(names) + 1)]
    even = len(names) == 1 or tensor.pattern.row_local
    found = []
    for i, (name, rows) in enumerate(zip(names, weight.chunk(len(names)), strict=True)):
        own = sparsity if even else Fraction(bounds[i + 1] - bounds[i], size)
        kept = None if living is None else living.chunk(len(names))[i]
        part = criterion.solve(rows, tensor.pattern, own, name=name, alive=kept)
        if part is None:
            return None
        found.append(part)
    mask, values = (view(torch.cat(both)) for both in zip(*found, strict=True))
    return mask, values


def _solve(
    manager: MaskManager, tensor: MaskedTensor, criterion: Criterion, sparsity: Sparsity, step: int, why: str
) -> MaskChange | None:
    found = solution(tensor, criterion, sparsity, tensor.mask)
    if found is None:
        return None
    change = manager.install(tensor.name, found[0], sparsity, step=step, why=why)
    manager.write(tensor.name, found[1])
    return change


def _compensate(manager: MaskManager, tensor: MaskedTensor, criterion: Criterion, before: Tensor) -> None:
    """Move the weights that survived a change of the mask, where the criterion says so."""
    moved = None if tensor.mask is None else criterion.compensate(before, tensor.mask, name=tensor.name)
    if moved is not None:
        manager.write(tensor.name, moved)


def scores_of(tensor: MaskedTensor, criterion: Criterion, step: int = 0) -> Tensor:
    """What a criterion makes of a tensor as it is now; this rank's entries, as stored. Higher is more important."""
    parameter = tensor.target.parameter.detach()
    parts = criterion.parts(tensor)
    if parts[0].name != tensor.name:
        view = tensor.target.layout.view
        return view(torch.cat([criterion.score(p.parameter, name=p.name, step=step) for p in parts]))
    if criterion.elementwise or sharding.local(parameter) is parameter:
        return criterion.score(sharding.local(parameter), name=tensor.name, step=step)
    scores = criterion.score(sharding.full(parameter), name=tensor.name, step=step)
    return sharding.take_local(scores, parameter)


def _share(tensor: MaskedTensor, scores_of: Callable[[MaskedTensor], Tensor], whole: bool) -> Share:
    """What the allocation sees; pruned weights rank below every other, as they will when the mask is selected.

    ``whole``: ranks have no sum of counts in common (some tensors are sharded otherwise, or not), each counts everything.
    """
    layout = tensor.target.layout
    parameter = tensor.target.parameter

    def scores() -> Tensor:
        values = scores_of(tensor)
        return values if tensor.mask is None else values.masked_fill(~tensor.mask, -torch.inf)

    def gathered() -> Tensor:
        return layout.view(sharding.full(sharding.like(scores(), parameter)))

    mine = gathered if whole else lambda: layout.view(scores())
    return Share(tensor.name, tensor.pattern, tensor.target.view_shape, mine, gathered)
