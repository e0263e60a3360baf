"""Reading weights that somebody wrote: Lightning checkpoints, run directories, safetensors, transformers folders.

A folder that ``save_pretrained`` wrote names weights as the bare network does, a task puts ``network.`` before them; weights
that are tied are stored once. `matching` brings stored names to those of a model, and leaves what it does not know for the
check that follows, so that nothing foreign is loaded silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsetrain.errors import MaskStateError
from sparsetrain.targets import aliases

_INDEX = "model.safetensors.index.json"
_RUN = ("checkpoints/final.ckpt", "checkpoints/last.ckpt")
_FOLDER = (*_RUN, "model.safetensors", _INDEX, "pytorch_model.bin")


def read_weights(path: Path) -> dict[str, Any]:
    """Read a checkpoint, a run directory, a safetensors file or a transformers folder (sharded too): at least ``state_dict``.

    Raises `MaskStateError` for what is not there, truncated or of another kind. Example: ``read_weights(Path("runs/first"))``.
    """
    if path.is_dir():
        existing = [path / name for name in _FOLDER if (path / name).is_file()]
        if not existing:
            raise MaskStateError(f"{path} holds no checkpoint; looked for {', '.join(_FOLDER)}")
        path = existing[0]
    if not path.is_file():
        raise MaskStateError(f"checkpoint {str(path)!r} is no file")
    try:
        if path.name.endswith(".index.json"):
            return {"state_dict": _shards(path)}
        if path.suffix == ".safetensors":
            return {"state_dict": load_file(str(path))}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MaskStateError:
        raise
    except Exception as error:
        raise MaskStateError(f"{path} cannot be read as a checkpoint: it is truncated or of another kind ({error})") from error
    if not isinstance(content, dict):
        raise MaskStateError(f"{path} holds a {type(content).__name__}, no checkpoint")
    if "state_dict" in content:
        return content
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {"state_dict": content}
    raise MaskStateError(f"{path} has no 'state_dict'; its keys are {', '.join(map(str, list(content)[:8]))}")


def _shards(index: Path) -> dict[str, Tensor]:
    files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    found: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if not (index.parent / name).is_file():
            raise MaskStateError(f"{index} names {name}, which is not there: the folder is incomplete; copy all of it")
        found |= load_file(str(index.parent / name))
    missing = [name for name in files if name not in found]
    if missing:
        raise MaskStateError(f"{index} names {missing[0]}, which is not in {files[missing[0]]}: the folder is damaged")
    return found


def matching(weights: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Weights by a model's own names: one prefix added or taken away for all, tied weights under each of their names.

    Left out is what the model says to ignore (transformers' ``_keys_to_ignore_on_load_unexpected``). Names that do not fit
    stay as they are. Example: ``matching(load_file("gpt2/model.safetensors"), task)``.
    """
    own = unwrapped(model.state_dict())
    first = next(iter(weights), "").split(".")
    changes = [("", "")]
    changes += [(f"{name}.", "") for name, _ in model.named_modules() if name]
    changes += [("", ".".join(first[:count]) + ".") for count in range(1, len(first))]

    def renamed(name: str, add: str, take: str) -> str:
        return add + name.removeprefix(take)

    # Of changes that fit as many names the first wins: the one that changes least.
    add, take = max(changes, key=lambda change: sum(renamed(name, *change) in own for name in weights))
    found = {renamed(name, add, take): value for name, value in weights.items()}
    for _, names in aliases(model):
        stored = [name for name in names if name in found]
        found |= {name: found[stored[0]] for name in names if stored and name not in found and name in own}
    for name in own:
        layer, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked" and name not in found and f"{layer}.running_var" in found:
            found[name] = own[name]  # files from before torch 0.4.1 have no such counter; torch makes one up too
    ignored = [
        regex for module in model.modules() for regex in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    return {n: v for n, v in found.items() if n in own or not any(re.search(regex, n) for regex in ignored)}


def unwrapped(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The frozen weights of a model with LoRA adapters under their plain names, the adapters left out.

    Example: ``unwrapped({"fc.base_layer.weight": w, "fc.lora_A.default.weight": a})`` is ``{"fc.weight": w}``.
    """
    if not any(".lora_A." in name for name in weights):
        return dict(weights)
    return {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}


def require_merged(path: Path, weights: Mapping[str, Any]) -> None:
    """Raise `MaskStateError` for weights that have LoRA adapters beside them: without these they are another model."""
    if any(".lora_A." in name for name in weights):
        raise MaskStateError(
            f"{path} holds LoRA adapters that are not merged: it was written while SparseLoRA trained. Let that run end "
            "(--ckpt_path last) and start from what it leaves"
        )
