"""A recipe over a `DomainSequence`: one fit a domain, every domain evaluated after each; what is finished is not done again.

The directory of such a run has ``domains/0-NAME/``, ``domains/1-NAME/``, ... beside what every run has, each with the
checkpoint and the evaluations (``stage.json``) of its stage. A run that was killed goes on from the last finished stage, or
inside one from its last checkpoint (``--ckpt_path last``), and ends bit for bit where an uninterrupted one ends. A finished run
goes on in the same way when names are added to ``data.order`` (or domains to ``data.domains``), without data of those before:
where it is gone, they are not measured any more, which is told (``continual.missing``), and averages are over the others.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything

from sparsetrain.callbacks import ContinualPruning, SparsityCallback
from sparsetrain.callbacks.files import written
from sparsetrain.checkpoints import read_weights
from sparsetrain.continual.matrix import continual_metrics
from sparsetrain.data import DomainSequence
from sparsetrain.errors import DataError, MaskStateError, RecipeError
from sparsetrain.recipe.build import Built, instantiate, require_lightning, take_over
from sparsetrain.recipe.directory import LENGTH, flat, last_checkpoint, require_same_recipe
from sparsetrain.recipe.metrics import main_metric, measured
from sparsetrain.recipe.schema import parse_yaml, read_yaml
from sparsetrain.recipe.train import fit

#: What a stage leaves when it has finished.
_DONE = "stage.json"
_Metrics = dict[str, float]
#: What was measured on every domain; None where the data is gone.
_Row = list[_Metrics | None]


def run_domains(config: Namespace, built: Built, out: Path, text: str, beside: Mapping[str, str]) -> dict[str, Any]:
    """Go through all domains; returns the keys ``metric``, ``higher_is_better``, ``dense``, ``dense_from``, ``final``, ``best``
    and ``continual`` of metrics.json. ``beside``: runs over the same domains that follow, by directory, and who asks for them.

    Raises before any training `MaskStateError` for a stage of another domain or that cannot be read, `DataError` where a domain
    still to be learned has no data, `RecipeError` where one of ``beside`` lacks data, or domains are not measured alike.
    """
    model, sequence, method = require_lightning(built.model), built.data, built.method
    assert isinstance(sequence, DomainSequence)
    count, columns = len(sequence), range(len(sequence))
    stages, config_file, first = _stages(out, sequence), out / "config.yaml", out / "domains" / "before.json"
    # config.yaml is written last: measurements of domains it does not name count for nothing.
    known = len(_order(read_yaml(config_file))) if config_file.is_file() else 0
    rows = [row[:known] for row in _finished(stages, sequence)]
    gone = _gone(sequence, len(rows))
    for name, key in beside.items() if gone else ():
        _require_learned(out / name, sequence, gone, key)

    def measure(row: _Row) -> None:
        row += [None if i in gone else _test(config, model, method, sequence, i) for i in columns[len(row) :]]

    # Domains that have arrived later are measured on the model as it was in the beginning, too.
    before: list[_Metrics] = _read(first)[:known] if first.is_file() else []
    before += [_test(config, model, None, sequence, i) for i in columns[len(before) :]]
    main = _measured_alike(before, sequence.names)
    if rows:
        take_over(last_checkpoint(stages[len(rows) - 1]).with_name("final.ckpt"), model, method)
        measure(rows[-1])

    def keep() -> None:
        _write(first, before)
        if rows:
            _write(stages[len(rows) - 1] / _DONE, {"domain": sequence.names[len(rows) - 1], "row": rows[-1]})
        with written(config_file) as partial:
            partial.write_text(text, encoding="utf-8")

    for number in columns[len(rows) :]:
        sequence.enter(number)
        print(f"domain {number + 1} of {count}: {sequence.domain}")
        # Every stage begins as if those before it had ended in another process.
        seed_everything(config.seed, workers=True, verbose=False)
        callbacks = [*(instantiate(config, "callbacks") or []), _WhenItTrains(keep)]
        stage = Built(model, sequence, method, callbacks, built.lineage)
        last = last_checkpoint(stages[number])
        resume = last if last.is_file() else None
        fit(config, stage, stages[number], text, resume, 0 if resume is None else int(read_weights(last)["global_step"]))
        rows.append([])
        measure(rows[-1])
        for name in ("final.ckpt", "last.ckpt"):
            _link(stages[number] / "checkpoints" / "final.ckpt", out / "checkpoints" / name)
        _write(stages[number] / _DONE, {"domain": sequence.domain, "row": rows[-1]})
    keep()
    return main | _result(config, model, sequence, rows, before, main)


class _WhenItTrains(Callback):
    """Does something once training starts: whatever can be checked has been."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.act()


def require_references(config: Namespace, method: SparsityCallback | None, data: LightningDataModule | None) -> None:
    """Raise `RecipeError` where a recipe asks for ``references`` and is none of continual pruning."""
    if config.references and not (isinstance(method, ContinualPruning) and isinstance(data, DomainSequence)):
        raise RecipeError(
            "references: true prunes each domain for itself, and all at once, by ContinualPruning over a DomainSequence; here "
            f"method is {'null' if method is None else type(method).__name__} and data "
            f"{'null' if data is None else type(data).__name__}: set references to false"
        )


def check_domains(out: Path, text: str, names: list[str]) -> None:
    """Raise `RecipeError` unless a directory is of this recipe, but for the length of training and domains that came later.

    A domain that is learned stays as it was trained: another length is told, and refused where no domain is left to train.
    """
    stored = out / "config.yaml"
    old = _order(read_yaml(stored))
    if names[: len(old)] != old:
        raise RecipeError(
            f"{out} has learned {', '.join(old)}, in this order, and the recipe begins with {', '.join(names[: len(old)])}; "
            "add domains at the end, or start anew in another directory"
        )
    later = [f"data.init_args.{key}" for name in names[len(old) :] for key in (f"domains.{name}.", f"weights.{name}")]
    # "weights" is a key of its own only where there are none.
    require_same_recipe(stored, text, ["data.init_args.order", "data.init_args.weights", *later])
    was, now = flat(read_yaml(stored)), flat(parse_yaml(text))
    changed = [f"{key} was {was.get(key)} and is {now.get(key)}" for key in LENGTH if was.get(key) != now.get(key)]
    learned = [name for stage, name in zip(_stages(out, names), names, strict=True) if (stage / _DONE).is_file()]
    if changed and learned == names:
        raise RecipeError(
            f"{', '.join(changed)}, and all domains of {out} are learned: none would be trained anew. Go on with the recipe it "
            "was, add domains at the end, or start anew in another directory with --out"
        )
    if changed and learned:
        print(f"{', '.join(changed)}: {', '.join(learned)} stay as they were trained")


def _order(recipe: dict[str, Any]) -> list[str]:
    arguments = recipe["data"]["init_args"]
    return list(arguments.get("order") or arguments["domains"])


def _stages(out: Path, names: Iterable[str]) -> list[Path]:
    return [out / "domains" / f"{number}-{name}" for number, name in enumerate(names)]


def _finished(stages: list[Path], sequence: DomainSequence) -> list[_Row]:
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


def _gone(sequence: DomainSequence, learned: int) -> set[int]:
    """The places of learned domains that have no data any more, told; whatever data there is, is ready to be tested on.

    Raises `DataError` for a domain that is still to be learned.
    """
    found = set()
    for number, name in enumerate(sequence):
        sequence.enter(number)
        try:
            sequence.prepare_data()
            sequence.setup("test")
        except (DataError, FileNotFoundError, NotADirectoryError) as error:  # files of somebody's own data module
            if number >= learned:
                raise error if isinstance(error, DataError) else DataError(f"domain {name!r}: {error}") from error
            found.add(number)
            print(f"{name} is learned, and not measured any more: {error}")
    return found


def _require_learned(beside: Path, sequence: DomainSequence, gone: set[int], key: str) -> None:
    """Raise `RecipeError` where a run beside this one has yet to learn a domain whose data is gone."""
    learned = len(_finished(_stages(beside, sequence), sequence))
    if lacks := [sequence.names[number] for number in sorted(gone) if number >= learned]:
        raise RecipeError(
            f"{key}: true asks for a run in {beside} over all domains, and it has not learned {', '.join(lacks)}, whose data "
            f"is gone: set {key} to false"
        )


def _measured_alike(before: list[_Metrics], names: list[str]) -> dict[str, Any]:
    """The main metric; raises `RecipeError` unless every domain has the same metrics, at least one."""
    first, wanted = names[0], before[0]
    for name, found in zip(names, before, strict=True):
        if not found:
            raise RecipeError(
                f"nothing is measured on domain {name!r}: it has neither test nor validation data, or the model logs nothing"
            )
        for one, has, other, more in ((name, found, first, wanted), (first, wanted, name, found)):
            if lacks := [key for key in more if key not in has]:
                raise RecipeError(
                    f"domain {one!r} lacks {', '.join(lacks)}, which {other!r} has: one metric is followed over all domains; "
                    "give each of them test data, or none"
                )
    return main_metric(wanted)


def _test(
    config: Namespace, model: LightningModule, method: SparsityCallback | None, sequence: DomainSequence, index: int
) -> _Metrics:
    """Metrics on one domain, of the model as it serves that domain."""
    name = sequence.names[index]
    with nullcontext() if method is None else method.serving(index, name):
        return measured(config, model, sequence[index])


def _result(
    config: Namespace,
    model: LightningModule,
    sequence: DomainSequence,
    rows: list[_Row],
    before: list[_Metrics],
    main: dict[str, Any],
) -> dict[str, Any]:
    def column(row: Sequence[_Metrics | None]) -> list[float | None]:
        found = [None if of is None else of[main["metric"]] for of in row]
        return found + [None] * (len(sequence) - len(row))

    trained = config.init_from is not None or getattr(model, "pretrained", False)
    matrix, last = [column(row) for row in rows], rows[-1]
    missing = [name for name, of in zip(sequence, last, strict=True) if of is None]
    found = continual_metrics(matrix, main["higher_is_better"], column(before))
    # Of the same domains as the final numbers.
    dense = [None if name in missing else then for name, then in zip(sequence, before, strict=True)]
    return {
        "dense": _averaged(dense, sequence.names) if trained else None,
        "dense_from": "the model as it came, before the first domain" if trained else None,
        "final": _averaged(last, sequence.names),
        "best": None,
        "continual": {
            "domains": list(sequence),
            "matrix": [[None if value is None or math.isnan(value) else value for value in row] for row in matrix],
            "before": column(before),
            "missing": missing,
            **found,
        },
    }


def _averaged(row: _Row, names: Sequence[str]) -> _Metrics:
    """Means over domains under the metrics' own names, and each domain's as ``metric/domain``; of those with data."""
    known = {name: found for name, found in zip(names, row, strict=True) if found is not None}
    keys = next(iter(known.values()), {})
    means = {key: sum(found[key] for found in known.values()) / len(known) for key in keys}
    return means | {f"{key}/{name}": value for name, found in known.items() for key, value in found.items()}


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
