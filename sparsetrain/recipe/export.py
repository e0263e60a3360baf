"""Ship a finished run: its bare network in a folder that other programs load, verified before it is there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor, nn

from sparsetrain.callbacks import PackNet, Supermask
from sparsetrain.callbacks.groups import first_training_sample
from sparsetrain.checkpoints import matching, read_weights, require_merged
from sparsetrain.data import DomainSequence, RolloutData
from sparsetrain.data.tokenized import TokenizedData
from sparsetrain.data.tokens import get_tokenizer
from sparsetrain.errors import ExportError, RecipeError
from sparsetrain.export import as_ordinary, for_inference, load_compact, run_on, save_compact
from sparsetrain.recipe.build import check_weights, instantiate, saved_masks, shorten, taken_out
from sparsetrain.recipe.inspect import inspect_checkpoint
from sparsetrain.recipe.quiet import quiet
from sparsetrain.recipe.schema import load_recipe
from sparsetrain.structure import Compacted
from sparsetrain.tasks import save_pretrained
from sparsetrain.tasks.pretrained import require_free


@dataclass(frozen=True)
class Exported:
    """What was written: where, how many parameters (whole and not zero), and how it is loaded; ``notes``: what else to know."""

    folder: Path
    parameters: int
    nonzero: int
    load: str
    notes: tuple[str, ...] = ()


def export_run(run: Path, out: Path, fast: bool = False, overwrite: bool = False) -> Exported:
    """Write the network of a run directory for use elsewhere.

    A transformers model becomes a ``from_pretrained`` folder with its tokenizer, also after units were taken out, where a
    configuration can say its sizes; any other network a folder that `load_compact` reads, whose ``model.safetensors`` has plain
    names. With ``fast``: every layer in the format that is fastest on this machine, for `InferenceModel.load`.

    Args:
        run: what ``sparsetrain run`` wrote; its masks must verify.
        out: new or empty, unless ``overwrite`` and it holds an export.
        fast: measure and choose formats.
        overwrite: replace an export.

    Raises `RecipeError` for a directory that is no run and a folder in use, `ExportError` where a promise is broken or what was
    written does not answer as the network does; nothing is written then.

    Example: ``export_run(Path("runs/first"), Path("shipped"))``.
    """
    if not (run / "config.yaml").is_file():
        raise RecipeError(f"{run} is no run directory: it has no config.yaml; give what `sparsetrain run` wrote with --out")
    config = load_recipe(run / "config.yaml")
    if config.method is not None and isinstance(instantiate(config, "method"), PackNet | Supermask):
        raise ExportError(
            f"the method of {run} serves every task by a mask of its own: there is no one network to write. Serve it in code: "
            "with method.serving(index, name) around each task"
        )
    out = out.resolve()
    if run.resolve().is_relative_to(out):
        raise RecipeError(f"{out} holds the run that is exported; choose another folder")
    _require_place(out, overwrite)
    with quiet():
        network, records = _network(config, run)
        with tempfile.TemporaryDirectory(dir=_parent(out)) as scratch:
            partial = Path(scratch) / "export"
            if fast:
                load, notes = _write_fast(config, network, records, partial)
            elif hasattr(network, "save_pretrained") and hasattr(network, "config"):
                load, notes = _write_transformers(config, run, network, records, partial)
            else:
                load, notes = _write_compact(config, network, records, partial)
            if out.exists():
                out.rename(Path(scratch) / "old")
            partial.rename(out)
    parameters = list(network.parameters())
    nonzero = sum(int((p != 0).sum()) for p in parameters)
    return Exported(out, sum(p.numel() for p in parameters), nonzero, load.format(out), tuple(notes))


def _require_place(out: Path, overwrite: bool) -> None:
    """Raise unless something may be written there: only an export of ours, or a model, is replaced."""
    ours = any((out / name).is_file() for name in ("compaction.json", "formats.json"))
    if ours and overwrite and not Path.cwd().is_relative_to(out.resolve()):
        return
    require_free(out, overwrite, "--overwrite")


def _parent(out: Path) -> Path:
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=out.resolve().parent).cleanup()
    except OSError as error:
        raise RecipeError(f"{out} cannot be written: {error}; choose another folder") from error
    return out.resolve().parent


def _network(config: Namespace, run: Path) -> tuple[nn.Module, list[Compacted]]:
    """The bare network with the run's weights, and what was taken out of it."""
    checkpoint = read_weights(run)
    if saved_masks(checkpoint) is not None:
        found = inspect_checkpoint(run)
        if not found.ok:
            raise ExportError(f"{run} does not verify ({found.problems[0]}); nothing was written. See sparsetrain verify {run}")
    model: nn.Module = instantiate(config, "model")
    taken = taken_out(run)
    shorten(model, taken)
    require_merged(run, checkpoint["state_dict"])
    weights = matching(checkpoint["state_dict"], model)
    check_weights(run, weights, model)
    model.load_state_dict(weights)
    records = [Compacted(**record["record"]) for what in taken for record in what.get("compacted", [])]
    inner = getattr(model, "network", None)
    network = inner if isinstance(inner, nn.Module) else model
    if any(what.get("removed") for what in taken) and not hasattr(network, "save_pretrained"):
        raise ExportError(
            f"residual blocks were taken out of this {type(network).__name__}, which only a transformers configuration can "
            "say; load the weights of the run's checkpoint into a network without those blocks"
        )
    prefix = "" if network is model else "network."
    return network.eval(), [_inside(record, prefix) for record in records]


def _inside(record: Compacted, prefix: str) -> Compacted:
    """The record as the network knows it: names without the task's."""

    def cut(named: Mapping[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in named.items()}

    kept, picked = cut(record.kept), cut(record.picked)
    return replace(record, kept=kept, picked=picked, sizes=cut(record.sizes), units=cut(record.units))


def _data(config: Namespace) -> Any:
    """The data of the recipe; of several domains the last, which must still be there."""
    data = instantiate(config, "data")
    return data[len(data) - 1] if isinstance(data, DomainSequence) else data


def _sample(config: Namespace, network: nn.Module) -> Any:
    """What the network is verified on: the first training sample, or where the model makes those, how an episode begins."""
    if config.data is None:
        raise RecipeError("the run's recipe names no data, of which the first sample is what an export is verified on")
    data = _data(config)
    if isinstance(data, RolloutData):
        data.setup("test")
        data = data.test_dataloader()
    sample = first_training_sample(data)
    parameter = next(network.parameters())
    return sample.to(parameter.device) if isinstance(sample, Tensor) else sample


def _answer(network: nn.Module, sample: Any) -> Tensor:
    with torch.no_grad():
        made = run_on(network, sample)
    found = getattr(made, "logits", made)
    if not isinstance(found, Tensor):
        raise ExportError(f"{type(network).__name__} answers with a {type(made).__name__}, which cannot be compared")
    return found


def _write_transformers(
    config: Namespace, run: Path, network: Any, records: list[Compacted], partial: Path
) -> tuple[str, list[str]]:
    ordinary, tokenizer = network, None
    if records:
        sample = _sample(config, network)
        tokens = sample if isinstance(sample, Mapping) else {network.main_input_name: sample}
        try:
            ordinary = as_ordinary(network, records, lambda model: model(**tokens))
        except ExportError as error:
            load, notes = _write_compact(config, network, records, partial)
            return load, [str(error), *notes]
    data = None if config.data is None else _data(config)
    if isinstance(data, TokenizedData):
        own = run / "tokenizer"
        tokenizer = get_tokenizer(str(own) if own.is_dir() else data.tokenizer_name)
    save_pretrained(ordinary, partial, tokenizer)
    return f'transformers.{type(ordinary).__name__}.from_pretrained("{{}}")', []


def _write_compact(config: Namespace, network: nn.Module, records: list[Compacted], partial: Path) -> tuple[str, list[str]]:
    sample = _sample(config, network)
    save_compact(network, records, partial)
    whole: Any = instantiate(config, "model")
    fresh = whole.network.eval() if isinstance(getattr(whole, "network", None), nn.Module) else whole.eval()
    load_compact(partial, fresh)
    if not torch.equal(_answer(network, sample), _answer(fresh, sample)):
        raise ExportError("what was written does not answer as the network does; nothing was left. Please report this")
    notes = [] if records else ["nothing was taken out: the zeros are in model.safetensors, under plain names"]
    return f'sparsetrain.export.load_compact("{{}}", {type(network).__name__}(...))', notes


def _write_fast(config: Namespace, network: nn.Module, records: list[Compacted], partial: Path) -> tuple[str, list[str]]:
    sample = _sample(config, network)
    kind = type(network).__name__
    module = "sparsetrain.export"
    load = f'{module}.InferenceModel.load("{{0}}", {kind}(...))'
    if records:
        save_compact(network, records, partial)
        load = f'net = {kind}(...); {module}.load_compact("{{0}}", net); {module}.InferenceModel.load("{{0}}", net)'
    made = for_inference(network, sample)
    made.save(partial)
    return load, str(made.choice).splitlines()
