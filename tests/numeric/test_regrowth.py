"""Drop and grow: against the authors' own codes, against toys done in the head, and what every update must keep."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsetrain.errors import PatternError
from sparsetrain.patterns import NM, Block, Slices, Unstructured, parse_pattern
from sparsetrain.regrowth import annealed, drop_and_grow, movable, removals, share_out
from sparsetrain.selection import global_threshold

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((GOLDEN / f"regrowth_{name}.json").read_text())
    assert data["source"].startswith("https://github.com/")
    assert len(data["commit"]) == 40
    return data


def tensor(values: list[float], shape: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(shape)


def mask_of(values: list[int], shape: list[int]) -> Tensor:
    return torch.tensor(values).view(shape).bool()


# -- the authors' codes -----------------------------------------------------------------------------------------------


def test_rigl_gives_the_authors_masks() -> None:
    cases = golden("rigl")["cases"]
    rechosen = 0
    for case in cases:
        shape = case["shape"]
        mask, weight = mask_of(case["mask"], shape), tensor(case["weight"], shape)
        new = drop_and_grow(Unstructured(), mask, weight.abs(), tensor(case["gradient"], shape).abs(), case["drop"])
        assert torch.equal(new, mask_of(case["new_mask"], shape))
        rechosen += case["drop"] - int((mask & ~new).sum())
        # Their new connections start at 0 without momentum; dropped and chosen again, a weight goes on as it was.
        kept, fresh = tensor(case["new_weight"], shape), new & ~mask
        assert torch.equal(kept[new & mask], weight[new & mask])
        assert not kept[fresh].any()
        assert not mask_of(case["memory_kept"], shape)[fresh].any()
    assert rechosen == 1  # the golden data has such a weight


def test_rigl_anneals_as_the_authors_do() -> None:
    for step, fraction in golden("rigl")["anneal"]:
        assert annealed(0.3, step, 750) == pytest.approx(fraction, abs=1e-7)
    assert annealed(0.3, 750, 750) == annealed(0.3, 900, 750) == 0.0


def test_granet_gives_the_authors_masks() -> None:
    for case in golden("granet")["cases"]:
        entries = list(case["tensors"].values())
        scores = [tensor(e["weight"], e["shape"]).abs() for e in entries]
        pruned = [mask_of(e["pruned_mask"], e["shape"]) for e in entries]
        # Their threshold is the last weight they mean to keep, and goes with it; of the count it leaves, the order is the same.
        threshold = global_threshold([lambda s=s: s for s in scores], sum(int((~m).sum()) for m in pruned))  # type: ignore[misc]
        for i, (entry, mask) in enumerate(zip(entries, pruned, strict=True)):
            assert torch.equal(threshold.mask(i, scores[i]), mask)
            growth = tensor(entry["gradient"], entry["shape"]).abs()
            drop = math.ceil(case["rate"] * movable(Unstructured(), mask))
            assert drop == entry["drop"]
            new = drop_and_grow(Unstructured(), mask, scores[i] * mask, growth, drop)
            assert torch.equal(new, mask_of(entry["new_mask"], entry["shape"]))
            assert not torch.equal(new, mask)


def test_sparse_momentum_gives_the_authors_masks() -> None:
    data = golden("sparse_momentum")
    entries = list(data["tensors"].values())
    masks = [mask_of(e["mask"], e["shape"]) for e in entries]
    means = [tensor(e["momentum"], e["shape"]).abs() for e in entries]
    shares = [float(m[mask].double().mean()) for m, mask in zip(means, masks, strict=True)]
    assert [s / sum(shares) for s in shares] == [e["share"] for e in entries]
    alive, sizes = [int(m.sum()) for m in masks], [m.numel() for m in masks]
    drop = removals(alive, sizes, shares, data["rate"])
    assert drop == [e["removed"] for e in entries]
    room = [size - a + d for size, a, d in zip(sizes, alive, drop, strict=True)]
    grow = share_out(sum(drop), shares, room)
    for entry, mask, mean, out, back in zip(entries, masks, means, drop, grow, strict=True):
        new = drop_and_grow(Unstructured(), mask, tensor(entry["weight"], entry["shape"]).abs(), mean, out, back)
        assert torch.equal(new, mask_of(entry["new_mask"], entry["shape"]))
    assert [b - d for d, b in zip(drop, grow, strict=True)] == [-1, 2, -1]  # weights did go from tensor to tensor


# -- toys -------------------------------------------------------------------------------------------------------------


def test_a_tensor_drops_its_weakest_and_grows_the_best() -> None:
    mask = torch.tensor([[True, True, True, False, False, False]])
    strength = torch.tensor([[5.0, 1.0, 2.0, 0.0, 0.0, 0.0]])
    growth = torch.tensor([[9.0, 9.0, 1.0, 3.0, 2.0, 4.0]])
    expect = {0: [1, 1, 1, 0, 0, 0], 1: [1, 1, 1, 0, 0, 0], 2: [1, 1, 0, 0, 0, 1], 3: [1, 1, 0, 0, 0, 1]}
    for drop, new in expect.items():  # the second weight grows again: it has the largest growth score of all
        assert drop_and_grow(Unstructured(), mask, strength, growth, drop).int().tolist() == [new]
    assert drop_and_grow(Unstructured(), mask, strength, growth, 1, 3).int().tolist() == [[1, 1, 1, 1, 0, 1]]
    assert drop_and_grow(Unstructured(), mask, strength, growth, 2, 0).int().tolist() == [[1, 0, 0, 0, 0, 0]]


def test_rows_exchange_each_on_their_own() -> None:
    mask = torch.tensor([[True, True, False, False], [False, True, True, False]])
    strength = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 8.0, 9.0, 0.0]])
    growth = torch.tensor([[0.0, 0.0, 1.0, 2.0], [7.0, 0.0, 0.0, 6.0]])
    new = drop_and_grow(Unstructured("row"), mask, strength, growth, 1)
    assert new.int().tolist() == [[1, 0, 0, 1], [1, 0, 1, 0]]
    assert movable(Unstructured("row"), mask) == 2


def test_nm_swaps_inside_a_group_where_its_weakest_is_weakest() -> None:
    mask = torch.tensor([[True, True, False, False, False, True, False, True]])
    strength = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0, 1.0, 0.0, 9.0]])
    growth = torch.tensor([[99.0, 99.0, 1.0, 2.0, 5.0, 99.0, 4.0, 99.0]])
    assert drop_and_grow(NM(2, 4), mask, strength, growth, 1).int().tolist() == [[1, 1, 0, 0, 1, 0, 0, 1]]
    both = [[1, 0, 0, 1, 1, 0, 0, 1]]
    assert drop_and_grow(NM(2, 4), mask, strength, growth, 2).int().tolist() == both
    assert drop_and_grow(NM(2, 4), mask, strength, growth, 50).int().tolist() == both  # once in each group at most


def test_blocks_and_slices_move_whole() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    strength = torch.tensor([[1.0, 1, 0, 0], [1, 9, 0, 0], [2, 2, 0, 0], [2, 2, 0, 0]])
    growth = torch.tensor([[0.0, 0, 9, 0], [0, 0, 0, 0], [0, 0, 4, 4], [0, 0, 0, 4]])
    new = drop_and_grow(Block(2, 2), mask, strength, growth, 1)  # means: 3 against 2, then 9/4 against 3
    assert new.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    new = drop_and_grow(Slices(1), mask, strength, growth, 1)
    assert new.int().tolist() == [[0, 1, 1, 0]] * 4


def test_shares_go_by_weight_within_the_room() -> None:
    assert share_out(12, [1.0, 2.0, 3.0], [100, 100, 100]) == [2, 4, 6]
    assert share_out(10, [1.0, 8.0, 1.0], [9, 4, 9]) == [3, 4, 3]
    assert share_out(5, [1.0, 1.0], [9, 9]) == [3, 2]  # the odd one to the earlier
    assert share_out(4, [0.0, 0.0], [1, 9]) == [1, 3]
    assert share_out(7, [5.0, 0.0], [4, 9]) == [4, 3]
    for total, weights in ((3, [1.0, 1.0]), (1, [math.nan, 1.0]), (1, [-1.0, 1.0])):
        with pytest.raises(PatternError, match="cannot share"):
            share_out(total, weights, [1, 1])


def test_nearly_dense_tensors_that_would_grow_give_little() -> None:
    # 4 of 40 are zero: a tensor above the mean share gives a tenth of its 36, one below gives half.
    assert removals([36, 36, 10], [40, 40, 40], [0.6, 0.1, 0.3], 0.5) == [4, 18, 5]
    assert removals([1, 2, 0], [40, 40, 40], [1.0, 1.0, 1.0], 0.9) == [0, 1, 0]  # nobody gives up its last weight


# -- what every update keeps --------------------------------------------------------------------------------------------

PATTERNS = ["unstructured", "unstructured:row", "2:4", "1:4", "3:4", "block:2x2", "block:3x4", "neurons", "channels"]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(PATTERNS),
    rows=st.integers(2, 9),
    groups=st.integers(1, 4),
    kernel=st.sampled_from([(), (2,), (3, 2)]),
    sparsity=st.integers(1, 19),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
)
def test_every_update_keeps_the_pattern_exact(
    name: str, rows: int, groups: int, kernel: tuple[int, ...], sparsity: int, fraction: float, seed: int, ties: bool
) -> None:
    pattern, shape = parse_pattern(name), (rows, 4 * groups, *kernel)
    asked = pattern.sparsity or Fraction(sparsity, 20)
    torch.manual_seed(seed)
    scores = [torch.randint(3, shape).float() if ties else torch.rand(shape) for _ in range(3)]
    mask = pattern.select(scores[0], asked)
    drop = math.floor(fraction * movable(pattern, mask))
    new = drop_and_grow(pattern, mask, scores[1], scores[2], drop)
    pattern.check(new, asked)
    died, grew = mask & ~new, new & ~mask
    if name == "unstructured":
        assert int(died.sum()) == int(grew.sum()) <= drop
        kept = mask & new
        if bool(died.any()) and bool(kept.any()):  # what stays is stronger, or was chosen again
            weaker = kept & (scores[1] < scores[1][died].max())
            assert int(weaker.sum()) <= drop
    elif isinstance(pattern, NM):
        assert int(died.sum()) == min(drop, mask.numel() // 4)
        per_group = died.movedim(1, -1).reshape(-1, 4).sum(-1)
        assert int(per_group.max()) <= 1


def test_what_cannot_be_is_refused() -> None:
    mask, scores = torch.tensor([[True, False, True, False]]), torch.rand(1, 4)
    for drop, grow in ((3, 3), (-1, -1), (1, 4)):
        with pytest.raises(PatternError, match="cannot drop"):
            drop_and_grow(Unstructured(), mask, scores, scores, drop, grow)
    with pytest.raises(PatternError, match="2:4 keeps its sparsity"):
        drop_and_grow(NM(2, 4), mask, scores, scores, 1, 0)
    with pytest.raises(PatternError, match="NaN"):
        drop_and_grow(Unstructured(), mask, scores, scores * math.nan, 1)
    with pytest.raises(PatternError, match="as many in each"):
        drop_and_grow(Unstructured("row"), torch.tensor([[True, False], [True, True]]), torch.rand(2, 2), torch.rand(2, 2), 1)
