"""Token streams cut into windows: what a language model trains on and is measured on.

Two ways to cut, the same as those of perplexity:

* block (``stride`` None): window after window, the last one as long as is left. A token is predicted from the tokens before it
  in its window, so the first of each window is not predicted.
* sliding (``stride`` s): a window every s tokens; only what the window before has not scored is scored, so every token but
  the very first is scored once, after ``window - s`` tokens of context at least.

Documents are packed one after the other, and attention reaches across their borders inside a window, as in GPT-2 and Llama.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.errors import DataError

#: The label of a position that is not scored, as in ``torch.nn.functional.cross_entropy``.
IGNORED = -100


@dataclass(frozen=True)
class TokenWindows:
    """Windows over a stream: batches ``(input_ids, labels)``, int64 (B, T); labels are the ids, or -100 where not scored.

    Who computes the loss compares the output at position t with the label at t + 1. A batch is as wide as its longest window.

    Args:
        tokens: the stream, int32 or int64 (N,).
        starts: where each window begins, int64 (M,).
        lengths: how long it is, int64 (M,).
        context: how many of its first positions are context only, int64 (M,).

    Example: ``ids, labels = TokenWindows.cut([torch.arange(10)], window=4).__getitems__([0, 2])``.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    context: Tensor

    @classmethod
    def cut(cls, streams: Sequence[Tensor], window: int, stride: int | None = None, whole: bool = False) -> TokenWindows:
        """Cut each stream (N,) into windows that cross no border between streams; ``whole`` leaves partial ones out.

        Raises `DataError` for a window below 2 or a stride outside [1, window].
        """
        step = window if stride is None else stride
        if window < 2 or not 1 <= step <= window:
            raise DataError(f"window={window}, stride={stride}: a window has at least 2 tokens, a stride is in [1, window]")
        parts, offset = [], 0
        for stream in streams:
            starts = torch.arange(0, max(len(stream) - (window - step), 1), step)
            lengths = (len(stream) - starts).clamp(max=window)
            context = torch.where(starts > 0, window - step, 0)
            # In a window of one token there is nothing to predict.
            kept = lengths == window if whole else lengths > 1
            parts.append((starts[kept] + offset, lengths[kept], context[kept]))
            offset += len(stream)
        if not parts:
            raise DataError("there is no stream of tokens to cut into windows; give at least one")
        tokens = torch.cat(list(streams))
        starts, lengths, context = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(tokens, starts, lengths, context)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.starts)

    @property
    def predicted(self) -> int:
        """Number of tokens that are predicted and scored."""
        return int((self.lengths - self.context.clamp(min=1)).sum())

    def subset(self, indices: Tensor) -> TokenWindows:
        """Return these windows, over the same stream."""
        return TokenWindows(self.tokens, self.starts[indices], self.lengths[indices], self.context[indices])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one window, ids and labels of shape (T,)."""
        ids, labels = self.__getitems__([range(len(self))[index]])
        return ids[0], labels[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Return the windows of ``indices`` (B,), filled up with id 0 and label -100 on the right."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        lengths = self.lengths[index, None]
        offsets = torch.arange(int(lengths.max()))
        there = offsets < lengths
        positions = (self.starts[index, None] + offsets).clamp(max=len(self.tokens) - 1)
        ids = self.tokens[positions].long().masked_fill(~there, 0)
        return ids, ids.masked_fill(~there | (offsets < self.context[index, None]), IGNORED)
