"""What every allocation is: one budget in, the sparsity of each tensor out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from sparsetrain.errors import RecipeError
from sparsetrain.patterns import Pattern, Sparsity

Scores = Callable[[], Tensor]
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Share:
    """What an allocation knows of one tensor: name, pattern, shape ``(out, in, *kernel)``, and its scores on demand.

    ``scores`` gives this rank's entries; ``gathered`` all of them, when the tensor is sharded.
    """

    name: str
    pattern: Pattern
    shape: tuple[int, ...]
    scores: Scores
    gathered: Scores

    @property
    def numel(self) -> int:
        """Entries of the whole tensor."""
        return math.prod(self.shape)


class Allocation(ABC):
    """How much where. A subclass needs ``__call__``; results are exact fractions, so that counts add up exactly."""

    #: Tensors share one budget, so that one of them may well lose nothing; False where each goes its own way.
    pooled: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, shares: Sequence[Share], sparsity: Sparsity, reduce: Reduce | None = None) -> dict[str, Fraction]:
        """Tensor name -> sparsity, for ``sparsity`` over all; ``reduce`` sums counts over ranks where rows are sharded."""

    def check(self, pattern: Pattern, name: str) -> None:
        """Raise `RecipeError` if a tensor of this pattern cannot take part."""
        if self.pooled and pattern.sparsity is not None:
            raise RecipeError(
                f"{name}: pattern {pattern} always has sparsity {float(pattern.sparsity):g}, {type(self).__name__} cannot "
                "decide it; use allocation 'uniform', or pattern 'unstructured'"
            )
