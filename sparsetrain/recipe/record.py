"""Record an experiment: a recipe over seeds and rows of overrides, final-epoch numbers into ``recipes/results/NAME.json``.

An experiment file (``recipes/experiments/NAME.yaml``) says ``question``, ``recipe``, ``seeds``, ``model``, ``data``, and
``rows``, each with ``method``, ``overrides``, and what is to be compared: ``published``, ``source``, ``goal``. Every run goes
to a directory of its own; one that is finished is not run again, so that a broken-off experiment goes on where it was.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from sparsetrain.errors import RecipeError

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
    if not path.is_file():
        raise RecipeError(f"experiment {str(path)!r} is no file")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {error}") from error
    missing = _KEYS - set(found if isinstance(found, dict) else ())
    if missing:
        raise RecipeError(f"{path} lacks {', '.join(sorted(missing))}")
    for index, row in enumerate(found["rows"]):
        if _ROW_KEYS - set(row):
            raise RecipeError(f"{path}: rows[{index}] lacks {', '.join(sorted(_ROW_KEYS - set(row)))}")
    return dict(found)


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
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        finished = list(pool.map(_run, todo))
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


def _job(recipe: Path, index: int, row: Mapping[str, Any], seed: int, work: Path) -> _Job:
    out = work / f"row{index}-seed{seed}"
    options = [str(text) for pair in row["overrides"].items() for text in (f"--{pair[0]}", pair[1])]
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
