"""Proving the promises on a model as it is: verifying masks, and adopting the zeros somebody else made."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsetrain.errors import PatternError
from sparsetrain.masks import sharding
from sparsetrain.masks.optimizer_state import remembered
from sparsetrain.masks.tensor import MaskedTensor
from sparsetrain.targets import plain_name

if TYPE_CHECKING:
    from sparsetrain.masks.manager import MaskManager


@dataclass(frozen=True)
class VerifiedTensor:
    """One row of a verification. ``asked`` is what the pattern was installed at, ``actual`` the share of pruned weights."""

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    pattern: str
    asked: float
    actual: float
    kept: int
    problem: str | None

    @property
    def ok(self) -> bool:
        """Every promise holds for this tensor."""
        return self.problem is None


@dataclass(frozen=True)
class Verification:
    """The table that `MaskManager.verify` returns."""

    rows: list[VerifiedTensor]

    @property
    def ok(self) -> bool:
        """Every promise holds."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """The broken promises, by tensor."""
        return [f"{row.name}: {row.problem}" for row in self.rows if row.problem]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all targets."""
        numel = sum(math.prod(row.shape) for row in self.rows)
        return 1 - sum(row.kept for row in self.rows) / numel

    def __str__(self) -> str:
        lines = [f"{'tensor':<40} {'pattern':<18} {'asked':>8} {'actual':>8} {'kept':>12}  verified"]
        for row in self.rows:
            verdict = row.problem or "yes"
            lines.append(f"{row.name:<40} {row.pattern:<18} {row.asked:>8.4f} {row.actual:>8.4f} {row.kept:>12,}  {verdict}")
        return "\n".join(lines)


@torch.no_grad()
def verify_tensor(
    tensor: MaskedTensor, optimizers: Sequence[Optimizer], followers: Sequence[Mapping[str, Tensor]]
) -> VerifiedTensor:
    """Check one tensor; the problem found first is the one reported. Every rank of a sharded tensor must call it."""
    parameter = tensor.target.parameter
    mask = tensor.full_mask()
    weight = sharding.full(parameter.detach())
    problem = None
    try:
        tensor.pattern.check(tensor.target.layout.view(mask), tensor.sparsity)
    except PatternError as error:
        problem = f"the mask breaks its pattern: {error}"
    alive = int(mask.sum())
    problem = problem or _revived(weight, mask, "pruned weights are not zero")
    if problem is None and not bool(torch.isfinite(weight).all()):
        problem = "the weights hold NaN or infinity"
    for copy in followers:
        if tensor.name in copy:
            problem = problem or _revived(
                sharding.full(copy[tensor.name]), mask, "pruned weights of an averaged copy are not zero"
            )
    if tensor.mask is not None:
        stale = [text for optimizer in optimizers for text in remembered(optimizer, parameter, ~tensor.mask)]
        problem = problem or (stale[0] if stale else None)
    numel = mask.numel()
    return VerifiedTensor(
        tensor.name,
        tensor.target.aliases,
        tuple(mask.shape),
        str(tensor.pattern),
        float(tensor.sparsity),
        1 - alive / numel,
        alive,
        problem,
    )


def _revived(weight: Tensor, mask: Tensor, text: str) -> str | None:
    # A weight counts as revived when the value itself is not 0.0; NaN is not 0.0 either.
    revived = int(torch.count_nonzero(weight[~mask]))
    return f"{revived} {text}" if revived else None


@torch.no_grad()
def adopt_zeros(manager: MaskManager) -> dict[str, str]:
    """Install the zeros of the model's weights as masks; returns what was not claimed. See `MaskManager.adopt`."""
    unclaimed = {}
    for tensor in manager:
        weight = tensor.target.layout.view(sharding.full(tensor.target.parameter.detach()))
        zeros = weight == 0
        count = int(zeros.sum())
        if not count:
            unclaimed[tensor.name] = "has no zeros, stays dense"
            continue
        if count == zeros.numel():
            raise PatternError(f"{tensor.name} is zero throughout: nothing is left to keep; leave it out (targets.exclude)")
        try:
            sparsity = tensor.pattern.sparsity_of(zeros)
            mask = tensor.pattern.select(weight.abs(), sparsity)
        except PatternError as error:
            raise PatternError(f"{tensor.name}: its {count} zeros cannot be adopted as {tensor.pattern}: {error}") from error
        lost = (~mask & ~zeros).nonzero()
        if len(lost) and count <= 0.01 * zeros.numel():
            unclaimed[tensor.name] = f"{count} stray zeros are no {tensor.pattern}, stays dense"
            continue
        if len(lost):
            raise PatternError(
                f"{tensor.name}: its {count} zeros are no {tensor.pattern} pattern: the weight at {tuple(lost[0].tolist())} "
                "would have to be zero and is not; declare another pattern, or exclude the tensor"
            )
        if not sparsity and count > 0.01 * zeros.numel():
            raise PatternError(
                f"{tensor.name}: its {count} zeros hold no {tensor.pattern}; declare another pattern, or exclude the tensor"
            )
        local = sharding.take_local(tensor.target.layout.view(mask).contiguous(), tensor.target.parameter)
        manager.install(tensor.name, local, sparsity, why="adopt")
        beyond = count - int((~mask).sum())
        if beyond:
            unclaimed[tensor.name] = f"{beyond} more zeros than the pattern {tensor.pattern} holds stay free to train"
    for stored, parameter in manager.model.named_parameters():
        name = plain_name(stored)
        if name in manager.skipped and parameter.ndim > 1:
            share = Fraction(sharding.total([sharding.local(parameter.detach()) == 0], parameter)[0], parameter.numel())
            if share:
                unclaimed[name] = f"is {float(share):.0%} zero but no target: {manager.skipped[name]}"
    return unclaimed


@torch.no_grad()
def free_zeros(manager: MaskManager) -> dict[str, float]:
    """Share of zeros that no mask holds, by tensor; those with more than 1 % that train, so that steps would fill them.

    Example: ``free_zeros(MaskManager.adopt(model, "2:4"))`` is ``{"lm_head.weight": 0.5}`` if the head was pruned too.
    """
    dead = {name: count for name, (count, _) in manager.counts().items()}
    found = {}
    for stored, parameter in manager.model.named_parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            zeros = sharding.total([sharding.local(parameter.detach()) == 0], parameter)[0]
            found[plain_name(stored)] = (zeros - dead.get(plain_name(stored), 0)) / parameter.numel()
    return {name: share for name, share in found.items() if share > 0.01}


def warn_of_zeros(manager: MaskManager, fate: str) -> None:
    """Warn if a model that looks pruned already is about to be treated as dense; ``fate`` says what becomes of its zeros."""
    for tensor in manager:
        share = float((sharding.local(tensor.target.parameter.detach()) == 0).float().mean())
        if share > 0.01:
            warnings.warn(
                f"{tensor.name} is {share:.0%} zero already, and these zeros are no masks: {fate}. To keep them call "
                "method.use(model, MaskManager.adopt(model, pattern)) before fit (init_from does in a recipe)",
                stacklevel=3,
            )
            return
