"""What a recipe may say: keys, types, overrides from the command line, and errors a person can act on.

jsonargparse does the parsing and typing. This module adds the schema, reads ``2:4`` as text (YAML 1.1 reads it as a number in
base 60), and turns jsonargparse's nested messages into one line with the nearest known name.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import nn

import sparsetrain.criteria
import sparsetrain.data
import sparsetrain.schedules
import sparsetrain.tasks
from sparsetrain.callbacks import SparsityCallback
from sparsetrain.errors import RecipeError, nearest

#: What the run itself sets up, so that a recipe cannot set it twice.
_OURS = {"callbacks", "logger", "plugins", "default_root_dir", "fast_dev_run", "enable_checkpointing", "barebones"}


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 numbers: no base 60, so that 2:4 is text; 1e-3 is a number."""


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag.rsplit(":", 1)[1] not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?((\d[\d_]*)?\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*\.?([eE][-+]?\d+)|\d[\d_]*\.|\.inf|\.nan)$", re.IGNORECASE
    ),
    list("-+0123456789."),
)
set_loader("recipe", lambda text: yaml.load(text, _RecipeLoader))


def recipe_parser(prog: str = "sparsetrain run", description: str | None = None) -> ArgumentParser:
    """The parser of recipes: ``--config`` files first, then ``--any.key value`` on top."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, parser_mode="recipe")
    parser.add_argument("--config", action="config", help="a recipe; later files and options override earlier ones")
    parser.add_argument("--question", type=str | None, default=None, help="what the run is to answer; heads the report")
    parser.add_argument("--seed", type=int, default=0, help="seeds weights, data order and masks")
    parser.add_argument("--model", type=nn.Module, help="a LightningModule by class_path and init_args", required=True)
    parser.add_argument("--data", type=LightningDataModule | None, default=None, help="a LightningDataModule")
    parser.add_argument(
        "--method", type=SparsityCallback | None, default=None, help="what makes it sparse; null trains dense"
    )
    parser.add_argument("--callbacks", type=list[Callback], default=[], help="further Lightning callbacks (EMA, ...)")
    parser.add_argument(
        "--init_from", type=str | None, default=None, help="start from these weights: a checkpoint or run"
    )
    parser.add_argument("--dense_twin", type=bool, default=False, help="train the same recipe without the method too")
    parser.add_argument(
        "--checkpoint_every", type=str, default="1ep", help="how often last.ckpt is written: 1ep, 500st"
    )
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=set(_OURS))
    return parser


def load_recipe(path: Path | str, overrides: Sequence[str] = (), parser: ArgumentParser | None = None) -> Namespace:
    """Parse a recipe file and overrides such as ``["--method.sparsity", "0.8"]``; raises `RecipeError` in one line."""
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise RecipeError(f"recipe {str(path)!r} is no file.{nearest(path.name, near)}")
    parser = parser or recipe_parser()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parser.parse_args(["--config", str(path), *overrides])
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no text file: {error}") from error
    except (ArgumentError, TypeError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: {explain(str(error), parser)}") from error


def explain(message: str, parser: ArgumentParser) -> str:
    """One line from jsonargparse's nested message: where, what was given, and the nearest name for a misspelt key."""
    where = re.findall(r'[Pp]arser key "([^"]+)"', message)
    classes = re.findall(r"Problem with given class_path '([^']+)'", message)
    prefix = ".".join(where)
    unknown = re.search(r"(?:[Oo]ption|does not accept option) '([^']+)'", message)
    unknown = unknown or re.search(r"unrecognized arguments: --([\w.]+)", message)
    if unknown:
        word = unknown[1]
        known = _options(classes[-1]) if classes else _top_keys(parser, message)
        leaf = word.rsplit(".", 1)[-1]
        hint = nearest(word, known) or nearest(leaf, {key.rsplit(".", 1)[-1] for key in known})
        listing = "" if hint else f" Known are {', '.join(sorted(known)[:20])}."
        return f"unknown key {word!r}{f' in {prefix}' if prefix else ''}.{hint}{listing}"
    if missing := re.search(r"[Kk]ey \"([^\"]+)\" is required|[Oo]ption '([^']+)' is required", message):
        return f"key {(missing[1] or missing[2])!r} is required and missing"
    given = re.findall(r"Given value: (.+)", message)
    if imported := re.search(r"Expected a dot import path string: (\S+)", message):
        hint = nearest(imported[1], _class_names())
        return (
            f"{prefix or 'a key'}: class {imported[1]!r} is not known; write its full path, package.module.Class.{hint}"
        )
    expected = list(dict.fromkeys(re.findall(r"Expected an? <class '([^']+)'>", message)))
    if given and expected:
        kinds = " or ".join("null" if kind == "NoneType" else kind for kind in expected)
        return f"{prefix}: {given[0].strip()} is not {kinds}"
    return " ".join(message.split())


def _options(class_path: str) -> set[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return set(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return set()


def _top_keys(parser: ArgumentParser, message: str) -> set[str]:
    keys = {action.dest for action in parser._actions if action.dest and action.dest != "help"}
    group = re.search(r"Group '([^']+)'", message)
    return {key.removeprefix(f"{group[1]}.") for key in keys if key.startswith(f"{group[1]}.")} if group else keys


def _class_names() -> set[str]:
    known: set[str] = set()
    for base in (
        SparsityCallback,
        sparsetrain.schedules.Schedule,
        sparsetrain.criteria.Criterion,
        LightningDataModule,
        nn.Module,
    ):
        stack: list[Any] = [base]
        while stack:
            kind = stack.pop()
            known.add(kind.__name__)
            stack.extend(kind.__subclasses__())
    return known


def header(path: Path) -> dict[str, str]:
    """The head of a recipe file: its ``# key: value`` comment lines (question, command, expected, minutes)."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        key, colon, value = line.lstrip("# ").partition(":")
        if colon and key.islower():
            found[key.strip()] = value.strip()
    return found
