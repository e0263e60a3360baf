"""Prune for domain after domain: one mask that serves all of them, without keeping their data.

When to use it: a pruned model that is to stay useful while what it is used for changes (news, then code, then law). With
`DomainSequence` and one ``fit`` a domain, each prunes the model for its domain when it starts, on its training batches, and may
then fine-tune it with the masks kept (``trainer.max_epochs: 0`` prunes and trains nothing).

What it does: see `sparsetrain.continual`. Base weights and statistics outlive the domains, data does not: a mask is chosen from
the base weights by ``A <- decay * A + weight * C``, ``C`` being the mean statistics of the domain at hand (after Malla et al.
2024, COPAL, arXiv 2405.02347; with criterion ``wanda`` or ``sparsegpt`` their accumulated kin).

Knobs: ``criterion``: ``"copal"``, ``"wanda"`` (the cheapest, and hard to beat), ``"sparsegpt"`` (moves the survivors so that
they fit all domains so far). ``pattern``: ``unstructured:row`` compares within rows and is the better choice for copal and
wanda, ``unstructured`` compares within matrices, as the COPAL patent does; ``2:4`` and ``4:8`` as they are. ``memory``: what is
kept; its ``mode`` has the baselines (``fresh``: every domain for itself; ``stasis``: prune what is pruned; ``joint``: with all
data).

Fine-tuning between domains: afterwards the survivors' new values are the base weights, pruned ones keep their old values, and
statistics stay as measured. ``drift`` in the facts of a run is how far the weights have moved since; where it is large, lower
``decay``, so that what was measured long ago counts less.

Combines with: any optimizer, LR schedule, AMP, accumulation, clipping, EMA callbacks, DDP (statistics are summed over ranks).
Not with FSDP2; ``mode: joint`` and a memory folder take one process, and a folder is one run's alone. How it fails:
``mode: stasis`` and magnitude never forget, and never learn: read average, forgetting and churn together; very different
domains share too few weights at high sparsity, where joint pruning is no better.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from sparsetrain.allocation import Allocation, get_allocation
from sparsetrain.callbacks.base import SparsityCallback, current_step
from sparsetrain.callbacks.exact_resume import capture, restore
from sparsetrain.callbacks.statistics import loss_of, require_data, silenced, training_batches
from sparsetrain.continual import ContinualPruner, Memory, validate_continual
from sparsetrain.criteria import Criterion, StatisticsCriterion, get_criterion
from sparsetrain.masks import MaskedTensor, MaskManager, Override
from sparsetrain.oneshot import OneShotReport, Streaming
from sparsetrain.patterns import Pattern, Sparsity, exact, parse_pattern
from sparsetrain.pruning import final_sparsity
from sparsetrain.schedules import Clock, Curve, OneShot
from sparsetrain.targets import Targets


class ContinualPruning(SparsityCallback):
    """Prune at the start of every ``fit`` for its domain, by what all domains so far need, and keep the masks.

    Args:
        sparsity: fraction of zeros over the targets, in [0, 1); may be left out where the pattern has only one.
        pattern: ``"unstructured:row"``, ``"unstructured"``, ``"2:4"``, ``"4:8"``, ``"block:16x16"``, ...
        criterion: by name or as a `Criterion`; its ``batches`` says how many training batches of a domain are looked at.
        allocation: how much where, by name or as an `Allocation` that does not pool scores.
        memory: what a domain leaves to the next; see `Memory`.
        targets: which tensors; see `Targets`.
        overrides: another pattern or sparsity by regular expression of names; sparsity 0 leaves a tensor dense.
        streaming: how data is taken through the blocks; see `Streaming`.

    With a data module that is no `DomainSequence`, set ``domain`` to a new name before every ``fit``. ``report`` says what
    became of every tensor in the last domain, ``pruner.domains`` what every domain did. Raises `PatternError`, `TargetError` or
    `RecipeError` when it is set up on a model that cannot do what is asked.

    Example: ``method = ContinualPruning(pattern="2:4", criterion="copal")``, then for each name ``sequence.enter(name)`` and
    ``Trainer(callbacks=[method]).fit(model, sequence)``.
    """

    report: OneShotReport | None = None
    #: The name of the domain of the next ``fit``, where no `DomainSequence` says it.
    domain: str | None = None

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: Pattern | str = "unstructured:row",
        criterion: Criterion | str = "copal",
        allocation: Allocation | str = "uniform",
        memory: Memory | None = None,
        targets: Targets | None = None,
        overrides: dict[str, Override] | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        super().__init__()
        self.pattern = parse_pattern(pattern)
        self.sparsity = sparsity if sparsity is None else float(exact(sparsity))
        self.criterion = get_criterion(criterion)
        self.allocation = get_allocation(allocation)
        self.memory = memory or Memory()
        self.targets = targets or Targets()
        self.overrides = overrides or {}
        self.streaming = streaming or Streaming()
        self.pruner: ContinualPruner | None = None
        self.drift: dict[str, float] = {}

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager for the targets, pattern and overrides."""
        return MaskManager(model, self.targets, self.pattern, self.overrides)

    def use(self, model: nn.Module, manager: MaskManager | None = None) -> MaskManager:
        """Bind to a model; what was learned of another one is not known of this."""
        found = super().use(model, manager)
        if self.pruner is None or self.pruner.manager is not found:
            self.pruner = ContinualPruner(
                found,
                self.sparsity,
                criterion=self.criterion,
                allocation=self.allocation,
                memory=self.memory,
                streaming=self.streaming,
            )
            self.report, self.drift = None, {}
        return found

    def validate(self) -> None:
        """Every tensor can reach what is asked of it, and statistics of the criterion add up."""
        validate_continual(self.masks, self.sparsity, self.criterion, self.allocation, self.memory)

    def final(self, tensor: MaskedTensor) -> Sparsity:
        """Its override, else what is asked of all, else the one sparsity its pattern has."""
        return final_sparsity(tensor, self.sparsity)

    def curves(self, clock: Clock) -> dict[float, Curve]:
        """One step up at the start, for every sparsity."""
        goals = {float(self.final(t)) for t in self.masks}
        return {goal: OneShot("0st").resolve(goal, clock) for goal in goals if goal > 0}

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Without a `DomainSequence` the domain is the one that ``domain`` names."""
        require_data(trainer, self.masks, self.criterion)
        if not hasattr(trainer.datamodule, "domains"):  # type: ignore[attr-defined]
            known = self._pruner.domains
            self._learn(trainer, self.domain or f"domain {len(known) + 1}", 1.0, resumed)

    def begin_domain(self, trainer: Trainer, index: int, name: str) -> None:
        """Prune for a domain of a `DomainSequence`."""
        known = [domain.name for domain in self._pruner.domains]
        self._learn(trainer, name, trainer.datamodule.weight, resumed=name in known[-1:])  # type: ignore[attr-defined]

    @property
    def _pruner(self) -> ContinualPruner:
        assert self.pruner is not None  # made by `use`
        return self.pruner

    def _learn(self, trainer: Trainer, name: str, weight: float, resumed: bool) -> None:
        if resumed:
            return
        step = current_step(trainer)
        batches, seed = None, self.resume.seed_at(step)
        if isinstance(self.criterion, StatisticsCriterion):
            # A function of the run's seed and the step, the same in a run that was interrupted.
            batches = itertools.islice(training_batches(trainer, seed), self.criterion.batches)
        module, streams = trainer.lightning_module, capture()
        torch.manual_seed(seed)  # random augmentation
        try:
            with silenced(module):
                self.report = self._pruner.learn(
                    name,
                    batches,
                    run=lambda batch: loss_of(trainer, batch),
                    loss=lambda batch: loss_of(trainer, batch),
                    weight=weight,
                    step=step,
                )
        finally:
            restore(streams)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify, and take over what training has made of the survivors."""
        super().on_fit_end(trainer, pl_module)
        self.drift = self._pruner.absorb() or self.drift

    def facts(self) -> dict[str, Any]:
        """What every domain did: samples, weights that died and came back, churn; the largest drift by fine-tuning."""
        if self.pruner is None:
            return {}
        domains = [asdict(domain) | {"churn": domain.churn} for domain in self.pruner.domains]
        return {"memory": self.memory.mode, "domains": domains, "drift": max(self.drift.values(), default=0.0)}

    def method_state(self) -> dict[str, Any]:
        """What was learned."""
        return {"pruner": self._pruner.state_dict(), "drift": dict(self.drift)}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._pruner.load_state_dict(state["pruner"])
        self.drift = dict(state["drift"])

    def shortfall(self) -> str | None:
        """No domain was learned."""
        return None if self.pruner is not None and self.pruner.domains else "nothing was pruned: no domain was learned"
