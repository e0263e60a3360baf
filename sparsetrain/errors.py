"""Errors a user can act on: what broke, the value, the name, the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparsetrainError(Exception):
    """Base of every error raised on purpose; the command line prints it without a traceback and exits with 2."""


class PatternError(SparsetrainError, ValueError):
    """A pattern cannot be reached, does not fit a shape, or does not hold."""


class TargetError(SparsetrainError, ValueError):
    """The tensors asked for are not there, or cannot be pruned as asked."""


class MaskStateError(SparsetrainError, ValueError):
    """A saved mask state is foreign, truncated, or does not fit this model."""


class RecipeError(SparsetrainError, ValueError):
    """A recipe, an option or a run directory is not usable as given."""


class DataError(SparsetrainError, ValueError):
    """Data is missing, truncated or of the wrong kind."""


class DivergedError(SparsetrainError, RuntimeError):
    """The loss became NaN or infinite while training."""


class ExportError(SparsetrainError, RuntimeError):
    """A model cannot run in the format asked for, or does not give there what it gives as it is."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known word, or an empty string.

    Example: ``nearest("magnitud", ["magnitude", "random"])`` gives ``" Did you mean 'magnitude'?"``.
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""
