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

    @classmethod
    def without_scores(cls, name: str, pattern: Pattern, shape: Sequence[int]) -> Share:
        """A share that is a shape alone, for `Allocation.validate`; asking for its scores raises `RecipeError`.

        Example: ``Share.without_scores("fc1.weight", Unstructured(), (300, 784))``.
        """

        def scores() -> Tensor:
            raise RecipeError(
                f"{name} has no scores here, and the allocation asks for them; use one that goes by shapes, as 'erk'"
            )

        return cls(name, pattern, tuple(shape), scores, scores)


class Allocation(ABC):
    """How much where. A subclass needs ``__call__``; results are exact fractions, so that counts add up exactly."""

    #: Tensors share one budget, so that one of them may well lose nothing; False where each goes its own way.
    pooled: ClassVar[bool] = True
    #: Shapes alone decide, scores are not looked at: `validate` can try it before anything is trained.
    by_shape: ClassVar[bool] = False

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

    def validate(self, shares: Sequence[Share], sparsity: Sparsity) -> None:
        """Raise `RecipeError` or `PatternError` if these tensors cannot take part or cannot reach this; looks at no scores."""
        for share in shares:
            self.check(share.pattern, share.name)
        if self.by_shape:
            self(shares, sparsity)
