"""The command line by itself: help with an example on every level, lists, versions, and words it does not know."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from sparsetrain import cli

ROOT = Path(__file__).parents[2]
COMMANDS = ("run", "plan", "verify", "report", "list", "record", "sensitivity", "predict")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_command_and_an_example(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, flag)
    assert (code, err) == (0, "")
    assert all(f"  {command} " in out for command in COMMANDS)
    assert "sparsetrain run recipes/quickstart.yaml" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert f"usage: sparsetrain {command}" in out
    assert f"example:\n  sparsetrain {command} " in out


def test_the_example_of_plan_works(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command, *arguments = cli.EXAMPLES["plan"].split()
    assert command == "sparsetrain"
    code, out, err = call(capsys, *arguments)
    assert (code, err) == (0, ""), out


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys)
    assert code == 2
    assert "usage: sparsetrain COMMAND" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"sparsetrain {version('sparsetrain')}\n", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rnu"], "'run'"),
        (["list", "critera"], "'criteria'"),
        (["verify"], "CKPT_OR_DIR"),
        (["verify", "a", "b"], "unrecognized arguments: b"),
        (["report", "nowhere"], "nowhere is not a directory"),
        (["run"], "the recipe comes first"),
        (["run", "--seed", "1", "recipe.yaml"], "the recipe comes first"),
        (["plan", "x.yaml", "y.yaml"], "'y.yaml'"),
        (["record", "nowhere.yaml"], "nowhere.yaml"),
        (["record", "x.yaml", "--jobs", "many"], "many"),
        (["barrier", "nowhere", "nowhere"], "nowhere is no run directory"),
    ],
)
def test_words_it_does_not_know(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert told in err
    assert err.strip().count("\n") == 0


LISTED = {
    "criteria": ["magnitude", "random", "taylor", "obs", "lookahead"],
    "patterns": ["unstructured", "2:4", "block:16x16", "neurons"],
    "schedules": ["Rounds", "Cubic", "OneShot"],
    "allocations": ["uniform_plus", "global", "erk", "lamp", "sensitivity:FILE"],
    "methods": ["PruneFinetune", "KeepMasks", "LotteryTickets", "DynamicSparse", "NMTraining"],
    "recipes": ["recipes/quickstart.yaml", "Can a small network"],
}


@pytest.mark.parametrize("what", LISTED)
def test_list_one_kind(what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, out, _ = call(capsys, "list", what)
    assert code == 0
    assert [name for name in LISTED[what] if name not in out] == []
    assert not any(names[0] in out for other, names in LISTED.items() if other != what)


def test_list_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "list")
    assert code == 0
    assert [name for what, names in LISTED.items() if what != "recipes" for name in names if name not in out] == []
    assert "no recipes in this folder" in out


@pytest.mark.parametrize("command", ["run", "plan"])
def test_keys(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, command, "--keys")
    assert code == 0
    for key in ("--seed", "--method", "--init_from", "--dense_twin", "--trainer.max_epochs", "--checkpoint_every"):
        assert key in out
    # What the run itself sets up cannot be set by a recipe.
    assert "--trainer.logger" not in out


def test_help_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "run", str(ROOT / "recipes/quickstart.yaml"), "--method.help", "PruneFinetune")
    assert code == 0
    assert "--method.sparsity SPARSITY" in out
