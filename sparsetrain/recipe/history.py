"""history.jsonl: every logged value of a run, one JSON object a line, cut back to the checkpoint when a run is resumed."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class History(Logger):
    """Appends ``{"step": ..., name: value, ...}`` rows; NaN and infinity are written as null, which JSON has no words for.

    Example: ``Trainer(logger=History(Path("runs/x/history.jsonl")))``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """What Lightning calls it."""
        return "history"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """One row."""
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        epoch = row.pop("epoch", None)
        head: dict[str, Any] = {"step": step} | ({} if epoch is None else {"epoch": int(epoch)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(head | row) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    def cut(self, step: int) -> None:
        """Drop what was logged after a step (and a line that was cut off): a resumed run logs it again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if int(row.get("step") or 0) <= step:
                kept.append(line)
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
