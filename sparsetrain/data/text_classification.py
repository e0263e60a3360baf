"""Labelled text: lines of ``label<TAB>text``, or a Hugging Face data set; batches padded to their longest text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from sparsetrain.data.loading import ResumableDataModule, ResumableLoader
from sparsetrain.data.sources import read_labelled
from sparsetrain.data.text import require_fit
from sparsetrain.data.tokens import Tokenizer, get_tokenizer, known_size
from sparsetrain.errors import DataError, nearest


@dataclass(frozen=True)
class LabelledTexts:
    """Ids of texts and their labels; a batch is padded with ``pad`` to its longest text.

    Example: ``LabelledTexts([[5, 6], [7]], [0, 1], pad=0).__getitems__([0, 1])["attention_mask"]``.
    """

    ids: Sequence[Sequence[int]]
    labels: Sequence[int]
    pad: int

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one text, without padding: ids and mask (T,), label ()."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask`` (B, T) and ``labels`` (B,), all int64."""
        chosen = torch.as_tensor(indices).tolist()
        longest = max(len(self.ids[index]) for index in chosen)
        ids = torch.full((len(chosen), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            length = len(self.ids[index])
            ids[row, :length] = torch.tensor(self.ids[index])
            mask[row, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([self.labels[index] for index in chosen])}


class TextClassificationData(ResumableDataModule):
    """Labelled texts as batches ``{"input_ids", "attention_mask", "labels"}``, resumable in mid-epoch.

    After ``setup``: ``label_names`` (those of the training text, sorted; a label's number is its place), ``num_classes``,
    ``train_set``, ``val_set`` and ``test_set`` (None without such a split and ``validation``).

    Args:
        source: a ``.tsv`` file of ``label<TAB>text`` lines, a folder of them, a data set (see ``sparsetrain.data.sources``), or
            its name under ``$SPARSETRAIN_DATA/cls``.
        tokenizer: "bytes", "bpe:4096" (trained on the training texts), a folder, or a name on the hub.
        max_length: longer texts are cut to so many tokens.
        batch_size: texts in a batch, per process.
        validation: share of the training texts held out where the source has no validation split, in [0, 1).
        limit: at most so many texts of each split, drawn with the seed.
        seed: of what is drawn, and of the shuffling.

    Raises:
        DataError: from the constructor for a bad argument; from ``setup`` for a missing, empty or unreadable source, a label
            that the training text has not, or a model with other labels or a smaller vocabulary.

    Example: ``TextClassificationData("banking77", tokenizer="bytes", batch_size=32)``.
    """

    def __init__(
        self,
        source: str,
        tokenizer: str = "bytes",
        max_length: int = 128,
        batch_size: int = 32,
        validation: float = 0.1,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if max_length < 2 or batch_size < 1 or seed < 0 or not 0 <= validation < 1:
            raise DataError(
                f"max_length={max_length}, batch_size={batch_size}, seed={seed}, validation={validation}: max_length must be "
                "at least 2, batch_size 1, seed 0, and validation in [0, 1)"
            )
        if limit is not None and not (isinstance(limit, int) and limit >= 1):
            raise DataError(f"limit={limit} is no number of texts; a whole number from 1 on, or None")
        known_size(tokenizer)
        self.source = source
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.validation = validation
        self.limit = limit
        self.seed = seed
        self.tokenizer: Tokenizer | None = None
        self.label_names: list[str] = []
        self.train_set: LabelledTexts | None = None
        self.val_set: LabelledTexts | None = None
        self.test_set: LabelledTexts | None = None

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.label_names)

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer: what a model built for it needs. Known before ``setup``."""
        if self.tokenizer is None and (size := known_size(self.tokenizer_name)) is not None:
            return size
        self.tokenizer = self.tokenizer or get_tokenizer(self.tokenizer_name)
        return self.tokenizer.vocab_size

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize everything once, and check it against the trainer's model."""
        if self.train_set is None:
            splits = read_labelled(self.source)
            if self.tokenizer is None:
                self.tokenizer = get_tokenizer(self.tokenizer_name, splits["train"][0])
            self.label_names = sorted(set(splits["train"][1]))
            if self.num_classes < 2:
                raise DataError(f"{self.source!r} has one label only, {self.label_names}; there is nothing to learn")
            if "valid" not in splits and self.validation:
                splits |= self._hold_out(*splits["train"])
            pad = self._pad(self.trainer, self.tokenizer)
            found = {split: self._encoded(split, pad, *pair) for split, pair in splits.items()}
            self.train_set, self.val_set, self.test_set = found["train"], found.get("valid"), found.get("test")
        if self.trainer is not None:
            require_fit(self.trainer.lightning_module, self.vocab_size, self.max_length)
            self._require_labels(self.trainer)

    def _hold_out(self, texts: list[str], labels: list[str]) -> dict[str, tuple[list[str], list[str]]]:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(self.seed)).tolist()
        count = round(self.validation * len(texts))
        if not 0 < count < len(texts):
            raise DataError(f"validation={self.validation} takes {count} of {len(texts)} texts; both sets need at least one")
        parts = {"valid": sorted(order[:count]), "train": sorted(order[count:])}
        return {split: ([texts[i] for i in chosen], [labels[i] for i in chosen]) for split, chosen in parts.items()}

    def _encoded(self, split: str, pad: int, texts: list[str], labels: list[str]) -> LabelledTexts:
        numbers = {name: number for number, name in enumerate(self.label_names)}
        for label in labels:
            if label not in numbers:
                raise DataError(
                    f"the {split} text of {self.source!r} has the label {label!r}, which its training text has not."
                    f"{nearest(label, numbers)} Take these texts out, or add some to the training text"
                )
        if self.limit is not None:
            order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(self.seed)).tolist()
            chosen = sorted(order[: self.limit])
            texts, labels = [texts[index] for index in chosen], [labels[index] for index in chosen]
        if self.tokenizer is None:
            raise DataError("there is no tokenizer yet; call setup() first")
        return LabelledTexts(self.tokenizer.encode(texts, self.max_length), [numbers[label] for label in labels], pad)

    def _pad(self, trainer: Trainer | None, tokenizer: Tokenizer) -> int:
        """The id that the model itself takes for padding; a model that knows none is told the tokenizer's."""
        for module in [] if trainer is None else trainer.lightning_module.modules():
            config = getattr(module, "config", None)
            if config is None or not hasattr(config, "pad_token_id"):
                continue
            # Decoders find the last token of a text by this id.
            config.pad_token_id = tokenizer.pad if config.pad_token_id is None else config.pad_token_id
            return int(config.pad_token_id)
        return tokenizer.pad

    def _require_labels(self, trainer: Trainer) -> None:
        for module in trainer.lightning_module.modules():
            labels = getattr(getattr(module, "config", None), "num_labels", None)
            if isinstance(labels, int) and labels < self.num_classes:
                raise DataError(
                    f"{self.source!r} has {self.num_classes} labels, {type(module).__name__} {labels}; build it with "
                    f"num_labels: {self.num_classes}"
                )

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches, resumable in mid-epoch."""
        if self.train_set is None:
            raise DataError(f"TextClassificationData({self.source!r}) has no data yet; call setup() first")
        return self.loader(self.train_set, self.batch_size, self.seed, train=True)

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Return the validation batches in order, or no loader where there is no such text."""
        return [] if self.val_set is None else self.loader(self.val_set, self.batch_size)

    def test_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Return the test batches in order, or no loader where there is no such text."""
        return [] if self.test_set is None else self.loader(self.test_set, self.batch_size)
