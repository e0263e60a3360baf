"""Optimizer memory follows the mask: what an optimizer remembers of pruned and regrown entries.

Gradients of pruned entries are zero while a mask holds, so state that was once cleared stays clear under every optimizer
whose state is elementwise. What "clear" means is mostly zero; the exceptions are below.
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


def _entries(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    state = optimizer.state.get(parameter)
    if not state:
        return
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    for key, value in state.items():
        if isinstance(value, Tensor) and local(value).shape == local(parameter).shape and value.ndim:
            yield key, local(value), group


def forget(optimizer: Optimizer, parameter: Tensor, entries: Tensor) -> None:
    """Reset the state of the marked entries of a parameter to what it is for a parameter never stepped.

    ``entries`` is a local bool mask. LBFGS keeps flat histories over all parameters: it forgets them all.
    """
    if isinstance(optimizer, LBFGS):
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p is parameter for p in owned):
            optimizer.state.clear()
        return
    for key, value, group in _entries(optimizer, parameter):
        fresh = group.get(_FRESH[key], 0.0) if key in _FRESH else 0.0
        value.masked_fill_(entries, float(fresh))


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
