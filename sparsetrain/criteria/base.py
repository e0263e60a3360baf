"""What every criterion is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Criterion(ABC):
    """Scores each weight of a tensor; higher = more important. A subclass needs `score`.

    ``elementwise``: the score of a weight depends on that weight alone, so a shard of the tensor can be scored by itself.
    Set it to False where it does not, and the whole tensor is given.
    """

    elementwise: ClassVar[bool] = True

    @abstractmethod
    def score(self, weight: Tensor, *, name: str, step: int) -> Tensor:
        """Scores of the same shape as ``weight``; never modifies it. ``name`` and ``step`` are there for seeds."""
