"""Group lasso: training makes whole neurons, filters, heads and inputs exactly zero, and only those that matter stay.

When to use it: a smaller, faster, ordinary network is wanted, and nobody knows beforehand how much each layer needs.

What it does: to the loss it adds ``sum_u lambda_u ||W_u||_2`` over units ``u`` (Yuan and Lin 2006; Wen et al. 2016, arXiv
1608.03665; Scardapane et al. 2017, arXiv 1607.00485), by its proximal operator after the optimizer's step:
``W_u <- W_u (1 - t_u / ||W_u||)_+``, which gives exact zeros. ``W_u`` are the weights that read unit ``u``, so that every
weight is in exactly one unit and the operator is exact; a unit nobody reads any more is dead, and everything it owns (its own
row or filter, bias, norm) is pruned with it, for good.

``sparsity`` is what shall be gone at the end of ``span``, of the parameters or (``budget: flops``) of the multiplications, and
nobody need know a lambda. By default it is adaptive (Wang and Leng 2008; Zou 2006): a norm says little of what a unit is
worth, because a layer may shrink while the next one grows. So units stand in line by what the loss would miss (Taylor
importance, Molchanov et al. 2019, arXiv 1906.10771, eq. 8) for each bit of cost they save, and ``t_u`` is such that those whose
turn is within a twentieth of the span reach zero by then; what has gone follows a cubic curve. With ``penalty: {kind: prox}``
all units have the same lambda (times a weight), which is controlled to follow that curve, and what is missing at the end goes
by that line; with ``penalty.strength`` and no ``sparsity`` lambda stays as it is, and what goes goes.

Knobs: ``budget``; ``span`` (leave half of the run for fine-tuning, with the learning rate still high when units go); ``guard``:
while the monitored metric is this much worse than its best, nothing shrinks. ``compact``: pruned units leave the model while it
trains, and every further step is faster (PruneTrain: Lym et al. 2019, arXiv 1901.09290).

Combines with: SGD, AdamW and others that keep their parameters (the step size is the learning rate of the group), schedules,
AMP, accumulation, EMA, distillation. Not with FSDP2.

How it fails: with kind ``prox`` a strength too large for the learning rate takes a layer down to ``groups.at_least`` units
within an epoch (look at lambda in the log); too short a run leaves no time to repair what the last units took with them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.callbacks.clock import clock_of
from sparsetrain.callbacks.group_penalty import Penalty, Reading, add_gradient, first_strength, shrink, trained_by, weights_of
from sparsetrain.callbacks.groups import Groups
from sparsetrain.callbacks.recovery import Guard
from sparsetrain.callbacks.structured import StructuredCallback
from sparsetrain.errors import MaskStateError, RecipeError
from sparsetrain.patterns import exact
from sparsetrain.penalties import growing_strengths
from sparsetrain.structure import CoupledManager, Structure
from sparsetrain.structure.budget import Measure

#: How much of the importance of a unit is remembered from one look at its gradient to the next.
_MEMORY = 0.98
#: Share of the span in which a unit shrinks before it is its turn.
AHEAD = 0.05


class GroupLasso(StructuredCallback):
    """Shrink coupled groups to zero while training.

    Args:
        sparsity: share of the budget that is gone at the end of ``span``, in [0, 1); None: whatever ``penalty.strength`` takes.
        budget: ``"parameters"`` or ``"flops"`` (multiplications of one sample), of the weights the groups cut.
        span: ``(start, end)``, durations between which units shrink; what follows is fine-tuning.
        penalty: which one, its strength and weights; see `Penalty`.
        groups: which groups, and how few of their units may be left; see `Groups`.
        compact: ``"1ep"``, ``"500st"``: pruned units are taken out so often, and at the end; ``"end"``; None: stay as zeros.
        guard: when not to shrink.

    ``strength`` is lambda as controlled. Raises `RecipeError` for what is out of range, `TargetError` where nothing can go.

    Example: ``Trainer(callbacks=[GroupLasso(sparsity=0.8, compact="1ep")])``.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        budget: Measure = "parameters",
        span: tuple[str, str] = ("10%", "50%"),
        penalty: Penalty | None = None,
        groups: Groups | None = None,
        compact: str | None = "end",
        guard: Guard | None = None,
    ) -> None:
        super().__init__(groups, compact, budget)
        self.penalty = penalty or Penalty()
        if sparsity is None and self.penalty.strength is None:
            raise RecipeError(
                "GroupLasso needs sparsity (what shall be gone), such as 0.8; or a penalty with a strength (lambda), such as "
                "Penalty('prox', strength=1e-3)"
            )
        if sparsity is None and not self.penalty.after_step:
            raise RecipeError(f"penalty {self.penalty.kind!r} is a term of the loss and makes nothing zero: give a sparsity")
        if self.groups.alike and self.penalty.kind != "adaptive":
            raise RecipeError(f"groups.alike needs penalty 'adaptive', which chooses who goes; {self.penalty.kind!r} does not")
        self.sparsity = None if sparsity is None else float(exact(sparsity))
        self.span, self.guard = tuple(span), guard
        self.strength = 0.0
        self._readings: dict[str, Reading] = {}
        self._weights: dict[str, Tensor | float] = {}
        #: Units on their way out: the norm they had when it began ("growing": whether they are chosen).
        self._line: dict[str, Tensor] = {}
        self._start = self._end = self._warm = 0
        self._every = 1
        self._best: float | None = None
        self._held = self._done = False

    # -- asked and reached --------------------------------------------------------------------------------------------------

    def create_manager(self, model: nn.Module) -> CoupledManager:
        """Groups and masks of a model; what was done to another one is not done to this."""
        self._weights, self._line, self._best, self._held, self._done = {}, {}, None, False, False
        return super().create_manager(model)

    def _bind(self, model: nn.Module, structure: Structure, names: set[str]) -> CoupledManager:
        manager = super()._bind(model, structure, names)
        found = {group.name: Reading(model, group) for group in self.chosen}
        self._readings = {name: reading for name, reading in found.items() if reading.reads is not None}
        return manager

    def validate(self) -> None:
        """What is asked can be reached while every group keeps what `Groups` says."""
        assert self.cost is not None
        dead = self.dead()
        most = self.cost.gone(self.choose({name: torch.zeros(len(units)) for name, units in dead.items()}, dead, 1.0))
        if self.sparsity is not None and self.sparsity > most:
            raise RecipeError(
                f"GroupLasso sparsity={self.sparsity:g}: with at_least={self.groups.at_least}, multiple={self.groups.multiple} "
                f"in {len(self.chosen)} groups at most {most:.4g} of the {self.budget} can go"
            )

    def facts(self) -> dict[str, Any]:
        """For metrics.json: what was asked, and what is left."""
        found = super().facts()
        return {"structure": {"asked": self.sparsity, **found["structure"]}}

    def shortfall(self) -> str | None:
        """Too little is gone."""
        gone = self.gone()
        if self.sparsity is not None and gone < self.sparsity - 1e-9:
            way = "it is held back by the guard" if self._held else f"train past the end of span ({self.span[1]})"
            return f"{gone:.4g} of the {self.budget} are gone, {self.sparsity:g} were asked; {way}, or let it end earlier"
        nothing = self.sparsity is None and not gone
        return (
            f"no unit became zero with strength {self.penalty.strength}; raise it, or ask for a sparsity" if nothing else None
        )

    # -- training -----------------------------------------------------------------------------------------------------------

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Resolve the span, and find lambda."""
        clock = clock_of(trainer)
        self._start, self._end = (clock.steps(duration) for duration in self.span)
        self._warm = clock.steps(self.penalty.warmup)
        self._every = self.penalty.every * max(1, (self._end - self._start) // (100 * self.penalty.every))
        if not self._start < self._end or (clock.total_steps and self._end > clock.total_steps):
            raise RecipeError(
                f"GroupLasso span {self.span}: from step {self._start} to step {self._end} of {clock.total_steps}; it must end "
                "after it starts, and within the run"
            )
        for reading in self._readings.values():
            assert reading.reads is not None
            for part in reading.reads.parts:
                trained_by(trainer.optimizers, part.tensor, self.penalty)
        if self.guard is not None and not trainer.enable_validation:
            raise RecipeError("guard watches a metric of validation, and this run has none: give validation data, or no guard")
        if not resumed:
            self._weights, self._line, self._held, self._done = {}, {}, False, False
            self.strength = self.penalty.strength or first_strength(self._readings, trainer.optimizers, self._end - self._start)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at gradients for importance; add the gradient of penalties that are terms of the loss."""
        step = self._seen + 1
        if self._done or step % self.penalty.every:
            return
        # Before the span begins importance is being gathered, so that the first units go for a reason.
        if step > self._start - 50 * self.penalty.every:
            for reading in self._readings.values():
                reading.watch(_MEMORY)
        if self._on(step) and not self.penalty.after_step:
            strength = self._strength(step) * self.penalty.every
            for name, reading in self._readings.items():
                add_gradient(
                    self.penalty, reading, optimizer, strength, self._weights.get(name, 0.0), self._growing(name, step)
                )

    def on_step(self, trainer: Trainer, step: int) -> None:
        """Shrink; now and then take what is zero for good, and see who is next."""
        if not self._done and step >= self._start:
            if self._on(step) and not step % self.penalty.every and self.penalty.after_step:
                for name, weights in self._weights.items():
                    reads = self._readings[name].reads
                    assert reads is not None
                    shrink(self.penalty, reads, trainer.optimizers, self._strength(step), weights)
            if step == self._end or (step - self._start) % self._every == 0:
                self._look(trainer, step)
        super().on_step(trainer, step)

    def on_validated(self, trainer: Trainer) -> None:
        """Hold still while the guarded metric is too far below its best."""
        if self.guard is None:
            return
        # One rank decides, as in every method that watches a metric.
        value = float(trainer.strategy.broadcast(self.guard.value(trainer.callback_metrics)))
        self._best = max(value, -math.inf if self._best is None else self._best) if value == value else self._best
        self._held = self.guard.trips(value, value if self._best is None else self._best)

    def _on(self, step: int) -> bool:
        return self._start < step <= self._end and not self._held and not self._done

    def _strength(self, step: int) -> float:
        return self.strength * (min(1.0, (step - self._start) / self._warm) if self._warm else 1.0)

    def _growing(self, name: str, step: int) -> Tensor | None:
        if self.penalty.kind != "growing" or name not in self._line:
            return None
        return growing_strengths(self._line[name], step - self._start, self.strength, self._every)

    def _wanted(self, step: int) -> float:
        """What shall be gone at a step, on a cubic curve."""
        done = min(1.0, (step - self._start) / (self._end - self._start))
        return (self.sparsity or 0.0) * (1 - (1 - done) ** 3)

    def _worth(self) -> dict[str, Tensor]:
        return {name: reading.importance for name, reading in self._readings.items()}

    def _look(self, trainer: Trainer, step: int) -> None:
        """Units that nobody reads are dead, and those whose turn it is; then see to the others."""
        assert self.cost is not None
        dead, last = self.dead(), step >= self._end
        adaptive = self.penalty.kind == "adaptive"
        for name, reading in self._readings.items() if not adaptive else ():
            norms = reading.norms().masked_fill_(dead[name], -1.0)
            spared = norms.argsort(descending=True, stable=True)[: self.groups.at_least]
            dead[name] |= (norms == 0).index_fill(0, spared, False)
        if self.sparsity is not None and (last or adaptive) and not self._held:
            dead = self.choose(self._worth(), dead, self._wanted(step))
        self.prune(dead, step, "budget" if last and not adaptive else "group lasso")
        gone = self.cost.gone(dead)
        self._done = (last and not self._held) or (self.sparsity is not None and gone >= self.sparsity - 1e-9)
        if not self._done:
            self._next(step, dead, gone)
        for logger in trainer.loggers:
            logger.log_metrics({"group_lasso/strength": self.strength, "group_lasso/gone": gone}, step=step)

    def _next(self, step: int, dead: dict[str, Tensor], gone: float) -> None:
        """Who is next in line, or lambda: it grows where less is gone than the curve asks, and falls where more is."""
        assert self.cost is not None
        if self.penalty.kind == "adaptive":
            ahead = max(self.penalty.every, int(AHEAD * (self._end - self._start)))
            self.strength = 1 / ahead
            line = self.choose(self._worth(), dead, self._wanted(step + ahead))
            for name, reading in self._readings.items():
                fresh = line[name] & (self._line[name] == 0 if name in self._line else torch.ones_like(line[name]))
                # A unit shrinks by the same part of the norm it had when it came into line.
                held = self._line[name] if name in self._line else torch.zeros(len(fresh))
                self._line[name] = torch.where(fresh, reading.norms(), held) * line[name]
            self._weights = dict(self._line)
            return
        if self.sparsity is not None and self._on(step) and step > self._start + self._warm:
            self.strength *= math.exp(max(-0.3, min(0.3, 3 * (self._wanted(step) - gone))))
        self._weights = dict(weights_of(self.penalty.weights, self._readings, self.cost.saved(dead)))
        if self.penalty.kind == "growing" and self.sparsity is not None and not self._line:
            self._line = self.choose(self._worth(), dead, self.sparsity)

    # -- resuming and shrinking -----------------------------------------------------------------------------------------------

    def _renew(self, done: Any, dead: dict[str, Tensor]) -> None:
        importance = self._worth()
        super()._renew(done, dead)
        for name, values in importance.items():
            alive = ~dead[name] if name in dead else torch.ones(len(values), dtype=torch.bool)
            self._readings[name].importance = values[alive]
            for kept in (self._weights, self._line):
                value = kept.get(name)
                if isinstance(value, Tensor):
                    kept[name] = value[alive]

    def method_state(self) -> dict[str, Any]:
        """Lambda, weights and importance of units, and where the guard stands."""
        return {
            "strength": self.strength,
            "best": self._best,
            "held": self._held,
            "done": self._done,
            "importance": self._worth(),
            "weights": dict(self._weights),
            "line": dict(self._line),
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take that back."""
        self.strength, self._best, self._held, self._done = (state[key] for key in ("strength", "best", "held", "done"))
        if set(state["importance"]) != set(self._readings):
            raise MaskStateError(
                f"the checkpoint shrank {', '.join(state['importance'])}, this run {', '.join(self._readings)}; go on with the "
                "groups it had, or start a new run from its weights"
            )
        self._weights, self._line = dict(state["weights"]), dict(state["line"])
        for name, importance in state["importance"].items():
            self._readings[name].importance = importance.clone()
