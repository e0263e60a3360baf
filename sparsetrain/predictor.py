"""Predicting how good an allocation is, from a few that were measured, and searching for a better one.

The layer-wise densities of a budget are a point; a regression on their logarithms (and squares) learns the measured loss. What
it is worth is its rank correlation on allocations it has not seen. numpy and scikit-learn; no network is trained here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sparsetrain.allocation import Share
from sparsetrain.allocation.filling import fill
from sparsetrain.errors import RecipeError
from sparsetrain.patterns import Sparsity

Array = NDArray[np.float64]
Layers = dict[str, Fraction]


def log_densities(allocations: Sequence[Mapping[str, Sparsity]]) -> Array:
    """``log(1 - sparsity)`` of every tensor, shape (allocations, tensors).

    Example: ``log_densities([{"fc1": 0.5, "fc2": 0.0}])`` is ``[[-0.693, 0]]``.
    """
    return np.array([[math.log(1 - float(value)) for value in layers.values()] for layers in allocations])


def features(logs: Array) -> Array:
    """Log densities and their squares, shape (allocations, 2 * tensors). Example: ``features(log_densities(measured))``."""
    return np.hstack([logs, logs**2])


class AccuracyPredictor:
    """A regression from allocations to what was measured of them (a loss, an error, an accuracy: any number).

    `fit` chooses between ridge regression (with its strength) and a random forest by 5-fold cross-validation. Deterministic for
    a ``seed``. Raises `RecipeError` for fewer samples than features, or values that are no numbers.

    Example: ``AccuracyPredictor().fit(measured, losses).predict(candidates)``.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.name = ""
        self.errors: dict[str, float] = {}
        self._model: Any = None

    def fit(self, allocations: Sequence[Mapping[str, Sparsity]], values: Sequence[float]) -> AccuracyPredictor:
        """Learn from measured allocations; returns self."""
        target = np.asarray(values, dtype=np.float64)
        needed = 2 * len(allocations[0]) if len(allocations) else 0
        if len(allocations) != len(target) or len(target) < max(needed, 5):
            raise RecipeError(
                f"{len(target)} measured values of {len(allocations)} allocations: a predictor of {needed} features needs at "
                f"least {max(needed, 5)} of each"
            )
        if not np.isfinite(target).all():
            raise RecipeError(f"{int((~np.isfinite(target)).sum())} of {len(target)} measured values are no finite numbers")
        data = features(log_densities(allocations))
        folds = KFold(5, shuffle=True, random_state=self.seed)
        models = self._models()
        for name, model in models.items():
            guessed = cross_val_predict(model, data, target, cv=folds)
            self.errors[name] = float(np.sqrt(np.mean((guessed - target) ** 2)))
        self.name = min(self.errors, key=lambda name: self.errors[name])
        self._model = models[self.name].fit(data, target)
        return self

    def _models(self) -> dict[str, Any]:
        ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-4, 3, 15)))
        forest = RandomForestRegressor(100, min_samples_leaf=2, random_state=self.seed, n_jobs=1)
        return {"ridge": ridge, "random forest": forest}

    def predict(self, allocations: Sequence[Mapping[str, Sparsity]]) -> Array:
        """What it expects of them, shape (allocations,)."""
        if self._model is None:
            raise RecipeError("the predictor has learned nothing yet; call fit first")
        return np.asarray(self._model.predict(features(log_densities(allocations))), dtype=np.float64)

    def rank_correlation(self, allocations: Sequence[Mapping[str, Sparsity]], values: Sequence[float]) -> float:
        """Spearman correlation of prediction and measurement, in [-1, 1]; meant for allocations that were not fitted."""
        guessed, target = self.predict(allocations), np.asarray(values, dtype=np.float64)
        if len(target) < 2 or np.ptp(guessed) == 0 or np.ptp(target) == 0:
            return math.nan
        return float(spearmanr(guessed, target).statistic)


def meet(shares: Sequence[Share], sparsity: Sparsity, logs: Sequence[float]) -> Layers:
    """The allocation of exactly this budget whose densities are ``c * exp(logs)``, at most 1 each; ``c`` follows.

    Raises `PatternError` for a budget that cannot be reached. Example: ``meet(shares, 0.9, [0.0, -1.0])``.
    """
    least = min(logs, default=0.0)
    wide = [math.exp(min(log - least, 600.0)) for log in logs]
    return fill(shares, sparsity, lambda t: [max(0.0, 1 - (1 - t) * width) for width in wide])


def sample(
    shares: Sequence[Share], sparsity: Sparsity, anchors: Sequence[Layers], count: int, seed: int = 0, spread: float = 4.0
) -> list[Layers]:
    """Distinct random allocations of one budget: densities log-uniform within a factor ``spread`` of an anchor's, scaled.

    Fewer than ``count`` where the budget leaves hardly any choice. Example: ``sample(shares, 0.9, [uniform], 40)``.
    """
    source = np.random.default_rng(seed)
    centres = [log_densities([anchor])[0] for anchor in anchors]
    found: dict[tuple[Fraction, ...], Layers] = {}
    misses = 0
    while len(found) < count and misses < 50:
        centre = centres[source.integers(len(centres))]
        logs = centre + source.uniform(-math.log(spread), math.log(spread), len(shares))
        layers = meet(shares, sparsity, logs.tolist())
        key = tuple(layers.values())
        if key in found or layers in anchors:
            misses += 1
        else:
            found[key], misses = layers, 0
    return list(found.values())


def search(
    predictor: AccuracyPredictor,
    shares: Sequence[Share],
    sparsity: Sparsity,
    known: Sequence[Layers],
    *,
    count: int = 300,
    rounds: int = 20,
    seed: int = 0,
) -> Layers:
    """The allocation with the lowest prediction: the best of ``count`` samples around ``known``, refined by small moves.

    Never leaves the box of densities of ``known`` (what was measured): a regression says nothing beyond it.

    Example: ``search(predictor, shares, 0.9, measured)``.
    """
    source = np.random.default_rng(seed)
    logs = log_densities(known)
    low, high = logs.min(0) - 1e-9, logs.max(0) + 1e-9

    def best_of(candidates: list[Layers]) -> Layers:
        inside = [
            c
            for c, log in zip(candidates, log_densities(candidates), strict=True)
            if bool(((low <= log) & (log <= high)).all())
        ]
        return inside[int(predictor.predict(inside).argmin())]

    best = best_of([*known, *sample(shares, sparsity, known, count, seed, spread=2.0)])
    width = 0.5
    for _ in range(rounds):
        centre = log_densities([best])[0]
        moved = [meet(shares, sparsity, (centre + source.normal(0, width, len(shares))).tolist()) for _ in range(30)]
        following = best_of([best, *moved])
        width *= 1.0 if following != best else 0.6
        best = following
    return best
