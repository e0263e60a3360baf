"""Schedules: step -> sparsity. Frozen, clamped, pure.

A schedule is written in durations (``3ep`` epochs, ``500st`` optimizer steps, ``30%`` of the run) and resolved once against
the length of the run (`Clock`) into a `Curve`: the exact steps at which the mask changes, and the sparsity at each of them.
Whatever comes after the last change is the final fine-tuning.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass

from sparsetrain.errors import RecipeError


@dataclass(frozen=True)
class Clock:
    """The length of a run in optimizer steps; ``None`` where the trainer cannot know it.

    Example: ``Clock(total_steps=1000, steps_per_epoch=100).steps("30%") == 300``.
    """

    total_steps: int | None
    steps_per_epoch: int | None

    def steps(self, duration: str | int) -> int:
        """Turn a duration into steps, rounded to the nearest. Raises `RecipeError` for what cannot be read or resolved."""
        text = str(duration).strip()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ep|st|%|)", text)
        if not match:
            raise RecipeError(f"duration {duration!r} cannot be read; write 3ep (epochs), 500st (steps) or 30% (of the run)")
        value, unit = float(match[1]), match[2]
        if unit in ("st", ""):
            return round(value)
        base = self.total_steps if unit == "%" else self.steps_per_epoch
        if base is None:
            what = "the run has no known end" if unit == "%" else "the training data has no known length"
            raise RecipeError(f"duration {duration!r} cannot be resolved: {what}; write it in steps, such as 500st")
        if unit == "%" and value > 100:
            raise RecipeError(f"duration {duration!r} is more than the whole run")
        return round(value * base / (100 if unit == "%" else 1))


@dataclass(frozen=True)
class Curve:
    """A resolved schedule: ``points`` are ``(step, sparsity)``, steps strictly increasing; constant in between."""

    points: tuple[tuple[int, float], ...]

    def at(self, step: int) -> float:
        """The sparsity asked at a step; 0 before the first point."""
        index = bisect_right([s for s, _ in self.points], step) - 1
        return self.points[index][1] if index >= 0 else 0.0

    @property
    def last_step(self) -> int:
        """The step of the last change: final fine-tuning starts here."""
        return self.points[-1][0]


class Schedule(ABC):
    """How much when. A subclass needs `points`; `resolve` clamps and checks what it gives."""

    @abstractmethod
    def points(self, final: float, clock: Clock) -> list[tuple[int, float]]:
        """``(step, sparsity)`` for every change of the mask, the last one at ``final``."""

    def resolve(self, final: float, clock: Clock) -> Curve:
        """Resolve against a run. Raises `RecipeError` if a change comes after the end or the final sparsity is missed."""
        merged: dict[int, float] = {}
        for step, sparsity in sorted(self.points(final, clock), key=lambda point: point[0]):
            merged[step] = min(max(sparsity, 0.0), final)
        if not merged:
            raise RecipeError(f"{self} never prunes")
        curve = Curve(tuple(merged.items()))
        if clock.total_steps is not None and curve.last_step >= clock.total_steps > 0:
            raise RecipeError(
                f"{self}: the last change of the mask is at step {curve.last_step}, the run ends at {clock.total_steps}; "
                "let the schedule end earlier, so that fine-tuning can follow, or train longer"
            )
        if not math.isclose(curve.points[-1][1], final, abs_tol=1e-12):
            raise RecipeError(f"{self} ends at sparsity {curve.points[-1][1]:g}, {final:g} was asked")
        return Curve((*curve.points[:-1], (curve.last_step, final)))


@dataclass(frozen=True)
class OneShot(Schedule):
    """Prune once, at ``at``. Example: ``OneShot(at="2ep")``."""

    at: str = "0st"

    def points(self, final: float, clock: Clock) -> list[tuple[int, float]]:
        """One change."""
        return [(clock.steps(self.at), final)]


@dataclass(frozen=True)
class Gradual(Schedule):
    """A smooth ramp from ``initial`` at ``start`` to the final sparsity at ``end``, the mask renewed every ``every``.

    With progress ``x = (step - start) / (end - start)`` the sparsity is ``initial + (final - initial) * shape(x)``.
    """

    start: str = "5%"
    end: str = "70%"
    every: str = "100st"
    initial: float = 0.0

    @abstractmethod
    def shape(self, x: float) -> float:
        """Progress in [0, 1] -> share of the way in [0, 1], 0 at 0 and 1 at 1."""

    def points(self, final: float, clock: Clock) -> list[tuple[int, float]]:
        """One change every ``every``, the last one exactly at ``end``."""
        start, end, every = clock.steps(self.start), clock.steps(self.end), max(1, clock.steps(self.every))
        if end < start:
            raise RecipeError(f"{self}: end (step {end}) comes before start (step {start})")
        if not 0 <= self.initial < 1:
            raise RecipeError(f"{self}: initial sparsity {self.initial} is outside [0, 1)")
        if self.initial > final:
            raise RecipeError(f"{self}: initial sparsity {self.initial} is above the final {final}")
        steps = [*range(start, end, every), end]
        span = max(end - start, 1)
        values = [self.initial + (final - self.initial) * self.shape((s - start) / span) for s in steps]
        values[-1] = final
        # A change to sparsity 0 is none: a ramp from 0 begins with its first real step.
        return [(s, v) for s, v in zip(steps, values, strict=True) if v > 0 or s == end]


@dataclass(frozen=True)
class Linear(Gradual):
    """``shape(x) = x``. Example: ``Linear(start="0st", end="50%")``."""

    def shape(self, x: float) -> float:
        """Straight."""
        return x


@dataclass(frozen=True)
class Cubic(Gradual):
    """``shape(x) = 1 - (1 - x)^3``: fast while weights are plenty (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1).

    Example: ``Cubic(start="5%", end="70%", every="50st")``.
    """

    def shape(self, x: float) -> float:
        """Zhu and Gupta's cubic."""
        return 1 - (1 - x) ** 3


@dataclass(frozen=True)
class Cosine(Gradual):
    """``shape(x) = (1 - cos(pi x)) / 2``: slow at both ends. Example: ``Cosine(end="60%")``."""

    def shape(self, x: float) -> float:
        """Half a cosine."""
        return (1 - math.cos(math.pi * x)) / 2


@dataclass(frozen=True)
class Exponential(Gradual):
    """``shape(x) = (1 - exp(-rate x)) / (1 - exp(-rate))``: the larger ``rate``, the earlier."""

    rate: float = 3.0

    def shape(self, x: float) -> float:
        """Saturating exponential."""
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise RecipeError(f"{self}: rate must be positive and finite")
        return math.expm1(-self.rate * x) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Piecewise(Schedule):
    """A list of ``duration: sparsity``; the last value must be the final sparsity.

    Example: ``Piecewise({"1ep": 0.5, "3ep": 0.8, "50%": 0.9})``.
    """

    at: dict[str, float]

    def points(self, final: float, clock: Clock) -> list[tuple[int, float]]:
        """The list as it stands."""
        points = [(clock.steps(when), float(value)) for when, value in self.at.items()]
        above = [value for _, value in points if not 0 <= value <= final]
        if above:
            raise RecipeError(f"{self}: sparsity {above[0]:g} is outside [0, {final:g}], the final sparsity")
        if len({step for step, _ in points}) < len(points):
            raise RecipeError(f"{self}: two values fall on the same step: {sorted(points)}")
        return points


@dataclass(frozen=True)
class Rounds(Schedule):
    """Prune -> fine-tune -> prune: each round removes the same share of the survivors (Han et al. 2015; LTH 2019).

    After round r the sparsity is ``1 - (1 - prune_rate)^r``. Give ``rounds``, and the rate follows from the final sparsity
    (``prune_rate = 1 - (1 - final)^(1/rounds)``); or give ``prune_rate``, and the number of rounds follows, the last one
    cut to end exactly at the final sparsity.

    Example: ``Rounds(rounds=5, start="2ep", every="1ep")``.
    """

    rounds: int | None = None
    prune_rate: float | None = None
    start: str = "10%"
    every: str = "1ep"

    def sparsities(self, final: float) -> list[float]:
        """The sparsity after each round."""
        if (self.rounds is None) == (self.prune_rate is None):
            raise RecipeError(f"{self}: give rounds or prune_rate, one of the two")
        if self.rounds is not None:
            if self.rounds < 1:
                raise RecipeError(f"{self}: rounds must be at least 1")
            return [1 - (1 - final) ** (r / self.rounds) for r in range(1, self.rounds)] + [final]
        rate = self.prune_rate
        if rate is None or not 0 < rate < 1:
            raise RecipeError(f"{self}: prune_rate {rate} is outside (0, 1): it is the share of the survivors a round removes")
        count = max(1, math.ceil(round(math.log(1 - final) / math.log(1 - rate), 9)))
        return [1 - (1 - rate) ** r for r in range(1, count)] + [final]

    def points(self, final: float, clock: Clock) -> list[tuple[int, float]]:
        """One change a round."""
        start, every = clock.steps(self.start), max(1, clock.steps(self.every))
        return [(start + i * every, s) for i, s in enumerate(self.sparsities(final))]


NAMES: dict[str, type[Schedule]] = {
    "one_shot": OneShot,
    "linear": Linear,
    "cubic": Cubic,
    "exponential": Exponential,
    "cosine": Cosine,
    "piecewise": Piecewise,
    "rounds": Rounds,
}
