"""What a recipe may say: keys, types, overrides from the command line, and errors a person can act on.

jsonargparse does the parsing and typing. This module adds the schema, reads ``2:4`` as text (YAML 1.1 reads it as a number in
base 60), and turns jsonargparse's nested messages into one line with the nearest known name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import nn

# Short class names work for what is imported.
import sparsetrain.data
import sparsetrain.tasks  # noqa: F401
from sparsetrain.callbacks import SparsityCallback
from sparsetrain.data.tokens import find_model
from sparsetrain.errors import RecipeError, nearest
from sparsetrain.recipe.explain import explain

#: What the run itself sets up, so that a recipe cannot set it twice.
_OURS = {"callbacks", "logger", "plugins", "default_root_dir", "fast_dev_run", "enable_checkpointing", "barebones"}


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 numbers: no base 60, so that 2:4 is text; 1e-3 is a number."""


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag.rsplit(":", 1)[1] not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?((\d[\d_]*)?\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*\.?([eE][-+]?\d+)|\d[\d_]*\.|\.inf|\.nan)$", re.IGNORECASE
    ),
    list("-+0123456789."),
)
# jsonargparse hands a nested override of null on as the text None.
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^None$"), ["N"])


def parse_yaml(text: str) -> Any:
    """YAML text by the rules of recipes. Example: ``parse_yaml("pattern: 2:4") == {"pattern": "2:4"}``."""
    return yaml.load(text, _RecipeLoader)


set_loader("recipe", parse_yaml)


@cache
def recipe_parser(prog: str = "sparsetrain run", description: str | None = None) -> ArgumentParser:
    """The parser of recipes: ``--config`` files first, then ``--any.key value`` on top."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False, parser_mode="recipe")
    parser.add_argument("--config", action="config", help="a recipe; later files and options override earlier ones")
    parser.add_argument("--question", type=str | None, default=None, help="what the run is to answer; heads the report")
    parser.add_argument("--seed", type=int, default=0, help="seeds weights, data order and masks")
    parser.add_argument("--model", type=nn.Module, help="a LightningModule by class_path and init_args", required=True)
    parser.add_argument("--data", type=LightningDataModule | None, default=None, help="a LightningDataModule")
    parser.add_argument("--method", type=SparsityCallback | None, default=None, help="what makes it sparse; null trains dense")
    parser.add_argument("--callbacks", type=list[Callback], default=[], help="further Lightning callbacks (EMA, ...)")
    parser.add_argument(
        "--init_from",
        type=str | None,
        default=None,
        help="start from these weights: a checkpoint, a run, $SPARSETRAIN_DATA/models/NAME",
    )
    parser.add_argument("--dense_twin", type=bool, default=False, help="train the same recipe without the method too")
    parser.add_argument(
        "--references", type=bool, default=False, help="prune each domain for itself, and all at once, too (ContinualPruning)"
    )
    parser.add_argument("--checkpoint_every", type=str, default="1ep", help="how often last.ckpt is written: 1ep, 500st")
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=set(_OURS))
    integers_first(parser)
    return parser


def integers_first(parser: ArgumentParser) -> None:
    """Try int before float wherever both are allowed, so that 1 stays 1: to Lightning one batch, where 1.0 is all of them.

    The order written down is not reliable: ``typing`` caches unions without regard to it, so that it depends on imports.
    """
    for action in parser._actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if int in kinds and float in kinds:
            rest = tuple(kind for kind in kinds if kind is not int)
            action._typehint = Union[(int, *rest)]  # type: ignore[attr-defined]


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """Read a YAML file that must hold keys, by the rules of recipes. Raises `RecipeError` in one line."""
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise RecipeError(f"{what} {str(path)!r} is no file.{nearest(path.name, near)}")
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no text file ({error}); give a {what} in YAML") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        kind = "nothing" if found is None else f"a {type(found).__name__}"
        raise RecipeError(f"{path} holds {kind}; a {what} is keys and values, see recipes/quickstart.yaml")
    return found


def load_recipe(path: Path | str, overrides: Sequence[str] = (), parser: ArgumentParser | None = None) -> Namespace:
    """Parse a recipe file and overrides such as ``["--method.sparsity", "0.8"]``; raises `RecipeError` in one line.

    Example: ``load_recipe("recipes/quickstart.yaml", ["--seed", "1"]).seed``.
    """
    path = Path(path)
    read_yaml(path)
    parser = parser or recipe_parser()
    try:
        return _parse(parser, path, overrides)
    except _ERRORS as error:
        blamed, cause = str(path), error
    if overrides:
        # Of file and overrides: who is to blame?
        try:
            _parse(parser, path, ())
        except _ERRORS as error:
            cause = error
        else:
            blamed = "command line"
    raise RecipeError(f"{blamed}: {explain(str(cause), parser)}") from cause


_ERRORS = (ArgumentError, TypeError, ValueError, yaml.YAMLError)


def _parse(parser: ArgumentParser, path: Path, overrides: Sequence[str]) -> Namespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = parser.parse_args(["--config", str(path), *overrides])
    if config.get("init_from") is not None:
        config.init_from = find_model(config.init_from)
    return config


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
