"""What a run that was killed goes on from: a folder with finished blocks, what the next one is given, and what was asked.

Everything is written to another name first and then renamed, the list of what is done last, so that a kill leaves either the
state before a block or the state after it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from sparsetrain.errors import MaskStateError, RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.oneshot.report import OneShotRow
from sparsetrain.patterns import Sparsity, exact

_PROGRESS = "progress.json"


class Work:
    """The folder of one run; None keeps nothing.

    Args:
        folder: made if it is not there.
        asked: what was asked for; a folder of another run is refused.

    Raises `RecipeError` naming what differs, `MaskStateError` for a folder that cannot be read.
    """

    def __init__(self, folder: Path | None, asked: dict[str, Any]) -> None:
        self.folder = folder
        self.asked: dict[str, Any] = json.loads(json.dumps(asked))
        self.done = 0
        self.plan: dict[str, Sparsity] | None = None
        self.rows: list[OneShotRow] = []
        self.unseen: list[str] = []
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RecipeError(f"work={str(folder)!r} cannot be a folder ({error.strerror}); give another one") from error
            if (folder / _PROGRESS).exists():
                self._read(folder / _PROGRESS)

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            before, plan = content["asked"], content["plan"]
            self.done, self.unseen = int(content["done"]), list(content["unseen"])
            self.rows = [OneShotRow(**row) for row in content["rows"]]
            self.plan = {name: Fraction(value) for name, value in plan.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MaskStateError(f"{path} cannot be read ({error!r}); delete the folder and start anew") from error
        for key in {**before, **self.asked}:
            if before.get(key) != self.asked.get(key):
                raise RecipeError(
                    f"{path.parent} holds a run with another {key} (then {_short(before.get(key))}, now "
                    f"{_short(self.asked.get(key))}): going on would mix them. Start from the same weights, data (in the same "
                    "order) and arguments, or give another folder"
                )

    def restore(self, manager: MaskManager, segments: Sequence[Sequence[str]], hidden: Any, step: int) -> None:
        """Install the finished segments' weights and masks, and what the next block is given; ``step`` is recorded."""
        if self.folder is None or not self.done:
            return
        for number in range(self.done):
            path = self.folder / f"segment-{number}.safetensors"
            try:
                with safetensors.safe_open(str(path), framework="pt") as file:
                    for name in segments[number]:
                        weight, mask = file.get_tensor(f"{name}/weight"), file.get_tensor(f"{name}/mask")
                        device = manager[name].target.parameter.device
                        sparsity = Fraction(file.metadata()[name])
                        manager.install(name, mask.to(device, torch.bool), sparsity, step=step, why="one-shot")
                        manager.write(name, weight.to(device))
            except (OSError, safetensors.SafetensorError, KeyError, TypeError) as error:
                raise MaskStateError(f"{path} cannot be read ({error}); delete the folder and start anew") from error
        if self.done < len(segments):
            hidden.load(self.folder / f"hidden-{self.done}.safetensors")

    def keep_plan(self, plan: dict[str, Sparsity]) -> None:
        """Remember what each tensor is to lose; measuring it may have taken a pass."""
        self.plan = plan
        self._progress()

    def finish_segment(self, manager: MaskManager, names: Sequence[str], rows: Sequence[OneShotRow], hidden: Any) -> None:
        """A segment is done; ``hidden`` is what the next one is given, None after the last."""
        self.rows += rows
        self.done += 1
        if self.folder is None:
            return
        tensors, sparsities = {}, {}
        for name in names:
            tensor = manager[name]
            tensors[f"{name}/weight"] = tensor.target.parameter.detach().contiguous()
            tensors[f"{name}/mask"] = tensor.full_mask().to(torch.uint8)
            sparsities[name] = str(tensor.sparsity)
        self._write(f"segment-{self.done - 1}.safetensors", lambda path: save_file(tensors, str(path), sparsities))
        if hidden is not None:
            self._write(f"hidden-{self.done}.safetensors", hidden.save)
        self._progress()
        (self.folder / f"hidden-{self.done - 1}.safetensors").unlink(missing_ok=True)

    def _progress(self) -> None:
        content = {
            "asked": self.asked,
            "plan": {name: str(exact(value)) for name, value in (self.plan or {}).items()},
            "done": self.done,
            "unseen": self.unseen,
            "rows": [asdict(row) for row in self.rows],
        }
        self._write(_PROGRESS, lambda path: path.write_text(json.dumps(content, indent=1), encoding="utf-8"))

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        if self.folder is None:
            return
        unfinished = self.folder / f"{name}.part"
        write(unfinished)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, self.folder / name)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
