"""Data modules and loaders: seeded, in memory, resumable in mid-epoch."""

from __future__ import annotations

from sparsetrain.data.loading import BatchDataset, ResumableDataModule, ResumableLoader, TensorSet, identity
from sparsetrain.data.vision import VisionData

__all__ = ["BatchDataset", "ResumableDataModule", "ResumableLoader", "TensorSet", "VisionData", "identity"]
