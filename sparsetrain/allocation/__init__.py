"""Allocation: one budget -> the sparsity of each tensor. One file an idea; results are exact fractions."""

from __future__ import annotations

from sparsetrain.allocation.base import Allocation, Reduce, Scores, Share
from sparsetrain.allocation.global_threshold import Global
from sparsetrain.allocation.uniform import Uniform
from sparsetrain.errors import RecipeError, nearest

__all__ = ["NAMES", "Allocation", "Global", "Reduce", "Scores", "Share", "Uniform", "get_allocation"]

NAMES: dict[str, type[Allocation]] = {"uniform": Uniform, "global": Global}


def get_allocation(allocation: Allocation | str) -> Allocation:
    """Turn a name into an allocation; raises `RecipeError` with the nearest name. Example: ``get_allocation("global")``."""
    if isinstance(allocation, Allocation):
        return allocation
    if allocation not in NAMES:
        raise RecipeError(
            f"allocation {allocation!r} is unknown; known are {', '.join(NAMES)}, or the class path of an Allocation."
            + nearest(str(allocation), NAMES)
        )
    return NAMES[allocation]()
