"""Compact models on disk: as an ordinary transformers model where a configuration can say its sizes, else with their record.

`as_ordinary` looks for the configuration, builds the model from it and compares: what it returns is saved by
``save_pretrained`` and loaded by stock ``from_pretrained``. `save_compact` and `load_compact` do for every other model.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsetrain.errors import ExportError, MaskStateError
from sparsetrain.structure import Compacted, compact_again
from sparsetrain.structure.recording import outputs_of
from sparsetrain.writing import whole_folder

_WEIGHTS, _RECORD, _VERSION = "model.safetensors", "compaction.json", 1
#: At most so many sets of changes of a configuration are tried.
_TRIALS = 128


def as_ordinary(model: nn.Module, compacted: Sequence[Compacted], call: Callable[[nn.Module], Any]) -> nn.Module:
    """The same network as stock transformers builds it from a configuration, on which ``save_pretrained`` may be called.

    Args:
        model: a compact transformers model (``PreTrainedModel``).
        compacted: what `compact` returned, each time.
        call: gives a model some input, such as ``lambda m: m(**batch)``; in evaluation mode both must answer alike.

    Whole numbers of the configuration that count what was cut (heads, neurons of a block) are set to what is left, and a width
    of heads that followed from others is written down. Groups of one kind must have lost alike: prune with
    ``Groups(alike=True)``.

    Raises `ExportError` for a model without configuration, and where no configuration has these shapes (blocks that differ,
    a class that computes the width of heads from their number), or the outputs differ by more than 1e-5 of the greatest.

    Example: ``as_ordinary(model, [compacted], lambda m: m(**batch)).save_pretrained("smaller")``.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or not hasattr(model, "save_pretrained"):
        raise ExportError(f"{type(model).__name__} has no transformers configuration; use save_compact")
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for changed in _configurations(model, compacted):
        fresh = _built(model, changed)
        if fresh is None or {name: tuple(p.shape) for name, p in fresh.state_dict().items()} != wanted:
            continue
        ordinary = type(model)(changed)
        ordinary.load_state_dict(model.state_dict())
        parameter = next(model.parameters())
        ordinary.to(parameter.device, parameter.dtype).train(model.training)
        if _agree(model, ordinary, call):
            return ordinary
    units = {name: left for record in compacted for name, left in record.units.items()}
    shown = ", ".join(f"{name} {left} of {of}" for name, (left, of) in list(units.items())[:6])
    raise ExportError(
        f"no configuration of {type(model).__name__} has these sizes ({shown}, ...): the same layer of every block must have "
        "lost alike (Groups(alike=True)), and some classes compute the width of heads from their number (BERT), so that no "
        "head can go; leave those out, or use save_compact"
    )


def save_compact(model: nn.Module, compacted: Sequence[Compacted], folder: str | Path) -> Path:
    """Write weights under their plain names, what was taken out, and a transformers model's configuration; returns the folder.

    Raises `ExportError` where the disk refuses; the folder is then as it was. Example: ``save_compact(net, [done], "small")``.
    """
    # A copy of each: safetensors refuses tensors that share memory.
    weights = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in model.state_dict().items()}
    records = [_plain(asdict(record)) for record in compacted]
    with whole_folder(Path(folder), "the compact model", ExportError) as partial:
        save_file(weights, partial / _WEIGHTS, {"format": "pt"})
        (partial / _RECORD).write_text(json.dumps({"version": _VERSION, "compacted": records}), encoding="utf-8")
        if hasattr(getattr(model, "config", None), "save_pretrained"):
            model.config.save_pretrained(partial)  # type: ignore[union-attr,operator]
    return Path(folder)


def load_compact(folder: str | Path, model: nn.Module) -> list[Compacted]:
    """Take out of ``model``, built as the whole one was, what is not in the folder, and load the weights; returns the records.

    Raises `MaskStateError`, the model being as before, for a folder that cannot be read or is of another model.
    Example: ``load_compact("small", AutoModel.from_config(AutoConfig.from_pretrained("small")))``.
    """
    folder = Path(folder)
    try:
        stored = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if stored["version"] != _VERSION:
            raise ValueError(f"layout {stored['version']}, known is {_VERSION}")
        records = [_record(state) for state in stored["compacted"]]
        weights = load_file(folder / _WEIGHTS)
    except Exception as error:
        raise MaskStateError(
            f"{folder} holds no compact model that can be read ({type(error).__name__}: {error}); write it with save_compact"
        ) from error
    trial = copy.deepcopy(model)
    try:
        for target in (trial, model):
            for record in records:
                compact_again(target, record)
            target.load_state_dict(weights)
    except Exception as error:
        raise MaskStateError(
            f"{folder} holds a compact model of another kind than this {type(model).__name__}: {error}; build the model as it "
            "was before anything was taken out"
        ) from error
    return records


def _configurations(model: nn.Module, compacted: Sequence[Compacted]) -> Iterator[Any]:
    """Copies of the configuration with numbers set to what is left: as many as may be first, then fewer."""
    config: Any = model.config
    counts: dict[int, int] = {}
    for record in compacted:
        for left, of in record.units.values():
            first = next((old for old, now in counts.items() if now == of), of)
            counts[first] = left
    changes: list[tuple[str, int]] = []
    for name, value in sorted(config.to_dict().items()):
        if type(value) is not int or isinstance(value, bool):
            continue
        for of, left in counts.items():
            if value == of and left != of:
                changes.append((name, left))
            elif "head" in name and "dim" not in name and left != of and value % of == 0:
                changes.append((name, value * left // of))
    widths = (vars(module).get("head_dim") for module in model.modules())
    width = next((found for found in widths if type(found) is int), None)
    sets = (some for size in range(len(changes), 0, -1) for some in itertools.combinations(changes, size))
    for some in itertools.islice(sets, _TRIALS):
        if len({name for name, _ in some}) < len(some):
            continue
        for head_dim in dict.fromkeys((width, None)):
            changed = copy.deepcopy(config)
            settings = dict(some) | ({} if head_dim is None else {"head_dim": head_dim})
            try:
                for name, value in settings.items():
                    setattr(changed, name, value)
            except AttributeError:  # some configurations compute it
                continue
            yield changed


def _built(model: nn.Module, config: Any) -> nn.Module | None:
    """The model of a configuration without weights, or None where it refuses."""
    try:
        with torch.device("meta"):
            built: nn.Module = type(model)(config)
    except Exception:  # a configuration that cannot be is not the one looked for
        return None
    return built


def _agree(model: nn.Module, other: nn.Module, call: Callable[[nn.Module], Any]) -> bool:
    training = model.training
    try:
        with torch.no_grad():
            found = [list(outputs_of(call(m.eval()))) for m in (model, other)]
    except Exception:  # code that counts on other sizes may fail in any way
        return False
    finally:
        model.train(training)
        other.train(training)
    pairs = list(zip(*found, strict=False))
    scale = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    return bool(pairs) and all(a.shape == b.shape and float((a - b).abs().max()) <= 1e-5 * max(scale, 1e-12) for a, b in pairs)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _record(state: dict[str, Any]) -> Compacted:
    kept = {name: {int(dim): torch.tensor(index) for dim, index in dims.items()} for name, dims in state["kept"].items()}
    picked = {name: torch.tensor(index) for name, index in state["picked"].items()}
    units = {name: (int(left), int(of)) for name, (left, of) in state["units"].items()}
    return Compacted(**{**state, "kept": kept, "picked": picked, "units": units})
