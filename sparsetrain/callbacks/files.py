"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparsetrain.errors import RecipeError


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """Write a file whole or not at all: gives a temporary file beside it that is renamed when the block ends.

    Raises `RecipeError` when the disk refuses, saying whether the previous file is intact. Example:
    ``with written(Path("metrics.json")) as partial: partial.write_text("{}")``.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except (OSError, RuntimeError, SafetensorError) as error:
        kept = f"the previous {target.name} is intact" if target.is_file() else f"there was no {target.name} before"
        raise RecipeError(
            f"{target} could not be written ({error}); {kept}. Free space or choose another --out; a run with a "
            "checkpoint goes on with --ckpt_path last"
        ) from error
    finally:
        # Under a parent that is no directory there is nothing to remove, and asking raises.
        if target.parent.is_dir():
            partial.unlink(missing_ok=True)
