"""Sensitivity analysis: what the loss says when one tensor alone is pruned, and how well derivatives foretell it.

Two looks at a trained model. `scan` prunes one tensor at a time to several sparsities and evaluates (Han et al. 2015, arXiv
1506.02626, fig. 6): tensors, and with ``units`` whole neurons or filters. `parameter_sensitivity` takes single weights: its
derivative by autodiff against finite differences, and the loss change of removing it against its Taylor expansion (LeCun et
al. 1989, Optimal Brain Damage, eq. 1). Both leave the model bit for bit as it was. Pure torch; whoever calls evaluates.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import Tensor, nn

from sparsetrain.criteria import Criterion, Known, get_criterion
from sparsetrain.errors import DivergedError, PatternError, RecipeError
from sparsetrain.masks import MaskedTensor, MaskManager, sharding
from sparsetrain.patterns import Pattern, Slices, Sparsity, exact

Evaluate = Callable[[], Mapping[str, float]]
GRID = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class ScanRow:
    """One measurement: a tensor alone at a sparsity. ``pruned`` of ``numel`` weights were zero; ``loss`` as evaluated."""

    name: str
    pattern: str
    sparsity: float
    pruned: int
    numel: int
    loss: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterRow:
    """How single weights of one tensor behave, over a random sample of ``count`` of them.

    ``derivative_error``: largest difference between autodiff and central finite differences, relative to the largest
    derivative. ``first_order``, ``second_order``: Spearman correlation of the loss change of removing a weight with its Taylor
    expansion to that order, in [-1, 1]; NaN where either is the same for all.
    """

    name: str
    count: int
    derivative_error: float
    first_order: float
    second_order: float


@dataclass
class Scan:
    """What `scan` measured: metrics of the model as it is, and a row for each tensor, pattern and sparsity."""

    baseline: dict[str, float]
    rows: list[ScanRow]
    criterion: str = "magnitude"
    evaluated_on: str = ""
    parameters: list[ParameterRow] = field(default_factory=list)

    def to_json(self, path: Path) -> None:
        """Write the scan; a loss that is no number becomes null. Example: ``found.to_json(Path("sensitivity.json"))``."""
        path.write_text(json.dumps(_finite(asdict(self)), indent=1), encoding="utf-8")

    @classmethod
    def from_json(cls, path: Path) -> Scan:
        """Read a scan back; raises `RecipeError` if it is none. Example: ``Scan.from_json(Path("sensitivity.json"))``."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [ScanRow(**(row | {"loss": _number(row["loss"])})) for row in content["rows"]]
            parameters = [
                ParameterRow(**{k: v if k == "name" else _number(v) for k, v in p.items()}) for p in content["parameters"]
            ]
            return cls(content["baseline"], rows, content["criterion"], content["evaluated_on"], parameters)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{path} is no scan ({error!r}); `sparsetrain sensitivity RECIPE.yaml` makes one") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def scan(
    manager: MaskManager,
    evaluate: Evaluate,
    sparsities: Sequence[Sparsity] = GRID,
    criterion: Criterion | str = "magnitude",
    *,
    units: bool = False,
    progress: bool = False,
) -> Scan:
    """Prune each target alone to each sparsity, evaluate, and put its weights back bit for bit.

    Args:
        manager: whose tensors; their patterns are pruned (N:M at its one sparsity). Weights that are masked stay zero.
        evaluate: metrics of the model as it is now, with ``"loss"``; the same for the same weights.
        sparsities: each in [0, 1); those that prune nothing of a tensor are left out for it.
        criterion: what goes first, a `Criterion` or its name; one that needs data must have seen it.
        units: prune whole outputs (pattern ``neurons``) of each tensor too.
        progress: show a progress bar.

    Raises `RecipeError` without a loss or on a sharded model, `DivergedError` if it is no number before anything was pruned.

    Example: ``scan(manager, lambda: {"loss": float(loss(model(x), y))}).rows``.
    """
    score = get_criterion(criterion)
    score.prepare(manager.model, [Known.of(tensor) for tensor in manager])
    grid = [exact(sparsity) for sparsity in sparsities]
    jobs = [job for tensor in manager for job in _jobs(tensor, grid, units)]
    baseline = _evaluated(evaluate)
    if not math.isfinite(baseline["loss"]):
        raise DivergedError(f"the loss is {baseline['loss']} before anything is pruned; start from a model that was trained")
    found = Scan(baseline, [], criterion if isinstance(criterion, str) else type(criterion).__name__.lower())
    for tensor, pattern, sparsity in track(jobs, "sensitivity", transient=True, disable=not progress):
        with _alone(tensor, pattern, sparsity, score) as pruned:
            metrics = _evaluated(evaluate)
        numel = tensor.target.parameter.numel()
        loss = metrics.pop("loss")
        found.rows.append(ScanRow(tensor.name, str(pattern), float(sparsity), pruned, numel, loss, metrics))
    return found


def _jobs(tensor: MaskedTensor, grid: Sequence[Sparsity], units: bool) -> Iterator[tuple[MaskedTensor, Pattern, Sparsity]]:
    if sharding.local(tensor.target.parameter) is not tensor.target.parameter:
        raise RecipeError(f"{tensor.name} is sharded (FSDP2), a scan prunes whole tensors; use one process")
    patterns = [tensor.pattern]
    if units and tensor.pattern != Slices(0):
        patterns.append(Slices(0))
    for pattern in patterns:
        for sparsity in grid if pattern.sparsity is None else [pattern.sparsity]:
            try:
                pattern.validate(tensor.target.view_shape, sparsity)
            except PatternError:
                continue  # nothing would go
            yield tensor, pattern, sparsity


@contextmanager
def _alone(tensor: MaskedTensor, pattern: Pattern, sparsity: Sparsity, criterion: Criterion) -> Iterator[int]:
    """One tensor pruned inside the block; gives the number of zeros."""
    parameter = tensor.target.parameter
    before = parameter.detach().clone()
    scores = criterion.score(before, name=tensor.name, step=0)
    if tensor.mask is not None:
        scores = scores.masked_fill(~tensor.mask, -math.inf)
    layout = tensor.target.layout
    alive = layout.view(pattern.select(layout.view(scores), sparsity))
    try:
        with torch.no_grad():
            parameter.masked_fill_(~alive, 0.0)
        yield int((~alive if tensor.mask is None else ~alive | ~tensor.mask).sum())
    finally:
        with torch.no_grad():
            # Looked up anew: evaluating may have moved the model to a device and back.
            tensor.target.parameter.copy_(before)


def _evaluated(evaluate: Evaluate) -> dict[str, float]:
    metrics = {name: float(value) for name, value in evaluate().items()}
    if "loss" not in metrics:
        raise RecipeError(f"evaluate gives {', '.join(metrics) or 'nothing'} and no 'loss', which a scan compares")
    return metrics


def parameter_sensitivity(
    manager: MaskManager, loss: Callable[[nn.Module], Tensor], count: int = 64, seed: int = 0, *, progress: bool = False
) -> list[ParameterRow]:
    """For a random sample of each target's weights: derivatives checked, and what removing a weight does against Taylor.

    In a float64 copy of the model: ``dL/dw`` by autodiff and by ``(L(w + e) - L(w - e)) / 2e`` with ``e = 1e-5 max(1, |w|)``;
    the change ``L(w = 0) - L(w)`` against ``-w g`` and ``-w g + w^2 h / 2``, ``h`` from a Hessian-vector product. Weights that
    are zero are not drawn.

    Args:
        manager: whose tensors.
        loss: model -> scalar loss in float64, the same for the same weights; differentiable.
        count: weights drawn of each tensor, at least 2; all of a smaller one.
        seed: of the draw.
        progress: show a progress bar.

    Raises `RecipeError` for a count below 2 or a loss that is no float64 scalar.

    Example: ``parameter_sensitivity(manager, lambda m: F.mse_loss(m(x.double()), y.double()))``.
    """
    if count < 2:
        raise RecipeError(f"count={count}: correlations need at least 2 weights of each tensor")
    model = copy.deepcopy(manager.model).double()
    twins = dict(zip(map(id, manager.model.parameters()), model.parameters(), strict=True))
    source = torch.Generator().manual_seed(seed)
    rows = []
    for tensor in track(list(manager), "parameters", transient=True, disable=not progress):
        parameter = twins[id(tensor.target.parameter)]
        places = parameter.detach().flatten().nonzero().squeeze(1).cpu()
        drawn = places[torch.randperm(len(places), generator=source)[:count]].sort().values.tolist()
        if len(drawn) > 1:
            rows.append(_compare(tensor.name, model, parameter, drawn, loss))
    return rows


def _compare(
    name: str, model: nn.Module, parameter: nn.Parameter, drawn: list[int], loss: Callable[[nn.Module], Tensor]
) -> ParameterRow:
    value = loss(model)
    if value.numel() != 1 or value.dtype != torch.float64:
        raise RecipeError(
            f"the loss is {value.dtype} of shape {tuple(value.shape)}; it must be one float64 number: convert inputs"
        )
    slopes = torch.autograd.grad(value, parameter, create_graph=True)[0].flatten()
    gradient = slopes.detach()[drawn]
    second = torch.stack([_curvature(slopes[i], parameter, i) for i in drawn])
    flat = parameter.detach().flatten()
    weights = flat[drawn].clone()
    numeric, removed = [], []

    def at(index: int, changed: float) -> float:
        place = parameter.detach().view(-1)
        kept = place[index].clone()
        place[index] = changed
        with torch.no_grad():
            found = float(loss(model))
        place[index] = kept
        return found

    for index, weight in zip(drawn, weights.tolist(), strict=True):
        step = 1e-5 * max(1.0, abs(weight))
        numeric.append((at(index, weight + step) - at(index, weight - step)) / (2 * step))
        removed.append(at(index, 0.0) - float(value.detach()))
    change = torch.tensor(removed, dtype=torch.float64)
    first = (-weights * gradient).cpu()
    whole = first + (weights.square() * second / 2).cpu()
    apart = (torch.tensor(numeric, dtype=torch.float64) - gradient.cpu()).abs().max()
    error = float(apart / gradient.abs().max().cpu().clamp_min(1e-300)) if float(apart) else 0.0
    return ParameterRow(name, len(drawn), error, _spearman(change, first), _spearman(change, whole))


def _curvature(slope: Tensor, parameter: nn.Parameter, index: int) -> Tensor:
    """One diagonal entry of the Hessian; 0 where the slope does not depend on the tensor."""
    if not slope.requires_grad:
        return torch.zeros((), dtype=slope.dtype, device=slope.device)
    row = torch.autograd.grad(slope, parameter, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(slope).detach() if row is None else row.flatten()[index]


def _spearman(one: Tensor, other: Tensor) -> float:
    if one.min() == one.max() or other.min() == other.max():
        return math.nan
    return float(spearmanr(one.numpy(), other.numpy()).statistic)
