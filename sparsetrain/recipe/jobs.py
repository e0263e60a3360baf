"""The runs of an experiment as processes: one thread each, several at a time; finished ones are kept, others gone on with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.callbacks.files import written
from sparsetrain.errors import RecipeError
from sparsetrain.recipe.directory import flat, resumable
from sparsetrain.recipe.schema import read_yaml

#: What a command leaves when it has finished.
_DONE = {"run": "metrics.json", "sensitivity": "sensitivity.json", "predict": "allocation.json"}
#: What a command was asked that does not write so itself.
_ASKED = "asked.json"


@dataclass(frozen=True)
class Job:
    """One command into one directory, after the directories it needs are finished."""

    out: Path
    kind: str
    command: tuple[str, ...]
    needs: tuple[Path, ...]

    @property
    def identity(self) -> tuple[str, ...]:
        """Equal for jobs that would do the same."""
        return self.command


def make_job(
    kind: str, recipe: Path, overrides: Mapping[str, Any], seed: int, out: Path, candidates: Iterable[Path] = ()
) -> Job:
    """A job of ``sparsetrain KIND RECIPE --seed SEED ...``; it needs those candidates that its overrides mention."""
    if kind not in _DONE:
        raise RecipeError(f"stage command {kind!r} is unknown; known are {', '.join(_DONE)}")
    options = [
        text
        for key, value in overrides.items()
        for text in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    needs = tuple(path for path in candidates if any(str(path.absolute()) in text for text in options))
    return Job(out, kind, (kind, str(recipe), "--seed", str(seed), *options), needs)


def require_same(job: Job) -> None:
    """Raise `RecipeError` where the job's directory holds a finished scan or prediction of another command or recipe.

    Of a finished run its metrics and configuration say that. Example: ``require_same(job)`` before what it left is read.
    """
    if job.kind == "run" or not (job.out / _DONE[job.kind]).is_file():
        return
    way = "Delete that directory, or choose another --work"
    try:
        was, now = json.loads((job.out / _ASKED).read_text(encoding="utf-8")), _asked(job)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{job.out} holds a finished {job.kind}, and no {_ASKED} says of what ({error}). {way}") from error
    for key in {**was, **now}:
        if was.get(key) != now.get(key):
            raise RecipeError(
                f"{job.out} holds a finished {job.kind} of another command or recipe: {key} was {was.get(key, 'absent')} and "
                f"is {now.get(key, 'absent')}. {way}"
            )


def _asked(job: Job) -> dict[str, Any]:
    """The command, and every value of the recipe file it reads."""
    recipe = {key: value for key, value in flat(read_yaml(Path(job.command[1]))).items() if key != "question"}
    found: dict[str, Any] = json.loads(json.dumps({"command": " ".join(job.command)} | recipe, default=str))
    return found


def run_jobs(todo: Sequence[Job], jobs: int) -> list[dict[str, Any]]:
    """What every job left, in order; after an error or Ctrl-C none is started any more."""
    stop = threading.Event()
    finished = {job.out: threading.Event() for job in todo}

    def attempt(job: Job) -> dict[str, Any]:
        # What a job needs comes before it in the list, so somebody is at it: waiting ends.
        for path in job.needs:
            while not finished[path].wait(0.2):
                if stop.is_set():
                    raise CancelledError
        if stop.is_set():
            raise CancelledError
        try:
            result = _run(job)
        except BaseException:
            stop.set()
            raise
        finished[job.out].set()
        return result

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            return list(pool.map(attempt, todo))
        finally:
            stop.set()


def _run(job: Job) -> dict[str, Any]:
    left = job.out / _DONE[job.kind]
    require_same(job)
    if not left.is_file():
        began = time.monotonic()
        resume = ["--ckpt_path", "last"] if job.kind == "run" and resumable(job.out) else []
        if not resume and job.kind == "run" and job.out.exists():
            shutil.rmtree(job.out)  # broken off before its first checkpoint
        if job.kind != "run":
            with written(job.out / _ASKED) as partial:
                partial.write_text(json.dumps(_asked(job), indent=1), encoding="utf-8")
        command = [sys.executable, "-m", "sparsetrain.cli", *job.command, "--out", str(job.out), *resume]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        print(f"{job.out.name}: {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            raise RecipeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(left.read_text(encoding="utf-8"))
    asked, did = " ".join(["sparsetrain", *job.command]), str(found.get("command", ""))
    if job.kind == "run" and not did.startswith(f"{asked} --out "):
        raise RecipeError(
            f"{job.out} holds a finished run of another command ({did}), asked is {asked}: the experiment has changed. Delete "
            "that directory, or choose another --work"
        )
    if job.kind == "run" and not found.get("verified"):
        raise RecipeError(f"{job.out} is not verified: {found.get('problems') or found.get('message')}")
    return found
