"""Runs whose model gets smaller: what the directory says, interrupted ones, and runs that start from a smaller model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from sparsetrain.callbacks import GroupLasso
from tests.recipes.conftest import TINY as MASKED
from tests.recipes.conftest import Cli
from tests.recipes.test_resume import assert_equal_runs, interrupt_at
from tests.recipes.test_run import metrics, same, weights

SHRINKING = """\
method:
  class_path: GroupLasso
  init_args: {sparsity: 0.5, span: [4st, 18st], penalty: {class_path: Penalty, init_args: {every: 1}}, compact: 5st}
trainer: {max_epochs: 2}
checkpoint_every: 2st
"""
TINY = MASKED.partition("method:")[0] + SHRINKING
FULL = 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10

pytestmark = pytest.mark.usefixtures("no_report")


def widths(out: str) -> tuple[int, int]:
    found = weights(out)
    return found["network.fc1.weight"].shape[0], found["network.fc2.weight"].shape[0]


def test_the_directory_counts_what_was_taken_out(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, "--dense_twin", "true", "--out", "out")
    assert (ended.code, ended.err) == (0, "")
    one, two = widths("out")
    left = 64 * one + one + one * two + two + two * 10
    found = metrics("out")
    assert found["verified"]
    assert found["sparsity"]["prunable"] == FULL
    assert found["sparsity"]["kept"] == left <= 0.5 * FULL
    assert found["sparsity"]["actual"] == pytest.approx(1 - left / FULL)
    assert found["method"]["structure"]["units"] == {"network.fc1": [one, 16], "network.fc2": [two, 16]}
    assert len(found["method"]["structure"]["compacted"]) >= 2
    assert found["flops"] == {"dense": 2.0 * (64 * 16 + 16 * 16 + 160), "sparse": 2.0 * (64 * one + one * two + two * 10)}
    assert "100.0 %" not in ended.out
    verified = cli("verify", "out")
    assert verified.code == 0
    assert f"{one} × 64" in verified.out


def test_a_plan_says_whose_units(tiny: Path, cli: Cli) -> None:
    ended = cli("plan", tiny)
    assert ended.code == 0, ended.out
    assert "this recipe can do what it asks" in ended.out
    assert "network.fc1 (16 neurons)" in " ".join(ended.out.split())
    too_much = cli("plan", tiny, "--method.sparsity", "0.999")
    assert too_much.code == 2
    assert "at most 0.9" in " ".join(too_much.out.split())


@pytest.mark.parametrize("step", [7, 12, 16, 22])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    step: int, tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("run", tiny, "--out", "whole").code == 0
    interrupt_at(step, monkeypatch, GroupLasso)
    assert cli("run", tiny, "--out", "broken").code == 130
    ended = cli("run", tiny, "--out", "broken", "--ckpt_path", "last")
    assert (ended.code, ended.err) == (0, "")
    assert_equal_runs("whole", "broken")


def test_the_teacher_of_an_interrupted_run_is_as_large_as_at_its_start(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_text(tiny.read_text() + "callbacks: [{class_path: Distillation, init_args: {weight: 0.7, task: 0.3}}]\n")
    assert cli("run", tiny, "--out", "whole").code == 0
    interrupt_at(15, monkeypatch, GroupLasso)
    assert cli("run", tiny, "--out", "broken").code == 130
    ended = cli("run", tiny, "--out", "broken", "--ckpt_path", "last")
    assert ended.code == 0, ended.err
    assert_equal_runs("whole", "broken")


def test_a_run_starts_from_a_compact_one_and_goes_on_when_interrupted(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("run", tiny, "--out", "first").code == 0
    start = ("--init_from", "first", "--method.sparsity", "0.3")
    assert cli("run", tiny, *start, "--out", "whole").code == 0
    interrupt_at(12, monkeypatch, GroupLasso)
    assert cli("run", tiny, *start, "--out", "broken").code == 130
    assert cli("run", tiny, *start, "--out", "broken", "--ckpt_path", "last").code == 0
    assert_equal_runs("whole", "broken")
    assert sum(widths("whole")) < sum(widths("first"))
    # Another method on the smaller model, and a run from that one: it knows the whole history.
    once = {"class_path": "PruneFinetune", "init_args": {"schedule": {"class_path": "OneShot", "init_args": {"at": "3st"}}}}
    fine = ("--method", json.dumps(once))
    ended = cli("run", tiny, *fine, "--method.sparsity", "0.5", "--init_from", "whole", "--out", "sparse")
    assert (ended.code, ended.err) == (0, "")
    assert widths("sparse") == widths("whole")
    assert cli("run", tiny, *fine, "--method.sparsity", "0.6", "--init_from", "sparse", "--out", "sparser").code == 0
    assert widths("sparser") == widths("whole")
    zeros = sum(int((weights("sparser")[f"network.fc{n}.weight"] == 0).sum()) for n in (1, 2))
    assert zeros == pytest.approx(0.6 * (64 * widths("whole")[0] + widths("whole")[0] * widths("whole")[1]), abs=2)


def test_without_its_history_a_start_is_refused(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("run", tiny, "--out", "first").code == 0
    monkeypatch.setattr(sys.modules["sparsetrain.recipe.build"], "shorten", lambda model, taken: None)
    ended = cli("run", tiny, "--init_from", "first", "--out", "second")
    assert ended.code == 2
    assert "is of another model" in ended.err
    assert not Path("second").exists()
    assert isinstance(torch.load("first/checkpoints/final.ckpt", weights_only=True), dict)


DOMAINS = TINY.replace(
    """data:
  class_path: VisionData
  init_args: {name: digits, batch_size: 100}
""",
    """data:
  class_path: DomainSequence
  init_args:
    domains:
      a: {class_path: VisionData, init_args: {name: digits, batch_size: 100}}
      b: {class_path: VisionData, init_args: {name: digits, batch_size: 50, validation: 0.3}}
""",
)


def test_a_smaller_model_goes_on_with_the_next_domain(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_text(DOMAINS, encoding="utf-8")
    ended = cli("run", tiny, "--out", "whole")
    assert (ended.code, ended.err) == (0, "")
    assert widths("whole")[0] < 16
    plain = GroupLasso.begin_domain

    def begin_domain(self: GroupLasso, trainer: Trainer, index: int, name: str) -> None:
        plain(self, trainer, index, name)
        if name == "b":
            monkeypatch.setattr(GroupLasso, "begin_domain", plain)
            raise KeyboardInterrupt

    monkeypatch.setattr(GroupLasso, "begin_domain", begin_domain)
    assert cli("run", tiny, "--out", "broken").code == 130
    ended = cli("run", tiny, "--out", "broken", "--ckpt_path", "last")
    assert (ended.code, ended.err) == (0, "")
    assert same(weights("whole"), weights("broken"))


def test_plan_and_run_agree_on_a_start_that_is_smaller(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--out", "first").code == 0
    start = ("--init_from", "first", "--method.groups.at_least", "6", "--method.sparsity", "0.55")
    assert cli("plan", tiny, *start[2:]).code == 0  # of the whole model so much could go
    planned = cli("plan", tiny, *start)
    assert planned.code == 2
    assert "can go" in " ".join(planned.out.split())
    assert cli("run", tiny, *start, "--out", "second").code == 2
