"""Domains that arrive after a run has ended, without data of those before; and what is refused before hours of training."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from sparsetrain.callbacks import ContinualPruning
from sparsetrain.continual.matrix import continual_metrics
from sparsetrain.data import DomainSequence, TextData
from sparsetrain.errors import RecipeError
from sparsetrain.recipe import jobs
from sparsetrain.recipe.directory import require_same_recipe, resumable
from sparsetrain.report.domains import domain_facts, domains_plot
from sparsetrain.report.run_directory import read_run
from tests.recipes.conftest import TINY as DIGITS
from tests.recipes.conftest import Cli, contents
from tests.recipes.test_domain_runs import TINY as DOMAINS
from tests.recipes.test_domain_runs import TRAINS, assert_equal, lasting
from tests.recipes.test_run import metrics, same, weights

TINY = DOMAINS
LAST = ("--out", "out", "--ckpt_path", "last")
TWO, THREE = ("--data.order", "[drama, law]"), ("--data.order", "[drama, law, code]")
WORDS = {"drama": "To be, or not to be. ", "law": "The Mayor shall; the Council may. ", "code": "for i in range(9): pass\n"}

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def filed(tiny: Path) -> Path:
    """The recipe with its domains in files, which can go."""
    recipe = yaml.safe_load(tiny.read_text(encoding="utf-8"))
    for name, domain in recipe["data"]["init_args"]["domains"].items():
        Path(f"{name}.txt").write_text(WORDS[name] * 300, encoding="utf-8")
        domain["init_args"]["source"] = f"{name}.txt"
    tiny.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return tiny


@pytest.mark.parametrize("options", [(), TRAINS])
def test_domains_arrive_without_data_of_those_before(options: tuple[str, ...], filed: Path, cli: Cli) -> None:
    assert cli("run", filed, *options, "--out", "whole").code == 0
    assert cli("run", filed, *options, *TWO, "--out", "out").code == 0
    Path("drama.txt").unlink()
    ended = cli("run", filed, *options, *THREE, *LAST)
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert "drama is learned, and not measured any more: domain 'drama': " in ended.out
    assert same(weights("whole"), weights("out"))
    found, whole = metrics("out"), metrics("whole")["continual"]
    continual, matrix = found["continual"], found["continual"]["matrix"]
    assert (continual["missing"], whole["missing"]) == (["drama"], [])
    assert matrix[2] == [None, *whole["matrix"][2][1:]]
    assert continual["average"] == found["final"]["test/perplexity"] == pytest.approx(sum(matrix[2][1:]) / 2)
    assert continual["backward_transfer"] == pytest.approx(matrix[2][1] - matrix[1][1])
    assert continual["forward_transfer"] == whole["forward_transfer"]
    assert continual | continual_metrics(matrix, False, continual["before"]) == continual
    assert not any(name.endswith("/drama") for name in found["final"])
    assert dict(domain_facts(found))["in no average: not measured in the end, their data is gone"] == "drama"
    assert domains_plot(found) is not None
    # Nothing is left to do, and nothing is lost when it is asked for again.
    before = lasting("out")
    assert cli("run", filed, *options, *THREE, *LAST).code == 0
    assert lasting("out") == before


def test_a_domain_to_be_learned_must_have_data_and_is_told_before_anything_is_done(filed: Path, cli: Cli) -> None:
    assert cli("run", filed, *TWO, "--out", "out").code == 0
    left = contents(Path("out"))
    Path("code.txt").rename("later.txt")
    ended = cli("run", filed, *THREE, *LAST)
    assert (ended.code, "domain 'code': " in ended.err) == (2, True), ended.err
    assert contents(Path("out")) == left
    Path("later.txt").rename("code.txt")
    assert cli("run", filed, *THREE, *LAST).code == 0


def test_domains_that_come_one_by_one_lose_no_number(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--out", "whole").code == 0
    assert cli("run", tiny, "--data.order", "[drama]", "--out", "out").code == 0
    assert cli("run", tiny, *TWO, *LAST).code == 0
    assert cli("run", tiny, *THREE, *LAST).code == 0
    whole, found = metrics("whole")["continual"], metrics("out")["continual"]
    matrix = [row[: stage + 2] for stage, row in enumerate(whole["matrix"])]  # nobody had the later ones then
    assert found["matrix"] == [[*matrix[0], None], matrix[1], matrix[2]]
    assert found | {"matrix": whole["matrix"]} == whole
    assert "forward_transfer" in found
    before = lasting("out")
    assert cli("run", tiny, *THREE, *LAST).code == 0
    assert lasting("out") == before


def test_a_learned_domain_stays_as_it_was_trained(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, *TWO, "--out", "out").code == 0
    left = contents(Path("out"))
    ended = cli("run", tiny, *TWO, *TRAINS, *LAST)
    assert ended.code == 2
    assert "trainer.max_epochs was 0 and is 2, and all domains of out are learned" in ended.err, ended.err
    assert contents(Path("out")) == left
    ended = cli("run", tiny, *THREE, *TRAINS, *LAST)
    assert ended.code == 0, ended.err
    assert "trainer.max_epochs was 0 and is 2: drama, law stay as they were trained" in ended.out
    assert not Path("out/domains/1-law/checkpoints/last.ckpt").exists()


def test_a_run_that_cannot_train_leaves_nothing_and_can_be_repaired(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, *TRAINS, "--trainer.limit_train_batches", "0", "--out", "out")
    assert (ended.code, "nothing would be trained" in ended.err) == (2, True), ended.err
    assert "only OneShotPruning and ContinualPruning can do without training" in ended.err
    assert not Path("out").exists()
    assert cli("run", tiny, *TWO, "--out", "out").code == 0
    left = contents(Path("out"))
    # Going on, what was learned is not touched either, and another domain may come instead.
    assert cli("run", tiny, *TRAINS, *THREE, "--trainer.limit_train_batches", "0", *LAST).code == 2
    assert cli("run", tiny, *THREE, "--method.init_args.criterion", "no_such", *LAST).code == 2
    assert contents(Path("out")) == left
    assert cli("run", tiny, "--data.order", "[drama, law, code]", *LAST).code == 0


def test_weights_of_domains_that_came_later(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, *TWO, "--data.weights", "null", "--out", "out").code == 0
    ended = cli("run", tiny, *THREE, "--data.weights", "{drama: 2.0}", *LAST)
    assert ended.code == 2
    assert "data.init_args.weights.drama was absent and is 2.0" in ended.err, ended.err
    assert "domains may be added at the end. Or start a new run from its weights: --init_from out" in ended.err
    ended = cli("run", tiny, *THREE, "--data.weights", "{code: 2.0}", *LAST)
    assert (ended.code, ended.err) == (0, ""), ended.err


def test_workers_are_free_and_settings_of_old_domains_are_not(tmp_path: Path) -> None:
    stored = tmp_path / "config.yaml"
    stored.write_text("data: {init_args: {num_workers: 0, domains: {law: {limit: 8}, lawful: {limit: 8}}}}", encoding="utf-8")
    free = ["data.init_args.domains.law."]
    require_same_recipe(stored, stored.read_text(encoding="utf-8").replace("workers: 0", "workers: 4"), free)
    require_same_recipe(stored, stored.read_text(encoding="utf-8").replace("law: {limit: 8}", "law: {limit: 9}"), free)
    with pytest.raises(RecipeError, match=r"domains\.lawful\.limit was 8 and is 9\. .*domains may be added"):
        require_same_recipe(
            stored, stored.read_text(encoding="utf-8").replace("lawful: {limit: 8}", "lawful: {limit: 9}"), free
        )
    with pytest.raises(RecipeError, match=r"only the length of training may change\. Or"):
        require_same_recipe(stored, "data: null")


def test_domains_are_measured_alike_or_nothing_begins(filed: Path, cli: Cli) -> None:
    recipe = filed.read_text(encoding="utf-8")
    filed.write_text(recipe.replace("source: law.txt", "source: law.txt\n          held_out: 0"), encoding="utf-8")
    ended = cli("run", filed, "--out", "out")
    assert ended.code == 2
    assert "nothing is measured on domain 'law': it has neither test nor validation data" in ended.err, ended.err
    Path("statutes").mkdir()
    for split in ("train", "valid"):
        Path(f"statutes/{split}.txt").write_text(WORDS["law"] * 300, encoding="utf-8")
    filed.write_text(recipe.replace("source: law.txt", "source: statutes\n          held_out: 0"), encoding="utf-8")
    ended = cli("run", filed, "--out", "out")
    assert ended.code == 2
    assert "domain 'law' lacks test/loss, test/perplexity, which 'drama' has" in ended.err, ended.err
    assert not Path("out").exists()


class Texts(DomainSequence):
    """Somebody's own sequence."""


def test_a_derived_sequence_is_a_sequence(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, *TWO, "--out", "whole").code == 0
    recipe = tiny.read_text(encoding="utf-8").replace("class_path: DomainSequence", f"class_path: {__name__}.Texts")
    tiny.write_text(recipe, encoding="utf-8")
    assert cli("run", tiny, "--data.order", "[drama]", "--out", "out").code == 0
    ended = cli("run", tiny, *TWO, *LAST)
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert metrics("out")["continual"]["domains"] == ["drama", "law"]
    assert same(weights("whole"), weights("out"))


# -- references --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options", "told"),
    [
        (DOMAINS, ("--method", "null", "--trainer.max_epochs", "1"), "method is null and data DomainSequence"),
        (DOMAINS, ("--method", "KeepMasks"), "method is KeepMasks and data DomainSequence"),
        (DIGITS, (), "method is PruneFinetune and data VisionData"),
    ],
)
def test_references_are_refused_where_there_are_none(
    recipe: str, options: tuple[str, ...], told: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe, encoding="utf-8")
    ended = cli("run", path, *options, "--references", "true", "--out", "out")
    assert (ended.code, told in ended.err) == (2, True), ended.err
    assert not Path("out").exists()
    if "null" not in options:
        ended = cli("plan", path, *options, "--references", "true")
        assert ended.code
        assert told in " ".join((ended.out + ended.err).split())
        assert "references" not in cli("plan", path, *options).out


def test_references_that_need_data_that_is_gone_are_refused_before_anything_is_done(filed: Path, cli: Cli) -> None:
    assert cli("run", filed, "--data.order", "[drama]", "--out", "out").code == 0
    Path("drama.txt").unlink()
    left = contents(Path("out"))
    ended = cli("run", filed, *TWO, "--references", "true", *LAST)
    assert ended.code == 2
    assert "references: true asks for a run in out/fresh over all domains, and it has not learned drama" in ended.err, ended.err
    assert "set references to false" in ended.err
    ended = cli("run", filed, *TWO, *TRAINS, "--dense_twin", "true", *LAST)
    assert (ended.code, "dense_twin: true asks for a run in out/dense" in ended.err) == (2, True), ended.err
    assert contents(Path("out")) == left
    # Pruning alone has no twin.
    ended = cli("run", filed, *TWO, "--dense_twin", "true", *LAST)
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert cli("verify", "out").code == 0


def test_references_that_have_learned_what_is_gone_go_on(filed: Path, cli: Cli) -> None:
    options = ("--references", "true")
    assert cli("run", filed, "--data.order", "[drama]", *options, "--out", "out").code == 0
    Path("drama.txt").unlink()
    ended = cli("run", filed, *TWO, *options, *LAST)
    assert (ended.code, ended.err) == (0, ""), ended.err
    found, fresh, joint = (metrics(out)["continual"] for out in ("out", "out/fresh", "out/joint"))
    own = [found["matrix"][i][i] - fresh["matrix"][i][i] for i in range(2)]
    assert found["intransigence"] == pytest.approx(sum(own) / 2)
    assert found["joint_gap"] == pytest.approx(found["matrix"][1][1] - joint["matrix"][1][1])
    # One of the two is not enough.
    shutil.rmtree("out/joint")
    ended = cli("run", filed, *THREE, *options, *LAST)
    assert (ended.code, "out/joint over all domains, and it has not learned drama, whose" in ended.err) == (2, True), ended.err


@pytest.mark.parametrize("first", [True, False])
def test_what_a_reference_breaks_off_is_verified(first: bool, tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    if not first:
        assert cli("run", tiny, "--data.order", "[drama]", "--out", "out").code == 0
    plain = ContinualPruning.begin_domain

    def stop(self: ContinualPruning, trainer: Trainer, index: int, name: str) -> None:
        if self.memory.mode == "joint":
            raise KeyboardInterrupt
        plain(self, trainer, index, name)

    monkeypatch.setattr(ContinualPruning, "begin_domain", stop)
    assert cli("run", tiny, *TWO, "--references", "true", "--out", "out", *(() if first else LAST[2:])).code == 130
    assert cli("verify", "out").code == 0
    if first:  # whoever waits for metrics.json waits for the references too
        assert not Path("out/metrics.json").exists()
    else:
        assert metrics("out")["continual"]["domains"] == ["drama", "law"]
        assert "joint_gap" not in metrics("out")["continual"]
    monkeypatch.setattr(ContinualPruning, "begin_domain", plain)
    assert cli("run", tiny, *TWO, "--references", "true", *LAST).code == 0
    assert "joint_gap" in metrics("out")["continual"]


class Filed(TextData):
    """Somebody's own data, which says in its own way that there is none."""

    def setup(self, stage: str) -> None:
        Path(self.sources[0]).read_text(encoding="utf-8")
        super().setup(stage)


def test_somebodys_own_data_may_be_gone(filed: Path, cli: Cli) -> None:
    filed.write_text(filed.read_text(encoding="utf-8").replace(": TextData", f": {__name__}.Filed"), encoding="utf-8")
    assert cli("run", filed, *TWO, "--out", "out").code == 0
    Path("drama.txt").unlink()
    Path("code.txt").rename("later.txt")
    ended = cli("run", filed, *THREE, *LAST)
    assert (ended.code, "domain 'code': [Errno 2]" in ended.err) == (2, True), ended.err
    Path("later.txt").rename("code.txt")
    ended = cli("run", filed, *THREE, *LAST)
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert "drama is learned, and not measured any more: [Errno 2]" in ended.out
    assert metrics("out")["continual"]["missing"] == ["drama"]


def test_the_dense_twin_has_no_references(tiny: Path, cli: Cli) -> None:
    options = ("--data.order", "[drama]", "--trainer.max_epochs", "1", "--dense_twin", "true", "--references", "true")
    ended = cli("run", tiny, *options, "--out", "out")
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert metrics("out")["dense"] == metrics("out/dense")["final"]
    assert "joint_gap" in metrics("out")["continual"]
    assert not Path("out/fresh/dense").exists()


def test_a_reference_that_was_killed_in_its_first_domain_goes_on(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--data.order", "[drama]", *TRAINS, "--references", "true", "--checkpoint_every", "2st")
    assert cli("run", tiny, *options, "--out", "whole").code == 0
    plain, steps, killed = ContinualPruning.on_step, [], []

    def stop(self: ContinualPruning, trainer: Trainer, step: int) -> None:
        plain(self, trainer, step)
        if self.memory.mode == "fresh":
            steps.append(step)
            if step == 3 and not killed:
                killed.append(step)
                raise KeyboardInterrupt

    monkeypatch.setattr(ContinualPruning, "on_step", stop)
    assert cli("run", tiny, *options, "--out", "out").code == 130
    assert steps == [1, 2, 3]
    assert resumable(Path("out/fresh"))
    assert not Path("out/fresh/checkpoints").exists()
    ended = cli("run", tiny, *options, *LAST)
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert steps[3] == 3  # the one after the checkpoint: what was trained is kept
    assert_equal("whole", "out")
    assert_equal("whole/fresh", "out/fresh")


@pytest.mark.parametrize("begun", [True, False])
def test_an_experiment_goes_on_with_a_run_that_broke_off_in_its_first_domain(
    begun: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job("run", tiny, {}, 0, Path("row0-seed0"))
    (job.out / "domains" / "0-drama").mkdir(parents=True)
    if begun:
        (job.out / "config.yaml").write_text("seed: 0", encoding="utf-8")
    commands: list[list[str]] = []

    def call(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stderr="that was all")

    monkeypatch.setattr(jobs.subprocess, "run", call)
    with pytest.raises(RecipeError, match="that was all"):
        jobs.run_jobs([job], 1)
    assert (commands[0][-2:] == ["--ckpt_path", "last"]) is begun
    assert job.out.exists() is begun


# -- the page ----------------------------------------------------------------------------------------------------------------


def test_the_curves_of_the_domains_stand_one_after_the_other(tmp_path: Path) -> None:
    rows: list[list[dict[str, Any]]] = [
        [{"step": 0, "sparsity/global": 0.5}, {"step": 3, "val/loss": 2.0}],
        [{"step": 0, "val/loss": 4.0}, {"step": 2, "val/loss": 3.0}],
    ]
    for number, name in ((10, "code"), (9, "law - old")):
        folder = tmp_path / "domains" / f"{number}-{name}"
        folder.mkdir(parents=True)
        (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[number - 9]), encoding="utf-8")
    (tmp_path / "metrics.json").write_text('{"final": {}, "sparsity": {}, "layers": [], "verified": true}', encoding="utf-8")
    found = read_run(tmp_path)
    assert [row["step"] for row in found.history] == [0, 3, 4, 6]
    assert [row.get("val/loss") for row in found.history] == [None, 2.0, 4.0, 3.0]
    assert found.notes == ["Curves are of the domain at hand, one after the other: law - old from step 0, code from step 4."]
