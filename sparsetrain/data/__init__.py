"""Data modules and loaders: seeded, in memory, resumable in mid-epoch."""

from __future__ import annotations

from sparsetrain.data.augmentation import AugmentedSet, AugmentedVisionData
from sparsetrain.data.domains import DomainSequence
from sparsetrain.data.loading import BatchDataset, ResumableDataModule, ResumableLoader, TensorSet, identity
from sparsetrain.data.rollouts import RolloutData
from sparsetrain.data.text import TextData
from sparsetrain.data.text_classification import LabelledTexts, TextClassificationData
from sparsetrain.data.tokens import Tokenizer, get_tokenizer
from sparsetrain.data.vision import VisionData
from sparsetrain.data.windows import TokenWindows

__all__ = [
    "AugmentedSet",
    "AugmentedVisionData",
    "BatchDataset",
    "DomainSequence",
    "LabelledTexts",
    "ResumableDataModule",
    "ResumableLoader",
    "RolloutData",
    "TensorSet",
    "TextClassificationData",
    "TextData",
    "TokenWindows",
    "Tokenizer",
    "VisionData",
    "get_tokenizer",
    "identity",
]
