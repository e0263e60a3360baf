"""Every pattern against plain Python: pools of units, `sorted`, and counts in integer arithmetic."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsetrain.errors import PatternError
from sparsetrain.patterns import NM, Block, Pattern, Slices, Unstructured, exact, parse_pattern
from sparsetrain.targets import Layout

Index = tuple[int, ...]
Unit = list[Index]

quick = settings(max_examples=120, deadline=None)
free = st.one_of(
    st.sampled_from([Unstructured(), Unstructured("row"), Slices(0), Slices(1)]),
    st.builds(Block, st.integers(1, 4), st.integers(2, 5)),
    st.builds(Block, st.integers(2, 4), st.integers(1, 5)),
)
nm = st.sampled_from([NM(1, 4), NM(2, 4), NM(4, 8), NM(3, 5), NM(1, 2), NM(15, 16), NM(3, 20)])
# Linear, Conv1d, Conv2d, Conv3d
shapes = st.lists(st.integers(1, 7), min_size=2, max_size=2).flatmap(
    lambda matrix: st.lists(st.integers(1, 3), max_size=3).map(lambda kernel: (*matrix, *kernel))
)


def pools(pattern: Pattern, shape: Index, percent: int) -> list[tuple[list[Unit], int]]:
    """What competes with what, in order of index, and how many of it are pruned."""
    entries = list(itertools.product(*map(range, shape)))
    columns = list(itertools.product(*map(range, shape[1:])))
    match pattern:
        case Unstructured(scope="tensor"):
            return [([[i] for i in entries], len(entries) * percent // 100)]
        case Unstructured():
            return [([[(o, *c)] for c in columns], len(columns) * percent // 100) for o in range(shape[0])]
        case NM(keep=keep, group=group):
            return [
                ([[(o, i, *k)] for i in range(first, first + group)], group - keep)
                for o in range(shape[0])
                for first in range(0, shape[1], group)
                for k in itertools.product(*map(range, shape[2:]))
            ]
        case Block(rows=rows, cols=cols):
            units = [
                [(o, *c) for o in range(shape[0])[top : top + rows] for c in columns[left : left + cols]]
                for top in range(0, shape[0], rows)
                for left in range(0, len(columns), cols)
            ]
        case Slices(dim=dim):
            units = [[i for i in entries if i[dim] == at] for at in range(shape[dim])]
        case _:
            raise AssertionError(pattern)
    return [(units, len(units) * percent // 100)]


def importance(unit: Unit, scores: dict[Index, float]) -> float | Fraction:
    values = [scores[i] for i in unit]
    if all(v == -math.inf for v in values):
        return -math.inf
    return Fraction(sum(int(v) for v in values if v != -math.inf), len(values))


def dead_by_sorting(pattern: Pattern, shape: Index, percent: int, scores: dict[Index, float]) -> set[Index]:
    dead: set[Index] = set()
    for units, count in pools(pattern, shape, percent):
        order = sorted(range(len(units)), key=lambda u: (importance(units[u], scores), u))
        dead |= {i for u in order[:count] for i in units[u]}
    return dead


def draw_scores(shape: Index, seed: int) -> tuple[Tensor, dict[Index, float]]:
    """Few distinct integers, hence many ties, and every fourth entry dead already."""
    source = random.Random(seed)
    entries = list(itertools.product(*map(range, shape)))
    values = {i: source.choice([-math.inf, *range(-2, 7)]) if source.random() < 0.8 else -math.inf for i in entries}
    return torch.tensor([float(values[i]) for i in entries]).reshape(shape), values


def dead_in(mask: Tensor) -> set[Index]:
    return {tuple(i) for i in (~mask).nonzero().tolist()}


def asked(pattern: Pattern, percent: int) -> float | Fraction:
    return percent / 100 if pattern.sparsity is None else pattern.sparsity


def fitted(pattern: Pattern, shape: Index) -> Index:
    return shape if not isinstance(pattern, NM) else (shape[0], shape[1] * pattern.group, *shape[2:])


@quick
@given(st.one_of(free, nm), shapes, st.integers(0, 99), st.integers(0, 10**6))
def test_select_is_the_sort_and_passes_its_own_check(pattern: Pattern, shape: Index, percent: int, seed: int) -> None:
    shape = fitted(pattern, shape)
    scores, values = draw_scores(shape, seed)
    mask = pattern.select(scores, asked(pattern, percent))
    assert dead_in(mask) == dead_by_sorting(pattern, shape, percent, values)
    assert mask.dtype == torch.bool
    pattern.check(mask, asked(pattern, percent))


@quick
@given(st.one_of(free, nm), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99), st.integers(0, 10**6))
def test_a_transposed_layout_is_seen_outputs_first(pattern: Pattern, rows: int, cols: int, percent: int, seed: int) -> None:
    shape = fitted(pattern, (rows, cols))
    scores, values = draw_scores(shape, seed)
    layout, stored = Layout(transposed=True), scores.t().contiguous()
    mask = layout.view(pattern.select(layout.view(stored), asked(pattern, percent)))
    assert tuple(mask.shape) == (shape[1], shape[0])
    assert layout.shape(mask.shape) == shape
    assert {(o, i) for i, o in dead_in(mask)} == dead_by_sorting(pattern, shape, percent, values)
    pattern.check(layout.view(mask), asked(pattern, percent))


@quick
@given(st.one_of(free, nm), shapes, st.integers(0, 99), st.integers(0, 10**6))
def test_check_rejects_every_mask_with_one_bit_flipped(pattern: Pattern, shape: Index, percent: int, seed: int) -> None:
    mask = pattern.select(draw_scores(fitted(pattern, shape), seed)[0], asked(pattern, percent)).contiguous()
    flat = mask.view(-1)
    for at in {0, flat.numel() - 1, seed % flat.numel()}:
        flat[at] = ~flat[at]
        with pytest.raises(PatternError):
            pattern.check(mask, asked(pattern, percent))
        flat[at] = ~flat[at]
    pattern.check(mask, asked(pattern, percent))


@quick
@given(st.one_of(st.just(Unstructured("row")), nm), st.integers(1, 5), st.integers(0, 99), st.integers(0, 10**6))
def test_a_row_local_pattern_selects_the_same_in_a_part(pattern: Pattern, rows: int, percent: int, seed: int) -> None:
    scores, _ = draw_scores(fitted(pattern, (rows + 1, 3, 2)), seed)
    assert pattern.row_local
    whole = pattern.select(scores, asked(pattern, percent))
    parts = [pattern.select(part, asked(pattern, percent)) for part in (scores[:rows], scores[rows:])]
    assert torch.equal(whole, torch.cat(parts))
    assert not any(p.row_local for p in (Unstructured(), Block(2, 2), Slices(0), Slices(1)))


@quick
@given(free, shapes, st.integers(0, 10**6), st.floats(0, 1))
def test_sparsity_of_is_the_most_that_prunes_only_zeros(pattern: Pattern, shape: Index, seed: int, share: float) -> None:
    zeros = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    assume(not zeros.all())
    found, alive = pattern.sparsity_of(zeros), (~zeros).float()
    assert not (~pattern.select(alive, found) & ~zeros).any()
    pool = len(pools(pattern, shape, 0)[0][0])
    more = found + Fraction(1, pool)
    assert more == 1 or (~pattern.select(alive, more) & ~zeros).any()


def test_sparsity_of_nm_is_its_own_or_none() -> None:
    assert NM(3, 5).sparsity_of(torch.tensor([[True, False, False, False, False]])) == Fraction(2, 5)
    assert NM(3, 5).sparsity_of(torch.zeros(1, 5, dtype=torch.bool)) == 0


@pytest.mark.parametrize(("sparsity", "size", "count"), [(0.29, 100, 29), (0.57, 100, 57), (0.07, 100, 7), (0.9, 10, 9)])
def test_counts_are_exact_in_decimals(sparsity: float, size: int, count: int) -> None:
    mask = Unstructured().select(torch.arange(float(size)).view(1, size), sparsity)
    assert mask.tolist() == [[False] * count + [True] * (size - count)]
    row = Unstructured("row").select(torch.arange(2.0 * size).view(2, size), sparsity)
    assert (~row).sum(1).tolist() == [count, count]
    assert (~Slices(0).select(torch.arange(float(size)).view(size, 1), sparsity)).sum() == count


def test_how_many_units_are_pruned() -> None:
    assert Unstructured().pruned((4, 3), 0.5) == 6
    assert Unstructured("row").pruned((4, 3), 0.5) == 4  # 1 of 3 in each of 4 rows
    assert [Block(2, 2).pruned((5, 3), 0.5), Slices(0).pruned((5, 3), 0.5), Slices(1).pruned((5, 3), 0.5)] == [3, 2, 1]


def test_the_decimals_above_are_those_that_binary_floats_miss() -> None:
    assert [math.floor(s * 100) for s in (0.29, 0.57, 0.07)] == [28, 56, 7]
    assert exact(0.29) == Fraction(29, 100)
    assert exact(Fraction(1, 3)) == Fraction(1, 3)


def test_equal_scores_go_by_lowest_index() -> None:
    same = torch.zeros(2, 4)
    assert Unstructured().select(same, 0.375).tolist() == [[False, False, False, True], [True] * 4]
    assert NM(2, 4).select(same, 0.5).tolist() == [[False, False, True, True]] * 2
    assert Slices(1).select(same, 0.25).tolist() == [[False, True, True, True]] * 2
    assert Block(1, 2).select(same, 0.25).tolist() == [[False, False, True, True], [True] * 4]


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("row"), NM(1, 2), Slices(1), Block(1, 2)])
def test_a_dead_weight_goes_before_a_worse_live_one(pattern: Pattern) -> None:
    worse = torch.full((1, 2), -9.0)
    dead = torch.full((1, 2), -torch.inf)
    pair = torch.stack([worse, dead], -1) if isinstance(pattern, NM | Slices) else torch.cat([worse, dead], 1)
    pair = pair.view(1, 2, 2).movedim(-1, 1) if isinstance(pattern, NM | Slices) else pair
    alive = pattern.select(pair, 0.5).flatten().tolist()
    assert alive == [True, True, False, False]
    # twin: were the dead ones merely bad (-8 beats -9), the worse ones would go
    assert pattern.select(pair.clamp(min=-9).where(pair > -torch.inf, torch.tensor(-8.0)), 0.5).flatten().tolist() == [
        False,
        False,
        True,
        True,
    ]


def test_nm_groups_lie_along_the_input_dimension() -> None:
    linear = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert NM(2, 4).select(linear, 0.5).tolist() == [[True, False, True, False], [False, False, True, True]]
    # one filter, 4 input channels, kernel 1x2: the channels compete at each kernel position by themselves
    conv = torch.tensor([[9.0, 1.0], [8.0, 2.0], [7.0, 3.0], [6.0, 4.0]]).view(1, 4, 1, 2)
    assert NM(2, 4).select(conv, 0.5).view(4, 2).tolist() == [
        [True, False],
        [True, False],
        [False, True],
        [False, True],
    ]
    # an embedding (words, dim) groups along dim; transformers' Conv1D stores (in, out)
    embedding = torch.tensor([[0.0, 5.0, 1.0, 9.0], [3.0, 3.0, 4.0, 0.0], [7.0, 1.0, 2.0, 3.0]])
    assert NM(1, 4).select(embedding, 0.75).tolist() == [
        [False, False, False, True],
        [False, False, True, False],
        [True, False, False, False],
    ]
    view = Layout(transposed=True).view
    assert view(NM(2, 4).select(view(linear.t().contiguous()), 0.5)).t().tolist() == NM(2, 4).select(linear, 0.5).tolist()


def test_ragged_blocks_compete_by_their_mean() -> None:
    scores = torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 0.0], [2.0, 2.0, 0.5]])
    # means: 1, 1 | 2, 0.5 -> by sum the whole block (4) would beat the edge ones, by mean the corner goes first
    assert Block(2, 2).units((3, 3)) == 4
    assert dead_in(Block(2, 2).select(scores, 0.25)) == {(2, 2)}
    assert dead_in(Block(2, 2).select(scores, 0.5)) == {(2, 2), (0, 0), (0, 1), (1, 0), (1, 1)}
    assert Block(9, 9).units((3, 3)) == 1


def test_nm_that_is_dense_checks_on_any_shape() -> None:
    NM(2, 4).check(torch.ones(4, 10, dtype=torch.bool), 0)
    hole = torch.ones(4, 10, dtype=torch.bool)
    hole[1, 2] = False
    with pytest.raises(PatternError):
        NM(2, 4).check(hole, 0)


def test_nm_takes_its_sparsity_as_a_float_too() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0]])
    assert NM(1, 3).select(scores, 2 / 3).tolist() == [[True, False, False]]


patterns = st.one_of(free, nm, st.integers(1, 30).flatmap(lambda k: st.builds(NM, st.just(k), st.integers(k + 1, 40))))


@quick
@given(patterns)
def test_the_text_of_a_pattern_parses_to_it(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(f"  {str(pattern).upper()} ") == pattern
    assert parse_pattern(pattern) is pattern


def test_other_spellings() -> None:
    assert parse_pattern("filters") == Slices(0)
    assert parse_pattern("16x4") == Block(16, 4)


HALF = torch.tensor([[True, False, True, True]])


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda: exact(1.0), ["1.0", "[0, 1)"]),
        (lambda: exact(-0.1), ["-0.1", "[0, 1)"]),
        (lambda: exact(90), ["90", "percent", "0.9"]),
        (lambda: exact(math.nan), ["nan", "[0, 1)", "such as 0.9"]),
        (lambda: exact(math.inf), ["inf", "[0, 1)", "such as 0.9"]),
        (lambda: Unstructured().select(torch.ones(2, 2), 1.0), ["1.0", "[0, 1)"]),
        (lambda: NM(2, 4).validate((8, 8), 0.6), ["2:4", "0.5", "0.6", "unstructured"]),
        (lambda: NM(2, 4).select(torch.ones(2, 8), 0.75), ["2:4", "0.5", "0.75"]),
        (lambda: NM(2, 4).validate((8, 10), 0.5), ["divides by 4", "10", "targets.exclude", "overrides"]),
        (lambda: NM(2, 4).validate((8,), 0.5), ["divides by 4", "None", "targets.exclude"]),
        (lambda: NM(4, 2), ["4:2", "keep < group", "2:4"]),
        (lambda: NM(0, 4), ["0:4", "keep < group"]),
        (lambda: NM(4, 4), ["4:4", "keep < group"]),
        (lambda: Block(1, 1), ["1x1", "unstructured"]),
        (lambda: Block(0, 4), ["0x4", "4x4"]),
        (lambda: Block(4, 4).validate((8, 8), 0.2), ["block:4x4", "4 units", "(8, 8)", "0.2", "targets.exclude"]),
        (lambda: Slices(0).validate((3, 8), 0.3), ["neurons", "3 units", "0.3"]),
        (lambda: Slices(2), ["2", "0 = outputs", "1 = inputs"]),  # type: ignore[arg-type]
        (lambda: Unstructured("column"), ["column", "'tensor' or 'row'"]),  # type: ignore[arg-type]
        (lambda: parse_pattern("unstuctured"), ["unstuctured", "Did you mean 'unstructured'", "2:4", "block:16x16"]),
        (lambda: parse_pattern("neuron"), ["Did you mean 'neurons'"]),
        (lambda: Unstructured().check(HALF.float(), 0.25), ["bool", "torch.float32"]),
        (lambda: Unstructured().check(HALF, 0.5), ["1 weights", "exactly 2"]),
        (lambda: Unstructured("row").check(HALF, 0.5), ["row 0", "1 pruned", "exactly 2"]),
        (lambda: NM(2, 4).check(HALF, 0.5), ["group 0 of row 0", "3 of 4", "2:4"]),
        (lambda: Block(1, 2).check(HALF, 0.5), ["unit (0, 0)", "block:1x2", "wholly"]),
        (lambda: Slices(1).check(HALF, 0.5), ["1 channels", "exactly 2"]),
        (lambda: Unstructured().select(torch.tensor([[1.0, math.nan]]), 0.5), ["1 of 2", "NaN"]),
    ],
)
def test_errors_name_the_value_and_the_way_out(broken: Callable[[], Any], says: list[str]) -> None:
    with pytest.raises(PatternError) as caught:
        broken()
    assert [text for text in says if text not in str(caught.value)] == []
