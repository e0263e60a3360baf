"""Allocation: one budget -> the sparsity of each tensor. One file an idea; results are exact fractions."""

from __future__ import annotations

from sparsetrain.allocation.base import Allocation, Reduce, Scores, Share
from sparsetrain.allocation.erk import ERK, erk_sparsities
from sparsetrain.allocation.fixed import Fixed
from sparsetrain.allocation.global_threshold import Global
from sparsetrain.allocation.lamp import LAMP
from sparsetrain.allocation.owl import OWL
from sparsetrain.allocation.sensitivity import Sensitivity
from sparsetrain.allocation.uniform import Uniform
from sparsetrain.allocation.uniform_plus import UniformPlus
from sparsetrain.errors import RecipeError, nearest

__all__ = [
    "ERK",
    "LAMP",
    "NAMES",
    "OWL",
    "Allocation",
    "Fixed",
    "Global",
    "Reduce",
    "Scores",
    "Sensitivity",
    "Share",
    "Uniform",
    "UniformPlus",
    "erk_sparsities",
    "get_allocation",
]

NAMES: dict[str, type[Allocation]] = {
    "uniform": Uniform,
    "uniform_plus": UniformPlus,
    "global": Global,
    "erk": ERK,
    "lamp": LAMP,
    "owl": OWL,
}
#: Those that need a file: ``"fixed:runs/x/allocation.json"``.
FROM_FILE: dict[str, type[Fixed | Sensitivity]] = {"fixed": Fixed, "sensitivity": Sensitivity}


def get_allocation(allocation: Allocation | str) -> Allocation:
    """Turn a name, or ``"fixed:FILE"`` or ``"sensitivity:FILE"``, into an allocation.

    Raises `RecipeError` with the nearest name. Example: ``get_allocation("global")``.
    """
    if isinstance(allocation, Allocation):
        return allocation
    name, colon, path = str(allocation).partition(":")
    if colon and name in FROM_FILE:
        return FROM_FILE[name](path)
    if allocation in FROM_FILE:
        raise RecipeError(f"allocation {allocation!r} needs its file: '{allocation}:FILE.json'")
    if allocation not in NAMES:
        files = ", ".join(f"{known}:FILE" for known in FROM_FILE)
        raise RecipeError(
            f"allocation {allocation!r} is unknown; known are {', '.join(NAMES)}, {files}, or the class path of an Allocation."
            + nearest(str(allocation), [*NAMES, *FROM_FILE])
        )
    return NAMES[allocation]()
