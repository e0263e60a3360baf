"""The line between two networks, on landscapes whose barrier one knows by hand, and between two runs."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from sparsetrain.connectivity import Barrier, barrier, interpolate
from sparsetrain.data import VisionData
from sparsetrain.errors import MaskStateError, RecipeError
from sparsetrain.recipe import run
from sparsetrain.recipe.connectivity import between


def at(value: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([value])}


def bowl(state: dict[str, Tensor]) -> float:
    return float(state["w"]) ** 2


def double_well(state: dict[str, Tensor]) -> float:
    return (float(state["w"]) ** 2 - 1) ** 2


def test_a_bowl_has_no_barrier() -> None:
    found = barrier(at(2.0), at(-2.0), bowl, points=5)
    assert found == Barrier((0.0, 0.25, 0.5, 0.75, 1.0), (4.0, 1.0, 0.0, 1.0, 4.0), 0.0)
    # Ends of different height: the higher one is above their mean by half the difference.
    assert barrier(at(3.0), at(-1.0), bowl, points=5).barrier == 4.0


def test_a_double_well_has_the_height_of_its_ridge() -> None:
    assert barrier(at(1.0), at(-1.0), double_well, points=5).barrier == 1.0
    assert barrier(at(1.0), at(1.0), double_well, points=5).barrier == 0.0
    # Without a point on the ridge the barrier is seen from beside it: w = -1, -1/3, 1/3, 1 has (1/9 - 1)^2.
    assert barrier(at(1.0), at(-1.0), double_well, points=4).barrier == pytest.approx(64 / 81)


def test_alpha_counts_the_first_network() -> None:
    found = barrier(at(3.0), at(1.0), lambda state: float(state["w"]), points=3)
    assert found.errors == (1.0, 2.0, 3.0)
    assert barrier(at(1.0), at(3.0), lambda state: float(state["w"]), points=3).errors == (3.0, 2.0, 1.0)


@given(st.floats(0.01, 0.99))
def test_whole_numbers_come_from_the_nearer_end_and_floats_in_between(alpha: float) -> None:
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2))
    one(torch.randn(8, 2))
    mixed = interpolate(one.state_dict(), other.state_dict(), alpha)
    assert int(mixed["1.num_batches_tracked"]) == (1 if alpha >= 0.5 else 0)
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        a, b = one.state_dict()[name].double(), other.state_dict()[name].double()
        assert torch.allclose(mixed[name].double(), alpha * a + (1 - alpha) * b, atol=1e-6)


def test_the_ends_are_the_networks_bit_for_bit_and_copies() -> None:
    one, other = {"w": torch.tensor([0.1, 1e30])}, {"w": torch.tensor([1e30, -0.0])}
    for alpha, end in ((1.0, one), (0.0, other)):
        found = interpolate(one, other, alpha)
        assert torch.equal(found["w"].view(torch.int32), end["w"].view(torch.int32))
        found["w"].zero_()
        assert float(end["w"].abs().max()) > 0


def test_a_weight_pruned_in_one_network_is_half_gone_in_the_middle() -> None:
    one, other = {"w": torch.tensor([4.0, 0.0, 0.0])}, {"w": torch.tensor([0.0, 2.0, 0.0])}
    assert interpolate(one, other, 0.5)["w"].tolist() == [2.0, 1.0, 0.0]


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(MaskStateError, match=r"v has shape None in the first, \(1,\) in the other"):
        barrier(at(1.0), at(1.0) | {"v": torch.ones(1)}, bowl)
    with pytest.raises(MaskStateError, match=r"w has shape \(1,\) in the first, \(2,\)"):
        barrier(at(1.0), {"w": torch.ones(2)}, bowl)
    with pytest.raises(RecipeError, match="points=2"):
        barrier(at(1.0), at(1.0), bowl, points=2)
    with pytest.raises(RecipeError, match=r"alpha 1\.5"):
        interpolate(at(1.0), at(1.0), 1.5)
    with pytest.raises(RecipeError, match=r"alpha 0\.5 is no number"):
        barrier(at(1.0), at(-1.0), lambda state: math.nan if float(state["w"]) == 0 else 1.0)


RECIPE = """\
model:
  class_path: Classification
  init_args:
    network: {class_path: MLP, init_args: {in_features: 64, hidden: [16], num_classes: 10}}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}
data: {class_path: VisionData, init_args: {name: digits, batch_size: 100}}
trainer: {max_epochs: 3}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    where: Path = tmp_path_factory.mktemp("runs")
    (where / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsetrain.recipe.directory.write_report", lambda out: out)
        for seed in (1, 2):
            run(where / "tiny.yaml", ["--seed", str(seed)], where / f"seed{seed}")
            found.append(where / f"seed{seed}")
        run(where / "tiny.yaml", ["--model.init_args.network.init_args.hidden", "[8]"], where / "other")
    return [*found, where / "other"]


def test_two_runs_have_the_errors_they_report_at_the_ends(runs: list[Path], tmp_path: Path) -> None:
    out, text = tmp_path / "out", io.StringIO()
    found = between(runs[0], runs[1], out, points=3, console=Console(file=text, width=100))
    reported = [json.loads((directory / "metrics.json").read_text())["final"]["test/accuracy"] for directory in runs[:2]]
    assert found.errors[-1] == pytest.approx(1 - reported[0])
    assert found.errors[0] == pytest.approx(1 - reported[1])
    states = [torch.load(r / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"] for r in runs[:2]]
    layers = [
        {n: (states[0][n] + states[1][n]) / 2 for n in states[0]}[f"network.fc{i}.{kind}"]
        for i in (1, 2)
        for kind in ("weight", "bias")
    ]
    data = VisionData("digits")
    data.setup()
    assert data.test_set is not None
    x, y = data.test_set.tensors
    logits = torch.relu(x.flatten(1) @ layers[0].T + layers[1]) @ layers[2].T + layers[3]
    assert found.errors[1] == pytest.approx(float((logits.argmax(1) != y).float().mean()))
    assert found.barrier > 0.1  # two seeds share no basin
    record = json.loads((out / "barrier.json").read_text())
    assert record["barrier"] == found.barrier
    assert record["metric"] == "error"
    assert record["batch_norm_interpolated"] is False
    assert (out / "barrier.png").read_bytes().startswith(b"\x89PNG")
    assert f"barrier {found.barrier:.4f}" in text.getvalue()
    assert "BatchNorm" not in text.getvalue()


def test_a_run_and_itself_have_no_barrier(runs: list[Path]) -> None:
    found = between(runs[0], runs[0], points=3, console=Console(file=io.StringIO()))
    assert found.errors[0] == found.errors[2]
    assert found.barrier == pytest.approx(0.0, abs=1e-9)


def test_runs_that_cannot_be_joined_are_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MaskStateError, match="another model"):
        between(runs[0], runs[2])
    with pytest.raises(RecipeError, match="no run directory"):
        between(runs[0], tmp_path)
