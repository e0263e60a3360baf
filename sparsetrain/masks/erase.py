"""Erasing pruned entries: multiplying the bits of a tensor by 0 or 1.

Multiplying values would turn -1.0 into -0.0 (which is not what a resumed run starts from, bit for bit) and leave NaN and
infinity standing; multiplying bits gives +0.0 whatever was there. Filling by a bool mask does too, at ten times the time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


#: Entries erased at a time: their widened mask (4 MiB for float32) stays in the cache.
CHUNK = 1 << 20


class Eraser:
    """Erases the same entries of several tensors at once, through one small buffer that is kept: making one anew for every
    tensor and step costs more than the multiplications.

    Example: ``Eraser()([weight, momentum], mask)``.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, tensors: Sequence[Tensor], mask: Tensor) -> None:
        """Make every entry whose mask is False exactly +0.0 in all of the tensors, in place."""
        together = [t for t in tensors if t.is_contiguous() and mask.is_contiguous()]
        for size in {t.element_size() for t in together}:
            self._erase(
                [t.view(-1).view(_BITS[size]) for t in together if t.element_size() == size], mask.view(-1), _BITS[size]
            )
        for tensor in tensors:
            if not any(tensor is done for done in together):
                erase(tensor, mask)

    def _erase(self, tensors: Sequence[Tensor], mask: Tensor, dtype: torch.dtype) -> None:
        length = min(CHUNK, mask.numel())
        buffer = self._buffers.get((dtype, mask.device))
        if buffer is None or buffer.numel() < length:
            buffer = self._buffers[dtype, mask.device] = torch.empty(length, dtype=dtype, device=mask.device)
        for start in reversed(range(0, mask.numel(), CHUNK)):  # of a tensor that has become shorter nothing is touched
            part = mask[start : start + CHUNK].view(torch.uint8)
            bits = buffer[: part.numel()].copy_(part)
            for tensor in tensors:
                tensor[start : start + CHUNK].mul_(bits)


def erase(values: Tensor, mask: Tensor) -> None:
    """Make every entry whose mask is False exactly +0.0, in place.

    Example: ``erase(torch.tensor([-1.0, float("nan")]), torch.tensor([False, False]))`` leaves two zeros.
    """
    values.view(_BITS[values.element_size()]).mul_(mask.view(torch.uint8))
