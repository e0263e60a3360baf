"""One line from jsonargparse's nested messages: where, what was given, what was expected, and the nearest known name."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule
from torch import nn

import sparsetrain.criteria
import sparsetrain.data
import sparsetrain.schedules
import sparsetrain.tasks
from sparsetrain.errors import nearest


def explain(message: str, parser: ArgumentParser) -> str:
    """One line: where, what was given, what was expected, and the nearest name for a misspelt key or class."""
    prefix = ".".join(re.findall(r'[Pp]arser key "([^"]+)"', message)) or "the recipe"
    # What matters is the innermost list of alternatives and the first value reported, which is the innermost too.
    errors = message.rsplit("Errors:", 1)[-1]
    given = re.findall(r"(?:Given value|Got value): (.+)", message)
    classes = re.findall(r"class_path[ =]'([^']+)'", errors if "class_path" in errors else message)
    return (
        _unknown_key(message, prefix, classes, parser)
        or _class(message, prefix)
        or _missing(message, prefix, classes)
        or _value(errors, prefix, given[0].strip() if given else "")
        or _plain(message, prefix)
    )


def _unknown_key(message: str, prefix: str, classes: list[str], parser: ArgumentParser) -> str | None:
    unknown = re.search(r"(?:[Oo]ption|does not accept option) '([^']+)'(?! is required)", message)
    unknown = unknown or re.search(r"unrecognized arguments: --([\w.-]+)", message)
    if unknown is None:
        return None
    known = _options(classes[-1]) if classes else _top_keys(parser, message)
    leaf = unknown[1].rsplit(".", 1)[-1]
    hint = nearest(unknown[1], known) or nearest(leaf, {key.rsplit(".", 1)[-1] for key in known})
    listing = "" if hint else f" Known are {', '.join(sorted(known)[:20])}."
    where = "" if prefix == "the recipe" else f" in {prefix}"
    return f"unknown key {unknown[1]!r}{where}.{hint}{listing}"


def _class(message: str, prefix: str) -> str | None:
    found = re.search(r"Expected a dot import path string: ([^\s.]+)", message)
    if found and "Literal" not in message:
        hint = nearest(found[1], class_names())
        return f"{prefix}: class {found[1]!r} is not known; write its full path, package.module.Class.{hint}"
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        names = {n for n in dir(importlib.import_module(found[1])) if not n.startswith("_")}
        return f"{prefix}: there is no class {found[2]!r} in {found[1]}.{nearest(found[2], names | class_names())}"
    if found := re.search(r"does not correspond to a subclass of (\w+)", message):
        given = re.search(r"(?:Given value|Got value): '?([\w.]+)", message)
        return f"{prefix}: {given[1] if given else 'the class'} is no {found[1]}"
    if found := re.search(r"No module named '([\w.]+)'", message):
        path = re.search(r"Problem with given class_path '([^']+)'(?!.*class_path)", message, re.DOTALL)
        whole = repr(path[1]) if path else "the class"
        return (
            f"{prefix}: {whole} cannot be imported: no module named {found[1]!r}; install it, or put its folder on PYTHONPATH"
        )
    return None


def _missing(message: str, prefix: str, classes: list[str]) -> str | None:
    if found := re.search(r"[Kk]ey \"([^\"]+)\" is required|[Oo]ption '([^']+)' is required", message):
        return f"key {(found[1] or found[2])!r} is required and missing"
    if found := re.search(r"the following arguments are required: ([\w, ]+)", message):
        if prefix == "the recipe":
            return f"key {found[1]!r} is required and missing"
        whose = f" of {classes[-1]}" if classes else ""
        return f"{prefix}: required arguments{whose} are missing: {found[1]}; add them under init_args"
    return None


def _value(errors: str, prefix: str, given: str) -> str | None:
    expected = re.findall(r"Expected an? <class '([^']+)'>", errors)
    choices = re.findall(r"'([^']+)'|\b(\d+)\b", " ".join(re.findall(r"typing\.Literal\[([^\]]+)\]", errors)))
    literals = list(dict.fromkeys(text or number for text, number in choices))
    foreign = re.search(r"^\s*- (?!Expected an? (<class|typing\.Literal|dot import))", errors, re.MULTILINE)
    if not given or foreign or not (expected or literals):
        return None
    if literals:
        return f"{prefix}: {given} is none of {', '.join(literals)}.{nearest(given, literals)}"
    kinds = " or ".join("null" if kind == "NoneType" else kind for kind in dict.fromkeys(expected))
    share = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", given)
    hint = f"; write {float(share[1]) / 100:g}" if share and "float" in kinds else ""
    return f"{prefix}: {given} is not {kinds}{hint}"


def _plain(message: str, prefix: str) -> str:
    if stray := re.search(r"unrecognized arguments: (.+)", message):
        return f"unexpected {stray[1]!r}: overrides are written --key value"
    noise = (
        r"[Pp]arser key \"[^\"]+\":?$",
        r"Does not validate against.*",
        r"Subtypes: .*",
        r"Errors:",
        r"Given value.*",
        r"Expected a <class 'None.*",
    )
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    text = " ".join(line for line in lines if line and not any(re.match(pattern, line) for pattern in noise))
    return text if prefix == "the recipe" else f"{prefix}: {text}"


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


def class_names() -> set[str]:
    """Every class a recipe could name by its last part alone."""
    known: set[str] = set()
    stack: list[Any] = [
        Callback,
        sparsetrain.schedules.Schedule,
        sparsetrain.criteria.Criterion,
        LightningDataModule,
        nn.Module,
    ]
    while stack:
        kind = stack.pop()
        known.add(kind.__name__)
        stack.extend(kind.__subclasses__())
    return known
