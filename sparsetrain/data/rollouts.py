"""Reinforcement learning as data: the policy that is trained plays, and what it met is what it is trained on.

`RolloutData` asks the trainer for its model, lets it play `gymnasium` environments and hands what came of it to the model's
``training_data`` (`PolicyGradient` makes advantages of it). Three things make a run repeatable and resumable:

- The policy plays when the first batch of an epoch is asked for, not earlier: a method that prunes when training starts prunes
  the policy that plays.
- Resets and draws of actions follow from ``(seed, round)``. The same policy plays the same rollouts; no global random state is
  read or moved. Environments are made anew for every round, so that nothing of an earlier one is left in them.
- The rollouts at hand are part of the checkpoint. A run that was killed in the middle of them goes on with them.

With several processes every one plays the same rollouts and trains on its share of them; episodes of an evaluation are shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from sparsetrain.data.loading import ResumableLoader, TensorSet
from sparsetrain.data.playing import World, at_play, is_number, observed, play
from sparsetrain.data.splits import SplitData
from sparsetrain.errors import DataError

# What seeds are for: two uses never share one.
_TRAINING, _CALIBRATION, _VALIDATION, _TEST = range(4)


def _seeds(count: int, *key: int) -> list[int]:
    return [int(seed) for seed in np.random.SeedSequence(key).generate_state(count)]


class Rollouts:
    """What the policy at hand met: the data set behind `RolloutData`'s training batches.

    ``at_epoch`` plays anew where the passes over the last rollouts are over. Read apart from that (`training_batches`, for
    calibration) it gives the rollouts at hand, and before there are any, some that are played for the purpose.
    """

    def __init__(self, samples: int, passes: int, gather: Callable[..., TensorSet]) -> None:
        self.samples, self.passes, self.gather = samples, passes, gather
        #: The round and its rollouts; round None: played for calibration.
        self.round: int | None = None
        self.found: TensorSet | None = None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[0] for tensor in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, ...]:
        """The samples of ``indices`` (B,), each tensor of shape (B, ...)."""
        if self.found is None:
            self.found = self.gather(_CALIBRATION, 0)
        return self.found.__getitems__(indices)

    def at_epoch(self, epoch: int) -> TensorSet:
        """The rollouts to train on in this epoch."""
        asked = epoch // self.passes
        if self.found is None or self.round != asked:
            self.found, self.round = self.gather(_TRAINING, asked), asked
        return self.found

    def state_dict(self) -> dict[str, Any]:
        """The rollouts that are trained on; empty before there are any."""
        return {} if self.found is None or self.round is None else {"round": self.round, "tensors": list(self.found.tensors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them."""
        self.round, self.found = state["round"], TensorSet(*state["tensors"])


class RolloutData(SplitData[Any]):
    """Environments that the model of the trainer plays: rollouts to train on, whole episodes to be judged by.

    A round of rollouts is ``steps * environments`` samples (observation first, the rest as the model's ``training_data`` makes
    it) and is trained on for ``passes`` epochs; then the policy, as it is by then, plays the next round. Validation and test
    batches are episodes: first observation, seed of the reset, number of the environment; the task plays them. Those of the
    test set are the same for every ``seed``.

    Args:
        environment: a name gymnasium knows, with Box observations, Discrete actions and a time limit.
        changes: attributes of ``env.unwrapped`` -> what they are set to; values that were computed from them when the
            environment was made (CartPole's ``polemass_length`` of its ``length``) are attributes of their own. Of a list each
            environment (and episode) has one in turn: one policy for all.
        steps: of each environment in a round.
        environments: side by side; as many as there are changes, or a multiple.
        passes: epochs on the same rollouts.
        episodes: in an evaluation; as many as there are changes, or a multiple.
        loading: ``batch_size`` (samples of a training batch; 100) and ``seed`` (0; of resets, actions and shuffling).

    Raises:
        DataError: from the constructor for an argument out of its range; from ``setup`` for an environment or attribute that
            is not there, or cannot be played; when batches are asked for without a trainer, or with a model that is no policy.

    Example: ``Trainer(max_epochs=100).fit(PolicyGradient(MLP(4, [64], 2), MLP(4, [64], 1)), RolloutData("CartPole-v1"))``.
    """

    def __init__(
        self,
        environment: str = "CartPole-v1",
        changes: dict[str, float] | list[dict[str, float]] | None = None,
        steps: int = 256,
        environments: int = 8,
        passes: int = 10,
        episodes: int = 100,
        **loading: int,
    ) -> None:
        super().__init__(**loading)
        each = changes if isinstance(changes, list) else [changes or {}]
        for name, count in {"steps": steps, "environments": environments, "passes": passes, "episodes": episodes}.items():
            if count < 1:
                raise DataError(f"{name}={count} must be at least 1")
        if not each:
            raise DataError("changes is an empty list; give at least one mapping, or leave it out")
        for name, count in {"environments": environments, "episodes": episodes}.items():
            if count % len(each):
                raise DataError(
                    f"{name}={count} cannot be shared alike by {len(each)} changes; give {len(each)}, or a multiple of it"
                )
        for name, value in (item for one in each for item in one.items()):
            if not is_number(value) or not math.isfinite(value):
                raise DataError(f"changes sets {name} to {value!r}; give a finite number")
        self.world = World(environment, tuple(dict(one) for one in each))
        self.steps, self.environments, self.passes, self.episodes = steps, environments, passes, episodes
        self._played: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Try the environments, and begin the episodes of the evaluations."""
        if self.test_set is None:
            self.world.require_playable()
            self.val_set, self.test_set = self._begun(_VALIDATION, self.seed), self._begun(_TEST)

    def _begun(self, *key: int) -> TensorSet:
        seeds, numbers = _seeds(self.episodes, *key), range(self.episodes)
        starts = []
        for seed, number in zip(seeds, numbers, strict=True):
            env = self.world.make(number)
            starts.append(env.reset(seed=seed)[0])
            env.close()
        return TensorSet(torch.from_numpy(observed(self.world, starts)), torch.tensor(seeds), torch.tensor(numbers))

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches of rollouts, which are played when the first one is asked for."""
        self._ready(self.test_set)
        self.train_set = Rollouts(self.steps * self.environments, self.passes, self._gather)
        if self._played:
            self.train_set.load_state_dict(self._played)
            self._played = {}
        return super().train_dataloader()

    def _gather(self, purpose: int, number: int) -> TensorSet:
        """Play the round of this number, and let the model make samples of it."""
        policy: Any = None if self.trainer is None else self.trainer.lightning_module
        if policy is None:
            raise DataError(
                "RolloutData has no policy to play: its training batches are played by the model of a trainer's fit"
            )
        if not hasattr(policy, "training_data"):
            raise DataError(f"{type(policy).__name__} is no policy (it has no training_data); use PolicyGradient")
        first, *seeds = _seeds(1 + self.environments, purpose, self.seed, number)
        with at_play(policy):
            played = play(policy, self.world, self.steps, seeds, torch.Generator().manual_seed(first))
            return TensorSet(*policy.training_data(played))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the batches, and the rollouts they are of."""
        played = {} if self.train_set is None else self.train_set.state_dict()
        return super().state_dict() | ({"rollouts": played} if played else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them, when training goes on; a checkpoint that is only tested leaves nothing."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        super().load_state_dict(state_dict)
        played = state_dict.get("rollouts", {})
        if played and self._loaded is None and self.train_set is not None:
            self.train_set.load_state_dict(played)
        else:
            self._played = played
