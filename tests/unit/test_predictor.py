"""The predictor on a synthetic loss whose best allocation is known, and the sampling of allocations of one budget."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from sparsetrain.allocation import ERK, Share, Uniform
from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.patterns import Slices, Unstructured
from sparsetrain.predictor import AccuracyPredictor, Layers, features, log_densities, meet, sample, search

BUDGET = Fraction(9, 10)
SHAPES = [(40, 50), (30, 20), (10, 30), (10, 10)]


def shares() -> list[Share]:
    return [Share.without_scores(f"t{i}", Unstructured(), shape) for i, shape in enumerate(SHAPES)]


#: The best densities: the loss is a quadratic in their logarithms, 1 at the best.
BEST = meet(shares(), BUDGET, [0.0, 1.6, 0.4, 1.0])
WEIGHTS = np.array([3.0, 0.5, 1.0, 0.2])


def loss(layers: Layers) -> float:
    apart = log_densities([layers])[0] - log_densities([BEST])[0]
    return 1 + float((WEIGHTS * apart**2).sum())


def zeros(layers: Layers) -> int:
    return sum(int(value * math.prod(shape)) for value, shape in zip(layers.values(), SHAPES, strict=True))


def anchors() -> list[Layers]:
    return [Uniform()(shares(), BUDGET), ERK()(shares(), BUDGET)]


def test_it_finds_the_allocation_that_is_best() -> None:
    measured = sample(shares(), BUDGET, anchors(), 60, seed=1)
    fitted, held_out = [*anchors(), *measured[:45]], measured[45:]
    predictor = AccuracyPredictor(seed=1).fit(fitted, [loss(layers) for layers in fitted])
    assert predictor.name == "ridge"
    assert predictor.rank_correlation(held_out, [loss(layers) for layers in held_out]) > 0.98
    found = search(predictor, shares(), BUDGET, fitted, count=100, seed=1)
    assert zeros(found) == 2700
    uniform, erk = (loss(layers) for layers in anchors())
    assert loss(found) < 1.02
    assert min(uniform, erk) > 1.1
    assert loss(found) < min(map(loss, fitted))
    # the same again for the same seed
    assert search(predictor, shares(), BUDGET, fitted, count=100, seed=1) == found


def test_shuffled_measurements_teach_nothing() -> None:
    measured = sample(shares(), BUDGET, anchors(), 60, seed=1)
    losses = [loss(layers) for layers in measured]
    noise = np.random.default_rng(0).permutation(losses[:45]).tolist()
    predictor = AccuracyPredictor().fit(measured[:45], noise)
    assert abs(predictor.rank_correlation(measured[45:], losses[45:])) < 0.6


def test_a_step_is_learned_by_the_forest() -> None:
    measured = sample(shares(), BUDGET, anchors(), 60, seed=2)
    first = log_densities(measured)[:, 0]
    stairs = (first > np.median(first)).astype(float) + (first > np.quantile(first, 0.75))
    predictor = AccuracyPredictor().fit(measured, stairs.tolist())
    assert predictor.name == "random forest"
    assert predictor.errors["random forest"] < predictor.errors["ridge"]


def test_samples_meet_the_budget_and_differ() -> None:
    drawn = sample(shares(), BUDGET, anchors(), 30, seed=5)
    assert {zeros(layers) for layers in drawn} == {2700}
    assert len({tuple(layers.values()) for layers in drawn}) == 30
    assert all(layers not in drawn for layers in anchors())
    assert drawn == sample(shares(), BUDGET, anchors(), 30, seed=5) != sample(shares(), BUDGET, anchors(), 30, seed=6)
    spans = log_densities(drawn).max(0) - log_densities(drawn).min(0)
    assert bool((spans > 0.5).all())


def test_meet_scales_and_caps() -> None:
    two = [Share.without_scores(f"t{i}", Unstructured(), (10, 10)) for i in range(2)]
    # densities 1 : 3 of 40 weights that stay
    assert meet(two, 0.8, [0.0, math.log(3)]) == {"t0": Fraction(90, 100), "t1": Fraction(70, 100)}
    # the second is full, the first takes the rest
    assert meet(two, 0.3, [0.0, math.log(9)]) == {"t0": Fraction(60, 100), "t1": Fraction(0)}
    with pytest.raises(PatternError, match="can lose"):
        meet(two, 0.995, [0.0, 0.0])
    neurons = [Share.without_scores("t", Slices(0), (10, 10))]
    assert sample(neurons, 0.5, [{"t": Fraction(1, 2)}], 5) == []


def test_features() -> None:
    logs = log_densities([{"a": 0.5, "b": 0.0}])
    assert logs.tolist() == [[math.log(0.5), 0.0]]
    assert features(logs).tolist() == [[math.log(0.5), 0.0, math.log(0.5) ** 2, 0.0]]


def test_what_cannot_be_learned_from() -> None:
    few = sample(shares(), BUDGET, anchors(), 7)
    with pytest.raises(RecipeError, match=r"7 measured values.*8 features needs at least 8"):
        AccuracyPredictor().fit(few, [1.0] * 7)
    with pytest.raises(RecipeError, match="1 of 9 measured values are no finite"):
        AccuracyPredictor().fit([*few, *anchors()], [1.0] * 8 + [math.nan])
    with pytest.raises(RecipeError, match="call fit first"):
        AccuracyPredictor().predict(few)
    same = AccuracyPredictor().fit([*few, *anchors()], [1.0] * 9)
    assert math.isnan(same.rank_correlation(few, [float(i) for i in range(7)]))
