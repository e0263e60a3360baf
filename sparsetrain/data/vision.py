"""Images with labels, in memory: bundled digits, MNIST-format folders, image strips, Hugging Face datasets.

Where ``name`` is looked for, in this order:

1. ``"digits"``: the 1797 digits of 8x8 pixels that scikit-learn bundles (no download); a fixed, stratified fifth is the
   test set.
2. A folder: ``root`` or ``root/name`` if ``root`` is given, otherwise ``$SPARSETRAIN_DATA/name``, otherwise ``name`` as
   a path. A folder with idx files is read as MNIST, one with strips as ``sparsetrain.data.strips`` says; any other with
   ``datasets`` (``save_to_disk``, image folder, parquet).
3. A Hugging Face dataset of that name, except for the known names, which are never downloaded.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from sparsetrain.data.idx import is_idx_folder, read_idx_folder
from sparsetrain.data.loading import ResumableLoader, TensorSet
from sparsetrain.data.splits import SplitData
from sparsetrain.data.strips import is_strips_folder, read_strips_folder
from sparsetrain.errors import DataError, nearest

FOLDER_VARIABLE = "SPARSETRAIN_DATA"
KNOWN = ("digits", "mnist", "fashion_mnist", "cifar10_mini")
_NORMALIZE = ("unit", "standardize", "imagenet")
# The usual statistics of ImageNet's training pixels in [0, 1], red, green, blue.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_Split = tuple[Tensor, Tensor]


class VisionData(SplitData[TensorSet]):
    """Train, validation and test images as float32 (N, C, H, W), labels as int64 (N,), all in memory.

    After ``setup``: ``num_classes`` (int), ``classes`` (the labels there are, ascending), ``image_shape`` ``(C, H, W)``,
    ``train_set``, ``val_set`` (None without validation), ``test_set`` (None when the source has none). A Hugging Face source
    without a "test" split gives its "validation" split as test set; the validation set here is always taken from the training
    split.

    Args:
        name: one of `KNOWN` ("digits", "mnist", ...), a folder, or a Hugging Face dataset; the module's text has the order.
        root: the folder, or its parent.
        validation: taken from the training set: a fraction in [0, 1) or a count; 0 for none.
        normalize: "unit" for pixels / 255; "standardize" for zero mean and unit deviation per channel over the training set;
            "imagenet" for the mean .485 .456 .406 and deviation .229 .224 .225 that many pretrained networks expect.
        image_size: resize to this height and width (bilinear, antialiased); needed when the images differ in size.
        monitor_test: validate on the test set too, as a second loader (to report, not to choose by); needs both sets.
        classes: keep the samples with these labels only, in every split. Labels keep their numbers, ``num_classes`` stays that
            of the data set, and what is held out and what images are normalized by is decided before: parts of one data set
            fit together.
        loading: ``batch_size`` (per process; 100) and ``seed`` (0; of the choice of validation samples and of the shuffling).

    Raises:
        DataError: from the constructor for a bad argument; from ``setup`` when the data are missing, empty, corrupt, or when
            the hub has no such dataset or cannot be reached.

    Example: ``trainer.fit(Classification(LeNet300()), VisionData("mnist", batch_size=100))``.
    """

    def __init__(
        self,
        name: str = "digits",
        root: str | None = None,
        validation: int | float = 0.1,
        normalize: Literal["unit", "standardize", "imagenet"] = "unit",
        image_size: int | None = None,
        monitor_test: bool = False,
        classes: list[int] | None = None,
        **loading: int,
    ) -> None:
        super().__init__(**loading)
        if validation < 0 or (isinstance(validation, float) and validation >= 1):
            raise DataError(f"validation={validation} is neither a count of samples nor a fraction in [0, 1)")
        if normalize not in _NORMALIZE:
            raise DataError(f"normalize={normalize!r} is not one of {', '.join(_NORMALIZE)}.{nearest(normalize, _NORMALIZE)}")
        if image_size is not None and image_size < 1:
            raise DataError(f"image_size={image_size}: give at least 1, or None for the images' own")
        if monitor_test and not validation:
            raise DataError("monitor_test needs a validation set beside the test set; set validation, such as 0.1")
        if classes is not None and (not classes or len(set(classes)) < len(classes)):
            raise DataError(f"classes={classes}: give each label to keep once, at least one, or None for all")
        self.source = name
        self.root = root
        self.validation = validation
        self.normalize = normalize
        self.image_size = image_size
        self.monitor_test = monitor_test
        self.keep = classes
        self.classes: list[int] = []
        self.num_classes = 0
        self.image_shape = (0, 0, 0)
        self.black = torch.zeros(())  # what a black pixel has become, broadcast to (C, 1, 1)

    def setup(self, stage: str | None = None) -> None:
        """Read everything once; later calls do nothing."""
        if self.train_set is not None:
            return
        splits = _read_once(*self._where) if self.keep else _read(*self._where)
        images, labels = splits["train"]
        self.num_classes = 1 + max(int(labels.max()) for _, labels in splits.values())
        channels, height, width = images.shape[1:]
        self.image_shape = (channels, height, width)
        keep, held_out = self._partition(len(images))
        # The statistics of what is trained on: neither validation nor test may leak in.
        mean, deviation = self._statistics(images[keep] if len(held_out) else images)
        self.black = -mean / deviation
        self.classes = self._labels(labels[keep])

        def part(split: _Split, index: Tensor) -> TensorSet | None:
            if self.keep is not None:
                index = index[torch.isin(split[1][index], torch.tensor(self.keep))]
            return TensorSet((split[0][index] - mean) / deviation, split[1][index]) if len(index) else None

        self.val_set = part(splits["train"], held_out)
        if "test" in splits:
            self.test_set = part(splits["test"], torch.arange(len(splits["test"][1])))
        self.train_set = part(splits["train"], keep)

    @property
    def _where(self) -> tuple[str, str | None, int | None, str | None]:
        return self.source, self.root, self.image_size, os.environ.get(FOLDER_VARIABLE)

    def _labels(self, trained: Tensor) -> list[int]:
        """Return the labels of this module, ascending; each that is asked for must be there to train on."""
        known = sorted(set(trained.tolist()))
        if self.keep is None:
            return known
        for label in self.keep:
            if label not in known:
                raise DataError(f"classes={self.keep}: {self.source!r} has no training sample of label {label}; it has {known}")
        return sorted(self.keep)

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the deviation to normalize by, each () or (C, 1, 1)."""
        if self.normalize == "unit":
            return torch.zeros(()), torch.ones(())
        if self.normalize == "standardize":
            return (
                images.mean((0, 2, 3), keepdim=True)[0],
                images.std((0, 2, 3), keepdim=True).clamp_min(1e-8)[0],
            )
        if images.shape[1] != 3:
            raise DataError(f"normalize='imagenet' is for 3 channels; {self.source!r} has {images.shape[1]}, use 'standardize'")
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in _IMAGENET)
        return mean, deviation

    def _partition(self, samples: int) -> tuple[Tensor, Tensor]:
        """Return the indices that are trained on and those held out, both ascending."""
        count = self.validation if isinstance(self.validation, int) else round(self.validation * samples)
        if count >= samples or (self.validation and not count):
            raise DataError(
                f"validation={self.validation} takes {count} of the {samples} training samples of {self.source!r}; "
                "both sets need at least one"
            )
        shuffled = torch.randperm(samples, generator=torch.Generator().manual_seed(self.seed))
        return shuffled[count:].sort().values, shuffled[:count].sort().values

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Return the validation batches in order (then the test batches, with ``monitor_test``), none when ``validation=0``."""
        validation = super().val_dataloader()
        if not self.monitor_test or isinstance(validation, list):
            return validation
        if self.test_set is None:
            raise DataError(f"monitor_test: {self.source!r} has no test set; set monitor_test to false")
        return [validation, self.loader(self.test_set, self.batch_size)]


def _read(name: str, root: str | None, image_size: int | None, shared: str | None) -> dict[str, _Split]:
    """Return float32 images in [0, 1] and labels per split; "train" is always there. ``shared``: `FOLDER_VARIABLE`'s value."""
    if name == "digits":
        splits = _read_digits()
    elif (folder := _find_folder(name, root, shared)) is None:
        splits = _read_hub(name, None, image_size)
    elif is_idx_folder(folder):
        splits = _unit(read_idx_folder(folder))
    elif is_strips_folder(folder):
        splits = _unit(read_strips_folder(folder))
    else:
        splits = _read_hub(name, folder, image_size)
    return {split: (_resize(x, image_size), y) for split, (x, y) in splits.items()}


#: Several parts of one data set (``classes``) are cut from what is read once; nobody writes into it.
_read_once = lru_cache(maxsize=1)(_read)


def _unit(splits: dict[str, _Split]) -> dict[str, _Split]:
    return {split: (images.float() / 255, labels) for split, (images, labels) in splits.items()}


def _read_digits() -> dict[str, _Split]:
    pixels, labels = load_digits(return_X_y=True)
    # 16 is the largest value of these images; 255 is that of all other sources.
    images = torch.from_numpy((pixels / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return {"train": (images[train], targets[train]), "test": (images[test], targets[test])}


def _find_folder(name: str, root: str | None, shared: str | None) -> Path | None:
    """Return the folder to read, None for a dataset of the hub; a folder that must be there and is not, raises."""
    if root is not None:
        places = [Path(root) / name, Path(root)]
    else:
        places = [Path(shared) / name] if shared else []
        places.append(Path(name))
    for place in places:
        if place.is_dir():
            return place
    if root is None and name not in KNOWN and not name.startswith((".", "~", os.sep)):
        return None
    looked = ", ".join(str(place.absolute()) for place in places)
    raise DataError(
        f"the data {name!r} are not there; looked in {looked}. Pass root=, or set the environment variable "
        f"{FOLDER_VARIABLE} to the folder that contains {name!r}." + ("" if name in KNOWN else nearest(name, KNOWN))
    )


def _read_hub(name: str, folder: Path | None, image_size: int | None) -> dict[str, _Split]:
    found = _load_with_datasets(name, folder)
    if "train" not in found:
        raise DataError(f"the dataset {name!r} has the splits {sorted(found)}, but no 'train'")
    splits = {"train": found["train"]}
    if (test := found.get("test", found.get("validation"))) is not None:
        splits["test"] = test
    return {split: _to_tensors(f"{name}[{split}]", data, image_size) for split, data in splits.items()}


def _load_with_datasets(name: str, folder: Path | None) -> dict[str, Any]:
    try:
        import datasets  # a second of import time that the other sources should not pay
    except ImportError as error:
        raise DataError(
            f"{name!r} is read by the package datasets, which is missing: pip install 'sparsetrain[hub]'. Without it there are "
            f"{', '.join(KNOWN)} and folders in MNIST format"
        ) from error
    try:
        if folder is None:
            loaded = datasets.load_dataset(name)
        elif any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(f"no dataset {name!r} on the Hugging Face hub: {error}.{nearest(name, KNOWN)}") from error
    except ConnectionError as error:
        raise DataError(
            f"{name!r} is no folder here, and the Hugging Face hub could not be reached: {error}.{nearest(name, KNOWN)} "
            f"Known without a download: {', '.join(KNOWN)}; for a folder set root= or {FOLDER_VARIABLE}."
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"the dataset {name!r} ({folder or 'from the hub'}) cannot be read: {error}") from error
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)


def _to_tensors(name: str, data: Any, image_size: int | None) -> _Split:
    """Turn the image and the label column of a ``datasets.Dataset`` into tensors."""
    image_column = _column(name, data, "image", ("image", "img"))
    label_column = _column(name, data, "label", ("label", "labels", "fine_label"))
    if len(data) == 0:
        raise DataError(f"the dataset {name} is empty")
    images = []
    for picture in data[image_column]:
        pixels = torch.from_numpy(np.array(picture))
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        images.append(_resize(pixels.unsqueeze(0).float() / 255, image_size))
    if len(shapes := {tuple(image.shape[1:]) for image in images}) > 1:
        raise DataError(f"{name} has images of {len(shapes)} shapes, e.g. {sorted(shapes)[:2]}; pass image_size=")
    return torch.cat(images), torch.tensor(list(data[label_column]), dtype=torch.int64)


def _column(name: str, data: Any, kind: str, usual: tuple[str, ...]) -> str:
    """Return the column whose feature is an image or a class label, otherwise one with a usual name."""
    feature = {"image": "Image", "label": "ClassLabel"}[kind]
    columns: list[str] = [column for column, value in data.features.items() if type(value).__name__ == feature]
    columns += [column for column in usual if column in data.features and column not in columns]
    if not columns:
        raise DataError(f"{name} has no {kind} column; its columns are {list(data.features)}")
    return columns[0]


def _resize(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
