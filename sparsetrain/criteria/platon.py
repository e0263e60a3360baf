"""PLATON: importance times how uncertain it is (Zhang et al. 2022, arXiv 2206.12562, sec. 3).

Formula, at every optimizer step ``t``: the sensitivity ``I_t = |w g|``; its average ``M_t = beta1 M_{t-1} + (1 - beta1)
I_t``; the deviation ``U_t = |I_t - M_t|``; its average ``V_t = beta2 V_{t-1} + (1 - beta2) U_t``; ``score = M_t * V_t``.
Averages begin at 0.

When to use it: fine-tuning with small batches, where ``|w g|`` of single steps is too noisy to trust: a weight that matters
now and then is kept. It watches every optimizer step from the first one; use it with gradual schedules (`Cubic`) and
``allocation="global"``, as the paper does.

How it fails: pruning within the first ``1 / (1 - beta2)`` steps, when the averages still remember their zero start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.criteria.base import Seen, StatisticsCriterion, wide
from sparsetrain.errors import RecipeError


def platon(
    importance: Tensor, uncertainty: Tensor, weight: Tensor, gradient: Tensor, beta1: float = 0.85, beta2: float = 0.95
) -> tuple[Tensor, Tensor]:
    """One step of both averages; all of one shape, the score is their product.

    Example: from zeros, ``platon(zero, zero, torch.tensor([2.]), torch.tensor([-3.]), 0.5, 0.5)`` is ``(3., 1.5)``.
    """
    sensitivity = (weight * gradient).abs()
    importance = beta1 * importance + (1 - beta1) * sensitivity
    return importance, beta2 * uncertainty + (1 - beta2) * (sensitivity - importance).abs()


class PLATON(StatisticsCriterion):
    """Averaged sensitivity times averaged uncertainty.

    Args:
        beta1: memory of the sensitivity, in [0, 1).
        beta2: memory of the uncertainty, in [0, 1).

    Raises `RecipeError` outside of that. Example: ``PruneFinetune(0.9, criterion="platon", schedule=Cubic(end="60%"))``.
    """

    source = "training"
    additive = False

    def __init__(self, beta1: float = 0.85, beta2: float = 0.95) -> None:
        super().__init__()
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise RecipeError(f"PLATON {name}={value}: give a share of the past in [0, 1), such as 0.85")
        self.beta1 = beta1
        self.beta2 = beta2

    def observe(self, seen: Seen) -> None:
        """Move both averages by one step."""
        if seen.gradient is None:
            return
        weight = wide(seen.weight)
        old = self.beside(seen.tensor.name, weight)
        zero = torch.zeros_like(weight)
        importance, uncertainty = platon(
            old.get("importance", zero), old.get("uncertainty", zero), weight, wide(seen.gradient), self.beta1, self.beta2
        )
        self.memory[seen.tensor.name] = {"importance": importance, "uncertainty": uncertainty}

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        """The product of the averages."""
        memory = self.remembered(name)
        return (memory["importance"] * memory["uncertainty"]).to(weight.device)
