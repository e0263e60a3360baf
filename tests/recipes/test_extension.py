"""Room to grow: a criterion, a pattern, a schedule and a method from outside the package, named by class path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsetrain.masks import load_masks
from tests.recipes.conftest import Cli
from tests.recipes.test_run import metrics

pytestmark = pytest.mark.usefixtures("no_report")

HERE = "tests.recipes.extension"


def test_a_criterion(tiny: Path, cli: Cli) -> None:
    once = "--method.schedule={class_path: OneShot, init_args: {at: 5st}}"
    one = ["--method.allocation", "uniform", once]
    assert cli("run", tiny, *one, "--method.criterion", f"{HERE}.Largest", "--out", "largest").code == 0
    assert cli("run", tiny, *one, "--out", "magnitude").code == 0
    dense = torch.load("largest/checkpoints/dense.ckpt", weights_only=True)["state_dict"]
    for out, largest_dies in (("largest", True), ("magnitude", False)):
        assert metrics(out)["verified"] is True
        for name, mask in load_masks(Path(out, "masks.safetensors")).items():
            kept, died = dense[name].abs()[mask], dense[name].abs()[~mask]
            assert bool(kept.max() <= died.min()) if largest_dies else bool(kept.min() >= died.max())


def test_a_pattern(tiny: Path, cli: Cli) -> None:
    pattern = ["--method.pattern", f"{HERE}.Checkerboard", "--method.sparsity", "0.5"]
    once = "--method.schedule={class_path: OneShot, init_args: {at: 5st}}"
    assert cli("run", tiny, *pattern, "--method.allocation", "uniform", once, "--out", "out").code == 0
    masks = load_masks(Path("out/masks.safetensors"))
    assert masks["network.fc2.weight"][:2, :4].tolist() == [[True, False, True, False], [False, True, False, True]]
    assert metrics("out")["verified"] is True
    assert cli("verify", "out").code == 0


def test_a_schedule(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--method.schedule", f"{HERE}.Halves", "--method.schedule.second", "8", "--out", "o").code == 0
    steps: dict[int, int] = {}
    for change in metrics("o")["changes"]:
        steps[change["step"]] = steps.get(change["step"], 0) + change["died"]
    # 0.4 and 0.8 of 1280 weights.
    assert steps == {4: 512, 8: 512}


def test_a_method(tiny: Path, cli: Cli) -> None:
    method = f"{{class_path: {HERE}.PruneAtStep, init_args: {{sparsity: 0.75, step: 6}}}}"
    assert cli("run", tiny, "--method", method, "--out", "out").code == 0
    assert cli("verify", "out").code == 0
    found = metrics("out")
    assert found["sparsity"]["actual"] == 0.75
    assert {change["step"] for change in found["changes"]} == {6}
    assert (found["verified"], found["sparsity"]["asked"]) == (True, None)


def test_a_method_that_is_none_is_refused(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, "--method", f"{HERE}.Largest", "--out", "out")
    assert ended.code == 2
    assert "Largest" in ended.err


@pytest.mark.parametrize("where", ["weights", "mask", "masks file"])
def test_verify_finds_one_wrong_weight(where: str, tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--out", "out").code == 0
    checkpoint = Path("out/checkpoints/final.ckpt")
    for path in ("out", checkpoint):
        ended = cli("verify", path)
        assert ended.code == 0
        assert "verified: 2 tensors, sparsity 0.8000" in ended.out
    content = torch.load(checkpoint, weights_only=True)
    name = "network.fc1.weight"
    if where == "weights":
        dead = (~load_masks(Path("out/masks.safetensors"))[name]).nonzero()[0]
        content["state_dict"][name][tuple(dead)] = 1e-30
    elif where == "mask":
        state = next(value for value in content["callbacks"].values() if "masks" in value)
        entry = state["masks"]["tensors"][name]
        entry["sparsity"] = [1, 2]
    else:
        assert cli("run", tiny, "--seed", "5", "--out", "other").code == 0
        Path("out/masks.safetensors").write_bytes(Path("other/masks.safetensors").read_bytes())
    torch.save(content, checkpoint)
    ended = cli("verify", "out")
    assert ended.code == 1
    assert f"broken: {name}" in ended.out
    assert cli("verify", checkpoint).code == (0 if where == "masks file" else 1)


def test_verify_a_foreign_checkpoint(tiny: Path, cli: Cli) -> None:
    weight = torch.arange(1.0, 33.0).view(4, 8)
    weight[:, ::2] = 0
    torch.save({"fc.weight": weight, "bias": torch.zeros(4)}, "half.pt")
    torch.save({"fc.weight": weight.T.contiguous()}, "transposed.pt")
    torch.save({"fc.weight": torch.ones(4, 8)}, "dense.pt")
    ended = cli("verify", "half.pt")
    assert ended.code == 2
    assert "--pattern" in ended.err
    assert cli("verify", "half.pt", "--pattern", "2:4").code == 0
    # Layers that store inputs first (transformers' Conv1D) hold their groups the other way.
    assert cli("verify", "transposed.pt", "--pattern", "2:4").code == 0
    assert cli("verify", "half.pt", "--pattern", "unstructured").code == 0
    assert cli("verify", "half.pt", "--pattern", "1:4").code == 1
    assert cli("verify", "dense.pt", "--pattern", "2:4").code == 2
    assert cli("verify", "nothing.pt").code == 2
