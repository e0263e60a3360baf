"""Every mistake ends in one message (what broke, the value, the way out) and exit code 2; nothing is written."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from tests.recipes.conftest import TINY, Cli, contents

SCHEDULE = "--method.init_args.schedule.init_args"

OPTIONS = {
    "top level key": (["--metod", "null"], ["'metod'", "'method'"]),
    "key of the method": (["--method.init_args.sparsety", "0.9"], ["'sparsety'", "'sparsity'"]),
    "key of the method, short": (["--method.sparsety", "0.9"], ["'sparsety'", "'sparsity'"]),
    "key of the schedule": ([f"{SCHEDULE}.round", "3"], ["'round'", "'rounds'"]),
    "key of the optimizer": (["--model.optimizer.lrr", "3"], ["'lrr'", "'lr'"]),
    "key of the trainer": (["--trainer.max_epoch", "3"], ["max_epoch'", "max_epochs'"]),
    "key of an override": (["--method.overrides", '{"fc1": {"sparsty": 0.5}}'], ["'sparsty'", "'sparsity'"]),
    "type": (["--trainer.max_epochs", "three"], ["trainer.max_epochs", "three", "int"]),
    "type, seed": (["--seed", "x"], ["seed", "x", "int"]),
    "choice": (["--model.lr_schedule", "cosin"], ["cosin", "constant, cosine, linear", "'cosine'"]),
    "no value": (["--trainer.max_epochs"], ["--trainer.max_epochs", "expected one argument"]),
    "stray word": (["--seed", "1", "word"], ["'word'", "--key value"]),
    "sparsity 1": (["--method.sparsity", "1.0"], ["1.0", "[0, 1)"]),
    "sparsity negative": (["--method.sparsity", "-0.1"], ["-0.1", "[0, 1)"]),
    "sparsity nan": (["--method.sparsity", "nan"], ["nan", "sparsity"]),
    "sparsity .nan": (["--method.sparsity", ".nan"], ["nan", "[0, 1)"]),
    "sparsity inf": (["--method.sparsity", "inf"], ["inf", "sparsity"]),
    "sparsity percent": (["--method.sparsity", "90%"], ["90%", "0.9"]),
    "sparsity 90": (["--method.sparsity", "90"], ["90", "0.9"]),
    "unreachable N:M": (
        ["--method.pattern", "2:4", "--method.schedule", "null", "--method.allocation", "uniform"],
        ["fc1.weight", "2:4", "0.5", "0.8"],
    ),
    "N:M that does not divide": (
        ["--method.pattern=3:7", "--method.schedule=null", "--method.allocation=uniform", "--method.sparsity=null"],
        ["fc1.weight", "3:7", "64", "targets.exclude"],
    ),
    "N:M under global": (
        ["--method.pattern", "2:4", "--method.schedule", "null", "--method.sparsity", "0.5"],
        ["fc1.weight", "2:4", "uniform"],
    ),
    "neither rounds nor rate": ([f"{SCHEDULE}.rounds", "null"], ["rounds or prune_rate"]),
    "schedule beyond the end": ([f"{SCHEDULE}.start", "1ep", f"{SCHEDULE}.every", "1ep"], ["step 39", "ends at 26"]),
    "schedule beyond the end, with a twin": (
        [f"{SCHEDULE}.start", "26st", "--dense_twin", "true"],
        ["ends at 26"],
    ),
    "duration": ([f"{SCHEDULE}.start", "3x"], ["'3x'", "3ep"]),
    "duration of checkpoints": (["--checkpoint_every", "3x"], ["'3x'", "3ep"]),
    "criterion": (["--method.criterion", "magnitud"], ["'magnitud'", "'magnitude'"]),
    "pattern": (["--method.pattern", "unstructred"], ["'unstructred'", "'unstructured'"]),
    "allocation": (["--method.allocation", "globl"], ["'globl'", "'global'"]),
    "method by name": (["--method", "PruneFinetun"], ["'PruneFinetun'", "'PruneFinetune'"]),
    "method by path": (["--method", "no_such_module.Method"], ["no_such_module.Method", "PYTHONPATH"]),
    "network": (["--model.network", "LeNet30"], ["'LeNet30'", "'LeNet300'"]),
    "optimizer": (["--model.optimizer", "torch.optim.SDG"], ["'SDG'", "'SGD'"]),
    "missing arguments": (["--model", "torch.nn.Linear"], ["torch.nn.Linear", "in_features"]),
    "no LightningModule": (["--model", "LeNet300"], ["LeNet300", "LightningModule", "Classification"]),
    "no target": (["--method.targets.include", "[nothing]"], ["nothing", "fc1.weight"]),
    "override of nothing": (["--method.overrides", '{"fc9": {"sparsity": 0.5}}'], ["'fc9'", "no target"]),
    "override no regex": (["--method.overrides", '{"fc[": {"sparsity": 0.5}}'], ["'fc['", "regular expression"]),
    "data": (["--data.name", "mnist", "--data.root", "nowhere"], ["'mnist'", "nowhere", "SPARSETRAIN_DATA"]),
    "data option": (["--data.batch_size", "0"], ["batch_size=0"]),
    "no data": (["--data", "null"], ["no data", "VisionData"]),
    "init_from": (["--init_from", "nowhere.ckpt"], ["nowhere.ckpt", "no file"]),
    "ckpt_path": (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt", "without --ckpt_path"]),
    "ckpt_path last": (["--ckpt_path", "last"], ["last.ckpt", "without --ckpt_path"]),
    "two methods": (
        ["--callbacks", "[{class_path: PruneFinetune, init_args: {sparsity: 0.5}}]"],
        ["PruneFinetune", "undo"],
    ),
    "precision": (["--trainer.precision", "bogus"], ["bogus", "16-mixed"]),
    "nothing to train": (["--trainer.max_epochs", "0"], ["max_epochs=0", "nothing would be trained"]),
    "no network card": (["--trainer.accelerator", "hpu"], ["trainer", "accelerator"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_cannot_be(name: str, tiny: Path, cli: Cli) -> None:
    options, told = OPTIONS[name]
    before = contents(tiny.parent)
    ended = cli("run", tiny, *options, "--out", "out")
    assert ended.code == 2, ended.out
    assert ended.err.startswith("error: ")
    assert ended.err.strip().count("\n") == 0, ended.err
    assert [text for text in told if text not in ended.err] == []
    assert contents(tiny.parent) == before
    assert not Path("out").exists()


FILES = {
    "missing": (None, ["no file", "'tiny.yaml'"]),
    "empty": (b"", ["holds nothing"]),
    "a list": (b"- a\n- b\n", ["a list"]),
    "a word": (b"hello", ["a str"]),
    "no YAML": (b"a: [1,\n b: }", ["no YAML", "line 2"]),
    "binary": (bytes(range(256)), ["no text file"]),
    "unknown key": (TINY.replace("seed:", "sed:").encode(), ["'sed'", "'seed'"]),
    "unknown key of the schedule": (TINY.replace("rounds:", "round:").encode(), ["'round'", "'rounds'"]),
    "wrong type": (TINY.replace("seed: 3", "seed: three").encode(), ["seed", "three", "int"]),
    "no model": (b"seed: 1\n", ["'model'", "required"]),
}


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("name", FILES)
def test_a_recipe_that_is_none(name: str, command: str, tiny: Path, cli: Cli) -> None:
    content, told = FILES[name]
    path = tiny.parent / "tinny.yaml"
    if content is not None:
        path.write_bytes(content)
    before = contents(tiny.parent)
    ended = cli(command, path, "--out", "out")
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert ended.err.strip().count("\n") == 0, ended.err
    assert [text for text in told if text not in ended.err] == []
    assert contents(tiny.parent) == before


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "missing"])
def test_data_files_that_cannot_be_read(damage: str, tiny: Path, cli: Cli) -> None:
    folder = tiny.parent / "mnist"
    folder.mkdir()
    for split in ("train", "t10k"):
        images = bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 8, 0, 0, 0, 8]) + bytes(4 * 64)
        labels = bytes([0, 0, 8, 1, 0, 0, 0, 4]) + bytes([0, 1, 2, 3])
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    victim = folder / "train-images-idx3-ubyte.gz"
    whole = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(whole[:-9] if damage == "truncated" else whole[:20] + b"\xff" * 6 + whole[26:])
    options = ["--data.name", "mnist", "--data.root", folder, "--data.validation", "0"]
    ended = cli("run", tiny, *options, "--out", "out")
    assert ended.code == 2
    assert "train-images-idx3-ubyte" in ended.err
    assert ended.err.strip().count("\n") == 0
    assert not Path("out").exists()


def test_a_directory_in_use_is_left_alone(tiny: Path, cli: Cli) -> None:
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("years of work", encoding="utf-8")
    Path("file").write_text("me too", encoding="utf-8")
    before = contents(tiny.parent)
    for out in ("full", "file"):
        for resume in ([], ["--ckpt_path", "last"]):
            ended = cli("run", tiny, "--out", out, *resume)
            assert ended.code == 2
            assert out in ended.err
            assert ended.err.strip().count("\n") == 0
    assert contents(tiny.parent) == before


def test_a_place_that_cannot_be_written(tiny: Path, cli: Cli) -> None:
    Path("file").write_text("in the way", encoding="utf-8")
    ended = cli("run", tiny, "--out", "file/out")
    assert ended.code == 2
    assert "file/out" in ended.err
    assert ended.err.strip().count("\n") == 0
    assert Path("file").read_text(encoding="utf-8") == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_place(tiny: Path, cli: Cli) -> None:
    Path("locked").mkdir(mode=0o500)
    ended = cli("run", tiny, "--out", "locked/out")
    assert ended.code == 2
    assert "locked/out" in ended.err


def test_a_read_only_disk(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def refuse(self: Path, *arguments: object, **options: object) -> None:
        if "out" in self.parts:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        mkdir(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
    ended = cli("run", tiny, "--out", "out")
    assert ended.code == 2
    assert "Read-only file system" in ended.err
    assert "--out" in ended.err


@pytest.mark.parametrize("broken", ["torch.save", "os.replace"])
def test_a_full_disk_leaves_the_previous_checkpoint(broken: str, tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = 0

    def full_from_the_second(plain: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            nonlocal saves
            if "last.ckpt" in str(arguments):
                saves += 1
                if saves >= 2:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain(*arguments, **options)  # type: ignore[operator]

        return call

    module, _, name = broken.partition(".")
    owner = {"torch": torch, "os": os}[module]
    monkeypatch.setattr(owner, name, full_from_the_second(getattr(owner, name)))
    ended = cli("run", tiny, "--out", "out")
    assert ended.code == 2
    assert "No space left" in ended.err
    assert "previous last.ckpt is intact" in ended.err
    assert torch.load("out/checkpoints/last.ckpt", weights_only=True)["global_step"] == 13
    assert sorted(os.listdir("out/checkpoints")) == ["dense.ckpt", "last.ckpt"]
    monkeypatch.undo()
    os.chdir(tiny.parent)
    assert cli("run", tiny, "--out", "out", "--ckpt_path", "last").code == 0


def test_a_diverged_run_keeps_the_last_good_checkpoint(tiny: Path, cli: Cli) -> None:
    # The second epoch starts with a learning rate no network survives.
    jump = "{class_path: torch.optim.lr_scheduler.MultiplicativeLR, init_args: {lr_lambda: tests.recipes.extension.explode}}"
    ended = cli("run", tiny, "--model.lr_schedule", jump, "--out", "out")
    assert ended.code == 2
    assert "diverged" in ended.err
    assert "out/checkpoints/last.ckpt" in ended.err
    assert ended.err.strip().count("\n") == 0
    metrics = json.loads(Path("out/metrics.json").read_text(encoding="utf-8"))
    assert (metrics["status"], metrics["verified"]) == ("diverged", False)
    kept = torch.load("out/checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 13
    assert all(torch.isfinite(value).all() for value in kept["state_dict"].values())
    assert not Path("out/checkpoints/final.ckpt").exists()
    Path("out/report.html").unlink()
    assert cli("report", "out").code == 0
    assert "diverged" in Path("out/report.html").read_text(encoding="utf-8").lower()
    assert cli("verify", "out").code == 0


def test_diverged_at_once(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, "--model.optimizer.lr", "1e12", "--out", "out")
    assert ended.code == 2
    assert "diverged" in ended.err
    assert "no checkpoint yet" in ended.err


def test_an_error_in_the_users_own_code_leaves_a_run_to_go_on_with(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsetrain.tasks import MLP

    calls = 0
    forward = MLP.forward

    def break_off(self: MLP, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += self.training
        if calls == 20:
            raise ValueError("a mistake of mine")
        return forward(self, x)

    monkeypatch.setattr(MLP, "forward", break_off)
    broken = cli("run", tiny, "--out", "out")
    assert broken.code == 2
    assert "ValueError: a mistake of mine. Run again with SPARSETRAIN_TRACEBACK=1" in " ".join(broken.err.split())
    monkeypatch.setattr(MLP, "forward", forward)
    assert cli("run", tiny, "--out", "out", "--ckpt_path", "last").code == 0
    assert cli("verify", "out").code == 0
