"""The command line: run, plan, verify, report, list, record. A user's mistake ends in one message and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsetrain import allocation, criteria, patterns, schedules
from sparsetrain import callbacks as methods
from sparsetrain.errors import RecipeError, SparsetrainError, nearest

EXAMPLES = {
    "run": "sparsetrain run recipes/quickstart.yaml --method.sparsity 0.95 --out runs/first",
    "plan": "sparsetrain plan recipes/quickstart.yaml --method.sparsity 0.98",
    "verify": "sparsetrain verify runs/first",
    "report": "sparsetrain report runs/first",
    "list": "sparsetrain list schedules",
    "record": "sparsetrain record recipes/experiments/mnist_prune_finetune.yaml --jobs 2",
}
ABOUT = {
    "run": "Train a recipe: OUT gets config.yaml, metrics.json, masks.safetensors, checkpoints/ and report.html.",
    "plan": "Dry-run a recipe against the real model on the meta device: what would be pruned, when, and what cannot work.",
    "verify": "Check a checkpoint or a run directory: every mask against its pattern and its weights.",
    "report": "Write report.html of a run directory anew.",
    "list": "What a recipe can name: criteria, patterns, schedules, allocations, methods, recipes.",
    "record": "Run an experiment (a recipe over seeds) and write its numbers to recipes/results/.",
}
_EXTRA = (
    "Any key of the recipe can be overridden: --seed 1, --method.sparsity 0.9, --trainer.max_epochs 5, --data.batch_size 64. "
    "--print_config prints the resolved recipe; --keys lists every key with its type; --method.help CLASS explains a class."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (a promise is broken) or 2 (a user's mistake)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _dispatch(arguments)
    except SparsetrainError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        code = 2
    except KeyboardInterrupt:
        print("interrupted; a run goes on with --ckpt_path last", file=sys.stderr)
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
    lines += [f"  {name:<8} {text}" for name, text in ABOUT.items()]
    return "\n".join([*lines, "", "Each command answers --help. Example:", f"  {EXAMPLES['run']}"])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise RecipeError(f"{self.prog}: {message}; see {self.prog} --help")


def _parser(command: str, more: str = "") -> _Parser:
    return _Parser(
        prog=f"sparsetrain {command}",
        description=ABOUT[command],
        epilog=f"{more}\n\nexample:\n  {EXAMPLES[command]}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _recipe_arguments(command: str, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    import textwrap

    parser = _parser(command, textwrap.fill(_EXTRA, 100))
    parser.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE.yaml")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where files go (run: runs/<recipe>; plan: none without it)")
    if command == "run":
        parser.add_argument("--ckpt_path", metavar="CKPT", help="go on from a checkpoint, or from this run's own: last")
    parser.add_argument("--keys", action="store_true", help="list every key of a recipe")
    known, overrides = parser.parse_known_args(arguments)
    if known.keys:
        from sparsetrain.recipe import recipe_parser

        recipe_parser(f"sparsetrain {command}").print_help()
    elif known.recipe is None or not arguments or arguments[0].startswith("-"):
        parser.error("the recipe comes first, options after it")
    elif overrides and not overrides[0].startswith("-"):
        parser.error(f"unexpected argument {overrides[0]!r}: overrides are written --key value")
    return known, overrides


def _run(arguments: list[str]) -> int:
    known, overrides = _recipe_arguments("run", arguments)
    if known.keys:
        return 0
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
    known, overrides = _recipe_arguments("plan", arguments)
    if known.keys:
        return 0
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
    parser = _parser("verify")
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
    parser = _parser("report")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    known = parser.parse_args(arguments)
    from sparsetrain.report import write_report

    print(f"report: {write_report(known.run_dir)}")
    return 0


def _list(arguments: list[str]) -> int:
    parser = _parser("list")
    parser.add_argument("what", nargs="?", metavar="WHAT", help="criteria, patterns, schedules, allocations, methods, recipes")
    known = parser.parse_args(arguments)
    rooms = {
        "criteria": {name: _first_line(kind) for name, kind in criteria.NAMES.items()},
        "patterns": patterns.NAMES,
        "schedules": {kind.__name__: _first_line(kind) for kind in schedules.NAMES.values()},
        "allocations": {name: _first_line(function) for name, function in allocation.NAMES.items()},
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
    parser = _parser("record")
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


def _first_line(item: object) -> str:
    return (item.__doc__ or "").strip().splitlines()[0].replace("``", "")


def _recipes() -> dict[str, str]:
    from sparsetrain.recipe import header

    found = sorted(Path("recipes").glob("*.yaml"))
    return {str(path): header(path).get("question", "") for path in found} or {"recipes/": "no recipes in this folder"}


if __name__ == "__main__":
    main()
