"""ERK: exact counts, the formula's proportions, tensors that stay dense."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.allocation.erk import erk_sparsities as erk
from sparsetrain.errors import PatternError

SHAPES = st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=4), min_size=1, max_size=6)


def kept(shapes: list[tuple[int, ...]], sparsity: float) -> list[Fraction]:
    return [(1 - s) * math.prod(shape) for shape, s in zip(shapes, erk(shapes, sparsity), strict=True)]


@settings(max_examples=200, deadline=None)
@given(shapes=SHAPES, percent=st.integers(0, 99))
def test_counts_add_up_and_no_tensor_dies(shapes: list[list[int]], percent: int) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    sparsity = Fraction(percent, 100)
    pruned = math.floor(sparsity * sum(sizes))
    if sum(sizes) - pruned < len(sizes):
        with pytest.raises(PatternError, match=r"each keeps one (unit )?at least"):
            erk(shapes, sparsity)
        return
    zeros = [s * size for s, size in zip(erk(shapes, sparsity), sizes, strict=True)]
    assert all(z.denominator == 1 and 0 <= z < size for z, size in zip(zeros, sizes, strict=True))
    assert sum(zeros) == pruned


def test_what_stays_is_in_proportion_to_the_sum_of_the_dimensions() -> None:
    # Sums of dimensions 20, 40 and 6+6+3+3 = 18: of 824 weights 78 stay, one for each.
    assert kept([(10, 10), (20, 20), (6, 6, 3, 3)], 1 - 78 / 824) == [20, 40, 18]
    # Two tensors alike and an odd number to prune: of equals the earlier is pruned first.
    assert kept([(10, 10), (10, 10)], 0.795) == [20, 21]


def test_what_would_pass_1_stays_dense_and_the_rest_is_shared() -> None:
    # 4 weights whose share of 60 would be 4/84 * 60 = 2.9; of 84 it would be 4: at 0.5 the tensor is full.
    assert kept([(2, 2), (10, 10), (30, 30)], 0.9) == [4, 24, 73]  # 97 over dimensions 20 and 60: 24.25 and 72.75
    assert erk([(3, 4), (5, 5)], 0) == [0, 0]


def test_a_last_weight_is_kept() -> None:
    assert kept([(2, 2), (100, 100)], 1 - 30 / 10004) == [1, 29]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan, 95])
def test_no_such_sparsity(sparsity: float) -> None:
    with pytest.raises(PatternError, match="sparsity"):
        erk([(3, 4)], sparsity)
