"""Exact selection of the lowest scores: fast on a CPU, small in memory; nothing is sorted in full.

Work goes in chunks that fit the cache. One threshold over many entries: a random sample brackets it, one pass counts, and
only what lies inside (about 1 %) is selected from; over ranks, bits are counted instead, since counts add. One threshold a
row: a partial selection, then a second look at rows with ties. N of M: a chunk is compared with itself shifted by 1, 2, ...

Scores are floating and may be infinite; -0.0 equals 0.0; NaN has no rank and raises ``PatternError``. Among equal scores the
lower row-major index of the tensor as given is pruned first. Masks are contiguous, ``True`` = alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparsetrain.errors import PatternError

Scores = Callable[[], Tensor]
Sum = Callable[[Tensor], Tensor]

CHUNK = 1 << 19  # entries a pass touches at once: 2 MiB of float32, in cache, worth starting threads for; on a GPU 64 times
SAMPLE_EVERY = 256  # one entry of this many is drawn to bracket a threshold
COMPARE_GROUP = 16  # above this group size a selection per row costs less than comparing all pairs


@dataclass(frozen=True)
class GlobalThreshold:
    """The ``count``-th lowest score over several tensors, and how many entries each tensor must prune.

    ``value`` is that score (``-inf`` for a count of 0). Tensor i has ``below[i]`` scores under it and ``equal[i]`` at
    it, and prunes its ``counts[i]`` lowest. ``ties`` is 0 when the counts are complete. It is positive only over ranks,
    when some of the equal scores must stay alive: then ``counts == below``, and the caller hands out ``ties`` more
    among all ranks' ``equal``, whose order a sum cannot know.
    """

    value: float
    counts: list[int]
    below: list[int]
    equal: list[int]
    ties: int = 0

    def mask(self, index: int, scores: Tensor) -> Tensor:
        """Return the mask of tensor ``index``, ``counts[index]`` entries ``False``; ``scores`` are as counted.

        Example: ``global_threshold([lambda: s], 3).mask(0, s)``.
        """
        ties, equal = self.counts[index] - self.below[index], self.equal[index]
        mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        for piece, alive in _pieces(scores, _wide(scores, self.value), mask):
            (torch.gt if ties else torch.ge)(piece, self.value, out=alive)
            if 0 < ties < equal:  # here equal scores part; as long as they share one fate nothing needs counting
                at = (piece == self.value).nonzero().squeeze(1)
                alive[at[ties:]] = True
                ties, equal = ties - min(ties, len(at)), equal - len(at)
        return mask


def prune_lowest(scores: Tensor, count: int) -> Tensor:
    """Return the mask of ``scores``' shape with exactly ``count`` entries ``False``: the lowest scores.

    Needs about 0.1 byte a weight beside the mask. Raises ``PatternError`` for a count outside [0, entries], NaN, or a
    dtype that is not floating.

    Example: ``prune_lowest(torch.tensor([3.0, 1.0, 1.0]), 1)`` is ``[True, False, True]``.
    """
    return global_threshold([lambda: scores], count).mask(0, scores)


def prune_lowest_rows(scores: Tensor, count: int) -> Tensor:
    """Return the mask with exactly ``count`` entries ``False`` a row: dim 0 counts rows, all other dims are one row.

    Raises ``PatternError`` as ``prune_lowest`` does, and for a tensor without rows.

    Example: ``prune_lowest_rows(torch.tensor([[3.0, 1.0], [5.0, 9.0]]), 1)`` is ``[[True, False], [False, True]]``.
    """
    if scores.dim() < 2:
        raise PatternError(f"rows need 2 or more dims, got shape {tuple(scores.shape)}; use prune_lowest")
    size = scores.shape[1:].numel()
    _refuse_count(count, size, "in each row")
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for piece, alive in _pieces(scores, _wide(scores), mask, unit=max(1, size)):
        _prune_rows(piece.view(-1, size), count, alive.view(-1, size))
    return mask


def keep_n_of_m(scores: Tensor, keep: int, group: int) -> Tensor:
    """Return the mask alive at the ``keep`` highest of ``group`` consecutive entries along dim 1 of (out, in, *kernel).

    Raises ``PatternError`` when ``group`` does not divide ``in``, ``keep`` is outside [0, group], or a score is NaN.

    Example: ``keep_n_of_m(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), 2, 4)`` is ``[[True, False, True, False]]``.
    """
    if scores.dim() < 2 or group < 1 or scores.shape[1] % group or not 0 <= keep <= group:
        shape = tuple(scores.shape)
        raise PatternError(f"{keep}:{group} on shape {shape} needs dim 1 divisible by {group}, and 0 <= keep <= group")
    last = scores.movedim(1, -1)  # now a group is a run in row-major order
    mask = torch.empty(last.shape, dtype=torch.bool, device=scores.device)
    seats, same = _seats(min(last.numel(), (CHUNK if scores.is_cpu else 64 * CHUNK) + group), group, scores.device)
    for piece, alive in _pieces(last, _wide(scores), mask, unit=group):
        if group > COMPARE_GROUP:
            _prune_rows(piece.view(-1, group), group - keep, alive.view(-1, group))
        else:  # uint8 out as well: mixed dtypes would not be vectorised
            torch.lt(_losses(piece, seats, same), keep, out=alive.view(torch.uint8))
    return mask.movedim(-1, 1).contiguous()


def global_threshold(scores: Sequence[Scores], count: int, reduce: Sum | None = None) -> GlobalThreshold:
    """Find the exact ``count``-th lowest score over all tensors; among equal scores, earlier tensors are pruned first.

    Each callable gives its tensor's scores, the same every time; it is called up to nine times, one at a time, and its
    result is not kept. ``reduce`` returns the sum over ranks of an int64 CPU tensor; ``count``, ``value`` and ``ties``
    are then those of all ranks, the lists this rank's own. Raises ``PatternError`` as ``prune_lowest`` does.

    Example: ``global_threshold([lambda: torch.ones(2), lambda: torch.zeros(2)], 3).counts`` is ``[1, 2]``.
    """
    if reduce is None:
        value, tallies = _bracketed(scores, count)
    else:
        value = _radix(scores, count, reduce)
        tallies = [_tally(get(), value) for get in scores]
    totals = torch.tensor(tallies, dtype=torch.int64).view(-1, 2).sum(0)
    under, equals = (totals if reduce is None else reduce(totals)).tolist()
    left = count - under
    ties = left if reduce is not None and left < equals else 0
    counts = []
    for below, equal in tallies:
        take = 0 if ties else min(left, equal)
        counts.append(below + take)
        left -= take
    return GlobalThreshold(value, counts, [below for below, _ in tallies], [equal for _, equal in tallies], ties)


def _bracketed(scores: Sequence[Scores], count: int) -> tuple[float, list[tuple[int, int]]]:
    """The threshold and each tensor's (below, equal), in one pass after the sample."""
    low, high = _bracket(scores, count)
    counted = [_between(get(), low, high) for get in scores]
    candidates = torch.cat([torch.empty(0), *(inside for _, inside in counted)])
    rank = count - sum(under for under, _ in counted)
    if 0 < rank <= len(candidates):
        value, tallies = float(candidates.kthvalue(rank).values), []
        for under, inside in counted:
            below, equal = _tally(inside, value)
            tallies.append((under + below, equal))
        return value, tallies
    value = low if rank <= 0 else high
    tallies = [_tally(get(), value) for get in scores]
    below, equal = (sum(column) for column in zip((0, 0), *tallies, strict=True))
    if count and not below < count <= below + equal:  # the sample misled: count bits instead
        value = _radix(scores, count, torch.clone)
        tallies = [_tally(get(), value) for get in scores]
    return value, tallies


def _bracket(scores: Sequence[Scores], count: int) -> tuple[float, float]:
    """Two scores four standard deviations of a sampled quantile either side of the wanted one; infinite at the ends."""
    generator, total, drawn = torch.Generator().manual_seed(0), 0, [torch.empty(0)]
    for get in scores:
        tensor = get()
        take = (total + tensor.numel()) // SAMPLE_EVERY - total // SAMPLE_EVERY  # the same share of small tensors too
        total += tensor.numel()
        if take:  # random places: a regular stride would see only some columns of a matrix
            at = torch.randint(tensor.numel(), (take,), generator=generator).to(tensor.device)
            drawn.append(tensor[torch.unravel_index(at, tensor.shape)].reshape(-1).cpu())
        del tensor  # before the next one is made
    _refuse_count(count, total, "of all tensors")
    sample, share = torch.cat(drawn).sort().values, count / max(1, total)
    margin = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 5
    first, last = int(len(sample) * share - margin), int(len(sample) * share + margin) + 1
    return float(sample[first]) if first > 0 else -torch.inf, float(sample[last]) if last < len(sample) else torch.inf


def _between(scores: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many entries are <= ``low``, and the entries strictly inside (``low``, ``high``)."""
    under, found = 0, [torch.empty(0)]
    for piece, _ in _pieces(scores, _wide(scores, low, high)):
        inside = piece > low
        under += len(piece) - int(torch.count_nonzero(inside))
        inside.view(torch.uint8).bitwise_and_((piece < high).view(torch.uint8))
        if len(piece) % 8 == 0:  # few are inside: eight flags at a time find the places worth a look
            piece = piece.view(-1, 8)[inside.view(torch.int64).nonzero().squeeze(1)]
            inside = (piece > low) & (piece < high)
        found.append(piece[inside].cpu())
    return under, torch.cat(found)


def _tally(scores: Tensor, value: float) -> tuple[int, int]:
    below = equal = 0
    for piece, _ in _pieces(scores, _wide(scores, value)):
        below += int(torch.count_nonzero(piece < value))
        equal += int(torch.count_nonzero(piece == value))
    return below, equal


def _radix(scores: Sequence[Scores], count: int, reduce: Sum) -> float:
    """The ``count``-th lowest score by counting 16 bits a pass; every rank makes the same calls to ``reduce``."""
    facts = torch.zeros(3, dtype=torch.int64)
    for get in scores:
        tensor = get()
        facts += torch.tensor([tensor.numel(), int(tensor.isnan().sum()), tensor.dtype == torch.float64])
        del tensor  # before the next one is made
    total, nan, doubles = reduce(facts).tolist()
    _refuse_nan(nan, total)
    _refuse_count(count, total, "of all tensors")
    if count == 0:
        return -torch.inf
    kind, bits = (torch.float64, torch.int64) if doubles else (torch.float32, torch.int32)
    low = -(1 << 15)  # the first key still possible, in units of the digit counted
    for shift in range(torch.iinfo(bits).bits - 16, -1, -16):
        upto = reduce(sum((_digits(get(), kind, shift, low) for get in scores), torch.zeros(1 << 16).long())).cumsum(0)
        place = int(torch.searchsorted(upto, count))
        count -= int(upto[place - 1]) if place else 0
        low = (low + place) << 16
    return float(_ordered(torch.tensor([low >> 16], dtype=bits)).view(kind))


def _digits(scores: Tensor, kind: torch.dtype, shift: int, low: int) -> Tensor:
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for piece, _ in _pieces(scores, kind):
        bits = piece.view(torch.int64 if kind == torch.float64 else torch.int32)
        digit = (_ordered(bits) >> shift) - low
        counts += torch.bincount(digit[(digit >= 0) & (digit < 1 << 16)], minlength=1 << 16).cpu()
    return counts


def _ordered(bits: Tensor) -> Tensor:
    """Integers in the order of the floats whose bits these are; its own inverse."""
    return bits ^ ((bits >> (torch.iinfo(bits.dtype).bits - 1)) & torch.iinfo(bits.dtype).max)


def _prune_rows(scores: Tensor, count: int, alive: Tensor) -> None:
    """Write into ``alive`` the mask of 2-D ``scores`` without the ``count`` lowest of each row."""
    if not count:
        alive.fill_(True)
        return
    cut = scores.topk(count, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    torch.gt(scores, cut, out=alive)
    # so many of the scores equal to the cut stay alive, the last ones
    short = scores.shape[1] - count - torch.count_nonzero(alive, dim=1)
    rows = short.nonzero().squeeze(1)
    if len(rows):
        equal = scores[rows] == cut[rows]
        pruned = torch.count_nonzero(equal, dim=1) - short[rows]
        alive[rows] |= equal & (equal.cumsum(1) > pruned[:, None])


@lru_cache(maxsize=8)  # whoever selects every step selects the same shapes
def _seats(length: int, group: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    seats = torch.arange(length, device=device).remainder_(group).byte()
    return seats, [(seats[i:] >= i).view(torch.uint8) for i in range(1, min(group, COMPARE_GROUP))]


def _losses(piece: Tensor, seats: Tensor, same: list[Tensor]) -> Tensor:
    """Per entry how many of its group outrank it; ``same[shift - 1]`` is 1 where i and i + ``shift`` share a group."""
    losses = seats[: len(piece)].clone()  # begin with a loss to every earlier entry, take back those that were none
    flags = torch.empty_like(piece, dtype=torch.bool)
    for shift, together in enumerate(same, 1):
        pairs = len(piece) - shift
        torch.ge(piece[shift:], piece[:pairs], out=flags[:pairs])
        wins = flags[:pairs].view(torch.uint8).bitwise_and_(together[:pairs])
        losses[:pairs] += wins
        losses[shift:] -= wins
    return losses


def _pieces(scores: Tensor, dtype: torch.dtype, mask: Tensor | None = None, unit: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Contiguous runs of ``scores`` in row-major order as ``dtype``, whole units each, with their part of ``mask``."""
    step = max(1, (CHUNK if scores.is_cpu else 64 * CHUNK) // unit) * unit
    rows = max(1, step // scores[0].numel()) if scores.numel() and scores.dim() else 1
    blocks = [scores] if scores.is_contiguous() else torch.split(scores, rows)
    flat, start = (scores.new_empty(0) if mask is None else mask.view(-1)), 0
    for run in (run for block in blocks for run in torch.split(block.reshape(-1), step)):
        if len(run):
            piece = run.to(dtype)
            if bool(piece.amax().isnan()):  # amax carries NaN, at a tenth of the price of isnan
                _refuse_nan(int(scores.isnan().sum()), scores.numel())
            yield piece, flat[start : start + len(piece)]
            start += len(piece)


def _wide(scores: Tensor, *values: float) -> torch.dtype:
    """The dtype to compare ``scores`` with ``values`` in: float32 unless that rounds one of them."""
    if not scores.is_floating_point():
        raise PatternError(f"scores must be floating, got {scores.dtype}; convert them with .float() or .double()")
    exact = all(float(torch.tensor(value, dtype=torch.float32)) == value for value in values)
    return torch.float32 if exact and scores.dtype != torch.float64 else torch.float64


def _refuse_count(count: int, size: int, where: str) -> None:
    if not 0 <= count <= size:
        raise PatternError(f"cannot prune {count} of the {size} entries {where}; ask for 0 to {size}")


def _refuse_nan(nan: int, size: int) -> None:
    if nan:
        raise PatternError(f"{nan} of {size} scores are NaN and have no rank; find what diverged before pruning")
