"""PackNet: several tasks in one network; each takes a share of the weights that are still free, and what it takes is frozen.

When to use it: tasks come one after another, whoever asks says which task it is (task-incremental), and nothing may be
forgotten. For one more task at a time on a network that is large enough.

What it does (Mallya and Lazebnik 2018, arXiv 1711.05769, sec. 3): a task trains all free weights, on top of the frozen weights
of earlier tasks; at ``prune_at`` it keeps the largest of them in each tensor, its ``share`` of what was free, gives back the
rest, and is fine-tuned. Every weight has an owner, one byte; task j is served with the weights of owners 1 ... j, which is
exactly the network it ended with: its logits stay the same, bit for bit. ``serving`` does that around an evaluation.

Knobs: ``share`` of what is still free; "even" gives each task of the sequence the same number of weights, the last one all
that is left: give a number where tasks may be appended. ``pattern`` is what the weights of *one task* look like: with ``1:8``
each task takes one of every eight, and eight tasks fit; ``neurons`` gives whole outputs. ``restart``: where free weights
start, at random, or at zero as in the authors' code (slower, and no way for whole units: all weights of a neuron at zero
learn nothing). ``rest``: biases, norms and their running statistics are the first task's, frozen (the paper's choice), or
``per_task`` copies, which whole units need under norms. Rows of the output head belong to the classes of a task.

Combines with: any optimizer, LR schedule, weight decay, accumulation, clipping, AMP, DDP; `IncrementalClassification` with
scenario "task"; other tasks too, where the head is then one of the rest.

How it fails: a network that is full refuses the next task. A new object on a packed network is refused: it knows no owners. A
first task with a large share leaves little to learn later ones with. Averaged weights (EMA, SWA) and FSDP2 are refused.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from sparsetrain.callbacks.base import current_step
from sparsetrain.callbacks.clock import clock_of
from sparsetrain.callbacks.task_order import TaskMethod, TaskOrder
from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.incremental import FREE, claim, serving_mask
from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.patterns import Pattern, UnitPattern, exact, parse_pattern
from sparsetrain.targets import Targets


class PackNet(TaskMethod):
    """Pack task after task into one network, and freeze what each has taken.

    Args:
        share: of the weights that are still free, which a task takes in each tensor, in (0, 1]; or "even". N:M says it itself.
        prune_at: duration (``50%``, ``3ep``, ``500st``) of a task's training after which it prunes; the rest is fine-tuning.
        pattern: of the weights of one task.
        rest: "first" or "per_task": whose biases, norms and other parameters a task has.
        restart: "random" or "zero": where free weights start when a later task begins.
        targets: which tensors; see `Targets`. Not the output head.

    Raises `RecipeError`, `PatternError` or `TargetError` for what cannot work; `PatternError` when the network is full.

    Example, with one object for all tasks and a trainer for each::

        method = PackNet(share="even")
        for name in sequence:
            sequence.enter(name)
            Trainer(callbacks=[method]).fit(model, datamodule=sequence)
    """

    def __init__(
        self,
        share: float | Literal["even"] = "even",
        prune_at: str = "50%",
        pattern: Pattern | str = "unstructured",
        rest: Literal["first", "per_task"] = "first",
        restart: Literal["zero", "random"] = "random",
        targets: Targets | None = None,
    ) -> None:
        super().__init__()
        if share != "even" and not (isinstance(share, (int, float)) and 0 < share <= 1):
            raise RecipeError(f"share={share!r}: give the share of the free weights a task takes, in (0, 1], or 'even'")
        if rest not in ("first", "per_task") or restart not in ("zero", "random"):
            raise RecipeError(f"rest={rest!r}, restart={restart!r}: rest is 'first' or 'per_task', restart 'zero' or 'random'")
        self.pattern = parse_pattern(pattern)
        if self.pattern.sparsity is not None and share != "even":
            raise RecipeError(f"pattern {self.pattern} says how much a task takes: leave share={share} out")
        if isinstance(self.pattern, UnitPattern) and restart == "zero":
            raise RecipeError(f"pattern {self.pattern} frees whole units, which learn nothing from zero: set restart='random'")
        self.share, self.prune_at, self.rest, self.restart = share, prune_at, rest, restart
        self.targets = targets or Targets()
        #: Owner of each weight by tensor: 0 free, t for task t; stored layout.
        self.owners: dict[str, Tensor] = {}
        self._asked: dict[str, list[Fraction]] = {}
        self._spread: dict[str, float] = {}
        self._due = 0
        self._early = False

    # -- building ---------------------------------------------------------------------------------------------------------

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager of what all tasks together own; the pattern of one task is kept here."""
        return MaskManager(model, self.targets)

    def forget(self, made: MaskManager) -> TaskOrder:
        """All weights are free. Refuses norms whose statistics would tell nothing of neurons that the first task frees."""
        order = TaskOrder("PackNet", made, self.rest == "per_task")
        if isinstance(self.pattern, UnitPattern) and self.rest == "first":
            order.rest.refuse_norms(f"PackNet with pattern {self.pattern} needs rest='per_task'")
        self.owners = {t.name: torch.zeros(t.target.shape, dtype=torch.uint8) for t in made}
        self._asked = {t.name: [] for t in made}
        return order

    def validate(self) -> None:
        """Every tensor can have the pattern; N:M needs an input dimension that divides by its group."""
        for tensor in self.masks:
            try:
                if self.pattern.sparsity is not None:
                    self.pattern.validate(tensor.target.view_shape, self.pattern.sparsity)
                elif self.pattern.units(tensor.target.view_shape) < 2:
                    raise PatternError(f"{self.pattern} has one unit only, which no two tasks can share")
            except PatternError as error:
                raise PatternError(f"{tensor.name}: {error}") from error

    # -- running ----------------------------------------------------------------------------------------------------------

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Remember the scale that weights start at."""
        super().on_begin(trainer, resumed)
        if not self.order.names:
            self._spread = {t.name: float(t.target.parameter.detach().float().std()) for t in self.masks}

    def begin_domain(self, trainer: Trainer, index: int, name: str) -> None:
        """A task begins: free weights are there again, those of earlier tasks are frozen."""
        clock = clock_of(trainer)
        self._due, self._early = clock.steps(self.prune_at), False
        if clock.total_steps is not None and not 0 < self._due <= clock.total_steps:
            raise RecipeError(
                f"prune_at={self.prune_at!r} is step {self._due} of the {clock.total_steps} of task {name!r}; let it lie inside"
            )
        if self.order.enter(trainer, name):
            for tensor in self.masks:
                self._require_room(tensor, name)
            if self.order.task:
                self._free(trainer, self.order.task + 1)
            self.order.commit(name)
        for tensor in self.masks:
            owners = self._owners(tensor)
            self.order.frozen.freeze(tensor.target.parameter, (owners != FREE) & (owners < self.order.task))
        self.order.freeze(trainer)

    def _require_room(self, tensor: MaskedTensor, name: str) -> None:
        """Better now than after half of the training."""
        view, owners = tensor.target.layout.view, self._owners(tensor)
        try:
            claim(view((owners == FREE).float()), view(owners), self.pattern, Fraction(1))
        except PatternError as error:
            raise PatternError(f"{tensor.name}, task {name!r}: {error}") from error

    @torch.no_grad()
    def _free(self, trainer: Trainer, task: int) -> None:
        for tensor in self.masks:
            parameter, free = tensor.target.parameter, self._owners(tensor) == FREE
            everything = torch.ones_like(free)
            self.masks.install(tensor.name, everything, 0, step=current_step(trainer), why=f"task {task} begins")
            if self.restart == "random":
                words = [self.resume.seed, task, *tensor.name.encode()]
                seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
                fresh = torch.randn(tensor.target.shape, generator=torch.Generator().manual_seed(seed))
                fresh = (fresh * self._spread[tensor.name]).to(parameter)
                self.masks.write(tensor.name, torch.where(free, fresh, parameter.detach()))

    def on_step(self, trainer: Trainer, step: int) -> None:
        """Prune when it is due."""
        if step >= self._due and not self._claimed:
            self._claim(self._fraction(trainer), step)

    @property
    def _claimed(self) -> bool:
        return all(len(asked) >= self.order.task for asked in self._asked.values())

    def _fraction(self, trainer: Trainer) -> Fraction | None:
        if self.pattern.sparsity is not None:
            return None
        if self.share == "even":
            tasks = len(trainer.datamodule.names)  # type: ignore[attr-defined]
            return Fraction(1, max(1, tasks - self.order.task + 1))
        return Fraction(1) if self.share == 1 else exact(float(self.share))

    def _claim(self, share: Fraction | None, step: int) -> None:
        """The task takes its weights; what it leaves is zero, and free."""
        task = self.order.task
        for tensor in self.masks:
            view, owners = tensor.target.layout.view, self._owners(tensor).clone()
            mask, sparsity = claim(view(tensor.target.parameter.detach().abs()), view(owners), self.pattern, share)
            owners[view(mask)] = task
            self.owners[tensor.name] = owners.cpu()
            self._asked[tensor.name].append(sparsity)
            alive = owners != FREE
            dead = Fraction(int((~alive).sum()), alive.numel())
            self.masks.install(tensor.name, alive, dead, step=step, why=f"task {task} prunes")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training may have stopped before it was due to prune."""
        if self._state is not None:  # resumed where it ends: it never started
            self._state["validation_due"] = False
            self.on_train_start(trainer, pl_module)
        if self.order.ended < self.order.task and not self._claimed:
            self._early = True
            self._claim(self._fraction(trainer), current_step(trainer))
        super().on_fit_end(trainer, pl_module)

    def finish(self, trainer: Trainer) -> None:
        """Verify the weights of each task too."""
        for tensor in self.masks:
            view, owners = tensor.target.layout.view, self.owners[tensor.name]
            for task, sparsity in enumerate(self._asked[tensor.name], 1):
                try:
                    self.pattern.check(view(owners == task), sparsity)
                except PatternError as error:
                    raise PatternError(f"{tensor.name}, task {self.order.names[task - 1]!r}: {error}") from error

    def shortfall(self) -> str | None:
        """Training stopped before it had pruned."""
        return f"training ended before prune_at={self.prune_at!r}: pruned at the end, not fine-tuned" if self._early else None

    # -- serving ----------------------------------------------------------------------------------------------------------

    def weights_of(self, tensor: MaskedTensor, task: int) -> Tensor:
        """Those that it owns and that tasks before it own."""
        return tensor.target.parameter.detach().masked_fill(~serving_mask(self._owners(tensor), task), 0.0)

    def facts(self) -> dict[str, Any]:
        """How many weights each task owns, how many are free, and how many numbers the network keeps in all."""
        owners = torch.cat([owners.flatten() for owners in self.owners.values()])
        counts = torch.bincount(owners.long(), minlength=len(self.order.names) + 1).tolist()
        tasks = dict(zip(self.order.names, counts[1:], strict=True))
        return {"owned": tasks, "free": counts[0], "numbers": owners.numel() + self.order.rest.weights()}

    def _owners(self, tensor: MaskedTensor) -> Tensor:
        return self.owners[tensor.name].to(tensor.target.parameter.device)

    # -- remembering ------------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """Owners, what each task took, and the tasks."""
        asked = {name: [[s.numerator, s.denominator] for s in given] for name, given in self._asked.items()}
        return {"owners": dict(self.owners), "asked": asked, "spread": self._spread, **super().method_state()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.owners = dict(state["owners"])
        self._asked = {name: [Fraction(*pair) for pair in given] for name, given in state["asked"].items()}
        self._spread = dict(state["spread"])
        super().load_method_state(state)
