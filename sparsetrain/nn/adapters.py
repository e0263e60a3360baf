"""Masked LoRA adapters in a model: put in, merged without losing a zero, saved as PEFT saves them, taken out."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsetrain.errors import MaskStateError, PatternError, RecipeError, TargetError
from sparsetrain.masks import load_masks, save_masks
from sparsetrain.masks.state import SavedMask, pack_bits
from sparsetrain.nn.choice import choose_layers, layer_name
from sparsetrain.nn.lora import ADAPTER, MaskedLoraLinear, plain_weight
from sparsetrain.writing import whole_folder

_PEFT = "base_model.model."


class Adapters:
    """LoRA adapters on some weights of a model, each with the mask of that weight; all else is frozen.

    Args:
        model: changed in place; the layers get PEFT's wrapper.
        masks: weight name (``"fc1.weight"``) -> mask as stored, True = alive, or None where there are no zeros to keep.
        config: PEFT's. ``target_modules`` narrows the masks down; ``modules_to_save`` names modules that train with the
            adapters, in place. By default rank 8, alpha 16.

    ``layers`` has the wrapped layers by name. Raises `TargetError` for a layer that cannot carry an adapter and a mask,
    `RecipeError` for a configuration that cannot keep zeros, `MaskStateError` for a mask that is not that of its weight.

    Example::

        masks = {t.name: t.mask for t in MaskManager.adopt(model, "2:4")}
        adapters = Adapters(model, masks, LoraConfig(r=8))
        ...  # train the parameters that require gradients
        adapters.merge()
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor | None], config: LoraConfig | None = None) -> None:
        self.model = model
        self.config = copy.deepcopy(config or LoraConfig(r=8, lora_alpha=16))
        chosen, saved = choose_layers(model, masks, self.config)
        for name, mask in masks.items():
            _check_mask(model, layer_name(name), mask)
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        self.layers = self._inject(chosen)
        self.saved = {name: model.get_submodule(name) for name in saved}
        for module in self.saved.values():
            module.requires_grad_(True)
        for parameter in self._trainable:
            if not parameter.requires_grad:
                parameter.grad = None  # an optimizer would step by it
        self.set_masks(masks)

    def _inject(self, names: list[str]) -> dict[str, MaskedLoraLinear]:
        config = copy.deepcopy(self.config)
        config.target_modules = "|".join(re.escape(name) for name in names)
        config.modules_to_save = None
        kinds: dict[type[nn.Module], type[nn.Module]] = {
            type(self.model.get_submodule(name)): MaskedLoraLinear for name in names
        }
        config._register_custom_module(kinds)
        try:
            inject_adapter_in_model(config, self.model, ADAPTER)
            cast_adapter_dtype(self.model, ADAPTER)  # adapters of a half-precision model train in single precision
        except Exception as error:
            # It may have got half of the way.
            self.layers = self._wrapped()
            self.remove()
            raise RecipeError(f"PEFT refuses the adapters: {error}") from error
        found = self._wrapped()
        return {name: found[name] for name in names}

    def _wrapped(self) -> dict[str, MaskedLoraLinear]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, MaskedLoraLinear)}

    def set_masks(self, masks: Mapping[str, Tensor | None]) -> None:
        """Give every layer the mask of its weight; one byte a weight, shared with whoever made it."""
        for name, layer in self.layers.items():
            mask = masks[f"{name}.weight"]
            layer.mask = None if mask is None else mask.to(layer.factors[0].device)

    # -- reading ----------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Rank, how many parameters train, and which share of the model's own that is."""
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        own = sum(p.numel() for n, p in self.model.named_parameters() if ".lora_" not in n)
        return {"rank": self.config.r, "adapters": len(self.layers), "trainable": trainable, "share": trainable / own}

    def idle(self) -> list[str]:
        """Layers whose adapter still does nothing: B is zero, as it was at the start."""
        return [name for name, layer in self.layers.items() if not bool(torch.count_nonzero(layer.factors[1].detach()))]

    # -- ending -----------------------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Write every effective weight into its layer and take the adapters out: the model has its plain names again.

        Raises `PatternError` by name, before anything is written, where a zero would be lost, a value would be NaN or
        infinite, or the weight is quantized.
        """
        for name, layer in self.layers.items():
            try:
                layer.merged_weight()
            except PatternError as error:
                raise PatternError(f"{name}.weight: {error}") from error
        for layer in self.layers.values():
            layer.merge()
        self.remove()

    def remove(self) -> None:
        """Take the adapters out without merging; what was trainable before is so again."""
        for name, layer in self.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.get_base_layer())
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self.layers = {}

    # -- at rest ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def save(self, folder: str | Path, prefix: str = "") -> None:
        """Write a folder that PEFT loads (``PeftModel.from_pretrained``), and ``masks.safetensors`` beside, for `load`.

        ``prefix``: where the network sits in this model, such as ``"network."``; names are written without it. PEFT knows no
        masks: what it loads, and merges, is dense. `RecipeError` where the disk refuses; ``folder`` is as it was then.

        Example: ``adapters.save("adapter", prefix="network.")``.
        """
        strange = [n for n in (*self.layers, *self.saved) if not n.startswith(prefix)]
        if strange:
            raise TargetError(f"{strange[0]} is not below {prefix!r}; give the prefix of the network that has the adapters")
        config = copy.deepcopy(self.config)
        tensors: dict[str, Tensor] = {}
        masks: dict[str, SavedMask] = {}
        config.target_modules = "|".join(re.escape(name.removeprefix(prefix)) for name in self.layers)
        config.modules_to_save = [name.removeprefix(prefix) for name in self.saved] or None
        config.fan_in_fan_out = all(layer.fan_in_fan_out for layer in self.layers.values())
        config.inference_mode = True
        for name, layer in self.layers.items():
            short = name.removeprefix(prefix)
            a, b, _ = layer.factors
            tensors |= {f"{_PEFT}{short}.lora_A.weight": a, f"{_PEFT}{short}.lora_B.weight": b}
            if layer.mask is not None:
                dead = Fraction(int((~layer.mask).sum()), layer.mask.numel())
                alive = layer.mask.numel() - int((~layer.mask).sum())
                shape = tuple(layer.mask.shape)
                masks[f"{short}.weight"] = SavedMask(shape, "unstructured", dead, alive, pack_bits(layer.mask.cpu()))
        for name, module in self.saved.items():
            tensors |= {f"{_PEFT}{name.removeprefix(prefix)}.{key}": value for key, value in module.state_dict().items()}
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        with whole_folder(Path(folder), "the adapter", RecipeError) as partial:
            config.save_pretrained(str(partial))
            save_file(plain, str(partial / "adapter_model.safetensors"), {"format": "pt"})
            save_masks(partial / "masks.safetensors", masks)

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path, masks: Mapping[str, Tensor | None] | None = None) -> Adapters:
        """Put a saved adapter into a model, masked again.

        ``masks``: by default those of ``masks.safetensors`` in the folder; those of a `MaskManager` for an adapter that PEFT
        wrote. Raises `MaskStateError` or `TargetError` for a folder without masks or of another model.

        Example: ``Adapters.load(net, "adapter")``.
        """
        folder = Path(folder)
        try:
            config = LoraConfig.from_pretrained(str(folder))
            tensors = load_file(str(folder / "adapter_model.safetensors"))
        except Exception as error:
            raise MaskStateError(f"{folder} cannot be read as a LoRA adapter: {error}") from error
        if masks is None:
            if not (folder / "masks.safetensors").is_file():
                raise MaskStateError(
                    f"{folder} holds an adapter and no masks.safetensors; give masks, such as "
                    "{t.name: t.mask for t in MaskManager.adopt(model, '2:4')}"
                )
            masks = load_masks(folder / "masks.safetensors")
        weights = {n.removeprefix(_PEFT).replace(".lora_A.weight", ".weight") for n in tensors if ".lora_A." in n}
        # Which layers they are on, the tensors say.
        config.target_modules = config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.inference_mode = False
        adapters = cls(model, {name: masks.get(name) for name in sorted(weights)}, config)
        found = {
            re.sub(r"\.lora_([AB])\.weight$", rf".lora_\1.{ADAPTER}.weight", name.removeprefix(_PEFT)): value
            for name, value in tensors.items()
        }
        own = model.state_dict()
        trained = {n for n in own if ".lora_" in n or any(n.startswith(f"{module}.") for module in adapters.saved)}
        wrong = [
            f"{name} of shape {tuple(value.shape)} does not fit here"
            for name, value in found.items()
            if name not in own or own[name].shape != value.shape
        ]
        wrong += [f"it lacks {name}" for name in sorted(trained - found.keys())]
        if wrong:
            adapters.remove()
            raise MaskStateError(f"{folder} is of another model, or damaged: {wrong[0]}")
        for name, value in found.items():
            own[name].copy_(value)
        return adapters


def _check_mask(model: nn.Module, name: str, mask: Tensor | None) -> None:
    if mask is None:
        return
    layer = model.get_submodule(name)
    weight = plain_weight(layer)
    shape: Any = tuple(weight.shape) if weight is not None else (layer.out_features, layer.in_features)
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise MaskStateError(
            f"the mask of {name}.weight is {mask.dtype} {tuple(mask.shape)}, the weight has shape {shape}; use bool"
        )
    revived = 0 if weight is None else int(torch.count_nonzero(weight.detach()[~mask.to(weight.device)]))
    if revived:
        raise MaskStateError(
            f"{name}.weight has {revived} weights that its mask says are pruned: the mask is not that of the model"
        )
