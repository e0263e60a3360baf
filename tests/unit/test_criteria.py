"""Criteria: values by hand, purity, and random scores that are the same everywhere."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.calibration import calibrate
from sparsetrain.criteria import (
    NAMES,
    Criterion,
    Known,
    Magnitude,
    Random,
    StatisticsCriterion,
    get_criterion,
    magnitude,
    random_scores,
)
from sparsetrain.errors import RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.pruning import prune


def test_magnitude_is_the_absolute_value_and_leaves_the_weight_alone() -> None:
    weight = nn.Parameter(torch.tensor([[-2.0, 1.0], [0.0, -torch.inf]]))
    scores = Magnitude().score(weight, name="fc.weight", step=3)
    assert scores.tolist() == magnitude(weight).tolist() == [[2.0, 1.0], [0.0, torch.inf]]
    assert not scores.requires_grad
    scores.zero_()
    assert weight.tolist() == [[-2.0, 1.0], [0.0, -torch.inf]]


def test_the_norm_of_magnitude_ranks_units_and_leaves_the_order_of_weights() -> None:
    model = nn.Linear(2, 2, bias=False)

    def pruned(norm: Any, pattern: str) -> list[list[float]]:
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[4.0, 0.0], [-3.0, 2.0]]))  # l1: 4 and 5, l2: 16 and 13
        prune(MaskManager(model, pattern=pattern), 0.5, criterion=Magnitude(norm=norm))
        found: list[list[float]] = model.weight.tolist()
        return found

    assert pruned("l1", "neurons") == [[0.0, 0.0], [-3.0, 2.0]]
    assert pruned("l2", "neurons") == [[4.0, 0.0], [0.0, 0.0]]
    assert pruned("l1", "unstructured") == pruned("l2", "unstructured") == [[4.0, 0.0], [-3.0, 0.0]]
    half = torch.tensor([[300.0, 250.0]], dtype=torch.float16)  # whose squares overflow
    assert Magnitude(norm="l2").score(half).tolist() == [[90000.0, 62500.0]]
    with pytest.raises(RecipeError, match=r"norm 'l3' is unknown; use 'l1' or 'l2'"):
        Magnitude(norm="l3")  # type: ignore[arg-type]


def test_scores_do_not_touch_what_they_are_made_of() -> None:
    """Whoever writes into scores (the manager masks them) writes neither into weights nor into statistics."""
    for name, kind in NAMES.items():
        model = nn.Linear(3, 2, bias=False)
        manager, criterion = MaskManager(model), kind()
        if isinstance(criterion, StatisticsCriterion):
            batch = torch.tensor([[1.0, 2.0, -3.0]])
            calibrate(manager, criterion, [batch] * 3, lambda batch, model=model: model(batch).square().sum())
        else:
            criterion.prepare(model, [Known.of(t) for t in manager])
        before = model.weight.detach().clone()
        first = criterion.score(model.weight.detach(), name="weight", step=0)
        again = first.clone()
        assert first.shape == before.shape, name
        assert not first.requires_grad, name
        first.fill_(-1.0)
        assert torch.equal(criterion.score(model.weight.detach(), name="weight", step=0), again), name
        assert torch.equal(model.weight, before), name


def test_random_scores_depend_on_seed_name_and_step_alone() -> None:
    def draw(seed: int = 0, name: str = "fc.weight", step: int = 0, fill: float = 0.0) -> Tensor:
        return Random(seed).score(torch.full((4, 5), fill), name=name, step=step)

    first = draw()
    torch.manual_seed(123)
    assert torch.equal(draw(fill=9.0), first)
    for other in (draw(seed=1), draw(name="fc2.weight"), draw(step=1)):
        assert not torch.equal(other, first)


def test_random_scores_leave_the_global_stream_alone() -> None:
    torch.manual_seed(0)
    plain = torch.rand(3)
    torch.manual_seed(0)
    random_scores((5, 5), "key")
    assert torch.equal(torch.rand(3), plain)


def test_random_scores_are_uniform() -> None:
    values = sorted(random_scores((100, 100), "key").flatten().tolist())
    assert values[0] >= 0
    assert values[-1] < 1
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the 0.1 % point
    assert max(abs(value - i / 10_000) for i, value in enumerate(values)) < 0.0195
    columns = random_scores((2, 5000), "another key")
    assert abs(statistics.correlation(columns[0].tolist(), columns[1].tolist())) < 0.05


def test_random_prunes_without_regard_to_size() -> None:
    def smallest_alive(criterion: str) -> float:
        model = nn.Linear(40, 40)
        with torch.no_grad():
            model.weight.copy_(torch.arange(1.0, 1601).view(40, 40))
        prune(MaskManager(model), 0.5, criterion=criterion)
        return min(w for w in model.weight.flatten().tolist() if w)

    assert smallest_alive("random") < 50
    assert smallest_alive("magnitude") == 801


def test_names_and_instances() -> None:
    assert isinstance(get_criterion("magnitude"), Magnitude)
    assert isinstance(get_criterion("random"), Random)
    own = Random(7)
    assert get_criterion(own) is own
    assert {name: type(get_criterion(name)) for name in NAMES} == NAMES
    assert {name for name, kind in NAMES.items() if not kind.elementwise} == {"random", "obs", "lookahead", "ria"}
    with pytest.raises(RecipeError, match=r"'magnitud' is unknown.*magnitude, random.*Did you mean 'magnitude'\?"):
        get_criterion("magnitud")


def test_a_criterion_of_ones_own_needs_only_a_score() -> None:
    class Largest(Criterion):
        def score(self, weight: Tensor, *, name: str, step: int) -> Tensor:
            return -weight.abs()

    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -5.0, 1.0]]))
    prune(MaskManager(model), 0.34, criterion=Largest())
    assert model.weight.tolist() == [[3.0, 0.0, 1.0]]
    with pytest.raises(TypeError, match="abstract"):
        Criterion()  # type: ignore[abstract]
