"""The command ``sparsetrain sensitivity``: a recipe's trained model, each of its targets pruned alone, measured and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sparsetrain.callbacks.files import written
from sparsetrain.criteria import StatisticsCriterion
from sparsetrain.errors import RecipeError
from sparsetrain.recipe.measure import Bench
from sparsetrain.recipe.quiet import quiet
from sparsetrain.report.sensitivity import plot_scan
from sparsetrain.sensitivity import Scan, parameter_sensitivity, scan


def sensitivity(
    recipe: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    *,
    batches: int | None = None,
    units: bool = False,
    parameters: int = 0,
    progress: bool = True,
) -> tuple[Scan, Path, Path]:
    """Scan a recipe's trained model; returns the scan, ``OUT/sensitivity.json`` and ``OUT/sensitivity.png``.

    Weights come from ``init_from`` (``--init_from RUN``), else the dense twin is trained into ``OUT/dense``; a finished one is
    used as it is. Measured on the validation set, on the test set where there is none.

    Args:
        recipe: needs a method; its targets, patterns and criterion are used.
        overrides: as for a run.
        out: default ``runs/<recipe name>-sensitivity``.
        batches: measure on the first so many batches only.
        units: prune whole neurons and filters too.
        parameters: so many single weights of each tensor are compared with their derivatives (on one batch), 0 for none.
        progress: show progress bars.

    Raises `SparsetrainError` kin for a user's mistake. Example: ``sensitivity(Path("recipes/quickstart.yaml"), units=True)``.
    """
    if parameters < 0 or parameters == 1:
        raise RecipeError(f"--parameters {parameters}: correlations need at least 2 weights of each tensor, 0 for none")
    out = out or Path("runs") / f"{recipe.stem}-sensitivity"
    with quiet():
        bench = Bench(recipe, overrides, out, batches, _require_weights)
        criterion = getattr(bench.method, "criterion", "magnitude")
        found = scan(bench.manager, bench.evaluate, criterion=criterion, units=units, progress=progress)
        found.evaluated_on = bench.evaluated_on
        if parameters:
            seed = bench.config.seed
            found.parameters = parameter_sensitivity(bench.manager, bench.loss(1), parameters, seed, progress=progress)
    data, picture = out / "sensitivity.json", out / "sensitivity.png"
    with written(data) as partial:
        found.to_json(partial)
    plot_scan(asdict(found), picture, recipe.stem)
    return found, data, picture


def _require_weights(bench: Bench) -> None:
    criterion = getattr(bench.method, "criterion", None)
    if isinstance(criterion, StatisticsCriterion):
        raise RecipeError(
            f"criterion {type(criterion).__name__} scores from data that a scan does not stream; scan with "
            "--method.criterion magnitude"
        )
