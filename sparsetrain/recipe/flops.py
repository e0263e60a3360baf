"""FLOPs of one forward pass of one sample, dense and with pruned weights left out.

A weight used at ``p`` positions of a sample costs ``2 p`` floating-point operations (a multiply and an add). Counted are
Linear layers and convolutions, by one forward pass on the meta device (not attention's packed projections, nor recurrent
layers); what an unstructured mask saves on paper is no promise of speed.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsetrain.masks import MaskManager
from sparsetrain.structure.budget import positions


def uses(model: nn.Module, example: Any) -> dict[str, int]:
    """How often a forward pass of ``example``, on the meta device, uses each weight of Linear layers and convolutions."""
    # transformers looks into tensors to find a cheaper mask, which it knows fake ones do not allow.
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        return positions(model, lambda: model(**example) if isinstance(example, dict) else model(example))


def example_input(model: nn.Module, data: LightningDataModule | None) -> Any:
    """One sample on the meta device: the model's own example, the data's first, or a transformers model's dummy inputs."""
    given = getattr(model, "example_input_array", None)
    if isinstance(given, Tensor):
        return given[:1].to("meta")
    for attribute in ("test_set", "train_set"):
        dataset = getattr(data, attribute, None)
        if dataset is not None and len(dataset):
            first = dataset.__getitems__([0])
            if isinstance(first, dict):
                return {name: value.to("meta") for name, value in first.items() if name != "labels"}
            return first[0].to("meta")
    for module in model.modules():
        dummy = getattr(module, "dummy_inputs", None)
        if isinstance(dummy, dict) and all(isinstance(value, Tensor) for value in dummy.values()):
            return {name: value[:1].to("meta") for name, value in dummy.items()}
    return None


def flops(model: nn.Module, manager: MaskManager | None, data: LightningDataModule | None = None) -> dict[str, float] | None:
    """``{"dense": ..., "sparse": ...}`` for one sample, or None where no example input can be had or traced."""
    try:
        example = example_input(model, data)
        if example is None:
            return None
        shadow = model if next(model.parameters()).is_meta else _to_meta(model)
        shadow.eval()
        used = uses(shadow, example)
    except Exception:  # a model may do anything in forward; a count that cannot be had is no reason to fail a run
        return None
    weights = dict(shadow.named_parameters(remove_duplicate=False))
    alive: dict[str, float] = {}
    if manager is not None:
        counts = manager.counts()
        for tensor in manager:
            dead, numel = counts[tensor.name]
            alive |= dict.fromkeys((tensor.name, *tensor.target.aliases), 1 - dead / numel)
    dense = sparse = 0.0
    for name, count in used.items():
        cost = 2.0 * count * math.prod(weights[name].shape)
        dense += cost
        sparse += cost * alive.get(name, 1.0)
    return {"dense": dense, "sparse": sparse} if dense else None


def _to_meta(model: nn.Module) -> nn.Module:
    trainer = getattr(model, "_trainer", None)
    if trainer is not None:
        model._trainer = None  # type: ignore[assignment]
    try:
        return copy.deepcopy(model).to("meta")
    finally:
        if trainer is not None:
            model._trainer = trainer
