"""Variational dropout: every weight learns how noisy it may be, and those that are nothing but noise are pruned.

When to use it: nobody knows how sparse which layer can be, and the run is long (a weight needs thousands of steps to become
noise). For a short run, or a sparsity that is given, magnitude pruning (`PruneFinetune`) is simpler and usually as good.

What it does (Molchanov, Ashukha and Vetrov 2017, arXiv 1701.05369): weights are normal, ``w ~ N(theta, sigma^2)``, and theta
and ``log sigma^2`` are trained together by ``loss + kl / N * sum KL(alpha)``, ``alpha = sigma^2 / theta^2``, N training
samples. The divergence from a log-uniform prior (eq. 14) falls as alpha rises: what the data do not hold becomes noise. Noise
is added to pre-activations (local reparameterization), the divergence's gradient by hand right before the optimizer's step.
``warmup``: its weight is 0, then rises to ``kl`` in a line. At ``until`` weights with ``log alpha >= threshold`` (3: 95 % of
them is noise) become zeros with a mask, layers are plain again, and the rest of the run is fine-tuning without noise.

With ``sparsity`` that share of the targets' weights is pruned, exactly, those with the greatest log alpha wherever they are; on
the way ``kl`` is controlled so that as many pass the threshold. Evaluation always sees the deterministic network.

Knobs: ``kl`` (below 1 is milder: Gale et al. 2019, arXiv 1902.09574, train ResNet-50 with 0.05 to 1), ``warmup``, ``until``,
``threshold`` (Gale et al. use 0.5 to 2.5), ``noise``. Start from trained weights (``init_from``) or random ones.

Combines with: Adam and SGD, weight decay (of theta alone), schedules, clipping, AMP, accumulation, DDP, EMA, distillation, an
already sparse start (what is pruned stays so). ``log sigma^2`` has an Adam of its own and is no parameter of the model:
checkpoints have the plain names at every step.

How it fails: with weights that start too small, or a learning rate far above 1e-3 under Adam, everything turns to noise at
once, which raises. Layers other than torch's own Linear and Conv1d, 2d, 3d, tied weights, LBFGS and FSDP2 are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from fractions import Fraction
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from sparsetrain.callbacks.base import SparsityCallback, current_step
from sparsetrain.callbacks.clock import clock_of
from sparsetrain.callbacks.weight_noise import Noise, NoisyWeights
from sparsetrain.errors import DivergedError, PatternError, RecipeError, TargetError
from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.nn.variational import require_convertible
from sparsetrain.patterns import Sparsity, Unstructured, exact
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

#: Looks at how many weights are noise, in the span from the end of the warm-up to ``until``.
_LOOKS = 100
#: A look changes kl by at most this factor, and all of them together by at most the other.
_STEP, _REACH = 1.25, 1e3


class VariationalDropout(SparsityCallback):
    """Learn how noisy each weight may be, and prune those that are noise.

    Args:
        sparsity: of all targets together, in (0, 1), reached exactly at ``until``; None: whatever is past the threshold.
        kl: weight of the divergence after the warm-up, in units of 1 / N; 1 is the variational bound. With a sparsity, where it
            starts from.
        warmup: ``(start, end)``, durations: the weight is 0 before and rises in a line between.
        until: duration, when noise ends and masks begin.
        threshold: of log alpha.
        noise: how noise begins and learns; see `Noise`.
        samples: N, the terms whose mean the loss is, in one epoch; by default the training samples.
        targets: which tensors; see `Targets`.

    ``kl_now`` is the weight as controlled. Raises `RecipeError` for what is out of range and runs it cannot be in,
    `TargetError` for layers it cannot convert, `DivergedError` where all of a layer becomes noise.

    Example: ``Trainer(callbacks=[VariationalDropout(targets=Targets(head=True))])``.
    """

    follows = "by noise"

    def __init__(
        self,
        sparsity: float | None = None,
        kl: float = 1.0,
        warmup: tuple[str, str] = ("2%", "10%"),
        until: str = "90%",
        threshold: float = 3.0,
        noise: Noise | None = None,
        samples: int | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__()
        self.noise = noise or Noise()
        if not 0 < kl < math.inf or (samples is not None and samples < 1):
            raise RecipeError(f"kl={kl}, samples={samples}: kl is above 0, samples 1 or more")
        if not abs(threshold) < self.noise.clamp:
            raise RecipeError(f"threshold={threshold} must lie within noise.clamp={self.noise.clamp}: no weight would pass it")
        self._sparsity = None if sparsity is None else exact(sparsity)
        if self._sparsity is not None and not 0 < self._sparsity < 1:
            raise RecipeError(f"sparsity={sparsity} must be in (0, 1); leave it out to prune what the threshold says")
        self.sparsity = sparsity
        self.sets_sparsity, self.pooled = sparsity is None, sparsity is not None
        self.kl, self.warmup, self.until, self.threshold = kl, tuple(warmup), until, threshold
        self.samples, self.targets = samples, targets or Targets()
        self._low = self._high = self._end = self._n = 0
        self._every = 1
        self._group: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self.phase: Literal["before", "noisy", "pruned"] = "before"
        self.kl_now = self.kl
        self.noisy: NoisyWeights | None = None
        self._first_lr = 0.0
        self._saved: dict[str, Any] = {}

    # -- building ---------------------------------------------------------------------------------------------------------

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager for the targets; what was learned on another model is not known on this."""
        self._reset()
        return MaskManager(model, self.targets)

    def validate(self) -> None:
        """Every target can be given noise, and be pruned weight by weight."""
        for tensor in self.masks:
            require_convertible(tensor.name, tensor.target.module)
            if tensor.target.aliases:
                raise TargetError(
                    f"{tensor.name} is also {', '.join(tensor.target.aliases)}: the noise of a tied weight would be known to "
                    "one layer only; leave it out by targets.exclude"
                )
            if not isinstance(tensor.pattern, Unstructured) or tensor.goal is not None:
                raise PatternError(f"{tensor.name}: variational dropout prunes single weights, of all targets together")
        if self._sparsity is not None and self.masks.sparsity() > self._sparsity:
            raise RecipeError(f"sparsity={self.sparsity:g} is below the {self.masks.sparsity():.4g} the model has already")

    def final(self, tensor: MaskedTensor) -> Sparsity | None:
        """The one of all together; None where the threshold decides."""
        return self._sparsity

    # -- running ----------------------------------------------------------------------------------------------------------

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Resolve the durations, and give the layers noise."""
        clock = clock_of(trainer)
        self._low, self._high = (clock.steps(duration) for duration in self.warmup)
        self._end = clock.steps(self.until)
        if not self._low <= self._high < self._end or (clock.total_steps and self._end > clock.total_steps):
            raise RecipeError(
                f"VariationalDropout warmup {self.warmup} (steps {self._low} to {self._high}) must end before until="
                f"{self.until!r} (step {self._end}), and that within the run of {clock.total_steps} steps"
            )
        self._every = max(1, (self._end - self._high) // _LOOKS)
        self._n = self.samples or _samples(trainer)
        groups = {id(p): group for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        for tensor in self.masks:
            parameter = tensor.target.parameter
            if isinstance(parameter, DTensor):
                raise RecipeError(f"{tensor.name} is sharded: VariationalDropout does not train under FSDP2; use ddp")
            if id(parameter) not in groups or not parameter.requires_grad:
                raise RecipeError(f"{tensor.name} is not trained, so that its noise has nothing to weigh; leave it out")
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise RecipeError("VariationalDropout cannot train with LBFGS: its line search would see other noise at every look")
        self._group = groups[id(next(iter(self.masks)).target.parameter)]
        if not resumed:
            self._reset()
            self.phase, self._first_lr = "noisy", self._group.get("initial_lr", self._group["lr"])
        if self.phase == "noisy":
            saved, self._saved = self._saved, {}
            self.noisy = NoisyWeights(list(self.masks), self.noise, self.threshold, saved)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Noise forgets its gradients when weights do."""
        if self.noisy is not None:
            self.noisy.adam.zero_grad()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the divergence's gradient, and share that of the noise."""
        if self.noisy is None:
            return
        # A scaler has unscaled the gradients of its optimizer, and knows no others.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.noisy.gradients(
            {id(p) for group in optimizer.param_groups for p in group["params"]},
            self._strength(self._seen) / self._n,
            1.0 if scaler is None else scaler.get_scale(),
            lambda grad: grad if trainer.world_size == 1 else trainer.strategy.reduce(grad, reduce_op="mean"),
        )

    def _strength(self, step: int) -> float:
        """The weight of the divergence after so many steps."""
        risen = 1.0 if step >= self._high else (step - self._low) / (self._high - self._low)
        return self.kl_now * max(0.0, risen)

    def on_step(self, trainer: Trainer, step: int) -> None:
        """The noise steps too; at the end of its time it is over."""
        if self.noisy is None:
            return
        self.noisy.step(self._group["lr"] / self._first_lr)
        if step > self._high and (step - self._high) % self._every == 0 and step < self._end:
            self._look(trainer, self.noisy, step)
        if not trainer.lightning_module.automatic_optimization:
            self.noisy.adam.zero_grad()
        if step >= self._end:
            self._fold(trainer, self.noisy, step)

    def _look(self, trainer: Trainer, noisy: NoisyWeights, step: int) -> None:
        """How many weights are noise; with a sparsity, kl follows what should be."""
        if idle := noisy.idle():
            raise RecipeError(
                f"the layer of {idle[0]} was not called in this step: its weight is read without calling it, or it is not "
                "used; leave it out by targets.exclude"
            )
        alive = noisy.alive()
        self._require_some(alive, step)
        left = sum(int(mask.sum()) for mask in alive.values()) / sum(mask.numel() for mask in alive.values())
        if self._sparsity is not None:
            done = (step - self._high) / (self._end - self._high)
            wanted = 1 - float(self._sparsity) * (1 - (1 - done) ** 3)
            # In logarithms of what is left: the last weights are the ones that matter.
            factor = max(1 / _STEP, min(_STEP, left / wanted))
            self.kl_now = min(self.kl * _REACH, max(self.kl / _REACH, self.kl_now * factor))
        for logger in trainer.loggers:
            logger.log_metrics({"variational/kl": self._strength(step), "variational/past": 1 - left}, step=step)

    def _require_some(self, alive: dict[str, Tensor], step: int) -> None:
        for name, mask in alive.items():
            if not bool(mask.any()):
                raise DivergedError(
                    f"{name}: at step {step} every weight is noise (log alpha >= {self.threshold:g}) and the layer is dead; "
                    "lower kl, warm up for longer, start from trained weights, or lower the learning rate"
                )

    @torch.no_grad()
    def _fold(self, trainer: Trainer, noisy: NoisyWeights, step: int) -> None:
        """Noise ends: what is noise is pruned, layers are plain, and evaluation sees the very network it saw before."""
        why, alive = "variational", noisy.alive()
        if self._sparsity is None:
            self._require_some(alive, step)
        if self.before_first_change is not None:
            self.before_first_change(trainer)
        if self._sparsity is not None:
            prune(self.masks, self._sparsity, criterion=noisy.certainty, allocation="global", step=step, why=why)
        else:
            for name, mask in alive.items():
                share = Fraction(mask.numel() - int(mask.sum()), mask.numel())
                self.masks.install(name, mask, share, step=step, why=why)
        noisy.remove()
        self.noisy, self.phase = None, "pruned"

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that ends early is folded as it is; then verify."""
        if self.noisy is not None:
            self._fold(trainer, self.noisy, current_step(trainer))
        super().on_fit_end(trainer, pl_module)

    # -- remembering ------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What kl was in the end, and N."""
        return {"variational": {"kl": self.kl_now, "samples": self._n, "threshold": self.threshold}}

    def shortfall(self) -> str | None:
        """Nothing became noise."""
        if self.masks.sparsity():
            return None
        return f"no weight passed log alpha = {self.threshold:g}: the model is dense; train for longer, or raise kl"

    def method_state(self) -> dict[str, Any]:
        """The noise of every weight and its optimizer."""
        state = {"phase": self.phase, "kl": self.kl_now, "first_lr": self._first_lr}
        return state | ({} if self.noisy is None else self.noisy.state())

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._reset()
        self.phase, self.kl_now, self._first_lr = state["phase"], state["kl"], state["first_lr"]
        self._saved = dict(state) if "adam" in state else {}


def _samples(trainer: Trainer) -> int:
    """The training samples of an epoch."""
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if not isinstance(dataset, Sized) or not len(dataset):
        raise RecipeError(
            "the training data do not say how many samples they have, and the divergence is weighed against their number: "
            "give VariationalDropout samples"
        )
    return len(dataset)
