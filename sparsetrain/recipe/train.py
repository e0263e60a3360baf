"""The trainer of a run: atomic checkpoints, history, progress, a guard against divergence; and a fit with it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from torch import nn

from sparsetrain.callbacks import OneShotPruning, SparsityCallback
from sparsetrain.callbacks.checkpoints import AtomicCheckpoints, StopOnDivergence
from sparsetrain.callbacks.progress import EpochLines
from sparsetrain.errors import RecipeError
from sparsetrain.recipe.build import Built, Lineage, as_recipe_error, require_lightning
from sparsetrain.recipe.directory import WriteConfig
from sparsetrain.recipe.history import History
from sparsetrain.recipe.metrics import ALONE, only_prunes
from sparsetrain.schedules import Clock

#: What a run and its plan say where `prunes_random`.
RANDOM = "pruned are the random weights the model starts with, unless it loads its own; give init_from"


def prunes_random(config: Namespace, model: nn.Module) -> bool:
    """Whether a recipe only prunes, and nothing says that the weights it begins with were trained."""
    # A task with transformers' weights has them from ``model``.
    trained = config.init_from or getattr(model, "pretrained", False) or config.get("model.init_args.model")
    return only_prunes(config) and not trained


def fit(config: Namespace, built: Built, out: Path, text: str, resume: Path | None, step: int) -> None:
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
            f"limit_train_batches={config.trainer.limit_train_batches}; give all of them more than 0 "
            f"(only {' and '.join(ALONE)} can do without training)"
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
        *([Lineage(built.lineage)] if built.lineage else []),
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
