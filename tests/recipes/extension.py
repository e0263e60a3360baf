"""What a user writes outside the package and names in a recipe by its class path, each in about ten lines."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from sparsetrain.callbacks import SparsityCallback
from sparsetrain.callbacks.base import current_step
from sparsetrain.criteria import Criterion
from sparsetrain.data import ResumableLoader, TensorSet
from sparsetrain.errors import PatternError
from sparsetrain.masks import MaskManager
from sparsetrain.patterns import Pattern, Sparsity
from sparsetrain.pruning import prune
from sparsetrain.schedules import Clock, Schedule


def explode(epoch: int) -> float:
    """A factor of the learning rate no network survives."""
    return 1e30


class Largest(Criterion):
    """Small weights matter most: the opposite of magnitude."""

    def score(self, weight: Tensor, *, name: str, step: int) -> Tensor:
        """``-|w|``."""
        return -weight.detach().abs()


class Checkerboard(Pattern):
    """Every second weight, whatever its score."""

    def select(self, scores: Tensor, sparsity: Sparsity) -> Tensor:
        """Alive where row + column is even."""
        rows, columns = (torch.arange(size) for size in scores.shape)
        return (rows[:, None] + columns) % 2 == 0 if sparsity else torch.ones_like(scores, dtype=torch.bool)

    def check(self, mask: Tensor, sparsity: Sparsity) -> None:
        """Exactly that."""
        if not torch.equal(mask, self.select(mask.float(), sparsity)):
            raise PatternError("the mask is no checkerboard")


@dataclass(frozen=True)
class Halves(Schedule):
    """Half of the sparsity at one step, the rest at another."""

    first: int = 4
    second: int = 9

    def points(self, final: float, clock: Clock) -> list[tuple[int, float]]:
        """Two changes."""
        return [(self.first, final / 2), (self.second, final)]


class PruneAtStep(SparsityCallback):
    """Prunes once, at a step."""

    def __init__(self, sparsity: float, step: int) -> None:
        self.sparsity, self.step = sparsity, step

    def create_manager(self, model: nn.Module) -> MaskManager:
        """Every weight but the head's."""
        return MaskManager(model)

    def on_step(self, trainer: Trainer, step: int) -> None:
        """Once."""
        if current_step(trainer) == self.step:
            prune(self.masks, self.sparsity, step=step)


class BlankImages(pl.LightningDataModule):
    """As many blank 28x28 images as asked."""

    def __init__(self, count: int = 20) -> None:
        super().__init__()
        self.count = count

    def setup(self, stage: str | None = None) -> None:
        """Once."""
        self.train_set = TensorSet(torch.zeros(self.count, 1, 28, 28), torch.zeros(self.count, dtype=torch.int64))

    def train_dataloader(self) -> ResumableLoader:
        """Two images a batch."""
        return ResumableLoader(self.train_set, batch_size=2)


class Orthogonal(nn.Module):
    """Its constructor looks at the values it draws, which a meta tensor does not have."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 10)
        self.scale = float(self.fc1.weight.abs().max())

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.fc1(x.flatten(1)) / self.scale
