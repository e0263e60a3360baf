"""What the command line knows of its commands before any work is done: names, one line each, examples, arguments."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path

from sparsetrain.errors import RecipeError

EXAMPLES = {
    "run": "sparsetrain run recipes/quickstart.yaml --method.sparsity 0.95 --out runs/first",
    "plan": "sparsetrain plan recipes/quickstart.yaml --method.sparsity 0.98",
    "verify": "sparsetrain verify runs/first",
    "report": "sparsetrain report runs/first",
    "export": "sparsetrain export runs/first --out shipped",
    "list": "sparsetrain list schedules",
    "record": "sparsetrain record recipes/experiments/digits_criteria.yaml --jobs 2",
    "sensitivity": "sparsetrain sensitivity recipes/quickstart.yaml --units --parameters 64 --out runs/quickstart-sensitivity",
    "barrier": "sparsetrain barrier runs/seed0 runs/seed1 --out runs/barrier",
    "prune": "sparsetrain prune path/to/model --data shakespeare --pattern 2:4 --criterion sparsegpt --out pruned",
    "predict": "sparsetrain predict recipes/quickstart.yaml --budget 0.98 --samples 40 --steps 200 --out runs/predicted",
}
ABOUT = {
    "run": "Train a recipe: OUT gets config.yaml, metrics.json, masks.safetensors, checkpoints/ and report.html.",
    "plan": "Dry-run a recipe against the real model on the meta device: what would be pruned, when, and what cannot work.",
    "verify": "Check a checkpoint or a run directory: every mask against its pattern and its weights.",
    "report": "Write report.html of a run directory anew.",
    "export": "Write the network of a run for use elsewhere: a from_pretrained folder, a compact model, the fastest formats.",
    "list": "What a recipe can name: criteria, patterns, schedules, allocations, methods, recipes.",
    "record": "Run an experiment (a recipe over seeds) and write its numbers to recipes/results/.",
    "sensitivity": "Prune each target alone and measure the loss: which layers can go, as a table, a heat map and a file.",
    "barrier": "Walk the straight line between the weights of two runs: is there a hill of error between them?",
    "prune": "Prune a language model once, block by block on a little text, into a folder that stock transformers loads.",
    "predict": "Learn from measured allocations which one keeps the most at a budget, and write it for `allocation: fixed`.",
}
EXTRA = (
    "Any key of the recipe can be overridden: --seed 1, --method.sparsity 0.9, --trainer.max_epochs 5, --data.batch_size 64. "
    "--print_config prints the resolved recipe; --keys lists every key with its type; --method.help CLASS explains a class."
)


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are `RecipeError`."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise instead of exiting."""
        raise RecipeError(f"{self.prog}: {message}; see {self.prog} --help")


def command_parser(command: str, more: str = "") -> Parser:
    """The parser of a command, with its example. Example: ``command_parser("verify").add_argument("path")``."""
    return Parser(
        prog=f"sparsetrain {command}",
        description=ABOUT[command],
        epilog=f"{more}\n\nexample:\n  {EXAMPLES[command]}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def recipe_arguments(
    command: str, arguments: list[str], out: str, add: Callable[[Parser], object] = lambda parser: None
) -> tuple[argparse.Namespace, list[str]]:
    """A recipe, ``--out``, ``--keys``, what ``add`` adds, and the overrides that are left.

    Example: ``recipe_arguments("plan", ["recipe.yaml", "--seed", "1"], "none without it")``.
    """
    parser = command_parser(command, textwrap.fill(EXTRA, 100))
    parser.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE.yaml")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where files go ({out})")
    add(parser)
    parser.add_argument("--keys", action="store_true", help="list every key of a recipe")
    known, overrides = parser.parse_known_args(arguments)
    if known.keys:
        return known, overrides
    if known.recipe is None or not arguments or arguments[0].startswith("-"):
        parser.error("the recipe comes first, options after it")
    elif overrides and not overrides[0].startswith("-"):
        parser.error(f"unexpected argument {overrides[0]!r}: overrides are written --key value")
    return known, overrides


def measuring_arguments(parser: Parser) -> None:
    """What commands take that measure a trained model."""
    parser.add_argument("--batches", type=int, metavar="N", help="measure on the first N batches only")


def sensitivity_arguments(parser: Parser) -> None:
    """Those of ``sensitivity``."""
    measuring_arguments(parser)
    parser.add_argument("--units", action="store_true", help="prune whole neurons and filters of each tensor too")
    parser.add_argument(
        "--parameters", type=int, default=0, metavar="N", help="compare N single weights of each tensor with their derivatives"
    )


def predict_arguments(parser: Parser) -> None:
    """Those of ``predict``."""
    measuring_arguments(parser)
    parser.add_argument("--budget", type=float, metavar="S", help="sparsity over all targets (the method's, if not given)")
    parser.add_argument("--samples", type=int, default=40, metavar="N", help="allocations that are measured to learn from (40)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="recovery training of each, in steps (200)")


def run_arguments(parser: Parser) -> None:
    """Those of ``run``."""
    parser.add_argument("--ckpt_path", metavar="CKPT", help="go on from a checkpoint, or from this run's own: last")


def barrier_arguments(parser: Parser) -> None:
    """Those of ``barrier``."""
    for name in ("run_a", "run_b"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="a directory that `sparsetrain run` wrote")
    parser.add_argument("--points", type=int, default=11, metavar="N", help="points on the line, both ends included (11)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where barrier.json and barrier.png go (none without it)")


def export_arguments(parser: Parser) -> None:
    """Those of ``export``."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a directory that `sparsetrain run` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the network goes")
    parser.add_argument("--fast", action="store_true", help="every layer in the format that is fastest here, measured")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")


def prune_arguments(parser: Parser) -> None:
    """Those of ``prune``."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder that from_pretrained reads, or a name on the hub")
    add("--data", required=True, metavar="TEXT", help="text to calibrate on: an embedded corpus, a file, a folder, a data set")
    add("--out", type=Path, required=True, metavar="DIR", help="where the pruned model goes")
    add("--pattern", help="2:4, 4:8, unstructured, unstructured:row (wanda's and ria's own), block:16x16, ...")
    add("--sparsity", type=float, metavar="S", help="fraction of zeros over the targets; N:M patterns have only one")
    add("--criterion", default="wanda", help="wanda, ria, sparsegpt, magnitude (wanda)")
    add("--allocation", default="uniform", help="uniform, owl, erk, ... (uniform)")
    add("--tokenizer", help="a folder or name (the model's own)")
    for name, default, text in (
        ("samples", 128, "windows of text that are looked at"),
        ("window", 256, "tokens in a window"),
        ("seed", 0, "which windows"),
        ("evaluate", 64, "windows of validation text for the perplexity before and after; 0 for none"),
        ("batch", 4, "windows in a forward pass"),
    ):
        add(f"--{name}", type=int, default=default, metavar="N", help=f"{text} ({default})")
    add("--dtype", default="float32", help="type the blocks run in: bfloat16, float16, float32 (float32)")
    add(
        "--weights",
        default="auto",
        metavar="DTYPE",
        help="type of what is written: float32, bfloat16, float16 (the model's own)",
    )
    add("--offload", help="where hidden states wait: cpu, disk (the model's device)")
    for name in ("include", "exclude"):
        add(f"--{name}", action="append", default=[], metavar="REGEX", help=f"tensors to {name}, by name; may be repeated")
    add("--work", type=Path, metavar="DIR", help="keep finished blocks here, to go on after a kill")
    add("--overwrite", action="store_true", help="replace what is in OUT")
