"""Supermask: one network, a mask for each task; the masks are learned like weights.

When to use it: tasks come one after another, whoever asks says which task it is (task-incremental), and nothing may be
forgotten. Against PackNet: later tasks choose freely among all weights, those of earlier tasks too, and the network never
fills up; each task costs one bit a weight.

What it does: every weight has a score; the network sees the weights whose scores are highest in the ``pattern``, and gradients
reach scores straight through, ``dL/ds = dL/dW~ * W``.

* ``weights: winning``: weights and scores learn together, and weights in any earlier task's mask are frozen (winning
  subnetworks, WSN, Kang et al. 2022, ICML). Scores go on from task to task.
* ``weights: fixed``: the weights stay what they are, pretrained ones (Piggyback, Mallya et al. 2018, arXiv 1801.06519) or
  random ones; only masks learn. Without a ``sparsity`` all weights with a score above ``threshold`` are used; scores start at
  twice that in every task.

Old tasks are served with their own mask (``serving``): their logits stay the same, bit for bit. While a task trains, the
optimizer steps dense weights and the model holds masked ones: validation, checkpoints and exports see the task's subnetwork.

Knobs: ``sparsity`` of each task in each tensor, ``pattern`` of every mask (exact), ``score_lr`` (Adam, apart from the model's
optimizer; 1e-4 with a threshold), ``rest``: biases and norms of the first task, frozen, or ``per_task`` copies. Rows of the
output head belong to the classes of a task.

Combines with: any optimizer that evaluates its closure once, LR schedule, weight decay, accumulation, AMP, DDP. Clipping by
norm counts the gradients of all weights, masked and frozen ones too.

How it fails: LBFGS, averaged weights (EMA, SWA) and FSDP2 are refused. Where masks of earlier tasks cover the whole network, a
new task can only choose, not learn: a lower density leaves more free. A ``score_lr`` too low leaves masks random.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from sparsetrain.callbacks.base import current_step
from sparsetrain.callbacks.task_order import TaskMethod, TaskOrder
from sparsetrain.errors import DivergedError, PatternError, RecipeError
from sparsetrain.incremental.supermask import Scored, StraightThrough, chosen, initial_scores
from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.masks.state import pack_bits, unpack_bits
from sparsetrain.patterns import Pattern, Sparsity, Unstructured, exact, parse_pattern
from sparsetrain.targets import Targets


class Supermask(TaskMethod):
    """Learn a mask for each task over one set of weights.

    Args:
        weights: "winning" (they learn until a task uses them) or "fixed" (they never move).
        sparsity: of every task's mask in each tensor, in (0, 1); may be left out where the pattern has only one, and for fixed
            weights, where the threshold then decides.
        pattern: of every task's mask.
        score_lr: learning rate of the scores, above 0.
        threshold: of scores, where no sparsity is asked for, above 0.
        rest: "first" or "per_task": whose biases, norms and other parameters a task has.
        targets: which tensors; see `Targets`. Not the output head.

    Raises `RecipeError`, `PatternError` or `TargetError` for what cannot work, `DivergedError` where a mask is lost.

    Example, with one object for all tasks and a trainer for each::

        method = Supermask(sparsity=0.7)
        for name in sequence:
            sequence.enter(name)
            Trainer(callbacks=[method]).fit(model, datamodule=sequence)
    """

    def __init__(
        self,
        weights: Literal["winning", "fixed"] = "winning",
        sparsity: float | None = None,
        pattern: Pattern | str = "unstructured",
        score_lr: float = 1e-3,
        threshold: float = 5e-3,
        rest: Literal["first", "per_task"] = "first",
        targets: Targets | None = None,
    ) -> None:
        super().__init__()
        if weights not in ("winning", "fixed") or rest not in ("first", "per_task"):
            raise RecipeError(
                f"weights={weights!r}, rest={rest!r}: weights is 'winning' or 'fixed', rest 'first' or 'per_task'"
            )
        if not score_lr > 0 or not threshold > 0:
            raise RecipeError(f"score_lr={score_lr}, threshold={threshold}: both must be above 0, such as 1e-3 and 5e-3")
        self.pattern = parse_pattern(pattern)
        by_threshold = sparsity is None and self.pattern == Unstructured() and weights == "fixed"
        given = self.pattern.sparsity if sparsity is None else exact(sparsity)
        if not by_threshold and not given:
            raise PatternError(
                f"sparsity {sparsity} with pattern {self.pattern} and {weights} weights: say how sparse a task's mask is, in "
                "(0, 1), such as 0.7; only fixed weights under 'unstructured' can do without"
            )
        self.sparsity = None if given is None else float(given)
        self._sparsity = given
        self.weights, self.score_lr, self.threshold, self.rest = weights, score_lr, threshold, rest
        self.targets = targets or Targets()
        #: Masks of the tasks so far by tensor, one bit a weight.
        self.task_masks: dict[str, list[Tensor]] = {}
        self._scored: dict[str, Scored] = {}
        self._steps: StraightThrough | None = None
        self._saved_steps: dict[str, Any] | None = None

    # -- building ---------------------------------------------------------------------------------------------------------

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager of the mask of the task at work."""
        return MaskManager(model, self.targets, self.pattern)

    def forget(self, made: MaskManager) -> TaskOrder:
        """No masks, no scores."""
        order = TaskOrder("Supermask", made, self.rest == "per_task")
        self.task_masks = {t.name: [] for t in made}
        self._scored, self._steps, self._saved_steps = {}, None, None
        return order

    def validate(self) -> None:
        """Every tensor can have the pattern at its sparsity."""
        for tensor in self.masks:
            try:
                if self._sparsity is not None:
                    tensor.pattern.validate(tensor.target.view_shape, self._sparsity)
            except PatternError as error:
                raise PatternError(f"{tensor.name}: {error}") from error

    def final(self, tensor: MaskedTensor) -> Sparsity | None:
        """That of every task; None where the threshold decides."""
        return self._sparsity

    # -- running ----------------------------------------------------------------------------------------------------------

    def begin_domain(self, trainer: Trainer, index: int, name: str) -> None:
        """A task begins: its mask is that of its scores, weights of earlier masks are frozen."""
        new = self.order.enter(trainer, name)
        if self._steps is not None:
            self._steps.detach()
        # The optimizer's memory belongs to the dense weights: the manager lets go until the task is over.
        self.masks.detach()
        task, begun, sparsity = self.order.task + new, {}, {}
        for tensor in self.masks:
            scored = begun[tensor.name] = self._begin(tensor, new, task)
            scored.mask, sparsity[tensor.name] = self._choose(tensor, scored)
        self._scored = begun
        for tensor in self.masks:
            scored, why = begun[tensor.name], f"task {task} begins"
            self.masks.install(tensor.name, scored.mask, sparsity[tensor.name], step=current_step(trainer), why=why)
            self.masks.write(tensor.name, scored.dense)
        if new:
            self.order.commit(name)
        self._steps = StraightThrough([(t, begun[t.name]) for t in self.masks], self._choose, self.score_lr)
        if self._saved_steps is not None and not new:
            self._steps.scores.load_state_dict(self._saved_steps)
        self._saved_steps = None
        self.order.freeze(trainer)
        self._steps.attach(*trainer.optimizers)

    def _begin(self, tensor: MaskedTensor, new: bool, task: int) -> Scored:
        weight, known = tensor.target.parameter.detach(), self._scored.get(tensor.name)
        frozen = torch.full_like(weight, self.weights == "fixed", dtype=torch.bool)
        for bits in self.task_masks[tensor.name]:
            frozen |= unpack_bits(bits, tensor.target.shape).to(weight.device)
        if known is not None and (self.weights == "winning" or not new):
            scores = known.scores.detach()
        elif self._sparsity is None:
            scores = torch.full(tensor.target.shape, 2 * self.threshold)
        else:
            scores = initial_scores(tensor.target.shape, (self.resume.seed, task, tensor.name))
        return Scored.begin((weight if known is None else known.dense).to(weight), scores, frozen)

    def _choose(self, tensor: MaskedTensor, scored: Scored) -> tuple[Tensor, Fraction]:
        view = tensor.target.layout.view
        try:
            mask, sparsity = chosen(view(scored.scores.detach()), tensor.pattern, self._sparsity, self.threshold)
        except DivergedError as error:
            raise DivergedError(f"{tensor.name}: {error}") from error
        return view(mask).contiguous(), sparsity

    def finish(self, trainer: Trainer) -> None:
        """Keep the mask of the task."""
        assert self._steps is not None
        self._steps.detach()
        for name, scored in self._scored.items():
            self.task_masks[name] = [*self.task_masks[name], pack_bits(scored.mask)]

    # -- serving ----------------------------------------------------------------------------------------------------------

    def weights_of(self, tensor: MaskedTensor, task: int) -> Tensor:
        """The weights of now under the mask of the task: those in it have not moved since."""
        dense = self._scored[tensor.name].dense
        mask = unpack_bits(self.task_masks[tensor.name][task - 1], tensor.target.shape).to(dense.device)
        return torch.where(mask, dense, 0.0)

    def facts(self) -> dict[str, Any]:
        """How many weights each task uses, how many any task uses, and how many numbers the network keeps in all."""
        used = dict.fromkeys(self.order.names[: self.order.ended], 0)
        union = total = 0
        for tensor in self.masks:
            masks = [unpack_bits(bits, tensor.target.shape) for bits in self.task_masks[tensor.name]]
            for name, mask in zip(used, masks, strict=True):
                used[name] += int(mask.sum())
            union += int(torch.stack(masks).any(0).sum()) if masks else 0
            total += tensor.target.parameter.numel()
        return {
            "used": used,
            "used by any": union,
            "numbers": total + self.order.rest.weights(),
            "mask bits": len(used) * total,
        }

    # -- remembering ------------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """The dense weights, the scores and their optimizer, the masks of the tasks."""
        return {
            "dense": {name: scored.dense for name, scored in self._scored.items()},
            "scores": {name: scored.scores.detach().clone() for name, scored in self._scored.items()},
            "steps": None if self._steps is None else self._steps.state_dict(),
            "masks": dict(self.task_masks),
            **super().method_state(),
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.task_masks = dict(state["masks"])
        self._scored = {}
        for name, dense in state["dense"].items():
            mask = torch.ones_like(dense, dtype=torch.bool)
            self._scored[name] = Scored.begin(dense, state["scores"][name], mask)
        self._saved_steps = state["steps"]
        super().load_method_state(state)
