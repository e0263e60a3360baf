"""From a parsed recipe to objects: the only place where names become objects, so that there is one mask manager."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn

from sparsetrain.callbacks import Distillation, SparsityCallback, StructuredCallback
from sparsetrain.checkpoints import matching, read_weights, require_merged, unwrapped
from sparsetrain.depth import remove_again
from sparsetrain.errors import MaskStateError, RecipeError, SparsetrainError, nearest
from sparsetrain.masks.state import from_state
from sparsetrain.masks.verification import adopt_zeros
from sparsetrain.recipe.schema import recipe_parser
from sparsetrain.structure import Compacted, compact_again


@dataclass
class Built:
    """What a recipe becomes."""

    model: nn.Module
    data: LightningDataModule | None
    method: SparsityCallback | None
    callbacks: list[Callback] = field(default_factory=list)
    #: What had been taken out of the model before: see `taken_out`.
    lineage: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def as_recipe_error(what: str) -> Iterator[None]:
    """Turn what a class raises about its arguments into a `RecipeError` that says whose arguments they are."""
    try:
        yield
    except SparsetrainError:
        raise
    except Exception as error:
        # jsonargparse wraps what a constructor raised, once for every optional it is nested in.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
            if isinstance(cause, SparsetrainError):
                raise cause from None
        kind = "" if isinstance(cause, MisconfigurationException) else f"{type(cause).__name__}: "
        raise RecipeError(f"{what} could not be built: {kind}{' '.join(str(cause).split())}") from error


def build(config: Namespace, *, load: bool = True, resume: Path | None = None) -> Built:
    """Instantiate a recipe's objects. The method is bound to the model at once, so that what cannot work fails here.

    Weights of ``init_from`` are loaded with their masks (or their zeros as masks), unless ``load`` is off because a
    checkpoint will follow: that of ``resume``, whose shapes the model gets. Raises `RecipeError` and its kin.
    """
    model, data = instantiate(config, "model"), instantiate(config, "data")
    method, callbacks = instantiate(config, "method"), instantiate(config, "callbacks")
    lineage: list[dict[str, Any]] = []
    if resume is not None and not load:
        lineage = [taken for state in _states(read_weights(resume)) for taken in state.get("lineage", [])]
    elif config.init_from is not None and load:
        lineage = taken_out(Path(config.init_from))
    shorten(model, lineage)
    if isinstance(method, StructuredCallback):
        method.look(data)
    if method is not None:
        rivals = [type(c).__name__ for c in callbacks or [] if isinstance(c, SparsityCallback)]
        if rivals:
            raise RecipeError(
                f"method {type(method).__name__} and callbacks {', '.join(rivals)} would both set masks, and one would undo "
                "the other; keep one of them (overrides give single tensors another pattern or sparsity)"
            )
        method.use(model)
    if isinstance(method, StructuredCallback) and resume is not None and not load:
        for teacher in (c for c in callbacks or [] if isinstance(c, Distillation)):
            teacher.use(model)  # it stays as large as the model was at its start
        method.catch_up([taken for state in _states(read_weights(resume)) for taken in state.get("compacted", [])])
    if config.init_from is not None and load:
        start_from(Path(config.init_from), model, method)
    return Built(model, data, method, callbacks or [], lineage)


def instantiate(config: Namespace, key: str) -> Any:
    """The objects of one key of a recipe, and no others."""
    part = ArgumentParser(exit_on_error=False, parser_mode="recipe")
    part._actions.extend(action for action in recipe_parser()._actions if action.dest == key)
    with as_recipe_error(key), warnings.catch_warnings():
        config = _with_vocabulary(config) if key == "model" else config
        warnings.simplefilter("ignore", DeprecationWarning)
        return part.instantiate(Namespace({key: config[key]}))[key]  # type: ignore[no-untyped-call]


def _with_vocabulary(config: Namespace) -> Namespace:
    """A language model whose configuration names no vocabulary gets that of the data's tokenizer."""
    settings = (config.model.get("init_args") or {}).get("config")
    tokenizer = ((config.get("data") or {}).get("init_args") or {}).get("tokenizer")
    if not isinstance(settings, dict) or settings.get("vocab_size") is not None or tokenizer is None:
        return config
    filled = config.clone()
    filled.model.init_args.config = settings | {"vocab_size": instantiate(config, "data").vocab_size}
    return filled


def saved_masks(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The mask state that a sparsity callback left in a checkpoint, or None."""
    return next((dict(state["masks"]) for state in _states(checkpoint) if "masks" in state), None)


def check_weights(path: Path, weights: dict[str, Any], model: nn.Module) -> None:
    """Raise `MaskStateError` unless the weights are exactly those of the model, name by name, shape by shape.

    LoRA adapters beside them are not looked at: the model gets its own when training starts.
    """
    own, weights = model.state_dict(), unwrapped(weights)
    for name, value in weights.items():
        if name not in own:
            raise MaskStateError(f"{path} is of another model: it has {name!r}, which this one has not.{nearest(name, own)}")
        if tuple(value.shape) != tuple(own[name].shape):
            raise MaskStateError(
                f"{path} is of another model: {name} has shape {tuple(value.shape)}, here it is {tuple(own[name].shape)}"
            )
    missing = [name for name in own if name not in weights]
    if missing:
        raise MaskStateError(
            f"{path} is of another model: it lacks {missing[0]!r}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
        )


class Lineage(Callback):
    """Keeps in every checkpoint what had been taken out of the model before this run: who builds it anew needs that."""

    def __init__(self, taken: list[dict[str, Any]]) -> None:
        self.taken = taken

    def state_dict(self) -> dict[str, Any]:
        """What had been taken out."""
        return {"lineage": self.taken}


def taken_out(path: Path) -> list[dict[str, Any]]:
    """Residual blocks and units that were taken out of the model whose weights these are, first things first."""
    states = _states(read_weights(path))
    before = [taken for state in states for taken in state.get("lineage", [])]
    return before + [{key: state[key]} for state in states for key in ("compacted", "removed") if state.get(key)]


def shorten(model: nn.Module, taken: Iterable[dict[str, Any]]) -> None:
    """Take out of a model built anew what `taken_out` says. Example: ``shorten(model, taken_out(path))``."""
    for what in taken:
        for record in what.get("compacted", []):
            compact_again(model, Compacted(**record["record"]))
        if what.get("removed"):
            remove_again(model, what["removed"])


def _states(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """What callbacks left in a checkpoint."""
    return [state for state in (checkpoint.get("callbacks") or {}).values() if isinstance(state, dict)]


def start_from(path: Path, model: nn.Module, method: SparsityCallback | None) -> None:
    """Load weights into a model, and their masks (else their zeros) into the method's manager.

    The weights may be those of the bare network (a ``save_pretrained`` folder, somebody's safetensors). Raises
    `MaskStateError` for weights of another model, `PatternError` for zeros that are not the method's pattern.
    """
    checkpoint = read_weights(path)
    require_merged(path, checkpoint["state_dict"])
    weights = matching(checkpoint["state_dict"], model)
    check_weights(path, weights, model)
    model.load_state_dict(weights)
    if method is None or method.manager is None:
        return
    state = saved_masks(checkpoint)
    # Masks without a zero (of a model that was compacted) say nothing, whatever targets they had.
    if state is not None and any(saved.sparsity for saved in from_state(state, str(path)).values()):
        method.manager.load_state_dict(state, str(path))
    else:
        method.manager.unclaimed = adopt_zeros(method.manager)


def take_over(checkpoint: Path, model: LightningModule, method: SparsityCallback | None) -> None:
    """Load weights, masks and the method's memory of a finished stage, to begin the next one.

    Raises `MaskStateError` for a checkpoint of another model or without masks.
    """
    content = read_weights(checkpoint)
    if isinstance(method, StructuredCallback):
        method.catch_up((content.get("callbacks", {}).get(method.state_key) or {}).get("compacted", []))
    check_weights(checkpoint, content["state_dict"], model)
    model.load_state_dict(content["state_dict"])
    if method is not None:
        state = content.get("callbacks", {}).get(method.state_key)
        if not state:
            raise MaskStateError(f"{checkpoint} holds no masks of {type(method).__name__}; start the run anew")
        method.masks.load_state_dict(state["masks"])
        method.load_method_state(state["method"])


def require_lightning(model: nn.Module) -> LightningModule:
    """Raise `RecipeError` if the model of a recipe is a plain network, which says nothing about training."""
    if not isinstance(model, LightningModule):
        raise RecipeError(
            f"model is a {type(model).__name__}, which is no LightningModule: wrap it in a task, for example "
            "class_path: Classification with init_args.network"
        )
    return model
