"""Recorded experiments: a recipe over seeds, interrupted and continued, into a file whose claims follow from its numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.recipe import jobs as module
from sparsetrain.recipe.experiment import experiment_jobs, load_experiment
from sparsetrain.recipe.record import record
from sparsetrain.report.results import check_result, load_result, results_markdown
from tests.recipes.conftest import Cli

pytestmark = pytest.mark.usefixtures("no_report")

EXPERIMENT = """\
question: Does pruning hurt?
recipe: ../tiny.yaml
seeds: [0, 1]
model: MLP
data: digits
rows:
  - {method: dense, overrides: {method: null}, published: null, source: null, goal: null}
  - method: PruneFinetune
    overrides: {method.pattern: 2:4, method.sparsity: null, method.schedule: null, method.allocation: uniform}
    published: 5
    source: somebody
    goal: 100
"""


@pytest.fixture
def experiment(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment on the tiny recipe; its runs go through the command line, but in this process."""
    from sparsetrain.cli import main

    class Done:
        stderr = "the run's own message"

        def __init__(self, code: int) -> None:
            self.returncode = code

    def call(command: list[str], **options: Any) -> Done:
        assert command[1:3] == ["-m", "sparsetrain.cli"]
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        with pytest.raises(SystemExit) as ended:
            main(command[3:])
        return Done(int(ended.value.code or 0))

    monkeypatch.setattr(module.subprocess, "run", call)
    path = tiny.parent / "experiments" / "tiny_pruning.yaml"
    path.parent.mkdir()
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


def test_an_experiment_is_recorded(experiment: Path, cli: Cli) -> None:
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert ended.code == 0, ended.err
    result = load_result(Path("results/tiny_pruning.json"))
    assert check_result(result) == []
    dense, pruned = result["rows"]
    assert (dense["sparsity"], dense["pattern"], dense["met"]) == (0, "dense", None)
    assert (pruned["sparsity"], pruned["pattern"], pruned["met"]) == (0.5, "2:4", True)
    assert result["command"].endswith("experiments/tiny_pruning.yaml")
    for index, row in enumerate(result["rows"]):
        runs = [json.loads(Path(f"work/tiny_pruning/row{index}-seed{s}/metrics.json").read_text()) for s in (0, 1)]
        errors = [100 - 100 * run["final"]["test/accuracy"] for run in runs]
        assert row["values"] == pytest.approx(errors, abs=1e-3)
        assert [run["seed"] for run in runs] == [0, 1]


def test_an_interrupted_experiment_goes_on(experiment: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("record", experiment, "--work", "whole", "--results", "whole").code == 0
    through, started = module.subprocess.run, []

    def break_off(command: list[str], **options: Any) -> object:
        started.append(command)
        if len(started) == 3:
            # Killed before its first checkpoint.
            Path(command[command.index("--out") + 1]).mkdir(parents=True)
            Path(command[command.index("--out") + 1], "config.yaml").write_text("seed: 0", encoding="utf-8")
            raise KeyboardInterrupt
        return through(command, **options)

    monkeypatch.setattr(module.subprocess, "run", break_off)
    assert cli("record", experiment, "--work", "work", "--results", "results").code == 130
    assert len(started) == 3
    assert not Path("results").exists()
    assert cli("record", experiment, "--work", "work", "--results", "results").code == 0
    assert len(started) == 3 + 2
    results = [load_result(Path(where, "tiny_pruning.json"))["rows"] for where in ("whole", "results")]
    assert results[0] == results[1]


def test_a_failing_run_stops_the_experiment(experiment: Path, cli: Cli) -> None:
    experiment.write_text(EXPERIMENT.replace("goal: 100", "goal: 100\n").replace("2:4", "2:7"), encoding="utf-8")
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert ended.code == 2
    assert "the run's own message" in ended.err
    assert not Path("results").exists()


LINKED = """\
question: Can a row start where another ended?
recipe: ../tiny.yaml
seeds: [0]
model: MLP
data: digits
stages:
  - {name: start, overrides: {method: null}}
rows:
  - {name: dense, method: dense, overrides: {method: null}, published: null, source: null, goal: null}
  - method: from there
    overrides: {init_from: "@start"}
    published: null
    source: null
    goal: {row: dense, plus: 100}
  - method: kept weights of the first layer
    overrides: {init_from: "@start"}
    value: layers.0.kept
    metric: weights kept
    higher_is_better: true
    published: null
    source: null
    goal: 1
"""


def test_stages_links_shared_runs_and_other_values(experiment: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment.write_text(LINKED, encoding="utf-8")
    through, started = module.subprocess.run, []

    def count(command: list[str], **options: Any) -> object:
        started.append(command)
        return through(command, **options)

    monkeypatch.setattr(module.subprocess, "run", count)
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert ended.code == 0, ended.err
    # The stage and the dense row are the same run, and so are the other two rows.
    assert len(started) == 2
    assert started[1][started[1].index("--init_from") + 1] == str(Path("work/tiny_pruning/start-seed0").absolute())
    result = load_result(Path("results/tiny_pruning.json"))
    assert check_result(result) == []
    dense, linked, kept = result["rows"]
    assert linked["goal"] == pytest.approx(dense["mean"] + 100)
    layers = json.loads(Path("work/tiny_pruning/row1-seed0/metrics.json").read_text())["layers"]
    assert kept["values"] == [layers[0]["kept"]]
    assert (kept["metric"], kept["higher_is_better"], kept["met"]) == ("weights kept", True, True)


def test_rows_may_differ_by_seed_and_stages_do_not(experiment: Path) -> None:
    text = LINKED.replace("seeds: [0]", "seeds: [0, 1]\nby_seed: {1: {data.batch_size: 50}}")
    experiment.write_text(text, encoding="utf-8")
    jobs, owners = experiment_jobs(load_experiment(experiment), experiment, Path("work"))
    by_out = {job.out.name: " ".join(job.command) for job in jobs}
    assert [
        ("--data.batch_size 50" in by_out[name]) for name in ("start-seed0", "start-seed1", "row1-seed0", "row1-seed1")
    ] == [
        False,
        False,
        False,
        True,
    ]
    assert owners["row1", 1].name == "row1-seed1"


CURVES = """\
curves:
  - title: What died when
    list: changes
    x: step
    y: died
    x_label: step
    y_label: weights
    lines: {pruned: pruned}
"""


def test_curves_are_recorded_and_drawn(experiment: Path, cli: Cli) -> None:
    experiment.write_text(
        EXPERIMENT.replace("  - method: Prune", "  - name: pruned\n    method: Prune") + CURVES, encoding="utf-8"
    )
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert ended.code == 0, ended.err
    result = load_result(Path("results/tiny_pruning.json"))
    runs = [json.loads(Path(f"work/tiny_pruning/row1-seed{s}/metrics.json").read_text()) for s in (0, 1)]
    [line] = result["curves"][0]["lines"]
    died = [[change["died"] for change in run["changes"]] for run in runs]
    assert len(died[0]) > 1
    assert line["mean"] == [(a + b) / 2 for a, b in zip(*died, strict=True)]
    assert line["x"] == [change["step"] for change in runs[0]["changes"]]
    first = Path("results/tiny_pruning.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert cli("record", experiment, "--work", "work", "--results", "results").code == 0
    assert Path("results/tiny_pruning.png").read_bytes() == first
    assert "](recipes/results/tiny_pruning.png)" in results_markdown([Path("results/tiny_pruning.json")])


def test_a_curve_of_nobody_is_refused(experiment: Path, cli: Cli) -> None:
    experiment.write_text(EXPERIMENT + CURVES, encoding="utf-8")
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert (ended.code, "curves names 'pruned'" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"@start"', '"@strat"', "Did you mean 'start'"),
        ("row: dense", "row: dens", "rows[1].goal names row 'dens'; rows before it are dense"),
        ("value: layers.0.kept", "value: layers.9.kept", "'layers.9.kept'"),
        ("{name: start, overrides", "{name: start, command: fly, overrides", "'fly' is unknown"),
        ("{name: start, overrides: {method: null}}", "{name: start}", "stages[0] lacks overrides"),
    ],
)
def test_links_that_lead_nowhere(old: str, new: str, told: str, experiment: Path, cli: Cli) -> None:
    assert LINKED.count(old)
    experiment.write_text(LINKED.replace(old, new), encoding="utf-8")
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert ended.code == 2
    assert told in ended.err
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("seeds: [0, 1]", "seeds: []"), "seeds"),
        (("question: Does pruning hurt?\n", ""), "question"),
        (("goal: 100", "gaol: 100"), "rows[1] lacks goal"),
        (("recipe: ../tiny.yaml", "recipe: ../tinny.yaml"), "'tiny.yaml'"),
    ],
)
def test_experiments_that_are_none(
    change: tuple[str, str], told: str, experiment: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment.write_text(EXPERIMENT.replace(*change), encoding="utf-8")
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert ended.code == 2
    assert told in ended.err
    assert not Path("results").exists()
    with pytest.raises(Exception, match="no file"):
        record(Path("nowhere.yaml"))


def test_a_finished_run_is_not_taken_for_another(experiment: Path, cli: Cli) -> None:
    short = EXPERIMENT.replace("seeds: [0, 1]", "seeds: [0]")
    experiment.write_text(short, encoding="utf-8")
    assert cli("record", experiment, "--work", "work", "--results", "results").code == 0
    before = Path("results/tiny_pruning.json").read_text(encoding="utf-8")
    # The rows change places: what was row 0 is row 1 now.
    head, dense, pruned = short.partition("  - {method: dense")[0], *short.partition("rows:\n")[2].split("\n", 1)
    experiment.write_text(head + pruned + dense + "\n", encoding="utf-8")
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert ended.code == 2
    assert "row0-seed0 holds a finished run of another command" in ended.err
    assert "choose another --work" in ended.err
    assert Path("results/tiny_pruning.json").read_text(encoding="utf-8") == before


def test_a_finished_run_is_not_taken_for_that_of_another_recipe(experiment: Path, cli: Cli) -> None:
    experiment.write_text(EXPERIMENT.replace("seeds: [0, 1]", "seeds: [0]"), encoding="utf-8")
    assert cli("record", experiment, "--work", "work", "--results", "results").code == 0
    target, recipe = Path("results/tiny_pruning.json"), experiment.parent.parent / "tiny.yaml"
    before, text = target.read_bytes(), recipe.read_text(encoding="utf-8")
    # Words and comments are not the recipe.
    recipe.write_text("# edited\n" + text.replace("Does it work?", "Does it?"), encoding="utf-8")
    assert cli("record", experiment, "--work", "work", "--results", "results").code == 0
    assert target.read_bytes() == before  # the day is that of the runs
    recipe.write_text(text.replace("lr: 0.1", "lr: 0.2"), encoding="utf-8")
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert (ended.code, "row0-seed0 holds a finished run of another recipe" in ended.err) == (2, True), ended.err
    assert "lr was 0.1 and is 0.2" in ended.err
    assert target.read_bytes() == before


def test_the_result_says_when_and_where_its_runs_were_made(experiment: Path, cli: Cli) -> None:
    assert cli("record", experiment, "--work", "work", "--results", "results").code == 0
    changes = {
        "date": "2031-05-06T23:00:00+00:00",
        "machine": "riscv, 1 threads",
        "device": "cuda",
        "versions": {"torch": "9.1"},
    }
    for place in ("row0-seed1", "row1-seed0"):
        path = Path("work/tiny_pruning", place, "metrics.json")
        found = json.loads(path.read_text(encoding="utf-8"))
        changes["versions"] = found["versions"] | {"torch": "9.1"}
        path.write_text(json.dumps(found | changes), encoding="utf-8")
    assert cli("record", experiment, "--work", "work", "--results", "results").code == 0
    result, first = (
        load_result(Path("results/tiny_pruning.json")),
        json.loads(Path("work/tiny_pruning/row0-seed0/metrics.json").read_text(encoding="utf-8")),
    )
    assert result["date"] == "2031-05-06"
    assert result["machine"] == f"{first['machine'].split(',')[0]}, riscv with a GPU, 1 thread a run"
    assert result["versions"] == first["versions"] | {"torch": f"{first['versions']['torch']}, 9.1"}


def test_a_name_may_look_like_the_place_of_another_row(experiment: Path, cli: Cli) -> None:
    text = EXPERIMENT.replace("seeds: [0, 1]", "seeds: [0]").replace("{method: dense", '{name: "1", method: dense')
    experiment.write_text(text, encoding="utf-8")
    assert cli("record", experiment, "--work", "work", "--results", "results").code == 0
    assert [row["sparsity"] for row in load_result(Path("results/tiny_pruning.json"))["rows"]] == [0, 0.5]


BROKEN = {
    "seeds": ("seeds: [0, 1]", "seeds: 3", "seeds is 3"),
    "seed text": ("seeds: [0, 1]", "seeds: [a]", "seeds is ['a']"),
    "overrides": ("overrides: {method: null}", "overrides: null", "rows[0].overrides is None"),
    "rows": ("  - {name: d", "  - dense\n  - {name: d", "rows must be a list of entries"),
    "unknown": ("goal: 100", "goal: 100\n    higher_is_beter: true", "rows[1] has no key 'higher_is_beter'. Did you mean"),
    "goal": ("goal: 100", "goal: low", "rows[1].goal is 'low'"),
    "no plus": ("goal: 100", "goal: {row: d}\n", "rows[1].goal is {'row': 'd'}"),
    "key": ("method.pattern: 2:4", "method.pattrn: 2:4", "row1-seed0: command line: unknown key 'pattrn'"),
    "curve": ("model: MLP", "model: MLP\ncurves: [{title: t}]", "curves[0] lacks lines, list"),
    "by seed": ("seeds: [0, 1]", "seeds: [0, 1]\nby_seed: {2: {trainer.max_epochs: 1}}", "of the seeds [0, 1]"),
    "names": ("  - method: PruneFinetune", "  - name: d\n    method: PruneFinetune", "two stages or rows have the name 'd'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_experiment_is_refused_before_anything_runs(name: str, experiment: Path, cli: Cli) -> None:
    old, new, told = BROKEN[name]
    text = EXPERIMENT.replace("{method: dense", "{name: d, method: dense")
    experiment.write_text(text.replace(old, new), encoding="utf-8")
    assert experiment.read_text(encoding="utf-8") != text
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert ended.code == 2
    assert told in ended.err
    assert not Path("work").exists()


def test_a_value_that_is_no_number_is_refused(experiment: Path, cli: Cli) -> None:
    text = EXPERIMENT.replace("seeds: [0, 1]", "seeds: [0]")
    experiment.write_text(text.replace("{method: dense", "{value: recipe.x, method: dense"), encoding="utf-8")
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert "no 'recipe.x' in its metrics: there is no 'x' among nothing" in ended.err
    experiment.write_text(text.replace("{method: dense", "{value: recipe, method: dense"), encoding="utf-8")
    ended = cli("record", experiment, "--work", "work", "--results", "results")
    assert "has 'tiny' at 'recipe' in its metrics, which is no finite number" in ended.err


SCANNED = """\
question: Does a scan help?
recipe: ../tiny.yaml
seeds: [0]
model: MLP
data: digits
stages:
  - {name: dense, overrides: {method: null}}
  - {name: scan, command: sensitivity, overrides: {init_from: "@dense", batches: 1}}
rows:
  - {method: dense, overrides: {method: null}, published: null, source: null, goal: null}
"""


@pytest.mark.parametrize("change", ["command", "recipe", "nobody says"])
def test_a_finished_scan_is_not_taken_for_another(change: str, experiment: Path, cli: Cli) -> None:
    experiment.write_text(SCANNED, encoding="utf-8")
    recipe, work = experiment.parent.parent / "tiny.yaml", Path("work/tiny_pruning")
    text = recipe.read_text(encoding="utf-8")

    def again() -> Any:
        return cli("record", experiment, "--work", "work", "--results", "results")

    assert again().code == 0, again().err
    scan = (work / "scan-seed0/sensitivity.json").read_bytes()
    recipe.write_text(text.replace("Does it work?", "Does it?"), encoding="utf-8")  # words are not the recipe
    assert again().code == 0
    if change == "command":
        experiment.write_text(SCANNED.replace("batches: 1", "batches: 2"), encoding="utf-8")
        told = "holds a finished sensitivity of another command or recipe: command was sensitivity"
    elif change == "recipe":
        # The dense run does not care for the method.
        recipe.write_text(text.replace("allocation: global", "allocation: uniform"), encoding="utf-8")
        told = "method.init_args.allocation was global and is uniform"
    else:
        (work / "scan-seed0/asked.json").unlink()
        told = "holds a finished sensitivity, and no asked.json says of what"
    ended = again()
    assert (ended.code, told in ended.err, "choose another --work" in ended.err) == (2, True, True), ended.err
    assert (work / "scan-seed0/sensitivity.json").read_bytes() == scan
    shutil.rmtree(work / "scan-seed0")
    assert again().code == 0
