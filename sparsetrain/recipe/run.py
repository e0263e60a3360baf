"""Run a recipe: train, verify, evaluate, and leave a directory that others can read."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.utilities import rank_zero_only

from sparsetrain.callbacks import DepthPruning, SparsityCallback
from sparsetrain.callbacks.files import written
from sparsetrain.continual.matrix import reference_metrics
from sparsetrain.data import DomainSequence
from sparsetrain.errors import DivergedError, RecipeError
from sparsetrain.masks import save_masks
from sparsetrain.recipe.build import Built, build, instantiate, require_lightning, shorten
from sparsetrain.recipe.directory import check_resume, last_checkpoint, resumable, resume_path, write_metrics
from sparsetrain.recipe.domains import check_domains, require_references, run_domains
from sparsetrain.recipe.flops import flops
from sparsetrain.recipe.metrics import DENSE_TWIN, evaluate, only_prunes, sparsity
from sparsetrain.recipe.quiet import quiet
from sparsetrain.recipe.schema import load_recipe, recipe_parser
from sparsetrain.recipe.train import RANDOM, fit, prunes_random

#: What continual pruning is compared with: modes of its memory, and directories.
_REFERENCES = ("fresh", "joint")
_PACKAGES = ("sparsetrain", "torch", "lightning", "jsonargparse")


def run(
    recipe: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    ckpt_path: str | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Run a recipe into ``out`` (default ``runs/<recipe name>``) and return its metrics.

    ``ckpt_path``: a checkpoint to go on from, or ``"last"`` for this directory's own; the recipe must be the one that wrote
    it, but for the length of training. Raises `SparsetrainError` kin for a user's mistake, before anything is written, and
    `DivergedError` when the loss is no number any more. Example: ``run(Path("recipes/quickstart.yaml"), ["--seed", "1"])``.
    """
    began = time.monotonic()
    config = load_recipe(recipe, overrides)
    out = out or Path("runs") / recipe.stem
    resume = resume_path(ckpt_path, out)
    if config.init_from is not None:
        config.init_from = str(Path(config.init_from).absolute())
    text = recipe_parser().dump(config, skip_unset=False)
    built = _built(config, resume)
    several = isinstance(built.data, DomainSequence)
    model = require_lightning(built.model)
    if built.data is None:
        raise RecipeError("the recipe names no data; add data: {class_path: VisionData, init_args: {name: digits}}")
    require_references(config, built.method, built.data)
    record = _record(recipe, overrides, config, command)
    step = 0 if resume is None else _going_on(resume, ckpt_path, out, text, built)
    if resume is None and prunes_random(config, model) and _speaks():
        print(RANDOM)
    beside, found, computing = _beside(config), {}, time.process_time()
    with quiet():
        try:
            if several:
                found = run_domains(config, built, out, text, beside)
            else:
                fit(config, built, out, text, resume, step)
        except DivergedError as error:
            record["seconds"] = {"total": round(time.monotonic() - began, 2)}
            raise _diverged(out, record, error) from error
        # Seconds computed, which stand still while another program has the cores, are what runs are compared by.
        fitted, computed = time.monotonic(), time.process_time() - computing
        twin = dense_twin(recipe, overrides, out) if "dense" in beside else None
        if several:
            found |= {} if twin is None else {"dense": twin["final"], "dense_from": DENSE_TWIN}
        else:
            found = evaluate(config, model, built.data, built.method, out / "checkpoints" / "dense.ckpt", twin)
        metrics = record | found
        metrics |= sparsity(built.method, model)
        metrics |= _facts(config, built, model)
        seconds = {"total": time.monotonic() - began, "fit": fitted - began, "computed": computed}
        metrics["seconds"] = {key: round(value, 2) for key, value in seconds.items()}
        if several and config.references:
            if (out / "metrics.json").is_file():
                # It is older than the checkpoint, and would stay so if a reference broke off.
                _leave(out, built.method, metrics)
            metrics["continual"] |= _references(config, recipe, overrides, out, metrics)
            metrics["seconds"]["total"] = round(time.monotonic() - began, 2)
    _leave(out, built.method, metrics)
    return metrics


def _beside(config: Namespace) -> dict[str, str]:
    """The runs that follow this one, by directory, and the key that asks for each."""
    found = dict.fromkeys(_REFERENCES, "references") if config.references else {}
    # Without training the model as it came is its own twin.
    trains = config.method is not None and not only_prunes(config)
    return found | ({"dense": "dense_twin"} if config.dense_twin and trains else {})


def _leave(out: Path, method: SparsityCallback | None, metrics: dict[str, Any]) -> None:
    """Write masks.safetensors, metrics.json and the report."""
    masks = None if method is None else method.masks.saved()
    if not _speaks():
        return
    if masks is not None:
        with written(out / "masks.safetensors") as partial:
            save_masks(partial, masks)
    write_metrics(out, metrics)


def _built(config: Namespace, resume: Path | None) -> Built:
    """The recipe's objects; weights of ``init_from`` are loaded unless a checkpoint follows."""
    # Stages of a sequence are gone on from one by one, and domains that came later measured on the model as it was.
    load = resume is None or isinstance(instantiate(config, "data"), DomainSequence)
    seed_everything(config.seed, workers=True, verbose=False)
    return build(config, load=load, resume=resume)


def _record(recipe: Path, overrides: Sequence[str], config: Namespace, command: str) -> dict[str, Any]:
    """What metrics.json says of the circumstances."""
    return {
        "recipe": recipe.stem,
        "question": config.question,
        "command": command or " ".join(["sparsetrain run", str(recipe), *overrides]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _going_on(resume: Path, ckpt_path: str | None, out: Path, text: str, built: Built) -> int:
    """The step to go on from, in a run that is one fit; raises unless this recipe can go on there."""
    if not isinstance(built.data, DomainSequence):
        return check_resume(resume, text, require_lightning(built.model))
    if resume != last_checkpoint(out):
        raise RecipeError(f"a run over domains goes on from its own directory: --ckpt_path last, not {ckpt_path}")
    check_domains(out, text, built.data.names)
    return 0


def _references(
    config: Namespace, recipe: Path, overrides: Sequence[str], out: Path, found: dict[str, Any]
) -> dict[str, float]:
    """How far continual pruning is from every domain pruned for itself, and from all of them at once."""
    runs = {}
    for mode in _REFERENCES:
        print(f"reference: the same recipe with memory.mode {mode}")
        where = out / mode
        asked = [*overrides, "--method.memory.mode", mode, "--references", "false", "--dense_twin", "false"]
        folder = config.get("method.init_args.memory.folder")
        if folder is not None:  # a folder is of one run alone
            asked += ["--method.memory.folder", str(Path(folder) / mode)]
        runs[mode] = run(recipe, asked, where, _where_it_was(where))["continual"]["matrix"]
    matrix = found["continual"]["matrix"]
    return reference_metrics(matrix, found["higher_is_better"], runs["fresh"], runs["joint"])


def _facts(config: Namespace, built: Built, model: LightningModule) -> dict[str, Any]:
    """The keys ``method`` and ``flops`` of metrics.json."""
    facts = {} if built.method is None else built.method.facts()
    for callback in built.callbacks:
        if isinstance(callback, DepthPruning):
            facts |= {"removed": callback.removed}
    found = flops(model, built.method.manager if built.method else None, built.data)
    if found and (facts.get("removed") or (facts.get("structure") or {}).get("compacted")):
        # Dense is the model before blocks or units were taken out of it.
        begun = instantiate(config, "model")
        shorten(begun, built.lineage)
        whole = flops(begun, None, built.data)
        found["dense"] = whole["dense"] if whole else found["dense"]
    return {"method": facts, "flops": found}


def _speaks() -> bool:
    """With several processes one writes and prints."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def dense_twin(recipe: Path, overrides: Sequence[str], out: Path) -> dict[str, Any]:
    """The dense twin's metrics; a finished one is not trained again, a broken-off or shorter one goes on."""
    where = out / "dense"
    off = [*overrides, "--method", "null", "--dense_twin", "false", "--references", "false"]
    if resumable(where) and (where / "metrics.json").is_file():
        text = recipe_parser().dump(load_recipe(recipe, off), skip_unset=False)
        if (where / "config.yaml").read_text(encoding="utf-8") == text:
            return dict(json.loads((where / "metrics.json").read_text(encoding="utf-8")))
    if _speaks():
        print("dense twin: the same recipe without pruning")
    return run(recipe, off, where, _where_it_was(where))


def _where_it_was(out: Path) -> str | None:
    """How a run beside another goes on: from what is there, or, if it broke off before anything was, from the start."""
    if resumable(out):
        return "last"
    if out.exists():
        shutil.rmtree(out)
    return None


def _diverged(out: Path, record: dict[str, Any], error: DivergedError) -> DivergedError:
    """Write metrics.json with status "diverged"; the error, saying what is left of the run."""
    last = last_checkpoint(out)
    good = f"The last good checkpoint is {last}" if last.is_file() else "There was no checkpoint yet"
    message = f"{error}. {good}"
    write_metrics(out, record | {"status": "diverged", "verified": False, "message": message})
    return DivergedError(message)
