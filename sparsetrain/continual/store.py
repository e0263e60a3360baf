"""What is kept of a model from domain to domain, one segment (block) at a time: in main memory, or in memory-mapped files.

Everything that is put is pending until it is committed, and a commit replaces all of it at once: a domain that fails half-way
leaves what was before. In files, generations before the last are kept too, so that a run that was killed between a commit
and its next checkpoint goes on from the one it knows. A folder is one store's alone: it holds the store's id, a random one.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsetrain.errors import MaskStateError, RecipeError

#: The file that says whose a folder is.
_ID = "id"
#: Tensor name -> its statistics (or its weight) by name.
Content = dict[str, dict[str, Tensor]]


class Store:
    """Statistics or weights by segment.

    Args:
        dtype: what floating tensors are kept in; None: as they are.
        folder: where files go, one a segment; None keeps everything in main memory.
        back: how many generations before the last are kept in files, at least 1.

    Tensors that several names share are kept once. Raises `RecipeError` for a folder that cannot be one, `MaskStateError` for
    files that cannot be read.

    Example::

        store = Store(torch.bfloat16)
        store.put("layers.0", {"fc.weight": {"squares": torch.ones(8)}})
        store.commit()
        store.load("layers.0")["fc.weight"]["squares"]
    """

    def __init__(self, dtype: torch.dtype | None = None, folder: Path | None = None, back: int = 1) -> None:
        self.dtype = dtype
        self.folder = folder
        self.back = back
        self.id = uuid.uuid4().hex  # no number of torch's streams: training would take another course
        self.generation = 0
        self._kept: dict[str, Content] = {}
        self._pending: dict[str, Content] = {}
        #: In files: segment -> number of its file, in this generation and in the next.
        self._files: dict[str, int] = {}
        self._next: dict[str, int] = {}

    def __contains__(self, segment: str) -> bool:
        return segment in (self._kept if self.folder is None else self._files)

    def claim(self) -> None:
        """Make the folder this store's own, before anything is put.

        Raises `RecipeError` for one with generations of another store, or of a run that was killed before its first checkpoint.
        """
        owner = self._owner()
        if self.folder is None or owner == self.id:
            return
        if owner is not None if self.generation else any(path.name.isdigit() for path in self.folder.glob("*")):
            raise RecipeError(
                f"memory.folder: {self.folder} holds what another run has learned (or one that was killed before its first "
                "checkpoint); give another folder, or delete it if nobody goes on from it"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / _ID).write_text(self.id, encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"memory.folder: {self.folder} cannot be written ({error}); give another one") from error

    def load(self, segment: str, pending: bool = False) -> Content:
        """What was committed (or is ``pending``) for a segment; empty if nothing was. Floating tensors as they are kept."""
        if self.folder is None:
            return (self._pending if pending else self._kept).get(segment, {})
        files, generation = (self._next, self.generation + 1) if pending else (self._files, self.generation)
        return self._read(self._path(generation, files[segment])) if segment in files else {}

    def put(self, segment: str, content: Content) -> None:
        """Keep this for a segment from the next commit on; a copy."""
        made: dict[int, Tensor] = {}

        def kept(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                dtype = self.dtype if tensor.is_floating_point() and self.dtype is not None else tensor.dtype
                # The values of a tensor that lies otherwise in memory than they are ordered would be kept with their gaps.
                made[id(tensor)] = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
            return made[id(tensor)]

        copied = {name: {key: kept(value) for key, value in values.items()} for name, values in content.items()}
        if self.folder is None:
            self._pending[segment] = copied
        else:
            number = self._next.setdefault(segment, len(self._next))
            self._write(self._path(self.generation + 1, number), copied)

    def commit(self) -> None:
        """What was put replaces what was there; segments that were not put stay as they are."""
        if self.folder is None:
            self._kept |= self._pending
        else:
            for segment, number in self._files.items():
                if segment not in self._next:
                    self._next[segment] = len(self._next)
                    path = self._path(self.generation + 1, self._next[segment])
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.unlink(missing_ok=True)  # left by a run that has gone on from an older generation since
                    os.link(self._path(self.generation, number), path)
            self._files = self._next
            shutil.rmtree(self._path(self.generation - self.back, 0).parent, ignore_errors=True)
        self.generation += 1
        self._pending, self._next = {}, {}

    def discard(self) -> None:
        """Forget what was put since the last commit."""
        if self.folder is not None:
            shutil.rmtree(self._path(self.generation + 1, 0).parent, ignore_errors=True)
        self._pending, self._next = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the tensors, or of files the folder, the generation and the names."""
        if self.folder is None:
            return {"generation": self.generation, "kept": {name: dict(content) for name, content in self._kept.items()}}
        where = {"folder": str(self.folder.absolute()), "id": self.id}
        return {"generation": self.generation, "files": dict(self._files)} | where

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises `MaskStateError` if the files are gone or another store's, or were kept where this store keeps none.
        """
        if ("folder" in state) != (self.folder is not None):
            here = "in main memory" if self.folder is None else f"in {self.folder}"
            there = f"in {state['folder']}" if "folder" in state else "in the checkpoint"
            raise MaskStateError(f"what was learned is kept {there}, and this run keeps it {here}; use the same memory.folder")
        self.generation = int(state["generation"])
        self._pending, self._next = {}, {}
        if self.folder is None:
            self._kept = dict(state["kept"])
            return
        self.id = str(state["id"])
        if self._owner() not in (None, self.id):
            raise MaskStateError(
                f"{self.folder} holds what another run has learned, not the one that wrote this state; give the folder of that "
                "run, or start again from the first domain"
            )
        self._files = {str(name): int(number) for name, number in state["files"].items()}
        for segment, number in self._files.items():
            path = self._path(self.generation, number)
            if not path.is_file():
                raise MaskStateError(
                    f"what was learned of {segment} is not at {path} any more: restore the folder, or start again from the "
                    "first domain"
                )
        # Newer generations stay: one of them may be what the next state to be loaded knows.

    def _owner(self) -> str | None:
        path = None if self.folder is None else self.folder / _ID
        return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None

    def _path(self, generation: int, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{generation}" / f"{number}.safetensors"

    def _write(self, path: Path, content: Content) -> None:
        tensors: dict[str, Tensor] = {}
        numbers: dict[int, str] = {}
        for values in content.values():
            for tensor in values.values():
                if id(tensor) not in numbers:
                    numbers[id(tensor)] = str(len(numbers))
                    tensors[numbers[id(tensor)]] = tensor
        index = {name: {key: numbers[id(t)] for key, t in values.items()} for name, values in content.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")
            save_file(tensors, str(unfinished), {"index": json.dumps(index)})
            os.replace(unfinished, path)
        except OSError as error:
            raise RecipeError(f"memory.folder: {path} cannot be written ({error}); free space, or give another one") from error

    def _read(self, path: Path) -> Content:
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                index = json.loads(file.metadata()["index"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise MaskStateError(f"{path} cannot be read as what was learned ({error}); start again without it") from error
        return {name: {key: tensors[number] for key, number in values.items()} for name, values in index.items()}
