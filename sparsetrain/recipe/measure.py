"""Measuring a recipe's trained model again and again: its dense weights, and metrics on one fixed set of data."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from sparsetrain.allocation import Share
from sparsetrain.callbacks import SparsityCallback
from sparsetrain.criteria import get_criterion
from sparsetrain.errors import DataError, RecipeError
from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.recipe.build import as_recipe_error, build, require_lightning, start_from
from sparsetrain.recipe.metrics import silent_trainer
from sparsetrain.recipe.run import dense_twin
from sparsetrain.recipe.schema import load_recipe


class Bench:
    """A recipe's model with trained weights, and one set of data to measure it on: validation, else test.

    Weights come from ``init_from``, else from the dense twin, trained into ``out/dense`` unless it is there already.

    Args:
        recipe: needs a method (whose targets are measured) and data.
        overrides: as for a run.
        out: where the dense twin goes.
        batches: measure on the first so many batches only; None for all.
        check: looks at it before anything is trained, and raises.

    Raises `RecipeError` for a recipe without method or data, `DataError` where there is nothing to measure on.
    """

    def __init__(
        self,
        recipe: Path,
        overrides: Sequence[str],
        out: Path,
        batches: int | None = None,
        check: Callable[[Bench], object] = lambda bench: None,
    ) -> None:
        if batches is not None and batches < 1:
            raise RecipeError(f"--batches {batches}: measuring needs at least 1 batch")
        self.config: Namespace = load_recipe(recipe, overrides)
        if self.config.method is None:
            raise RecipeError(
                "the recipe has no method, which says what is pruned; add method: {class_path: PruneFinetune, ...}"
            )
        if self.config.data is None:
            raise RecipeError("the recipe names no data; add data: {class_path: VisionData, init_args: {name: digits}}")
        self.weights = self.config.init_from
        seed_everything(self.config.seed, workers=True, verbose=False)
        # Before the twin is trained: what cannot work fails now.
        built = build(self.config)
        self.model: LightningModule = require_lightning(built.model)
        self.data: LightningDataModule = _require(built.data)
        self.method: SparsityCallback = _require(built.method)
        self.batches = batches
        check(self)
        self.stage, self.evaluated_on = self._stage()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"--out {out} cannot be a directory ({error.strerror}); choose another") from error
        if self.weights is None:
            dense_twin(recipe, overrides, out)
            self.weights = str(out / "dense")
            start_from(out / "dense", self.model, self.method)
        self.trainer = silent_trainer(self.config, batches)

    @property
    def manager(self) -> MaskManager:
        """The method's masks: what it would prune."""
        return self.method.masks

    def _stage(self) -> tuple[str, str]:
        """``"validate"`` or ``"test"``, and in words."""
        self.data.prepare_data()
        for stage, setup, words in (("validate", "fit", "validation"), ("test", "test", "test")):
            step, loaders = ("validation_step", "val_dataloader") if stage == "validate" else ("test_step", "test_dataloader")
            self.data.setup(setup)
            if getattr(type(self.model), step) is getattr(LightningModule, step) or not _some(getattr(self.data, loaders)):
                continue
            limit = "" if self.batches is None else f", {self.batches} batch{'es' * (self.batches > 1)}"
            return stage, f"{words} set{limit}"
        raise DataError(
            f"{type(self.data).__name__} gives {type(self.model).__name__} neither validation nor test batches to measure on; "
            "keep some of the training data apart (VisionData: validation: 0.1)"
        )

    def recovery_trainer(self, steps: int, *callbacks: Callback) -> Trainer:
        """A trainer of so many steps by the recipe's own settings, without validation, checkpoints, logs and its callbacks."""
        options = dict(self.config.trainer)
        for key in ("max_epochs", "min_epochs", "min_steps", "max_time"):
            options[key] = None
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        options |= silent | {"max_steps": steps, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        with as_recipe_error("trainer"):
            return Trainer(**options, callbacks=list(callbacks))

    def shares(self) -> list[Share]:
        """The targets as an allocation sees them, scored by the method's criterion (magnitude, if it has none)."""
        criterion = get_criterion(getattr(self.method, "criterion", "magnitude"))

        def scores(tensor: MaskedTensor) -> Callable[[], Tensor]:
            target = tensor.target
            return lambda: target.layout.view(criterion.score(target.parameter.detach(), name=tensor.name, step=0))

        return [Share(t.name, t.pattern, t.target.view_shape, scores(t), scores(t)) for t in self.manager]

    def evaluate(self) -> dict[str, float]:
        """Metrics of the model as it is now, by their last names: ``loss``, ``accuracy``, ..."""
        run = self.trainer.validate if self.stage == "validate" else self.trainer.test
        found = {
            short(name): float(v)
            for loader in run(self.model, datamodule=self.data, verbose=False)
            for name, v in loader.items()
        }
        if "loss" not in found:
            raise RecipeError(
                f"{type(self.model).__name__} logs {', '.join(found) or 'nothing'} when it is evaluated and no loss, which is "
                "compared; log it: self.log('val/loss', loss)"
            )
        return found

    def loss(self, count: int | None = None) -> Callable[[nn.Module], Tensor]:
        """Model -> the differentiable mean loss in float64 that it logs on the first ``count`` batches (at least one)."""
        loader = self.data.val_dataloader() if self.stage == "validate" else self.data.test_dataloader()
        stream: Iterable[Any] = loader[0] if isinstance(loader, list) else loader
        batches = [_double(batch) for batch in islice(stream, count or self.batches)]

        def loss(model: nn.Module) -> Tensor:
            module = require_lightning(model.eval())
            step = module.validation_step if self.stage == "validate" else module.test_step
            with _logged(module) as logged:
                for number, batch in enumerate(batches):
                    step(batch, number)
            values = [value for name, value in logged if short(name) == "loss"]
            if not values:
                raise RecipeError(
                    f"{type(module).__name__} logs no loss tensor when it is evaluated; log it: self.log('val/loss', loss)"
                )
            return torch.stack(values).mean()

        return loss


def short(name: str) -> str:
    """A metric's name without its stage. Example: ``short("val/loss") == short("test_loss") == "loss"``."""
    return re.sub(r"^(val|valid|validation|test)[/_]|/dataloader_idx_\d+$", "", name)


def _require(found: Any) -> Any:
    if found is None:
        raise RecipeError("the recipe lacks a method or data")
    return found


def _some(loaders: Callable[[], Any]) -> bool:
    try:
        found = loaders()
    except MisconfigurationException:  # Lightning's own complaint where there is none
        return False
    return found is not None and any(
        True for loader in (found if isinstance(found, list) else [found]) for _ in islice(loader, 1)
    )


def _double(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, lambda t: t.double() if t.is_floating_point() else t)


@contextmanager
def _logged(module: LightningModule) -> Iterator[list[tuple[str, Tensor]]]:
    """What a module logs inside the block, as it gives it: tensors keep their graph."""
    found: list[tuple[str, Tensor]] = []

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, Tensor):
            found.append((name, value))

    def log_dict(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            log(name, value)

    replaced = {"log": log, "log_dict": log_dict}
    try:
        for name, function in replaced.items():
            object.__setattr__(module, name, function)
        yield found
    finally:
        for name in replaced:
            object.__delattr__(module, name)


def saved_weights(model: nn.Module) -> dict[str, Any]:
    """A copy of a model's weights and buffers. Example: ``model.load_state_dict(saved_weights(model))``."""
    return copy.deepcopy(model.state_dict())
