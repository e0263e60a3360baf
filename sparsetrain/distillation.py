"""Distillation: losses that pull a student towards a teacher, and where in a network they are measured. Pure torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.errors import TargetError


def logits_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over positions (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student: logits (..., classes).
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T, above 0; the factor T^2 keeps the size of the gradient.
        keep: bool of the leading shape; False leaves a position out. None keeps all. With none kept the loss is 0.

    Computed in float32 at least. Example: ``logits_loss(student(x), teacher(x), temperature=2.0)``.
    """
    _require_same(student, teacher, "logits")
    student, teacher = _rows(student, keep), _rows(teacher.detach(), keep)
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    summed = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return summed * (temperature**2 / max(student.shape[0], 1))


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
    """SquareHead: ``sum over layers of MSE(f_t, f_s) / MSE(f_t, 0)`` (Kurtic et al. 2023, arXiv 2310.06927, section 3).

    Args:
        student: hidden states of each layer, (..., features).
        teacher: those of the teacher, of the same shapes; no gradient flows into them.
        keep: bool, of the shape of a state without its features; False leaves a position out.

    Computed in float32 at least. Example: ``hidden_loss([h1, h2], [t1, t2])``.
    """
    total = student[0].new_zeros((), dtype=torch.promote_types(student[0].dtype, torch.float32))
    for one, other in zip(student, teacher, strict=True):
        _require_same(one, other, "hidden states")
        mine, target = _rows(one, keep), _rows(other.detach(), keep)
        # Both means are over as many numbers. A teacher that is zero throughout has no size to measure by.
        size = target.square().sum().clamp_min(torch.finfo(target.dtype).tiny)
        total = total + (mine - target).square().sum() / size
    return total


def _rows(values: Tensor, keep: Tensor | None) -> Tensor:
    rows = values.to(torch.promote_types(values.dtype, torch.float32)).reshape(-1, values.shape[-1])
    return rows if keep is None else rows[keep.reshape(-1)]


def _require_same(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise TargetError(
            f"the student's {what} have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: distillation "
            "compares them number by number; use a teacher of the same architecture (hidden=0 compares logits alone)"
        )


def find_layers(network: nn.Module) -> list[str]:
    """The blocks of a network: the members of its longest ModuleList or Sequential of modules of one class, in order.

    A list inside a block (the experts of a layer) does not count, however long it is.

    Raises `TargetError` if there is none of two or more. Example: ``find_layers(gpt2)`` is ``["transformer.h.0", ...]``.
    """
    lists: dict[str, list[str]] = {}
    for name, container in network.named_modules():
        children = list(container.named_children())
        alike = len({type(child) for _, child in children}) == 1 and any(True for _ in children[0][1].children())
        inside = any(f"{name}.".startswith(f"{block}.") for blocks in lists.values() for block in blocks)
        if isinstance(container, nn.ModuleList | nn.Sequential) and alike and len(children) > 1 and not inside:
            lists[name] = [f"{name}.{key}" if name else key for key, _ in children]
    found = max(lists.values(), key=len, default=[])
    if not found:
        raise TargetError(
            f"{type(network).__name__} has no list of like blocks to compare hidden states of; name them (layers), or hidden=0"
        )
    return found


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returns: the tensor itself, ``.logits`` or ``["logits"]``, or the first tensor of a tuple
    that has classes. Raises `TargetError` if there are none. Example: ``logits_of(gpt2(input_ids=tokens))``.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, tuple | list):
        found = next((v for v in found if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1), None)
    if not isinstance(found, Tensor):
        raise TargetError(
            f"the network returns a {type(output).__name__} without logits; distill hidden states alone (weight=0)"
        )
    return found


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or the first of a tuple. Raises `TargetError` if there are none."""
    found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor):
        raise TargetError(f"a block returns a {type(output).__name__} without hidden states; name other layers, or hidden=0")
    return found


def kept(seen: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """Which positions count, by what the network was given: ``attention_mask`` 0 and ``labels`` -100 do not.

    ``shape``: that of the positions, without features. Anything of another shape says nothing about positions.

    Example: ``kept({"labels": labels}, labels.shape)``.
    """
    keep: Tensor | None = None
    for name, padding in (("attention_mask", 0), ("labels", -100)):
        value = seen.get(name)
        if isinstance(value, Tensor) and value.shape == shape and value.ndim > 1:
            counts = value != padding
            keep = counts if keep is None else keep & counts
    return keep
