"""Dynamic sparse training: sparse from the first step on, and the masks move: the weakest connections die, others grow.

When to use it: to train sparse without a dense phase, or, with ``granet``, to let gradual pruning take back what it pruned too
early. It needs longer runs than dense training to reach the same accuracy.

What it does: starts from random masks (``allocation``), or from the masks that are there. Every ``update.every`` steps a
fraction ``f_t = fraction / 2 * (1 + cos(pi t / end))`` of each tensor's connections, those of lowest ``|w|``, is dropped, and
as many grow where the ``rule`` says (RigL, Evci et al. 2020, arXiv 1911.11134, sec. 3). A connection that is dropped and chosen
again in one update goes on as it was; new ones start at 0 with cleared optimizer memory. The rules:

* ``set``: at random, a function of (seed, tensor, step) (Mocanu et al. 2018, arXiv 1707.04780);
* ``rigl``: at the largest gradient ``|dL/dw|``;
* ``granet``: magnitude pruning along a cubic schedule, by one threshold over all tensors (in each tensor with ``allocation``
  "uniform"), and after each pruning drop and grow as ``rigl`` does (Liu et al. 2021, arXiv 2106.10404). The start is dense, or
  at ``schedule.initial``;
* ``sparse_momentum``: at the largest running mean of gradients; of all that was dropped each tensor regrows a share in
  proportion to the mean of that over its alive weights (Dettmers and Zettlemoyer 2019, arXiv 1907.04840, sec. 3). It remembers
  one dense tensor for each target.

RigL's code lets an update take the place of an optimizer step; here the step is taken, then the masks move. The codes of
GraNet and sparse momentum miss counts by rounding; here every count is exact.

Knobs: ``sparsity``; ``update.every`` (100 to 4000 steps; longer explores more reliably), ``update.fraction``, ``update.end``
(leave a quarter of the run to settle); ``allocation: erk`` is better than ``uniform`` at high sparsity, and computes more.

Combines with: any optimizer, LR schedule, accumulation, clipping, AMP (gradients are compared within a tensor, where their
scale does not matter; a step with infinite ones puts the update off), EMA, DDP. With blocks and slices whole units move, with
N:M weights inside their groups. Models sharded over ranks are refused.

How it fails: a learning rate that has decayed before ``end`` cannot train what grows last; in a run of few updates the masks
hardly move. Masks that never moved are told at the end.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.callbacks import growth_rules as rules
from sparsetrain.callbacks.base import SparsityCallback, current_step
from sparsetrain.callbacks.clock import clock_of
from sparsetrain.callbacks.dense_gradient import DenseGradients
from sparsetrain.errors import PatternError, RecipeError, nearest
from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.masks.sharding import local
from sparsetrain.masks.verification import warn_of_zeros
from sparsetrain.patterns import Pattern, Sparsity, exact, parse_pattern
from sparsetrain.pruning import prune
from sparsetrain.regrowth import annealed
from sparsetrain.schedules import Clock, Cubic, Curve, Gradual, Schedule
from sparsetrain.targets import Targets


class DynamicSparse(SparsityCallback):
    """Train sparse from the start with masks that move.

    Args:
        sparsity: fraction of zeros over the targets, in (0, 1); may be left out where the pattern has only one, and for masks
            that are already there (``init_from``, a second fit), which then keep theirs.
        rule: ``"set"``, ``"rigl"``, ``"granet"`` or ``"sparse_momentum"``: where connections grow.
        pattern: ``"unstructured"`` for every rule; N:M for ``set`` and ``rigl``; others for all but ``sparse_momentum``.
        allocation: how the start spreads the sparsity over tensors: ``"erk"`` (the default) or ``"uniform"``. N:M needs none.
        update: when masks move, and how much; each rule has settings of its own.
        schedule: the sparsity over time, for ``granet`` alone; by default cubic from step 0 to ``update.end``.
        targets: which tensors; see `Targets`.
        seed: of the first masks and of random growth.

    Raises `RecipeError`, `PatternError` or `TargetError` for what cannot work, here or when it is set up on a model.

    Example: ``Trainer(callbacks=[DynamicSparse(sparsity=0.9, rule="rigl", update=Update(every="200st"))])``.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        rule: str = "rigl",
        pattern: Pattern | str = "unstructured",
        allocation: str | None = None,
        update: rules.Update | None = None,
        schedule: Schedule | None = None,
        targets: Targets | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if rule not in rules.RULES:
            raise RecipeError(f"rule {rule!r} is unknown; known are {', '.join(rules.RULES)}.{nearest(str(rule), rules.RULES)}")
        if allocation not in (None, "erk", "uniform"):
            raise RecipeError(f"allocation {allocation!r} cannot start a sparse run; use 'erk' or 'uniform'")
        if schedule is not None and (rule != "granet" or not isinstance(schedule, Schedule)):
            raise RecipeError(f"rule {rule!r} cannot follow schedule {schedule!r}; only 'granet' follows one, such as Cubic()")
        self.rule, self.seed, self.targets = rule, seed, targets or Targets()
        self.pattern = parse_pattern(pattern)
        self.sparsity = None if sparsity is None else float(exact(sparsity))
        if self.sparsity == 0 or (sparsity is None and rule == "granet"):
            raise RecipeError(
                f"sparsity {sparsity} with rule {rule!r}: nothing would be sparse; give one in (0, 1), such as 0.9"
            )
        self._allocation = allocation
        self.update = update or rules.RULES[rule]
        self.schedule = schedule or Cubic(start="0st", end=self.update.end, every=self.update.every)
        rules.refuse(rule, self.pattern, allocation)
        self._planned: tuple[MaskManager, dict[str, Fraction]] | None = None
        self._updates: list[int] = []
        self._end = 0
        self._curve: Curve | None = None
        self._done = self._pruned = 0
        self._moved: dict[str, int] = {}
        self._means: dict[str, Tensor] = {}
        self._gradients = DenseGradients()

    # -- building ---------------------------------------------------------------------------------------------------------

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager for the targets and the pattern."""
        return MaskManager(model, self.targets, self.pattern)

    @property
    def pooled(self) -> bool:  # type: ignore[override]
        """Tensors take from each other under ``sparse_momentum``, and under the one threshold of ``granet``."""
        return rules.is_pooled(self.rule, self._allocation)

    def validate(self) -> None:
        """Every tensor can have the pattern at its sparsity, and the rule can move it."""
        for tensor in self.masks:
            rules.refuse(self.rule, tensor.pattern, self._allocation, f"{tensor.name}: ")
            if tensor.goal is not None and self.rule in ("granet", "sparse_momentum"):
                raise RecipeError(
                    f"{tensor.name}: rule {self.rule!r} knows no sparsity of single tensors; drop its override, or use 'rigl'"
                )
        for tensor in self.masks:
            if tensor.name in self._plan and not self.pooled:
                try:
                    tensor.pattern.validate(tensor.target.view_shape, self._plan[tensor.name])
                except PatternError as error:
                    raise PatternError(f"{tensor.name}: {error}") from error

    def final(self, tensor: MaskedTensor) -> Sparsity | None:
        """What the allocation gives it; None where masks that are there keep their sparsity."""
        return self._plan.get(tensor.name)

    @property
    def _plan(self) -> dict[str, Fraction]:
        """The final sparsity of each tensor that has one, worked out once for a manager."""
        if self._planned is None or self._planned[0] is not self.masks:
            self._planned = self.masks, rules.spread(self.masks, self.sparsity, self.pooled or self._allocation == "uniform")
        return self._planned[1]

    def curves(self, clock: Clock) -> dict[float, Curve]:
        """The schedule of ``granet``; others are sparse from step 0 on. Raises `RecipeError` if masks would never move."""
        self.update.steps(clock)
        goals = {float(goal) for goal in self._plan.values() if goal}
        if self.rule != "granet":
            return {goal: Curve(((0, goal),)) for goal in goals}
        points = {0: self._initial} if self._initial else {}
        return {goal: Curve(tuple((points | dict(self.schedule.resolve(goal, clock).points)).items())) for goal in goals}

    @property
    def _initial(self) -> float:
        return self.schedule.initial if isinstance(self.schedule, Gradual) else 0.0

    # -- running ----------------------------------------------------------------------------------------------------------

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Resolve the updates against this run; begin with random masks, unless there are masks."""
        if any(local(t.target.parameter) is not t.target.parameter for t in self.masks):
            raise RecipeError("DynamicSparse does not move masks of a model sharded over ranks; use DDP, or PruneFinetune")
        clock = clock_of(trainer)
        self._updates, self._end = self.update.steps(clock)
        self._curve = self.curves(clock)[self.sparsity] if self.rule == "granet" and self.sparsity else None
        self._gradients.stop(self.masks)
        if not resumed:
            step = current_step(trainer)
            self._done, self._pruned, self._moved, self._means = bisect_right(self._updates, step), 0, {}, {}
            self._start(step)

    def _start(self, step: int) -> None:
        plan = self._plan if self.rule != "granet" else rules.spread(self.masks, self._initial, self._allocation == "uniform")
        if self.masks.masks:
            if self.rule != "granet" and self.sparsity is not None:
                rules.require_budget(self.masks, plan)
            return
        unsaid = [t.name for t in self.masks if t.name not in plan]
        if unsaid or (self.rule != "granet" and not any(plan.values())):
            raise PatternError(f"how sparse? Nothing says so for {unsaid[:3] or 'any tensor'}; give a sparsity, such as 0.9")
        if any(plan.values()):
            warn_of_zeros(self.masks, "random masks replace them")
        for tensor in self.masks:
            if plan[tensor.name]:
                scores = tensor.target.layout.view(rules.random_growth(tensor, f"{self.seed}/{tensor.name}/start"))
                self.masks.update(tensor.name, plan[tensor.name], scores, step=step, why="start")

    def _listens(self, step: int) -> bool:
        """Whether the gradient of this optimizer step is needed."""
        return self.rule == "sparse_momentum" or (self.rule != "set" and bisect_right(self._updates, step) > self._done)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to the gradients of the step before an update."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._listens(current_step(trainer) + 1):
            self._gradients.listen(trainer, self.masks)
            if not pl_module.automatic_optimization:
                self._gradients.restart()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """A new step begins."""
        self._gradients.restart()

    def on_step(self, trainer: Trainer, step: int) -> None:
        """Follow the schedule, then drop and grow, where due; without finite gradients an update waits for the next step."""
        if self.rule == "sparse_momentum":
            self._gradients.remember(trainer, self.masks, self._means, self.update.momentum)
        due = bisect_right(self._updates, step)
        growth = self._growth(trainer, step) if due > self._done else None
        self._follow_schedule(step)
        if growth:
            moved = rules.move(self.masks, self.rule, growth, annealed(self.update.fraction, step, self._end), step)
            self._moved = {t.name: self._moved.get(t.name, 0) + moved.get(t.name, 0) for t in self.masks}
            self._done = due
        elif growth is not None and due > self._done + 1:
            raise RecipeError(
                f"no target had a gradient for pruned weights from step {self._updates[self._done]} to {step}: rule "
                f"{self.rule!r} has nothing to grow by. Train them (requires_grad), let backward "
                "write their gradients, or use rule 'set'"
            )
        if not self._listens(step + 1):
            self._gradients.stop(self.masks)

    def _growth(self, trainer: Trainer, step: int) -> dict[str, Tensor] | None:
        """Growth scores ``(out, in, *kernel)`` of the tensors that have any; None if a gradient is not finite."""
        scores: dict[str, Tensor] = {}
        for tensor in self.masks:
            if self.rule == "set":
                scores[tensor.name] = rules.random_growth(tensor, f"{self.seed}/{tensor.name}/{step}")
                continue
            gradient = self._means.get(tensor.name) if self.rule == "sparse_momentum" else self._gradients.take(trainer, tensor)
            if gradient is None:
                continue
            if not bool(gradient.isfinite().all()):
                return None
            dead = gradient if tensor.mask is None else gradient.masked_fill(tensor.mask, 0.0)
            if bool(dead.any()):
                scores[tensor.name] = tensor.target.layout.view(gradient.abs())
        return scores

    def _follow_schedule(self, step: int) -> None:
        points = self._curve.points if self._curve is not None else ()
        due = sum(at <= step for at, _ in points)
        if self._curve is None or due <= self._pruned:
            return
        self._pruned, now = due, exact(self._curve.at(step))
        counts = self.masks.counts().values()
        # Never regrow: masks that are sparser wait until the schedule has caught up.
        if sum(dead for dead, _ in counts) < math.floor(now * sum(numel for _, numel in counts)):
            own = {} if self.pooled else {t.name: now for t in self.masks}
            spread = "global" if self.pooled else "uniform"
            prune(self.masks, now, allocation=spread, own=own, regrow=False, step=step, why="granet: prune")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening."""
        self._gradients.stop(self.masks)

    # -- remembering ------------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """Updates done, connections moved, running means of gradients."""
        means = {name: mean.clone() for name, mean in self._means.items()}
        return {"done": self._done, "pruned": self._pruned, "moved": dict(self._moved), "momentum": means}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._done, self._pruned, self._moved = state["done"], state["pruned"], dict(state["moved"])
        self._means = {n: mean.to(self.masks[n].target.parameter.device, copy=True) for n, mean in state["momentum"].items()}

    def facts(self) -> dict[str, Any]:
        """How many updates there were, and how many connections they moved."""
        return {"updates": self._done, "moved": sum(self._moved.values())}

    def shortfall(self) -> str | None:
        """Training ended early, or masks that should have moved never did."""
        if not self._updates:
            return f"training never began: the masks are at sparsity {self.masks.sparsity():.4f}"
        changes = len(self._curve.points) if self._curve is not None else 0
        if self._done < len(self._updates) or self._pruned < changes:
            done = f"training ended after {self._done} of {len(self._updates)} updates of the masks"
            return f"{done}, at sparsity {self.masks.sparsity():.4f}; train longer, or let update.end come earlier"
        still = [t.name for t in self.masks if t.mask is not None and not self._moved.get(t.name)]
        if still and self._moved:
            return (
                f"the masks of {', '.join(still[:4])} never moved in {self._done} updates: update.fraction of their weights "
                "is less than one, or they have no gradient; raise update.fraction, or leave them out (targets.exclude)"
            )
        return None
