"""Prune, fine-tune, prune again: iterative and gradual magnitude-type pruning in one callback.

When to use it: the first method to try, on any model that trains. Scheduled magnitude pruning is the baseline that more
elaborate methods must beat (Zhu and Gupta 2017, arXiv 1710.01878; Gale et al. 2019, arXiv 1902.09574).

What it does: at each change of the schedule the criterion scores the weights, the allocation turns the sparsity asked into
one for each tensor, the pattern selects the masks; in between and after the last change the network trains on. Rounds remove
a share of the survivors each (``s_r = 1 - (1 - p)^r``, Han et al. 2015, arXiv 1506.02626); gradual schedules follow a curve.

Knobs: ``sparsity`` (absolute, over all targets), ``schedule`` (leave at least a third of the run for final fine-tuning),
``allocation: global`` (better than uniform at high sparsity), ``recovery`` (a round ends early once the metric is back).

Combines with: any optimizer, LR schedule, AMP, accumulation, clipping, EMA and SWA callbacks, other methods on its masks.

How it fails: too little fine-tuning after the last change shows as a gap that a longer run closes; a learning rate that has
already decayed when pruning ends cannot repair the damage; uniform sparsity starves small layers.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from sparsetrain.allocation import Allocation, get_allocation
from sparsetrain.callbacks.base import SparsityCallback, current_step
from sparsetrain.callbacks.clock import clock_of
from sparsetrain.callbacks.recovery import Recovery, Watch
from sparsetrain.callbacks.statistics import recalibrate, require_data, watch_step
from sparsetrain.criteria import Criterion, StatisticsCriterion, get_criterion
from sparsetrain.errors import RecipeError
from sparsetrain.masks import MaskedTensor, MaskManager, Override
from sparsetrain.masks.verification import warn_of_zeros
from sparsetrain.patterns import Pattern, Sparsity, exact, parse_pattern
from sparsetrain.pruning import final_sparsity, prune, validate_allocation
from sparsetrain.schedules import Clock, Curve, OneShot, Rounds, Schedule
from sparsetrain.targets import Targets


class PruneFinetune(SparsityCallback):
    """Prune to ``sparsity`` on a schedule, fine-tune in between and after.

    Args:
        sparsity: final fraction of zeros over the targets, in [0, 1); may be left out where the pattern has only one.
        pattern: ``"unstructured"``, ``"unstructured:row"``, ``"2:4"``, ``"block:16x16"``, ``"neurons"``, ``"channels"``.
        criterion: what scores a weight, by name or as a `Criterion`; one that needs data sees training batches or steps.
        allocation: how much where, by name or as an `Allocation`.
        schedule: when; by default 5 rounds, one an epoch, after the first tenth of the run (N:M: once, then).
        targets: which tensors; see `Targets`.
        overrides: another pattern or sparsity by regular expression of names; sparsity 0 leaves a tensor dense.
        recovery: end rounds early; needs a `Rounds` schedule.

    A tensor whose pattern has only one sparsity (N:M) inside a run that goes by several steps is pruned at the first of them.
    Raises `PatternError`, `TargetError` or `RecipeError` when it is set up on a model that cannot do what is asked.

    Example: ``Trainer(callbacks=[PruneFinetune(sparsity=0.9, allocation="global")])``.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: Pattern | str = "unstructured",
        criterion: Criterion | str = "magnitude",
        allocation: Allocation | str = "uniform",
        schedule: Schedule | None = None,
        targets: Targets | None = None,
        overrides: dict[str, Override] | None = None,
        recovery: Recovery | None = None,
    ) -> None:
        super().__init__()
        if schedule is not None and not isinstance(schedule, Schedule):
            raise RecipeError(f"schedule {schedule!r} is no Schedule; give an object, such as Cubic(end='60%')")
        self.pattern = parse_pattern(pattern)
        self.sparsity = sparsity if sparsity is None else float(exact(sparsity))
        self.criterion = get_criterion(criterion)
        self.allocation = get_allocation(allocation)
        fixed = self.pattern.sparsity is not None
        self.schedule = schedule or (OneShot("10%") if fixed else Rounds(rounds=5))
        if fixed and schedule is not None and not isinstance(schedule, OneShot):
            raise RecipeError(
                f"pattern {self.pattern} has only sparsity {float(self.pattern.sparsity or 0):g} and cannot follow "
                f"{type(schedule).__name__}; use schedule OneShot"
            )
        if recovery is not None and not isinstance(self.schedule, Rounds):
            raise RecipeError(f"recovery ends rounds early; schedule {type(self.schedule).__name__} has none, use Rounds")
        self.targets = targets or Targets()
        self.overrides = overrides or {}
        self.recovery = recovery
        self._curves: dict[float, Curve] = {}
        self._done = 0
        self._last = 0
        self._early = False
        self._watch = Watch()
        self._watches = isinstance(self.criterion, StatisticsCriterion) and self.criterion.source == "training"

    # -- building ---------------------------------------------------------------------------------------------------------

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager for the targets, pattern and overrides."""
        if isinstance(self.criterion, StatisticsCriterion):
            self.criterion.reset()  # what it knows is of another model
        return MaskManager(model, self.targets, self.pattern, self.overrides)

    def validate(self) -> None:
        """Every tensor can reach what is asked of it, by a schedule it can follow, and the criterion can score it."""
        validate_allocation(self.masks, self.sparsity, self.allocation)
        self.criterion.prepare(self.masks.model, [part for tensor in self.masks for part in self.criterion.parts(tensor)])

    @property
    def pooled(self) -> bool:  # type: ignore[override]
        """The allocation decides."""
        return self.allocation.pooled

    def final(self, tensor: MaskedTensor) -> Sparsity:
        """Its override, else what is asked of all, else the one sparsity its pattern has."""
        return final_sparsity(tensor, self.sparsity)

    def curves(self, clock: Clock) -> dict[float, Curve]:
        """The resolved schedule for every final sparsity among the tensors; raises `RecipeError` if it does not fit."""
        goals = {float(self.final(t)) for t in self.masks if t.pattern.sparsity is None}
        # A run of fixed patterns alone still has its one change.
        goals = {g for g in goals if g > 0} or {float(self.final(t)) for t in self.masks}
        curves = {goal: self.schedule.resolve(goal, clock) for goal in goals if goal > 0}
        seen = not self._watches or (isinstance(self.criterion, StatisticsCriterion) and bool(self.criterion.memory))
        if not seen and any(curve.points[0][0] == 0 for curve in curves.values()):
            raise RecipeError(
                f"criterion {type(self.criterion).__name__} watches training and has seen none at step 0, where the schedule "
                "begins; let it begin after some hundred steps (schedule.start, or schedule.at)"
            )
        return curves

    # -- running ----------------------------------------------------------------------------------------------------------

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Resolve the schedule against this run; prune at once if it starts at step 0."""
        self._curves = self.curves(clock_of(trainer))
        if not self._curves:
            raise RecipeError("every target is asked for sparsity 0: nothing would be pruned; raise sparsity or drop overrides")
        if self.recovery is not None and (not trainer.enable_validation or self._steps[0] == 0):
            raise RecipeError(
                "recovery compares validations with those before the first round: it needs validation data, and a first round "
                f"after step 0 (it is at step {self._steps[0]}; set schedule.start)"
            )
        require_data(trainer, self.masks, self.criterion)
        if not resumed:
            if not self.masks.masks:
                warn_of_zeros(self.masks, "training fills them")
            self._done, self._early, self._watch = 0, False, Watch()
            # A second fit() goes on from where the masks are; its clock starts where the trainer's does.
            self.on_step(trainer, current_step(trainer))

    @property
    def _steps(self) -> list[int]:
        return sorted({step for curve in self._curves.values() for step, _ in curve.points})

    def on_step(self, trainer: Trainer, step: int) -> None:
        """Change the masks if a change is due."""
        steps = self._steps
        if self.recovery is not None and self._done:
            every = steps[1] - steps[0] if len(steps) > 1 else 0
            due = self._done < len(steps) and (self._early or step >= self._last + every)
            target = self._done if due else self._done - 1
        else:
            target = sum(s <= step for s in steps) - 1
        if target < self._done:
            return
        if self._done == 0 and self.before_first_change is not None and step > 0:
            self.before_first_change(trainer)
        recalibrate(trainer, self.masks, self.criterion, self.resume.seed_at(step))
        self._apply(steps[target], step, f"round {target + 1} of {len(steps)}")
        self._done, self._last, self._early = target + 1, step, False
        self._watch.next_round()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Criteria that watch training see every step."""
        if self._watches:
            watch_step(trainer, self.masks, self.criterion, optimizer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A round that has recovered ends before the next batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._early:
            self.on_step(trainer, current_step(trainer))
            self.log_sparsity(trainer)

    def _apply(self, point: int, step: int, why: str) -> None:
        own: dict[str, Any] = {}
        shared: list[MaskedTensor] = []
        for tensor in self.masks:
            goal = float(self.final(tensor))
            if tensor.pattern.sparsity is not None:
                own[tensor.name] = tensor.pattern.sparsity if goal else 0.0
            elif tensor.goal is not None or not self.pooled:
                own[tensor.name] = self._curves[goal].at(point) if goal else 0.0
            else:
                shared.append(tensor)
        budget: Any = self.sparsity
        if shared and self.sparsity is not None:
            counts = self.masks.counts()
            pruned = sum(counts[t.name][0] for t in shared) / sum(counts[t.name][1] for t in shared)
            budget = self._curves[self.sparsity].at(point) if self.sparsity else 0.0
            if pruned > budget:
                own |= {t.name: t.sparsity for t in shared}
        # Never regrow: a model that starts sparser than the schedule waits until the schedule has caught up.
        prune(
            self.masks,
            budget,
            criterion=self.criterion,
            allocation=self.allocation,
            own=own,
            regrow=False,
            step=step,
            why=why,
        )

    def on_validated(self, trainer: Trainer) -> None:
        """Watch the metric for recovery."""
        if self.recovery is None:
            return
        # One rank decides: ranks that disagree would end up with other masks.
        value = float(trainer.strategy.broadcast(self.recovery.value(trainer.callback_metrics)))
        if not self._done:
            self._watch.before(value)
        else:
            self._early = self._watch.recovered(value, self.recovery) and self._done < len(self._steps)

    # -- remembering ------------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """Where in the schedule it is."""
        state = {"done": self._done, "last": self._last, "early": self._early, "watch": asdict(self._watch)}
        return state | (
            {"criterion": self.criterion.state_dict()}
            if isinstance(self.criterion, StatisticsCriterion) and self._watches
            else {}
        )

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._done, self._last, self._early = state["done"], state["last"], state["early"]
        self._watch = Watch(**state["watch"])
        if isinstance(self.criterion, StatisticsCriterion) and self._watches:
            self.criterion.load_state_dict(state["criterion"])

    def shortfall(self) -> str | None:
        """Training stopped before the schedule had ended, or never began."""
        if not self._curves:
            return f"training never began: the masks are at sparsity {self.masks.sparsity():.4f}"
        steps = self._steps
        if self._done >= len(steps):
            return None
        return (
            f"training ended after {self._done} of {len(steps)} changes of the masks, at sparsity {self.masks.sparsity():.4f}; "
            f"the rest was due by step {steps[-1]}. Train longer, or let the schedule end earlier"
        )
