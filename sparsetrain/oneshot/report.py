"""What one-shot pruning did, tensor by tensor."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class OneShotRow:
    """One tensor. ``error``: ``||y - y_dense|| / ||y_dense||`` of its block's output for the first sample, given what the
    block was given; None outside of blocks and where no data was needed. ``seconds``: of its whole block. ``note``: what had to
    be done (damping), and how many experts saw no data."""

    name: str
    block: str
    asked: float
    actual: float
    numel: int
    error: float | None = None
    seconds: float = 0.0
    note: str = ""


@dataclass
class OneShotReport:
    """The result of `prune_oneshot`. ``blocks``: names in the order they run, none where the model was taken as a whole;
    ``samples``: of this process; ``unseen``: experts that no sample was routed to; ``dense``: weights that stay as they are
    though nobody asked for that, and why; they do not count in ``sparsity``."""

    rows: list[OneShotRow] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    samples: int = 0
    unseen: list[str] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all tensors."""
        total = sum(row.numel for row in self.rows)
        return sum(row.actual * row.numel for row in self.rows) / total if total else math.nan

    def to_json(self, path: Path) -> None:
        """Write the report. Example: ``report.to_json(Path("oneshot.json"))``."""
        path.write_text(json.dumps(asdict(self) | {"sparsity": self.sparsity}, indent=1), encoding="utf-8")

    def __str__(self) -> str:
        lines = [f"{'tensor':<44} {'asked':>8} {'actual':>8} {'error':>8} {'seconds':>8}  note"]
        for row in self.rows:
            error = "" if row.error is None else f"{row.error:.4f}"
            lines.append(
                f"{row.name:<44} {row.asked:>8.4f} {row.actual:>8.4f} {error:>8} {row.seconds:>8.1f}  {row.note}".rstrip()
            )
        lines.append(
            f"sparsity {self.sparsity:.4f} over {len(self.rows)} tensors, {self.samples} samples, {self.seconds:.1f} s"
        )
        lines += [f"left dense: {left}"] if (left := self.left_dense()) else []
        return "\n".join(lines)

    def left_dense(self) -> str:
        """``dense`` in a line: the first names, how many more, and why; empty if there are none."""
        few = ", ".join(list(self.dense)[:3]) + (f" and {len(self.dense) - 3} more" if len(self.dense) > 3 else "")
        return f"{few} ({'; '.join(sorted(set(self.dense.values())))})" if few else ""
