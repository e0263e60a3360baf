"""The barrier between two finished runs: the straight line between their final weights, evaluated point by point."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparsetrain.callbacks.files import written
from sparsetrain.checkpoints import read_weights, require_merged
from sparsetrain.connectivity import Barrier, barrier
from sparsetrain.errors import RecipeError
from sparsetrain.recipe.build import check_weights, instantiate, require_lightning, shorten, taken_out
from sparsetrain.recipe.metrics import silent_trainer
from sparsetrain.recipe.quiet import quiet
from sparsetrain.recipe.schema import load_recipe
from sparsetrain.report.plots import BLUE, GREY, STYLE, VERMILLION, figure

_NORMS = (nn.modules.batchnorm._BatchNorm,)


def between(run_a: Path, run_b: Path, out: Path | None = None, points: int = 11, console: Console | None = None) -> Barrier:
    """The barrier between the final weights of two run directories of one model, on the first one's test data.

    The error is 1 - accuracy where the task logs an accuracy, else its loss. Prints a table; with ``out`` writes
    ``barrier.json`` and ``barrier.png`` there. BatchNorm statistics are interpolated like weights; the table says so.

    Raises `RecipeError` for a directory that is no run or a task that logs neither, `MaskStateError` for runs of two models.
    Example: ``between(Path("runs/seed0"), Path("runs/seed1"), Path("runs/barrier")).barrier``.
    """
    for run in (run_a, run_b):
        if not (run / "config.yaml").is_file():
            raise RecipeError(f"{run} is no run directory: it has no config.yaml; give what `sparsetrain run` wrote with --out")
    config = load_recipe(run_a / "config.yaml")
    with quiet():
        model, data = require_lightning(instantiate(config, "model")), instantiate(config, "data")
        shorten(model, taken_out(run_a))
        states = [read_weights(run)["state_dict"] for run in (run_a, run_b)]
        for run, state in zip((run_a, run_b), states, strict=True):
            require_merged(run, state)
            check_weights(run, state, model)
        measured: list[str] = []

        def evaluate(state: dict[str, Tensor]) -> float:
            # A metric of the task may keep buffers of its own: each point has a model that nobody has used.
            one: LightningModule = copy.deepcopy(model)
            one.load_state_dict(state)
            name, error = _error(config, one, data)
            measured.append(name)
            return error

        found = barrier(states[0], states[1], evaluate, points)
    record = {
        "runs": [str(run_a), str(run_b)],
        "metric": measured[0],
        "batch_norm_interpolated": any(isinstance(module, _NORMS) for module in model.modules()),
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(found).items()},
    }
    speaker = console or Console()
    speaker.print(_table(record))
    speaker.print(f"barrier {found.barrier:.4f} ({record['metric']}: highest on the line - mean of the ends)")
    if record["batch_norm_interpolated"]:
        speaker.print("BatchNorm statistics are interpolated like weights")
    if out is not None:
        with written(out / "barrier.json") as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _plot(record, out / "barrier.png")
    return found


def _error(config: Namespace, model: LightningModule, data: Any) -> tuple[str, float]:
    """The name and the value of the error of a model, on the test data (validation data for a task without test step)."""
    if data is None:
        raise RecipeError("the recipe of the first run names no data to evaluate on")
    silent = silent_trainer(config)
    tests = type(model).test_step is not LightningModule.test_step
    results = (silent.test if tests else silent.validate)(model, datamodule=data, verbose=False)
    metrics = {name: float(value) for part in results for name, value in part.items()}
    for ending in ("accuracy", "loss"):
        name = next((name for name in metrics if name.endswith(ending)), None)
        if name is not None:
            return ("error" if ending == "accuracy" else name, 1 - metrics[name] if ending == "accuracy" else metrics[name])
    raise RecipeError(
        f"{type(model).__name__} logs neither an accuracy nor a loss when tested ({', '.join(metrics) or 'nothing'})"
    )


def _table(record: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2))
    table.add_column("alpha", justify="right")
    table.add_column(record["metric"], justify="right")
    table.add_column("")
    ends = {0.0: record["runs"][1], 1.0: record["runs"][0]}
    for alpha, error in zip(record["alphas"], record["errors"], strict=True):
        table.add_row(f"{alpha:.2f}", f"{error:.4f}", ends.get(alpha, ""))
    return table


def _plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        drawn = figure(6, 3.5)
        axes = drawn.add_subplot()
        ends = [record["errors"][0], record["errors"][-1]]
        axes.axhline(sum(ends) / 2, color=GREY, linewidth=1, linestyle="--", label="mean of the ends")
        axes.plot(record["alphas"], record["errors"], color=BLUE, marker="o", markersize=4, label=record["metric"])
        top = max(range(len(record["errors"])), key=record["errors"].__getitem__)
        x = record["alphas"][top]
        axes.plot([x, x], [sum(ends) / 2, record["errors"][top]], color=VERMILLION, label=f"barrier {record['barrier']:.4f}")
        axes.set_xlabel(f"alpha (1: {Path(record['runs'][0]).name}, 0: {Path(record['runs'][1]).name})")
        axes.set_ylabel(record["metric"])
        axes.legend()
        with written(path) as partial:
            drawn.savefig(partial, format="png", dpi=120)
