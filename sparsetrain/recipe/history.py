"""history.jsonl: every logged value of a run, one JSON object a line, cut back to the checkpoint when a run is resumed."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from sparsetrain.errors import RecipeError


class History(Logger):
    """Appends ``{"step": ..., name: value, ...}`` rows; NaN and infinity are written as null, which JSON has no words for.

    With ``resume_step``, what was logged after that step is dropped before the first new row, and a new row for that step
    that only repeats the latest values (a resumed run says where it stands) is left out. Raises `RecipeError`
    when the disk refuses.

    Example: ``Trainer(logger=History(Path("runs/x/history.jsonl")))``.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self._resume_step = resume_step
        self._resumed_at: int | None = None
        self._latest: dict[str, float | None] = {}

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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._resume_step is not None:
                self._cut(self._resume_step)
                self._resumed_at, self._resume_step = self._resume_step, None
            if step == self._resumed_at and row.items() <= self._latest.items():
                return
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(head | row) + "\n")
        except OSError as error:
            raise RecipeError(
                f"{self.path} could not be written ({error}); free space, or choose another directory with --out"
            ) from error

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    def _cut(self, step: int) -> None:
        """Drop what was logged after a step (and a line that was cut off), note the latest values of the rest."""
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
                self._latest |= row
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
