"""What the rounds of a lottery-ticket run are made of: how long, how much, when a ticket is lost, what it is compared with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal

from lightning.pytorch import Trainer

from sparsetrain.callbacks.files import written
from sparsetrain.callbacks.rewinding import Rewind, check_another
from sparsetrain.criteria.random import random_scores
from sparsetrain.errors import MaskStateError, RecipeError, nearest
from sparsetrain.masks import MaskedTensor, MaskManager, read_masks, save_masks
from sparsetrain.masks.state import SavedMask, check_names
from sparsetrain.patterns import exact
from sparsetrain.schedules import Clock
from sparsetrain.targets import Targets, compile_regex


@dataclass(frozen=True)
class TicketRounds:
    """``count`` rounds after a dense one, each training for ``every``; before each, ``prune_rate`` of the survivors go.

    After round r the sparsity is ``1 - (1 - prune_rate)^r`` (Frankle and Carbin 2019, arXiv 1803.03635).

    Args:
        count: rounds of pruning, at least 1; the run has one more, the dense round 0.
        every: how long a round trains: ``20ep``, ``5000st``.
        prune_rate: share of the survivors a round removes, in (0, 1).
        output_rate: that of the output layer where it is a target; by default half, as in the paper.
        rates: another rate by regular expression of names, the first that matches wins; 0 leaves a tensor dense.

    Raises `RecipeError` for a value out of range. Example: ``TicketRounds(count=15, every="20ep", rates={"conv": 0.1})``.
    """

    count: int = 15
    every: str = "10ep"
    prune_rate: float = 0.2
    output_rate: float | None = None
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RecipeError(f"rounds.count {self.count}: at least 1 round of pruning follows the dense one")
        if not 0 < self.prune_rate < 1:
            raise RecipeError(f"rounds.prune_rate {self.prune_rate} is outside (0, 1): the share of survivors a round removes")
        named = {"output_rate": 0.0 if self.output_rate is None else self.output_rate} | self.rates
        for name, rate in named.items():
            if not 0 <= rate < 1:
                raise RecipeError(
                    f"rounds: the rate of {name!r} is {rate}, outside [0, 1): the share of survivors a round removes"
                )
        for regex in self.rates:
            compile_regex(regex, "rounds.rates")

    def timetable(self, rewind: Rewind, clock: Clock) -> Timetable:
        """The rounds in steps. Raises `RecipeError` if they do not fit the run, or cannot be rewound as asked."""
        every, per_epoch = clock.steps(self.every), clock.steps_per_epoch
        back = 0 if rewind.file else Clock(every, per_epoch).steps(rewind.to)
        if not 0 <= back < every:
            raise RecipeError(
                f"a round of {every} steps cannot rewind to its step {back}; shorten rewind.to or lengthen rounds.every"
            )
        if rewind.rng and (per_epoch is None or every % per_epoch or back % per_epoch):
            raise RecipeError(
                f"rewind.rng: rounds of {every} steps rewound to step {back} are no whole epochs (of {per_epoch} steps), and "
                "the order of an epoch cannot be entered in the middle; write rounds.every and rewind.to in ep, or set "
                "rewind.rng to false"
            )
        table = Timetable(every, back, per_epoch)
        needed = table.end(self.count)
        if clock.total_steps is not None and clock.total_steps < needed:
            raise RecipeError(
                f"{self.count} rounds after a dense one take {needed} steps ({every}, then {every - back} each), the run has "
                f"{clock.total_steps}: raise trainer.max_epochs, or lower rounds.count or rounds.every"
            )
        return table

    def of(self, manager: MaskManager) -> dict[str, Fraction]:
        """The rate of every target. Raises `RecipeError` for a regular expression that matches none."""
        names = [name for tensor in manager for name in (tensor.name, *tensor.target.aliases)]
        for regex in self.rates:
            if not any(compile_regex(regex, "rounds.rates").search(name) for name in names):
                raise RecipeError(f"rounds.rates {regex!r} matches no target ({', '.join(names[:4])}).{nearest(regex, names)}")
        heads = Targets(embeddings=True).match(manager.model).skipped
        half = exact(self.prune_rate) / 2 if self.output_rate is None else exact(self.output_rate)
        found = {}
        for tensor in manager:
            matching = (rate for regex, rate in self.rates.items() if _matches(regex, tensor))
            usual = half if "output head" in heads.get(tensor.name, "") else exact(self.prune_rate)
            own = next(matching, None)
            found[tensor.name] = usual if own is None else exact(own)
        return found


def _matches(regex: str, tensor: MaskedTensor) -> bool:
    return any(compile_regex(regex, "rounds.rates").search(name) for name in (tensor.name, *tensor.target.aliases))


@dataclass(frozen=True)
class Timetable:
    """Rounds in optimizer steps: round 0 takes ``every``, each further one starts at its step ``back`` and ends at ``every``.

    Example: ``Timetable(every=100, back=20, per_epoch=10).end(2)`` is 260.
    """

    every: int
    back: int
    per_epoch: int | None

    def end(self, number: int) -> int:
        """The step at which a round ends, and the next one begins."""
        return self.every + number * (self.every - self.back)

    def inside(self, step: int, number: int) -> int:
        """A step of the run as a step of a round."""
        return step - number * (self.every - self.back)

    def check_end(self, trainer: Trainer, count: int) -> None:
        """Raise `RecipeError` if the run may not stop after its last round: the final weights would be of none."""
        epochs, steps = trainer.fit_loop.min_epochs or 0, trainer.fit_loop.epoch_loop.min_steps or 0
        if max(epochs * (self.per_epoch or 1), steps) > self.end(count):
            raise RecipeError(
                f"the last of {count} rounds ends after {self.end(count)} steps, and trainer.min_epochs or min_steps let the "
                "run go on; drop them"
            )

    def epoch(self, epoch: int) -> int:
        """The epoch of round 0 whose data an epoch of the run repeats; needs rounds of whole epochs."""
        every, back = self.every // (self.per_epoch or 1), self.back // (self.per_epoch or 1)
        return epoch if epoch < every else back + (epoch - every) % (every - back)


@dataclass(frozen=True)
class Lost:
    """Stop once the ticket is lost: ``patience`` rounds in a row end worse than round 0 by more than ``tolerance``.

    The run then ends with the weights and masks of the last round that was not worse.

    Raises `RecipeError` for a value out of range. Example: ``Lost(monitor="val/loss", mode="min", tolerance=0.02)``.
    """

    monitor: str = "val/accuracy"
    mode: Literal["max", "min"] = "max"
    tolerance: float = 0.005
    patience: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise RecipeError(f"lost.mode {self.mode!r} is unknown; use 'max' or 'min'")
        if self.patience < 1 or not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise RecipeError(
                f"lost needs patience of at least 1 and a tolerance of 0 or more, not {self.patience} and {self.tolerance}"
            )

    def check(self, trainer: Trainer) -> None:
        """Raise `RecipeError` if a run cannot be judged, or not be stopped."""
        if not trainer.enable_validation:
            raise RecipeError("lost compares validations with those of round 0, and there are none; give validation data")
        if trainer.fit_loop.min_epochs or trainer.fit_loop.epoch_loop.min_steps:
            raise RecipeError("lost stops early, and trainer.min_epochs or min_steps forbid it; drop them")

    def value(self, metrics: Mapping[str, float]) -> float:
        """The monitored value, turned so that more is better; raises `RecipeError` if the round did not log it."""
        if self.monitor not in metrics:
            raise RecipeError(
                f"lost.monitor {self.monitor!r} is not among what the round's validations logged "
                f"({', '.join(metrics) or 'nothing'}).{nearest(self.monitor, metrics)}"
            )
        return metrics[self.monitor] * (1 if self.mode == "max" else -1)


@dataclass(frozen=True)
class Control:
    """What a ticket is compared with: the masks of a finished ticket run with other weights, or its weights with other masks.

    ``kind`` ``"reinit"``: each round's masks are the ticket's, and the weights are initialized anew under ``seed``, the same in
    every round. ``"random"``: as many weights of each tensor stay, at random places drawn from ``seed`` and the round, and the
    weights are rewound. ``tickets`` is the directory of the finished run; ``rounds`` are those of its rounds to compare with,
    by default all (``(3, 7, 11)`` with ``TicketRounds(count=3)`` saves the others' time).

    Raises `RecipeError` for an unknown kind or a directory without tickets. Example: ``Control("reinit", "runs/a", seed=1)``.
    """

    kind: Literal["reinit", "random"]
    tickets: str
    seed: int = 0
    rounds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("reinit", "random"):
            raise RecipeError(f"control {self.kind!r} is unknown; use 'reinit' or 'random'")
        object.__setattr__(self, "rounds", tuple(self.rounds))
        if list(self.rounds) != sorted(set(self.rounds)) or min(self.rounds, default=1) < 1:
            raise RecipeError(f"control.rounds {list(self.rounds)}: rounds of the ticket run from 1 on, in ascending order")
        if not ticket_file(Path(self.tickets), 1).is_file():
            raise RecipeError(
                f"control.tickets {self.tickets!r} is no ticket run: it has no {ticket_file(Path(), 1)}. Give the directory of "
                "a finished LotteryTickets run"
            )

    def check_run(self, rewind: Rewind, count: int) -> None:
        """Raise `RecipeError` for another number of rounds, or weights both initialized anew and rewound to a later step."""
        if self.rounds and len(self.rounds) != count:
            raise RecipeError(f"control.rounds names {len(self.rounds)} rounds, rounds.count is {count}; make them equal")
        if self.kind == "reinit" and (rewind.file or re.match(r"\s*0+(\.0+)?\s*(ep|st|%|)\s*$", rewind.to) is None):
            raise RecipeError(f"control 'reinit' starts anew, and cannot rewind to {rewind.to!r}; set rewind.to to 0st")

    def check(self, trainer: Trainer) -> None:
        """Raise `RecipeError` if a run would write over the tickets it reads, or initialize just as they were."""
        if Path(self.tickets).resolve() == Path(trainer.default_root_dir).resolve():
            raise RecipeError(f"control.tickets {self.tickets!r} is where this run writes its own; choose another --out")
        if self.kind == "reinit":
            check_another(trainer.lightning_module, self.seed)

    def masks(self, number: int, manager: MaskManager) -> dict[str, SavedMask]:
        """A round's masks in the ticket run. Raises `RecipeError` for a missing round, `MaskStateError` for another model's."""
        origin = self.rounds[number - 1] if self.rounds else number
        path = ticket_file(Path(self.tickets), origin)
        if not path.is_file():
            raise RecipeError(f"control.tickets {self.tickets!r} has no round {origin} ({path.name}); lower rounds.count")
        saved = _read(path, path.stat().st_mtime_ns)
        check_names(saved, {tensor.name: tensor.target.shape for tensor in manager}, str(path))
        for tensor in manager:
            if saved[tensor.name].pattern != str(tensor.pattern):
                raise MaskStateError(
                    f"{path}: the mask of {tensor.name!r} is {saved[tensor.name].pattern}, here the pattern is {tensor.pattern}"
                )
        return saved

    def install(self, number: int, manager: MaskManager, step: int) -> None:
        """Make a round's masks those of the ticket, or random ones with the same counts."""
        saved, why = self.masks(number, manager), f"round {number}, control {self.kind}"
        for tensor in list(manager):
            entry = saved[tensor.name]
            if not entry.sparsity:
                continue
            if self.kind == "random":
                scores = random_scores(tensor.target.shape, f"{self.seed}/{tensor.name}/round {number}")
                manager.update(tensor.name, entry.sparsity, scores.to(tensor.target.parameter.device), step=step, why=why)
            else:
                mask = entry.unpack(tensor.name).to(tensor.target.parameter.device)
                manager.install(tensor.name, mask, entry.sparsity, step=step, why=why)


def ticket_file(run: Path, number: int) -> Path:
    """Where a run keeps a round's masks. Example: ``ticket_file(Path("a"), 3)`` is ``a/tickets/round_03.safetensors``."""
    return run / "tickets" / f"round_{number:02d}.safetensors"


@lru_cache(maxsize=32)  # every tensor of every round asks
def _read(path: Path, changed: int) -> dict[str, SavedMask]:
    return read_masks(path)


def save_ticket(run: Path, number: int, masks: Mapping[str, SavedMask]) -> None:
    """Write a round's masks whole or not at all. Raises `RecipeError` when the disk refuses."""
    with written(ticket_file(run, number)) as partial:
        save_masks(partial, masks)


def clear_tickets(run: Path) -> None:
    """Remove what an earlier run wrote to this directory: it may have had more rounds."""
    for stale in ticket_file(run, 0).parent.glob("round_*.safetensors"):
        stale.unlink()
