"""Random crops and mirror images for training: a function of seed, epoch and sample, nothing else.

The usual augmentation for CIFAR (He et al. 2016, arXiv 1512.03385, sec. 4.2): pad ``padding`` black pixels on each side, cut
the original size out at random, mirror left to right with probability 1/2. No random state is read or moved, so that a run
that was interrupted, or that is split over ranks, sees the very same images.

Validation, test and calibration batches are not augmented.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparsetrain.data.loading import TensorSet
from sparsetrain.data.vision import VisionData
from sparsetrain.errors import DataError


class AugmentedSet(TensorSet):
    """Images (N, C, H, W) and labels (N,) as they are, and ``at_epoch`` the same images moved and mirrored.

    Args:
        images: float.
        labels: int64.
        black: what is padded with, broadcast to (C, 1, 1).
        padding: pixels on each side, at least 0.
        flip: mirror every second image, by chance.
        seed: of the choices, at least 0.

    Raises:
        DataError: a negative padding or seed, or nothing to do.

    Example: ``AugmentedSet(x, y, black=torch.zeros(3, 1, 1), seed=0).at_epoch(1).__getitems__([0, 2])``.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, black: Tensor, padding: int = 4, flip: bool = True, seed: int = 0
    ) -> None:
        super().__init__(images, labels)
        _require(padding, flip, seed)
        self.black = black
        self.padding = padding
        self.flip = flip
        self.seed = seed

    def at_epoch(self, epoch: int) -> _Epoch:
        """Return the set as epoch ``epoch`` sees it."""
        return _Epoch(self, epoch)


class _Epoch:
    """An `AugmentedSet` with the choices of one epoch."""

    def __init__(self, data: AugmentedSet, epoch: int) -> None:
        self.data = data
        # One number more than the loader mixes for its order, so that the two are independent.
        mixed = int(np.random.SeedSequence([data.seed, epoch, 1]).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(mixed)
        self.offsets = torch.randint(2 * data.padding + 1, (len(data), 2), generator=generator)
        self.mirrored = torch.rand(len(data), generator=generator) < (0.5 if data.flip else 0.0)

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, ...]:
        index = torch.as_tensor(indices, dtype=torch.int64)
        images, labels = self.data.__getitems__(index)
        count, channels, height, width = images.shape
        pad = self.data.padding
        black = self.data.black.to(images.dtype)
        padded = black.expand(count, channels, height + 2 * pad, width + 2 * pad).clone()
        padded[:, :, pad : pad + height, pad : pad + width] = images
        down, right = self.offsets[index].unbind(1)
        # Every window of the original size is a view; only the chosen ones are copied.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(count), :, down, right]
        mirrored = self.mirrored[index].view(-1, 1, 1, 1)
        return torch.where(mirrored, images.flip(3), images), labels


class AugmentedVisionData(VisionData):
    """`VisionData` whose training images are cut and mirrored at random, other ones every epoch.

    After ``setup`` ``train_set`` has the images as they are; the train loader hands out the augmented ones.

    Args:
        name: as in `VisionData`.
        root: as in `VisionData`.
        batch_size: per process.
        validation: as in `VisionData`.
        seed: of the choice of validation samples, the shuffling and the augmentation.
        normalize: as in `VisionData`.
        padding: black pixels on each side before a crop of the original size; 0 for none.
        flip: mirror left to right with probability 1/2; not for digits and letters.

    Raises:
        DataError: as `VisionData`; for a negative padding, and when there is nothing to augment.

    Example: ``AugmentedVisionData("cifar10_mini", batch_size=128, normalize="imagenet")``.
    """

    def __init__(
        self,
        name: str = "cifar10_mini",
        root: str | None = None,
        batch_size: int = 128,
        validation: int | float = 0.1,
        seed: int = 0,
        normalize: Literal["unit", "standardize", "imagenet"] = "unit",
        padding: int = 4,
        flip: bool = True,
    ) -> None:
        super().__init__(name, root, validation, normalize, batch_size=batch_size, seed=seed)
        _require(padding, flip, seed)
        self.padding = padding
        self.flip = flip

    def setup(self, stage: str | None = None) -> None:
        """Read everything once; later calls do nothing."""
        super().setup(stage)
        data = self._ready(self.train_set)
        if not isinstance(data, AugmentedSet):
            images, labels = data.tensors
            self.train_set = AugmentedSet(images, labels, self.black, self.padding, self.flip, self.seed)


def _require(padding: int, flip: bool, seed: int) -> None:
    if padding < 0 or seed < 0:
        raise DataError(f"padding={padding}, seed={seed}: both must be at least 0")
    if not padding and not flip:
        raise DataError("padding=0 and flip=False: nothing would be augmented; use VisionData")
