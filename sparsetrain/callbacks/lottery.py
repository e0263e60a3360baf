"""Lottery tickets: train, prune, rewind, train again, in one run.

When to use it: to find out how small a network can be that still trains to full accuracy from (nearly) the start, and to
study what pruning keeps. To only get a sparse network `PruneFinetune` costs a fraction of it.

What it does: round 0 trains dense for ``rounds.every``. Each further round removes ``prune_rate`` of the survivors by the
criterion, so that after round r the sparsity is ``1 - (1 - prune_rate)^r``, and rewinds what is left to where it was at step
``rewind.to`` of round 0: step 0 (Frankle and Carbin 2019, arXiv 1803.03635) or later (Frankle et al. 2020, arXiv 1912.05671,
which deeper networks need). A round that rewinds to step k trains from k to ``every``; the run ends with the last round.

A rewound round is, bit for bit, the run that a fresh trainer would make from the rewound weights, masks, optimizer memory,
learning-rate schedule and random streams. Each of them is a choice of `Rewind`; snapshots are copies.

Knobs: ``rounds`` (`TicketRounds`), ``rewind`` (`Rewind`), ``allocation`` (``global`` for deep networks, as in the paper),
``lost`` (`Lost`: stop when a round ends worse than the dense one), ``control`` (`Control`: the paper's comparisons, from a
finished run). The masks of each round are in ``tickets/round_NN.safetensors`` of ``default_root_dir``.

Combines with: any optimizer, LR schedule, AMP, accumulation, clipping, DDP. Not with averages of the weights (EMA, SWA), which
would mix rounds, nor with FSDP2.

How it fails: a schedule that decays over the whole run instead of a round trains every round otherwise (a warning says so);
with a high learning rate deep networks have no ticket at step 0: rewind later or warm up; ``rng`` needs ``every`` and ``to`` in
whole epochs, since an epoch's order cannot be entered in the middle.
"""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from sparsetrain.allocation import Allocation, get_allocation
from sparsetrain.calibration import known
from sparsetrain.callbacks import rewinding
from sparsetrain.callbacks.base import SparsityCallback, current_step
from sparsetrain.callbacks.clock import clock_of
from sparsetrain.callbacks.rewinding import Rewind
from sparsetrain.callbacks.ticket_record import Record
from sparsetrain.callbacks.tickets import Control, Lost, TicketRounds, Timetable, clear_tickets, save_ticket
from sparsetrain.criteria import Criterion, get_criterion
from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.patterns import Pattern, Sparsity, exact, parse_pattern
from sparsetrain.pruning import prune
from sparsetrain.schedules import Clock, Curve
from sparsetrain.targets import Targets

_REMEMBERED = ("round", "began", "first_epoch", "due", "closed", "over", "snapshot", "initial")


class LotteryTickets(SparsityCallback):
    """Find winning tickets by iterative pruning with rewinding.

    Args:
        rounds: how many, how long, and how much each removes.
        rewind: what goes back to where.
        allocation: ``"uniform"`` (each tensor loses its rate) or a pooled one such as ``"global"``; tensors with another rate
            (the output layer, ``rounds.rates``) stay out of the pool.
        criterion: what scores a weight at the end of a round, from the weights alone.
        pattern: any that can have any sparsity: ``"unstructured"``, ``"neurons"``, ``"block:4x4"`` ...
        targets: which tensors; see `Targets` (``head=True`` for the paper's fully connected networks).
        lost: stop early.
        control: take the masks, or their counts, from a finished run.

    The trainer needs ``every + count * (every - to)`` steps: ``max_epochs=(count + 1) * epochs_per_round`` is always enough.
    Raises `RecipeError`, `PatternError` or `TargetError` for what cannot work.

    Example: ``Trainer(max_epochs=160, callbacks=[LotteryTickets(TicketRounds(count=15, every="10ep"))])``.
    """

    def __init__(
        self,
        rounds: TicketRounds | None = None,
        rewind: Rewind | None = None,
        allocation: Allocation | str = "uniform",
        criterion: Criterion | str = "magnitude",
        pattern: Pattern | str = "unstructured",
        targets: Targets | None = None,
        lost: Lost | None = None,
        control: Control | None = None,
    ) -> None:
        super().__init__()
        self.rounds, self.rewind = rounds or TicketRounds(), rewind or Rewind()
        self.allocation, self.criterion = get_allocation(allocation), get_criterion(criterion)
        self.pattern = parse_pattern(pattern)
        self.targets, self.lost, self.control = targets or Targets(), lost, control
        if self.pattern.sparsity is not None:
            raise PatternError(f"pattern {self.pattern} has one sparsity and cannot follow rounds; take unstructured")
        if self.criterion.source != "weights":
            raise RecipeError(f"criterion {type(self.criterion).__name__} needs data; tickets need one of weights: magnitude")
        if control is not None:
            control.check_run(self.rewind, self.rounds.count)
        self._table = Timetable(1, 0, None)
        self._rates: dict[str, Fraction] | None = None
        self._forget()

    def _forget(self) -> None:
        self._round, self._began, self._first_epoch = 0, 0, 0
        self._due = self._closed = self._over = False
        self._snapshot: dict[str, Any] | None = None
        self._record = Record()
        self._initial: dict[str, int] = {}

    # -- building ---------------------------------------------------------------------------------------------------------

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager for the targets, still dense."""
        self._rates = None
        return MaskManager(model, self.targets, self.pattern)

    def validate(self) -> None:
        """Every target can lose what is asked of it, and the control's tickets, or the file, are of this model."""
        self._rates = None
        if not any(self.rates.values()):
            raise RecipeError("every target has rate 0: nothing would be pruned; raise rounds.rates")
        for tensor in self.masks:
            if self._in_pool(tensor):
                self.allocation.check(tensor.pattern, tensor.name)
                continue
            try:
                tensor.pattern.validate(tensor.target.view_shape, self.final(tensor))
            except PatternError as error:
                raise PatternError(f"{tensor.name}: {error}") from error
        self.criterion.prepare(self.masks.model, [known(tensor) for tensor in self.masks])
        if self.rewind.file is not None:
            rewinding.read_file(self.rewind, self.masks.model)
        if self.control is not None:
            for number in range(1, self.rounds.count + 1):
                self.control.masks(number, self.masks)
            if self.control.kind == "reinit":
                rewinding.check_resettable(self.masks.model)

    @property
    def rates(self) -> dict[str, Fraction]:
        """The share of its survivors each target loses in a round."""
        self._rates = self._rates or self.rounds.of(self.masks)
        return self._rates

    @property
    def pooled(self) -> bool:  # type: ignore[override]
        """The targets without a rate of their own share one budget."""
        return self.control is None and self.allocation.pooled

    def _in_pool(self, tensor: MaskedTensor) -> bool:
        return self.control is None and self.pooled and self.rates[tensor.name] == exact(self.rounds.prune_rate)

    def _goal(self, tensor: MaskedTensor, number: int) -> Fraction:
        """The sparsity of a tensor, or of its pool, in a round: exact, however often it is rounded down to weights."""
        if self.control is not None:
            return self.control.masks(number, self.masks)[tensor.name].sparsity
        pool = [t for t in self.masks if self._in_pool(t)] if self._in_pool(tensor) else [tensor]
        dead, numel = sum(self._initial.get(t.name, 0) for t in pool), sum(math.prod(t.target.shape) for t in pool)
        return 1 - (1 - Fraction(dead, numel)) * (1 - self.rates[tensor.name]) ** number

    def final(self, tensor: MaskedTensor) -> Sparsity:
        """The sparsity after the last round."""
        return self._goal(tensor, self.rounds.count)

    def curves(self, clock: Clock) -> dict[float, Curve]:
        """The sparsity of each final goal at the start of every round; raises `RecipeError` if the rounds do not fit."""
        table, numbers = self.rounds.timetable(self.rewind, clock), range(1, self.rounds.count + 1)
        found = {}
        for tensor in self.masks:
            if final := float(self.final(tensor)):
                found[final] = Curve(tuple((table.end(n - 1), float(self._goal(tensor, n))) for n in numbers))
        return found

    # -- running ----------------------------------------------------------------------------------------------------------

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Work out the rounds against this run, and refuse what would make them unequal."""
        rewinding.check(trainer, self.rewind)
        if self.lost is not None:
            self.lost.check(trainer)
        if self.control is not None:
            self.control.check(trainer)
        if not resumed:
            self._forget()
            self._began, self._first_epoch = current_step(trainer), trainer.current_epoch
            self._initial = {name: dead for name, (dead, _) in self.masks.counts().items()}
            if trainer.is_global_zero:
                clear_tickets(Path(trainer.default_root_dir))
        clock = clock_of(trainer)
        clock = Clock(None if clock.total_steps is None else clock.total_steps - self._began, clock.steps_per_epoch)
        self._table = self.rounds.timetable(self.rewind, clock)
        self._table.check_end(trainer, self.rounds.count)
        if self.rewind.schedule and (name := rewinding.outlasting(trainer, self._table.every, clock)):
            warnings.warn(
                f"the learning-rate schedule ({name}) is longer than a round of {self._table.every} steps: every round sees "
                "its first part only. Give it the length of a round, or set rewind.schedule to false",
                stacklevel=2,
            )
        if self.rewind.rng:
            rewinding.tell_epochs(trainer, lambda e: self._first_epoch + self._table.epoch(e - self._first_epoch))
        if self._over:
            trainer.should_stop = True

    def on_step(self, trainer: Trainer, step: int) -> None:
        """Is the round over?"""
        self._due = not self._over and step - self._began >= self._table.end(self._round)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A round that is over ends now, or with the validation that follows."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._due and not self._validation_due:
            self._close(trainer)

    def on_validated(self, trainer: Trainer) -> None:
        """Note the metrics; end the round if it is over."""
        if self._over:
            return
        self._record.note(trainer.callback_metrics, self._table.inside(current_step(trainer) - self._began, self._round))
        if self._due:
            self._close(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next round begins before the epoch's iterator is made."""
        self._go_on(trainer)
        if self.rewind.rng:
            rewinding.begin_epoch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The next round begins inside an epoch; the snapshot is taken right before the batch after step ``rewind.to``."""
        self._go_on(trainer)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._snapshot is None and current_step(trainer) - self._began >= self._table.back:
            self._snapshot = rewinding.take(trainer, self.rewind, self.resume)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Samplers are told the run's own epochs again."""
        rewinding.tell_epochs(trainer, None)

    def _close(self, trainer: Trainer) -> None:
        """The round is over: write its row, and see whether its ticket is lost."""
        self._due, self._closed, record = False, True, self._record
        record.close(self._round, self._table.every - (self._table.back if self._round else 0), self.masks)
        if self.lost is not None:
            record.judge(self._round, self.lost, trainer, self.masks)
        gone = self.lost is not None and record.misses >= self.lost.patience
        if gone or self._round == self.rounds.count:
            self._over = trainer.should_stop = True
            if record.misses and record.winner is not None:
                why = f"round {self._round} lost the ticket: that of round {record.winner['round']} is back"
                record.restore_winner(trainer, self.masks, current_step(trainer), why)
                rank_zero_info(f"LotteryTickets: {why}")

    def _go_on(self, trainer: Trainer) -> None:
        """Begin the next round if the last one has ended."""
        if not self._closed or self._over:
            return
        assert self._snapshot is not None
        if self._round == 0 and self.before_first_change is not None:
            self.before_first_change(trainer)
        self._round, self._closed, step = self._round + 1, False, current_step(trainer)
        self._record.next_round()
        if self.control is not None:
            self.control.install(self._round, self.masks, step)
        else:
            own = {t.name: self._goal(t, self._round) for t in self.masks if not self._in_pool(t)}
            budget = next((self._goal(t, self._round) for t in self.masks if self._in_pool(t)), None)
            why = f"round {self._round} of {self.rounds.count}"
            prune(self.masks, budget, criterion=self.criterion, allocation=self.allocation, own=own, step=step, why=why)
        rewinding.put(self._snapshot, self.rewind, trainer, self.masks, self.resume)
        if self.control is not None and self.control.kind == "reinit":
            rewinding.reinitialize(trainer.lightning_module, self.control.seed)
            self.masks.enforce()
        saved = self.masks.saved()
        if trainer.is_global_zero:
            save_ticket(Path(trainer.default_root_dir), self._round, saved)
        self.log_sparsity(trainer)

    # -- remembering ------------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """Where in the rounds it is, what is rewound to, and what the rounds gave."""
        return {name: getattr(self, f"_{name}") for name in _REMEMBERED} | {"record": self._record.state()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in _REMEMBERED:
            setattr(self, f"_{name}", state[name])
        self._record = Record(**state["record"])

    def facts(self) -> dict[str, Any]:
        """``rounds``: for each its sparsity, weights kept, steps, metrics at its end and at its lowest validation loss."""
        winner = {} if self._record.winner is None else {"winner": self._record.winner["round"]}
        return {"rounds": list(self._record.rows), **winner}

    def shortfall(self) -> str | None:
        """Training stopped inside a round, or never began."""
        where = f"round {self._round} of {self.rounds.count}, at sparsity {self.masks.sparsity():.4f}"
        return None if self._over else f"training ended in {where}: train longer, or ask for fewer or shorter rounds"
