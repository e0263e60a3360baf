"""Which layers of a model can carry a LoRA adapter and a mask; everything else is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsetrain.errors import RecipeError, TargetError, nearest
from sparsetrain.nn.lora import plain_weight

_INITS = (True, False, "gaussian")
#: What of PEFT's settings is followed, or says nothing about the arithmetic. Any other must be as PEFT leaves it.
_KNOWN = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "init_lora_weights"),
    *("target_modules", "modules_to_save", "fan_in_fan_out", "task_type", "peft_type", "auto_mapping", "peft_version"),
    *("base_model_name_or_path", "revision", "inference_mode", "runtime_config"),
}
#: Who reads the weights of its children without calling them.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def choose_layers(model: nn.Module, weights: Iterable[str], config: LoraConfig) -> tuple[list[str], list[str]]:
    """The layers that would get adapters, and the modules that would train beside them; the model is left as it is.

    Raises as `Adapters` does. Example: ``choose_layers(net, ["fc1.weight", "fc2.weight"], LoraConfig(r=8))``.
    """
    _check_config(config)
    modules, names = dict(model.named_modules()), [layer_name(weight) for weight in weights]
    if any(isinstance(module, BaseTunerLayer) for module in modules.values()):
        raise TargetError("the model has adapters already; merge or remove them first")
    lost = [name for name in names if name not in modules]
    if lost:
        raise TargetError(f"the model has no layer {lost[0]}.{nearest(lost[0], modules)}")
    chosen = _narrow(names, config.target_modules)
    for name in chosen:
        _check_layer(model, name)
    saved = _find_modules(model, config.modules_to_save or ())
    for name in chosen:
        inside = [other for other in saved if f"{name}.".startswith(f"{other}.")]
        if inside:
            raise RecipeError(f"{name} would carry an adapter, and modules_to_save trains all of {inside[0]}; leave one out")
    return chosen, saved


def layer_name(weight: str) -> str:
    """``"fc1.weight"`` -> ``"fc1"``. Raises `TargetError` for a parameter that is no layer's weight."""
    if not weight.endswith(".weight"):
        raise TargetError(
            f"{weight}: LoRA adapts the weight of a Linear or Conv1D, and this is another parameter; exclude it "
            "(targets.exclude), or fine-tune all weights with KeepMasks"
        )
    return weight.removesuffix(".weight")


def _narrow(names: list[str], asked: Any) -> list[str]:
    """The names that PEFT's ``target_modules`` means: a regular expression for all of it, or a list of names or their ends."""
    if asked is None or asked == "all-linear":
        chosen = names
    elif isinstance(asked, str):
        chosen = [name for name in names if re.fullmatch(asked, name)]
    else:
        ends = tuple(asked)
        lost = [end for end in ends if not any(f".{name}".endswith(f".{end}") for name in names)]
        if lost:
            raise TargetError(
                f"target_modules {lost[0]!r} matches no target ({', '.join(names[:4])}, ...).{nearest(lost[0], names)}"
            )
        chosen = [name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)]
    if not chosen:
        raise TargetError(f"target_modules {asked!r} matches no target ({', '.join(names[:4])}, ...)")
    return chosen


def _check_config(config: LoraConfig) -> None:
    if config.init_lora_weights not in _INITS:
        raise RecipeError(
            f"init_lora_weights={config.init_lora_weights!r} rewrites the frozen weights and their zeros, or needs data; use "
            f"one of {', '.join(map(repr, _INITS))}"
        )
    plain = LoraConfig()
    for option in (field.name for field in fields(config) if field.name not in _KNOWN):
        if (value := getattr(config, option)) != getattr(plain, option):
            raise RecipeError(
                f"{option}={value!r} is not supported by masked LoRA; leave it out (which layers get adapters say targets and "
                "target_modules, what else trains modules_to_save)"
            )
    if config.r < 1:
        raise RecipeError(f"rank {config.r} is no rank; give 1 or more")


def _check_layer(model: nn.Module, name: str) -> None:
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    width = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    known = isinstance(layer, nn.Linear | Conv1D) or (None not in width and plain_weight(layer) is None)
    if not known or not isinstance(getattr(layer, "weight", None), Tensor):
        raise TargetError(
            f"{name} is a {type(layer).__name__}, and LoRA keeps zeros in Linear and Conv1D layers; exclude it "
            "(targets.exclude), or fine-tune all weights with KeepMasks"
        )
    if isinstance(parent, _READERS):
        raise TargetError(
            f"{name}: its {type(parent).__name__} reads the weight without calling the layer, so that an adapter would do "
            "nothing; exclude it (targets.exclude), or fine-tune all weights with KeepMasks"
        )
    weight = plain_weight(layer)
    ties = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight and n != f"{name}.weight"]
    if ties:
        raise TargetError(f"{name}.weight is tied to {ties[0]}, which an adapter on one of them would part; exclude it")


def _find_modules(model: nn.Module, asked: Any) -> list[str]:
    """The names that PEFT's ``modules_to_save`` means: modules of that name, or whose name ends in it."""
    names = [name for name, _ in model.named_modules() if name]
    for end in asked:
        if not any(f".{name}".endswith(f".{end}") for name in names):
            raise TargetError(f"modules_to_save {end!r} matches no module.{nearest(end, names)}")
    return [name for name in names if any(f".{name}".endswith(f".{end}") for end in asked)]
