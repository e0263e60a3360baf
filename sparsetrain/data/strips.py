"""Image strips: the images of one class side by side in lossless WebP or PNG mosaics, with an index.json.

A folder holds ``index.json`` with ``"names"`` (class names in order of their numbers), and at least one strip for every class:
``SPLIT_CLASS_NAME.webp`` or ``SPLIT_CLASS_NAME_PART.webp``, tiles of 32x32 pixels, row by row, no tile empty. SPLIT is
``test`` or begins with ``train`` (``train500``). So small a file format keeps a small CIFAR-10 beside a project.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsetrain.errors import DataError

TILE = 32
_INDEX = "index.json"


def is_strips_folder(folder: Path) -> bool:
    """Return whether ``folder`` has an index and strips. Example: ``is_strips_folder(Path("data/cifar10_mini"))``."""
    return (folder / _INDEX).is_file() and any(_strip(path) for path in folder.iterdir())


def read_strips_folder(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``{"train": (images, labels), "test": ...}``: uint8 (N, 3, 32, 32) and int64 (N,), class after class.

    Raises:
        DataError: a bad index, a class without strip or with another name, no training strips, or an image that is corrupt or
            no multiple of 32 pixels.

    Example: ``images, labels = read_strips_folder(Path("data/cifar10_mini"))["test"]``.
    """
    names = _names(folder / _INDEX)
    found: dict[str, dict[int, list[tuple[int, Path]]]] = {}
    for path in folder.iterdir():
        if (match := _strip(path)) is None:
            continue
        split, number, rest = match["split"], int(match["number"]), match["rest"]
        name, _, part = rest.rpartition("_") if re.fullmatch(r".+_\d+", rest) else (rest, "", "0")
        if number >= len(names) or names[number] != name:
            raise DataError(f"{path}: class {number} is not {name!r} in {_INDEX}, whose names are {names}")
        found.setdefault(split, {}).setdefault(number, []).append((int(part), path))
    if "train" not in found:
        raise DataError(f"{folder} has strips of {sorted(found)}, but none of 'train'")
    for split, classes in found.items():
        for number, name in enumerate(names):
            if number not in classes:
                raise DataError(f"{folder} has no {split} strip of class {number}, {name!r}; fetch it again")
    return {split: _joined(classes) for split, classes in found.items()}


def _strip(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"(?P<split>train|test)\d*_(?P<number>\d+)_(?P<rest>.+)\.(webp|png)", path.name)


def _names(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["names"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{index} is no index of strips; it is an object with 'names', a list of class names") from error
    if not (isinstance(names, list) and len(names) > 1 and all(isinstance(name, str) for name in names)):
        raise DataError(f"{index}: names is {names!r}; give a list of at least two class names")
    return names


def _joined(classes: dict[int, list[tuple[int, Path]]]) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for number in sorted(classes):
        for _, path in sorted(classes[number]):
            images.append(_tiles(path))
            labels.append(torch.full((len(images[-1]),), number))
    return torch.cat(images), torch.cat(labels)


def _tiles(path: Path) -> Tensor:
    """Cut one strip: uint8 (N, 3, 32, 32)."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise DataError(f"{path} cannot be read as an image: it is truncated or of another kind ({error})") from error
    height, width, _ = pixels.shape
    if height % TILE or width % TILE:
        raise DataError(f"{path} has {width}x{height} pixels, no multiple of {TILE}; strips are tiles of {TILE}x{TILE}")
    tiles = pixels.reshape(height // TILE, TILE, width // TILE, TILE, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(np.ascontiguousarray(tiles.reshape(-1, 3, TILE, TILE)))
