"""How a group penalty is applied inside a training step: after it by a proximal operator, or before it as a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.errors import RecipeError
from sparsetrain.penalties import (
    Part,
    Units,
    adam_steps,
    group_hoyer_square,
    group_lasso,
    group_soft_threshold,
    growing_l2,
    metric_group_soft_threshold,
    sparse_group_soft_threshold,
    unit_norms,
)
from sparsetrain.structure import CoupledGroup
from sparsetrain.structure.layers import find_layers

Kind = Literal["adaptive", "prox", "prox_metric", "subgradient", "ssl", "hoyer", "growing"]
Weights = Literal["cost", "size"]


@dataclass(frozen=True)
class Penalty:
    """Which penalty, and how it is applied.

    Args:
        kind: ``"adaptive"``: a proximal operator on the units that are next in line by importance for their cost, so strong
            that they reach zero when it is their turn; ``"prox"`` on all units; ``"prox_metric"`` (in the metric of Adam's
            steps). And terms of the loss, to compare, which alone make nothing exactly zero: ``"subgradient"`` of group lasso,
            ``"ssl"`` (rows and columns), ``"hoyer"`` (group Hoyer square), ``"growing"`` (an L2 that grows on those that go).
        strength: lambda, above 0, for all kinds but ``"adaptive"``; with a budget what it starts from, None: so that the middle
            unit, held by no gradient, would be gone when half of the span is over. ``"growing"``: delta.
        weights: w_u of group lasso: ``"cost"``, what the budget saves over the root of the unit's size; ``"size"``, the root of
            its size, as published. Which is the same where the budget counts what the unit has.
        every: apply it every so many steps, with as many times the threshold; 1 or more.
        l1: share of lambda for single entries (sparse group lasso), in [0, 1); with ``"prox"``.
        warmup: duration in which lambda rises from 0.

    Raises `RecipeError` for what is out of range. Example: ``Penalty("prox", strength=1e-3, weights="size")``.
    """

    kind: Kind = "adaptive"
    strength: float | None = None
    weights: Weights = "cost"
    every: int = 4
    l1: float = 0.0
    warmup: str = "0st"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.weights not in get_args(Weights):
            raise RecipeError(
                f"penalty kind={self.kind!r} weights={self.weights!r}; kinds are {', '.join(get_args(Kind))}, weights "
                f"{', '.join(get_args(Weights))}"
            )
        if self.strength is not None and not 0 < self.strength < math.inf:
            raise RecipeError(f"penalty strength={self.strength}: a positive number, such as 1e-3")
        if self.kind == "adaptive" and self.strength is not None:
            raise RecipeError("penalty 'adaptive' follows the budget and takes no strength; leave it out, or use kind 'prox'")
        if self.every < 1:
            raise RecipeError(f"penalty every={self.every}: at least 1 step")
        if not 0 <= self.l1 < 1 or (self.l1 and self.kind != "prox"):
            raise RecipeError(f"penalty l1={self.l1} with kind {self.kind!r}: a share in [0, 1), with kind 'prox' only")

    @property
    def after_step(self) -> bool:
        """Whether it is a proximal operator, which follows the optimizer's step."""
        return self.kind in ("adaptive", "prox", "prox_metric")


class Reading:
    """The units of a group as the penalty sees them: ``reads``, the weights that read them; ``writes``, those that make them.

    Every weight is read along one dimension, so that each is in one unit and the proximal operator of a group is exact.
    """

    def __init__(self, model: nn.Module, group: CoupledGroup) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        # By identity: a tied weight has several names, and may be read under another than it is cut.
        read = {(id(parameters[cut.name]), cut.dim) for layer in find_layers(model)[0] for cut in layer.reads}
        weights = [slot for slot in group.slots if not slot.buffer and parameters[slot.tensor].ndim > 1]
        self.reads = self._units(parameters, [slot for slot in weights if (id(parameters[slot.tensor]), slot.dim) in read])
        self.writes = self._units(parameters, [slot for slot in weights if (id(parameters[slot.tensor]), slot.dim) not in read])
        self.importance = torch.zeros(group.units)

    @staticmethod
    def _units(parameters: Mapping[str, nn.Parameter], slots: Sequence[Any]) -> Units | None:
        parts = tuple(Part(parameters[slot.tensor], slot.dim, slot.index) for slot in slots)
        return Units(parts) if parts else None

    @torch.no_grad()
    def watch(self, decay: float) -> None:
        """First-order Taylor importance ``(sum_i w_i dL/dw_i)^2`` of each unit, averaged (Molchanov et al. 2019, eq. 8)."""
        if self.reads is None:
            return
        total = torch.zeros_like(self.importance)
        for part in self.reads.parts:
            if part.tensor.grad is not None:
                total += (part.rows(part.tensor) * part.rows(part.tensor.grad)).sum(1).float().cpu()
        # With AMP a step whose gradients overflow is skipped, and so it is here.
        if bool(total.isfinite().all()):
            self.importance.mul_(decay).add_(total.square_(), alpha=1 - decay)

    def norms(self) -> Tensor:
        """``||W_u||`` over the weights that read unit u, float (units,)."""
        assert self.reads is not None
        with torch.no_grad():
            return unit_norms(self.reads).float().cpu()


def weights_of(kind: Weights, groups: Mapping[str, Reading], saved: Mapping[str, float]) -> dict[str, float]:
    """w_u of every group, as `Penalty` says. Example: ``weights_of("size", groups, saved)``."""
    sizes = {name: found.reads.size for name, found in groups.items() if found.reads is not None}
    if kind == "size":
        return {name: math.sqrt(size) for name, size in sizes.items()}
    # Costs in the unit of sizes, so that lambda means about the same.
    scale = sum(sizes.values()) / max(sum(saved[name] for name in sizes), 1e-12)
    return {name: scale * saved[name] / math.sqrt(size) for name, size in sizes.items()}


def first_strength(groups: Mapping[str, Reading], optimizers: Iterable[Optimizer], steps: int) -> float:
    """Lambda with which the middle unit, held by no gradient, is gone after half of so many steps."""
    settings = [group for optimizer in optimizers for group in optimizer.param_groups]
    rate = max(max(group["lr"], group.get("initial_lr", 0.0)) for group in settings)
    sizes = [r.norms() / math.sqrt(r.reads.size) for r in groups.values() if r.reads is not None]
    return 2 * float(torch.cat(sizes).median()) / (rate * steps) if rate else 1e-3


@torch.no_grad()
def shrink(penalty: Penalty, units: Units, optimizers: Iterable[Optimizer], strength: float, weights: Tensor | float) -> None:
    """Apply a proximal operator to one group, at the learning rate of the optimizer that trains it.

    ``"adaptive"`` has thresholds of its own, ``strength * weights``, whatever the learning rate.
    """
    optimizer, settings = trained_by(optimizers, units.parts[0].tensor, penalty)
    strength *= penalty.every
    if penalty.kind == "adaptive":
        group_soft_threshold(units, strength, weights)
    elif penalty.kind == "prox_metric":
        if any(not optimizer.state.get(part.tensor) for part in units.parts):
            return  # no step has been taken yet
        steps = [_adam_steps(optimizer, settings, part.tensor) for part in units.parts]
        metric_group_soft_threshold(units, steps, strength, weights)
    elif penalty.l1:
        rate = settings["lr"] * strength
        sparse_group_soft_threshold(units, penalty.l1 * rate, (1 - penalty.l1) * rate, weights)
    else:
        group_soft_threshold(units, settings["lr"] * strength, weights)


def add_gradient(
    penalty: Penalty, group: Reading, optimizer: Optimizer, strength: float, weights: Tensor | float, going: Tensor | None
) -> None:
    """Add the gradient of a penalty that is a term of the loss, to the parameters that this optimizer trains."""
    owned = {id(p) for settings in optimizer.param_groups for p in settings["params"]}
    for units in (group.reads, group.writes if penalty.kind == "ssl" else None):
        mine = [] if units is None else [p.tensor for p in units.parts if id(p.tensor) in owned and p.tensor.grad is not None]
        if units is None or not mine or (penalty.kind == "growing" and going is None):
            continue
        with torch.enable_grad():
            if penalty.kind == "growing":
                assert going is not None
                value = growing_l2(units, going)
            elif penalty.kind == "hoyer":
                value = group_hoyer_square(units)
            else:
                value = group_lasso(units, 1.0 if penalty.kind == "ssl" else weights)
        for tensor, gradient in zip(mine, torch.autograd.grad(value, mine), strict=True):
            tensor.grad.add_(gradient, alpha=1.0 if penalty.kind == "growing" else strength)  # type: ignore[union-attr]


def trained_by(optimizers: Iterable[Optimizer], parameter: Tensor, penalty: Penalty) -> tuple[Optimizer, dict[str, Any]]:
    """The optimizer that trains a parameter, and its settings of it; raises `RecipeError` for none, and none of Adam's kind."""
    for optimizer in optimizers:
        for settings in optimizer.param_groups:
            if parameter.requires_grad and any(p is parameter for p in settings["params"]):
                if penalty.kind == "prox_metric" and not {"betas", "eps"} <= settings.keys():
                    raise _not_adam(optimizer)
                return optimizer, settings
    raise RecipeError("a group has weights that no optimizer trains: leave it out (groups.exclude), or train them")


def _adam_steps(optimizer: Optimizer, settings: dict[str, Any], parameter: Tensor) -> Tensor:
    memory = optimizer.state[parameter]
    if "exp_avg_sq" not in memory:
        raise _not_adam(optimizer)
    return adam_steps(settings["lr"], memory["exp_avg_sq"], settings["betas"][1], int(memory["step"]), settings["eps"])


def _not_adam(optimizer: Optimizer) -> RecipeError:
    kind = type(optimizer).__name__
    return RecipeError(f"penalty 'prox_metric' is in the metric of Adam's steps, and {kind} has none; use kind 'prox'")
