"""A run directory from the side of the run: is it free, may this recipe go on in it, and writing into it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from sparsetrain.callbacks.files import written
from sparsetrain.checkpoints import read_weights
from sparsetrain.data.tokenized import TokenizedData
from sparsetrain.errors import RecipeError
from sparsetrain.recipe.build import check_weights
from sparsetrain.recipe.schema import parse_yaml, read_yaml
from sparsetrain.report import write_report

#: How long a run trains.
LENGTH = tuple(f"trainer.{key}" for key in ("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps"))
#: What may differ when a run goes on: how long and where it trains and what it tells, not what it trains.
FREE = (
    "question",
    "dense_twin",
    "references",
    "checkpoint_every",
    *LENGTH,
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "log_every_n_steps")),
    *(f"trainer.{key}" for key in ("enable_progress_bar", "enable_model_summary", "profiler", "detect_anomaly")),
)
_FULL = ("state_dict", "global_step", "loops", "optimizer_states", "lr_schedulers", "callbacks")


def last_checkpoint(out: Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return out / "checkpoints" / "last.ckpt"


def resumable(out: Path) -> bool:
    """Whether the run in a directory can go on: from its last checkpoint, or, over domains, from its stages."""
    return last_checkpoint(out).is_file() or ((out / "domains").is_dir() and (out / "config.yaml").is_file())


def resume_path(ckpt_path: str | None, out: Path) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises `RecipeError` if the directory is in use by something this run would overwrite, or there is no checkpoint.
    """
    last, ready = last_checkpoint(out), resumable(out)
    path = last if ckpt_path == "last" else None if ckpt_path is None else Path(ckpt_path)
    used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if used and (path is None or path.absolute().parent != last.absolute().parent):
        way = "go on with the run in it: --ckpt_path last" if ready else "delete it: it holds no checkpoint"
        raise RecipeError(f"{out} is in use; choose another directory with --out, or {way}")
    if path is not None and not (path.is_file() or (path == last and ready)):
        again = f"; the run in {out} ended before its first checkpoint, delete it and" if used else ";"
        raise RecipeError(f"there is no checkpoint {path} to go on from{again} start the run without --ckpt_path")
    return path


def check_resume(checkpoint: Path, text: str, model: nn.Module) -> int:
    """The step a checkpoint was written at; raises unless this recipe and model can go on from it exactly.

    Keys of ``FREE`` may differ from the run that wrote it. Raises `RecipeError` for another recipe or a checkpoint of weights
    alone, `MaskStateError` for one that cannot be read or is of another model.
    """
    content = read_weights(checkpoint)
    missing = [key for key in _FULL if key not in content]
    if missing:
        raise RecipeError(
            f"{checkpoint} holds weights but no {missing[0]}: it cannot be gone on from; start a new run from its "
            f"weights: --init_from {checkpoint} --out NEW_DIRECTORY"
        )
    stored = checkpoint.parent.parent / "config.yaml"
    if stored.is_file():
        require_same_recipe(stored, text)
    # A model that makes its layers later, or says that it loads leniently, is Lightning's to check.
    if isinstance(model, LightningModule) and model.strict_loading and not _builds_later(model):
        check_weights(checkpoint, content["state_dict"], model)
    return int(content["global_step"])


def _builds_later(model: LightningModule) -> bool:
    return type(model).configure_model is not LightningModule.configure_model


def require_same_recipe(stored: Path, text: str, free: Sequence[str] = ()) -> None:
    """Raise `RecipeError` unless a recipe is the stored one, but for the keys of ``FREE`` and ``num_workers``.

    ``free``: further keys that may differ, and, of those with a dot at their end, all that begin so. Example:
    ``require_same_recipe(out / "config.yaml", text, ["data.init_args.order"])``.
    """
    before, now = flat(read_yaml(stored)), flat(parse_yaml(text))
    absent, under = "absent", (*FREE, *(key for key in free if key.endswith(".")))
    changed = [
        key
        for key in dict.fromkeys([*before, *now])
        if before.get(key, absent) != now.get(key, absent)
        and not (key in free or key.startswith(under) or key.endswith(".num_workers"))
    ]
    if changed:
        shown = ", ".join(f"{k} was {before.get(k, absent)} and is {now.get(k, absent)}" for k in changed[:4])
        more = f", and {len(changed) - 4} more" if len(changed) > 4 else ""
        added = ", and domains may be added at the end" if free else ""
        raise RecipeError(
            f"the recipe has changed since {stored.parent} was written: {shown}{more}. Go on with the recipe it was "
            f"({stored}); only the length of training may change{added}. Or start a new run from its weights: "
            f"--init_from {stored.parent} --out NEW_DIRECTORY"
        )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe's values by dotted keys. Example: ``flat({"a": {"b": 1}}) == {"a.b": 1}``."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {key: value for name, part in tree.items() for key, value in flat(part, f"{prefix}.{name}".lstrip(".")).items()}


class WriteConfig(Callback):
    """Writes config.yaml, and a tokenizer made for this run, when training starts: one that cannot start leaves nothing."""

    def __init__(self, out: Path, text: str) -> None:
        self.out = out
        self.text = text

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whatever can be checked has been."""
        if trainer.is_global_zero:
            with written(self.out / "config.yaml") as partial:
                partial.write_text(self.text, encoding="utf-8")
            data = trainer.datamodule  # type: ignore[attr-defined]
            if isinstance(data, TokenizedData):
                data.save_trained(self.out / "tokenizer")


def write_metrics(out: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json, whole or not at all, and the report."""
    with written(out / "metrics.json") as partial:
        partial.write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    write_report(out)
