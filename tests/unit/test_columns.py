"""Which entries of a few columns go: exactly so many, by quickselect where no two are equal at the threshold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.criteria import columns
from sparsetrain.criteria.columns import choice_for
from sparsetrain.errors import PatternError
from sparsetrain.patterns import parse_pattern
from sparsetrain.selection import prune_lowest


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**16), st.data())
def test_exactly_the_lowest_go_also_among_equals(rows: int, cols: int, kinds: int, seed: int, data: st.DataObject) -> None:
    values = torch.randint(kinds, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()
    count = data.draw(st.integers(0, rows * cols))
    for seen in (values, values.mT.contiguous().mT, values.double()):
        assert torch.equal(columns._lowest(seen, count), ~prune_lowest(values, count))


def test_by_hand() -> None:
    scores = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
    assert columns._lowest(scores, 2).tolist() == [[False, True], [True, False]]
    assert columns._lowest(torch.ones(2, 2), 3).tolist() == [[True, True], [True, False]]  # equals: the first ones


def test_quickselect_is_what_decides_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def slowly(scores: torch.Tensor, count: int) -> torch.Tensor:
        asked.append(count)
        return prune_lowest(scores, count)

    monkeypatch.setattr(columns, "prune_lowest", slowly)
    choice = choice_for(parse_pattern("unstructured"), (4, 6), 0.5, None, 6)
    assert choice is not None
    assert int(choice.select(0, 6, torch.arange(24.0).view(4, 6)).sum()) == 12
    assert asked == []
    assert int(choice.select(0, 6, torch.ones(4, 6)).sum()) == 12
    assert asked == [12]


def test_what_is_no_number_has_no_rank() -> None:
    # Nothing is pruned by a rank that is none: the threshold, or one below it.
    with pytest.raises(PatternError, match="NaN"):
        columns._lowest(torch.tensor([[torch.nan, torch.nan, 1.0]]), 2)
