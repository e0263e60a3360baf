"""What a run leaves behind, that config.yaml alone repeats it, and that overrides reach every depth."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sparsetrain.masks import load_masks
from sparsetrain.recipe.quiet import quiet
from tests.recipes.conftest import Cli

FILES = {
    "config.yaml",
    "metrics.json",
    "history.jsonl",
    "masks.safetensors",
    "report.html",
    "checkpoints/dense.ckpt",
    "checkpoints/last.ckpt",
    "checkpoints/final.ckpt",
}
KEYS = {
    "dense": dict,
    "final": dict,
    "best": type(None),
    "sparsity": dict,
    "layers": list,
    "verified": bool,
    "changes": list,
    "seconds": dict,
    "versions": dict,
    "seed": int,
    "command": str,
}
LAYER_KEYS = {"name", "shape", "pattern", "asked", "actual", "ok"}
SCHEDULE = "--method.init_args.schedule.init_args"


def weights(out: str) -> dict[str, torch.Tensor]:
    return dict(torch.load(Path(out) / "checkpoints/final.ckpt", weights_only=True)["state_dict"])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(out: str) -> dict[str, Any]:
    return dict(json.loads((Path(out) / "metrics.json").read_text(encoding="utf-8")))


def test_a_run_directory_has_what_others_read(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, "--out", "out")
    assert (ended.code, ended.err) == (0, "")
    assert {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()} == FILES
    found = metrics("out")
    assert {key: type(found[key]) for key in KEYS} == KEYS
    assert all(layer.keys() >= LAYER_KEYS for layer in found["layers"])
    # 64*16 + 16*16 weights, 10*16 more in the head, which stays dense by default; 0.8 of them, rounded down.
    assert (found["sparsity"]["prunable"], found["sparsity"]["kept"]) == (1280, 1280 - 1024)
    assert found["verified"] is True
    assert found["sparsity"]["asked"] == pytest.approx(0.8)
    assert {change["step"] for change in found["changes"]} == {5, 9, 13}
    assert found["dense_from"] == "end of the dense phase (step 5)"
    masks = load_masks(Path("out/masks.safetensors"))
    final = weights("out")
    assert sum(int((~mask).sum()) for mask in masks.values()) == 1024
    assert all(bool((final[name][~mask] == 0).all()) for name, mask in masks.items())


def test_config_yaml_alone_repeats_the_run(tiny: Path, cli: Cli) -> None:
    options = ["--method.pattern", "2:4", "--method.allocation", "uniform", "--method.sparsity", "null"]
    for name, changed in {"a": [], "b": [*options, "--method.schedule", "null", "--seed", "7"]}.items():
        assert cli("run", tiny, *changed, "--out", name).code == 0
        assert cli("run", f"{name}/config.yaml", "--out", f"{name}2").code == 0
        assert same(weights(name), weights(f"{name}2"))
        assert Path(name, "config.yaml").read_bytes() == Path(f"{name}2", "config.yaml").read_bytes()
        assert Path(name, "history.jsonl").read_bytes() == Path(f"{name}2", "history.jsonl").read_bytes()
    assert not same(weights("a"), weights("b"))
    assert metrics("b")["layers"][0]["pattern"] == "2:4"


def test_another_seed_is_another_run(tiny: Path, cli: Cli) -> None:
    for seed in (3, 4):
        assert cli("run", tiny, "--seed", seed, "--out", f"seed{seed}").code == 0
    assert not same(weights("seed3"), weights("seed4"))


OVERRIDES: dict[str, tuple[list[str], str, object]] = {
    "top": (["--seed", "9"], "seed", 9),
    "method": (["--method.init_args.sparsity", "0.5"], "method.init_args.sparsity", 0.5),
    "method, short": (["--method.sparsity", "0.5"], "method.init_args.sparsity", 0.5),
    "equals sign": (["--method.sparsity=0.5"], "method.init_args.sparsity", 0.5),
    "schedule": ([f"{SCHEDULE}.rounds", "2"], "method.init_args.schedule.init_args.rounds", 2),
    "schedule, short": (["--method.schedule.rounds", "2"], "method.init_args.schedule.init_args.rounds", 2),
    "null, deep": (["--method.schedule.rounds", "null"], "method.init_args.schedule.init_args.rounds", None),
    "another schedule": (
        ["--method.schedule", "Cubic", "--method.schedule.end", "50%"],
        "method.init_args.schedule.init_args.end",
        "50%",
    ),
    "pattern": (["--method.pattern", "2:4"], "method.init_args.pattern", "2:4"),
    "no method": (["--method", "null"], "method", None),
    "data": (["--data.batch_size", "64"], "data.init_args.batch_size", 64),
    "trainer": (["--trainer.max_epochs", "5"], "trainer.max_epochs", 5),
    "number with exponent": (["--model.optimizer.lr", "1e-3"], "model.init_args.optimizer.init_args.lr", 0.001),
    "networks": (["--model.network.hidden", "[8, 4]"], "model.init_args.network.init_args.hidden", [8, 4]),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_reach_every_depth(name: str, tiny: Path, cli: Cli) -> None:
    options, key, value = OVERRIDES[name]
    ended = cli("run", tiny, *options, "--print_config", "--out", "out")
    assert ended.code == 0, ended.err
    found: Any = yaml.safe_load(ended.out)
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert not Path("out").exists()


def test_the_dense_twin_is_the_same_recipe_without_its_method(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--dense_twin", "true", "--out", "out").code == 0
    assert cli("run", tiny, "--method", "null", "--out", "alone").code == 0
    assert cli("run", tiny, "--out", "single").code == 0
    assert same(weights("out/dense"), weights("alone"))
    # A twin moves no random stream of the run itself.
    assert same(weights("out"), weights("single"))
    assert metrics("out")["dense"] == metrics("alone")["final"]
    assert metrics("out")["dense_from"].startswith("dense twin")


def test_a_run_prints_what_a_user_needs_and_no_more(tiny: Path) -> None:
    """In a process of its own: Lightning writes its tips through handlers made when it is imported."""
    command = [sys.executable, "-m", "sparsetrain.cli", "run", str(tiny), "--out", "out"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "epoch 2/2" in ended.stdout
    assert "verified" in ended.stdout
    assert "out/report.html" in ended.stdout
    assert len(ended.stdout.splitlines()) < 30


def test_only_expected_warnings_are_silenced() -> None:
    logger = logging.getLogger("lightning.pytorch")
    with quiet():
        warnings.warn("The loader does not have many workers", stacklevel=1)
        with pytest.raises(UserWarning, match="something is wrong"):
            warnings.warn("something is wrong", stacklevel=1)
        assert logger.isEnabledFor(logging.WARNING)
        assert not logger.isEnabledFor(logging.INFO)
    assert logger.isEnabledFor(logging.INFO)


def test_flops_of_a_shortened_model_are_compared_with_the_whole_one(tiny: Path, cli: Cli) -> None:
    text = tiny.read_text(encoding="utf-8")
    text = text.replace(
        "{class_path: MLP, init_args: {in_features: 64, hidden: [16, 16], num_classes: 10}}",
        "{class_path: SmallResNet, init_args: {depth: 20, widths: [2, 2, 2], in_channels: 1}}",
    )
    text = text[: text.index("method:")] + "trainer: {max_epochs: 1, limit_train_batches: 6}\n"
    tiny.write_text(text, encoding="utf-8")
    removal = "[{class_path: DepthPruning, init_args: {blocks: 1, start: 2st, end: 3st, batches: 1}}]"
    found = []
    for out, more in {"whole": [], "short": ["--callbacks", removal]}.items():
        ended = cli("run", tiny, *more, "--out", out)
        assert ended.code == 0, ended.err
        found.append(json.loads(Path(out, "metrics.json").read_text()))
    whole, short = found
    assert list(short["method"]["removed"].values()) == ["deleted"]
    assert short["flops"]["dense"] == whole["flops"]["dense"] == whole["flops"]["sparse"]
    (block,) = short["method"]["removed"]
    side = 8 // 2 ** (int(block[len("network.layer")]) - 1)  # images of 8 x 8, halved from stage to stage
    # two convolutions of 3 x 3 from 2 to 2 channels, a multiply and an add at every pixel
    assert short["flops"]["dense"] - short["flops"]["sparse"] == 2 * (2 * 9 * 2 * 2) * side**2


def test_a_shortened_network_is_the_start_of_another_run(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parents[2] / "recipes" / "digits_depth.yaml"
    short = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "6", "--data.batch_size", "20"]
    small = ["--model.network.widths", "[4,4]", "--model.network.depth", "14"]
    assert cli("run", recipe, *short, *small, "--out", "short").code == 0
    removed = metrics("short")["method"]["removed"]
    assert len(removed) == 3
    method = ["--callbacks", "[]", "--method", '{"class_path": "PruneFinetune", "init_args": {"sparsity": 0.5}}']
    ended = cli(
        "run", recipe, *short, *small, *method, "--method.schedule", "OneShot", "--init_from", "short", "--out", "sparse"
    )
    assert ended.code == 0, ended.err
    names = {layer["name"] for layer in metrics("sparse")["layers"]}
    assert len(names) == 1 + 2 * (6 - 3)
