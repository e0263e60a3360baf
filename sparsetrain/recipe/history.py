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

    With ``resume_step``, what was logged after that step is dropped before the first new row, and what is already there for
    that step is not logged twice. Raises `RecipeError` when the disk refuses.

    Example: ``Trainer(logger=History(Path("runs/x/history.jsonl")))``.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self._resume_step = resume_step
        self._known: set[str] = set()

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
        line = json.dumps(head | row)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._resume_step is not None:
                self._known = set(self._cut(self._resume_step))
                self._resume_step = None
            if line not in self._known:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
        except OSError as error:
            raise RecipeError(
                f"{self.path} could not be written ({error}); free space, or choose another directory with --out"
            ) from error

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    def _cut(self, step: int) -> list[str]:
        """Drop what was logged after a step (and a line that was cut off); returns what stays for that step."""
        if not self.path.exists():
            return []
        kept, last = [], []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                at = int(json.loads(line).get("step") or 0)
            except json.JSONDecodeError:
                continue
            if at <= step:
                kept.append(line)
                last += [line] if at == step else []
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        return last
