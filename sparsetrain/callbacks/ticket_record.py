"""What is written down of the rounds of a lottery-ticket run, and which round holds the last winning ticket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning.pytorch import Trainer

from sparsetrain.callbacks.rewinding import copied, write_weights
from sparsetrain.callbacks.tickets import Lost
from sparsetrain.masks import MaskManager
from sparsetrain.masks.state import from_state, to_state


@dataclass
class Record:
    """One row a round; of the round that is going on, the metrics of its last validation and of its lowest "val/loss".

    ``winner`` has the weights, buffers and masks at the end of the last round that was not lost, ``misses`` counts the rounds
    lost since. All of it is plain content that travels in a checkpoint.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] | None = None
    reference: float = 0.0
    misses: int = 0
    winner: dict[str, Any] | None = None

    def note(self, logged: Mapping[str, Any], step: int) -> None:
        """A validation at this step of the round; only validation and test metrics are kept."""
        self.end = {name: float(value) for name, value in logged.items() if name.startswith(("val/", "test/"))}
        loss = self.end.get("val/loss")
        if loss is not None and (self.best is None or loss < self.best["val/loss"]):
            self.best = {"step": step, **self.end}

    def close(self, number: int, steps: int, manager: MaskManager) -> None:
        """A round is over: its row."""
        counts = manager.counts().values()
        kept = sum(numel - dead for dead, numel in counts)
        sparsity = 1 - kept / sum(numel for _, numel in counts)
        row = {"round": number, "sparsity": sparsity, "kept": kept, "steps": steps, "end": self.end, "best": self.best}
        self.rows.append(row)

    def judge(self, number: int, lost: Lost, trainer: Trainer, manager: MaskManager) -> None:
        """Is the ticket lost? If not, it is the winner."""
        # One rank decides: ranks that disagree would stop apart from each other.
        value = float(trainer.strategy.broadcast(lost.value(self.end)))
        if number == 0:
            self.reference = value
        won = value >= self.reference - lost.tolerance  # NaN has not
        self.misses = 0 if won else self.misses + 1
        if won:
            module = trainer.lightning_module
            self.winner = {
                "round": number,
                "weights": copied(dict(module.named_parameters())),
                "buffers": copied(dict(module.named_buffers())),
                "masks": to_state(manager.saved()),
            }

    def restore_winner(self, trainer: Trainer, manager: MaskManager, step: int, why: str) -> None:
        """Weights, buffers and masks are those of the winner again. A run whose round 0 has no number to show has none."""
        if self.winner is None:
            return
        for name, saved in from_state(self.winner["masks"]).items():
            mask = saved.unpack(name).to(manager[name].target.parameter.device)
            manager.install(name, mask, saved.sparsity, step=step, why=why)
        write_weights(self.winner, trainer.lightning_module, manager)

    def next_round(self) -> None:
        """A round begins."""
        self.end, self.best = {}, None

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {name: getattr(self, name) for name in asdict(Record())}
