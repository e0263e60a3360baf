"""Record an experiment: a recipe over seeds and rows of overrides, final-epoch numbers into ``recipes/results/NAME.json``.

``date``, ``machine`` and ``versions`` of the result are those of the runs: to record finished runs again changes no byte. What
an experiment file may say is in `sparsetrain.recipe.experiment`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsetrain.allocation.files import is_number
from sparsetrain.errors import RecipeError
from sparsetrain.recipe.experiment import experiment_jobs, load_experiment, require_runnable
from sparsetrain.recipe.jobs import run_jobs
from sparsetrain.report.curves import plot_curves


def _goal(goal: Any, before: Mapping[str, Mapping[str, Any]]) -> Any:
    """The number that a goal stands for, given the rows recorded before it."""
    if not isinstance(goal, Mapping):
        return goal
    mean = before[goal["row"]]["mean"]
    if "times" in goal:
        return round(mean * goal["times"], 4)
    if "share" in goal:
        return round(mean + goal["share"] * (before[goal["towards"]]["mean"] - mean), 4)
    return round(mean + goal["plus"], 4)


def record(path: Path, jobs: int = 1, work: Path = Path("runs/record"), results: Path = Path("recipes/results")) -> Path:
    """Run what is not finished yet, ``jobs`` runs at a time with one thread each, and write the result file.

    The metric is the test error of the final epoch in percent, unless a row says otherwise. Example:
    ``record(Path("recipes/experiments/digits_criteria.yaml"), jobs=2)``.
    """
    experiment = load_experiment(path)
    if jobs < 1:
        raise RecipeError(f"--jobs {jobs}: at least one run at a time")
    todo, owners = experiment_jobs(experiment, path, work / path.stem)
    for job in todo:
        require_runnable(job)
    finished = dict(zip([job.out for job in todo], run_jobs(todo, jobs), strict=True))
    numbers = range(len(experiment["rows"]))
    by_row = [[finished[owners[f"row{index}", seed]] for seed in experiment["seeds"]] for index in numbers]
    rows: list[dict[str, Any]] = []
    named: dict[str, dict[str, Any]] = {}
    for row, runs in zip(experiment["rows"], by_row, strict=True):
        rows.append(_row(experiment, row, runs, named))
        if "name" in row:
            named[row["name"]] = rows[-1]
    result = {
        "question": experiment["question"],
        "command": f"sparsetrain record {path.as_posix()}",
        **_circumstances([run for runs in by_row for run in runs]),
        "seconds": round(sum(_seconds(metrics) for metrics in finished.values()), 1),
        "seeds": experiment["seeds"],
        "rows": rows,
    }
    if "curves" in experiment:
        result["curves"] = [_curve(curve, owners, finished, experiment["seeds"], path) for curve in experiment["curves"]]
    results.mkdir(parents=True, exist_ok=True)
    target = results / f"{path.stem}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if "curves" in result:
        plot_curves(result["curves"], target.with_suffix(".png"))
    return target


def _circumstances(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """When, where and by which versions the runs were made: the last day, and every machine and version there was."""

    def every(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    machines = (run["machine"].split(",")[0] + " with a GPU" * (run["device"] == "cuda") for run in runs)
    return {
        "date": max(run["date"] for run in runs)[:10],
        "machine": f"{every(machines)}, 1 thread a run",
        "versions": {name: every(run["versions"][name] for run in runs) for name in runs[0]["versions"]},
    }


def _seconds(metrics: Mapping[str, Any]) -> float:
    seconds = metrics.get("seconds", 0.0)
    return float(seconds["total"] if isinstance(seconds, Mapping) else seconds)


def _found(metrics: Mapping[str, Any], path: str) -> Any:
    value: Any = metrics
    for key in path.split("."):
        numbers = [str(i) for i in range(len(value))] if isinstance(value, list) else []
        known = list(value) if isinstance(value, Mapping) else numbers
        if key not in known:
            raise RecipeError(
                f"{metrics.get('recipe')!r} has no {path!r} in its metrics: there is no {key!r} among "
                f"{', '.join(known) or 'nothing'}"
            )
        value = value[key] if isinstance(value, Mapping) else value[int(key)]
    return value


def _number(metrics: Mapping[str, Any], path: str) -> float:
    value = _found(metrics, path)
    if not is_number(value):
        raise RecipeError(f"{metrics.get('recipe')!r} has {value!r} at {path!r} in its metrics, which is no finite number")
    return float(value)


def _curve(
    curve: Mapping[str, Any],
    owners: Mapping[tuple[str, int], Path],
    finished: Mapping[Path, Mapping[str, Any]],
    seeds: Sequence[int],
    path: Path,
) -> dict[str, Any]:
    lines = []
    for name, label in curve["lines"].items():
        if (name, seeds[0]) not in owners:
            raise RecipeError(f"{path}: curves names {name!r}, which is no stage or row")
        lists = [_found(finished[owners[name, seed]], curve["list"]) for seed in seeds]
        shortest = min(len(entries) for entries in lists)
        points = [[(_point(e, curve["x"]), _point(e, curve["y"])) for e in entries[:shortest]] for entries in lists]
        xs = [[seed[i][0] for seed in points] for i in range(shortest)]
        ys = [[seed[i][1] for seed in points] for i in range(shortest)]
        spread = [round(statistics.stdev(y), 5) if len(y) > 1 else 0.0 for y in ys]
        mean = [round(statistics.fmean(y), 5) for y in ys]
        lines.append({"label": label, "x": [round(statistics.fmean(x), 5) for x in xs], "mean": mean, "sd": spread})
    kept = {key: curve[key] for key in ("title", "x_label", "y_label")}
    return kept | {"log_x": bool(curve.get("log_x", False)), "lines": lines}


def _point(entry: Mapping[str, Any], path: str) -> float:
    """A number of an entry: accuracies as errors in percent, shares kept in percent."""
    value = _number(entry, path)
    if path.endswith("accuracy"):
        return 100 * (1 - value)
    return 100 * (1 - value) if path == "sparsity" else value


def _row(
    experiment: Mapping[str, Any],
    row: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    before: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    path = row.get("value", "final.test/accuracy")
    is_error = path.endswith("test/accuracy") and "metric" not in row
    found = [_number(run, path) for run in runs]
    values = [round(100 * (1 - value) if is_error else value, 4) for value in found]
    kept = row.get("sparsity", "sparsity.actual")
    sparsity = 0.0 if kept == 0 else statistics.fmean(_number(run, kept) for run in runs)
    patterns = sorted({layer["pattern"] for run in runs for layer in run["layers"]} if kept != 0 else ()) or ["dense"]
    mean, goal, higher = statistics.fmean(values), _goal(row["goal"], before), bool(row.get("higher_is_better", False))
    return {
        "method": row["method"],
        "model": experiment["model"],
        "data": experiment["data"],
        "compression": round(1 / (1 - sparsity), 3),
        "sparsity": sparsity,
        "pattern": ", ".join(patterns),
        "metric": "test error, % (final epoch)" if is_error else row.get("metric", path),
        "higher_is_better": higher,
        "values": values,
        "mean": round(mean, 4),
        "sd": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "published": row["published"],
        "source": row["source"],
        "goal": goal,
        "met": None if goal is None else (mean >= goal if higher else mean <= goal),
    }
