"""Masks: one manager that writes masked weights, and what it needs to keep, prove and remember them."""

from __future__ import annotations

from sparsetrain.masks.manager import MaskManager
from sparsetrain.masks.state import load_masks, read_masks, save_masks
from sparsetrain.masks.tensor import MaskChange, MaskedTensor, Override
from sparsetrain.masks.verification import Verification, VerifiedTensor

__all__ = [
    "MaskChange",
    "MaskManager",
    "MaskedTensor",
    "Override",
    "Verification",
    "VerifiedTensor",
    "load_masks",
    "read_masks",
    "save_masks",
]
