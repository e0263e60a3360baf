"""Verify a checkpoint or a run directory at rest, without the code of its model: masks against weights, name by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrain.checkpoints import read_weights, unwrapped
from sparsetrain.errors import MaskStateError, PatternError, nearest
from sparsetrain.masks import Verification, VerifiedTensor, read_masks
from sparsetrain.masks.state import SavedMask, from_state
from sparsetrain.patterns import Pattern, parse_pattern
from sparsetrain.recipe.build import saved_masks
from sparsetrain.targets import plain_name


def inspect_checkpoint(path: Path, pattern: str | None = None) -> Verification:
    """Check every mask in a checkpoint (or run directory) against its pattern and its weights.

    A checkpoint without masks is checked for the zeros of a declared ``pattern``, every matrix that has any. Raises
    `MaskStateError` for what cannot be read, and for a checkpoint without masks when no pattern is declared.

    Example: ``inspect_checkpoint(Path("runs/quickstart")).ok``.
    """
    checkpoint = read_weights(path)
    stored = unwrapped(checkpoint["state_dict"])
    weights = {plain_name(name): value for name, value in stored.items() if isinstance(value, Tensor)}
    state = saved_masks(checkpoint)
    masks = None if state is None else from_state(state, str(path))
    beside = path / "masks.safetensors"
    saved = read_masks(beside) if beside.is_file() else None
    masks = saved if masks is None else masks
    if masks is None:
        if pattern is None:
            raise MaskStateError(
                f"{path} holds no masks: it was not written by a sparse run. To check the zeros it has, declare their "
                "pattern: --pattern unstructured, --pattern 2:4"
            )
        return _zeros(weights, parse_pattern(pattern), path)
    rows = [_row(name, mask, weights) for name, mask in masks.items()]
    return Verification([_beside(row, masks[row.name], saved) for row in rows])


def _beside(row: VerifiedTensor, mask: SavedMask, saved: dict[str, SavedMask] | None) -> VerifiedTensor:
    """The same row, unless the run's masks.safetensors says something else than its checkpoint."""
    if row.problem or saved is None:
        return row
    other = saved.get(row.name)
    if other is not None and other.shape == mask.shape and torch.equal(other.bits, mask.bits):
        return row
    return replace(row, problem="masks.safetensors has another mask than the checkpoint")


def _row(name: str, saved: SavedMask, weights: dict[str, Any]) -> VerifiedTensor:
    mask = saved.unpack(name)
    problem = None
    if name not in weights:
        problem = f"the checkpoint has no such weight.{nearest(name, weights)}"
    elif tuple(weights[name].shape) != saved.shape:
        problem = f"the weight has shape {tuple(weights[name].shape)}, the mask {saved.shape}"
    else:
        problem = _pattern_problem(mask, saved) or _weight_problem(weights[name], mask)
    actual = 1 - saved.alive / mask.numel()
    return VerifiedTensor(name, (), saved.shape, saved.pattern, float(saved.sparsity), actual, saved.alive, problem)


def _pattern_problem(mask: Tensor, saved: SavedMask) -> str | None:
    try:
        pattern = parse_pattern(saved.pattern)
    except PatternError:
        return None  # a pattern from outside the package; its own check ran when the mask was made
    # Which layout the layer has is not in a checkpoint: the mask holds if it holds either way round.
    problems = []
    for view in (mask, mask.transpose(0, 1)) if mask.ndim == 2 else (mask,):
        try:
            pattern.check(view, saved.sparsity)
        except PatternError as error:
            problems.append(str(error))
        else:
            return None
    return f"the mask breaks its pattern: {problems[0]}"


def _weight_problem(weight: Tensor, mask: Tensor) -> str | None:
    revived = int(torch.count_nonzero(weight[~mask]))
    if revived:
        return f"{revived} pruned weights are not zero"
    return None if bool(torch.isfinite(weight).all()) else "the weights hold NaN or infinity"


def _zeros(weights: dict[str, Tensor], pattern: Pattern, path: Path) -> Verification:
    rows = []
    for name, weight in weights.items():
        zeros = weight == 0
        if weight.ndim < 2 or not bool(zeros.any()):
            continue
        kept = weight.numel() - int(zeros.sum())
        sparsity, problem = _matches(weight, pattern)
        rows.append(
            VerifiedTensor(name, (), tuple(weight.shape), str(pattern), sparsity, 1 - kept / weight.numel(), kept, problem)
        )
    if not rows:
        raise MaskStateError(f"{path} is dense: no weight matrix in it has a zero")
    return Verification(rows)


def _matches(weight: Tensor, pattern: Pattern) -> tuple[float, str | None]:
    """The sparsity at which a weight's zeros form the pattern, or what is wrong; either layout of a matrix will do."""
    first: tuple[float, str | None] | None = None
    for view in (weight, weight.transpose(0, 1)) if weight.ndim == 2 else (weight,):
        zeros = view == 0
        try:
            sparsity = pattern.sparsity_of(zeros)
            lost = int((~pattern.select(view.abs().float(), sparsity) & ~zeros).sum())
            text = f"{lost} weights would have to be zero for {pattern} and are not" if lost else None
            found = float(sparsity), text
        except PatternError as error:
            found = 0.0, str(error)
        if found[1] is None:
            return found
        first = first or found
    assert first is not None
    return first
