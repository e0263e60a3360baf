"""Record an experiment: a recipe over seeds and rows of overrides, final-epoch numbers into ``recipes/results/NAME.json``.

An experiment file (``recipes/experiments/NAME.yaml``) says ``question``, ``recipe``, ``seeds``, ``model``, ``data``, and
``rows``, each with ``method``, ``overrides``, and what is to be compared: ``published``, ``source``, ``goal``. Every run goes
to a directory of its own; one that is finished is not run again, so that a broken-off experiment goes on where it was.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsetrain.errors import RecipeError
from sparsetrain.recipe.schema import read_yaml

_KEYS = {"question", "recipe", "seeds", "model", "data", "rows"}
_ROW_KEYS = {"method", "overrides", "published", "source", "goal"}


@dataclass(frozen=True)
class _Job:
    row: int
    seed: int
    out: Path
    command: list[str]


def load_experiment(path: Path) -> dict[str, Any]:
    """Read an experiment file; raises `RecipeError` for a missing file or key."""
    found = read_yaml(path, "experiment")
    missing = _KEYS - set(found)
    if missing:
        raise RecipeError(f"{path} lacks {', '.join(sorted(missing))}; an experiment has {', '.join(sorted(_KEYS))}")
    if not found["rows"] or not found["seeds"]:
        raise RecipeError(f"{path}: rows and seeds must name at least one each")
    for index, row in enumerate(found["rows"]):
        if _ROW_KEYS - set(row):
            raise RecipeError(f"{path}: rows[{index}] lacks {', '.join(sorted(_ROW_KEYS - set(row)))}")
    return found


def record(path: Path, jobs: int = 1, work: Path = Path("runs/record"), results: Path = Path("recipes/results")) -> Path:
    """Run what is not finished yet, ``jobs`` runs at a time with one thread each, and write the result file.

    The metric is the test error of the final epoch in percent. Example:
    ``record(Path("recipes/experiments/mnist_prune_finetune.yaml"), jobs=2)``.
    """
    experiment = load_experiment(path)
    recipe = path.parent / experiment["recipe"]
    work = work / path.stem
    todo = [
        _job(recipe, index, row, seed, work) for index, row in enumerate(experiment["rows"]) for seed in experiment["seeds"]
    ]
    if jobs < 1:
        raise RecipeError(f"--jobs {jobs}: at least one run at a time")
    finished = _run_all(todo, jobs)
    result = {
        "question": experiment["question"],
        "command": f"sparsetrain record {path.as_posix()}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, 1 thread a run",
        "versions": finished[0]["versions"],
        "seconds": round(sum(metrics["seconds"]["total"] for metrics in finished), 1),
        "seeds": experiment["seeds"],
        "rows": [
            _row(experiment, row, [m for m, job in zip(finished, todo, strict=True) if job.row == index])
            for index, row in enumerate(experiment["rows"])
        ],
    }
    results.mkdir(parents=True, exist_ok=True)
    target = results / f"{path.stem}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return target


def _run_all(todo: Sequence[_Job], jobs: int) -> list[dict[str, Any]]:
    """The metrics of every job; after an error or Ctrl-C none is started any more."""
    stop = threading.Event()

    def attempt(job: _Job) -> dict[str, Any]:
        if stop.is_set():
            raise CancelledError
        try:
            return _run(job)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            return list(pool.map(attempt, todo))
        finally:
            stop.set()


def _job(recipe: Path, index: int, row: Mapping[str, Any], seed: int, work: Path) -> _Job:
    out = work / f"row{index}-seed{seed}"
    options = [
        text
        for key, value in row["overrides"].items()
        for text in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    command = [
        sys.executable,
        "-m",
        "sparsetrain.cli",
        "run",
        str(recipe),
        "--seed",
        str(seed),
        *options,
        "--out",
        str(out),
    ]
    return _Job(index, seed, out, command)


def _run(job: _Job) -> dict[str, Any]:
    metrics = job.out / "metrics.json"
    if not metrics.is_file():
        began = time.monotonic()
        last = job.out / "checkpoints" / "last.ckpt"
        resume = ["--ckpt_path", "last"] if last.is_file() else []
        if not resume and job.out.exists():
            shutil.rmtree(job.out)  # broken off before its first checkpoint
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*job.command, *resume], env=environment, capture_output=True, text=True, check=False)
        print(f"row {job.row} seed {job.seed}: {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            raise RecipeError(f"{' '.join(job.command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
    if not found.get("verified"):
        raise RecipeError(f"{job.out} is not verified: {found.get('problems') or found.get('message')}")
    return found


def _row(experiment: Mapping[str, Any], row: Mapping[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    lacking = [run["recipe"] for run in runs if "test/accuracy" not in run["final"]]
    if lacking:
        raise RecipeError(
            f"recipe {lacking[0]!r} logs no 'test/accuracy', which is what is recorded; it logs {', '.join(runs[0]['final'])}"
        )
    values = [round(100 * (1 - run["final"]["test/accuracy"]), 4) for run in runs]
    sparsity = statistics.fmean(run["sparsity"]["actual"] for run in runs)
    patterns = sorted({layer["pattern"] for run in runs for layer in run["layers"]}) or ["dense"]
    mean = statistics.fmean(values)
    return {
        "method": row["method"],
        "model": experiment["model"],
        "data": experiment["data"],
        "compression": round(1 / (1 - sparsity), 3),
        "sparsity": sparsity,
        "pattern": ", ".join(patterns),
        "metric": "test error, % (final epoch)",
        "higher_is_better": False,
        "values": values,
        "mean": round(mean, 4),
        "sd": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "published": row["published"],
        "source": row["source"],
        "goal": row["goal"],
        "met": None if row["goal"] is None else mean <= row["goal"],
    }
