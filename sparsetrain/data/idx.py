"""The MNIST idx format: big-endian magic 0x0000 08 <dims>, the sizes, then bytes; plain, .gz or .xz."""

from __future__ import annotations

import gzip
import lzma
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sparsetrain.errors import DataError

STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_SUFFIXES = ("", ".gz", ".xz")
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}


def is_idx_folder(folder: Path) -> bool:
    """Return whether any of the four files is in ``folder``.

    Example: ``is_idx_folder(Path("data/mnist"))``.
    """
    return any((folder / (stem + suffix)).is_file() for pair in STEMS.values() for stem in pair for suffix in _SUFFIXES)


def read_idx_folder(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``{"train": (images, labels), "test": (images, labels)}``: uint8 (N, 1, H, W) and int64 (N,).

    Raises:
        DataError: a file is missing, empty, truncated, corrupt or of another kind, or the counts do not match.

    Example: ``images, labels = read_idx_folder(Path("data/mnist"))["train"]``.
    """
    splits = {}
    for split, (image_stem, label_stem) in STEMS.items():
        images_path, labels_path = _find(folder, image_stem), _find(folder, label_stem)
        images, labels = read_idx(images_path, dims=3), read_idx(labels_path, dims=1)
        if len(images) != len(labels):
            raise DataError(f"{images_path} has {len(images)} images, {labels_path} has {len(labels)} labels")
        splits[split] = (images.unsqueeze(1), labels.long())
    return splits


def read_idx(path: Path, dims: int) -> Tensor:
    """Return the uint8 tensor of one idx file with ``dims`` dimensions.

    Raises:
        DataError: wrong magic number, no entries, or not as many bytes as the header promises.

    Example: ``labels = read_idx(Path("t10k-labels-idx1-ubyte.gz"), dims=1)``.
    """
    content, broken = _unpack(path)
    header, want = 4 + 4 * dims, 0x0800 + dims
    hint = f" ({broken}); fetch the file again" if broken else ""
    if len(content) < header:
        raise DataError(f"{path}: an idx header of {header} bytes expected, {len(content)} bytes found{hint}")
    magic, *sizes = struct.unpack(f">{1 + dims}I", content[:header])
    if magic != want:
        raise DataError(f"{path}: magic number 0x{want:08x} expected, 0x{magic:08x} found; not an idx file of {dims} dims")
    if math.prod(sizes) == 0:
        raise DataError(f"{path}: the set is empty, its header says {' x '.join(map(str, sizes))}")
    expected = header + math.prod(sizes)
    if len(content) != expected or broken:
        raise DataError(f"{path}: {expected} bytes expected, {len(content)} bytes found{hint}")
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).reshape(sizes)


def _find(folder: Path, stem: str) -> Path:
    for suffix in _SUFFIXES:
        if (path := folder / (stem + suffix)).is_file():
            return path
    raise DataError(f"{folder} has no {stem} (plain, .gz or .xz), one of the four files of an MNIST-format folder")


def _unpack(path: Path) -> tuple[bytearray, str]:
    """Return what can be read of the file, and why reading stopped early (empty when it did not)."""
    opener: Callable[[Path, str], IO[bytes]] = _OPENERS.get(path.suffix, open)
    content = bytearray()
    try:
        with opener(path, "rb") as file:
            while chunk := file.read(1 << 20):
                content += chunk
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        return content, str(error)
    return content, ""
