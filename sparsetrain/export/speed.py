"""Honest timing: ways to do the same work take turns in one process, so that a busy machine slows all of them alike.

Every round runs each way once, in an order that changes; a way that is too quick for the clock runs several times a turn. A
ratio is the median over rounds of (dense / other) *of one round*: the best time of each way alone would compare a quiet
moment of one with a busy moment of the other, and differs by a factor of two on shared machines. One thread without an
accelerator is timed by its own clock (seconds it computed), which stands still while another program has the core; anything
else by the clock on the wall.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import Tensor

from sparsetrain.errors import RecipeError

#: A turn takes at least so many seconds; the fewest rounds a ratio is the median of.
_TURN, _FEWEST = 5e-4, 3

#: What a model is called with: one tensor, a tuple of arguments, or keyword arguments by name.
Sample = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Speed:
    """How much faster the other way is: ``ratio`` = dense time / other time, above 1 is faster (median over rounds).

    ``low`` and ``high``: quartiles of that ratio over rounds. ``dense_ms`` and ``other_ms``: best milliseconds of one call.
    """

    ratio: float
    low: float
    high: float
    dense_ms: float
    other_ms: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x ({self.low:.2f}-{self.high:.2f}; {self.dense_ms:.3g} ms -> {self.other_ms:.3g} ms)"


def run_on(model: Callable[..., Any], sample: Sample) -> Any:
    """Call a model with a sample. Example: ``run_on(model, {"input_ids": tokens})``."""
    if isinstance(sample, Mapping):
        return model(**sample)
    return model(sample) if isinstance(sample, Tensor) else model(*sample)


@contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """Run with so many of torch's threads (None: as many as now); gives the number. Example: ``with thread_count(1): ...``."""
    if threads is not None and threads < 1:
        raise RecipeError(f"threads={threads}: give the number of threads the model will run with, 1 or more")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield threads or before
    finally:
        torch.set_num_threads(before)


def race(ways: Sequence[Callable[[], object]], *, rounds: int = 5, seconds: float = 10.0) -> list[list[float]]:
    """Seconds of one call, for each way a list with one value a round; rounds take turns after a warm-up of two calls.

    Args:
        ways: what to time; each does the same work and returns when it is done, an accelerator is waited for.
        rounds: how many rounds, at least 3.
        seconds: no further round begins after so long (3 are always run).

    Raises `RecipeError` for fewer rounds. Example: ``race([lambda: dense(x), lambda: other(x)])``.
    """
    if rounds < _FEWEST:
        raise RecipeError(f"rounds={rounds}: a median takes at least {_FEWEST}")
    order = random.Random(0)
    repeats = []
    for way in ways:
        way()
        repeats.append(max(1, math.ceil(_TURN / max(_time(way, 1), 1e-7))))
    found: list[list[float]] = [[] for _ in ways]
    collecting = gc.isenabled()
    gc.disable()  # a collection in one way's turn is not that way's time
    try:
        began = perf_counter()
        for turn in range(rounds):
            for which in order.sample(range(len(ways)), len(ways)):
                found[which].append(_time(ways[which], repeats[which]))
            if turn + 1 >= _FEWEST and perf_counter() - began > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return found


def _time(way: Callable[[], object], repeats: int) -> float:
    elsewhere = torch.accelerator.is_available()
    clock = perf_counter if elsewhere or torch.get_num_threads() > 1 else thread_time
    if elsewhere:
        torch.accelerator.synchronize()
    began = clock()
    for _ in range(repeats):
        way()
    if elsewhere:
        torch.accelerator.synchronize()
    return (clock() - began) / repeats


def compare(dense: Sequence[float], other: Sequence[float]) -> Speed:
    """The speed from the seconds of two ways, round by round. Example: ``compare([4.0, 4, 6], [2.0, 2, 3]).ratio`` is 2."""
    ratios = [a / max(b, 1e-9) for a, b in zip(dense, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Speed(middle, low, high, 1e3 * min(dense), 1e3 * min(other), len(ratios))


def measure_speed(
    dense: Callable[..., Any],
    other: Callable[..., Any],
    sample: Sample,
    *,
    rounds: int = 11,
    seconds: float = 10.0,
    threads: int | None = None,
) -> Speed:
    """How much faster ``other`` is than ``dense`` on one sample, without gradients: interleaved rounds after a warm-up.

    Args:
        dense: a model or function to compare with.
        other: a model or function that does the same work.
        sample: what both are called with: a tensor, a tuple of arguments or a dictionary of keyword arguments.
        rounds: how many rounds, at least 3.
        seconds: no further round begins after so long.
        threads: torch's threads while measuring; None: as many as now.

    Raises `RecipeError` for too few rounds or threads.
    Example: ``measure_speed(dense, compacted, torch.randn(64, 784)).ratio``.
    """
    with thread_count(threads), torch.no_grad():
        times = race([lambda: run_on(dense, sample), lambda: run_on(other, sample)], rounds=rounds, seconds=seconds)
    return compare(*times)
