"""What an experiment file says: rows to compare, stages they need, goals; and the runs that follow from it.

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

``by_seed`` has further overrides of all rows (not of stages) for single seeds: ``{0: {data.order: [a, b]}}``.

``stages`` are commands that rows need and that are no rows themselves: ``name``, ``command`` (``run`` if not given),
``recipe``, ``overrides``, and ``seed``, to run once and not for every seed. In overrides ``@NAME`` is the directory of that
stage or row for the same seed. Every run goes to a directory of its own; equal runs are one run; one that is finished is not
run again, so that a broken-off experiment goes on where it was. A finished run of another recipe or command is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsetrain.allocation.files import is_number
from sparsetrain.errors import RecipeError, nearest
from sparsetrain.recipe.directory import flat
from sparsetrain.recipe.jobs import Job, make_job, require_same
from sparsetrain.recipe.schema import load_recipe, parse_yaml, read_yaml, recipe_parser

_KEYS = {"question", "recipe", "seeds", "model", "data", "rows"}
_ROW_KEYS = {"method", "overrides", "published", "source", "goal"}
_STAGE_KEYS = {"name", "overrides"}
_CURVE_KEYS = {"title", "list", "x", "y", "x_label", "y_label", "lines"}
_MAY_HAVE = {
    "rows": {"name", "recipe", "value", "metric", "higher_is_better", "sparsity"},
    "stages": {"command", "recipe", "seed"},
    "curves": {"log_x"},
}


def load_experiment(path: Path) -> dict[str, Any]:
    """Read an experiment file; raises `RecipeError` for a missing file or key, and for what cannot be run or compared."""
    found = read_yaml(path, "experiment")
    missing = _KEYS - set(found)
    if missing:
        raise RecipeError(f"{path} lacks {', '.join(sorted(missing))}; an experiment has {', '.join(sorted(_KEYS))}")
    seeds = found["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise RecipeError(f"{path}: seeds is {seeds!r}; give a list of whole numbers, such as [0, 1, 2]")
    by_seed = found.get("by_seed", {})
    if not isinstance(by_seed, dict) or not all(s in seeds and isinstance(o, dict) for s, o in by_seed.items()):
        raise RecipeError(f"{path}: by_seed is {by_seed!r}; give {{seed: {{key: value}}}}, of the seeds {seeds}")
    _require_entries(path, "stages", found.setdefault("stages", []), _STAGE_KEYS)
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


def _require_entries(path: Path, what: str, entries: Any, keys: set[str]) -> None:
    """Raise unless it is a list of mappings with these keys and none that is unknown, whose overrides are mappings."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RecipeError(f"{path}: {what} must be a list of entries with {', '.join(sorted(keys))}")
    for index, entry in enumerate(entries):
        if keys - set(entry):
            raise RecipeError(f"{path}: {what}[{index}] lacks {', '.join(sorted(keys - set(entry)))}")
        for key in set(entry) - keys - _MAY_HAVE[what]:
            raise RecipeError(f"{path}: {what}[{index}] has no key {key!r}.{nearest(key, keys | _MAY_HAVE[what])}")
        for key in ("overrides", "lines"):
            if key in keys and not isinstance(entry[key], dict):
                raise RecipeError(f"{path}: {what}[{index}].{key} is {entry[key]!r}; give {{key: value}}, {{}} for none")


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
            more = {} if "method" not in entry else experiment.get("by_seed", {}).get(seed, {})
            overrides = {key: _placed(value, named, path) for key, value in (entry["overrides"] | more).items()}
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


def require_runnable(job: Job) -> None:
    """Raise `RecipeError`, before hours of training, for a recipe that is missing, overrides it does not know, or a finished
    run in the job's directory that was made by another recipe.
    """
    recipe, overrides = Path(job.command[1]), job.command[2:]
    try:
        if job.kind != "run":
            read_yaml(recipe)
            require_same(job)
            return
        config = load_recipe(recipe, overrides)
    except RecipeError as error:
        raise RecipeError(f"{job.out.name}: {error}") from error
    if (job.out / "config.yaml").is_file() and (job.out / "metrics.json").is_file():
        was, now = flat(read_yaml(job.out / "config.yaml")), flat(parse_yaml(recipe_parser().dump(config, skip_unset=False)))
        # Keys that only one of them has are settings that a version of sparsetrain did not know yet.
        changed = [key for key in was if key not in ("question", "init_from") and was[key] != now.get(key, was[key])]
        if changed:
            raise RecipeError(
                f"{job.out} holds a finished run of another recipe: {changed[0]} was {was[changed[0]]} and is "
                f"{now[changed[0]]}. Delete that directory, or choose another --work"
            )
