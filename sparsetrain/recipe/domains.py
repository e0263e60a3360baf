"""A recipe over a `DomainSequence`: one fit a domain, every domain evaluated after each; what is finished is not done again.

The directory of such a run has ``domains/0-NAME/``, ``domains/1-NAME/``, ... beside what every run has, each with the
checkpoint and the evaluations (``stage.json``) of its stage. A run that was killed goes on from the last finished stage, or
inside one from its last checkpoint (``--ckpt_path last``), and ends bit for bit where an uninterrupted one ends. A finished run
goes on in the same way when names are added to ``data.order`` (or domains to ``data.domains``), without data of those before.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, seed_everything

from sparsetrain.callbacks import SparsityCallback
from sparsetrain.callbacks.files import written
from sparsetrain.checkpoints import read_weights
from sparsetrain.continual.matrix import continual_metrics
from sparsetrain.data import DomainSequence
from sparsetrain.errors import MaskStateError, RecipeError
from sparsetrain.recipe.build import Built, check_weights, instantiate, require_lightning
from sparsetrain.recipe.directory import FREE, flat, last_checkpoint
from sparsetrain.recipe.metrics import main_metric, measured
from sparsetrain.recipe.schema import parse_yaml, read_yaml
from sparsetrain.recipe.train import fit

#: What a stage leaves when it has finished.
_DONE = "stage.json"
_Metrics = dict[str, float]


def run_domains(config: Namespace, built: Built, out: Path, text: str) -> dict[str, Any]:
    """Go through all domains; returns the keys ``metric``, ``higher_is_better``, ``dense``, ``dense_from``, ``final``, ``best``
    and ``continual`` of metrics.json.

    Raises `MaskStateError` for a stage of another domain, or one that cannot be read.
    """
    model, sequence, method = require_lightning(built.model), built.data, built.method
    assert isinstance(sequence, DomainSequence)
    count, columns = len(sequence), range(len(sequence))
    stages = [out / "domains" / f"{number}-{name}" for number, name in enumerate(sequence)]
    rows = _finished(stages, sequence)
    # Domains that have arrived later are measured on the model as it was in the beginning, too.
    before = _read(out / "domains" / "before.json") if (out / "domains" / "before.json").is_file() else []
    before += [_test(config, model, None, sequence, i) for i in columns[len(before) :]]
    _write(out / "domains" / "before.json", before)
    with written(out / "config.yaml") as partial:
        partial.write_text(text, encoding="utf-8")
    if rows:
        take_over(last_checkpoint(stages[len(rows) - 1]).with_name("final.ckpt"), model, method)
    if 0 < len(rows) < count:
        rows[-1] += [_test(config, model, method, sequence, i) for i in columns[len(rows[-1]) :]]
    for number in columns[len(rows) :]:
        sequence.enter(number)
        print(f"domain {number + 1} of {count}: {sequence.domain}")
        # Every stage begins as if those before it had ended in another process.
        seed_everything(config.seed, workers=True, verbose=False)
        stage = Built(model, sequence, method, instantiate(config, "callbacks") or [])
        last = last_checkpoint(stages[number])
        resume = last if last.is_file() else None
        fit(config, stage, stages[number], text, resume, 0 if resume is None else int(read_weights(last)["global_step"]))
        rows.append([_test(config, model, method, sequence, i) for i in columns])
        _write(stages[number] / _DONE, {"domain": sequence.domain, "row": rows[-1]})
        for name in ("final.ckpt", "last.ckpt"):
            _link(stages[number] / "checkpoints" / "final.ckpt", out / "checkpoints" / name)
    return _result(config, model, sequence, rows, before)


def check_domains(out: Path, text: str, names: list[str]) -> None:
    """Raise `RecipeError` unless a directory is of this recipe, but for the length of training and domains that came later."""
    was, now = flat(read_yaml(out / "config.yaml")), flat(parse_yaml(text))
    old = _order(read_yaml(out / "config.yaml"))
    if names[: len(old)] != old:
        raise RecipeError(
            f"{out} has learned {', '.join(old)}, in this order, and the recipe begins with {', '.join(names[: len(old)])}; "
            "add domains at the end, or start anew in another directory"
        )
    later = tuple(f"data.init_args.{key}.{name}." for name in names[len(old) :] for key in ("domains", "weights"))
    # A dot behind the name: a domain may begin like another.
    free = (*FREE, "data.init_args.order", *later)
    keys = [key for key in {**was, **now} if not f"{key}.".startswith(free)]
    for key in keys:
        if was.get(key, "absent") != now.get(key, "absent"):
            raise RecipeError(
                f"the recipe has changed since {out} was written: {key} was {was.get(key, 'absent')} and is "
                f"{now.get(key, 'absent')}; only the length of training may change, and domains may be added at the end"
            )


def take_over(checkpoint: Path, model: LightningModule, method: SparsityCallback | None) -> None:
    """Load weights, masks and the method's memory of a finished stage, to begin the next one.

    Raises `MaskStateError` for a checkpoint of another model or without masks.
    """
    content = read_weights(checkpoint)
    check_weights(checkpoint, content["state_dict"], model)
    model.load_state_dict(content["state_dict"])
    if method is not None:
        state = content.get("callbacks", {}).get(method.state_key)
        if not state:
            raise MaskStateError(f"{checkpoint} holds no masks of {type(method).__name__}; start the run anew")
        method.masks.load_state_dict(state["masks"])
        method.load_method_state(state["method"])


def _order(recipe: dict[str, Any]) -> list[str]:
    arguments = recipe["data"]["init_args"]
    return list(arguments.get("order") or arguments["domains"])


def _finished(stages: list[Path], sequence: DomainSequence) -> list[list[_Metrics]]:
    """The rows of the stages that have finished, up to the first that has not."""
    rows = []
    for where, name in zip(stages, sequence, strict=True):
        if not (where / _DONE).is_file():
            break
        found = _read(where / _DONE)
        if found["domain"] != name:
            raise MaskStateError(f"{where} is of domain {found['domain']!r}, and {name!r} is asked for; use another directory")
        rows.append(found["row"])
    return rows


def _test(
    config: Namespace, model: LightningModule, method: SparsityCallback | None, sequence: DomainSequence, index: int
) -> _Metrics:
    """Metrics on one domain, of the model as it serves that domain."""
    name = sequence.names[index]
    with nullcontext() if method is None else method.serving(index, name):
        return measured(config, model, sequence[index])


def _result(
    config: Namespace, model: LightningModule, sequence: DomainSequence, rows: list[list[_Metrics]], before: list[_Metrics]
) -> dict[str, Any]:
    main = main_metric(rows[-1][0])
    name = main["metric"]
    if name is None:
        raise RecipeError("nothing is measured on the domains: the model logs nothing in test or validation")

    def column(row: list[_Metrics]) -> list[float]:
        return [row[i][name] if i < len(row) else math.nan for i in range(len(sequence))]

    trained = config.init_from is not None or getattr(model, "pretrained", False)
    matrix = [column(row) for row in rows]
    found = continual_metrics(matrix, main["higher_is_better"], column(before))
    return main | {
        "dense": _averaged(before, sequence.names) if trained else None,
        "dense_from": "the model as it came, before the first domain" if trained else None,
        "final": _averaged(rows[-1], sequence.names),
        "best": None,
        "continual": {
            "domains": list(sequence),
            "matrix": [[None if math.isnan(value) else value for value in row] for row in matrix],
            "before": column(before),
            **found,
        },
    }


def _averaged(row: list[_Metrics], names: list[str]) -> _Metrics:
    """Means over domains under the metrics' own names, and each domain's as ``metric/domain``."""
    means = {key: sum(found[key] for found in row) / len(row) for key in row[0]}
    return means | {f"{key}/{name}": value for found, name in zip(row, names, strict=True) for key, value in found.items()}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MaskStateError(f"{path} cannot be read ({error}); delete its folder, and the stage is done again") from error


def _write(path: Path, content: Any) -> None:
    with written(path) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """The same file under another name, copied where the disk knows no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f".{target.name}.made")
    made.unlink(missing_ok=True)
    try:
        os.link(source, made)
    except OSError:
        shutil.copyfile(source, made)
    os.replace(made, target)
