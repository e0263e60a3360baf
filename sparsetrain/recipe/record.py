"""Record an experiment: a recipe over seeds and rows of overrides, final-epoch numbers into ``recipes/results/NAME.json``.

An experiment file (``recipes/experiments/NAME.yaml``) says ``question``, ``recipe``, ``seeds``, ``model``, ``data``, and
``rows``, each with ``method``, ``overrides``, and what is to be compared: ``published``, ``source``, ``goal``. A row may also
have

* ``name``: others may refer to it; ``goal: {row: dense, plus: 0.1}`` is its mean plus 0.1, ``{row: dense, times: 1.03}`` 1.03
  times its mean, ``{row: pruned, share: 0.6, towards: dense}`` what closes 0.6 of the gap between the means of the two;
* ``recipe``: another than the experiment's;
* ``value``: a path into metrics.json (``method.rounds.3.end.test/accuracy``) instead of the final test error, with ``metric``,
  ``higher_is_better``, and ``sparsity``, a path too, or 0 for a value of the dense model.

``curves`` are drawn from lists in metrics.json: ``title``, ``list`` (``method.rounds``), ``x`` and ``y`` (paths inside an
entry), ``x_label``, ``y_label``, ``log_x``, and ``lines``: name of a stage or row -> label. An accuracy is drawn as an error in
percent, a sparsity as percent kept.

``stages`` are commands that rows need and that are no rows themselves: ``name``, ``command`` (``run`` if not given),
``recipe``, ``overrides``, and ``seed``, to run once and not for every seed. In overrides ``@NAME`` is the directory of that
stage or row for the same seed. Every run goes to a directory of its own; equal runs are one run; one that is finished is not
run again, so that a broken-off experiment goes on where it was.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsetrain.allocation.files import is_number
from sparsetrain.errors import RecipeError, nearest
from sparsetrain.recipe.jobs import Job, make_job, run_jobs
from sparsetrain.recipe.schema import load_recipe, read_yaml
from sparsetrain.report.curves import plot_curves

_KEYS = {"question", "recipe", "seeds", "model", "data", "rows"}
_ROW_KEYS = {"method", "overrides", "published", "source", "goal"}
_CURVE_KEYS = {"title", "list", "x", "y", "x_label", "y_label", "lines"}


def load_experiment(path: Path) -> dict[str, Any]:
    """Read an experiment file; raises `RecipeError` for a missing file or key, and for what cannot be run or compared."""
    found = read_yaml(path, "experiment")
    missing = _KEYS - set(found)
    if missing:
        raise RecipeError(f"{path} lacks {', '.join(sorted(missing))}; an experiment has {', '.join(sorted(_KEYS))}")
    seeds = found["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise RecipeError(f"{path}: seeds is {seeds!r}; give a list of whole numbers, such as [0, 1, 2]")
    _require_entries(path, "stages", found.setdefault("stages", []), {"name", "overrides"})
    for index, stage in enumerate(found["stages"]):
        if type(stage.get("seed", 0)) is not int:
            raise RecipeError(f"{path}: stages[{index}].seed is {stage['seed']!r}; give a whole number, or none")
    _require_entries(path, "rows", found["rows"], _ROW_KEYS)
    if not found["rows"]:
        raise RecipeError(f"{path}: rows must name at least one")
    names = [entry["name"] for entry in [*found["stages"], *found["rows"]] if "name" in entry]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RecipeError(f"{path}: two stages or rows have the name {twice[0]!r}")
    for index, row in enumerate(found["rows"]):
        names = [other["name"] for other in found["rows"][:index] if "name" in other]
        _require_goal(f"{path}: rows[{index}].goal", row["goal"], names)
    _require_entries(path, "curves", found.get("curves", []), _CURVE_KEYS)
    return found


def _require_goal(where: str, goal: Any, names: Sequence[str]) -> None:
    """Raise unless it is a number, None, or follows from the rows of these names."""
    if not isinstance(goal, dict):
        known = goal is None or is_number(goal)
    else:
        for key in ("row", "towards"):
            if key in goal and goal[key] not in names:
                raise RecipeError(f"{where} names row {goal[key]!r}; rows before it are {', '.join(names)}")
        kinds = ({"row", "plus"}, {"row", "times"}, {"row", "share", "towards"})
        known = set(goal) in kinds and all(is_number(goal[key]) for key in ("plus", "times", "share") if key in goal)
    if not known:
        raise RecipeError(
            f"{where} is {goal!r}; give a number, {{row: NAME, plus: 0.1}}, {{row: NAME, times: 1.03}}, "
            "{row: NAME, share: 0.6, towards: OTHER}, or null"
        )


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


def _require_entries(path: Path, what: str, entries: Any, keys: set[str]) -> None:
    """Raise unless it is a list of mappings with these keys, whose overrides are mappings."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RecipeError(f"{path}: {what} must be a list of entries with {', '.join(sorted(keys))}")
    for index, entry in enumerate(entries):
        if keys - set(entry):
            raise RecipeError(f"{path}: {what}[{index}] lacks {', '.join(sorted(keys - set(entry)))}")
        for key in ("overrides", "lines"):
            if key in keys and not isinstance(entry[key], dict):
                raise RecipeError(f"{path}: {what}[{index}].{key} is {entry[key]!r}; give {{key: value}}, {{}} for none")


def record(path: Path, jobs: int = 1, work: Path = Path("runs/record"), results: Path = Path("recipes/results")) -> Path:
    """Run what is not finished yet, ``jobs`` runs at a time with one thread each, and write the result file.

    The metric is the test error of the final epoch in percent, unless a row says otherwise. Example:
    ``record(Path("recipes/experiments/mnist_prune_finetune.yaml"), jobs=2)``.
    """
    experiment = load_experiment(path)
    if jobs < 1:
        raise RecipeError(f"--jobs {jobs}: at least one run at a time")
    todo, owners = experiment_jobs(experiment, path, work / path.stem)
    for job in todo:
        _require_readable(job)
    finished = dict(zip([job.out for job in todo], run_jobs(todo, jobs), strict=True))
    numbers = range(len(experiment["rows"]))
    by_row = [[finished[owners[f"row{index}", seed]] for seed in experiment["seeds"]] for index in numbers]
    rows: dict[str, dict[str, Any]] = {}
    for index, (row, runs) in enumerate(zip(experiment["rows"], by_row, strict=True)):
        rows[str(row.get("name", index))] = _row(experiment, row, runs, rows)
    result = {
        "question": experiment["question"],
        "command": f"sparsetrain record {path.as_posix()}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, 1 thread a run",
        "versions": by_row[0][0]["versions"],
        "seconds": round(sum(_seconds(metrics) for metrics in finished.values()), 1),
        "seeds": experiment["seeds"],
        "rows": list(rows.values()),
    }
    if "curves" in experiment:
        result["curves"] = [_curve(curve, owners, finished, experiment["seeds"], path) for curve in experiment["curves"]]
    results.mkdir(parents=True, exist_ok=True)
    target = results / f"{path.stem}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if "curves" in result:
        plot_curves(result["curves"], target.with_suffix(".png"))
    return target


def _require_readable(job: Job) -> None:
    """Raise `RecipeError`, before hours of training, for a recipe that is missing or overrides it does not know."""
    recipe, overrides = Path(job.command[1]), job.command[2:]
    try:
        if job.kind == "run":
            load_recipe(recipe, overrides)
        else:
            read_yaml(recipe)
    except RecipeError as error:
        raise RecipeError(f"{job.out.name}: {error}") from error


def _seconds(metrics: Mapping[str, Any]) -> float:
    seconds = metrics.get("seconds", 0.0)
    return float(seconds["total"] if isinstance(seconds, Mapping) else seconds)


def experiment_jobs(experiment: Mapping[str, Any], path: Path, work: Path) -> tuple[list[Job], dict[tuple[str, int], Path]]:
    """Every run once, what others need first; and where the run of each row and name is for each seed."""
    todo: dict[Path, Job] = {}
    same: dict[tuple[str, ...], Path] = {}
    owners: dict[tuple[str, int], Path] = {}
    for seed in experiment["seeds"]:
        named: dict[str, Path] = {}
        stages = [(stage["name"], stage) for stage in experiment["stages"]]
        rows = [(f"row{index}", row) for index, row in enumerate(experiment["rows"])]
        for label, entry in [*stages, *rows]:
            recipe = path.parent / entry.get("recipe", experiment["recipe"])
            overrides = {key: _placed(value, named, path) for key, value in entry["overrides"].items()}
            own = entry.get("seed", seed)
            job = make_job(entry.get("command", "run"), recipe, overrides, own, work / f"{label}-seed{own}", named.values())
            out = same.setdefault(job.identity, job.out)
            todo.setdefault(out, job)
            owners[label, seed] = out
            if "name" in entry:
                named[entry["name"]] = owners[entry["name"], seed] = out
    return list(todo.values()), owners


def _placed(value: Any, named: Mapping[str, Path], path: Path) -> Any:
    """Replace ``@NAME`` by the directory of that stage or row."""
    if isinstance(value, Mapping):
        return {key: _placed(inner, named, path) for key, inner in value.items()}
    if isinstance(value, list):
        return [_placed(inner, named, path) for inner in value]
    if not (isinstance(value, str) and "@" in value):
        return value
    head, _, rest = value.partition("@")
    name, slash, tail = rest.partition("/")
    if name not in named:
        raise RecipeError(f"{path}: {value!r} names no stage or row before it.{nearest(name, named)}")
    return f"{head}{named[name].absolute()}{slash}{tail}"


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
