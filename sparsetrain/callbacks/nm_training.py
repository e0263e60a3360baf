"""Train N:M sparse weights with dense ones behind them: SR-STE, and N that falls in stages.

When to use it: the network is trained (or trained on) for N:M, and masks should be learned rather than chosen once. The more
is pruned of a group (1:4, 1:8, 1:16) the more it gains over pruning once and retraining, which is
``PruneFinetune(pattern="2:4", schedule=OneShot())`` (ASP, Mishra et al. 2021, arXiv 2104.08378).

What it does: after every optimizer step the mask ``E`` keeps the N largest ``|W|`` of every M; the forward pass sees
``W~ = E * W``; the gradient at ``W~`` moves the dense ``W`` (straight through), and pruned entries decay:
``W <- W - lr * (g(W~) + decay * (1 - E) * W)`` (Zhou et al. 2021, arXiv 2102.04010, eq. 9). Under SGD the decay is part of the
gradient, as in the paper; under every other optimizer it is decoupled as AdamW does it. With ``decrease_until`` N falls from
M - 1 to its final value one at a time (structure decay, Kao et al. 2022, arXiv 2209.07617).

Three phases: dense until ``start``; straight-through; from ``freeze`` on fixed masks, as in any other method. Parameters are
``W~`` in all of them after ``start``: validation, averages, checkpoints and exports see exact zeros in exact N:M. What the
pruned entries would be is kept beside the model, is there for the moment of the optimizer's step only, and travels in
checkpoints. In the straight-through phase the optimizer's momentum belongs to the dense weights, pruned entries included;
at ``freeze`` the hidden weights are dropped and that momentum is cleared.

Knobs: ``decay`` (2e-4 of the paper; too small and masks keep flickering, too large and they never move), ``freeze`` (the rest
of the run repairs what fixing costs), ``decrease_until``. One more copy of the weights in memory, and a selection a step.

Combines with: any optimizer that evaluates its closure once, AMP, accumulation (the decay once a step), EMA, DDP. Clipping by
norm counts the straight-through gradients of pruned entries too until ``freeze``, but not the decay.

How it fails: LBFGS and FSDP2 are refused; under Adam with a decay of 0 masks keep flickering until they are frozen.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain.callbacks.base import SparsityCallback, averaged_copies, current_step
from sparsetrain.callbacks.clock import clock_of
from sparsetrain.errors import DivergedError, PatternError, RecipeError
from sparsetrain.masks import MaskChange, MaskedTensor, MaskManager, Override
from sparsetrain.masks.erase import Eraser
from sparsetrain.masks.optimizer_state import forget
from sparsetrain.nm import around_step, reveal, select, stages
from sparsetrain.patterns import NM, Pattern, Sparsity, parse_pattern
from sparsetrain.schedules import Clock, Curve
from sparsetrain.targets import Targets


class NMTraining(SparsityCallback):
    """Learn N:M masks while training, with straight-through gradients and sparse-refined decay (SR-STE).

    Args:
        pattern: ``"2:4"`` or any ``keep:group``; the input dimension of every target must divide by ``group``.
        decay: of pruned entries' dense weights, relative to the learning rate, 0 or more.
        start: duration (``3ep``, ``500st``, ``30%``) of dense training before the first mask.
        freeze: from here on masks are fixed and hidden weights gone; ``"100%"`` fixes them with the last step.
        decrease_until: N falls from ``group - 1`` at ``start``, one at a time, to ``keep`` here; None: at once.
        targets: which tensors; see `Targets`.
        overrides: another ``keep:group`` by regular expression of names; sparsity 0 leaves a tensor dense.

    Raises `RecipeError` for a decay or durations that cannot be, LBFGS and FSDP2, `PatternError` for a pattern or a tensor
    that is no N:M.

    Example: ``Trainer(callbacks=[NMTraining("2:4", freeze="90%")])``.
    """

    def __init__(
        self,
        pattern: Pattern | str = "2:4",
        decay: float = 2e-4,
        start: str = "0st",
        freeze: str = "95%",
        decrease_until: str | None = None,
        targets: Targets | None = None,
        overrides: dict[str, Override] | None = None,
    ) -> None:
        super().__init__()
        self.pattern = parse_pattern(pattern)
        if not isinstance(self.pattern, NM):
            raise PatternError(f"{self.pattern} is no N:M pattern; write keep:group such as 2:4, or use PruneFinetune")
        if not (math.isfinite(decay) and decay >= 0):
            raise RecipeError(f"decay is {decay}; give 0 or more, such as 2e-4")
        self.decay = decay
        self.start, self.freeze, self.decrease_until = start, freeze, decrease_until
        self.targets = targets or Targets()
        self.overrides = overrides or {}
        self.phase: Literal["dense", "straight-through", "fixed"] = "dense"
        #: What the pruned entries of each tensor would be, 0 where it is alive; empty unless the phase is straight-through.
        self.hidden: dict[str, Tensor] = {}
        self._finals: dict[str, NM] = {}
        self._clock = Clock(None, None)
        self._open: list[MaskedTensor] = []
        self._handles: list[RemovableHandle] = []
        self._erase = Eraser()

    # -- building ---------------------------------------------------------------------------------------------------------

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager for the targets, pattern and overrides."""
        return MaskManager(model, self.targets, self.pattern, self.overrides)

    def use(self, model: nn.Module, manager: MaskManager | None = None) -> MaskManager:
        """Bind to a model; on another one than before everything begins anew."""
        if manager is not None or self.manager is None or self.manager.model is not model:
            self.phase, self.hidden, self._finals = "dense", {}, {}
        return super().use(model, manager)

    def validate(self) -> None:
        """Every tensor has an N:M pattern that it can reach."""
        finals: dict[str, NM] = {}
        for tensor in self.masks:
            if tensor.goal == 0:
                continue
            pattern = self._finals.get(tensor.name, tensor.pattern)
            if not isinstance(pattern, NM):
                raise PatternError(
                    f"{tensor.name}: {pattern} is no N:M pattern; give it one such as 2:4, or sparsity 0 to leave it dense"
                )
            try:
                pattern.validate(tensor.target.view_shape, pattern.sparsity if tensor.goal is None else tensor.goal)
            except PatternError as error:
                raise PatternError(f"{tensor.name}: {error}") from error
            finals[tensor.name] = pattern
        if not finals:
            raise RecipeError("every target is asked for sparsity 0: nothing would be pruned; drop overrides")
        self._finals = finals

    def final(self, tensor: MaskedTensor) -> Sparsity:
        """The one sparsity of its pattern."""
        pattern = self._finals.get(tensor.name, tensor.pattern)
        return 0.0 if tensor.goal == 0 or pattern.sparsity is None else pattern.sparsity

    def _steps(self, clock: Clock) -> tuple[int, int, int]:
        start, freeze = clock.steps(self.start), clock.steps(self.freeze)
        until = start if self.decrease_until is None else clock.steps(self.decrease_until)
        if not start <= until <= freeze:
            raise RecipeError(
                f"NMTraining goes dense, straight-through, fixed: start (step {start}) <= decrease_until (step {until}) <= "
                f"freeze (step {freeze}) does not hold"
            )
        if clock.total_steps and freeze > clock.total_steps:
            raise RecipeError(
                f"freeze is at step {freeze}, the run ends at {clock.total_steps}: masks would never be fixed; give 95%"
            )
        return start, until, freeze

    def _stages(self, final: NM, clock: Clock) -> list[tuple[int, NM]]:
        start, until, _ = self._steps(clock)
        return [(start, final)] if self.decrease_until is None else stages(final, start, until)

    def curves(self, clock: Clock) -> dict[float, Curve]:
        """Steps and sparsities of the stages, for every final sparsity; raises `RecipeError` if they do not fit the run."""
        return {
            float(final.sparsity): Curve(tuple({s: float(p.sparsity) for s, p in self._stages(final, clock)}.items()))
            for final in self._finals.values()
        }

    # -- running ----------------------------------------------------------------------------------------------------------

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Resolve the durations against this run; start, or go on, where the method is."""
        self._clock = clock_of(trainer)
        self._steps(self._clock)
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise RecipeError("NMTraining cannot train with LBFGS: its line search would see dense weights; use SGD or AdamW")
        sharded = [t.name for t in self.masks if isinstance(t.target.parameter, DTensor)]
        if sharded:
            raise RecipeError(f"{sharded[0]} is sharded: NMTraining does not train under FSDP2; use ddp, or PruneFinetune")
        if self.phase == "straight-through":
            self._take_over(trainer)
        if not resumed:
            self.on_step(trainer, current_step(trainer))

    def on_step(self, trainer: Trainer, step: int) -> None:
        """Enter the next phase or stage if it is due."""
        start, _, freeze = self._steps(self._clock)
        if self.phase == "dense" and step >= start:
            self._take_over(trainer)
            self.phase = "straight-through"
        if self.phase == "straight-through":
            for tensor in self._trained():
                due, now = self._due(tensor, step), tensor.pattern
                if tensor.name not in self.hidden or (isinstance(now, NM) and due.keep < now.keep):
                    self._install(tensor, due, step)
            if step >= freeze:
                self._fix(trainer, step)

    def _trained(self) -> list[MaskedTensor]:
        return [tensor for tensor in self.masks if tensor.name in self._finals]

    def _due(self, tensor: MaskedTensor, step: int) -> NM:
        first, *later = self._stages(self._finals[tensor.name], self._clock)
        return [pattern for at, pattern in (first, *later) if at <= max(step, first[0])][-1]

    @torch.no_grad()
    def _install(self, tensor: MaskedTensor, pattern: NM, step: int) -> None:
        """Prune to a stage, by the dense weights there are."""
        weight, view = tensor.target.parameter.detach(), tensor.target.layout.view
        dense = weight + self.hidden.get(tensor.name, 0.0)
        tensor.pattern = pattern
        mask = view(select(view(dense), pattern)).contiguous()
        self.masks.install(tensor.name, mask, pattern.sparsity, step=step, why=f"straight-through {pattern}")
        self.hidden[tensor.name] = dense - weight

    def _take_over(self, trainer: Trainer) -> None:
        """Momentum belongs to the dense weights now: the manager lets go of the optimizers, but follows averages still."""
        for handle in self._handles:
            handle.remove()
        self.masks.detach()
        for copy in averaged_copies(trainer):
            self.masks.follow(copy)
        self._handles = [
            handle
            for optimizer in trainer.optimizers
            for handle in around_step(optimizer, partial(self._reveal, optimizer), self._hide)
        ]

    def _reveal(self, optimizer: Optimizer) -> None:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for tensor in self._trained():
            parameter = tensor.target.parameter
            group = groups.get(id(parameter))
            if group is None or parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise RecipeError(f"{tensor.name} has sparse gradients, which cannot decay what is pruned; use sparse=False")
            reveal(optimizer, group, parameter.detach(), parameter.grad, self.hidden[tensor.name], self.decay)
            self._open.append(tensor)

    @torch.no_grad()
    def _hide(self) -> None:
        """The mask of the weights as they have become; then only ``W~`` stays in the model."""
        for tensor in self._open:
            weight, hidden, view = tensor.target.parameter.detach(), self.hidden[tensor.name], tensor.target.layout.view
            assert isinstance(tensor.pattern, NM)
            try:
                tensor.mask = view(select(view(weight), tensor.pattern)).contiguous()
            except PatternError as error:
                raise DivergedError(f"{tensor.name}: {error}; lower the learning rate, or clip gradients") from error
            hidden.copy_(weight)
            self._erase([weight, *(c[tensor.name] for c in self.masks.followers if tensor.name in c)], tensor.mask)
            hidden -= weight
        self._open.clear()

    def _fix(self, trainer: Trainer, step: int) -> None:
        """Hand over to the manager: hidden weights are gone, and so is what optimizers remember of them."""
        for handle in self._handles:
            handle.remove()
        clips = trainer.gradient_clip_val is not None or not trainer.lightning_module.automatic_optimization
        self.masks.attach(*trainer.optimizers, mask_gradients=True if clips else None)
        for tensor in self._trained():
            assert tensor.mask is not None
            for optimizer in trainer.optimizers:
                forget(optimizer, tensor.target.parameter, ~tensor.mask, ~tensor.mask)
            self.masks.changes.append(MaskChange(step, tensor.name, 0, 0, "masks fixed"))
        self.masks.enforce()
        self._handles, self.hidden, self.phase = [], {}, "fixed"

    # -- remembering ------------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """The phase, the stage of every tensor, and what its pruned entries would be."""
        return {
            "phase": self.phase,
            "patterns": {t.name: str(t.pattern) for t in self.masks},
            "hidden": {t.name: self.hidden[t.name][~t.mask] for t in self.masks if t.mask is not None and self.hidden},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Masks are checked against the stage they were saved in, as long as it leads to what is asked for."""
        for name, text in state_dict.get("method", {}).get("patterns", {}).items():
            stage, final = parse_pattern(text), self._finals.get(name)
            if self.manager is not None and isinstance(stage, NM) and final is not None:
                fits = stage.group == final.group and stage.keep >= final.keep
                self.manager[name].pattern = stage if fits else final
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.phase = state["phase"]
        self.hidden = {}
        for name, values in state["hidden"].items():
            tensor = self.masks[name]
            assert tensor.mask is not None
            self.hidden[name] = torch.zeros_like(tensor.target.parameter.detach())
            self.hidden[name][~tensor.mask] = values.to(self.hidden[name])

    def shortfall(self) -> str | None:
        """Training stopped before the masks were fixed."""
        if self.phase == "fixed":
            return None
        reached = ", ".join(sorted({str(t.pattern) for t in self._trained() if t.mask is not None}))
        where = f"at {reached}, with masks that still moved" if reached else "before the first mask: the model is dense"
        return f"training ended {where}; masks are fixed at freeze={self.freeze!r}. Train on, or freeze earlier"
