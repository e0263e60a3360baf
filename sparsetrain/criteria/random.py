"""Random: the control every other criterion must beat.

Formula: ``score ~ Uniform(0, 1)``, a pure function of (seed, tensor name, step), the same on every rank and on every device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sparsetrain.criteria.base import Criterion


def random_scores(shape: tuple[int, ...], key: str) -> Tensor:
    """Uniform float32 scores in [0, 1) that depend on ``key`` alone. Example: ``random_scores((2, 3), "0/fc1.weight/0")``."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=False) >> 1
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Random(Criterion):
    """Uniform random scores."""

    elementwise = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, weight: Tensor, *, name: str = "", step: int = 0) -> Tensor:
        """Uniform in [0, 1), drawn anew for every tensor and step."""
        return random_scores(tuple(weight.shape), f"{self.seed}/{name}/{step}").to(weight.device)
