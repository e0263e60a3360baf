"""Masks at rest: one bit a weight, versioned, with names and shapes checked on load.

Two forms of the same content: the state inside a checkpoint (plain tensors, numbers and text, so that checkpoints load with
``weights_only=True``), and the side file ``masks.safetensors`` of a run.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsetrain.errors import MaskStateError, nearest

KIND = "sparsetrain.masks"
VERSION = 1


@dataclass(frozen=True)
class SavedMask:
    """One mask at rest: full shape, pattern as text, exact sparsity, number of weights alive, the packed bits, and their CRC-32
    (0 stands for "made just now": it is filled in)."""

    shape: tuple[int, ...]
    pattern: str
    sparsity: Fraction
    alive: int
    bits: Tensor
    crc: int = 0

    def __post_init__(self) -> None:
        if not self.crc:
            object.__setattr__(self, "crc", checksum(self.bits))

    def unpack(self, name: str) -> Tensor:
        """The bool mask. Raises `MaskStateError` naming the tensor if bits are missing or flipped."""
        numel = math.prod(self.shape)
        if self.bits.dtype != torch.uint8 or self.bits.numel() != math.ceil(numel / 8):
            raise MaskStateError(
                f"mask of {name!r} is truncated: {self.bits.numel()} bytes for shape {self.shape}, "
                f"{math.ceil(numel / 8)} expected; take another copy of the file"
            )
        mask = unpack_bits(self.bits, self.shape)
        if checksum(self.bits) != self.crc or int(mask.sum()) != self.alive:
            raise MaskStateError(
                f"mask of {name!r} is damaged: its bits ({int(mask.sum())} weights alive) are not those that were saved "
                f"({self.alive} alive, CRC-32 {self.crc:08x}); take another copy"
            )
        return mask


def checksum(bits: Tensor) -> int:
    """CRC-32 of packed bits. Example: the same on every machine."""
    return zlib.crc32(bits.detach().cpu().contiguous().numpy().tobytes())


def pack_bits(mask: Tensor) -> Tensor:
    """Bool mask -> uint8, 8 weights a byte, row-major, little-endian bits. Example: 10 weights take 2 bytes."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1), bitorder="little"))


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_bits`."""
    flat = np.unpackbits(bits.cpu().numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(flat).view(torch.bool).view(shape)


def to_state(masks: Mapping[str, SavedMask]) -> dict[str, Any]:
    """The form that goes into a checkpoint."""
    tensors = {
        name: {
            "shape": list(saved.shape),
            "pattern": saved.pattern,
            "sparsity": [saved.sparsity.numerator, saved.sparsity.denominator],
            "alive": saved.alive,
            "crc": saved.crc,
            "bits": saved.bits,
        }
        for name, saved in masks.items()
    }
    return {"kind": KIND, "version": VERSION, "tensors": tensors}


def from_state(state: Any, where: str = "the state") -> dict[str, SavedMask]:
    """Read the checkpoint form. Raises `MaskStateError` for foreign, newer or incomplete content."""
    if not isinstance(state, Mapping) or state.get("kind") != KIND:
        raise MaskStateError(f"{where} holds no sparsetrain masks; start from the weights with MaskManager.adopt instead")
    if state.get("version") != VERSION:
        raise MaskStateError(f"{where} is of version {state.get('version')}, this sparsetrain reads version {VERSION}")
    result = {}
    for name, entry in state.get("tensors", {}).items():
        try:
            if not isinstance(entry["bits"], Tensor):
                raise TypeError(f"bits are {type(entry['bits']).__name__}, not a tensor")
            result[name] = SavedMask(
                tuple(int(n) for n in entry["shape"]),
                str(entry["pattern"]),
                Fraction(*(int(n) for n in entry["sparsity"])),
                int(entry["alive"]),
                entry["bits"],
                int(entry["crc"]),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise MaskStateError(f"{where}: the mask of {name!r} is incomplete or malformed ({error!r})") from error
    return result


def check_names(saved: Mapping[str, SavedMask], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise `MaskStateError` unless the saved masks are exactly those of this model, name by name, shape by shape."""
    for name, mask in saved.items():
        if name not in expected:
            raise MaskStateError(
                f"{where} has a mask of {name!r}, which is no target here: it belongs to another model or other targets."
                + nearest(name, expected)
            )
        if mask.shape != expected[name]:
            raise MaskStateError(f"{where}: mask of {name!r} has shape {mask.shape}, the tensor here has {expected[name]}")
    missing = [name for name in expected if name not in saved]
    if missing:
        raise MaskStateError(f"{where} has no mask of {missing[0]!r}" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))


def save_masks(path: Path, masks: Mapping[str, SavedMask]) -> None:
    """Write ``masks.safetensors``: the packed bits under each tensor's name, the rest as JSON in the metadata."""
    about = {
        name: {"shape": list(s.shape), "pattern": s.pattern, "sparsity": str(s.sparsity), "alive": s.alive, "crc": s.crc}
        for name, s in masks.items()
    }
    metadata = {"sparsetrain": json.dumps({"version": VERSION, "masks": about})}
    save_file({name: saved.bits.contiguous() for name, saved in masks.items()}, str(path), metadata)


def read_masks(path: Path) -> dict[str, SavedMask]:
    """Read ``masks.safetensors``. Raises `MaskStateError` if it is missing, truncated, or not ours."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("sparsetrain", "null"))
            if not isinstance(about, dict) or about.get("version") != VERSION:
                raise MaskStateError(f"{path} is no mask file of version {VERSION}")
            return {
                name: SavedMask(
                    tuple(entry["shape"]),
                    entry["pattern"],
                    Fraction(entry["sparsity"]),
                    entry["alive"],
                    file.get_tensor(name),
                    entry["crc"],
                )
                for name, entry in about["masks"].items()
            }
    except MaskStateError:
        raise
    except (
        OSError,
        safetensors.SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        ZeroDivisionError,
    ) as error:
        raise MaskStateError(f"{path} cannot be read as masks: {error}") from error


def load_masks(path: Path) -> dict[str, Tensor]:
    """Bool masks by tensor name (True = alive). Example: ``load_masks(Path("run/masks.safetensors"))``."""
    return {name: saved.unpack(name) for name, saved in read_masks(path).items()}
