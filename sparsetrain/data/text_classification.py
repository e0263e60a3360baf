"""Labelled text: lines of ``label<TAB>text``, or a Hugging Face data set; batches padded to their longest text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsetrain.data.sources import read_labelled
from sparsetrain.data.tokenized import TokenizedData
from sparsetrain.data.tokens import get_tokenizer
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


class TextClassificationData(TokenizedData[LabelledTexts]):
    """Labelled texts as batches ``{"input_ids", "attention_mask", "labels"}``, resumable in mid-epoch.

    After ``setup``: ``label_names`` (a label's number is its place: as a data set numbers them, else sorted), ``num_classes``,
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
            that the training text has not, or a model with fewer or otherwise numbered labels or a smaller vocabulary.

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
        super().__init__(tokenizer, batch_size, seed)
        if max_length < 2 or not 0 <= validation < 1:
            raise DataError(f"max_length={max_length}, validation={validation}: at least 2 tokens, and a share in [0, 1)")
        if limit is not None and not (isinstance(limit, int) and limit >= 1):
            raise DataError(f"limit={limit} is no number of texts; a whole number from 1 on, or None")
        self.source = source
        self.max_length = max_length
        self.validation = validation
        self.limit = limit
        self.label_names: list[str] = []

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.label_names)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize everything once, and check it against the trainer's model."""
        if self.train_set is None:
            self._read()
        if self.trainer is not None:
            self._require_fit(self.max_length)
            self._require_labels(self.trainer.lightning_module)
            self._pad_as(self.trainer.lightning_module)

    def _read(self) -> None:
        splits, self.label_names = read_labelled(self.source)
        if self.tokenizer is None:
            self.tokenizer = get_tokenizer(self.tokenizer_name, splits["train"][0])
        if self.num_classes < 2:
            raise DataError(f"{self.source!r} has one label only, {self.label_names}; there is nothing to learn")
        if "valid" not in splits and self.validation:
            splits |= self._hold_out(*splits["train"])
        found = {split: self._encoded(split, *pair) for split, pair in splits.items()}
        self.train_set, self.val_set, self.test_set = found["train"], found.get("valid"), found.get("test")

    def _hold_out(self, texts: list[str], labels: list[str]) -> dict[str, tuple[list[str], list[str]]]:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(self.seed)).tolist()
        count = round(self.validation * len(texts))
        if not 0 < count < len(texts):
            raise DataError(f"validation={self.validation} takes {count} of {len(texts)} texts; both sets need at least one")
        parts = {"valid": sorted(order[:count]), "train": sorted(order[count:])}
        return {split: ([texts[i] for i in chosen], [labels[i] for i in chosen]) for split, chosen in parts.items()}

    def _encoded(self, split: str, texts: list[str], labels: list[str]) -> LabelledTexts:
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
        tokenizer = self._ready(self.tokenizer)
        return LabelledTexts(tokenizer.encode(texts, self.max_length), [numbers[label] for label in labels], tokenizer.pad)

    def _pad_as(self, model: nn.Module) -> None:
        """Pad with the id that the model itself takes for padding; a model that knows none is told the tokenizer's."""
        config = next((c for m in model.modules() if hasattr(c := getattr(m, "config", None), "pad_token_id")), None)
        pad = self._ready(self.tokenizer).pad
        if config is not None:
            # Decoders find the last token of a text by this id. Some configurations say -1 for none.
            if config.pad_token_id is None or config.pad_token_id < 0:
                config.pad_token_id = pad
            pad = int(config.pad_token_id)
        for name in ("train_set", "val_set", "test_set"):
            if (texts := getattr(self, name)) is not None:
                setattr(self, name, replace(texts, pad=pad))

    def _require_labels(self, model: nn.Module) -> None:
        for module in model.modules():
            config = getattr(module, "config", None)
            labels = getattr(config, "num_labels", None)
            if isinstance(labels, int) and labels < self.num_classes:
                raise DataError(
                    f"{self.source!r} has {self.num_classes} labels, {type(module).__name__} {labels}; build it with "
                    f"num_labels: {self.num_classes}"
                )
            own = {str(name).casefold(): number for name, number in (getattr(config, "label2id", None) or {}).items()}
            for number, name in enumerate(self.label_names):
                if own.get(name.casefold(), number) != number:
                    raise DataError(
                        f"label {name!r} is number {number} of {self.source!r}, but {own[name.casefold()]} of "
                        f"{type(module).__name__}, which would take one for another; write the model's numbers, not names"
                    )
