"""Vision sources read what is there, hold out what was asked, and say what is missing or broken."""

from __future__ import annotations

import gzip
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from sklearn.datasets import load_digits

from sparsetrain.data import VisionData
from sparsetrain.errors import DataError

IMAGES = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3) * 8
LABELS = np.array([0, 1, 2, 3, 0], dtype=np.uint8)


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_idx(folder: Path, pack: Callable[[bytes], bytes] = bytes, suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(IMAGES)))
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(LABELS)))
    return folder


def loaded(*arguments: Any, **options: Any) -> VisionData:
    data = VisionData(*arguments, **options)
    data.setup()
    return data


def rows(split: Any) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.tensors[0]}


# ---------------------------------------------------------------- digits and splits


def test_digits_are_the_bundled_ones_each_in_exactly_one_split() -> None:
    data = loaded()
    assert (data.num_classes, data.image_shape) == (10, (1, 8, 8))
    assert [len(s) for s in (data.train_set, data.val_set, data.test_set)] == [1293, 144, 360]
    pixels, labels = load_digits(return_X_y=True)
    everything = torch.cat([s.tensors[0] for s in (data.train_set, data.val_set, data.test_set)]).reshape(1797, 64)
    want = (pixels / 16).astype(np.float32)
    assert sorted(map(bytes, everything.numpy())) == sorted(map(bytes, want))
    label_of = {bytes(row): label for row, label in zip(want, labels, strict=True)}
    for image, label in zip(*data.test_set.tensors, strict=True):
        assert label_of[bytes(image.numpy())] == label
    share = torch.bincount(data.test_set.tensors[1]) / 360
    assert torch.allclose(share, torch.tensor(np.bincount(labels) / 1797).float(), atol=2 / 360)


def test_the_seed_chooses_validation_but_never_test() -> None:
    first, again, other = loaded(seed=0), loaded(seed=0), loaded(seed=1)
    assert rows(first.val_set) == rows(again.val_set) != rows(other.val_set)
    assert torch.equal(first.test_set.tensors[0], other.test_set.tensors[0])


@pytest.mark.parametrize(("validation", "held_out"), [(0, 0), (0.0, 0), (7, 7), (0.5, 718)])
def test_validation_is_a_fraction_or_a_count(validation: float, held_out: int) -> None:
    data = loaded(validation=validation)
    loader = data.val_dataloader()
    assert sum(len(batch[1]) for batch in loader) == held_out
    assert (loader == []) == (held_out == 0)
    assert sum(len(batch[1]) for batch in data.train_dataloader()) == 1437 - held_out


def test_standardize_uses_the_training_images_alone() -> None:
    unit, data = loaded(validation=300), loaded(validation=300, normalize="standardize")
    raw = unit.train_set.tensors[0].double().numpy()
    for split in ("train_set", "val_set", "test_set"):
        want = (getattr(unit, split).tensors[0].double().numpy() - raw.mean()) / raw.std(ddof=1)
        np.testing.assert_allclose(getattr(data, split).tensors[0].numpy(), want, atol=1e-5)
    assert abs(float(data.val_set.tensors[0].mean())) > 1e-4  # twin: it was not centred on itself


def test_batches_are_float32_nchw_and_image_size_resizes() -> None:
    images, labels = next(iter(loaded(batch_size=32, image_size=28).train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((32, 1, 28, 28), torch.float32, torch.int64)
    assert [float(images.amin()) >= 0, float(images.amax()) <= 1] == [True, True]


def test_builds_from_a_configuration() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(VisionData, "data")
    built = parser.instantiate(parser.parse_args(["--data.validation=5000", "--data.normalize=standardize"])).data
    assert (built.validation, type(built.validation), built.normalize) == (5000, int, "standardize")
    assert parser.instantiate(parser.parse_args(["--data.validation=0.2"])).data.validation == 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"validation": -1},
        {"validation": 1.0},
        {"normalize": "none"},
        {"batch_size": 0},
        {"seed": -1},
        {"image_size": 0},
    ],
)
def test_bad_arguments_are_refused_when_built(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        VisionData(**options)


@pytest.mark.parametrize("validation", [1437, 1e-6])
def test_an_unreachable_validation_set_is_refused(validation: float) -> None:
    with pytest.raises(DataError, match="1437 training samples"):
        loaded(validation=validation)


def test_loaders_before_setup_are_refused() -> None:
    with pytest.raises(DataError, match=r"call setup\(\)"):
        VisionData().train_dataloader()


# ---------------------------------------------------------------- MNIST format


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("place", ["root", "parent", "variable", "path"])
def test_idx_folders_are_found_and_read(
    place: str, suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_idx(tmp_path / "mnist", pack, suffix)
    monkeypatch.delenv("SPARSETRAIN_DATA", raising=False)
    if place == "variable":
        monkeypatch.setenv("SPARSETRAIN_DATA", str(tmp_path))
    root = {"root": str(folder), "parent": str(tmp_path)}.get(place)
    data = loaded(str(folder) if place == "path" else "mnist", root, validation=0)
    assert (data.num_classes, data.image_shape) == (4, (1, 2, 3))
    np.testing.assert_array_equal(data.test_set.tensors[0].numpy()[:, 0] * 255, IMAGES)
    np.testing.assert_array_equal(data.train_set.tensors[1].numpy(), LABELS)


def test_a_missing_folder_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_DATA", str(tmp_path / "shared"))
    with pytest.raises(DataError, match="SPARSETRAIN_DATA") as caught:
        loaded("fashion_mnist")
    assert str(tmp_path / "shared" / "fashion_mnist") in str(caught.value)
    with pytest.raises(DataError, match="elsewhere"):
        loaded("mnist", root=str(tmp_path / "elsewhere"))


TRAIN_IMAGES = "train-images-idx3-ubyte"
GOOD = idx_bytes(IMAGES)  # 16 + 30 bytes


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("", GOOD[:-3], "46 bytes expected, 43 bytes found"),
        ("", GOOD + b"x", "46 bytes expected, 47 bytes found"),
        ("", GOOD[:9], "header of 16 bytes expected, 9 bytes found"),
        ("", b"", "0 bytes found"),
        ("", idx_bytes(IMAGES)[:3] + b"\1" + GOOD[4:], "0x00000803 expected, 0x00000801 found"),
        ("", idx_bytes(IMAGES[:0]), "empty, its header says 0 x 2 x 3"),
        ("", idx_bytes(IMAGES[:4]), "4 images.* 5 labels"),
        (".gz", gzip.compress(GOOD)[:-10], "bytes expected, .* bytes found .*fetch the file again"),
        (".gz", b"not gzip at all", "0 bytes found .*fetch the file again"),
        (".gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, "0 bytes found .*CRC check failed"),
        (".xz", lzma.compress(GOOD)[:-30], "bytes found .*fetch the file again"),
        (".xz", b"not xz at all", "0 bytes found .*fetch the file again"),
    ],
    ids=[
        "short",
        "long",
        "header",
        "nothing",
        "magic",
        "empty",
        "count",
        "gz-cut",
        "gz-not",
        "gz-crc",
        "xz-cut",
        "xz-not",
    ],
)
def test_broken_idx_files_are_named(suffix: str, content: bytes, message: str, tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / TRAIN_IMAGES).unlink()
    (tmp_path / (TRAIN_IMAGES + suffix)).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        loaded(str(tmp_path))
    assert TRAIN_IMAGES + suffix in str(caught.value)


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    (write_idx(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="no t10k-labels-idx1-ubyte"):
        loaded(str(tmp_path))


@pytest.mark.skipif("SPARSETRAIN_DATA" not in os.environ, reason="SPARSETRAIN_DATA names no folder with the real MNIST")
def test_the_real_mnist_has_its_published_statistics() -> None:
    data = loaded("mnist", validation=0)
    assert torch.bincount(data.train_set.tensors[1]).tolist()[:3] == [5923, 6742, 5958]
    assert torch.bincount(data.test_set.tensors[1]).tolist()[:3] == [980, 1135, 1032]
    images = data.train_set.tensors[0]
    assert images.shape == (60000, 1, 28, 28)
    assert (round(float(images.mean()), 4), round(float(images.std()), 4)) == (0.1307, 0.3081)


# ---------------------------------------------------------------- Hugging Face


def hub_folder(path: Path, sizes: tuple[int, ...] = (4, 4, 4), splits: tuple[str, ...] = ("train", "test")) -> Path:
    features = datasets.Features({"name": datasets.Value("string"), "img": datasets.Image(), "y": datasets.ClassLabel(3)})
    pictures = [np.full((size, size, 3), [10 * i, 20, 255], dtype=np.uint8) for i, size in enumerate(sizes)]
    columns = {"name": [f"n{i}" for i in range(len(sizes))], "img": pictures, "y": [i % 3 for i in range(len(sizes))]}
    data = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(dict.fromkeys(splits, data)).save_to_disk(str(path))
    return path


def test_a_saved_hugging_face_dataset_is_read(tmp_path: Path) -> None:
    data = loaded(str(hub_folder(tmp_path / "d")), validation=0)
    assert (data.num_classes, data.image_shape) == (3, (3, 4, 4))
    want = np.array([[10 * i, 20, 255] for i in range(3)]) / 255
    np.testing.assert_allclose(data.train_set.tensors[0].numpy()[:, :, 1, 2], want, atol=1e-6)
    assert data.train_set.tensors[1].tolist() == [0, 1, 2]


def test_images_of_several_sizes_need_image_size(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "d", sizes=(4, 5, 6), splits=("train",))
    with pytest.raises(DataError, match="pass image_size="):
        loaded(str(folder), validation=0)
    data = loaded(str(folder), validation=0, image_size=4)
    assert data.train_set.tensors[0].shape == (3, 3, 4, 4)
    assert data.test_dataloader() == []


def test_unusable_hugging_face_folders_say_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"splits.*'test'.*no 'train'"):
        loaded(str(hub_folder(tmp_path / "a", splits=("test",))))
    datasets.Dataset.from_dict({"text": ["x"], "label": [0]}).save_to_disk(str(tmp_path / "b"))
    with pytest.raises(DataError, match="no image column"):
        loaded(str(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        loaded(str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "could not be reached: no route"),
        (datasets.exceptions.DatasetNotFoundError("not there"), "no dataset 'digit'"),
    ],
)
def test_hub_failures_become_clear(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=message) as caught:
        loaded("digit")
    assert "Did you mean 'digits'?" in str(caught.value)


# ---------------------------------------------------------------- parts by class


def test_classes_cut_parts_that_fit_together() -> None:
    whole = loaded(normalize="standardize", seed=3)
    parts = [loaded(normalize="standardize", seed=3, classes=[a, b]) for a, b in ((4, 0), (1, 2), (3, 5), (9, 8), (7, 6))]
    assert [part.classes for part in parts] == [[0, 4], [1, 2], [3, 5], [8, 9], [6, 7]]
    assert whole.classes == list(range(10))
    for split in ("train_set", "val_set", "test_set"):
        rest = rows(getattr(whole, split))
        for part in parts:
            mine = getattr(part, split)
            assert set(mine.tensors[1].tolist()) == set(part.classes)
            assert rows(mine) <= rest
            rest -= rows(mine)
        assert not rest
    assert {part.num_classes for part in parts} == {10}


@pytest.mark.parametrize("classes", [[], [1, 1], [2, 3, 2]])
def test_classes_are_named_once(classes: list[int]) -> None:
    with pytest.raises(DataError, match="give each label to keep once"):
        VisionData("digits", classes=classes)


@pytest.mark.parametrize("unknown", [10, -1])
def test_an_unknown_class_is_told(unknown: int) -> None:
    with pytest.raises(DataError, match=rf"'digits' has no training sample of label {unknown}; it has \[0, 1, 2"):
        loaded(classes=[0, unknown])


def test_a_class_that_only_the_test_set_has_cannot_be_trained(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "odd")
    labels = np.array([0, 1, 2, 7, 0], dtype=np.uint8)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    assert len(loaded(str(folder), classes=[2], validation=0).test_set) == 1
    assert loaded(str(folder), classes=[3], validation=0).test_set is None
    with pytest.raises(DataError, match="no training sample of label 7"):
        loaded(str(folder), classes=[7], validation=0)


def test_settings_of_the_loaders_are_handed_on() -> None:
    data = loaded(batch_size=7, seed=5)
    assert (data.batch_size, data.seed) == (7, 5)
    with pytest.raises(TypeError, match="batches"):
        VisionData("digits", batches=7)
