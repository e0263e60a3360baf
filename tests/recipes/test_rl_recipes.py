"""A recipe over carts: the matrix of returns, measured again by hand; a run killed inside a cart goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsetrain.data.playing import World, episode_returns
from sparsetrain.data.rollouts import RolloutData
from sparsetrain.export import load_compact
from sparsetrain.tasks import MLP
from sparsetrain.tasks.policy import PolicyGradient
from tests.recipes.conftest import Cli
from tests.recipes.test_domain_runs import assert_equal
from tests.recipes.test_run import metrics

pytestmark = pytest.mark.usefixtures("no_report")
GRAVITY = {"normal": 9.8, "heavy": 40.0, "light": 1.0}
DATA = "environment: CartPole-v1, steps: 16, environments: 2, passes: 2, episodes: 3, batch_size: 8"
DOMAINS = "".join(
    f"      {name}:\n        class_path: sparsetrain.data.rollouts.RolloutData\n"
    f"        init_args: {{changes: {{gravity: {value}}}, {DATA}}}\n"
    for name, value in GRAVITY.items()
)
TINY = f"""\
seed: 3
model:
  class_path: sparsetrain.tasks.policy.PolicyGradient
  init_args:
    network: {{class_path: MLP, init_args: {{in_features: 4, hidden: [16, 16], num_classes: 2}}}}
    critic: {{class_path: MLP, init_args: {{in_features: 4, hidden: [8], num_classes: 1}}}}
    optimizer: {{class_path: torch.optim.Adam, init_args: {{lr: 0.01}}}}
data:
  class_path: DomainSequence
  init_args:
    domains:
{DOMAINS}
method:
  class_path: ContinualPruning
  init_args: {{sparsity: 0.5, criterion: {{class_path: Wanda, init_args: {{batches: 2}}}}, targets: {{exclude: [critic]}}}}
trainer: {{max_epochs: 0}}
"""
TRAINS = ("--trainer.max_epochs", "3", "--checkpoint_every", "3st")


def test_a_run_over_carts(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, "--out", "out")
    assert (ended.code, ended.err) == (0, ""), ended.err
    found = metrics("out")
    assert (found["metric"], found["higher_is_better"], found["verified"]) == ("test/return", True, True)
    assert found["sparsity"]["actual"] == 0.5
    data = RolloutData(episodes=3)
    data.setup()
    seeds = data.test_set.tensors[1].tolist()
    task = PolicyGradient(MLP(4, [16, 16], 2), MLP(4, [8], 1))
    for stage, name in enumerate(GRAVITY):
        saved = torch.load(f"out/domains/{stage}-{name}/checkpoints/final.ckpt", weights_only=True)
        task.load_state_dict(saved["state_dict"])
        worlds = [World("CartPole-v1", ({"gravity": value},)) for value in GRAVITY.values()]
        row = [float(episode_returns(task, world, seeds, [0, 0, 0]).mean()) for world in worlds]
        assert found["continual"]["matrix"][stage] == pytest.approx(row, rel=1e-6)
    assert cli("verify", "out").code == 0
    assert cli("plan", tiny).code == 0


def test_a_run_that_was_killed_inside_a_cart(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("run", tiny, *TRAINS, "--out", "whole").code == 0
    step = PolicyGradient.training_step

    def killed(self: PolicyGradient, batch: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
        if self.trainer.datamodule.domain == "heavy" and self.global_step == 7:  # behind a checkpoint, inside a round
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(PolicyGradient, "training_step", killed)
        assert cli("run", tiny, *TRAINS, "--out", "out").code != 0
    assert Path("out/domains/1-heavy/checkpoints/last.ckpt").is_file()
    assert not Path("out/domains/1-heavy/checkpoints/final.ckpt").exists()
    ended = cli("run", tiny, *TRAINS, "--out", "out", "--ckpt_path", "last")
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert_equal("out", "whole")


def test_a_policy_ships_verified_on_how_an_episode_begins(tiny: Path, cli: Cli) -> None:
    assert cli("run", tiny, "--out", "out").code == 0
    ended = cli("export", "out", "--out", "shipped")
    assert (ended.code, ended.err) == (0, "")
    network = MLP(4, [16, 16], 2)
    load_compact("shipped", network)
    last = torch.load("out/domains/2-light/checkpoints/final.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, last[f"network.{name}"]) for name, value in network.state_dict().items())
