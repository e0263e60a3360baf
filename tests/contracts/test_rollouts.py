"""Reinforcement learning keeps the promises: exact resume from rollouts at hand, the policy at hand plays, cart after cart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sparsetrain.callbacks import ContinualPruning, PruneFinetune
from sparsetrain.criteria import Wanda
from sparsetrain.data import DomainSequence
from sparsetrain.data.rollouts import RolloutData, Rollouts
from sparsetrain.oneshot import Streaming
from sparsetrain.schedules import Rounds
from sparsetrain.targets import Targets
from sparsetrain.tasks import MLP
from sparsetrain.tasks.policy import PolicyGradient

from .promises import same_bits
from .toys import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
CRITIC = Targets(exclude=("critic",))


def policy(seed: int = 0) -> PolicyGradient:
    torch.manual_seed(seed)
    network = MLP(4, [16, 16], 2)
    for weight in network.parameters():
        weight.data.mul_(4)  # sure of itself: another policy soon goes elsewhere
    return PolicyGradient(network, MLP(4, [8], 1), optimizer=lambda p: torch.optim.Adam(p, lr=0.01), lr_schedule="linear")


def data(**options: Any) -> RolloutData:
    return RolloutData(**({"steps": 16, "environments": 2, "passes": 2, "episodes": 2, "batch_size": 8, "seed": 4} | options))


# -- resume ------------------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Checkpoints after every step, in between passes and rounds; and every batch."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.batches: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, *args: Any) -> None:
        self.batches.append(list(batch))
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step:02d}-step.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step:02d}-epoch.ckpt")


def fit(watch: Watch, checkpoint: Path | None = None) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    """4 epochs of 4 batches: two rounds, each for two epochs; pruned once in the middle, on rollouts."""
    method = PruneFinetune(0.5, criterion=Wanda(batches=2), targets=CRITIC, schedule=Rounds(rounds=1, start="6st"))
    module = policy(0 if checkpoint is None else 9)
    run = trainer(method, watch, max_epochs=4, val_check_interval=2)
    run.fit(module, data(), ckpt_path=checkpoint, weights_only=True)
    return dict(module.state_dict()), watch.batches


def assert_same_run(resumed: tuple[Any, Any], whole: tuple[Any, Any]) -> None:
    same_bits(whole[0], resumed[0])
    missed = len(whole[1]) - len(resumed[1])
    for one, other in zip(whole[1][missed:], resumed[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_resume_equals_uninterrupted_from_every_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(Watch(tmp_path))
    assert len(whole[1]) == 16
    first, second = ({tuple(row.tolist()) for batch in part for row in batch[0]} for part in (whole[1][:4], whole[1][4:8]))
    assert first == second  # two passes over one round
    assert not first & {tuple(row.tolist()) for batch in whole[1][8:] for row in batch[0]}
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) == 20
    for checkpoint in checkpoints:
        if not checkpoint.name.startswith("16"):
            assert_same_run(fit(Watch(), checkpoint), whole)
    # The twin that forgets its rollouts plays with the policy of the middle of the round.
    monkeypatch.setattr(Rollouts, "load_state_dict", lambda self, state: None)
    with pytest.raises(AssertionError):
        assert_same_run(fit(Watch(), tmp_path / "03-step.ckpt"), whole)


def test_a_checkpoint_that_is_only_tested_leaves_nothing(tmp_path: Path) -> None:
    fit(Watch(tmp_path))
    same = data()
    watches = Watch(), Watch()
    for watch, tested in zip(watches, (True, False), strict=True):
        if tested:
            rerun = trainer(PruneFinetune(0.5, targets=CRITIC))
            rerun.test(policy(5), same, ckpt_path=tmp_path / "03-step.ckpt", verbose=False, weights_only=True)
        trainer(watch, max_epochs=1).fit(policy(5), same if tested else data())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(watches[0].batches, watches[1].batches, strict=True))


def test_a_second_fit_plays_anew() -> None:
    same, watches = data(), (Watch(), Watch())
    for seed, watch in enumerate(watches):
        trainer(watch, max_epochs=1).fit(policy(seed), same)
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(watches[0].batches, watches[1].batches, strict=True))


# -- who plays ---------------------------------------------------------------------------------------------------------------


class Ratio(Callback):
    """How far the first batch's actions are from as likely as when they were played."""

    found: float | None = None

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        if self.found is None:
            with torch.no_grad():
                now = module(batch[0]).log_softmax(1).gather(1, batch[1][:, None])[:, 0]
            self.found = float((now - batch[2]).abs().max())


@pytest.mark.parametrize("early", [False, True])
def test_the_pruned_policy_plays_what_it_is_trained_on(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if early:  # the twin: rollouts are played when the loader is made, before the policy is pruned
        make = RolloutData.train_dataloader

        def eager(self: RolloutData) -> Any:
            loader = make(self)
            assert self.train_set is not None
            self.train_set.at_epoch(0)
            return loader

        monkeypatch.setattr(RolloutData, "train_dataloader", eager)
    ratio = Ratio()
    method = PruneFinetune(0.75, criterion=Wanda(batches=2), targets=CRITIC, schedule=Rounds(rounds=1, start="0st"))
    trainer(method, ratio, max_epochs=1).fit(policy(), data())
    assert ratio.found is not None
    assert (ratio.found > 1e-3) is early


# -- one cart after the other ------------------------------------------------------------------------------------------------


CARTS = {"strong": {"force_mag": 30.0}, "weak": {"force_mag": 1.0}}


def learn(epochs: int = 0, **carts: dict[str, float]) -> tuple[PolicyGradient, ContinualPruning]:
    module = policy()
    method = ContinualPruning(0.5, criterion=Wanda(batches=4), targets=CRITIC, streaming=Streaming(batch=32))
    sequence = DomainSequence({name: data(changes=changes) for name, changes in carts.items()})
    for name in sequence:
        sequence.enter(name)
        if epochs:
            trainer(method, max_epochs=epochs).fit(module, sequence)
        else:
            trainer(method, Stop(), max_epochs=1).fit(module, sequence)
    return module, method


class Stop(Callback):
    """Prunes, and trains nothing."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.should_stop = True


def test_a_policy_is_pruned_for_one_cart_after_the_other() -> None:
    before, (module, method) = policy(), learn(**CARTS)
    assert method.pruner is not None
    assert [(d.name, d.samples) for d in method.pruner.domains] == [("strong", 32), ("weak", 32)]
    assert sorted(method.masks.tensors) == ["network.fc1.weight", "network.fc2.weight"]
    assert int((module.network.get_parameter("fc2.weight") == 0).sum()) == 128
    same_bits(dict(before.critic.state_dict()), dict(module.critic.state_dict()))
    again, _ = learn(**CARTS)
    same_bits(dict(module.state_dict()), dict(again.state_dict()))
    # The twin: the second cart is as the first, and what is looked at is another.
    other, _ = learn(strong=CARTS["strong"], weak=CARTS["strong"])
    assert not torch.equal(other.network.fc2.weight == 0, module.network.fc2.weight == 0)


def test_what_is_looked_at_was_played_by_the_policy_at_hand() -> None:
    """Wanda's norms of the first layer are those of the observations, played again here by hand."""
    module = policy()
    method = ContinualPruning(0.5, criterion=Wanda(batches=4), targets=CRITIC, streaming=Streaming(batch=32))
    cart = data(changes={"force_mag": 30.0})
    run = trainer(method, Stop(), max_epochs=1)
    run.fit(module, cart)
    cart.trainer = run
    run.strategy._lightning_module = policy()  # as it was
    [seen, *_] = cart._gather(1, 0).tensors
    norms = seen.square().mean(0).sqrt()
    base = policy().network.fc1.weight.detach()
    dead = (base.abs() * norms).argsort(1)[:, :2]
    expected = torch.ones_like(base, dtype=torch.bool).scatter(1, dead, False)
    assert torch.equal(method.masks["network.fc1.weight"].mask, expected)
    run.strategy._lightning_module = module
    assert not torch.equal(cart._gather(1, 0).tensors[0], seen)  # the twin: the pruned one goes elsewhere


def test_fine_tuning_on_every_cart_keeps_the_masks() -> None:
    module, method = learn(epochs=2, **CARTS)
    assert method.verification is not None
    assert method.verification.ok
    assert method.facts()["drift"] > 0
    kept = copy.deepcopy(method.masks["network.fc2.weight"].mask)
    assert kept is not None
    assert torch.equal(module.network.fc2.weight != 0, kept)


def test_domains_are_judged_each_in_its_own_physics() -> None:
    """Inside a fit the sequence is the data: the cart at hand is the one that is played."""
    sequence = DomainSequence({name: data(changes=changes, episodes=8) for name, changes in CARTS.items()})
    found = {}
    for name in sequence:
        sequence.enter(name)
        run = trainer(max_epochs=1)
        found[name] = (
            run.validate(policy(), sequence, verbose=False)[0]["val/return"],
            run.validate(policy(), sequence[name], verbose=False)[0]["val/return"],
        )
    assert found["strong"][0] == found["strong"][1]
    assert found["weak"][0] == found["weak"][1]
    assert found["strong"] != found["weak"]
