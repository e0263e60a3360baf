"""Patterns: what a mask may look like. Each one both *selects* a mask and *checks* one; counts are equalities.

A pattern sees a weight as a matrix with its outputs first: ``(out, in)``, or ``(out, in, *kernel)`` for convolutions
(`sparsetrain.targets.Layout` makes that view of any supported tensor). Scores are "higher = more important". Three rules
hold for every pattern:

* **count**: ``floor(sparsity * n)`` of the ``n`` units a pattern compares (weights, blocks or slices) are pruned, computed
  with exact fractions, so 0.29 of 100 is 29 and never 28;
* **ties**: of equal scores the lower row-major index is pruned first;
* **dead first**: a score of ``-inf`` marks an entry that is already pruned; such entries go before all others.
"""

from __future__ import annotations

import re

from sparsetrain.errors import PatternError, nearest
from sparsetrain.patterns.base import Pattern, Sparsity, exact
from sparsetrain.patterns.units import Block, Slices, UnitPattern
from sparsetrain.patterns.weights import NM, Unstructured

__all__ = [
    "NAMES",
    "NM",
    "Block",
    "Pattern",
    "Slices",
    "Sparsity",
    "UnitPattern",
    "Unstructured",
    "exact",
    "parse_pattern",
]

NAMES = {
    "unstructured": "any weight, compared over the whole tensor",
    "unstructured:row": "any weight, the same share of every output row",
    "2:4": "keep 2 of every 4 along the input dimension; any keep:group works",
    "block:16x16": "blocks of 16 outputs x 16 inputs; any block:RxC works",
    "neurons": "whole outputs of one tensor (filters in a convolution)",
    "channels": "whole inputs of one tensor (channels in a convolution)",
}


def parse_pattern(pattern: Pattern | str) -> Pattern:
    """Turn the text form into a pattern: ``unstructured``, ``unstructured:row``, ``2:4``, ``block:16x16``, ``neurons`` ...

    Raises `PatternError` for anything else, with the nearest known name. Example: ``parse_pattern("2:4") == NM(2, 4)``.
    """
    if isinstance(pattern, Pattern):
        return pattern
    text = str(pattern).strip().lower()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(?:block:)?(\d+)x(\d+)", text):
        return Block(int(match[1]), int(match[2]))
    fixed: dict[str, Pattern] = {
        "unstructured": Unstructured(),
        "unstructured:row": Unstructured("row"),
        "neurons": Slices(0),
        "filters": Slices(0),
        "channels": Slices(1),
    }
    if text not in fixed:
        raise PatternError(f"pattern {pattern!r} is unknown; known are {', '.join(NAMES)}.{nearest(text, fixed)}")
    return fixed[text]
