"""What data modules share that hold their splits in memory: three loaders, of which the training one resumes exactly."""

from __future__ import annotations

from typing import Generic, TypeVar

from sparsetrain.data.loading import BatchDataset, ResumableDataModule, ResumableLoader
from sparsetrain.errors import DataError

_Set = TypeVar("_Set", bound=BatchDataset)
_Made = TypeVar("_Made")


class SplitData(ResumableDataModule, Generic[_Set]):
    """A training set, and a validation and a test set where there are any; ``setup`` of a subclass makes them.

    Args:
        batch_size: samples in a batch, per process, at least 1.
        seed: of the shuffling, at least 0.

    Raises `DataError` for anything else, and where a loader is asked for before ``setup``.

    Example: ``class Rows(SplitData[TensorSet])``, whose ``setup`` sets ``self.train_set = TensorSet(x, y)``.
    """

    def __init__(self, batch_size: int = 100, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or seed < 0:
            raise DataError(f"batch_size={batch_size}, seed={seed}: batch_size must be at least 1 and seed at least 0")
        self.batch_size = batch_size
        self.seed = seed
        self.train_set: _Set | None = None
        self.val_set: _Set | None = None
        self.test_set: _Set | None = None

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches, resumable in mid-epoch."""
        return self.loader(self._ready(self.train_set), self.batch_size, self.seed, train=True)

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Return the validation batches in order, no loader where there is no such set."""
        return [] if self.val_set is None else self.loader(self.val_set, self.batch_size)

    def test_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Return the test batches in order, no loader where there is no such set."""
        return [] if self.test_set is None else self.loader(self.test_set, self.batch_size)

    def _ready(self, made: _Made | None) -> _Made:
        if made is None:
            raise DataError(f"{type(self).__name__} has no data yet; call setup() first")
        return made
