"""The noise of a model's weights while it trains: put into the layers, learned beside them, read, taken out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from sparsetrain.criteria import Criterion
from sparsetrain.errors import RecipeError
from sparsetrain.masks import MaskedTensor
from sparsetrain.nn.variational import WeightNoise, make_plain, make_variational
from sparsetrain.penalties import add_kl_gradient, log_alpha

#: Steps for which a look at the slope of the divergence, and at what is past the threshold, serves.
EVERY = 8


@dataclass(frozen=True)
class Noise:
    """How the noise of weights begins and learns.

    Args:
        log_sigma2: what it starts from; -10 for weights that start random, -10 to -15 for trained ones.
        lr: learning rate of log sigma^2, by Adam, where the optimizer's is at its first value; follows the same schedule.
        clamp: the divergence counts as constant where ``|log alpha|`` is larger, above the threshold.
        clip: weights past the threshold are zero in training too.

    Raises `RecipeError` for a rate or clamp that is not above 0. Example: ``Noise(lr=3e-3)``.
    """

    log_sigma2: float = -10.0
    lr: float = 1e-3
    clamp: float = 8.0
    clip: bool = True

    def __post_init__(self) -> None:
        wrong = [f"{name}={value}" for name, value in (("lr", self.lr), ("clamp", self.clamp)) if not 0 < value < math.inf]
        if wrong or not math.isfinite(self.log_sigma2):
            raise RecipeError(
                f"noise {', '.join(wrong) or f'log_sigma2={self.log_sigma2}'}: lr and clamp are above 0, all finite"
            )


class Certainty(Criterion):
    """The higher, the less of a weight is noise. Example: ``prune(manager, 0.9, criterion=noisy.certainty)``."""

    def __init__(self, layers: Mapping[str, WeightNoise]) -> None:
        self.layers = layers

    def score(self, weight: Tensor, *, name: str, step: int) -> Tensor:
        """Minus log alpha."""
        return -log_alpha(weight, self.layers[name].log_sigma2.detach())


class NoisyWeights:
    """Noise in the layers of some tensors, and Adam for it.

    Args:
        tensors: whose layers get it; pruned weights have none.
        settings: how it begins and learns.
        threshold: of log alpha.
        saved: what `state` gave.

    Example: see `VariationalDropout`.
    """

    def __init__(
        self, tensors: list[MaskedTensor], settings: Noise, threshold: float, saved: Mapping[str, Any] | None = None
    ) -> None:
        self.tensors, self.settings = tensors, settings
        self.layers: dict[str, WeightNoise] = {}
        for tensor in tensors:
            weight = tensor.target.parameter.detach()
            start = torch.full_like(weight, settings.log_sigma2, dtype=torch.promote_types(weight.dtype, torch.float32))
            if tensor.mask is not None:
                start.masked_fill_(~tensor.mask, -math.inf)
            if saved:
                start = saved["log_sigma2"][tensor.name].to(start, copy=True)
            noise = WeightNoise(start.requires_grad_(), threshold, settings.clamp, settings.clip)
            noise.refresh(weight)
            self.layers[tensor.name] = noise
        self.adam = Adam([noise.log_sigma2 for noise in self.layers.values()], lr=settings.lr, fused=True)
        self.taken = 0
        if saved:
            self.adam.load_state_dict(saved["adam"])
            self.taken = saved["taken"]
            for name, noise in self.layers.items():
                noise.alive.copy_(saved["alive"][name])
                noise.slope.copy_(saved["slope"][name])
        self.certainty = Certainty(self.layers)
        for tensor in tensors:
            make_variational(tensor.target.module, self.layers[tensor.name])

    def gradients(self, owned: Collection[int], strength: float, scale: float, share: Callable[[Tensor], Tensor]) -> None:
        """Add the divergence's gradient to that of weights and noise.

        Args:
            owned: ids of the parameters about to step.
            strength: the weight of the divergence in the loss.
            scale: what the gradients of the noise still are multiplied by.
            share: makes the mean over ranks of a gradient.
        """
        for tensor in self.tensors:
            weight, noise = tensor.target.parameter, self.layers[tensor.name]
            value = noise.log_sigma2
            if id(weight) not in owned or weight.grad is None or value.grad is None:
                continue
            if scale != 1:
                value.grad /= scale
            value.grad = share(value.grad)
            if strength:
                _, sigma2 = noise.ready(weight)
                add_kl_gradient(weight.detach(), sigma2, noise.slope, strength, weight.grad, value.grad)

    def step(self, factor: float) -> None:
        """Adam's step, with the learning rate times ``factor``."""
        for group in self.adam.param_groups:
            group["lr"] = self.settings.lr * factor
        self.adam.step()
        self.taken += 1
        for tensor in self.tensors:
            noise = self.layers[tensor.name]
            if self.taken % EVERY:
                noise.forget()
            else:
                noise.refresh(tensor.target.parameter.detach())

    def idle(self) -> list[str]:
        """Tensors whose noise has no gradient: their layers were not called."""
        return [name for name, noise in self.layers.items() if noise.log_sigma2.grad is None]

    @torch.no_grad()
    def alive(self) -> dict[str, Tensor]:
        """Tensor name -> bool, of the weight's shape: not pruned, and log alpha below the threshold."""
        found = {}
        for tensor in self.tensors:
            alive = self.layers[tensor.name].is_alive(tensor.target.parameter)
            found[tensor.name] = alive if tensor.mask is None else alive & tensor.mask
        return found

    def remove(self) -> None:
        """Layers are plain again; weights stay as they are."""
        for tensor in self.tensors:
            make_plain(tensor.target.module)

    def state(self) -> dict[str, Any]:
        """What must be remembered."""
        return {
            "log_sigma2": {name: noise.log_sigma2.detach() for name, noise in self.layers.items()},
            "alive": {name: noise.alive.bool() for name, noise in self.layers.items()},
            "slope": {name: noise.slope for name, noise in self.layers.items()},
            "taken": self.taken,
            "adam": self.adam.state_dict(),
        }
