"""Folders whose files are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparsetrain.errors import SparsetrainError


@contextmanager
def whole_folder(folder: Path, what: str, refusal: type[SparsetrainError]) -> Iterator[Path]:
    """Give a temporary folder whose files replace those of ``folder`` when the block ends; other files there stay.

    Whatever breaks off before leaves ``folder`` as it was. ``what`` is the noun of the error, such as ``"the adapter"``; it is
    of class ``refusal``, raised where the disk refuses. Example: ``with whole_folder(Path("out"), "the model", ExportError) as
    partial: save_file(weights, partial / "model.safetensors")``.
    """
    folder = folder.resolve()
    # Inside a folder that is there: what is beside it may be another file system.
    partial = (folder if folder.is_dir() else folder.parent) / f".{folder.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        if folder.exists():
            for file in partial.iterdir():
                file.replace(folder / file.name)
        else:
            partial.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise refusal(f"{what} could not be written to {folder} ({error}); free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
