"""Text for language models: sources, a tokenizer, and windows of packed tokens; splits, limits, mixtures, calibration.

Everything is a function of the source, the tokenizer and the seed, and nothing is cached: tokens live in memory (4 bytes each).
A recipe's run saves a tokenizer that was trained here (``bpe:4096``) into its directory, ``tokenizer/`` beside the checkpoints:
to go on with the model on other text, name that folder as ``tokenizer``. A ``bpe:`` of other text has the same size and other
meanings. Outside of recipes ``data.save_trained(folder)`` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsetrain.data.sources import cut_tail, read_documents
from sparsetrain.data.tokenized import TokenizedData
from sparsetrain.data.tokens import get_tokenizer
from sparsetrain.data.windows import TokenWindows
from sparsetrain.errors import DataError


class TextData(TokenizedData[TokenWindows]):
    """Windows of packed tokens as batches ``(input_ids, labels)``, int64 (B, T); resumable in mid-epoch.

    After ``setup``: ``tokenizer``, ``train_set``, ``val_set`` and ``test_set`` (`TokenWindows`; None where a source has no such
    text). Training leaves out the last, partial window of a source; validation and test keep it.

    Args:
        source: an embedded corpus, a file, a folder or a data set (see ``sparsetrain.data.sources``); a list of them; or
            ``{name: share}``: that share of the training windows comes from each, no window twice, as many as there are then.
        tokenizer: "bytes", "bpe:4096" (trained on the training text), a folder, or a name on the hub.
        window: tokens in a window, at least 2.
        batch_size: windows in a batch, per process.
        stride: score the test text by sliding windows of this stride, in [1, window); None for block windows.
        held_out: share of the training text cut off for each of validation and test that a source has not, in [0, 0.5).
        limit: at most so many windows of each split (validation and test text: spread evenly over all of it), or of those
            named: ``{train: 6400, test: 1024}``.
        seed: of the shuffling.

    Raises:
        DataError: from the constructor for a bad argument; from ``setup`` when a source is missing, empty, not UTF-8 or shorter
            than a window, when shares cannot be kept, or when vocabulary or window do not fit the trainer's model.

    Example: ``trainer.fit(CausalLM(config=...), TextData("shakespeare", tokenizer="bytes", window=128))``.
    """

    def __init__(
        self,
        source: str | list[str] | dict[str, float] = "shakespeare",
        tokenizer: str = "bytes",
        window: int = 256,
        batch_size: int = 16,
        stride: int | None = None,
        held_out: float = 0.05,
        limit: int | dict[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, seed)
        self.sources = [source] if isinstance(source, str) else list(source)
        self.shares = [float(share) for share in source.values()] if isinstance(source, dict) else None
        if not self.sources or len(set(self.sources)) < len(self.sources):
            raise DataError(f"source={source!r} names nothing, or something twice; name each text once")
        if self.shares is not None and not all(0 < share < math.inf for share in self.shares):
            raise DataError(f"source={source!r}: shares must be positive and finite")
        if window < 2 or (stride is not None and not 1 <= stride < window):
            raise DataError(f"window={window}, stride={stride}: a window has at least 2 tokens, a stride is in [1, window)")
        if not 0 <= held_out < 0.5:
            raise DataError(f"held_out={held_out} is no share in [0, 0.5)")
        limits = limit if isinstance(limit, dict) else dict.fromkeys(("train", "valid", "test"), limit)
        if not {"train", "valid", "test"} >= set(limits) or any(
            n is not None and not (type(n) is int and n >= 1) for n in limits.values()
        ):
            raise DataError(
                f"limit={limit} is no number of windows; a whole number from 1 on, {{train: 6400, test: 1024}}, or None"
            )
        self.window = window
        self.stride = stride
        self.held_out = held_out
        self.limits = limits
        self._streams: list[Tensor] = []
        self._counts: list[int] = []

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize everything once, and check it against the trainer's model."""
        if self.train_set is None:
            self._read()
        self._require_fit(self.window)

    def _read(self) -> None:
        texts = [self._splits(name) for name in self.sources]
        if self.tokenizer is None:
            self.tokenizer = get_tokenizer(self.tokenizer_name, [text for split in texts for text in split["train"]])
        self._streams = [self._stream(split["train"]) for split in texts]
        for name, stream in zip(self.sources, self._streams, strict=True):
            if len(stream) < self.window:
                raise DataError(
                    f"the training text of {name!r} has {len(stream)} tokens, fewer than one window of {self.window}; "
                    "give more text, or a smaller window"
                )
        whole = [len(stream) // self.window for stream in self._streams]
        self._counts = _mix(whole, self.shares, self.limits.get("train"))
        windows = TokenWindows.cut(self._streams, self.window, whole=True)
        first = np.cumsum([0, *whole[:-1]])
        kept = [torch.arange(start, start + count) for start, count in zip(first.tolist(), self._counts, strict=True)]
        self.train_set = windows.subset(torch.cat(kept))
        self.val_set = self._measured("valid", texts, None)
        self.test_set = self._measured("test", texts, self.stride)

    def _splits(self, name: str) -> dict[str, list[str]]:
        """The documents of a source; what it lacks is cut off its training text: test last, validation before it."""
        found = read_documents(name)
        missing = [split for split in ("test", "valid") if split not in found]
        share = self.held_out
        for split in missing:
            found["train"], found[split] = cut_tail(found["train"], share) if share else (found["train"], [])
            # Both shares are of the whole text.
            share = share / (1 - share)
        if not found["train"]:
            raise DataError(f"held_out={self.held_out} leaves no training text of {name!r}; lower it, or give more text")
        return found

    def _stream(self, documents: Sequence[str]) -> Tensor:
        parts = [np.asarray(ids, dtype=np.int32) for ids in self._ready(self.tokenizer).documents(documents)]
        return torch.from_numpy(np.concatenate(parts))

    def _measured(self, split: str, texts: Sequence[dict[str, list[str]]], stride: int | None) -> TokenWindows | None:
        sources = [text[split] for text in texts if text[split]]
        if not sources:
            return None
        windows = TokenWindows.cut([self._stream(documents) for documents in sources], self.window, stride)
        if not len(windows):
            raise DataError("the validation or test text has fewer than 2 tokens; give more text, or set held_out to 0")
        kept = min(len(windows), self.limits.get(split) or len(windows))
        return windows.subset(torch.arange(kept) * len(windows) // kept)

    def calibration(self, n: int, window: int | None = None, seed: int = 0) -> Tensor:
        """Return ``n`` random windows of the training text as one tensor of ids, int64 (n, window).

        Each starts anywhere, in a source drawn by its share of the training windows (Frantar and Alistarh 2023 take 128
        windows). Raises `DataError` for ``n`` < 1, or a window below 2 or longer than a source.

        Example: ``data.calibration(128, window=512, seed=0)``.
        """
        if self.train_set is None:
            self.setup("calibration")
        size = self.window if window is None else window
        shortest = min(len(stream) for stream in self._streams)
        if n < 1 or not 2 <= size <= shortest:
            raise DataError(f"n={n}, window={size}: n must be at least 1, a window in [2, {shortest}], the shortest text")
        generator = torch.Generator().manual_seed(seed)
        weights = torch.tensor(self._counts, dtype=torch.float64)
        found = []
        for source in torch.multinomial(weights, n, replacement=True, generator=generator).tolist():
            stream = self._streams[source]
            start = int(torch.randint(len(stream) - size + 1, (), generator=generator))
            found.append(stream[start : start + size])
        return torch.stack(found).long()


def _mix(available: Sequence[int], shares: Sequence[float] | None, limit: int | None) -> list[int]:
    """How many windows of each source: by shares or all, at most ``limit`` in all, at least one of each."""
    weights = [float(count) for count in available] if shares is None else shares
    parts = [weight / sum(weights) for weight in weights]
    total = min(count / part for count, part in zip(available, parts, strict=True))
    total = min(total, math.inf if limit is None else limit)
    counts = [math.floor(total * part + 1e-6) for part in parts]
    if not all(counts):
        raise DataError(
            f"shares {[round(part, 4) for part in parts]} of {math.floor(total)} training windows leave a source without any; "
            "raise limit, use smaller windows, or leave that source out"
        )
    return counts
