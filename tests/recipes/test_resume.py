"""Both ways to go on: an interrupted run to its end, and a new recipe from an already sparse model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from sparsetrain.callbacks import PruneFinetune, SparsityCallback
from sparsetrain.callbacks.progress import EpochLines
from sparsetrain.masks import load_masks
from sparsetrain.tasks import Classification
from tests.recipes.conftest import TINY, Cli, contents
from tests.recipes.test_run import metrics, same, weights

pytestmark = pytest.mark.usefixtures("no_report")

#: What two runs of one recipe may differ in.
MOMENTARY = ("command", "date", "seconds")


def lasting(out: str) -> dict[str, Any]:
    return {key: value for key, value in metrics(out).items() if key not in MOMENTARY}


def assert_equal_runs(one: str, other: str) -> None:
    assert same(weights(one), weights(other))
    assert lasting(one) == lasting(other)
    files, others = contents(Path(one)), contents(Path(other))
    assert files.keys() == others.keys()
    for name in {"history.jsonl", "masks.safetensors", "config.yaml"} & files.keys():
        assert files[name] == others[name]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, method: type[SparsityCallback] = PruneFinetune) -> None:
    """Ctrl-C right after an optimizer step of a method."""
    plain = method.on_step

    def on_step(self: SparsityCallback, trainer: Trainer, now: int) -> None:
        plain(self, trainer, now)
        if now == step:
            monkeypatch.setattr(method, "on_step", plain)
            raise KeyboardInterrupt

    monkeypatch.setattr(method, "on_step", on_step)


@pytest.mark.parametrize(("step", "every"), [(20, "1ep"), (11, "2st"), (10, "7st"), (26, "1ep")])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    step: int, every: str, tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--checkpoint_every", every, "--trainer.log_every_n_steps", "3"]
    assert cli("run", tiny, *options, "--out", "whole").code == 0
    interrupt_at(step, monkeypatch)
    handler = signal.getsignal(signal.SIGINT)
    ended = cli("run", tiny, *options, "--out", "broken")
    assert ended.code == 130
    assert "--ckpt_path last" in ended.err
    assert signal.getsignal(signal.SIGINT) is handler
    assert not Path("broken/metrics.json").exists()
    assert cli("run", tiny, *options, "--out", "broken").code == 2
    assert cli("run", tiny, *options, "--out", "broken", "--ckpt_path", "last").code == 0
    assert_equal_runs("whole", "broken")


def test_a_killed_run_ends_like_an_uninterrupted_one(tiny: Path, cli: Cli) -> None:
    options = ["--trainer.max_epochs", "15", "--dense_twin", "true"]
    assert cli("run", tiny, *options, "--out", "whole").code == 0
    command = [sys.executable, "-m", "sparsetrain.cli", "run", str(tiny), *options, "--out", "broken"]
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: sums over threads round in another order
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=one) as process:
        limit = time.monotonic() + 60
        while not Path("broken/checkpoints/last.ckpt").exists():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not Path("broken/metrics.json").exists()
    assert cli("run", tiny, *options, "--out", "broken", "--ckpt_path", "last").code == 0
    assert_equal_runs("whole", "broken")
    assert_equal_runs("whole/dense", "broken/dense")


def test_a_run_interrupted_in_its_dense_twin(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("run", tiny, "--dense_twin", "true", "--out", "whole").code == 0
    plain = EpochLines.on_train_epoch_end

    def stop(self: EpochLines, trainer: Trainer, model: Any) -> None:
        plain(self, trainer, model)
        if "dense" in str(trainer.default_root_dir) and trainer.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(EpochLines, "on_train_epoch_end", stop)
    assert cli("run", tiny, "--dense_twin", "true", "--out", "broken").code == 130
    monkeypatch.setattr(EpochLines, "on_train_epoch_end", plain)
    assert Path("broken/dense/checkpoints/last.ckpt").exists()
    assert cli("run", tiny, "--dense_twin", "true", "--out", "broken", "--ckpt_path", "last").code == 0
    assert_equal_runs("whole", "broken")
    assert_equal_runs("whole/dense", "broken/dense")


def test_without_the_saved_state_the_end_is_another(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the tests above: a checkpoint that does not say where the run was does not pass them."""
    options = ["--checkpoint_every", "7st"]
    assert cli("run", tiny, *options, "--out", "whole").code == 0
    interrupt_at(10, monkeypatch)
    assert cli("run", tiny, *options, "--out", "broken").code == 130
    path = Path("broken/checkpoints/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer_states"][0]["state"] = {}
    torch.save(checkpoint, path)
    assert cli("run", tiny, *options, "--out", "broken", "--ckpt_path", "last").code == 0
    assert not same(weights("whole"), weights("broken"))


def test_a_finished_run_can_be_made_longer(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--dense_twin", "true", "--out", "out").code == 0
    options = ["--dense_twin", "true", "--trainer.max_epochs", "3", "--out", "out", "--ckpt_path", "last"]
    assert cli("run", tiny, *options).code == 0
    last = torch.load("out/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 39
    # A twin that trained for less would flatter the sparse run.
    assert torch.load("out/dense/checkpoints/last.ckpt", weights_only=True)["global_step"] == 39
    assert "max_epochs: 3" in Path("out/config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--method.sparsity", "0.7"], ["method.init_args.sparsity", "0.8", "0.7"]),
        (["--data.batch_size", "50"], ["data.init_args.batch_size"]),
        (["--model.optimizer.lr", "0.01"], ["optimizer.init_args.lr"]),
        (["--seed", "4"], ["seed was 3 and is 4"]),
        (["--method", "null"], ["method"]),
        (["--method.schedule", "Cubic"], ["schedule.class_path"]),
    ],
)
def test_another_recipe_does_not_go_on(changed: list[str], told: list[str], tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--out", "out").code == 0
    before = contents(Path("out"))
    ended = cli("run", tiny, *changed, "--trainer.max_epochs", "3", "--out", "out", "--ckpt_path", "last")
    assert ended.code == 2
    assert ended.err.strip().count("\n") == 0
    assert [text for text in [*told, "--init_from out"] if text not in ended.err] == []
    assert contents(Path("out")) == before


def damaged(kind: str, path: Path) -> Path:
    """A copy of a good checkpoint, or something in its place, at a path that is no run directory."""
    target = path.with_name(f"{kind}.ckpt")
    shutil.copy(path, target)
    checkpoint = torch.load(path, weights_only=True)
    if kind == "truncated":
        target.write_bytes(path.read_bytes()[:-1000])
    elif kind == "text":
        target.write_text("hello", encoding="utf-8")
    elif kind == "a list":
        torch.save([1, 2], target)
    elif kind == "without masks":
        torch.save(checkpoint | {"callbacks": {}}, target)
    elif kind == "weights only":
        torch.save({"state_dict": checkpoint["state_dict"]}, target)
    elif kind == "empty":
        target.write_bytes(b"")
    return target


KINDS = {
    "truncated": ["truncated"],
    "text": ["cannot be read"],
    "a list": ["list", "no checkpoint"],
    "empty": ["cannot be read"],
    "without masks": ["no masks", "init_from"],
    "weights only": ["optimizer_states", "loops", "global_step", "--init_from"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_a_run_cannot_go_on_from(kind: str, tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--out", "good").code == 0
    Path("loose/checkpoints").mkdir(parents=True)
    shutil.copy("good/checkpoints/last.ckpt", "loose/checkpoints/good.ckpt")
    path = damaged(kind, Path("loose/checkpoints/good.ckpt"))
    before = contents(tiny.parent)
    ended = cli("run", tiny, "--trainer.max_epochs", "3", "--out", "new", "--ckpt_path", path)
    assert ended.code == 2
    assert ended.err.strip().count("\n") == 0, ended.err
    assert any(text in ended.err for text in KINDS[kind])
    assert contents(tiny.parent) == before
    if kind not in ("without masks", "weights only"):
        ended = cli("run", tiny, "--out", "new", "--init_from", path)
        assert (ended.code, ended.err.strip().count("\n")) == (2, 0)
        assert cli("verify", path).code == 2


def test_checkpoints_of_another_model(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--out", "good").code == 0
    shutil.copytree("good/checkpoints", "loose/checkpoints")
    for hidden, told in (("[8, 16]", "fc1.weight"), ("[16]", "fc2.weight"), ("[16, 16, 16]", "fc3.weight")):
        for option in ("--init_from", "--ckpt_path"):
            way = [option, "loose/checkpoints/last.ckpt", "--model.network.hidden", hidden, "--out", "new"]
            ended = cli("run", tiny, *way)
            assert ended.code == 2
            assert "another model" in ended.err
            assert told in ended.err
            assert ended.err.strip().count("\n") == 0
            assert not Path("new").exists()


# -- a new recipe from a sparse model ---------------------------------------------------------------------------------


def half_then_ninety(cli: Cli, tiny: Path, source: str | Path, *more: object) -> list[float]:
    """Raise a 50 % sparse model to 90 %; the sparsity logged on the way."""
    ended = cli("run", tiny, "--method.sparsity", "0.9", "--init_from", source, *more, "--out", "raised")
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in Path("raised/history.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["sparsity/global"] for row in rows if "sparsity/global" in row]


def half(cli: Cli, tiny: Path) -> None:
    assert cli("run", tiny, "--method.sparsity", "0.5", "--out", "half").code == 0


def dead(out: str) -> dict[str, torch.Tensor]:
    return {name: ~mask for name, mask in load_masks(Path(out, "masks.safetensors")).items()}


@pytest.mark.parametrize("source", ["run directory", "checkpoint", "state dict", "safetensors"])
def test_a_sparse_model_becomes_sparser_and_loses_no_zero(source: str, tiny: Path, cli: Cli) -> None:
    half(cli, tiny)
    state = weights("half")
    torch.save(state, "state.pt")
    save_file({name: value.contiguous() for name, value in state.items()}, "state.safetensors")
    path = {
        "run directory": "half",
        "checkpoint": "half/checkpoints/final.ckpt",
        "state dict": "state.pt",
        "safetensors": "state.safetensors",
    }[source]
    curve = half_then_ninety(cli, tiny, path)
    assert curve[0] == 0.5
    assert curve == sorted(curve)
    assert curve[-1] == 0.9
    before, after = dead("half"), dead("raised")
    assert all(bool((after[name] | ~before[name]).all()) for name in before)
    assert sum(int(d.sum()) for d in after.values()) == 1152
    assert metrics("raised")["verified"] is True
    # Sparse from the start, it has no dense phase to be compared with.
    assert metrics("raised")["dense"] is None


def test_a_sparse_model_waits_for_a_schedule_that_begins_lower(tiny: Path, cli: Cli) -> None:
    half(cli, tiny)
    cubic = "{class_path: Cubic, init_args: {start: 0st, end: 20st, every: 2st}}"
    curve = half_then_ninety(cli, tiny, "half", "--method.schedule", cubic)
    assert min(curve) == 0.5
    assert curve == sorted(curve)
    assert curve[-1] == 0.9


def test_sparsity_cannot_be_lowered_by_the_way(tiny: Path, cli: Cli) -> None:
    """Asked for less than the model has, it keeps every zero and says so."""
    half(cli, tiny)
    ended = cli("run", tiny, "--method.sparsity", "0.3", "--init_from", "half", "--out", "lower")
    assert ended.code in (0, 2)
    if ended.code == 0:
        assert metrics("lower")["sparsity"]["actual"] == 0.5


def test_keep_masks_from_somebody_elses_zeros(tiny: Path, cli: Cli) -> None:
    half(cli, tiny)
    torch.save(weights("half"), "state.pt")
    keep = "{class_path: KeepMasks}"
    assert cli("run", tiny, "--method", keep, "--init_from", "state.pt", "--out", "kept").code == 0
    zeros = {name: value == 0 for name, value in weights("half").items() if name in dead("half")}
    assert all(torch.equal(zeros[name], mask) for name, mask in dead("kept").items())
    assert cli("run", tiny, "--method", "null", "--init_from", "state.pt", "--out", "free").code == 0
    # Without a method the zeros grow back, but for those of pixels that are always black.
    assert sum(int((weights("free")[name] == 0).sum()) for name in zeros) < 320


def test_a_user_without_sparsetrain_loads_the_checkpoint(tiny: Path, cli: Cli) -> None:
    half(cli, tiny)
    from sparsetrain.tasks import MLP

    Classification(MLP(64, [16, 16], 10)).load_state_dict(weights("half"), strict=True)
    assert TINY.count("sparsity: 0.8") == 1
    assert os.path.isfile("half/config.yaml")
