"""Criteria: what scores a weight. One file a family; each is a pure function wrapped in a small class for recipes."""

from __future__ import annotations

from sparsetrain.criteria.base import Criterion, Known, Seen, StatisticsCriterion
from sparsetrain.criteria.magnitude import Magnitude, magnitude
from sparsetrain.criteria.random import Random, random_scores
from sparsetrain.errors import RecipeError, nearest

__all__ = [
    "NAMES",
    "Criterion",
    "Known",
    "Magnitude",
    "Random",
    "Seen",
    "StatisticsCriterion",
    "get_criterion",
    "magnitude",
    "random_scores",
]

NAMES: dict[str, type[Criterion]] = {"magnitude": Magnitude, "random": Random}


def get_criterion(criterion: Criterion | str) -> Criterion:
    """Turn a name into a criterion; raises `RecipeError` with the nearest name. Example: ``get_criterion("magnitude")``."""
    if isinstance(criterion, Criterion):
        return criterion
    if criterion not in NAMES:
        raise RecipeError(
            f"criterion {criterion!r} is unknown; known are {', '.join(NAMES)}, or the class path of a Criterion."
            + nearest(str(criterion), NAMES)
        )
    return NAMES[criterion]()
