"""Optimizer memory follows the mask: what an optimizer remembers of pruned and regrown entries.

Two ways keep the memory of pruned entries clear. Masked gradients never let anything in; that is right for every optimizer,
and needed where one entry's update depends on the others' gradients. Where it does not (``ELEMENTWISE``), multiplying the
state by the mask after the step does the same to every weight that is alive, bit for bit, and is much faster on CPU: a
second moment of exactly 0.0 sends the square root of Adam-type optimizers through a path of MKL that is ten times slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from sparsetrain.masks.sharding import local

#: State that does not start at zero: its key, and the setting of the parameter group it starts from.
_FRESH = {"step_size": "lr", "sum": "initial_accumulator_value"}
#: State that a zero gradient moves off zero, by design: Adamax takes max(|g|, eps).
_UNCHECKED = frozenset({"exp_inf", *_FRESH})


#: Optimizers whose update of an entry depends on that entry's gradient and state alone, all state starting at zero.
ELEMENTWISE = frozenset({"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta", "ASGD"})


def needs_masked_gradients(optimizer: Optimizer) -> bool:
    """Whether an optimizer must not see gradients of pruned entries: all but those of torch known to be elementwise."""
    kind = type(optimizer)
    return not (kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE)


def per_weight_state(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """Every state tensor that has one entry a weight (this rank's part)."""
    shape = local(parameter).shape
    state = [local(value) for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor) and value.ndim]
    return [value for value in state if value.shape == shape]


def _entries(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    state = optimizer.state.get(parameter)
    if not state:
        return
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    for key, value in state.items():
        if isinstance(value, Tensor) and local(value).shape == local(parameter).shape and value.ndim:
            yield key, local(value), group


def forget(optimizer: Optimizer, parameter: Tensor, entries: Tensor, dead: Tensor) -> None:
    """Reset the state of the marked entries of a parameter to what it is for a parameter never stepped.

    ``entries`` and ``dead`` (what the mask prunes now) are local bool masks. LBFGS keeps flat histories over all parameters:
    it forgets them all. Adafactor keeps a value a row and a column: those that are pruned whole are forgotten.
    """
    if not bool(entries.any()):
        return
    if isinstance(optimizer, LBFGS):
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p is parameter for p in owned):
            optimizer.state.clear()
        return
    for key, value, group in _entries(optimizer, parameter):
        fresh = group.get(_FRESH[key], 0.0) if key in _FRESH else 0.0
        value.masked_fill_(entries, float(fresh))
    factors = optimizer.state.get(parameter, {})
    for key, dim in (("row_var", -1), ("col_var", -2)):
        if isinstance(factors.get(key), Tensor) and dead.ndim > 1:
            whole = (entries & dead).any(dim, keepdim=True) & dead.all(dim, keepdim=True)
            local(factors[key]).masked_fill_(whole, 0.0)


def remembered(optimizer: Optimizer, parameter: Tensor, dead: Tensor) -> list[str]:
    """Name the state entries that still remember something of pruned weights; empty when memory follows the mask."""
    found = []
    for key, value, _ in _entries(optimizer, parameter):
        if key in _UNCHECKED or value.dtype == torch.bool:
            continue
        stale = int(torch.count_nonzero(value[dead]))
        if stale:
            found.append(f"{stale} pruned entries of optimizer state {key!r} are not zero")
    return found
