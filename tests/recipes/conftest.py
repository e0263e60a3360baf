"""A tiny recipe on the embedded digits (26 optimizer steps, well under a second), and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsetrain.cli import main

TINY = """\
question: Does it work?
seed: 3
model:
  class_path: Classification
  init_args:
    network: {class_path: MLP, init_args: {in_features: 64, hidden: [16, 16], num_classes: 10}}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}
data:
  class_path: VisionData
  init_args: {name: digits, batch_size: 100}
method:
  class_path: PruneFinetune
  init_args:
    sparsity: 0.8
    allocation: global
    schedule: {class_path: Rounds, init_args: {rounds: 3, start: 5st, every: 4st}}
trainer: {max_epochs: 2}
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Ended]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """``cli("run", recipe, "--seed", 1)``: exit code, stdout, stderr."""

    def call(*arguments: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The tiny recipe, or the ``TINY`` of a test file that has one, in a folder that is also the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(getattr(request.module, "TINY", TINY), encoding="utf-8")
    return path


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out report.html, half of the time of such a short run, where it is not what is tested."""
    monkeypatch.setattr("sparsetrain.recipe.directory.write_report", lambda out: out)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
