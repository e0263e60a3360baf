"""The command line: one function a command. A user's mistake ends in one message and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsetrain import allocation, criteria, patterns, schedules
from sparsetrain import callbacks as methods
from sparsetrain.commands import (
    ABOUT,
    EXAMPLES,
    barrier_arguments,
    command_parser,
    export_arguments,
    predict_arguments,
    prune_arguments,
    recipe_arguments,
    run_arguments,
    sensitivity_arguments,
)
from sparsetrain.errors import RecipeError, SparsetrainError, nearest


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (a promise is broken) or 2 (a user's mistake)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _dispatch(arguments)
    except SparsetrainError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        code = 2
    except KeyboardInterrupt:
        print(
            "interrupted; a run goes on with --ckpt_path last, a scan or prediction when it is started again", file=sys.stderr
        )
        code = 130
    except Exception as error:
        if os.environ.get("SPARSETRAIN_TRACEBACK"):
            raise
        message = f"{type(error).__name__}: {error}"
        hint = "Run again with SPARSETRAIN_TRACEBACK=1 to see where it comes from"
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            Text.assemble(("error: ", "bold red"), f"{message}. {hint}")
        )
        code = 2
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "plan": _plan,
        "verify": _verify,
        "report": _report,
        "list": _list,
        "record": _record,
        "sensitivity": _sensitivity,
        "predict": _predict,
        "prune": _prune,
        "barrier": _barrier,
        "export": _export,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"sparsetrain {version('sparsetrain')}")
        return 0
    if arguments[0] not in commands:
        raise RecipeError(
            f"command {arguments[0]!r} is unknown; known are {', '.join(commands)}.{nearest(arguments[0], commands)}"
        )
    return commands[arguments[0]](arguments[1:])


def _overview() -> str:
    lines = [
        "usage: sparsetrain COMMAND ...",
        "",
        "Training-time sparsity: masks that hold through every optimizer step.",
        "",
    ]
    lines += [f"  {name:<11} {text}" for name, text in ABOUT.items()]
    return "\n".join([*lines, "", "Each command answers --help. Example:", f"  {EXAMPLES['run']}"])


def _keys(command: str) -> int:
    from sparsetrain.recipe import recipe_parser

    recipe_parser(f"sparsetrain {command}").print_help()
    return 0


def _run(arguments: list[str]) -> int:
    known, overrides = recipe_arguments("run", arguments, "runs/<recipe>", run_arguments)
    if known.keys:
        return _keys("run")
    from lightning.pytorch.utilities import rank_zero_only

    from sparsetrain.recipe import load_recipe, recipe_parser, run
    from sparsetrain.report import result_table

    if any(text.startswith("--print_config") for text in overrides):
        config = load_recipe(known.recipe, [text for text in overrides if not text.startswith("--print_config")])
        print(recipe_parser().dump(config, skip_unset=False), end="")
        return 0
    command = " ".join(["sparsetrain run", *arguments])
    metrics = run(known.recipe, overrides, known.out, known.ckpt_path, command)
    out = known.out or Path("runs") / known.recipe.stem
    # With several processes each one gets here; one speaks.
    console = Console(quiet=getattr(rank_zero_only, "rank", 0) != 0)
    console.print(result_table(metrics))
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
    return 0 if metrics["verified"] else 1


def _plan(arguments: list[str]) -> int:
    known, overrides = recipe_arguments("plan", arguments, "none without it")
    if known.keys:
        return _keys("plan")
    from sparsetrain.recipe import plan
    from sparsetrain.report import plot_sparsity_curve
    from sparsetrain.report.plan import print_plan

    found = plan(known.recipe, overrides)
    print_plan(asdict(found), Console())
    if known.out is not None and found.curve and found.clock.total_steps:
        known.out.mkdir(parents=True, exist_ok=True)
        picture = known.out / "plan.png"
        plot_sparsity_curve(found.curve, found.clock.total_steps, picture, known.recipe.stem)
        print(f"plot: {picture}")
    return 2 if found.problems else 0


def _verify(arguments: list[str]) -> int:
    parser = command_parser("verify")
    parser.add_argument("path", type=Path, metavar="CKPT_OR_DIR")
    parser.add_argument("--pattern", help="what the zeros of a checkpoint without masks are meant to be: 2:4, unstructured")
    known = parser.parse_args(arguments)
    from sparsetrain.recipe import inspect_checkpoint
    from sparsetrain.report import layer_table

    found = inspect_checkpoint(known.path, known.pattern)
    console = Console()
    console.print(layer_table([asdict(row) | {"ok": row.ok} for row in found.rows]))
    if found.ok:
        console.print(Text(f"verified: {len(found.rows)} tensors, sparsity {found.sparsity:.4f}, every promise holds", "green"))
        return 0
    for problem in found.problems:
        console.print(Text(f"broken: {problem}", "bold red"))
    return 1


def _report(arguments: list[str]) -> int:
    parser = command_parser("report")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    known = parser.parse_args(arguments)
    from sparsetrain.report import write_report

    print(f"report: {write_report(known.run_dir)}")
    return 0


def _list(arguments: list[str]) -> int:
    parser = command_parser("list")
    parser.add_argument("what", nargs="?", metavar="WHAT", help="criteria, patterns, schedules, allocations, methods, recipes")
    known = parser.parse_args(arguments)
    rooms = {
        "criteria": {name: _first_line(kind) for name, kind in criteria.NAMES.items()},
        "patterns": patterns.NAMES,
        "schedules": {kind.__name__: _first_line(kind) for kind in schedules.NAMES.values()},
        "allocations": {name: _first_line(kind) for name, kind in allocation.NAMES.items()}
        | {f"{name}:FILE": _first_line(kind) for name, kind in allocation.FROM_FILE.items()},
        "methods": {name: _first_line(kind) for name, kind in methods.NAMES.items()},
        "recipes": _recipes(),
    }
    if known.what is not None and known.what not in rooms:
        raise RecipeError(f"there are no {known.what!r} to list; known are {', '.join(rooms)}.{nearest(known.what, rooms)}")
    console = Console()
    for title, entries in rooms.items():
        if known.what not in (None, title):
            continue
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="bold")
        table.add_column()
        for name, text in entries.items():
            table.add_row(name, Text(text))
        console.print(table)
    return 0


def _record(arguments: list[str]) -> int:
    parser = command_parser("record")
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/record"), help="where the runs go; finished ones are kept")
    parser.add_argument(
        "--results", type=Path, default=Path("recipes/results"), help="where NAME.json is written (recipes/results)"
    )
    known = parser.parse_args(arguments)
    from sparsetrain.recipe.record import record

    print(f"recorded: {record(known.experiment, known.jobs, known.work, known.results)}")
    return 0


def _sensitivity(arguments: list[str]) -> int:
    known, overrides = recipe_arguments("sensitivity", arguments, "runs/<recipe>-sensitivity", sensitivity_arguments)
    if known.keys:
        return _keys("sensitivity")
    from sparsetrain.recipe.sensitivity import sensitivity
    from sparsetrain.report.sensitivity import scan_tables

    options = {"batches": known.batches, "units": known.units, "parameters": known.parameters}
    found, data, picture = sensitivity(known.recipe, overrides, known.out, **options)
    for table in scan_tables(asdict(found)):
        Console().print(table)
    print(f"scan: {data}\nplot: {picture}")
    return 0


def _predict(arguments: list[str]) -> int:
    known, overrides = recipe_arguments("predict", arguments, "runs/<recipe>-predict", predict_arguments)
    if known.keys:
        return _keys("predict")
    from sparsetrain.recipe.predict import predict
    from sparsetrain.report.sensitivity import prediction_table

    options = {"samples": known.samples, "steps": known.steps, "batches": known.batches}
    found, data, picture = predict(known.recipe, overrides, known.out, known.budget, **options)
    Console().print(prediction_table(found))
    print(f"allocation: {data}\nplot: {picture}")
    return 0


def _prune(arguments: list[str]) -> int:
    parser = command_parser("prune")
    prune_arguments(parser)
    known = vars(parser.parse_args(arguments))
    from sparsetrain.oneshot import Streaming
    from sparsetrain.recipe.prune import Prune, prune_model
    from sparsetrain.report.tables import pruned_table

    out, work, overwrite = (known.pop(name) for name in ("out", "work", "overwrite"))
    streaming = Streaming(**{name: known.pop(name) for name in ("batch", "dtype", "offload")})
    lists: dict[str, Any] = {name: tuple(known.pop(name)) for name in ("include", "exclude")}
    found = prune_model(Prune(**known, **lists, streaming=streaming), out, work, overwrite)
    Console().print(pruned_table(found))
    print(f"model: {out}")
    return 0


def _export(arguments: list[str]) -> int:
    parser = command_parser("export")
    export_arguments(parser)
    known = parser.parse_args(arguments)
    from sparsetrain.recipe.export import export_run

    found = export_run(known.run_dir, known.out, known.fast, known.overwrite)
    print(f"{found.parameters:,} parameters, {found.nonzero:,} of them not zero")
    for note in found.notes:
        print(note)
    print(f"exported: {found.folder}\nload it: {found.load}")
    return 0


def _barrier(arguments: list[str]) -> int:
    parser = command_parser("barrier")
    barrier_arguments(parser)
    known = parser.parse_args(arguments)
    from sparsetrain.recipe.connectivity import between

    between(known.run_a, known.run_b, known.out, known.points)
    return 0


def _first_line(item: object) -> str:
    return (item.__doc__ or "").strip().splitlines()[0].replace("``", "").split(" Example:")[0]


def _recipes() -> dict[str, str]:
    from sparsetrain.recipe import header

    found = sorted(Path("recipes").glob("*.yaml"))
    return {str(path): header(path).get("question", "") for path in found} or {"recipes/": "no recipes in this folder"}


if __name__ == "__main__":
    main()
