"""Proximal operators of group penalties: after the optimizer's step they shrink whole units, some to exactly zero.

``prox(x) = argmin_z 1/2 ||z - x||^2 + R(z)``, in place. All of them are non-expansive in their metric, and leave alone what is
in no unit. Which threshold belongs to which optimizer, for a penalty of strength lambda on the loss:

* SGD, with or without momentum: `group_soft_threshold` with ``lr * lambda`` (proximal gradient descent).
* Adam, decoupled, as weight decay is in AdamW: the same. Cheap; the strength means the same for every weight.
* Adam, as part of the loss: `metric_group_soft_threshold` with the step of every entry, from `adam_steps`.

Several groups that share entries (the rows and the columns of one weight): one after the other. Each call is the exact prox of
its own penalty; together they are a splitting, not the prox of the sum. To save time apply them every k steps, with k times
the threshold.

How it fails: a bfloat16 weight rounds away a relative shrinkage below 2^-9, so that large units stand still; keep master
weights in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrain.errors import TargetError
from sparsetrain.penalties.norms import Units, Weights, require_size, unit_norms, unit_weights, wide

#: Newton steps at most; a handful suffice unless the steps within a unit are many orders of magnitude apart.
NEWTON_STEPS = 100


@torch.no_grad()
def group_soft_threshold(units: Units, threshold: float, weights: Weights = None) -> Tensor:
    """``W_u <- W_u * (1 - threshold * w_u / ||W_u||_2)_+``, in place (Yuan & Lin 2006, eq. 2.4; Parikh & Boyd 2014, 6.5.4).

    Args:
        units: what is shrunk.
        threshold: step size times strength, at least 0; 0 changes nothing.
        weights: w_u, at least 0: (units,) or one for all; None: the square root of the number of entries in a unit.

    Returns bool (units,): the units that were not zero and now are. All their entries are +0.0.
    Raises `RecipeError` for a threshold or weight that is negative or not finite. A unit with NaN stays NaN.

    Example: with ``w = torch.tensor([[3.0, 4.0], [0.6, 0.8]])``, ``group_soft_threshold(Units((Part(w, 0),)), 2.0, 1.0)``
    returns ``[False, True]`` and leaves ``w = [[1.8, 2.4], [0.0, 0.0]]``.
    """
    limits = _limits(units, threshold, weights)
    if limits is None:
        return _none(units)
    return _shrink(units, limits)


@torch.no_grad()
def sparse_group_soft_threshold(units: Units, entries: float, groups: float, weights: Weights = None) -> Tensor:
    """Every entry by ``sign(x) (|x| - entries)_+``, then every unit as `group_soft_threshold` does, in place.

    In this order it is the prox of ``entries * ||W||_1 + groups * sum_u w_u ||W_u||_2`` (Friedman et al. 2010, arXiv 1001.0736;
    Simon et al. 2013). Simon et al. set ``entries = alpha t`` and ``groups = (1 - alpha) t``.

    Args:
        units: what is shrunk.
        entries: threshold of each entry, at least 0.
        groups: threshold of each unit, at least 0.
        weights: w_u as for `group_soft_threshold`.

    Returns bool (units,): the units that were not zero and now are.
    Raises `RecipeError` as `group_soft_threshold` does.

    Example: ``sparse_group_soft_threshold(units, entries=0.1 * lr, groups=0.9 * lr)``.
    """
    require_size("threshold of entries", entries)
    limits = _limits(units, groups, weights)
    if not entries:
        return _none(units) if limits is None else _shrink(units, limits)
    alive = unit_norms(units) > 0
    for part in units.parts:
        tensor = part.slices()
        if part.start < 0:
            bound = part.spread(tensor.new_full((units.count,), entries), 0.0)
            tensor.sub_(tensor.clamp(-bound, bound))
        else:
            tensor.sub_(tensor.clamp(-entries, entries))  # x - x = +0.0
    if limits is not None:
        _shrink(units, limits)
    return alive & (unit_norms(units) == 0)


@torch.no_grad()
def metric_group_soft_threshold(units: Units, steps: Sequence[Tensor], strength: float, weights: Weights = None) -> Tensor:
    """The prox of ``strength * sum_u w_u ||W_u||_2`` in the metric of an optimizer with a step of its own for every entry.

    Per unit ``argmin_z 1/2 sum_i (z_i - x_i)^2 / s_i + l ||z||_2`` with ``l = strength * w_u``, in place. It is zero where
    ``||x / s||_2 <= l``; else, by setting the gradient to zero, ``z_i = x_i n / (n + l s_i)``, where the norm ``n`` of z is the
    only root of ``sum_i x_i^2 / (n + l s_i)^2 = 1``. (Becker & Fadili 2012, arXiv 1206.1156: one root per unit; Deleu & Bengio
    2021, arXiv 2102.03869, for Adam; with equal steps it is `group_soft_threshold` with ``s l``.)

    ``phi^(-1/2)``, phi being that sum, is concave and increases, so Newton's method never overshoots from the left of the root;
    it starts at ``||x|| - l sum(x^2 s) / sum(x^2)`` (Jensen: phi is at least what the mean step gives).

    Args:
        units: what is shrunk.
        steps: a tensor per part, of the shape of its tensor or broadcast to it: the step of each entry, above 0.
        strength: lambda, without a learning rate (the steps have it), at least 0.
        weights: w_u as for `group_soft_threshold`.

    Returns bool (units,): the units that were not zero and now are; one whose norm would be below the rounding of x is zero.
    Works on copies of the units, about eight at once, and takes some forty times as long as `group_soft_threshold`.
    Raises `RecipeError` as that does, and `TargetError` for steps that do not fit.

    Example: ``metric_group_soft_threshold(units, [adam_steps(lr, v, 0.999, step) for v in moments], 1e-3)``.
    """
    limits = _limits(units, strength, weights)
    if len(steps) != len(units.parts):
        raise TargetError(f"{len(steps)} tensors of steps for {len(units.parts)} parts; give one for each part, in order")
    if limits is None:
        return _none(units)
    rows, paces = [], []
    for part, step in zip(units.parts, steps, strict=True):
        try:
            every = step.expand_as(part.tensor)
        except RuntimeError:
            shape = tuple(part.tensor.shape)
            raise TargetError(f"steps of shape {tuple(step.shape)} do not fit a tensor of shape {shape}") from None
        dtype = wide(part.tensor.dtype)
        rows.append(part.rows(part.tensor).to(dtype))
        paces.append(part.rows(every).to(dtype))
    x, s = torch.cat(rows, 1), torch.cat(paces, 1)
    largest = x.abs().amax(1, keepdim=True)
    limit = limits[:, None] if isinstance(limits, Tensor) else limits
    scale = torch.where(largest == 0, 1.0, largest)
    ratio = _root_ratio(x / scale, s * limit / scale)
    z = torch.where(ratio == 0, 0.0, x * ratio)  # no -0.0
    for part, own in zip(units.parts, torch.split(z, [row.shape[1] for row in rows], 1), strict=True):
        part.put(own)
    return (largest[:, 0] > 0) & (z == 0).all(1)


def adam_steps(lr: float, second_moment: Tensor, beta2: float, step: int, eps: float = 1e-8) -> Tensor:
    """The step of each entry in Adam, ``lr / (sqrt(v / (1 - beta2^step)) + eps)`` (Kingma & Ba 2015, algorithm 1).

    Args:
        lr: learning rate, above 0.
        second_moment: v, the state ``exp_avg_sq`` after ``step`` steps.
        beta2: decay of v, in [0, 1).
        step: steps made so far, at least 1.
        eps: as given to the optimizer.

    Example: ``adam_steps(1e-3, state["exp_avg_sq"], 0.999, int(state["step"]))``.
    """
    return lr / ((second_moment / (1 - beta2**step)).sqrt_() + eps)


def _shrink(units: Units, limits: float | Tensor) -> Tensor:
    """Scale every unit by ``1 - limit / norm``, where that is positive, else by 0."""
    norms = unit_norms(units)
    info = torch.finfo(norms.dtype)
    # A unit at or below its limit gets (l - l) / l, exactly 0. The bounds keep 0 / 0 and inf / inf out.
    if isinstance(limits, Tensor):
        limits = limits.to(norms.dtype).clamp(max=info.max)
        bounded = norms.maximum(limits).clamp_(info.tiny, info.max)
    else:
        limits = min(limits, info.max)
        bounded = norms.clamp(max(limits, info.tiny), info.max)
    factors = (bounded - limits).div_(bounded)
    none = float(factors.min()) > 0  # not so with NaN either
    for part in units.parts:
        tensor = part.slices().mul_(part.spread(factors, 1.0))
        if not none:
            tensor.add_(0.0)  # -0.0 + 0.0 = +0.0
    return _none(units) if none else (factors == 0).logical_and_(norms > 0)


def _root_ratio(x: Tensor, a: Tensor) -> Tensor:
    """``n / (n + a)`` (units, entries), n the root of ``sum x^2 / (n + a)^2 = 1`` of each row, 0 if there is none above 0.

    ``x``: rows with a largest magnitude of 1 (or 0), so that nothing overflows; ``a`` = limit times step on the same scale.
    """
    info = torch.finfo(x.dtype)
    a = a.clamp(info.tiny, info.max)
    norm2 = x.square().sum(1, keepdim=True)
    mean = (x.square() * a).sum(1, keepdim=True) / norm2.clamp_min(1.0)
    # Three bounds from below; by the second each |x| / (n + a) is at most 1.
    n = torch.maximum(norm2.sqrt() - mean, (x.abs() - a).amax(1, keepdim=True)).clamp_min_(0)
    for _ in range(NEWTON_STEPS):
        below = n + a
        p2 = (x / below).square_()
        phi = p2.sum(1, keepdim=True)
        slope = (p2 / below).sum(1, keepdim=True).clamp_min_(info.tiny)
        new = (n + phi * (phi.sqrt() - 1) / slope).clamp_min_(0)
        # Sums round too: what is this close is done after this last step. A row of NaN never gets closer.
        going = ((new - n).abs() > 4 * info.eps * new) & ((phi - 1).abs() > 16 * info.eps)
        n = new
        if not bool(going.any()):
            break
    n = torch.where(n <= 4 * info.eps * norm2.sqrt(), 0.0, n)
    return n / (n + a)


def _limits(units: Units, threshold: float, weights: Weights) -> float | Tensor | None:
    """Threshold times weight: one for all, or one a unit; None if all is zero."""
    require_size("threshold", threshold)
    weight = unit_weights(units, weights)
    if isinstance(weight, Tensor):
        return weight * threshold if threshold else None
    return threshold * weight or None


def _none(units: Units) -> Tensor:
    return torch.zeros(units.count, dtype=torch.bool, device=units.parts[0].tensor.device)
