"""What text data modules share: a tokenizer by its name, which fits the model, and which stays with what was trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import nn

from sparsetrain.data.loading import BatchDataset
from sparsetrain.data.splits import SplitData
from sparsetrain.data.tokens import Tokenizer, get_tokenizer, known_size
from sparsetrain.errors import DataError

_Set = TypeVar("_Set", bound=BatchDataset)


class TokenizedData(SplitData[_Set]):
    """Sets of tokens. ``tokenizer`` is made by ``setup``, or when its size is asked for and only loading it tells.

    Args:
        tokenizer: "bytes", "bpe:4096" (trained on the training text), a folder, or a name on the hub.
        batch_size: as in `SplitData`.
        seed: as in `SplitData`.

    Raises `DataError` for a name that is no tokenizer's.
    """

    def __init__(self, tokenizer: str, batch_size: int, seed: int) -> None:
        super().__init__(batch_size, seed)
        known_size(tokenizer)  # a name that cannot be, fails now
        self.tokenizer_name = tokenizer
        self.tokenizer: Tokenizer | None = None

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer: what a model built for it needs. Known before ``setup``."""
        if self.tokenizer is None and (size := known_size(self.tokenizer_name)) is not None:
            return size
        self.tokenizer = self.tokenizer or get_tokenizer(self.tokenizer_name)
        return self.tokenizer.vocab_size

    def save_trained(self, folder: Path) -> None:
        """Write a tokenizer that was trained here into ``folder``; one that is a name can be named again.

        Example: ``data.save_trained(Path("runs/reference/tokenizer"))``.
        """
        if self.tokenizer_name.startswith("bpe:"):
            self._ready(self.tokenizer).save(folder)

    def _require_fit(self, length: int) -> None:
        """The trainer's model, if there is one, can read texts of so many tokens."""
        if self.trainer is not None:
            require_fit(self.trainer.lightning_module, self.vocab_size, length)


def require_fit(model: nn.Module, vocab_size: int, length: int) -> None:
    """Raise `DataError` unless a transformers model, wherever it is inside ``model``, can read such ids and so many of them.

    Example: ``require_fit(module, vocab_size=258, length=256)``.
    """
    for module in model.modules():
        config, getter = getattr(module, "config", None), getattr(module, "get_input_embeddings", None)
        if config is None or not callable(getter):
            continue
        rows = getattr(getattr(getter(), "weight", None), "shape", [vocab_size])[0]
        if vocab_size > rows:
            raise DataError(
                f"the tokenizer has {vocab_size} entries, the embedding of {type(module).__name__} {rows}: they do not belong "
                f"together; name the model's own tokenizer, or build the model with vocab_size: {vocab_size}"
            )
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest - (lost := _lost_positions(module)) < length:
            raise DataError(
                f"a window of {length} tokens is longer than the {longest - lost} positions of {type(module).__name__} "
                f"(max_position_embeddings{f' less {lost}' * (lost > 0)}); set window or max_length to at most {longest - lost}"
            )
        return


def _lost_positions(model: nn.Module) -> int:
    """RoBERTa and its kin begin to count after the padding index, so that the first positions are never used."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0
