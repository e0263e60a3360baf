"""Gymnasium environments, and a policy that plays them: steps of several side by side, and whole episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsetrain.errors import DataError, DivergedError, nearest


@dataclass(frozen=True)
class World:
    """An environment by its gymnasium name, and how each of several differs from it.

    ``changes``: attributes of ``env.unwrapped`` and what they are set to; the environment of number n has the n-th of them,
    and they repeat. Raises `DataError`, from `require_playable` and `make`, for what is not there or cannot be played.

    Example: ``World("CartPole-v1", ({"force_mag": 5.0}, {"gravity": 20.0})).make(1)``.
    """

    environment: str
    changes: tuple[dict[str, float], ...] = ({},)

    def make(self, number: int = 0) -> Any:
        """A new environment, the one of this number."""
        try:
            import gymnasium  # an extra, and half a second that other data should not pay
        except ImportError as error:
            raise DataError(
                f"{self.environment!r} is played with the package gymnasium, which is missing: pip install 'sparsetrain[rl]'"
            ) from error
        try:
            env = gymnasium.make(self.environment, disable_env_checker=True)
        except (gymnasium.error.Error, ImportError) as error:
            raise DataError(f"environment {self.environment!r} cannot be made: {error}") from error
        inner = env.unwrapped
        for name, value in self.changes[number % len(self.changes)].items():
            known = [key for key, old in vars(inner).items() if is_number(old)]
            if name not in known:
                env.close()
                raise DataError(
                    f"changes: {self.environment} has no number {name!r} to change.{nearest(name, known)} It has "
                    f"{', '.join(sorted(known))}"
                )
            setattr(inner, name, value)
        return env

    def require_playable(self) -> tuple[tuple[int, ...], int]:
        """The shape of an observation, and how many actions there are.

        Raises `DataError` for other than Box observations and Discrete actions, and for episodes that need not end.
        """
        from gymnasium.spaces import Box, Discrete

        for number in range(len(self.changes)):
            env = self.make(number)
            env.close()
        seen, does = env.observation_space, env.action_space
        if not isinstance(seen, Box) or not isinstance(does, Discrete):
            raise DataError(
                f"{self.environment} has observations {seen} and actions {does}; Box observations and Discrete actions can be "
                "played (CartPole-v1, Acrobot-v1, MountainCar-v0)"
            )
        if env.spec is None or env.spec.max_episode_steps is None:
            raise DataError(
                f"{self.environment} has no time limit, and an evaluation might never end; register it with max_episode_steps"
            )
        return tuple(seen.shape), int(does.n)


@dataclass(frozen=True)
class Rollout:
    """T steps of E environments side by side; an environment that ended goes on with its next episode.

    ``observations`` (T, E, ...) float32: what was seen; ``actions`` (T, E) int64, from 0; ``rewards`` (T, E) float32;
    ``following`` (T, E, ...): what was seen next, the last observation of an episode included; ``terminated`` (T, E) bool:
    nothing comes after it; ``ended`` (T, E) bool: terminated, or cut off by the time limit.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    following: Tensor
    terminated: Tensor
    ended: Tensor


def play(policy: nn.Module, world: World, steps: int, seeds: Sequence[int], generator: torch.Generator) -> Rollout:
    """Let a policy play, drawing its actions: ``softmax(policy(observations))`` of (E, ...) are probabilities (E, actions).

    One environment for every seed, which its first reset is given. Raises `DivergedError` for observations, rewards or logits
    that are not finite, `DataError` for a policy that cannot be given these observations, or of other actions.

    Example: ``play(network, World("CartPole-v1"), 128, seeds=[1, 2], generator=torch.Generator().manual_seed(0))``.
    """
    with _playing(policy, world, range(len(seeds))) as (envs, act):
        seen = observed(world, [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
        found: list[tuple[Any, ...]] = []
        for _ in range(steps):
            actions = torch.multinomial(act(seen).softmax(1), 1, generator=generator)[:, 0]
            following, rewards, terminated, truncated = _step(world, envs, actions)
            ended = terminated | truncated
            found.append((seen, actions.numpy(), rewards, following, terminated, ended))
            seen = following.copy()
            for index in np.flatnonzero(ended):
                seen[index] = observed(world, [envs[index].reset()[0]])[0]
    return Rollout(*(torch.from_numpy(np.stack(column)) for column in zip(*found, strict=True)))


def episode_returns(policy: nn.Module, world: World, seeds: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """Undiscounted returns (B,) of whole episodes played greedily: the action of the largest logit.

    Episode i begins with the reset of ``seeds[i]``, in the environment of number ``numbers[i]``. Raises as `play` does.

    Example: ``episode_returns(network, World("CartPole-v1"), seeds=[1, 2], numbers=[0, 0])``.
    """
    total = np.zeros(len(seeds))
    with _playing(policy, world, numbers) as (envs, act):
        seen = observed(world, [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
        left = np.arange(len(seeds))
        while len(left):
            following, rewards, terminated, truncated = _step(world, [envs[i] for i in left], act(seen).argmax(1))
            total[left] += rewards
            goes_on = ~(terminated | truncated)
            left, seen = left[goes_on], following[goes_on]
    return torch.from_numpy(total).float()


@contextmanager
def _playing(policy: nn.Module, world: World, numbers: Sequence[int]) -> Iterator[tuple[list[Any], Callable[..., Tensor]]]:
    """New environments, and observations -> finite float32 logits in main memory; `at_play` meanwhile."""
    shape, actions = world.require_playable()
    like = next(policy.parameters())

    def act(seen: np.ndarray[Any, Any]) -> Tensor:
        try:
            logits: Tensor = policy(torch.from_numpy(seen).to(like)).float().cpu()
        except RuntimeError as error:
            raise DataError(f"the policy cannot be given the observations {shape} of {world.environment}: {error}") from error
        if logits.shape != (len(seen), actions):
            raise DataError(
                f"{world.environment} has {actions} actions, and the policy gives {tuple(logits.shape)} for {len(seen)} "
                "observations; give the network one output for each action"
            )
        if not logits.isfinite().all():
            raise DivergedError(f"the policy is not finite any more: NaN or infinite logits in {world.environment}")
        return logits

    envs = [world.make(number) for number in numbers]
    try:
        with at_play(policy):
            yield envs, act
    finally:
        for env in envs:
            env.close()


@contextmanager
def at_play(policy: nn.Module) -> Iterator[None]:
    """A policy in eval mode, without gradients; afterwards its modules train again that did before."""
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _step(world: World, envs: Sequence[Any], actions: Tensor) -> tuple[np.ndarray[Any, Any], ...]:
    """Observations, rewards, terminated and truncated, an entry for each environment."""
    chosen = zip(envs, actions.tolist(), strict=True)
    seen, rewards, terminated, truncated, _ = zip(*(env.step(a + env.action_space.start) for env, a in chosen), strict=True)
    gained = np.array(rewards, dtype=np.float32)
    if not np.isfinite(gained).all():
        raise DivergedError(f"{world.environment} gives a reward that is NaN or infinite")
    return observed(world, seen), gained, np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)


def observed(world: World, seen: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Observations of several environments, (E, ...) float32; raises `DivergedError` where they are not finite."""
    found = np.stack(seen).astype(np.float32)
    if not np.isfinite(found).all():
        raise DivergedError(f"{world.environment} gives an observation that is NaN or infinite; are its changes possible?")
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a number that could be another one (a switch is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
