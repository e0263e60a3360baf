"""Erasing pruned entries: multiplying the bits of a tensor by 0 or 1.

Multiplying values would turn -1.0 into -0.0 (which is not what a resumed run starts from, bit for bit) and leave NaN and
infinity standing; multiplying bits gives +0.0 whatever was there. Filling by a bool mask does too, at ten times the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_like(mask: Tensor, values: Tensor) -> Tensor:
    """A bool mask as integers as wide as the values: to be made once where several tensors are to be erased."""
    return mask.view(torch.uint8).to(_BITS[values.element_size()])


def erase(values: Tensor, mask: Tensor) -> None:
    """Make every entry whose mask is 0 exactly +0.0, in place; the mask is bool or integer.

    Example: ``erase(torch.tensor([-1.0, float("nan")]), torch.tensor([False, False]))`` leaves two zeros.
    """
    values.view(_BITS[values.element_size()]).mul_(mask.view(torch.uint8) if mask.dtype == torch.bool else mask)
