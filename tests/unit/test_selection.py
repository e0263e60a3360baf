"""The fast selections against Python's own stable sort on (value, index), with ties, infinities and tiny chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsetrain import selection
from sparsetrain.errors import PatternError
from sparsetrain.selection import GlobalThreshold, global_threshold, keep_n_of_m, prune_lowest, prune_lowest_rows

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# few distinct values, both zeros, both infinities, and neighbours that only the full precision tells apart
VALUES = [-torch.inf, -3.0, -1.5, -0.0, 0.0, 1.0, 1.0 + 2**-7, 1.0 + 2**-23, 1.0 + 2**-52, 2.5, 1e-40, torch.inf]
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=[8, 24, 1 << 18], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    size = int(request.param)
    monkeypatch.setattr(selection, "CHUNK", size)
    monkeypatch.setattr(selection, "SAMPLE_EVERY", 3 if size < 100 else 256)
    return size


def pruned_by_sorting(values: Sequence[float], count: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    dead = set(order[:count])
    return [i not in dead for i in range(len(values))]


def tensors(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Half ties and special values, half random numbers."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.tensor(VALUES, dtype=torch.float64)[torch.randint(len(VALUES), shape, generator=generator)]
    plain = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, some, plain).to(dtype)


def as_lists(scores: Tensor) -> list[float]:
    return [float(value) for value in scores.flatten()]


@quick
@given(seed=st.integers(0, 10**6), size=st.integers(0, 70), share=st.floats(0, 1), dtype=st.sampled_from(DTYPES))
def test_flat_selection_is_the_stable_sort(seed: int, size: int, share: float, dtype: torch.dtype) -> None:
    scores, count = tensors(size, seed=seed, dtype=dtype), round(share * size)
    assert prune_lowest(scores, count).tolist() == pruned_by_sorting(as_lists(scores), count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 8, 9, 23, 24, 25, 48, 601])
def test_every_count_across_the_chunk_limits(size: int, dtype: torch.dtype) -> None:
    scores = tensors(size, seed=size, dtype=dtype)
    values = as_lists(scores)
    for count in range(0, size + 1, 1 if size < 100 else 97):
        assert prune_lowest(scores, count).tolist() == pruned_by_sorting(values, count)


@pytest.mark.parametrize("view", ["transposed", "kernel", "strided", "scalar"])
def test_a_view_counts_by_its_own_rows(view: str) -> None:
    base = tensors(6, 9, 2, seed=1)
    scores = {
        "transposed": base[:, :, 0].t(),
        "kernel": base.permute(2, 0, 1),
        "strided": base.flatten()[1::3],
        "scalar": base[0, 0, 0],
    }[view]
    for count in range(scores.numel() + 1):
        mask = prune_lowest(scores, count)
        assert mask.shape == scores.shape
        assert mask.flatten().tolist() == pruned_by_sorting(as_lists(scores), count)


def test_ties_of_a_transposed_view_are_cut_in_the_order_of_the_view() -> None:
    ones = torch.ones(2, 3)
    assert prune_lowest(ones.t(), 2).tolist() == [[False, False], [True, True], [True, True]]
    assert prune_lowest(ones, 2).t().tolist() == [[False, True], [False, True], [True, True]]


def test_a_large_tensor_with_a_heavy_tie_inside_the_bracket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CHUNK", 1 << 14)
    monkeypatch.setattr(selection, "SAMPLE_EVERY", 64)
    monkeypatch.setattr(selection, "_radix", None)  # the bracket alone must do
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(700, 500, generator=generator).abs()
    scores[torch.rand(700, 500, generator=generator) < 0.3] = 0.0
    ranked = scores.flatten().sort(stable=True)
    for count in (1, 90_000, 104_000, 105_800, 200_000, 349_999):
        mask = prune_lowest(scores, count).flatten()
        assert int((~mask).sum()) == count
        assert not mask[ranked.indices[:count]].any()


def test_a_sample_that_misleads_costs_time_but_not_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.arange(100.0)
    monkeypatch.setattr(selection, "_bracket", lambda scores, count: (70.5, 80.5))
    for count in (1, 30, 71, 72, 90, 100):
        assert prune_lowest(scores, count).tolist() == [i >= count for i in range(100)]


@quick
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    size=st.integers(0, 30),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_row_selection_is_the_stable_sort_of_each_row(
    seed: int, rows: int, size: int, share: float, dtype: torch.dtype, transposed: bool
) -> None:
    scores = tensors(size, rows, seed=seed, dtype=dtype).t() if transposed else tensors(rows, size, seed=seed, dtype=dtype)
    count = round(share * size)
    expected = [pruned_by_sorting(as_lists(row), count) for row in scores]
    assert prune_lowest_rows(scores, count).tolist() == expected


def test_rows_of_a_kernel_are_all_its_other_dims() -> None:
    scores = tensors(4, 3, 2, 2, seed=5)
    mask = prune_lowest_rows(scores, 5)
    assert mask.shape == scores.shape
    assert mask.flatten(1).tolist() == [pruned_by_sorting(as_lists(row), 5) for row in scores]


@quick
@given(
    seed=st.integers(0, 10**6),
    group=st.integers(1, 20),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
)
def test_n_of_m_is_the_stable_sort_of_each_group(
    seed: int, group: int, share: float, dtype: torch.dtype, rows: int, groups: int
) -> None:
    scores, keep = tensors(rows, groups * group, seed=seed, dtype=dtype), round(share * group)
    expected = [pruned_by_sorting(as_lists(part), group - keep) for part in scores.view(-1, group)]
    assert keep_n_of_m(scores, keep, group).view(-1, group).tolist() == expected


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (17, 32)])
def test_n_of_m_groups_the_input_channels_of_a_kernel(keep: int, group: int) -> None:
    scores = tensors(3, 2 * group, 2, 3, seed=9)
    mask = keep_n_of_m(scores, keep, group)
    assert mask.shape == scores.shape
    for o in range(3):
        for y in range(2):
            for x in range(3):
                for g in (0, group):
                    part = scores[o, g : g + group, y, x]
                    alive = pruned_by_sorting(as_lists(part), group - keep)
                    assert mask[o, g : g + group, y, x].tolist() == alive


def test_n_of_m_of_a_transposed_view() -> None:
    scores = tensors(12, 5, seed=3).t()
    expected = [pruned_by_sorting(as_lists(part), 2) for part in scores.reshape(-1, 4)]
    assert keep_n_of_m(scores, 2, 4).reshape(-1, 4).tolist() == expected


def callables(parts: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
    return [lambda part=part: part.clone() for part in parts]  # type: ignore[misc]


@quick
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(0, 40), max_size=5),
    share=st.floats(0, 1),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
)
def test_a_global_threshold_is_the_stable_sort_of_all_tensors(
    seed: int, sizes: list[int], share: float, dtypes: list[torch.dtype]
) -> None:
    parts = [tensors(n, seed=seed + i, dtype=d) for i, (n, d) in enumerate(zip(sizes, dtypes, strict=False))]
    values = [value for part in parts for value in as_lists(part)]
    count = round(share * len(values))
    found = global_threshold(callables(parts), count)
    assert [m for i, part in enumerate(parts) for m in found.mask(i, part).tolist()] == pruned_by_sorting(values, count)
    assert sum(found.counts) == count
    assert found.ties == 0
    assert found.value == (sorted(values)[count - 1] if count else -torch.inf)
    assert found.below == [sum(v < found.value for v in as_lists(part)) for part in parts]
    assert found.equal == [sum(v == found.value for v in as_lists(part)) for part in parts]


def test_earlier_tensors_give_their_ties_first() -> None:
    parts = [torch.tensor([2.0, 1.0, 2.0]), torch.tensor([2.0, 0.0]), torch.tensor([2.0, 3.0])]
    assert global_threshold(callables(parts), 5) == GlobalThreshold(2.0, [3, 2, 0], [1, 1, 0], [2, 1, 1])
    assert global_threshold(callables(parts), 3) == GlobalThreshold(2.0, [2, 1, 0], [1, 1, 0], [2, 1, 1])
    assert global_threshold(callables(parts[::-1]), 3) == GlobalThreshold(2.0, [1, 1, 1], [0, 1, 1], [1, 1, 2])


def both_ranks(parts: Sequence[Sequence[Tensor]], count: int) -> list[GlobalThreshold]:
    """Two ranks in one thread: each is run again whenever the sums it has seen so far are one round longer."""
    sums: list[Tensor] = []
    while True:
        asked, found = [], []
        for mine in parts:
            replies = iter(sums)

            def reduce(local: Tensor, replies=replies) -> Tensor:  # type: ignore[no-untyped-def]
                reply = next(replies, None)
                if reply is None:
                    raise _NextRound(local)
                return reply.clone()  # type: ignore[no-any-return]

            try:
                found.append(global_threshold(callables(mine), count, reduce))
            except _NextRound as pause:
                asked.append(pause.local)
        if found:
            assert not asked, "every rank must make the same calls to reduce"
            return found
        sums.append(torch.stack(asked).sum(0))


class _NextRound(Exception):
    def __init__(self, local: Tensor) -> None:
        self.local = local


@settings(parent=quick, max_examples=20)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), dtype=st.sampled_from(DTYPES), cut=st.sampled_from([0, 7, 8, 20]))
def test_two_ranks_find_what_one_process_finds(seed: int, share: float, dtype: torch.dtype, cut: int) -> None:
    parts = [tensors(20, seed=seed, dtype=dtype), tensors(20, seed=seed + 1)]
    count = round(share * 40)
    whole = global_threshold(callables(parts), count)
    ranks = both_ranks([[p[:cut] for p in parts], [p[cut:] for p in parts]], count)
    for field in ("below", "equal"):
        assert [sum(pair) for pair in zip(*(getattr(r, field) for r in ranks), strict=True)] == getattr(whole, field)
    assert [r.value for r in ranks] == [whole.value] * 2
    assert [r.ties for r in ranks] == [count - sum(sum(r.counts) for r in ranks)] * 2
    left, settled = ranks[0].ties, []
    for i in range(2):  # what a caller does: ties in the order of tensors, then of ranks
        for r in ranks:
            take = min(left, r.equal[i]) if left else r.counts[i] - r.below[i]
            left -= min(left, take)
            settled.append((i, r, r.below[i] + take))
    for i, part in enumerate(parts):
        (_, a, first), (_, b, second) = (entry for entry in settled if entry[0] == i)
        top = dataclasses.replace(a, counts=[first] * 2).mask(i, part[:cut])
        bottom = dataclasses.replace(b, counts=[second] * 2).mask(i, part[cut:])
        assert torch.equal(torch.cat([top, bottom]), whole.mask(i, part))


def test_ties_left_to_the_ranks_are_told() -> None:
    ranks = both_ranks([[torch.tensor([1.0, 1.0, 0.0])], [torch.tensor([1.0, 5.0])]], 3)
    assert ranks == [GlobalThreshold(1.0, [1], [1], [2], ties=2), GlobalThreshold(1.0, [0], [0], [1], ties=2)]
    ranks = both_ranks([[torch.tensor([1.0, 1.0, 0.0])], [torch.tensor([1.0, 5.0])]], 4)
    assert ranks == [GlobalThreshold(1.0, [3], [1], [2]), GlobalThreshold(1.0, [1], [0], [1])]


def test_nan_anywhere_on_any_rank_stops_every_rank() -> None:
    with pytest.raises(PatternError, match="1 of 4 scores are NaN"):
        both_ranks([[torch.tensor([1.0, torch.nan])], [torch.tensor([1.0, 5.0])]], 1)


def test_scores_are_made_one_tensor_at_a_time() -> None:
    alive = most = 0

    def get() -> Tensor:
        nonlocal alive, most
        scores = _Counted(torch.randn(50, 7).t())
        alive += 1
        most = max(most, alive)
        return scores

    class _Counted(Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

        @staticmethod
        def __new__(cls, data: Tensor) -> _Counted:  # type: ignore[misc]
            return Tensor._make_subclass(cls, data)  # type: ignore[return-value]

    global_threshold([get] * 5, 100)
    global_threshold([get] * 5, 100, torch.clone)
    assert most == 1


@pytest.mark.parametrize("count", [0, 3, 12])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_nan_is_counted_and_refused(count: int, place: int) -> None:
    scores = torch.arange(12.0).view(3, 4)
    scores.view(-1)[place] = torch.nan
    for select in (
        lambda: prune_lowest(scores, count),
        lambda: prune_lowest(scores.t(), count),
        lambda: prune_lowest_rows(scores, count // 4),
        lambda: keep_n_of_m(scores, 2, 4),
        lambda: global_threshold([lambda: scores], count, torch.clone),
    ):
        with pytest.raises(PatternError, match="1 of 12 scores are NaN"):
            select()


def test_what_cannot_be_done_is_refused_with_its_numbers() -> None:
    scores = torch.ones(2, 6)
    with pytest.raises(PatternError, match="13 of the 12 entries"):
        prune_lowest(scores, 13)
    with pytest.raises(PatternError, match="-1 of the 12 entries"):
        global_threshold([lambda: scores], -1, torch.clone)
    with pytest.raises(PatternError, match="7 of the 6 entries in each row"):
        prune_lowest_rows(scores, 7)
    with pytest.raises(PatternError, match="use prune_lowest"):
        prune_lowest_rows(scores[0], 1)
    with pytest.raises(PatternError, match=r"2:4 on shape \(2, 6\)"):
        keep_n_of_m(scores, 2, 4)
    with pytest.raises(PatternError, match=r"4:3 on shape \(2, 6\)"):
        keep_n_of_m(scores, 4, 3)
    with pytest.raises(PatternError, match="int64"):
        prune_lowest(scores.long(), 1)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    prune_lowest(torch.ones(1000), 10)
    assert torch.equal(torch.get_rng_state(), before)
