"""Allocation: one global order in plain Python against the counts; budgets exact; no layer dies."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsetrain.allocation import NAMES, Global, Share, Uniform, get_allocation
from sparsetrain.criteria import Criterion
from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.masks import MaskManager, Override
from sparsetrain.patterns import NM, Block, Pattern, Slices, UnitPattern, Unstructured, parse_pattern
from sparsetrain.pruning import final_sparsity, prune
from sparsetrain.targets import Targets

quick = settings(max_examples=120, deadline=None)
FREE = Unstructured()


def share(scores: Tensor, pattern: Pattern = FREE, name: str = "w") -> Share:
    return Share(name, pattern, tuple(scores.shape), lambda: scores, lambda: scores)


def shares(tensors: list[Tensor], pattern: Pattern = FREE) -> list[Share]:
    return [share(tensor, pattern, f"t{i}") for i, tensor in enumerate(tensors)]


def draw(seed: int, sizes: list[tuple[int, ...]], low: int = -2, high: int = 5) -> list[Tensor]:
    source = random.Random(seed)
    return [torch.tensor([float(source.randint(low, high)) for _ in range(math.prod(s))]).view(s) for s in sizes]


def lowest_over_all(tensors: list[list[float]], budget: int) -> list[int]:
    """Counts: the lowest first, ties to earlier tensors; the best weight of every tensor (the last of equals) stays."""
    entries = sorted((value, t, i) for t, values in enumerate(tensors) for i, value in enumerate(values))
    best = [max((value, i) for i, value in enumerate(values)) for values in tensors]
    dead = [(t, i) for value, t, i in entries if (value, i) != best[t]][:budget]
    return [sum(owner == t for owner, _ in dead) for t in range(len(tensors))]


sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5)


@quick
@given(sizes, st.integers(0, 99), st.integers(0, 10**6), st.booleans())
def test_global_is_one_sorted_list(shapes: list[tuple[int, int]], percent: int, seed: int, summed: bool) -> None:
    tensors = draw(seed, shapes)
    total = sum(t.numel() for t in tensors)
    budget = total * percent // 100
    if budget > total - len(tensors):
        return
    found = Global()(shares(tensors), percent / 100, torch.clone if summed else None)
    counts = lowest_over_all([t.flatten().tolist() for t in tensors], budget)
    assert found == {f"t{i}": Fraction(c, t.numel()) for i, (c, t) in enumerate(zip(counts, tensors, strict=True))}
    assert sum(counts) == budget


@quick
@given(sizes, st.integers(0, 99), st.integers(0, 10**6), st.sampled_from([Block(2, 2), Block(1, 3), Slices(0), Slices(1)]))
def test_global_over_units_is_the_longest_run_within_the_budget(
    shapes: list[tuple[int, int]], percent: int, seed: int, pattern: UnitPattern
) -> None:
    tensors = draw(seed, shapes)
    found = Global()(shares(tensors, pattern), percent / 100)
    units = []
    for t, scores in enumerate(tensors):
        ids = torch.arange(math.prod(pattern.unit_scores(scores).shape)).view(pattern.unit_scores(scores).shape)
        owner = pattern.expand(ids, tuple(scores.shape)).flatten().tolist()
        for unit in range(ids.numel()):
            inside = [int(v) for v, o in zip(scores.flatten().tolist(), owner, strict=True) if o == unit]
            units.append((Fraction(sum(inside), len(inside)), t, unit, len(inside)))
    spent, counts = 0, [0] * len(tensors)
    best = {max(u for u in units if u[1] == t) for t in range(len(tensors))}  # stays, whatever it scores
    for _, t, _, size in sorted(set(units) - best):
        if (spent := spent + size) > sum(s.numel() for s in tensors) * percent // 100:
            break
        counts[t] += 1
    per_tensor = [sum(u[1] == t for u in units) for t in range(len(tensors))]
    expected = [Fraction(c, n) for c, n in zip(counts, per_tensor, strict=True)]
    assert list(found.values()) == expected
    dead = sum(int((~pattern.select(s, f)).sum()) for s, f in zip(tensors, found.values(), strict=True))
    assert dead <= sum(s.numel() for s in tensors) * percent / 100


def test_ties_go_to_earlier_tensors() -> None:
    same = [torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, 4)]
    assert Global()(shares(same), 0.5) == {"t0": Fraction(3, 4), "t1": Fraction(3, 4), "t2": Fraction(0)}
    assert Global()(shares(same), 0.25) == {"t0": Fraction(3, 4), "t1": 0, "t2": 0}


def test_a_layer_that_would_die_keeps_its_best_weight_and_the_others_give_one_more() -> None:
    weak, strong = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 11.0, 12.0, 13.0, 14.0]])
    assert Global()(shares([weak, strong]), 0.5) == {"t0": Fraction(2, 3), "t1": Fraction(2, 5)}
    # twin: where nothing dies, the threshold alone decides
    assert Global()(shares([weak + 9.5, strong]), 0.25) == {"t0": Fraction(1, 3), "t1": Fraction(1, 5)}


def test_a_slice_of_every_tensor_stays_and_others_give_instead() -> None:
    weak, strong = torch.ones(2, 2), torch.full((4, 2), 9.0)
    assert Global()(shares([weak, strong], Slices(0)), 0.5) == {"t0": Fraction(1, 2), "t1": Fraction(1, 2)}


def test_pruned_weights_fill_the_budget_first() -> None:
    first, second = torch.tensor([[5.0, 6.0, 7.0, 8.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    dead = torch.tensor([[-torch.inf, -torch.inf, 7.0, 8.0]])
    assert Global()(shares([dead, second]), 0.375) == {"t0": Fraction(1, 2), "t1": Fraction(1, 4)}
    assert Global()(shares([first, second]), 0.375) == {"t0": Fraction(0), "t1": Fraction(3, 4)}


def test_a_budget_beyond_one_weight_a_tensor_is_refused_by_value() -> None:
    tensors = [torch.arange(5.0).view(1, 5), torch.arange(5.0).view(1, 5), torch.tensor([[9.0]])]
    with pytest.raises(PatternError, match=r"0\.95.*3 tensors.*lower"):
        Global()(shares(tensors), 0.95)


@quick
@given(sizes, st.integers(0, 99))
def test_uniform_is_the_same_everywhere(shapes: list[tuple[int, int]], percent: int) -> None:
    found = Uniform()(shares([torch.zeros(s) for s in shapes]), percent / 100)
    assert found == {f"t{i}": Fraction(percent, 100) for i in range(len(shapes))}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9, bias=False), nn.Linear(9, 5, bias=False), nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(2)
    return model


def test_pruning_globally_zeroes_the_smallest_weights_of_the_model() -> None:
    model = net()
    every = [(abs(w), name, i) for name, p in model.named_parameters() for i, w in enumerate(p.flatten().tolist())]
    budget = sum(p.numel() for p in model.parameters()) // 2
    wanted = {(name, i) for _, name, i in sorted(every)[:budget]}
    manager = MaskManager(model, Targets(head=True))
    prune(manager, 0.5, allocation="global")
    dead = {(n, i) for n, p in model.named_parameters() for i, w in enumerate(p.flatten().tolist()) if w == 0}
    assert dead == wanted
    shares_of = {name: count / size for name, (count, size) in manager.counts().items()}
    assert shares_of["0.weight"] < 0.4 < 0.6 < shares_of["1.weight"] < 1
    # twin: uniformly, every tensor has the same share
    uniformly = MaskManager(net(), Targets(head=True))
    prune(uniformly, 0.5)
    assert {name: dead for name, (dead, _) in uniformly.counts().items()} == {
        "0.weight": 31,
        "1.weight": 22,
        "2.weight": 7,
    }


@pytest.mark.parametrize("steps", [[0.8], [0.2, 0.5, 0.8]])
def test_global_budgets_are_exact_however_often(steps: list[float]) -> None:
    manager = MaskManager(net(), Targets(head=True))
    total = 7 * 9 + 9 * 5 + 5 * 3
    before: set[tuple[str, int]] = set()
    for sparsity in steps:
        prune(manager, sparsity, allocation="global")
        dead = {(n, i) for n, m in manager.masks.items() for i, alive in enumerate(m.flatten().tolist()) if not alive}
        assert len(dead) == total * round(100 * sparsity) // 100
        assert before <= dead
        before = dead


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured("row")])
def test_patterns_fixed_by_rows_or_groups_cannot_follow_a_threshold(pattern: Pattern) -> None:
    with pytest.raises(RecipeError, match=rf"fc1.*{pattern}.*use allocation 'uniform', or pattern 'unstructured'"):
        Global()([share(torch.ones(4, 4), pattern, "fc1")], 0.5)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (
            lambda: get_allocation("globl"),
            ["'globl'", "uniform, uniform_plus, global, erk, lamp, owl, fixed:FILE", "Did you mean 'global'"],
        ),
        (
            lambda: Global()([share(torch.ones(4, 4)), share(torch.ones(4, 4), Block(2, 2))], 0.5),
            ["several kinds", "unstructured", "block:2x2", "uniform"],
        ),
    ],
)
def test_errors_name_the_value_and_the_way_out(broken: Callable[[], object], says: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        broken()
    assert [text for text in says if text not in str(caught.value)] == []


def test_nothing_to_share_is_nothing() -> None:
    assert Global()([], 0.5) == Uniform()([], 0.5) == {}
    assert {name: type(get_allocation(name)) for name in NAMES} == NAMES
    assert share(torch.ones(3, 4), parse_pattern("2:4")).numel == 12


def test_a_refused_sparsity_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    manager = MaskManager(model, Targets(head=True), "neurons")
    with pytest.raises(PatternError):
        prune(manager, 0.3)  # reachable in 8 neurons, not in 2
    assert manager.masks == {}
    assert all(bool((p != 0).all()) for p in model.parameters())


def test_what_a_tensor_is_to_reach() -> None:
    tensors = MaskManager(
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))),
        Targets(head=True),
        "2:4",
        {"^0": Override(sparsity=0.0), "^2": Override(pattern="1:4")},
    )
    assert [final_sparsity(t, None) for t in tensors] == [0.0, Fraction(1, 2), Fraction(3, 4)]


def test_a_sparse_mask_is_true_where_alive() -> None:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(Tensor([[3.0, -1.0, 2.0]]))
    manager = MaskManager(model)
    prune(manager, 0.34)
    assert manager.masks["weight"].tolist() == [[True, False, True]]
    assert model.weight.tolist() == [[3.0, 0.0, 2.0]]


def test_what_is_pruned_counts_as_pruned_whatever_its_zero_would_score() -> None:
    class AsItIs(Criterion):
        def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
            return weight

    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-4.0, -3.0], [-2.0, 5.0]]))
        model[1].weight.copy_(torch.tensor([[-1.0, 2.0], [3.0, 4.0]]))
    manager = MaskManager(model, Targets(head=True))
    prune(manager, 0.25, criterion=AsItIs(), allocation="global")
    assert [dead for dead, _ in manager.counts().values()] == [2, 0]
    prune(manager, 0.375, criterion=AsItIs(), allocation="global")  # -2 is next, though two zeros are not less
    assert [dead for dead, _ in manager.counts().values()] == [3, 0]
