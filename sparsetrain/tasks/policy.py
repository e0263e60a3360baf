"""A policy learned from what it does: proximal policy optimization with generalized advantage estimation.

PPO maximizes the clipped surrogate of Schulman et al. 2017 (arXiv 1707.06347, eq. 7), ``mean min(r A, clip(r, 1-e, 1+e) A)``
with ``r = pi(a | s) / pi_old(a | s)``: a policy gains nothing by going further than ``e`` from the one that played. Advantages
``A`` are those of Schulman et al. 2016 (arXiv 1506.02438, eq. 16). The loss is that of eq. 9 of the former, with the critic's
weight 1/2, ``-surrogate + mean (V(s) - R)^2 / 2 - entropy * H``; critic and policy share no weights.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from sparsetrain.data.domains import DomainSequence
from sparsetrain.data.playing import Rollout, episode_returns
from sparsetrain.data.rollouts import RolloutData
from sparsetrain.errors import DivergedError, RecipeError
from sparsetrain.tasks.training import Task


def gae(
    rewards: Tensor, values: Tensor, following: Tensor, ended: Tensor, discount: float = 0.99, trace: float = 0.95
) -> Tensor:
    """Advantages of T steps in E environments, all (T, E): ``A_t = d_t + discount * trace * A_(t+1)`` within an episode.

    ``d_t = rewards_t + discount * following_t - values_t`` (Schulman et al. 2016, arXiv 1506.02438, sec. 3, eq. 16).

    Args:
        rewards: of each step.
        values: the critic's for what was seen before it.
        following: the critic's for what was seen after it: 0 where the episode terminated, not where it was only cut off.
        ended: bool, the last steps of episodes.
        discount: in (0, 1].
        trace: lambda, in [0, 1]: 0 trusts the critic after one step, 1 the rewards to the end.

    Example: ``gae(torch.tensor([[1.0]]), torch.tensor([[0.25]]), torch.zeros(1, 1), torch.tensor([[True]]))`` is 0.75.
    """
    errors = rewards + discount * following - values
    advantages = torch.empty_like(errors)
    last = torch.zeros_like(errors[0])
    for step in reversed(range(len(errors))):
        last = errors[step] + discount * trace * last.masked_fill(ended[step], 0.0)
        advantages[step] = last
    return advantages


def clipped_surrogate(new: Tensor, old: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """What PPO maximizes (Schulman et al. 2017, eq. 7), a mean over (N,); ``new`` and ``old`` are log probabilities.

    Example: ``clipped_surrogate(torch.zeros(1), torch.zeros(1), torch.tensor([2.0]))`` is 2.
    """
    ratio = (new - old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


class PolicyGradient(Task):
    """Train a policy by PPO on `RolloutData`; the state dict has its plain names under ``network.`` and ``critic.``.

    Logs "train/loss" and "lr" per step, and of the episodes that are played greedily "val/return" and "test/return", means of
    undiscounted returns. The critic is needed in training only: leave it out of pruning with ``targets: {exclude: [critic]}``.

    Args:
        network: observations (N, ...) -> logits (N, actions).
        critic: observations (N, ...) -> values (N, 1).
        optimizer: builds the optimizer from the parameters of both.
        lr_schedule: "constant"; "cosine" or "linear" to zero over ``trainer.estimated_stepping_batches``; or a callable that
            builds a scheduler from the optimizer, stepped once an epoch.
        discount: gamma, of rewards a step later, in (0, 1].
        trace: lambda of the advantages, in [0, 1].
        clip: how far probabilities may usefully go from those that played, a factor 1 - clip ... 1 + clip; above 0.
        entropy: weight of the policy's entropy, at least 0: what keeps it trying.

    Raises:
        RecipeError: from the constructor for an argument out of its range; later for data other than `RolloutData`, or a
            critic of other than one output.
        DivergedError: for values, logits, observations or rewards that are not finite.

    Example: ``PolicyGradient(MLP(4, [64, 64], 2), MLP(4, [64, 64], 1), lr_schedule="linear")``.
    """

    def __init__(
        self,
        network: nn.Module,
        critic: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_schedule: Literal["constant", "cosine", "linear"] | LRSchedulerCallable = "constant",
        discount: float = 0.99,
        trace: float = 0.95,
        clip: float = 0.2,
        entropy: float = 0.01,
    ) -> None:
        super().__init__(optimizer, lr_schedule)
        if not 0 < discount <= 1 or not 0 <= trace <= 1:
            raise RecipeError(f"discount={discount} must be in (0, 1] and trace={trace} in [0, 1]")
        if not 0 < clip < float("inf") or not 0 <= entropy < float("inf"):
            raise RecipeError(f"clip={clip} must be above 0 and entropy={entropy} at least 0")
        # The policy comes last: the output head of a model is its last layer.
        self.critic = critic
        self.network = network
        self.discount, self.trace, self.clip, self.entropy = discount, trace, clip, entropy
        self.val_return = MeanMetric()
        self.test_return = MeanMetric()

    def forward(self, observations: Tensor) -> Tensor:
        """Return logits (N, actions)."""
        logits: Tensor = self.network(observations)
        return logits

    @torch.no_grad()
    def training_data(self, played: Rollout) -> tuple[Tensor, ...]:
        """What `training_step` is given of T steps in E environments, N = T * E samples, in main memory.

        Observations (N, ...), actions (N,), their log probabilities, advantages (mean 0, deviation 1), returns ``A + V``.
        """
        like, shape = next(self.parameters()), played.actions.shape
        seen, actions = played.observations.flatten(0, 1), played.actions.flatten()
        values = self._value(seen.to(like)).cpu().view(shape)
        following = self._value(played.following.flatten(0, 1).to(like)).cpu().view(shape)
        following = following.masked_fill(played.terminated, 0.0)
        advantages = gae(played.rewards, values, following, played.ended, self.discount, self.trace)
        returns = (advantages + values).flatten()
        if not returns.isfinite().all():
            raise DivergedError("the critic is not finite any more: NaN or infinite values")
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        log_probabilities = self._log_probabilities(seen.to(like)).cpu().gather(1, actions[:, None])[:, 0]
        return seen, actions, log_probabilities, advantages.flatten(), returns

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the loss of the batch: clipped surrogate, critic and entropy."""
        observations, actions, old, advantages, returns = batch
        every = self._log_probabilities(observations)
        surrogate = clipped_surrogate(every.gather(1, actions[:, None])[:, 0], old, advantages, self.clip)
        entropy = -(every.exp() * every).sum(1).mean()
        loss = -surrogate + F.mse_loss(self._value(observations), returns) / 2 - self.entropy * entropy
        self.log_training(loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Log "val/return"."""
        self._evaluate(batch, "val", self.val_return)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Log "test/return"."""
        self._evaluate(batch, "test", self.test_return)

    def _evaluate(self, batch: tuple[Tensor, ...], stage: str, metric: MeanMetric) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        here = data[data.current] if isinstance(data, DomainSequence) else data
        if not isinstance(here, RolloutData):
            raise RecipeError(f"PolicyGradient plays episodes of RolloutData, and the data is {type(here).__name__}")
        starts, seeds, numbers = batch
        metric.update(episode_returns(self, here.world, seeds.tolist(), numbers.tolist()).to(starts.device))
        self.log(f"{stage}/return", metric, prog_bar=True, batch_size=len(seeds))

    def _log_probabilities(self, observations: Tensor) -> Tensor:
        return F.log_softmax(self.network(observations).float(), dim=1)

    def _value(self, observations: Tensor) -> Tensor:
        values: Tensor = self.critic(observations).float()
        if values.shape != (len(observations), 1):
            raise RecipeError(
                f"the critic gives {tuple(values.shape)} for {len(observations)} observations; one value for each"
            )
        return values[:, 0]
