"""Prune once, block by block, on a few training samples; then fine-tune with the masks kept.

When to use it: a trained model, a transformer above all, that is to lose half of its weights (2:4, 4:8, 50-60 %) in minutes,
and that is then trained on, at full rank or by adapters, without losing a zero. For convolutional networks and high sparsity
gradual pruning (`PruneFinetune`) is better: there a single cut is too deep.

What it does: at ``start`` every block is measured on what the blocks before it, pruned already, give it, and is pruned; see
`sparsetrain.oneshot` (the order of Frantar and Alistarh 2023, arXiv 2301.00774, sec. 3, and Sun et al. 2023, arXiv 2306.11695,
sec. 3). What follows is fine-tuning; a recipe with ``trainer.max_epochs: 0`` prunes and trains nothing.

Knobs: ``criterion``: ``"wanda"`` (published with pattern ``unstructured:row``), ``"sparsegpt"`` (moves the survivors too:
better at 2:4 and above 60 %); its ``batches``: 128 samples are usual, more helps little. ``allocation: owl`` above 60 % (with
SparseGPT the statistics of all blocks are in memory at once then: ``4 * in^2`` bytes for every input of a layer).
``streaming``: samples in a forward pass, the type blocks run in, where hidden states wait.

Combines with: any optimizer, LR schedule, AMP, accumulation, clipping, EMA callbacks, DDP (statistics are summed over ranks).
The model is measured by its ``training_step``, in eval mode. Not with FSDP2, and not with criteria that need gradients.

How it fails: too few samples, or data unlike what the model is for, show as an output error that grows from block to block
(``report``); a learning rate as high as in training destroys what the first steps could have repaired.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from sparsetrain.allocation import Allocation, get_allocation
from sparsetrain.callbacks.base import SparsityCallback, current_step
from sparsetrain.callbacks.clock import clock_of
from sparsetrain.callbacks.exact_resume import capture, restore
from sparsetrain.callbacks.statistics import loss_of, require_data, silenced, training_batches
from sparsetrain.criteria import Criterion, StatisticsCriterion, get_criterion
from sparsetrain.masks import MaskedTensor, MaskManager, Override
from sparsetrain.oneshot import OneShotReport, Streaming, prune_oneshot, validate_oneshot
from sparsetrain.patterns import Pattern, Sparsity, exact, parse_pattern
from sparsetrain.pruning import final_sparsity
from sparsetrain.schedules import Clock, Curve, OneShot
from sparsetrain.targets import Targets


class OneShotPruning(SparsityCallback):
    """Prune once at ``start``, block by block on training data, and keep the masks.

    Args:
        sparsity: fraction of zeros over the targets, in [0, 1); may be left out where the pattern has only one.
        pattern: ``"2:4"``, ``"unstructured:row"``, ``"unstructured"``, ``"block:16x16"``, ...
        criterion: by name or as a `Criterion`; its ``batches`` says how many training batches are looked at.
        allocation: how much where, by name or as an `Allocation`.
        start: when: ``"0st"`` before the first step, ``"500st"``, ``"1ep"``, ``"10%"``.
        targets: which tensors; see `Targets`.
        overrides: another pattern or sparsity by regular expression of names; sparsity 0 leaves a tensor dense.
        streaming: how data is taken through the blocks; see `Streaming`.

    After pruning ``report`` says what became of every tensor. Raises `PatternError`, `TargetError` or `RecipeError` when it is
    set up on a model that cannot do what is asked.

    Example: ``Trainer(callbacks=[OneShotPruning(pattern="2:4", criterion="sparsegpt")])``.
    """

    report: OneShotReport | None = None

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: Pattern | str = "unstructured",
        criterion: Criterion | str = "wanda",
        allocation: Allocation | str = "uniform",
        start: str = "0st",
        targets: Targets | None = None,
        overrides: dict[str, Override] | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        super().__init__()
        self.pattern = parse_pattern(pattern)
        self.sparsity = sparsity if sparsity is None else float(exact(sparsity))
        self.criterion = get_criterion(criterion)
        self.allocation = get_allocation(allocation)
        self.schedule = OneShot(start)
        self.targets = targets or Targets()
        self.overrides = overrides or {}
        self.streaming = streaming or Streaming()
        self._at: int | None = None
        self._done = False

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager for the targets, pattern and overrides."""
        return MaskManager(model, self.targets, self.pattern, self.overrides)

    def use(self, model: nn.Module, manager: MaskManager | None = None) -> MaskManager:
        """Bind to a model; what was done to another one is not done to this."""
        if self.manager is not None and self.manager.model is not model:
            self._done, self.report = False, None
        return super().use(model, manager)

    def validate(self) -> None:
        """Every tensor can reach what is asked of it, and the criterion can score it block by block."""
        validate_oneshot(self.masks, self.sparsity, self.criterion, self.allocation)

    @property
    def pooled(self) -> bool:  # type: ignore[override]
        """The allocation decides."""
        return self.allocation.pooled

    def final(self, tensor: MaskedTensor) -> Sparsity:
        """Its override, else what is asked of all, else the one sparsity its pattern has."""
        return final_sparsity(tensor, self.sparsity)

    def curves(self, clock: Clock) -> dict[float, Curve]:
        """One step up for every sparsity."""
        goals = {float(self.final(t)) for t in self.masks}
        return {goal: self.schedule.resolve(goal, clock) for goal in goals if goal > 0}

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Say when; prune at once if it is now. A second ``fit`` keeps the masks of the first."""
        self._at = min(curve.points[0][0] for curve in self.curves(clock_of(trainer)).values())
        if not self._done:
            require_data(trainer, self.masks, self.criterion)
            if not resumed:
                self.on_step(trainer, current_step(trainer))

    def on_step(self, trainer: Trainer, step: int) -> None:
        """Prune if it is time."""
        if self._done or self._at is None or step < self._at:
            return
        if self.before_first_change is not None and step > 0:
            self.before_first_change(trainer)
        batches, seed = None, self.resume.seed_at(step)
        if isinstance(self.criterion, StatisticsCriterion):
            # A function of the run's seed and the step, the same in a run that was interrupted.
            batches = itertools.islice(training_batches(trainer, seed), self.criterion.batches)
        module, streams = trainer.lightning_module, capture()
        torch.manual_seed(seed)  # random augmentation
        try:
            with silenced(module):
                self.report = prune_oneshot(
                    self.masks,
                    batches,
                    self.sparsity,
                    criterion=self.criterion,
                    allocation=self.allocation,
                    run=lambda batch: loss_of(trainer, batch),
                    streaming=self.streaming,
                    step=step,
                )
        finally:
            restore(streams)
        self.masks.unclaimed |= self.report.dense
        self._done = True

    def facts(self) -> dict[str, Any]:
        """The output error of the last block pruned, and how many samples were looked at."""
        if self.report is None:
            return {}
        errors = [row.error for row in self.report.rows if row.error is not None]
        return {
            "one_shot": {
                "samples": self.report.samples,
                "blocks": len(self.report.blocks),
                "output_error": errors[-1] if errors else None,
                "unseen_experts": len(self.report.unseen),
                "left_dense": self.report.dense,
                "seconds": self.report.seconds,
            }
        }

    def method_state(self) -> dict[str, Any]:
        """Whether it has pruned."""
        return {"done": self._done}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._done = state["done"]

    def shortfall(self) -> str | None:
        """Training ended before it was time."""
        if self._done:
            return None
        return f"nothing was pruned: training ended before step {self._at}; train longer, or let it start earlier"
