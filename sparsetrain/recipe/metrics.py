"""metrics.json: what a finished run is measured by, dense against sparse, and what was verified."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import nn

from sparsetrain.callbacks import ContinualPruning, OneShotPruning, SparsityCallback
from sparsetrain.recipe.build import build, require_lightning

#: Methods that can do without training.
ALONE = (OneShotPruning.__name__, ContinualPruning.__name__)
#: Where the dense numbers are from.
DENSE_TWIN = "dense twin: the same recipe without pruning"
#: Endings of metric names: the first that was logged is what a run is judged by.
_MAIN = ("accuracy", "perplexity", "return")
#: Those that are better when low.
_LOWER = ("loss", "perplexity", "error")


def evaluate(
    config: Namespace,
    model: LightningModule,
    data: LightningDataModule,
    method: SparsityCallback | None,
    dense_file: Path,
    twin: dict[str, Any] | None,
) -> dict[str, Any]:
    """The keys ``metric``, ``higher_is_better``, ``dense``, ``dense_from``, ``final`` and ``best`` of metrics.json.

    ``dense`` are the metrics of the twin, else of the weights right before the first pruning: as they were at the end of the
    dense phase, or as they came, if they were trained before this run. Else None.
    """
    final = measured(config, model, data)
    dense, source = None, None
    if twin is not None:
        dense, source = twin["final"], DENSE_TWIN
    elif method is not None and dense_file.is_file():
        before = copy.deepcopy(model)
        saved = torch.load(dense_file, map_location="cpu", weights_only=True)
        before.load_state_dict(saved["state_dict"])
        dense, source = measured(config, before, data), f"end of the dense phase (step {saved['global_step']})"
    elif method is not None and (start := dense_start(config, model)) is not None:
        dense, source = measured(config, start, data), "the model as it came, before pruning"
    return main_metric(final) | {
        "dense": dense,
        "dense_from": source,
        "final": final,
        # Chosen by looking at the data it is judged on, a best epoch flatters; the final one is what counts.
        "best": None,
    }


def main_metric(final: dict[str, float]) -> dict[str, Any]:
    """The keys ``metric`` and ``higher_is_better``: accuracy, else perplexity, else return, else the first by name."""
    named = [name for kind in _MAIN for name in final if name.endswith(kind)] or sorted(final)
    return {"metric": named[0] if named else None, "higher_is_better": bool(named) and not named[0].endswith(_LOWER)}


def only_prunes(config: Namespace) -> bool:
    """Whether a recipe asks for a model pruned as it is: a method that can do without training, and not one step of it."""
    method = config.method is not None and config.method.class_path.rsplit(".", 1)[-1]
    return method in ALONE and 0 in (config.trainer.max_epochs, config.trainer.max_steps)


def dense_start(config: Namespace, model: LightningModule) -> LightningModule | None:
    """The model as it came, made once more; None where it was not trained before this run, or not dense."""
    trained = config.init_from is not None or getattr(model, "pretrained", False)
    if not (trained or only_prunes(config)):
        return None
    alone = config.clone()
    alone.callbacks = []
    seed_everything(config.seed, workers=True, verbose=False)
    built = build(alone)
    manager = built.method.masks if built.method is not None else None
    if manager is None or manager.masks:
        return None
    zeros = sum(int((t.target.parameter == 0).sum()) for t in manager)
    # Zeros that somebody left who kept no masks; a dense weight is hardly ever exactly 0.
    sparse = zeros > 0.01 * sum(t.target.parameter.numel() for t in manager)
    return None if sparse else require_lightning(built.model)


def silent_trainer(config: Namespace, batches: int | None = None) -> Trainer:
    """A trainer that evaluates on one device by a recipe's settings, on the first so many batches, and leaves no traces.

    Example: ``silent_trainer(load_recipe("recipes/quickstart.yaml")).test(model, datamodule=data)``.
    """
    limit = 1.0 if batches is None else batches
    return Trainer(
        accelerator=config.trainer.accelerator,
        devices=1,
        precision=config.trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=limit,
        limit_test_batches=limit,
    )


def measured(config: Namespace, model: LightningModule, data: LightningDataModule) -> dict[str, float]:
    """Metrics of the test set, or of the validation set where a data module has no test set."""
    quiet = silent_trainer(config)
    tests = type(model).test_step is not LightningModule.test_step
    results = quiet.test(model, datamodule=data, verbose=False) if tests else []
    if not any(results):
        results = quiet.validate(model, datamodule=data, verbose=False)
    return {name: float(value) for loader in results for name, value in loader.items()}


def sparsity(method: SparsityCallback | None, model: nn.Module) -> dict[str, Any]:
    """The keys ``sparsity``, ``layers``, ``unclaimed``, ``verified``, ``problems`` and ``changes`` of metrics.json."""
    parameters = sum(p.numel() for p in model.parameters())
    if method is None:
        empty = {"asked": 0.0, "actual": 0.0, "prunable": 0, "kept": 0, "compression": 1.0, "model": 0.0}
        return {"sparsity": empty, "layers": [], "unclaimed": {}, "verified": True, "problems": [], "changes": []}
    verification = method.masks.verify()
    rows = verification.rows
    # What was taken out of the model is gone as well as what is masked.
    taken = sum(done.before - done.after for done in getattr(method, "compacted", []))
    parameters += taken
    prunable = sum(math.prod(row.shape) for row in rows) + taken
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
        "unclaimed": _unclaimed(method),
        "verified": verification.ok and missing is None,
        "problems": verification.problems + ([missing] if missing else []),
        "changes": [
            {"step": c.step, "tensor": c.tensor, "died": c.died, "grew": c.grew, "why": c.why} for c in method.masks.changes
        ],
    }


def _unclaimed(method: SparsityCallback) -> dict[str, str]:
    """What was not claimed when the run began, less the targets that have been pruned since."""
    pruned = method.masks.masks
    return {name: why for name, why in method.masks.unclaimed.items() if not (name in pruned and why.endswith("stays dense"))}
