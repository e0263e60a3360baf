"""Plan: a dry run against the real model, built on the meta device, so that it costs no memory and hardly any time.

What it says: which tensors match and which are left dense and why, what divides and what does not, target counts a layer,
the sparsity curve, parameters, mask memory, FLOPs before and after. Contradictions are problems, all of them at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from torch import nn

from sparsetrain.callbacks import SparsityCallback, StructuredCallback
from sparsetrain.data import DomainSequence
from sparsetrain.errors import PatternError, RecipeError, SparsetrainError
from sparsetrain.masks import MaskManager
from sparsetrain.patterns import Sparsity, UnitPattern, exact
from sparsetrain.recipe.build import as_recipe_error, instantiate, shorten, taken_out
from sparsetrain.recipe.domains import require_references
from sparsetrain.recipe.flops import example_input, uses
from sparsetrain.recipe.schema import load_recipe
from sparsetrain.recipe.train import RANDOM, prunes_random
from sparsetrain.schedules import Clock, Curve


@dataclass(frozen=True)
class PlannedTensor:
    """One row of a plan; ``prune`` counts weights (an estimate for ragged blocks). Where ``sparsity`` is None, ``follows`` says
    from what it does: one threshold for all ("global"), what each task takes ("by task"), units chosen while
    training ("by unit"), the masks it has ("as it is").
    """

    name: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]
    pattern: str
    sparsity: float | None
    prune: int | None
    problem: str | None
    follows: str | None = None


@dataclass
class Plan:
    """What `plan` found. ``problems`` empty means: this recipe can do what it asks.

    ``pruned`` is of the tensors whose sparsity is known, and ``flops`` has no "sparse" where that of one is not. Over several
    ``domains`` the clock is that of the first.
    """

    tensors: list[PlannedTensor] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    prunable: int = 0
    pruned: int = 0
    mask_bytes: int = 0
    checkpoint_bytes: int = 0
    flops: dict[str, float] | None = None
    clock: Clock = field(default_factory=lambda: Clock(None, None))
    domains: int = 1
    curve: list[tuple[int, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan(recipe: Path, overrides: Sequence[str] = ()) -> Plan:
    """Plan a recipe. Raises `RecipeError` for one that cannot be read; what contradicts itself is in ``problems``.

    Example: ``plan(Path("recipes/quickstart.yaml"), ["--method.sparsity", "0.95"]).problems``.
    """
    config = load_recipe(recipe, overrides)
    if config.method is None:
        raise RecipeError("the recipe has no method: it trains dense, there is nothing to plan")
    result = Plan()
    model = _model(config, result)
    method: SparsityCallback = instantiate(config, "method")
    result.parameters = sum(p.numel() for p in model.parameters())
    whole = model
    try:
        if isinstance(method, StructuredCallback):
            # What belongs together is seen by running the model, for which the meta device has no numbers.
            whole = instantiate(config, "model")
            if config.init_from is not None and Path(config.init_from).exists():
                for started in (whole, model):
                    shorten(started, taken_out(Path(config.init_from)))
            method.look(instantiate(config, "data") if config.data is not None else None)
        manager = method.create_manager(whole)
    except SparsetrainError as error:
        result.problems.append(str(error))
        return result
    method.manager = manager
    result.skipped = manager.skipped
    _fill_tensors(result, method, manager)
    if isinstance(method, StructuredCallback):
        groups = ", ".join(f"{group.name} ({group.units} {group.kind}s)" for group in method.chosen)
        result.notes.append(f"chosen while training, of {method.budget}: units of {groups}")
    try:
        method.validate()
    except SparsetrainError as error:
        if not any(str(error) == problem for problem in result.problems) and not result.problems:
            result.problems.append(str(error))
    unsaid = [tensor.name for tensor in manager if method.final(tensor) is None] if not result.problems else []
    if unsaid and not method.sets_sparsity and config.init_from is None:
        result.problems.append(
            f"{unsaid[0]}: nothing says how sparse it is to be; give a sparsity, or start from a pruned model (init_from)"
        )
    if config.init_from is not None and not Path(config.init_from).exists():
        result.problems.append(f"init_from: {config.init_from!r} is no file or run directory")
    data = _load_data(config, result)
    if data is not None or config.data is None:
        try:
            require_references(config, method, data)
        except RecipeError as error:
            result.problems.append(str(error))
    if isinstance(data, DomainSequence):
        result.domains = len(data)
    if prunes_random(config, model):
        result.notes.append(RANDOM)
    _fill_curve(result, config, method, data)
    _fill_flops(result, model, data)
    return result


def _model(config: Namespace, result: Plan) -> nn.Module:
    try:
        with torch.device("meta"):
            return instantiate(config, "model")  # type: ignore[no-any-return]
    except SparsetrainError:
        # Its constructor looks at values, which the meta device has none of; if it is broken, it breaks again.
        model: nn.Module = instantiate(config, "model")
        result.notes.append("the model cannot be built on the meta device; it was built in memory")
        return model


def _fill_tensors(result: Plan, method: SparsityCallback, manager: MaskManager) -> None:
    shared: dict[Sparsity, int] = {}
    for tensor in manager:
        shape = tensor.target.view_shape
        numel = math.prod(shape)
        problem, final, count = None, None, None
        try:
            final = method.final(tensor)
            if final is not None:
                tensor.pattern.validate(shape, final)
                count = _pruned_weights(tensor.pattern, shape, final)
        except PatternError as error:
            problem = str(error)
            result.problems.append(f"{tensor.name}: {problem}")
        free = method.pooled and tensor.goal is None
        if free and final is not None:
            shared[final] = shared.get(final, 0) + numel
        else:
            result.pruned += count or 0
        result.prunable += numel
        result.mask_bytes += numel
        result.checkpoint_bytes += math.ceil(numel / 8)
        result.tensors.append(
            PlannedTensor(
                tensor.name,
                tensor.target.aliases,
                tensor.target.shape,
                str(tensor.pattern),
                None if free or final is None else float(final),
                None if free else count,
                problem,
                "global" if free else method.follows if final is None else None,
            )
        )
    # A pooled budget is rounded down once.
    result.pruned += sum(math.floor(exact(final) * numel) for final, numel in shared.items())


def _pruned_weights(pattern: Any, shape: tuple[int, ...], sparsity: Sparsity) -> int:
    pruned = int(pattern.pruned(shape, sparsity))
    if isinstance(pattern, UnitPattern):
        return round(pruned * math.prod(shape) / pattern.units(shape))
    return pruned


def _load_data(config: Namespace, result: Plan) -> LightningDataModule | None:
    if config.data is None:
        result.notes.append("no data in the recipe: epochs have no length in steps")
        return None
    try:
        data: LightningDataModule = instantiate(config, "data")
        with as_recipe_error("data"):
            data.prepare_data()
            data.setup("fit")
    except SparsetrainError as error:
        result.problems.append(str(error))
        return None
    return data


def _fill_curve(result: Plan, config: Namespace, method: SparsityCallback, data: LightningDataModule | None) -> None:
    result.clock = _clock(config, data)
    try:
        curves = method.curves(result.clock)
    except RecipeError as error:
        result.problems.append(str(error))
        return
    if curves:
        result.curve = _whole_curve(curves, method)


def _whole_curve(curves: dict[float, Curve], method: SparsityCallback) -> list[tuple[int, float]]:
    """The sparsity over all targets: each follows the curve of its goal, N:M takes its one step at the first change."""
    steps = sorted({step for curve in curves.values() for step, _ in curve.points})
    goals = [(t, float(method.final(t) or 0), math.prod(t.target.shape)) for t in method.masks]
    whole = sum(numel for _, _, numel in goals)
    points = []
    for step in steps:
        now = [
            (goal if t.pattern.sparsity is not None or goal not in curves else curves[goal].at(step)) for t, goal, _ in goals
        ]
        points.append((step, sum(s * numel for s, (_, _, numel) in zip(now, goals, strict=True)) / whole))
    return points


def _clock(config: Namespace, data: LightningDataModule | None) -> Clock:
    per_epoch = None
    loader = data.train_dataloader() if data is not None else None
    if isinstance(loader, Sized):
        batches = len(loader)
        limit = config.trainer.limit_train_batches
        if isinstance(limit, float) and limit < 1:
            batches = int(batches * limit)
        elif isinstance(limit, int):
            batches = min(batches, limit)
        per_epoch = math.ceil(batches / config.trainer.accumulate_grad_batches)
    totals = []
    if config.trainer.max_steps not in (None, -1):
        totals.append(config.trainer.max_steps)
    # Lightning's own default, when neither is given.
    epochs = config.trainer.max_epochs if config.trainer.max_epochs is not None else (None if totals else 1000)
    if epochs not in (None, -1) and per_epoch:
        totals.append(epochs * per_epoch)
    return Clock(min(totals) if totals else None, per_epoch)


def _fill_flops(result: Plan, model: nn.Module, data: LightningDataModule | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            example = example_input(model, data)
            used = {} if example is None else uses(model.eval(), example)
        except Exception as error:  # a model may do anything in forward; the rest of the plan stands without
            result.notes.append(f"FLOPs not counted: the model does not run on the meta device ({type(error).__name__})")
            return
    if not used:
        result.notes.append("FLOPs not counted: no example input (set the model's example_input_array)")
        return
    weights = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    kept = {n: 1 - t.prune / math.prod(t.shape) for t in result.tensors if t.prune is not None for n in (t.name, *t.tied)}
    share = 1 - result.pruned / result.prunable if result.prunable else 1.0
    planned = {n for t in result.tensors for n in (t.name, *t.tied)}
    dense = sparse = 0.0
    for name, count in used.items():
        cost = 2.0 * count * weights[name]
        dense += cost
        sparse += cost * (kept.get(name, share) if name in planned else 1.0)
    if any(t.follows not in (None, "global") for t in result.tensors):
        result.flops = {"dense": dense}
        return
    result.flops = {"dense": dense, "sparse": sparse}
    if len(kept) < len(planned):
        result.notes.append("FLOPs after pruning are an estimate: the allocation decides how much each tensor loses")
