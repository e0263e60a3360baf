"""Run a recipe: train, verify, evaluate, and leave a directory that others can read."""

from __future__ import annotations

import copy
import json
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from torch import nn

from sparsetrain.callbacks import PruneFinetune, SparsityCallback
from sparsetrain.callbacks.checkpoints import AtomicCheckpoints, StopOnDivergence
from sparsetrain.callbacks.progress import EpochLines
from sparsetrain.errors import DivergedError, RecipeError
from sparsetrain.masks import save_masks
from sparsetrain.recipe.build import Built, build, require_lightning
from sparsetrain.recipe.flops import flops
from sparsetrain.recipe.history import History
from sparsetrain.recipe.schema import load_recipe, recipe_parser
from sparsetrain.report import write_report
from sparsetrain.schedules import Clock

_PACKAGES = ("sparsetrain", "torch", "lightning", "transformers", "jsonargparse")


def run(
    recipe: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    ckpt_path: str | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Run a recipe into ``out`` (default ``runs/<recipe name>``) and return its metrics.

    ``ckpt_path``: a checkpoint to go on from, or ``"last"`` for this directory's own. Raises `SparsetrainError` kin for a
    user's mistake, before anything is overwritten. Example: ``run(Path("recipes/quickstart.yaml"), ["--seed", "1"])``.
    """
    config = load_recipe(recipe, overrides)
    out = out or Path("runs") / recipe.stem
    last = out / "checkpoints" / "last.ckpt"
    resume = _resume_path(ckpt_path, last, out)
    seed_everything(config.seed, workers=True, verbose=False)
    built = build(config)
    require_lightning(built.model)
    if built.data is None:
        raise RecipeError("the recipe names no data; add data: {class_path: VisionData, init_args: {name: digits}}")
    out.mkdir(parents=True, exist_ok=True)
    text = recipe_parser().dump(config, skip_none=False)
    (out / "config.yaml").write_text(text, encoding="utf-8")
    twin = None
    if config.dense_twin and config.method is not None:
        twin = _twin(recipe, overrides, out, resume is not None)
    record = {
        "recipe": recipe.stem,
        "question": config.question,
        "command": command or " ".join(["sparsetrain run", str(recipe), *overrides]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    return _train(config, built, out, resume, record, twin)


def _resume_path(ckpt_path: str | None, last: Path, out: Path) -> Path | None:
    if ckpt_path is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RecipeError(
                f"{out} is in use; choose another directory with --out, or go on with the run in it: --ckpt_path last"
            )
        return None
    path = last if ckpt_path == "last" else Path(ckpt_path)
    if not path.is_file():
        raise RecipeError(f"there is no checkpoint {path} to go on from; start the run without --ckpt_path")
    return path


def _twin(recipe: Path, overrides: Sequence[str], out: Path, resumed: bool) -> dict[str, Any]:
    """The dense twin's metrics; a finished one is not trained again, a broken-off one goes on."""
    where = out / "dense"
    if (where / "metrics.json").is_file():
        return dict(json.loads((where / "metrics.json").read_text(encoding="utf-8")))
    has_last = (where / "checkpoints" / "last.ckpt").is_file()
    if where.exists() and not has_last:
        for leftover in [*where.glob("*"), *(where / "checkpoints").glob("*")]:
            if leftover.is_file():
                leftover.unlink()
        (where / "checkpoints").rmdir() if (where / "checkpoints").is_dir() else None
    off = [*overrides, "--method", "null", "--dense_twin", "false"]
    print("dense twin: the same recipe without pruning")
    return run(recipe, off, where, "last" if has_last and resumed else None)


def _train(
    config: Namespace, built: Built, out: Path, resume: Path | None, record: dict[str, Any], twin: dict[str, Any] | None
) -> dict[str, Any]:
    model, data, method = require_lightning(built.model), built.data, built.method
    assert data is not None
    began = time.monotonic()
    # Building has taken any number of random numbers, a dense twin many more.
    seed_everything(config.seed, workers=True, verbose=False)
    history = History(out / "history.jsonl")
    if resume is not None:
        history.cut(_step_of(resume))
    trainer = make_trainer(config, built, out, history)
    dense_file = out / "checkpoints" / "dense.ckpt"
    if isinstance(method, PruneFinetune):
        method.before_first_change = lambda t: t.save_checkpoint(dense_file, weights_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
            trainer.fit(model, datamodule=data, ckpt_path=None if resume is None else str(resume), weights_only=None)
    except DivergedError as error:
        failed = record | {"status": "diverged", "message": str(error), "seconds": {"total": time.monotonic() - began}}
        _write(out, failed)
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    trainer.save_checkpoint(out / "checkpoints" / "final.ckpt")
    fitted = time.monotonic()
    metrics = record | _evaluate(config, model, data, method, dense_file, twin)
    metrics |= _sparsity(method, model)
    metrics["flops"] = flops(model, method.manager if method else None, data)
    metrics["seconds"] = {"total": round(time.monotonic() - began, 2), "fit": round(fitted - began, 2)}
    if method is not None:
        save_masks(out / "masks.safetensors", method.masks.saved())
    _write(out, metrics)
    return metrics


def make_trainer(config: Namespace, built: Built, out: Path, history: History) -> Trainer:
    """The trainer of a run: atomic checkpoints, history, progress, and a guard against divergence."""
    every = str(config.checkpoint_every)
    steps = Clock(None, None).steps(every) if every.endswith("st") else None
    epochs = None if steps else max(1, Clock(None, 1).steps(every))
    last = ModelCheckpoint(
        dirpath=out / "checkpoints",
        filename="last",
        every_n_train_steps=steps,
        every_n_epochs=epochs,
        save_on_train_epoch_end=None if steps else True,
        enable_version_counter=False,
        auto_insert_metric_name=False,
    )
    live = sys.stdout.isatty()
    callbacks: list[Callback] = [
        *built.callbacks,
        StopOnDivergence(),
        last,
        RichProgressBar() if live else EpochLines(),
    ]
    if built.method is not None:
        callbacks.insert(0, built.method)
    options = dict(config.trainer)
    options["enable_progress_bar"] = live and options.get("enable_progress_bar") is not False
    options["enable_model_summary"] = bool(options.get("enable_model_summary"))
    return Trainer(
        **options, callbacks=callbacks, logger=history, plugins=[AtomicCheckpoints()], default_root_dir=str(out)
    )


def _evaluate(
    config: Namespace,
    model: LightningModule,
    data: LightningDataModule | None,
    method: SparsityCallback | None,
    dense_file: Path,
    twin: dict[str, Any] | None,
) -> dict[str, Any]:
    final = _test(config, model, data)
    dense, source = None, None
    if twin is not None:
        dense, source = twin["final"], "dense twin: the same recipe without pruning"
    elif method is not None and dense_file.is_file():
        before = copy.deepcopy(model)
        saved = torch.load(dense_file, map_location="cpu", weights_only=True)
        before.load_state_dict(saved["state_dict"])
        dense, source = _test(config, before, data), f"end of the dense phase (step {saved['global_step']})"
    named = [name for name in final if name.endswith("accuracy")] or sorted(final)
    return {
        "metric": named[0] if named else None,
        "higher_is_better": bool(named) and not named[0].endswith(("loss", "perplexity", "error")),
        "dense": dense,
        "dense_from": source,
        "final": final,
        "best": None,
    }


def _test(config: Namespace, model: LightningModule, data: LightningDataModule | None) -> dict[str, float]:
    """Metrics of the test set, or of the validation set where a data module has no test set."""
    quiet = Trainer(
        accelerator=config.trainer.accelerator,
        devices=1,
        precision=config.trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        evaluate = quiet.test if type(model).test_step is not LightningModule.test_step else quiet.validate
        results = evaluate(model, datamodule=data, verbose=False)
    return {name: float(value) for name, value in results[0].items()}


def _sparsity(method: SparsityCallback | None, model: nn.Module) -> dict[str, Any]:
    parameters = sum(p.numel() for p in model.parameters())
    if method is None:
        empty = {"asked": 0.0, "actual": 0.0, "prunable": 0, "kept": 0, "compression": 1.0, "model": 0.0}
        return {"sparsity": empty, "layers": [], "verified": True, "problems": [], "changes": []}
    verification = method.masks.verify()
    rows = verification.rows
    prunable = sum(torch.Size(row.shape).numel() for row in rows)
    kept = sum(row.kept for row in rows)
    missing = method.shortfall()
    return {
        "sparsity": {
            "asked": method.asked(),
            "actual": 1 - kept / prunable,
            "prunable": prunable,
            "kept": kept,
            "compression": prunable / kept,
            "model": (prunable - kept) / parameters,
        },
        "layers": [
            {
                "name": row.name,
                "aliases": list(row.aliases),
                "shape": list(row.shape),
                "pattern": row.pattern,
                "asked": row.asked,
                "actual": row.actual,
                "kept": row.kept,
                "ok": row.ok,
                "problem": row.problem,
            }
            for row in rows
        ],
        "verified": verification.ok and missing is None,
        "problems": verification.problems + ([missing] if missing else []),
        "changes": [
            {"step": c.step, "tensor": c.tensor, "died": c.died, "grew": c.grew, "why": c.why}
            for c in method.masks.changes
        ],
    }


def _step_of(checkpoint: Path) -> int:
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])
    except Exception as error:
        raise RecipeError(
            f"{checkpoint} cannot be read as a checkpoint: it is truncated or of another kind ({error})"
        ) from error


def _write(out: Path, metrics: dict[str, Any]) -> None:
    partial = out / ".metrics.json.partial"
    partial.write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    partial.replace(out / "metrics.json")
    write_report(out)
