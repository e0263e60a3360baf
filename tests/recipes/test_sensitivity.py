"""The commands `sensitivity` and `predict` on a tiny recipe: what they leave, reuse, and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.allocation import Fixed, get_allocation
from sparsetrain.recipe import predict as predicting
from sparsetrain.recipe.measure import Bench, short
from sparsetrain.recipe.predict import Measurements, predict
from sparsetrain.recipe.sensitivity import sensitivity
from sparsetrain.report.sensitivity import plot_prediction, plot_scan, shorter
from tests.recipes.conftest import Cli

pytestmark = pytest.mark.usefixtures("no_report")
PNG = b"\x89PNG"


def read(path: str) -> dict[str, Any]:
    return dict(json.loads(Path(path).read_text(encoding="utf-8")))


def test_a_scan_of_a_recipe(tiny: Path, cli: Cli) -> None:
    ended = cli("sensitivity", tiny, "--units", "--parameters", "4", "--out", "out")
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert "dense twin" in ended.out
    assert "scan: out/sensitivity.json" in ended.out
    assert "plot: out/sensitivity.png" in ended.out
    assert "validation set" in ended.out
    found = read("out/sensitivity.json")
    kinds = {(row["name"], row["pattern"]) for row in found["rows"]}
    assert kinds == {(f"network.fc{i}.weight", pattern) for i in (1, 2) for pattern in ("unstructured", "neurons")}
    # 7 sparsities of weights each; of 16 neurons every one of them prunes at least one
    assert len(found["rows"]) == 28
    assert {"loss", "accuracy"} == found["baseline"].keys()
    assert [row["count"] for row in found["parameters"]] == [4, 4]
    assert all(row["derivative_error"] < 1e-5 for row in found["parameters"])
    assert Path("out/sensitivity.png").read_bytes().startswith(PNG)
    # what is measured unpruned is what the dense twin was validated with
    history = [json.loads(line) for line in Path("out/dense/history.jsonl").read_text().splitlines()]
    assert found["baseline"]["loss"] == pytest.approx([row["val/loss"] for row in history if "val/loss" in row][-1], abs=1e-6)


def test_the_twin_is_trained_once_and_a_scan_allocates(tiny: Path, cli: Cli) -> None:
    assert cli("sensitivity", tiny, "--out", "out", "--batches", "1").code == 0
    first = Path("out/dense/checkpoints/final.ckpt").stat().st_mtime_ns
    again = cli("sensitivity", tiny, "--out", "out")
    assert (again.code, "dense twin" in again.out) == (0, False)
    assert Path("out/dense/checkpoints/final.ckpt").stat().st_mtime_ns == first
    scanned = read("out/sensitivity.json")
    from_run = cli("sensitivity", tiny, "--init_from", "out/dense", "--out", "other")
    assert (from_run.code, Path("other/dense").exists()) == (0, False)
    assert read("other/sensitivity.json") == scanned
    ended = cli("run", tiny, "--method.allocation", "sensitivity:out/sensitivity.json", "--out", "run")
    assert ended.code == 0, ended.err
    assert read("run/metrics.json")["sparsity"]["kept"] == 1280 - 1024


def test_a_directory_that_cannot_be_is_refused_before_anything_is_measured(tiny: Path, cli: Cli) -> None:
    Path("out").write_text("a file", encoding="utf-8")
    ended = cli("sensitivity", tiny, "--out", "out")
    assert (ended.code, "dense twin" in ended.out) == (2, False)
    assert "--out out cannot be a directory" in ended.err


@pytest.mark.filterwarnings("ignore:Total length of `list`")  # Lightning, of a run without validation
def test_the_test_set_where_there_is_no_validation(tiny: Path) -> None:
    found, _, _ = sensitivity(tiny, ["--data.validation", "0"], Path("out"), batches=1, progress=False)
    assert found.evaluated_on == "test set, 1 batch"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sensitivity", "tiny.yaml", "--method", "null"], "the recipe has no method"),
        (["sensitivity", "tiny.yaml", "--data", "null"], "the recipe names no data"),
        (["sensitivity", "tiny.yaml", "--batches", "0"], "--batches 0: measuring needs at least 1 batch"),
        (["sensitivity", "tiny.yaml", "--parameters", "1"], "--parameters 1"),
        (["sensitivity", "tiny.yaml", "--init_from", "nowhere"], "'nowhere' is no file"),
        (["sensitivity", "tiny.yaml", "--unit"], "unit"),
        (["sensitivity", "tiny.yaml", "--method.criterion", "taylor"], "Taylor scores from data that a scan does not stream"),
        (["sensitivity"], "the recipe comes first"),
        (["predict", "tiny.yaml", "--samples", "7"], "7 samples are too few"),
        (["predict", "tiny.yaml", "--samples", "0"], "--samples 0"),
        (["predict", "tiny.yaml", "--budget", "98", "--samples", "16"], "98.0 percent is 0.98"),
        (["predict", "tiny.yaml", "--budget", "0", "--samples", "16"], "--budget 0 prunes nothing"),
        (["predict", "tiny.yaml", "--steps", "many"], "many"),
        (["predict", "tiny.yaml", "--budget", "0.9999", "--samples", "16"], "cannot be reached"),
        (["predict", "tiny.yaml", "--method.pattern", "2:4", "--samples", "16"], "2:4"),
        (["predict", "tiny.yaml", "--method.overrides", "{fc1: {sparsity: 0.5}}"], "fc1.weight has a sparsity of its own"),
    ],
)
def test_what_is_refused_in_one_line(arguments: list[str], told: str, tiny: Path, cli: Cli) -> None:
    ended = cli(*arguments, *(["--out", "out"] if len(arguments) > 1 else []))
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert told in ended.err
    # nothing was trained for it
    assert not Path("out").exists()


def test_data_without_batches_to_measure_on_are_refused(tiny: Path, cli: Cli) -> None:
    tiny.write_text(
        tiny.read_text()
        .replace("class_path: VisionData", "class_path: tests.recipes.extension.BlankImages")
        .replace("init_args: {name: digits, batch_size: 100}", "init_args: {count: 4}")
        .replace("in_features: 64", "in_features: 784")
    )
    ended = cli("sensitivity", tiny, "--out", "out")
    assert ended.code == 2
    assert "BlankImages gives Classification neither validation nor test batches" in ended.err


def _named(found: dict[str, Any]) -> list[dict[str, float]]:
    return [p["layers"] for p in found["points"] if p["group"] in ("uniform", "erk", "global", "lamp")]


def options(**more: Any) -> dict[str, Any]:
    return {"samples": 16, "steps": 3, "progress": False} | more


@pytest.fixture
def twin(tiny: Path) -> Path:
    sensitivity(tiny, (), Path("out"), batches=1, progress=False)
    return tiny


def test_a_prediction_is_readable_by_fixed_and_goes_on(twin: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Measurements._measure
    made: list[int] = []

    def count(self: Measurements, layers: Any) -> dict[str, float]:
        made.append(1)
        if len(made) == 9:
            raise KeyboardInterrupt
        return plain(self, layers)

    monkeypatch.setattr(Measurements, "_measure", count)
    with pytest.raises(KeyboardInterrupt):
        predict(twin, (), Path("out"), 0.9, **options())
    path = Path("out/measurements.jsonl")
    assert path.read_text().count("\n") == 8
    path.write_text(path.read_text() + '{"setting": "cut')  # killed while it wrote
    found, data, picture = predict(twin, (), Path("out"), 0.9, **options())
    assert (data, picture.read_bytes()[:4]) == (Path("out/allocation.json"), PNG)
    # 16 samples and 4 named ones, one of them interrupted, and up to three that searches found
    assert 21 <= len(made) <= 24
    made.clear()
    again, _, _ = predict(twin, (), Path("out"), 0.9, **options())
    assert (again, made) == (found, [])
    monkeypatch.setattr(Measurements, "_measure", plain)
    # an uninterrupted one, elsewhere, from the same weights
    whole, _, _ = predict(twin, ["--init_from", "out/dense"], Path("whole"), 0.9, **options())
    assert [p["loss"] for p in whole["points"]] == [p["loss"] for p in found["points"]]
    assert whole["layers"] == found["layers"]
    groups = [p["group"] for p in found["points"]]
    assert groups.count("held out") == 4
    # 12 samples, 4 named ones, and what searches found
    assert found["fitted"] == groups.count("fitted") + 4 + (found["points"][-5]["layers"] not in _named(found))
    assert set(groups) == {"fitted", "held out", "found", "uniform", "erk", "global", "lamp"}
    by_group = {p["group"]: p["loss"] for p in found["points"]}
    assert by_group[found["chosen"]] == min(by_group[g] for g in ("found", "uniform", "erk", "global", "lamp"))
    ended = cli("run", twin, "--method.allocation", f"fixed:{data}", "--method.sparsity", "0.9", "--out", "run")
    assert ended.code == 0, ended.err
    layers = {row["name"]: row["actual"] for row in read("run/metrics.json")["layers"]}
    assert layers == pytest.approx(found["layers"])
    assert read("run/metrics.json")["sparsity"]["kept"] == 128
    assert isinstance(get_allocation(f"fixed:{data}"), Fixed)


def test_the_command_predicts(twin: Path, cli: Cli) -> None:
    arguments = ("--out", "out", "--samples", "16", "--steps", "0", "--batches", "1", "--budget", "0.95")
    ended = cli("predict", twin, *arguments)
    assert (ended.code, ended.err) == (0, ""), ended.err
    for told in ("allocation: out/allocation.json", "plot: out/prediction.png", "held out", "uniform", "erk", "found"):
        assert told in ended.out
    assert read("out/allocation.json")["sparsity"] == 0.95


def test_measuring_leaves_the_model_and_repeats_itself(twin: Path) -> None:
    bench = Bench(twin, (), Path("out"))
    measured = Measurements(bench, Path("fresh"), steps=4)
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    layers = get_allocation("erk")(bench.shares(), 0.9)
    one, two = measured._measure(layers), measured._measure(layers)
    assert one == two
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())
    # recovery recovers: without it the loss is higher
    assert Measurements(bench, Path("fresh"), steps=0)._measure(layers)["loss"] > one["loss"]
    # another number of steps is another measurement
    assert Measurements(bench, Path("fresh"), steps=5).setting != measured.setting


def test_recovery_trains_at_a_constant_tenth_of_the_rate(twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    plain = predicting._Recovery.on_fit_end

    def note(self: Any, trainer: Any, module: Any) -> None:
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        plain(self, trainer, module)

    monkeypatch.setattr(predicting._Recovery, "on_fit_end", note)
    bench = Bench(twin, ["--init_from", "out/dense", "--model.lr_schedule", "cosine", "--model.warmup", "0.5"], Path("x"))
    Measurements(bench, Path("fresh"), steps=4)._measure(get_allocation("erk")(bench.shares(), 0.5))
    assert rates == [pytest.approx(0.01)]


def test_names() -> None:
    assert [short(n) for n in ("val/loss", "test_loss", "loss", "val/accuracy/dataloader_idx_0")] == [
        "loss",
        "loss",
        "loss",
        "accuracy",
    ]
    assert shorter(["net.a.fc.weight", "net.b.fc.weight"]) == ["a.fc", "b.fc"]
    assert shorter(["net.fc.weight"]) == ["net.fc"]
    assert shorter(["a.weight", "a.b.weight"]) == ["a", "a.b"]


def test_plots_of_hard_cases(tmp_path: Path) -> None:
    rows = [
        {"name": "a", "pattern": "2:4", "sparsity": 0.5, "pruned": 1, "numel": 2, "loss": 1.0, "metrics": {}},
        {"name": "b", "pattern": "unstructured", "sparsity": 0.9, "pruned": 1, "numel": 2, "loss": None, "metrics": {}},
    ]
    content: dict[str, Any] = {"baseline": {"loss": 1.0}, "rows": rows, "evaluated_on": "", "parameters": []}
    assert plot_scan(content, tmp_path / "new" / "a.png").read_bytes().startswith(PNG)
    point: Callable[[str, float], dict[str, Any]] = lambda group, loss: {"group": group, "predicted": loss, "loss": loss}  # noqa: E731
    points = [point("fitted", 0.1), point("held out", 9.0), point("found", 0.1), point("erk", 0.2)]
    found = {"points": points, "sparsity": 0.9, "rank_correlation": None, "evaluated_on": "test set"}
    assert plot_prediction(found, tmp_path / "b.png").read_bytes().startswith(PNG)
