"""Fine-tune a pruned model with LoRA, and merge without losing a zero.

When to use it: the model was pruned (zeros in the checkpoint), memory or time does not allow to fine-tune all weights, and the
result is to be an ordinary sparse model. Otherwise `KeepMasks` recovers more. Needs the package peft (``sparsetrain[lora]``).

What it does: the zeros of the targets become masks, checked against the declared pattern; everything is frozen; each target
gets PEFT's adapter, its product masked: ``W + m * (s * B A)`` with ``s = alpha / rank`` (Hu et al. 2021, arXiv 2106.09685;
masked as in SPP, Lu et al. 2024, arXiv 2405.16057, and LoRS, Hu et al. 2025, arXiv 2501.08582). A plain LoRA's product is
dense, so that merging it fills the zeros. When training ends the adapters are merged, verified and taken out.

Knobs: ``rank`` and ``alpha``; a learning rate ten times that of full fine-tuning; in ``config`` what else PEFT's ``LoraConfig``
has (``lora_dropout``, ``use_rslora``, ``target_modules``, ``modules_to_save``: a head that trains in full).

Combines with: any optimizer, AMP, accumulation, clipping, DDP, `Distillation`. Models sharded over ranks and averaged weights
(EMA, SWA) are refused. A quantized base is never looked at: give its masks as a file (``masks``), with ``merge=False``.

How it fails: a model without zeros, zeros of another pattern, and layers that are no Linear or Conv1D are refused by name.
Checkpoints written during training hold the adapters (resume from those); only what is saved after it is merged. To end with
the best of them instead of the last: ``merge=False``, then ``trainer.validate(ckpt_path="best")``, then ``adapters.merge()``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsetrain.callbacks.base import SparsityCallback, averaged_copies
from sparsetrain.errors import MaskStateError, PatternError, RecipeError
from sparsetrain.masks import MaskManager, Override
from sparsetrain.masks.state import read_masks, to_state
from sparsetrain.masks.verification import adopt_zeros, free_zeros
from sparsetrain.nn import require_peft
from sparsetrain.patterns import Pattern, parse_pattern
from sparsetrain.targets import Targets

if TYPE_CHECKING:
    from peft import LoraConfig

    from sparsetrain.nn.adapters import Adapters


class SparseLoRA(SparsityCallback):
    """Train masked LoRA adapters on the targets, then merge them.

    Args:
        rank: of the adapters, 1 or more.
        alpha: scale; the product counts ``alpha / rank`` (with ``use_rslora`` ``alpha / sqrt(rank)``).
        pattern: what the zeros are meant to be.
        targets: which tensors get adapters; see `Targets`. One without zeros gets an ordinary adapter.
        overrides: another pattern by regular expression of names.
        merge: when training ends; False leaves the adapters in the model, to be saved (``adapters.save``).
        masks: ``masks.safetensors`` of the model before it was quantized; only for quantized models.
        config: further fields of PEFT's ``LoraConfig``.

    ``adapters`` has them while they are there. Raises `RecipeError`, `TargetError` or `PatternError` when it is set up on a
    model that cannot do what is asked, before anything is changed.

    Example: ``Trainer(callbacks=[SparseLoRA(rank=16, pattern="2:4", config={"lora_dropout": 0.05})])``.
    """

    adapters: Adapters | None = None

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16,
        pattern: Pattern | str = "unstructured",
        targets: Targets | None = None,
        overrides: dict[str, Override] | None = None,
        merge: bool = True,
        masks: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.merge = rank, alpha, merge
        self.pattern = parse_pattern(pattern)
        self.targets = targets or Targets()
        self.overrides = overrides or {}
        self.masks_file = None if masks is None else Path(masks)
        self.config = _config(rank, alpha, config or {})
        self._facts: dict[str, Any] = {}
        self._guard: RemovableHandle | None = None

    # -- building ---------------------------------------------------------------------------------------------------------

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager for the targets, still dense; for a quantized model one for its masks alone."""
        if self.masks_file is None:
            return MaskManager(model, self.targets, self.pattern, self.overrides)
        from sparsetrain.nn.lora import plain_weight

        saved = read_masks(self.masks_file)
        layers = {n: m for n, m in model.named_modules() if f"{n}.weight" in saved}
        ordinary = [name for name, layer in layers.items() if plain_weight(layer) is not None]
        if ordinary:
            raise RecipeError(
                f"masks={str(self.masks_file)!r}, but {ordinary[0]} has ordinary weights, whose zeros are the masks; leave "
                "masks out"
            )
        found = {name: saved[name] for name in saved if name.removesuffix(".weight") in layers}
        if not found:
            raise MaskStateError(f"{self.masks_file} has no mask of this model: its first is of {next(iter(saved), 'nothing')}")
        targets = Targets(self.targets.include or (r"\.?weight$",), self.targets.exclude)
        root = _stand_ins({name: mask.unpack(name) for name, mask in found.items()})
        manager = MaskManager(root, targets, self.pattern, self.overrides)
        manager.load_state_dict(to_state({t.name: found[t.name] for t in manager}), str(self.masks_file))
        return manager

    def validate(self) -> None:
        """Every target can carry an adapter and a mask."""
        if self.adapters is None and self.masks_file is None:
            from sparsetrain.nn.choice import choose_layers
            from sparsetrain.nn.lora import plain_weight

            strange = [t.name for t in self.masks if plain_weight(t.target.module) is None and t.name.endswith(".weight")]
            if strange:
                raise RecipeError(
                    f"{strange[0]} is no ordinary floating-point weight (it is quantized or packed), so that its zeros cannot "
                    "be read; give masks= (masks.safetensors of the model before quantization) and merge=False"
                )
            choose_layers(self.masks.model, [t.name for t in self.masks], self.config)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adopt the zeros and put the adapters in, before the optimizer is made and a checkpoint is loaded."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise RecipeError(
                f"strategy {type(trainer.strategy).__name__} shards or moves weights, which SparseLoRA does not follow; use "
                "one device or ddp"
            )
        if self.adapters is not None and self.adapters.model is not pl_module:
            self.adapters = None
        super().setup(trainer, pl_module, stage)
        if self.adapters is not None:
            return
        if self.masks_file is not None and self.merge:
            raise RecipeError(
                "the model is quantized, and merging would round the weights and could move their zeros; set merge=False and "
                "save the adapter (adapters.save), or merge it into the model before quantization"
            )
        if not self.masks.masks:
            # A model that is about to load a checkpoint has no zeros yet.
            self.masks.unclaimed = adopt_zeros(self.masks)
        for name, share in free_zeros(self.masks).items() if self.masks_file is None else ():
            if name in self.masks.tensors:
                why = self.masks.unclaimed.get(name, "it was pruned further after its mask was made")
                warnings.warn(
                    f"{share:.0%} of {name} are zeros that no mask keeps, and adapters fill them ({why})", stacklevel=2
                )
        from sparsetrain.nn.adapters import Adapters

        self.adapters = Adapters(pl_module, self._by_name(), self.config)
        self._guard = pl_module.register_load_state_dict_pre_hook(_refuse_merged)  # type: ignore[no-untyped-call]

    def _by_name(self) -> dict[str, Tensor | None]:
        return {tensor.name: tensor.mask for tensor in self.masks}

    # -- running ----------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse averaged copies: they were made of layers that knew no masks."""
        if averaged_copies(trainer):
            self._take_out()
            raise RecipeError(
                "an averaged copy of the weights (EMA, SWA) would average A and B, not their product, and knows no masks; "
                "leave the averaging callback out, or fine-tune all weights with KeepMasks"
            )
        super().on_train_start(trainer, pl_module)

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """The masks are known now, also those of a checkpoint."""
        adapters = self._require()
        if not self.masks.masks:
            self._take_out()
            raise PatternError("the model has no zeros to keep: no target holds any; is this the pruned checkpoint?")
        adapters.set_masks(self._by_name())
        self._facts = adapters.facts()
        # Frozen weights move in no step; the merge proves it.
        self.masks.detach()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge and take the adapters out. Raises `PatternError` where a zero would be lost, writing nothing."""
        super().on_fit_end(trainer, pl_module)
        idle = self._require().idle()
        if 0 < len(idle) < len(self._require().layers):
            warnings.warn(
                f"the adapter of {idle[0]} and {len(idle) - 1} others never moved: no batch used the layer (an expert that was "
                "not chosen), or something reads its weight without calling it; exclude these (targets.exclude)",
                stacklevel=2,
            )
        if self.merge:
            self._require().merge()
            self._take_out()
            self.verification = self.masks.verify(strict=True)

    def facts(self) -> dict[str, Any]:
        """Rank, number of adapters, trainable parameters and their share of the model's."""
        return self._facts and self._facts | {"merged": self.adapters is None}

    def _require(self) -> Adapters:
        if self.adapters is None:
            raise PatternError("SparseLoRA has no adapters in the model: they exist from the start of trainer.fit to its end")
        return self.adapters

    def _take_out(self) -> None:
        self._require().remove()
        self.adapters = None
        if self._guard is not None:
            self._guard.remove()
            self._guard = None


def _config(rank: int, alpha: float, further: dict[str, Any]) -> LoraConfig:
    require_peft()
    from peft import LoraConfig

    own = {"r": "rank", "lora_alpha": "alpha"}
    twice = [key for key in further if key in own]
    if twice:
        raise RecipeError(f"config has {twice[0]!r}; say {own[twice[0]]}={further[twice[0]]!r} instead")
    if rank < 1 or alpha <= 0:
        raise RecipeError(f"rank={rank}, alpha={alpha}: the rank is 1 or more, alpha above 0")
    try:
        return LoraConfig(r=rank, lora_alpha=alpha, **further)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise RecipeError(f"config {further!r} is none for PEFT's LoraConfig: {error}") from error


def _refuse_merged(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    if not any(".lora_A." in name for name in state_dict):
        raise MaskStateError(
            "the checkpoint holds no adapters: it was written before they were put in, or after they were merged; resume from "
            "one that was written during training (last.ckpt), or start a new run from its weights (init_from)"
        )


def _stand_ins(masks: Mapping[str, Tensor]) -> nn.Module:
    """Layers by the names of quantized ones, with the mask for a weight: what a `MaskManager` can hold masks of."""
    root = nn.Module()
    for name, mask in masks.items():
        parent = root
        *path, leaf = name.removesuffix(".weight").split(".")
        for part in path:
            parent.add_module(part, parent._modules.get(part) or nn.Module())
            parent = parent.get_submodule(part)
        layer = nn.Linear(1, 1, bias=False, device="meta")
        layer.weight = nn.Parameter(mask.to(torch.uint8), requires_grad=False)
        parent.add_module(leaf, layer)
    return root
