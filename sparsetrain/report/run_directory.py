"""Read a run directory; what is missing but optional stays empty, what is broken is an error with a way out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsetrain.errors import RecipeError
from sparsetrain.masks.state import load_masks
from sparsetrain.report.wording import diverged

REQUIRED = ("final", "sparsity", "layers", "verified")


@dataclass(frozen=True)
class Run:
    """What one run left behind.

    Example: ``read_run(Path("runs/digits")).metrics["verified"]``.
    """

    metrics: dict[str, Any]
    history: list[dict[str, float]]
    config: str
    masks: dict[str, Tensor]
    notes: list[str]


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """Return the content of ``metrics.json``.

    Raises ``RecipeError`` when the directory or file is missing, the JSON is truncated, or a finished run lacks one of
    the keys ``final``, ``sparsity``, ``layers``, ``verified``.

    Example: ``read_metrics(Path("runs/digits"))["seed"]``.
    """
    path = run_dir / "metrics.json"
    if not run_dir.is_dir():
        raise RecipeError(f"{run_dir} is not a directory. Give the run directory that `sparsetrain run` wrote.")
    if not path.is_file():
        raise RecipeError(
            f"{path} is missing: the run has not finished, or this is no run directory. "
            "Finish the run with `sparsetrain run`, or give the directory it wrote."
        )
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(
            f"{path} is truncated or not JSON ({error}). Run it again: `sparsetrain run {run_dir / 'config.yaml'}`."
        ) from error
    if not isinstance(metrics, dict):
        raise RecipeError(f"{path} holds a {type(metrics).__name__}, not an object. Run the recipe again.")
    missing = [key for key in REQUIRED if key not in metrics]
    if missing and not diverged(metrics):
        raise RecipeError(f"{path} has no {', '.join(map(repr, missing))}. Run the recipe again with this version.")
    return metrics


def read_history(path: Path) -> tuple[list[dict[str, float]], list[str]]:
    """Return the rows of ``history.jsonl`` and notes for the reader.

    A cut-off last line (the process was killed while writing) is left out and told; any other broken line raises
    ``RecipeError``. A missing file gives no rows.

    Example: ``rows, notes = read_history(Path("runs/digits/history.jsonl"))``.
    """
    if not path.is_file():
        return [], []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows: list[dict[str, float]] = []
    for index, line in enumerate(lines):
        try:
            # null is how strict JSON writes NaN; an absent metric was simply not logged.
            row = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if index == len(lines) - 1:
                return rows, [f"The last line of {path.name} is cut off and is not shown."]
            raise RecipeError(
                f"{path}, line {index + 1} is not a JSON object with a step: {line[:60]!r}. "
                "Delete the line, or delete the file to get the report without curves."
            ) from error
        rows.append(row)
    return sorted(rows, key=lambda row: row["step"]), []


def read_stages(folder: Path) -> tuple[list[dict[str, float]], list[str]]:
    """Return the histories of a run over domains as one, each beginning a step after the one before has ended; and notes.

    Example: ``rows, notes = read_stages(Path("runs/texts/domains"))``.
    """
    stages = [path for path in folder.glob("*-*") if path.name.partition("-")[0].isdigit()]
    rows: list[dict[str, float]] = []
    begins, notes = [], []
    for stage in sorted(stages, key=lambda path: int(path.name.partition("-")[0])):
        found, told = read_history(stage / "history.jsonl")
        start = rows[-1]["step"] + 1 if rows else 0
        rows += [row | {"step": start + row["step"]} for row in found]
        notes += [f"{stage.name.partition('-')[2]}: {note}" for note in told]
        begins += [f"{stage.name.partition('-')[2]} from step {start:,}"] if found else []
    if any(name.endswith("/loss") for row in rows for name in row):
        notes.insert(0, f"Curves are of the domain at hand, one after the other: {', '.join(begins)}.")
    return rows, notes


def read_run(run_dir: Path) -> Run:
    """Read everything a report shows; config, history and masks may be absent.

    Raises ``RecipeError`` for a missing or truncated ``metrics.json``, ``MaskStateError`` for a broken mask file.

    Example: ``read_run(Path("runs/digits"))``.
    """
    metrics = read_metrics(run_dir)
    stages = run_dir / "domains"
    history, notes = read_stages(stages) if stages.is_dir() else read_history(run_dir / "history.jsonl")
    masks: dict[str, Tensor] = {}
    if (run_dir / "masks.safetensors").is_file():
        masks = load_masks(run_dir / "masks.safetensors")
    config = run_dir / "config.yaml"
    return Run(metrics, history, config.read_text(encoding="utf-8") if config.is_file() else "", masks, notes)
