"""A validation metric that pruning heeds: a round ends as soon as it is back, and nothing shrinks while it is too bad."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparsetrain.errors import RecipeError, nearest


@dataclass(frozen=True)
class Recovery:
    """End a round as soon as the validation metric has recovered; at the latest after the schedule's ``every``.

    Recovered: within ``tolerance`` of the best value before the first round, or no better for ``patience`` validations.
    """

    monitor: str = "val/accuracy"
    mode: Literal["max", "min"] = "max"
    tolerance: float = 0.0
    patience: int = 3

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise RecipeError(f"recovery.mode {self.mode!r} is unknown; use 'max' or 'min'")
        if self.patience < 1 or not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise RecipeError(
                f"recovery needs patience of at least 1 and a tolerance of 0 or more, not {self.patience} and {self.tolerance}"
            )

    def value(self, metrics: Mapping[str, Any]) -> float:
        """The monitored value, turned so that more is better; raises `RecipeError` if it is not logged."""
        return _value("recovery", self.monitor, self.mode, metrics)


@dataclass(frozen=True)
class Guard:
    """While ``monitor`` is worse than its best by more than ``margin`` (in its own units), nothing shrinks and nothing goes.

    What it holds back to the end of training is told, and not pruned. ``mode`` "max" or "min" says which way is better.
    Raises `RecipeError` for another mode, or a margin below 0.

    Example: ``Guard("val/accuracy", 0.01)``.
    """

    monitor: str
    margin: float
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf or self.mode not in ("max", "min"):
            raise RecipeError(f"guard margin={self.margin} mode={self.mode!r}: a margin of at least 0, and mode 'max' or 'min'")

    def value(self, metrics: Mapping[str, Any]) -> float:
        """The monitored value, turned so that more is better; raises `RecipeError` if it is not logged."""
        return _value("guard", self.monitor, self.mode, metrics)

    def trips(self, value: float, best: float) -> bool:
        """Whether a value is too far below the best. Example: ``Guard("val/accuracy", 0.01).trips(0.97, 0.99)`` is True."""
        return not best - value <= self.margin  # and so for NaN


def _value(whose: str, monitor: str, mode: str, metrics: Mapping[str, Any]) -> float:
    if monitor not in metrics:
        known = [str(name) for name in metrics]
        raise RecipeError(
            f"{whose}.monitor {monitor!r} is not logged; logged are {', '.join(known) or 'none'}.{nearest(monitor, known)}"
        )
    return (1 if mode == "max" else -1) * float(metrics[monitor])


@dataclass
class Watch:
    """What is known of the metric: the best before the first round, the best of this one, validations without a better."""

    reference: float | None = None
    best: float | None = None
    bad: int = 0

    def before(self, value: float) -> None:
        """A validation before the first round."""
        self.reference = value if self.reference is None else max(self.reference, value)

    def recovered(self, value: float, recovery: Recovery) -> bool:
        """A validation inside a round: is it over?"""
        improved = self.best is None or value > self.best
        self.best = value if self.best is None else max(self.best, value)
        self.bad = 0 if improved else self.bad + 1
        back = self.reference is not None and value >= self.reference - recovery.tolerance
        return back or self.bad >= recovery.patience

    def next_round(self) -> None:
        """A round begins."""
        self.best, self.bad = None, 0
