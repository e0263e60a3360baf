"""Run a recipe: train, verify, evaluate, and leave a directory that others can read."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from sparsetrain.callbacks import DepthPruning, OneShotPruning, SparsityCallback
from sparsetrain.callbacks.checkpoints import AtomicCheckpoints, StopOnDivergence
from sparsetrain.callbacks.files import written
from sparsetrain.callbacks.progress import EpochLines
from sparsetrain.errors import DivergedError, RecipeError
from sparsetrain.masks import save_masks
from sparsetrain.recipe.build import Built, as_recipe_error, build, instantiate, require_lightning
from sparsetrain.recipe.directory import WriteConfig, check_resume, last_checkpoint, resume_path, write_metrics
from sparsetrain.recipe.flops import flops
from sparsetrain.recipe.history import History
from sparsetrain.recipe.metrics import evaluate, only_prunes, sparsity
from sparsetrain.recipe.quiet import quiet
from sparsetrain.recipe.schema import load_recipe, recipe_parser
from sparsetrain.schedules import Clock

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
    seed_everything(config.seed, workers=True, verbose=False)
    built = build(config, load=resume is None)
    model = require_lightning(built.model)
    if built.data is None:
        raise RecipeError("the recipe names no data; add data: {class_path: VisionData, init_args: {name: digits}}")
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
    step = check_resume(resume, text, model) if resume is not None else 0
    with quiet():
        try:
            _train(config, built, out, text, resume, step)
        except DivergedError as error:
            seconds = {"total": round(time.monotonic() - began, 2)}
            raise _diverged(out, record | {"seconds": seconds}, error) from error
        fitted = time.monotonic()
        # Without training the model as it came is its own twin.
        trains = config.method is not None and not only_prunes(config)
        twin = dense_twin(recipe, overrides, out) if config.dense_twin and trains else None
        dense_file = out / "checkpoints" / "dense.ckpt"
        metrics = record | evaluate(config, model, built.data, built.method, dense_file, twin)
        metrics |= sparsity(built.method, model)
        metrics |= _facts(config, built, model)
        metrics["seconds"] = {"total": round(time.monotonic() - began, 2), "fit": round(fitted - began, 2)}
    masks = None if built.method is None else built.method.masks.saved()
    if _speaks():
        if masks is not None:
            with written(out / "masks.safetensors") as partial:
                save_masks(partial, masks)
        write_metrics(out, metrics)
    return metrics


def _facts(config: Namespace, built: Built, model: LightningModule) -> dict[str, Any]:
    """The keys ``method`` and ``flops`` of metrics.json."""
    facts = {} if built.method is None else built.method.facts()
    for callback in built.callbacks:
        if isinstance(callback, DepthPruning):
            facts |= {"removed": callback.removed}
    found = flops(model, built.method.manager if built.method else None, built.data)
    if found and facts.get("removed"):
        # Dense is the model before blocks were taken out of it.
        whole = flops(instantiate(config, "model"), None, built.data)
        found["dense"] = whole["dense"] if whole else found["dense"]
    return {"method": facts, "flops": found}


def _speaks() -> bool:
    """With several processes one writes and prints."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def _train(config: Namespace, built: Built, out: Path, text: str, resume: Path | None, step: int) -> None:
    """Fit, and leave checkpoints/final.ckpt. Raises `KeyboardInterrupt` when Lightning was interrupted."""
    # Building has taken any number of random numbers.
    seed_everything(config.seed, workers=True, verbose=False)
    history = History(out / "history.jsonl", resume_step=step if resume is not None else None)
    trainer = make_trainer(config, built, out, history, text)
    method = built.method
    if method is not None:
        method.before_first_change = lambda t: _save_dense(t, method, out)
    if isinstance(method, OneShotPruning) and only_prunes(config) and Clock(100, 10).steps(method.schedule.at):
        raise RecipeError(f"nothing would be pruned: method.start is {method.schedule.at}, and no step is trained; write 0st")
    if 0 in (trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches):
        raise RecipeError(
            f"nothing would be trained: trainer.max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}, "
            f"limit_train_batches={config.trainer.limit_train_batches}; give all of them more than 0 (only method "
            "OneShotPruning can do without training)"
        )
    with lightning_as_recipe_errors():
        trainer.fit(
            require_lightning(built.model),
            datamodule=built.data,
            ckpt_path=None if resume is None else str(resume),
            weights_only=None,
        )
    trainer.save_checkpoint(out / "checkpoints" / "final.ckpt")


@contextmanager
def lightning_as_recipe_errors() -> Iterator[None]:
    """Lightning's complaints about options are the recipe's; its exit on Ctrl-C is an interrupt again."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except MisconfigurationException as error:
        raise RecipeError(f"Lightning refuses: {' '.join(str(error).split())}") from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        # Lightning ignores Ctrl-C from the first one on, for good.
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)


def _save_dense(trainer: Trainer, method: SparsityCallback, out: Path) -> None:
    # A run that starts from a sparse model has no dense phase.
    if not method.masks.masks:
        trainer.save_checkpoint(out / "checkpoints" / "dense.ckpt", weights_only=True)


def make_trainer(config: Namespace, built: Built, out: Path, history: History, text: str) -> Trainer:
    """The trainer of a run: atomic checkpoints, history, progress, and a guard against divergence."""
    every = str(config.checkpoint_every)
    if every.endswith("%"):
        raise RecipeError(f"checkpoint_every {every!r}: write it in epochs or steps, such as 1ep or 500st")
    steps = None if every.endswith("ep") else Clock(None, None).steps(every)
    if steps == 0:
        raise RecipeError(f"checkpoint_every {every!r}: never is not often enough; write 1ep or 500st")
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
    live, alone = sys.stdout.isatty(), only_prunes(config)
    callbacks: list[Callback] = [
        *([] if built.method is None else [built.method]),
        *built.callbacks,
        StopOnDivergence(),
        WriteConfig(out, text),
        last,
        *([PruneAlone()] if alone else []),
        RichProgressBar() if live else EpochLines(),
    ]
    options = dict(config.trainer) | (PruneAlone.OPTIONS if alone else {})
    options["enable_progress_bar"] = live and options.get("enable_progress_bar") is not False
    options["enable_model_summary"] = bool(options.get("enable_model_summary"))
    with as_recipe_error("trainer"):
        return Trainer(**options, callbacks=callbacks, logger=history, plugins=[AtomicCheckpoints()], default_root_dir=str(out))


class PruneAlone(Callback):
    """Ends a run as soon as it has begun: with 0 steps Lightning does not begin at all, and no method comes to its turn."""

    OPTIONS: ClassVar[dict[str, Any]] = {"max_epochs": 1, "max_steps": -1, "num_sanity_val_steps": 0} | dict.fromkeys(
        ("min_epochs", "min_steps", "max_time")
    )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The method has had its turn."""
        trainer.should_stop = True


def dense_twin(recipe: Path, overrides: Sequence[str], out: Path) -> dict[str, Any]:
    """The dense twin's metrics; a finished one is not trained again, a broken-off or shorter one goes on."""
    where = out / "dense"
    off = [*overrides, "--method", "null", "--dense_twin", "false"]
    has_last = last_checkpoint(where).is_file()
    if has_last and (where / "metrics.json").is_file():
        text = recipe_parser().dump(load_recipe(recipe, off), skip_unset=False)
        if (where / "config.yaml").read_text(encoding="utf-8") == text:
            return dict(json.loads((where / "metrics.json").read_text(encoding="utf-8")))
    if where.exists() and not has_last:
        shutil.rmtree(where)
    if _speaks():
        print("dense twin: the same recipe without pruning")
    return run(recipe, off, where, "last" if has_last else None)


def _diverged(out: Path, record: dict[str, Any], error: DivergedError) -> DivergedError:
    """Write metrics.json with status "diverged"; the error, saying what is left of the run."""
    last = last_checkpoint(out)
    good = f"The last good checkpoint is {last}" if last.is_file() else "There was no checkpoint yet"
    message = f"{error}. {good}"
    write_metrics(out, record | {"status": "diverged", "verified": False, "message": message})
    return DivergedError(message)
