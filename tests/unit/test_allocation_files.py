"""Allocations by counts and from files: budgets exact and rising, against the authors' own numbers and toys by hand."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsetrain.allocation import (
    ERK,
    LAMP,
    Allocation,
    Fixed,
    Global,
    Sensitivity,
    Share,
    Uniform,
    UniformPlus,
    erk_sparsities,
    get_allocation,
)
from sparsetrain.allocation.filling import unit_counts
from sparsetrain.allocation.lamp import lamp_scores
from sparsetrain.allocation.sensitivity import lower_hull
from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.patterns import Block, Pattern, Slices, Unstructured, parse_pattern
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

GOLDEN = Path(__file__).parents[1] / "numeric" / "golden"
FREE = Unstructured()
quick = settings(max_examples=80, deadline=None)


def shape_shares(shapes: list[tuple[int, ...]], pattern: Pattern = FREE) -> list[Share]:
    """Shares whose scores must not be asked for."""
    return [Share.without_scores(f"t{i}", pattern, shape) for i, shape in enumerate(shapes)]


def pruned(shares: list[Share], found: dict[str, Fraction]) -> list[int]:
    """Entries that the patterns prune at these sparsities, in whole tensors of zeros."""
    return [int((~share.pattern.select(torch.zeros(share.shape), found[share.name])).sum()) for share in shares]


def scan_file(folder: Path, curves: dict[str, list[float]], numel: int, pattern: str = "unstructured") -> Path:
    """A scan with a measurement for every count 1, 2, ...: loss increases on a baseline of 5."""
    rows = [
        {"name": name, "pattern": pattern, "sparsity": k / numel, "pruned": k, "numel": numel, "loss": 5 + increase}
        for name, curve in curves.items()
        for k, increase in enumerate(curve, 1)
    ]
    path = folder / "sensitivity.json"
    path.write_text(json.dumps({"baseline": {"loss": 5}, "rows": rows}), encoding="utf-8")
    return path


def tensors(count: int, numel: int) -> list[tuple[int, ...]]:
    return [(1, numel)] * count


# -- the authors' numbers -------------------------------------------------------------------------------------------------

LAMP_GOLDEN: dict[str, Any] = json.loads((GOLDEN / "allocation_lamp.json").read_text(encoding="utf-8"))
ERK_GOLDEN: dict[str, Any] = json.loads((GOLDEN / "allocation_erk.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", LAMP_GOLDEN["cases"], ids=lambda case: str(case["amount"]))
def test_lamp_prunes_as_its_authors_do(case: dict[str, Any]) -> None:
    weights = [torch.tensor(w).view(s) for w, s in zip(LAMP_GOLDEN["weights"], LAMP_GOLDEN["shapes"], strict=True)]
    given = [Share(f"t{i}", FREE, tuple(w.shape), lambda w=w: w.abs(), lambda w=w: w.abs()) for i, w in enumerate(weights)]
    found = LAMP()(given, case["amount"])
    assert [int(f * w.numel()) for f, w in zip(found.values(), weights, strict=True)] == case["lamp_pruned"]
    # twin: a threshold on the weights themselves gives other counts
    assert Global()(given, case["amount"]) != found


@pytest.mark.parametrize("case", LAMP_GOLDEN["cases"], ids=lambda case: str(case["amount"]))
def test_erk_and_uniform_plus_agree_with_the_authors_of_lamp(case: dict[str, Any]) -> None:
    given = shape_shares([tuple(s) for s in LAMP_GOLDEN["shapes"]])
    total = sum(share.numel for share in given)
    for allocation, theirs in ((ERK(), case["erk"]), (UniformPlus(), case["unifplus"])):
        if theirs is None:
            with pytest.raises(PatternError, match=r"uniform_plus prunes t0 at most 0, t3 at most 0\.8"):
                allocation(given, case["amount"])
            continue
        counts = pruned(given, allocation(given, case["amount"]))
        # The authors round every layer for itself.
        assert [abs(c - amount * s.numel) <= 1 for c, amount, s in zip(counts, theirs, given, strict=True)] == [True] * 4
        assert sum(counts) == math.floor(Fraction(str(case["amount"])) * total)


@pytest.mark.parametrize("row", ERK_GOLDEN["rows"], ids=lambda row: f"{row['net']}-{row['sparsity']}-{row['power']}")
def test_erk_agrees_with_rigl(row: dict[str, Any]) -> None:
    shapes = [tuple(shape) for shape in ERK_GOLDEN["shapes"][row["net"]]]
    found = erk_sparsities(shapes, row["sparsity"], power=row["power"])
    sizes = [math.prod(shape) for shape in shapes]
    # RigL rounds down every layer's zeros before it sums them: at most one weight a layer over the network.
    slack = [1 + len(sizes) * size / sum(sizes) + 0.5 for size in sizes]
    apart = [abs(float(f) - theirs) * n for f, theirs, n in zip(found, row["sparsities"], sizes, strict=True)]
    assert all(a <= s for a, s in zip(apart, slack, strict=True))
    counts = [f * n for f, n in zip(found, sizes, strict=True)]
    assert sum(counts) == math.floor(Fraction(str(row["sparsity"])) * sum(sizes))


# -- toys by hand ---------------------------------------------------------------------------------------------------------


def test_erk_by_hand() -> None:
    # 104 weights, 52 stay: densities 1 : 0.2 would keep 13 of the first tensor's 4; it stays dense, the other keeps 48.
    assert erk_sparsities([(2, 2), (10, 10)], 0.5) == [Fraction(0), Fraction(13, 25)]
    # out + in: 10 and 20 of 16 and 100 weights, 0.75 of 116 go, 29 stay: 29 * 10 / 30 and 29 * 20 / 30
    assert erk_sparsities([(8, 2), (10, 10)], 0.75) == [Fraction(6, 16), Fraction(81, 100)]
    assert erk_sparsities([(8, 2), (10, 10)], 0.75, power=0) == [Fraction(3, 4), Fraction(3, 4)]


def test_uniform_plus_by_hand() -> None:
    given = shape_shares([(4, 1, 5, 1), (10, 10), (10, 10), (10, 2)])
    # 240 weights, 180 go: none of conv (20), 16 of the last 20, 164 of 200 between
    found = UniformPlus()(given, 0.75)
    assert list(found.values()) == [0, Fraction(82, 100), Fraction(82, 100), Fraction(4, 5)]
    # where the last is not above its cap it is as sparse as the others: 120 of 220 are 54.5 % of 100, 100 and 20
    assert pruned(given, UniformPlus()(given, 0.5)) == [0, 55, 54, 11]
    # a first matrix is no first convolution
    assert pruned(shape_shares([(10, 10), (10, 10)]), UniformPlus()(shape_shares([(10, 10), (10, 10)]), 0.85)) == [90, 80]
    # lifted caps leave the uniform allocation
    assert set(UniformPlus(first=1, last=1)(given, 0.75).values()) == set(Uniform()(given, 0.75).values())
    with pytest.raises(
        PatternError, match=r"0\.95 of 240.*0\.8917 together \(uniform_plus prunes t0 at most 0, t3 at most 0.8"
    ):
        UniformPlus()(given, 0.95)


def test_lamp_scores_by_hand() -> None:
    found = lamp_scores(torch.tensor([[3.0, 1.0], [2.0, 2.0]]))
    assert torch.allclose(found, torch.tensor([[1.0, 1 / 18], [4 / 17, 4 / 13]], dtype=torch.float64), rtol=1e-15)
    tiny = lamp_scores(torch.tensor([3e-30, 1e-30, 2e-30]))  # their squares are no float32
    assert torch.allclose(tiny, torch.tensor([1.0, 1 / 14, 4 / 13], dtype=torch.float64), rtol=1e-6)
    dead = lamp_scores(torch.tensor([-math.inf, 2.0, 1.0]))
    assert dead.tolist() == [-math.inf, 1.0, 0.2]
    assert lamp_scores(torch.zeros(3)).tolist() == [0.0, 0.0, 1.0]


def test_lamp_ignores_the_scale_of_a_tensor() -> None:
    values = torch.arange(1.0, 9.0).view(2, 4)
    for scale in (1.0, 1000.0):
        given = [
            Share(f"t{i}", FREE, (2, 4), lambda v=v: v, lambda v=v: v)  # type: ignore[misc]
            for i, v in enumerate([values, values * scale])
        ]
        assert pruned(given, LAMP()(given, 0.5)) == [4, 4]
    # twin: one threshold on the weights empties the small tensor first
    assert pruned(given, Global()(given, 0.5)) == [7, 1]


def test_lamp_refuses_what_squares_rank_wrongly() -> None:
    negative = Share("fc", FREE, (1, 2), lambda: torch.tensor([[-1.0, 2.0]]), lambda: torch.tensor([[-1.0, 2.0]]))
    with pytest.raises(RecipeError, match=r"negative.*criterion 'magnitude', or allocation 'global'"):
        LAMP()([negative], 0.5)
    with pytest.raises(RecipeError, match=r"fc: allocation 'lamp'.*neurons.*'erk'"):
        LAMP().check(Slices(0), "fc")


# -- budgets --------------------------------------------------------------------------------------------------------------

shapes = st.lists(
    st.one_of(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.tuples(st.integers(1, 4), st.integers(1, 4), st.just(3))),
    min_size=1,
    max_size=5,
)
ALLOCATIONS: dict[str, Allocation] = {"erk": ERK(), "soft erk": ERK(0.5), "uniform_plus": UniformPlus(first=0.5, last=0.9)}


@quick
@given(shapes, st.lists(st.integers(0, 99), min_size=2, max_size=6), st.sampled_from(list(ALLOCATIONS)))
def test_budgets_are_exact_and_counts_only_rise(given_shapes: list[tuple[int, ...]], percents: list[int], name: str) -> None:
    given = shape_shares(given_shapes)
    total = sum(share.numel for share in given)
    before = [0] * len(given)
    for percent in sorted(percents):
        try:
            found = ALLOCATIONS[name](given, percent / 100)
        except PatternError:
            assert total * percent // 100 > 0.4 * total - len(given)
            return
        counts = pruned(given, found)
        assert sum(counts) == total * percent // 100
        assert all(low <= count < share.numel for low, count, share in zip(before, counts, given, strict=True))
        before = counts


@quick
@given(shapes, st.integers(0, 90), st.sampled_from(["unstructured:row", "neurons", "channels", "block:2x2", "block:1x3"]))
def test_units_never_exceed_the_budget_and_miss_it_by_less_than_a_unit(
    given_shapes: list[tuple[int, ...]], percent: int, pattern: str
) -> None:
    given = shape_shares(given_shapes, parse_pattern(pattern))
    budget = sum(share.numel for share in given) * percent // 100
    largest = [unit_counts(share)[1] for share in given]
    try:
        found = ERK()(given, percent / 100)
    except PatternError:
        assert budget > sum((n - 1) * size for n, size in map(unit_counts, given))
        return
    counts = pruned(given, found)
    assert sum(counts) <= budget
    assert all(count < share.numel for count, share in zip(counts, given, strict=True))
    if "x" not in pattern:  # ragged blocks are smaller than they are counted
        assert budget - sum(counts) < max(largest) or counts == [(n - 1) * size for n, size in map(unit_counts, given)]


def test_what_shapes_decide_can_be_tried_before_there_are_scores() -> None:
    given = shape_shares(tensors(3, 4))
    for allocation in (ERK(), LAMP(), Global(), Uniform(), Fixed({"t0": 0.5, "t1": 0.5, "t2": 0.5})):
        allocation.validate(given, 0.5)
    with pytest.raises(PatternError, match="tensors can lose"):
        ERK().validate(given, 0.95)
    with pytest.raises(RecipeError, match=r"t0 has no scores here.*'erk'"):
        Global()(given, 0.5)
    with pytest.raises(RecipeError, match="t0: allocation 'lamp'"):
        LAMP().validate(shape_shares([(4, 4)], Slices(0)), 0.5)


def test_a_budget_that_leaves_nothing_to_a_tensor_is_refused() -> None:
    with pytest.raises(PatternError, match=r"0\.95 of 12 weights.*3 tensors can lose 0\.75 together, and each keeps one"):
        erk_sparsities(tensors(3, 4), 0.95)
    assert ERK()([], 0.5) == LAMP()([], 0.5) == UniformPlus()([], 0.5) == {}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9, bias=False), nn.Linear(9, 5, bias=False), nn.Linear(5, 3, bias=False))


@pytest.mark.parametrize("name", ["erk", "lamp", "uniform_plus"])
def test_pruning_a_model_gradually_meets_every_budget(name: str) -> None:
    manager = MaskManager(net(), Targets(head=True))
    for sparsity in (0.31, 0.5, 0.77):
        prune(manager, sparsity, allocation=name, regrow=False)
        assert sum(dead for dead, _ in manager.counts().values()) == math.floor(123 * sparsity)
    assert manager.verify().ok


# -- from files -----------------------------------------------------------------------------------------------------------


def test_fixed_gives_what_is_written_and_its_share_on_the_way() -> None:
    given = shape_shares([(10, 10), (10, 10), (4, 5)])
    fixed = Fixed({"t0": 0.8, "t1": 0.4, "t2": 0.0})
    # 80 + 40 of 220
    assert pruned(given, fixed(given, Fraction(120, 220))) == [80, 40, 0]
    assert pruned(given, fixed(given, Fraction(60, 220))) == [40, 20, 0]
    before = [0, 0, 0]
    for budget in range(121):
        counts = pruned(given, fixed(given, Fraction(budget, 220)))
        assert sum(counts) == budget
        assert all(a <= b for a, b in zip(before, counts, strict=True))
        before = counts


def test_fixed_takes_numbers_with_three_digits() -> None:
    given = shape_shares([(3, 111), (7, 91), (2, 3)])
    fixed = Fixed({"t0": 0.667, "t1": 0.9, "t2": 0.0})
    # 222.11 + 573.3 of 976: 0.815 is 795.44
    counts = pruned(given, fixed(given, 0.815))
    assert (sum(counts), counts[2]) == (795, 0)
    with pytest.raises(RecipeError, match=r"makes sparsity 0\.815 over these tensors and has no answer for 0\.9"):
        fixed(given, 0.9)


def test_fixed_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps({"sparsity": 0.3, "layers": {"t0": 0.5, "t1": 0.1}, "spearman": 0.9}), encoding="utf-8")
    given = shape_shares(tensors(2, 10))
    named = get_allocation(f"fixed:{path}")
    assert named == Fixed(str(path))
    assert pruned(given, named(given, 0.3)) == [5, 1]


def test_sensitivity_solves_the_knapsack(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(3)
    numel = 6
    curves = {f"t{i}": torch.rand(numel - 1, generator=source).sort().values.cumsum(0).tolist() for i in range(3)}
    given = shape_shares(tensors(3, numel))
    best = Sensitivity(str(scan_file(tmp_path, curves, numel)))

    def cost(counts: tuple[int, ...]) -> float:
        return sum(curves[f"t{i}"][k - 1] for i, k in enumerate(counts) if k)

    before = [0, 0, 0]
    for budget in range(3 * (numel - 1) + 1):
        counts = pruned(given, best(given, Fraction(budget, 3 * numel)))
        options = [c for c in itertools.product(range(numel), repeat=3) if sum(c) == budget]
        assert cost(tuple(counts)) == pytest.approx(min(map(cost, options)))
        assert all(a <= b for a, b in zip(before, counts, strict=True))
        before = counts
    # twin: the same everywhere costs more
    assert cost((2, 2, 2)) > cost(tuple(pruned(given, best(given, Fraction(6, 18)))))


def test_a_useless_layer_goes_first_and_equal_ones_together(tmp_path: Path) -> None:
    flat, steep = [0.0, -0.1, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]
    given = shape_shares(tensors(3, 5))
    known = Sensitivity(str(scan_file(tmp_path, {"t0": steep, "t1": flat, "t2": steep}, 5)))
    assert pruned(given, known(given, Fraction(4, 15))) == [0, 4, 0]
    assert pruned(given, known(given, Fraction(8, 15))) == [2, 4, 2]


def test_the_hull_of_a_curve() -> None:
    assert lower_hull([(0.9, 1.0), (0.5, 3.0)]) == [(0.0, 0.0), (0.9, 3.0)]
    assert lower_hull([(0.5, -1.0), (0.9, 1.0)]) == [(0.0, 0.0), (0.5, 0.0), (0.9, 1.0)]
    assert lower_hull([(0.2, 2.0), (0.4, 2.0), (0.8, 9.0)]) == [(0.0, 0.0), (0.4, 2.0), (0.8, 9.0)]


def write(folder: Path, content: object) -> str:
    path = folder / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


ROW = {"name": "t0", "pattern": "unstructured", "pruned": 5, "numel": 10, "loss": 1.0}
BASE = {"baseline": {"loss": 1.0}}


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda at: ERK(-1), "ERK power=-1"),
        (lambda at: UniformPlus(last=1.5), r"last=1\.5 is outside"),
        (lambda at: Fixed(str(at / "no.json")), r"no\.json' is no file; `sparsetrain predict"),
        (lambda at: Fixed(write(at, "{")), "cannot be read as JSON"),
        (lambda at: Fixed(write(at, {"sparsity": 0.5})), "names no layers"),
        (lambda at: Fixed({"t0": 1.0}), "sparsity 1.0 of t0 is no number"),
        (lambda at: Fixed({"t0": True}), "sparsity True of t0 is no number"),
        (lambda at: Fixed({"t00": 0.5})(shape_shares([(2, 2)]), 0.5), "says nothing of t0.*Did you mean 't00'.*another model"),
        (lambda at: Fixed({"t0": 0.5, "t1": 0.5})(shape_shares([(2, 2)]), 0.5), "names t1, which is not pruned here"),
        (lambda at: Fixed({"t0": 0.5})(shape_shares([(4, 4)], parse_pattern("2:4")), 0.5), "t0: pattern 2:4 always has"),
        (lambda at: Sensitivity(str(at / "no.json")), "`sparsetrain sensitivity"),
        (lambda at: Sensitivity(write(at, [1])), "holds a list, no scan"),
        (lambda at: Sensitivity(write(at, {"rows": [ROW]})), "is no scan: it has no baseline and rows"),
        (lambda at: Sensitivity(write(at, BASE | {"rows": [{"name": "t0"}]})), "a row lacks or garbles 'pattern'"),
        (lambda at: Sensitivity(write(at, BASE | {"rows": [ROW | {"pruned": 11}]})), r"t0 at 1\.1"),
        (lambda at: Sensitivity(write(at, BASE | {"rows": [ROW]}))(shape_shares([(2, 5)] * 2), 0.1), "says nothing of t1"),
        (
            lambda at: Sensitivity(write(at, BASE | {"rows": [ROW]}))(shape_shares([(10, 1)], Slices(0)), 0.1),
            "measured t0 for unstructured, not for neurons.*--units",
        ),
        (
            lambda at: Sensitivity(write(at, BASE | {"rows": [ROW]}))(shape_shares([(2, 5)]), 0.7),
            r"can lose 0\.5 together, as far as .* has measured",
        ),
        (lambda at: get_allocation("fixed"), "needs its file: 'fixed:FILE.json'"),
        (lambda at: get_allocation("sensitiv:x"), "Did you mean 'sensitivity'"),
    ],
)
def test_errors_say_what_broke(broken: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, PatternError), match=says):
        broken(tmp_path)


def test_a_loss_that_is_no_number_is_as_bad_as_can_be(tmp_path: Path) -> None:
    rows = [ROW | {"loss": 1.1}, ROW | {"pruned": 8, "loss": None}, ROW | {"name": "t1", "pruned": 8, "loss": 9.0}]
    known = Sensitivity(write(tmp_path, BASE | {"rows": rows}))
    given = shape_shares(tensors(2, 10))
    assert pruned(given, known(given, Fraction(13, 20))) == [5, 8]


def test_units_of_patterns() -> None:
    counts = {
        "unstructured": (24, 1),
        "unstructured:row": (6, 4),
        "neurons": (4, 6),
        "channels": (6, 4),
        "block:3x4": (4, 12),
    }
    for text, expected in counts.items():
        assert unit_counts(shape_shares([(4, 6)], parse_pattern(text))[0]) == expected
    assert unit_counts(shape_shares([(2, 3)], Block(4, 4))[0]) == (1, 6)
