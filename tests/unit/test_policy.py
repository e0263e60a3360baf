"""Playing, advantages and the clipped surrogate by hand; the same policy plays the same; what cannot be played says so."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from sparsetrain.data import VisionData
from sparsetrain.data.playing import Rollout, World, episode_returns, play
from sparsetrain.data.rollouts import RolloutData
from sparsetrain.errors import DataError, DivergedError, RecipeError
from sparsetrain.recipe.metrics import main_metric
from sparsetrain.tasks import MLP, Classification
from sparsetrain.tasks.policy import PolicyGradient, clipped_surrogate, gae
from tests.contracts.line import ENDLESS, LINE
from tests.contracts.toys import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def constant(*outputs: float) -> nn.Linear:
    """The same outputs whatever the position on the line."""
    layer = nn.Linear(1, len(outputs))
    layer.weight.data.zero_()
    layer.bias.data = torch.tensor(outputs)
    return layer


LEFT, RIGHT, EITHER = (99.0, 0.0), (0.0, 99.0), (0.0, 0.0)


def walk(steps: int, logits: tuple[float, ...] = RIGHT, seeds: tuple[int, ...] = (0,), **changes: float) -> Rollout:
    return play(constant(*logits), World(LINE, (changes,)), steps, seeds, torch.Generator().manual_seed(0))


# -- mathematics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        # Errors 0.5, 1.5 and 2; 2, then 1.5 + 2/4, then 0.5 + 2/4.
        ([False, False, True], [1.0, 2.0, 2.0]),
        # What comes after the second step is another episode.
        ([False, True, True], [0.875, 1.5, 2.0]),
    ],
)
def test_advantages_by_hand(ended: list[bool], expected: list[float]) -> None:
    found = gae(column(1, 2, 3), column(1, 1, 1), column(1, 1, 0), torch.tensor(ended)[:, None], discount=0.5, trace=0.5)
    assert found.flatten().tolist() == expected


def test_the_two_ends_of_the_trace() -> None:
    """Lambda 0 is the error of one step, lambda 1 the discounted rewards to the end (and the critic there) less the value."""
    torch.manual_seed(0)
    rewards, values = torch.randn(6, 3), torch.randn(7, 3)
    ended = torch.zeros(6, 3, dtype=torch.bool)
    one = gae(rewards, values[:6], values[1:], ended, discount=0.9, trace=0.0)
    assert torch.allclose(one, rewards + 0.9 * values[1:] - values[:6])
    whole = gae(rewards, values[:6], values[1:], ended, discount=0.9, trace=1.0)
    powers = 0.9 ** torch.arange(6.0)
    assert torch.allclose(whole[0] + values[0], powers @ rewards + 0.9**6 * values[6], atol=1e-5)
    assert torch.allclose(whole[4] + values[4], rewards[4] + 0.9 * rewards[5] + 0.81 * values[6], atol=1e-5)


def test_the_clipped_surrogate_and_its_gradient_by_hand() -> None:
    """Ratios 1.5 and 0.5, to be clipped at 0.7 and 1.3: only what makes a policy worse counts beyond them."""
    new = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    found = clipped_surrogate(new, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), clip=0.3)
    assert found.item() == pytest.approx((1.3 - 1.5 + 0.5 - 0.7) / 4)
    [gradient] = torch.autograd.grad(found, new)
    assert (4 * gradient).tolist() == pytest.approx([0.0, -1.5, 0.5, 0.0])


def test_the_loss_of_a_policy_that_does_not_care() -> None:
    """Both actions are as likely as when it played, A = 3 and -1, V = 2, R = 2 and 6."""
    task = PolicyGradient(constant(*EITHER), constant(2.0), entropy=0.5)
    task.log_training = lambda loss: None  # type: ignore[method-assign]
    half = math.log(0.5)
    batch = (
        torch.zeros(2, 1),
        torch.tensor([0, 1]),
        torch.full((2,), half),
        torch.tensor([3.0, -1.0]),
        torch.tensor([2.0, 6.0]),
    )
    loss = task.training_step(batch, 0)
    assert loss.item() == pytest.approx(-1.0 + 8.0 / 2 + 0.5 * half)
    loss.backward()
    # d/d logits of -(3 log p_0 - log p_1) / 2 is (-1, 1): towards the action that was better. Entropy is at its peak.
    assert task.network.bias.grad.tolist() == pytest.approx([-1.0, 1.0])  # type: ignore[union-attr]
    assert float(task.critic.bias.grad) == pytest.approx(-2.0)  # type: ignore[arg-type, union-attr]


# -- playing -----------------------------------------------------------------------------------------------------------------


def test_a_walk_by_hand() -> None:
    found = walk(5)
    assert found.observations.flatten().tolist() == [0, 1, 0, 1, 0]  # 2 is the end, and 0 the next beginning
    assert found.following.flatten().tolist() == [1, 2, 1, 2, 1]
    assert found.rewards.flatten().tolist() == [1, 2, 1, 2, 1]
    assert found.actions.flatten().tolist() == [1] * 5
    assert found.terminated.flatten().tolist() == found.ended.flatten().tolist() == [False, True, False, True, False]
    away = walk(5, LEFT, stride=0.5, gain=2.0)
    assert away.following.flatten().tolist() == [-0.5, -1.0, -1.5, -2.0, -0.5]
    assert away.rewards.flatten().tolist() == [-1, -2, -3, -4, -1]
    assert not away.terminated.any()
    assert away.ended.flatten().tolist() == [False, False, False, True, False]  # the time limit of 4


@pytest.mark.parametrize(
    ("stride", "returns"),
    [
        (1.0, [1 + 0.5 * 2, 2.0]),  # 2 is reached: nothing comes after it
        (
            0.25,
            [0.25 + 0.5 * 0.5 + 0.25 * 0.75 + 0.125 * 1 + 0.0625 * 8, 0.5 + 0.5 * 0.75 + 0.25 * 1 + 0.125 * 8],
        ),  # cut off: V = 8
    ],
)
def test_returns_to_train_on_by_hand(stride: float, returns: list[float]) -> None:
    """With lambda 1: discounted rewards to the end of the episode, and the critic's word where it was only cut off."""
    task = PolicyGradient(constant(*EITHER), constant(8.0), discount=0.5, trace=1.0)
    seen, actions, log_probabilities, advantages, found = task.training_data(walk(4, stride=stride))
    assert found[:2].tolist() == returns
    assert seen.flatten().tolist() == [0, stride, 0 if stride == 1 else 2 * stride, stride if stride == 1 else 3 * stride]
    assert actions.tolist() == [1] * 4
    assert log_probabilities.tolist() == pytest.approx([math.log(0.5)] * 4)
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
    # Walks of stride 1 are all as good: none is better than the others.
    assert float(advantages.square().mean()) == pytest.approx(0 if stride == 1 else 1, rel=1e-4)
    assert torch.equal(advantages.argsort(), found.argsort())


def test_episodes_are_played_greedily_each_in_its_own_physics() -> None:
    world = World(LINE, ({}, {"gain": 10.0}, {"stride": 0.25}))
    likely = constant(0.0, 0.1)  # hardly better, and always taken
    assert episode_returns(likely, world, seeds=[0] * 4, numbers=[0, 1, 2, 3]).tolist() == [3, 30, 2.5, 3]


def test_actions_are_drawn_as_likely_as_the_policy_says() -> None:
    policy = constant(math.log(1.0), math.log(3.0))
    found = play(policy, World(LINE), 500, range(8), torch.Generator().manual_seed(1))
    assert float(found.actions.float().mean()) == pytest.approx(0.75, abs=0.03)  # 4000 draws: 4 deviations are 0.027


def test_a_policy_plays_in_eval_mode() -> None:
    """With dropout of everything it would go anywhere."""
    policy = nn.Sequential(constant(*RIGHT), nn.Dropout(1.0)).train()
    found = play(policy, World(LINE), 20, [0], torch.Generator().manual_seed(0))
    assert found.actions.flatten().tolist() == [1] * 20
    assert episode_returns(policy, World(LINE), [0], [0]).tolist() == [3]
    assert policy.training


def network(seed: int = 0, actions: int = 2) -> MLP:
    torch.manual_seed(seed)
    return MLP(4, [8], actions)


def test_the_same_policy_plays_the_same_and_nothing_else_is_moved() -> None:
    policy, another = network().train(), network(1)

    def once(seeds: tuple[int, ...] = (3, 4), draws: int = 5, policy: nn.Module = policy) -> Rollout:
        return play(policy, World("CartPole-v1"), 40, seeds, torch.Generator().manual_seed(draws))

    policy.fc1.eval()
    first = once()
    assert [policy.training, policy.fc1.training, policy.fc2.training] == [True, False, True]
    torch.manual_seed(6)
    streams = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    again = once()
    assert torch.equal(first.observations, again.observations)
    assert torch.equal(first.actions, again.actions)
    assert torch.equal(streams[0], torch.get_rng_state())
    assert np.array_equal(streams[1], np.random.get_state()[1])
    assert streams[2] == random.getstate()
    for other in (once(seeds=(3, 5)), once(draws=6), once(policy=another)):
        assert not torch.equal(first.observations, other.observations)
    assert torch.equal(once(seeds=(3, 5)).observations[0, 0], first.observations[0, 0])


def test_rounds_follow_from_seed_and_number() -> None:
    """The seeds of environments: none is used twice, whatever it is for."""
    data = RolloutData(environments=4, steps=3, episodes=4, seed=1)
    seen: list[tuple[int, ...]] = []
    data.trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    data.trainer.strategy._lightning_module = PolicyGradient(network(), network(actions=1))
    for turn in (0, 0, 1):
        seen.append(tuple(data._gather(0, turn).tensors[0][:4].flatten().tolist()))
    seen.append(tuple(data._gather(1, 0).tensors[0][:4].flatten().tolist()))
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3
    data.setup()
    other = RolloutData(environments=4, steps=3, episodes=4, seed=2)
    other.setup()
    assert torch.equal(data.test_set.tensors[0], other.test_set.tensors[0])
    assert not torch.equal(data.val_set.tensors[0], other.val_set.tensors[0])
    assert not set(data.val_set.tensors[1].tolist()) & set(data.test_set.tensors[1].tolist())


@pytest.mark.parametrize(
    ("gain", "first", "best"),
    [
        (1.0, 0, 3.0),  # to the right: 1 and 2; to the left it would be -1 - 2 - 3 - 4
        (-1.0, 1, 10.0),  # the other way round
    ],
)
def test_a_policy_learns_where_to_go(gain: float, first: int, best: float) -> None:
    torch.manual_seed(0)
    make = lambda parameters: torch.optim.Adam(parameters, lr=0.05)  # noqa: E731
    task = PolicyGradient(MLP(1, [8], 2), MLP(1, [8], 1), optimizer=make, discount=0.9)
    task.network.get_parameter("fc2.bias").data[first] = 2.0
    data = RolloutData(LINE, changes={"gain": gain}, steps=16, environments=4, passes=2, episodes=2, batch_size=32)
    run = trainer(max_epochs=16, limit_val_batches=0)
    assert run.test(task, data, verbose=False)[0]["test/return"] < 0
    run.fit(task, data)
    assert run.test(task, data, verbose=False)[0]["test/return"] == best


# -- what cannot be ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (World("CartPol-v1"), "environment 'CartPol-v1' cannot be made"),
        (World("no_such_module:CartPole-v1"), "cannot be made"),
        (World("CartPole-v1", ({}, {"force_mg": 1.0})), r"no number 'force_mg' to change\. Did you mean 'force_mag'\? It has"),
        (World("CartPole-v1", ({"kinematics_integrator": 1.0},)), "no number 'kinematics_integrator'"),
        (World(LINE, ({"flat": 1.0},)), "no number 'flat' to change"),
        (World("Pendulum-v1"), "Box observations and Discrete actions can be played"),
        (World("FrozenLake-v1"), "Box observations and Discrete actions can be played"),
        (World(ENDLESS), "has no time limit, and an evaluation might never end"),
    ],
)
def test_what_cannot_be_played(world: World, message: str) -> None:
    with pytest.raises(DataError, match=message):
        RolloutData(world.environment, changes=list(world.changes), environments=len(world.changes)).setup()


def test_without_gymnasium_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(DataError, match=r"pip install 'sparsetrain\[rl\]'"):
        World("CartPole-v1").make()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: walk(1, (0.0, 0.0, 0.0)), DataError, r"2 actions, and the policy gives \(1, 3\) for 1 observations"),
        (
            lambda: play(network(), World(LINE), 1, [0], torch.Generator()),
            DataError,
            r"cannot be given the observations \(1,\)",
        ),
        (lambda: walk(1, (math.nan, 0.0)), DivergedError, "NaN or infinite logits"),
        (lambda: walk(1, gain=math.nan), DivergedError, "reward that is NaN"),
        (lambda: walk(1, start=math.inf), DivergedError, "observation that is NaN"),
        (lambda: walk(2, stride=math.nan), DivergedError, "NaN"),
        (lambda: episode_returns(constant(math.nan, 0.0), World(LINE), [0], [0]), DivergedError, "NaN or infinite logits"),
        (
            lambda: PolicyGradient(constant(*RIGHT), constant(math.inf)).training_data(walk(2)),
            DivergedError,
            "critic is not finite",
        ),
        (
            lambda: PolicyGradient(constant(*RIGHT), constant(0.0, 0.0)).training_data(walk(2)),
            RecipeError,
            r"the critic gives \(2, 2\) for 2 observations; one value for each",
        ),
    ],
)
def test_what_is_not_finite_or_does_not_fit(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"environments": 0}, "environments=0 must be"),
        ({"passes": 0}, "passes=0 must be"),
        ({"episodes": -1}, "episodes=-1 must be"),
        ({"changes": []}, "changes is an empty list"),
        ({"changes": [{}, {}, {}], "environments": 4, "episodes": 3}, "environments=4 cannot be shared alike by 3 changes"),
        ({"changes": [{}, {}, {}], "environments": 3, "episodes": 4}, "episodes=4 cannot be shared alike by 3 changes"),
        ({"changes": {"gravity": math.nan}}, "changes sets gravity to nan"),
        ({"changes": {"gravity": True}}, "changes sets gravity to True"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_data_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        RolloutData(**options)


@pytest.mark.parametrize(
    "options", [{"discount": 0.0}, {"discount": 1.1}, {"trace": -0.1}, {"trace": 1.1}, {"clip": 0.0}, {"entropy": -0.1}]
)
def test_the_task_refuses(options: dict[str, float]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(RecipeError, match=f"{name}={value}"):
        PolicyGradient(network(), network(actions=1), **options)


def test_batches_need_a_policy() -> None:
    data = RolloutData(environments=1, episodes=1, steps=4, batch_size=2)
    with pytest.raises(DataError, match="RolloutData has no data yet"):
        data.train_dataloader()
    data.setup()
    loader = data.train_dataloader()
    assert len(loader) == 2  # known before anything is played
    with pytest.raises(DataError, match="RolloutData has no policy to play"):
        next(iter(loader))
    with pytest.raises(DataError, match="Classification is no policy"):
        trainer(limit_val_batches=0).fit(Classification(network()), data)
    with pytest.raises(RecipeError, match="plays episodes of RolloutData, and the data is VisionData"):
        trainer().test(PolicyGradient(network(), network(actions=1)), VisionData("digits"), verbose=False)


def test_a_return_is_what_a_run_is_judged_by_and_more_is_better() -> None:
    found = {"test/entropy": 1.0, "test/return": 400.0}
    assert main_metric(found) == {"metric": "test/return", "higher_is_better": True}
