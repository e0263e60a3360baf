"""Depth: residual blocks that matter least are found, bypassed, and removed. Pure torch."""

from __future__ import annotations

from sparsetrain.depth.blocks import Block, PassThrough, bypass, choose, find_blocks, install_bypass, sensitivity
from sparsetrain.depth.removal import remove, remove_again

__all__ = [
    "Block",
    "PassThrough",
    "bypass",
    "choose",
    "find_blocks",
    "install_bypass",
    "remove",
    "remove_again",
    "sensitivity",
]
