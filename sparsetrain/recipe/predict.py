"""The command ``sparsetrain predict``: learn from measured allocations of one budget which one keeps the most.

Each measurement: the trained dense weights, pruned at once by magnitude (the method's criterion) to an allocation, then a short
recovery training by the recipe's own optimizer and data at a tenth of its learning rate, constant, then the loss on the
validation set. Measurements are appended to ``OUT/measurements.jsonl`` and never made twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.progress import track

from sparsetrain.allocation import ERK, LAMP, Allocation, Global, Share, UniformPlus
from sparsetrain.callbacks.files import written
from sparsetrain.criteria import StatisticsCriterion
from sparsetrain.errors import DivergedError, RecipeError, SparsetrainError
from sparsetrain.masks import MaskManager
from sparsetrain.patterns import exact
from sparsetrain.predictor import AccuracyPredictor, Layers, sample, search
from sparsetrain.pruning import prune
from sparsetrain.recipe.measure import Bench, saved_weights
from sparsetrain.recipe.quiet import quiet
from sparsetrain.recipe.schema import recipe_parser
from sparsetrain.recipe.train import lightning_as_recipe_errors
from sparsetrain.report.sensitivity import plot_prediction

#: Uniform without caps: what rounding leaves is handed out, so that the budget is met exactly.
NAMED: dict[str, Allocation] = {"uniform": UniformPlus(first=1.0, last=1.0), "erk": ERK(), "global": Global(), "lamp": LAMP()}
RATE = 0.1
#: How often it searches, measures what it found, and learns from that too.
SEARCHES = 3


class _Recovery(Callback):
    """Keeps the masks of a manager, at a constant tenth of the learning rate the recipe starts with."""

    def __init__(self, manager: MaskManager) -> None:
        self.manager = manager

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * group.get("initial_lr", group["lr"])
        trainer.strategy.lr_scheduler_configs = []
        self.manager.attach(*trainer.optimizers, mask_gradients=trainer.gradient_clip_val is not None or None)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.manager.detach()


class Measurements:
    """Measured allocations of one recipe, kept in ``OUT/measurements.jsonl``; a cut-off last line is left out.

    Each line says what it was measured with: another recipe, budget of steps, weights or data is another measurement.
    """

    def __init__(self, bench: Bench, out: Path, steps: int) -> None:
        self.bench, self.steps, self.path = bench, steps, out / "measurements.jsonl"
        self.dense = saved_weights(bench.model)
        weights = hashlib.sha256()
        for name, value in self.dense.items():
            weights.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        text = recipe_parser().dump(bench.config, skip_unset=False)
        self.setting = hashlib.sha256(json.dumps([text, weights.hexdigest(), steps, bench.evaluated_on]).encode()).hexdigest()[
            :16
        ]
        self.known = dict(self._read())

    def _read(self) -> list[tuple[str, dict[str, float]]]:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        found = []
        for line in lines:
            try:
                row = json.loads(line)
                if row["setting"] == self.setting:
                    found.append((_key(row["pruned"]), dict(row["metrics"])))
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def __call__(self, layers: Layers) -> dict[str, float]:
        """The metrics of an allocation: as measured before, or measured now."""
        pruned = {name: str(value) for name, value in layers.items()}
        if _key(pruned) not in self.known:
            metrics = self._measure(layers)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
            with self.path.open("a", encoding="utf-8") as file:
                row = {"setting": self.setting, "pruned": pruned, "metrics": metrics}
                file.write("\n" * cut + json.dumps(row) + "\n")
            self.known[_key(pruned)] = metrics
        return self.known[_key(pruned)]

    def _measure(self, layers: Layers) -> dict[str, float]:
        bench = self.bench
        bench.model.load_state_dict(self.dense)
        seed_everything(bench.config.seed, workers=True, verbose=False)
        manager = bench.method.create_manager(bench.model)
        prune(manager, criterion=getattr(bench.method, "criterion", "magnitude"), own=layers)
        if self.steps:
            with lightning_as_recipe_errors():
                bench.recovery_trainer(self.steps, _Recovery(manager)).fit(bench.model, datamodule=bench.data)
        manager.verify(strict=True)
        metrics = bench.evaluate()
        bench.model.load_state_dict(self.dense)
        if not math.isfinite(metrics["loss"]):
            raise DivergedError(f"the loss is {metrics['loss']} after pruning and {self.steps} steps; lower the learning rate")
        return metrics


def _key(pruned: Mapping[str, str]) -> str:
    return json.dumps(dict(sorted(pruned.items())))


def predict(
    recipe: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    budget: float | None = None,
    *,
    samples: int = 40,
    steps: int = 200,
    batches: int | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Path, Path]:
    """Measure ``samples`` random allocations of one budget, learn from them, search, and measure what was found.

    Returns the content of ``OUT/allocation.json``, its path and that of ``OUT/prediction.png``. The file is read by
    ``allocation: fixed:OUT/allocation.json``; its ``layers`` are those with the lowest measured loss of the one found and the
    named ones (``chosen`` says which). A quarter of the samples is held out to judge the predictor; what a search finds is
    measured, learned from, and searched again, three times.

    Args:
        recipe: needs a method; its targets, patterns and criterion are used.
        overrides: as for a run.
        out: default ``runs/<recipe name>-predict``.
        budget: sparsity over all targets; the method's if None.
        samples: allocations to measure; at least two for each tensor, plus a third.
        steps: of recovery training each; 0 for none.
        batches: measure the loss on the first so many batches only.
        progress: show a progress bar.

    Raises `SparsetrainError` kin for a user's mistake. Example: ``predict(Path("recipes/quickstart.yaml"), budget=0.98)``.
    """
    if steps < 0 or samples < 1:
        raise RecipeError(f"--steps {steps}, --samples {samples}: no negative steps, and at least one sample")
    out = out or Path("runs") / f"{recipe.stem}-predict"
    with quiet():

        def check(found: Bench) -> None:
            _require_enough(found.manager, samples)
            ERK().validate(found.shares(), _budget(found, budget))

        bench = Bench(recipe, overrides, out, batches, check)
        sparsity = _budget(bench, budget)
        measured = Measurements(bench, out, steps)
        shares = bench.shares()
        anchors = _anchors(shares, sparsity)
        drawn = sample(shares, sparsity, list(anchors.values()), samples, bench.config.seed)
        if len(drawn) < samples:
            raise RecipeError(
                f"sparsity {float(sparsity):g} leaves only {len(drawn)} different allocations of {len(shares)} tensors by "
                f"these patterns, {samples} are to be measured; use smaller units, or allocation 'erk', which needs none"
            )
        jobs = track([*anchors.values(), *drawn], "measuring", transient=True, disable=not progress)
        for layers in jobs:
            measured(layers)
        found = _learn(bench, shares, sparsity, anchors, drawn, measured)
    data, picture = out / "allocation.json", out / "prediction.png"
    with written(data) as partial:
        partial.write_text(json.dumps(found | {"steps": steps}, indent=1), encoding="utf-8")
    plot_prediction(found, picture, recipe.stem)
    return found, data, picture


def _learn(
    bench: Bench,
    shares: Sequence[Share],
    sparsity: Fraction,
    anchors: Mapping[str, Layers],
    drawn: list[Layers],
    measured: Measurements,
) -> dict[str, Any]:
    held_out = drawn[len(drawn) - len(drawn) // 4 :]
    known = [*anchors.values(), *drawn[: len(drawn) - len(held_out)]]
    positive = all(measured(layers)["loss"] > 0 for layers in [*known, *held_out])

    def value(layers: Layers) -> float:
        loss = measured(layers)["loss"]
        return math.log(loss) if positive and loss > 0 else loss

    tried: list[Layers] = []
    for turn in range(SEARCHES):
        predictor = AccuracyPredictor(bench.config.seed).fit(known, [value(layers) for layers in known])
        best = search(predictor, shares, sparsity, known, seed=bench.config.seed + turn)
        if best in known:
            break
        tried.append(best)
        known.append(best)
    found = min(tried or known, key=value)
    named = {"found": found} | dict(anchors)
    groups = [("fitted", layers) for layers in known if layers not in named.values()]
    groups += [("held out", layers) for layers in held_out] + list(named.items())
    guesses = predictor.predict([layers for _, layers in groups])
    points = []
    for (group, layers), guess in zip(groups, guesses.tolist(), strict=True):
        metrics = measured(layers)
        points.append(
            {
                "group": group,
                "predicted": math.exp(guess) if positive else guess,
                "loss": metrics["loss"],
                "metrics": metrics,
                "layers": {name: float(value) for name, value in layers.items()},
            }
        )
    correlation = predictor.rank_correlation(held_out, [value(layers) for layers in held_out])
    chosen = min(named, key=lambda name: measured(named[name])["loss"])
    return {
        "sparsity": float(sparsity),
        "layers": {name: float(value) for name, value in named[chosen].items()},
        "chosen": chosen,
        "rank_correlation": None if math.isnan(correlation) else correlation,
        "held_out": len(held_out),
        "fitted": len(known),
        "model": predictor.name,
        "cross_validation": predictor.errors,
        "evaluated_on": bench.evaluated_on,
        "points": points,
    }


def _require_enough(manager: MaskManager, samples: int) -> None:
    tensors = len(list(manager))
    # Three quarters are fitted, on two features a tensor; at least four are held out.
    needed = max(16, math.ceil(2 * tensors * 4 / 3))
    if samples < needed:
        raise RecipeError(
            f"{samples} samples are too few to learn from: {tensors} tensors make {2 * tensors} features, and a quarter of the "
            f"samples is held out; ask for --samples {needed} or more"
        )


def _budget(bench: Bench, budget: float | None) -> Fraction:
    if isinstance(getattr(bench.method, "criterion", None), StatisticsCriterion):
        raise RecipeError("the method's criterion scores from data; measure with --method.criterion magnitude")
    own = [tensor.name for tensor in bench.manager if tensor.goal is not None]
    if own:
        raise RecipeError(
            f"{own[0]} has a sparsity of its own (overrides), an allocation decides all of them; drop the override"
        )
    if budget is None:
        budget = bench.method.asked()
    if budget is None:
        raise RecipeError("how sparse? The method asks for no sparsity; give --budget, such as --budget 0.98")
    found = exact(budget)
    if not found:
        raise RecipeError("--budget 0 prunes nothing; give the sparsity over all targets, such as --budget 0.98")
    return found


def _anchors(shares: Sequence[Share], sparsity: Fraction) -> dict[str, Layers]:
    """The named allocations that these patterns and this budget allow."""
    found: dict[str, Layers] = {}
    for name, allocation in NAMED.items():
        try:
            allocation.validate(shares, sparsity)
            found[name] = allocation(shares, sparsity)
        except SparsetrainError:
            continue
    return found
