"""Reading the JSON files that allocations are made from, with errors in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsetrain.errors import RecipeError, nearest


def read_json(path: str | Path, what: str, made_by: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `RecipeError` saying which command makes such a file.

    Example: ``read_json("runs/x/allocation.json", "allocation", "sparsetrain predict")``.
    """
    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"{what} {str(path)!r} is no file; `{made_by} RECIPE.yaml` makes one")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as JSON ({error}); `{made_by} RECIPE.yaml` makes a new {what}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"{path} holds a {type(found).__name__}, no {what}; `{made_by} RECIPE.yaml` makes one")
    return found


def is_number(value: object) -> bool:
    """A finite int or float, and no bool. Example: ``is_number(0.5)``."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_names(given: Iterable[str], wanted: Iterable[str], where: str, way: str) -> None:
    """Raise `RecipeError` for the first wanted tensor that is not given. Example: ``require_names(["a"], ["a"], "x", "")``."""
    known = list(given)
    missing = [name for name in wanted if name not in known]
    if missing:
        more = f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise RecipeError(f"{where} says nothing of {missing[0]}{more}.{nearest(missing[0], known)} {way}")
