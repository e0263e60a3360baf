"""The house rules as a walk over the source: who may import whom, budgets, docstrings, nothing left for later.

Imports point one way, from the few rooms that decide down to the pure ones; see `KNOWS`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = "sparsetrain"
ROOT = Path(__file__).parent.parent / PACKAGE

#: Room -> the other rooms it may import. Whoever adds a room says here whom it knows.
KNOWS = {
    "errors": "",
    "selection": "errors",
    "penalties": "errors",
    "schedules": "errors",
    "patterns": "errors selection",
    "criteria": "errors selection patterns",
    "allocation": "errors selection patterns",
    "regrowth": "errors selection patterns",
    "nm": "errors selection patterns",
    "connectivity": "errors",
    "depth": "errors",
    "targets": "errors patterns",
    "masks": "errors selection patterns targets",
    "pruning": "errors patterns targets criteria allocation masks",
    "calibration": "errors criteria masks",
    "oneshot": "errors patterns targets criteria allocation masks pruning calibration",
    "continual": "errors patterns criteria allocation masks pruning calibration oneshot",
    "incremental": "errors selection patterns targets masks nm",
    "checkpoints": "errors targets",
    "distillation": "errors",
    "writing": "errors",
    "nn": "errors masks penalties writing",
    "export": "errors targets structure writing",
    "structure": "errors patterns targets masks calibration",
    "sensitivity": "errors patterns criteria allocation masks pruning",
    "predictor": "errors patterns allocation",
    "callbacks": "errors selection patterns targets schedules criteria allocation masks pruning calibration regrowth nm depth "
    "oneshot continual incremental checkpoints distillation nn structure penalties",
    "tasks": "errors data",
    "data": "errors",
    "report": "errors masks",
    "__init__": "errors patterns targets schedules criteria allocation masks pruning callbacks tasks data report "
    "calibration sensitivity predictor connectivity depth oneshot continual",
    "recipe": "errors patterns targets schedules criteria allocation masks pruning callbacks tasks data report "
    "calibration sensitivity predictor connectivity depth oneshot continual checkpoints structure export",
    "commands": "errors",
    "cli": "commands errors patterns targets schedules criteria allocation masks pruning callbacks tasks data report recipe "
    "calibration sensitivity predictor connectivity depth oneshot",
    "__main__": "cli",
}
LIGHTNING = {"callbacks", "tasks", "data", "recipe", "cli"}
#: What callbacks are made from, and may therefore import.
BASES = ("base", "structured", "task_order")

FILE_LINES, FUNCTION_LINES, ARGUMENTS = 300, 60, 8
LATER = re.compile(r"\b(NotImplementedError|TODO|FIXME)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_of(path: str) -> list[str]:
    parts = path.removesuffix(".py").split("/")
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts


def imported(tree: ast.Module, path: str) -> Iterator[tuple[int, list[str]]]:
    """Line and dotted name of every import, wherever it stands; relative ones are resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.split("/")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, [*base, alias.name]) for alias in node.names)


def is_callback_module(source: str) -> bool:
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return any(ast.unparse(base).endswith(("Callback", "TaskMethod")) for node in classes for base in node.bases)


def import_problems(path: str, tree: ast.Module, sources: dict[str, str]) -> Iterator[str]:
    module = module_of(path)
    room = module[1]
    if room not in KNOWS:
        yield f"{path}: room {room!r} has no rule; say in KNOWS which rooms it may import"
        return
    for line, name in imported(tree, path):
        where = f"{path}:{line}"
        if name[0] in ("lightning", "pytorch_lightning", "lightning_fabric") and room not in LIGHTNING:
            yield f"{where}: {room} imports lightning"
        if name[0] != PACKAGE:
            continue
        if len(name) < 2 or name[1] not in KNOWS:
            yield f"{where}: {room} imports {'.'.join(name)}; import from the room that has it, not from the package"
        elif name[1] != room and name[1] not in KNOWS[room].split():
            yield f"{where}: {room} may not know {name[1]}"
        elif name[1] == room == "callbacks" and not path.endswith("__init__.py"):
            other = f"{PACKAGE}/callbacks/{name[2]}.py"
            if other not in sources or (name[2] not in BASES and is_callback_module(sources[other])):
                yield f"{where}: a callback knows no other callback, only {' and '.join(BASES)}: {'.'.join(name)}"


def constructor_arguments(node: ast.ClassDef) -> int:
    """Arguments of ``__init__``; a record (a dataclass without one) may have as many fields as it has facts."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            given = item.args
            return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - 1
    return 0


def budget_problems(path: str, source: str, tree: ast.Module) -> Iterator[str]:
    lines = source.splitlines()
    if len(lines) > FILE_LINES:
        yield f"{path}: {len(lines)} lines, at most {FILE_LINES}"
    for number, text in enumerate(lines, 1):
        if found := LATER.search(text):
            yield f"{path}:{number}: {found[0]}"
    for node in ast.walk(tree):
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}"
        if isinstance(node, ast.ClassDef) and (count := constructor_arguments(node)) > ARGUMENTS:
            yield f"{path}:{node.lineno}: {node.name} takes {count} arguments, at most {ARGUMENTS}"


def docstring_problems(path: str, tree: ast.Module | ast.ClassDef) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield f"{path}: {getattr(tree, 'name', 'the module')} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from docstring_problems(path, node)
        elif isinstance(node, Function) and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"{path}:{node.lineno}: {node.name} has no docstring"


def problems(sources: dict[str, str]) -> list[str]:
    """Everything that breaks a rule, given the package as path -> text."""
    found = []
    for path, source in sources.items():
        tree = ast.parse(source)
        found += import_problems(path, tree, sources)
        found += budget_problems(path, source, tree)
        found += docstring_problems(path, tree)
    return found


def test_the_package_keeps_the_house_rules() -> None:
    sources = {path.relative_to(ROOT.parent).as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.py"))}
    assert len(sources) > 20
    assert problems(sources) == []


def test_the_rules_themselves_point_one_way() -> None:
    assert {other for known in KNOWS.values() for other in known.split()} <= KNOWS.keys()

    def reach(room: str) -> set[str]:
        return {room}.union(*(reach(other) for other in KNOWS[room].split()))

    above = {room for room in KNOWS if reach(room) & {"callbacks", "recipe", "cli"}}
    assert above == {"callbacks", "recipe", "cli", "__init__", "__main__"}  # reach() returning at all: no circle
    assert not reach("report") & LIGHTNING
    assert [room for room, known in KNOWS.items() if "recipe" in known.split()] == ["cli"]


FINE = {
    "sparsetrain/errors.py": '"""Errors."""\n',
    "sparsetrain/patterns/__init__.py": '"""Patterns."""\nfrom sparsetrain.patterns.base import exact\n',
    "sparsetrain/patterns/base.py": '"""Base."""\nfrom sparsetrain.errors import PatternError\nfrom . import base\n',
    "sparsetrain/callbacks/__init__.py": '"""All."""\nfrom sparsetrain.callbacks.one import One\n',
    "sparsetrain/callbacks/base.py": '"""B."""\nfrom sparsetrain.callbacks.tool import f\nclass _B(Callback): ...\n',
    "sparsetrain/callbacks/tool.py": '"""No callback."""\nimport lightning.pytorch as pl\n',
    "sparsetrain/callbacks/one.py": '"""One."""\nfrom sparsetrain.callbacks.base import _B\nclass _One(_B, pl.Callback): ...\n',
    "sparsetrain/callbacks/task_order.py": '"""T."""\nfrom sparsetrain.callbacks.base import _B\nclass _T(_B, Callback): ...\n',
    "sparsetrain/callbacks/two.py": (
        '"""Two."""\nfrom sparsetrain.callbacks.task_order import TaskMethod\nclass _Two(TaskMethod): ...\n'
    ),
}
DOC = '"""Says so."""\n'


def long_function(lines: int) -> str:
    return DOC + 'def f():\n    """F."""\n' + "    x = 1\n" * (lines - 2)


def constructor(arguments: int) -> str:
    return DOC + f"class _A:\n    def __init__(self, {', '.join(f'a{i}' for i in range(arguments))}): ...\n"


@pytest.mark.parametrize(
    ("path", "source", "says"),
    [
        ("patterns/new.py", "from sparsetrain.masks import MaskManager", "patterns may not know masks"),
        ("patterns/new.py", "from sparsetrain import masks", "patterns may not know masks"),
        ("patterns/new.py", "from ..masks import tensor", "patterns may not know masks"),
        ("patterns/new.py", "def _f():\n    import sparsetrain.masks.tensor", "patterns may not know masks"),
        ("patterns/new.py", "if TYPE_CHECKING:\n    from sparsetrain.masks import M", "patterns may not know masks"),
        ("schedules.py", "from sparsetrain.patterns import exact", "schedules may not know patterns"),
        ("masks/new.py", "from sparsetrain.criteria import magnitude", "masks may not know criteria"),
        ("masks/new.py", "import lightning.pytorch as pl", "masks imports lightning"),
        ("report/new.py", "from lightning import Trainer", "report imports lightning"),
        ("callbacks/new.py", "from sparsetrain.callbacks.one import One", "no other callback"),
        ("callbacks/new.py", "from sparsetrain.callbacks import One", "no other callback"),
        ("callbacks/new.py", "from .one import One", "no other callback"),
        ("callbacks/new.py", "from .two import _Two", "no other callback"),
        ("callbacks/new.py", "from sparsetrain.recipe import build", "callbacks may not know recipe"),
        ("report/new.py", "import sparsetrain.recipe", "report may not know recipe"),
        ("recipe/new.py", "from sparsetrain.cli import main", "recipe may not know cli"),
        ("data.py", "from sparsetrain import prune", "import from the room that has it"),
        ("data.py", "import sparsetrain", "import from the room that has it"),
        ("attic.py", "", "room 'attic' has no rule"),
        ("data.py", "# TODO: later", "TODO"),
        ("data.py", "def _f():\n    raise NotImplementedError", "NotImplementedError"),
        ("data.py", "x = 1\n" * 299 + "x = 1", "301 lines, at most 300"),
        ("data.py", long_function(61).removeprefix(DOC), "f has 61 lines, at most 60"),
        ("data.py", constructor(9).removeprefix(DOC), "_A takes 9 arguments"),
        ("data.py", "def f():\n    pass", "f has no docstring"),
        ("data.py", "class A:\n    x = 1", "A has no docstring"),
        ("data.py", 'class A:\n    """A."""\n    def f(self): ...', "f has no docstring"),
    ],
)
def test_a_broken_rule_is_found(path: str, source: str, says: str) -> None:
    assert problems(FINE) == []
    [found] = problems(FINE | {f"sparsetrain/{path}": DOC + source + "\n"})
    assert says in found


def test_a_module_without_docstring_is_found() -> None:
    assert problems({"sparsetrain/data.py": "x = 1\n"}) == ["sparsetrain/data.py: the module has no docstring"]


@pytest.mark.parametrize("build", [lambda: long_function(60), lambda: constructor(8)])
def test_at_the_budget_is_within_it(build: Callable[[], str]) -> None:
    assert problems({"sparsetrain/data.py": build()}) == []
