"""Recorded experiments: check that their claims follow from their numbers, and write them into the README.

``python -m sparsetrain.report.results README.md recipes/results/*.json`` rewrites the block between the markers
``<!-- results:begin -->`` and ``<!-- results:end -->``; with ``--check`` it writes nothing and exits with 1 when the
block is out of date.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from sparsetrain.errors import RecipeError, SparsetrainError

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RESULT_KEYS = ("question", "command", "date", "machine", "versions", "seconds", "rows")
ROW_KEYS = (
    "method", "model", "data", "compression", "sparsity", "pattern", "metric", "higher_is_better", "values", "mean", "sd",
    "published", "source", "goal", "met",
)  # fmt: skip


def load_result(path: Path) -> dict[str, Any]:
    """Return a recorded experiment with every key of its schema present.

    Raises ``RecipeError`` when the file is missing, truncated, or lacks a key of the experiment or of a row.

    Example: ``load_result(Path("recipes/results/digits_gmp.json"))["question"]``.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}. Give the path of a recorded experiment.") from error
    except ValueError as error:
        raise RecipeError(f"{path} is truncated or not JSON ({error}). Record the experiment again.") from error
    if not isinstance(result, dict):
        raise RecipeError(f"{path} holds a {type(result).__name__}, not an object. Record the experiment again.")
    missing = [key for key in RESULT_KEYS if key not in result]
    for index, row in enumerate(result.get("rows") or []):
        missing += [f"rows[{index}].{key}" for key in ROW_KEYS if key not in row]
    if missing:
        raise RecipeError(f"{path} lacks {', '.join(missing)}. Add what is missing; null says 'not known'.")
    return result


def _as_recorded(recorded: float, exact: float) -> bool:
    """Tell whether a recorded number is the exact one rounded to as many digits as were written (two at least)."""
    digits = max(2, -int(Decimal(repr(float(recorded))).normalize().as_tuple().exponent))
    return abs(recorded - exact) <= 0.5 * 10.0**-digits + 1e-9


def _check_row(row: Mapping[str, Any]) -> list[str]:
    values, mean, sd, goal = row["values"], row["mean"], row["sd"], row["goal"]
    if not values or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        return [f"values are {values!r}: give one finite number a seed"]
    problems = []
    exact = statistics.fmean(values)
    if mean is None or not _as_recorded(mean, exact):
        problems.append(f"mean is {mean}, the values give {exact:.6g}")
    spread = statistics.stdev(values) if len(values) > 1 else None
    if spread is None and sd not in (None, 0):
        problems.append(f"sd is {sd}, but one value has none: write null")
    elif spread is not None and (sd is None or not _as_recorded(sd, spread)):
        problems.append(f"sd is {sd}, the values give {spread:.6g} (n - 1 in the denominator)")
    sparsity, compression = row["sparsity"], row["compression"]
    if (sparsity is None) != (compression is None):
        problems.append(f"sparsity is {sparsity} and compression is {compression}: give both or neither")
    elif sparsity is not None and not (0 <= sparsity < 1 and abs(compression * (1 - sparsity) - 1) <= 0.005):
        follows = f"1 / (1 - {sparsity}) = {1 / (1 - sparsity):.4g}" if 0 <= sparsity < 1 else "sparsity is not in [0, 1)"
        problems.append(f"compression is {compression}, but {follows}")
    met = None if goal is None else exact >= goal if row["higher_is_better"] else exact <= goal
    if row["met"] is not met:
        better = "at least" if row["higher_is_better"] else "at most"
        problems.append(f"met is {row['met']}, but the mean {exact:.6g} against a goal of {better} {goal} gives {met}")
    return problems


def check_result(result: Mapping[str, Any]) -> list[str]:
    """Return every claim of a recorded experiment that does not follow from its numbers; empty when all do.

    A row's ``mean`` and ``sd`` (sample standard deviation, n - 1; null for a single value) must be those of ``values`` to
    the digits written, ``compression`` must be 1 / (1 - sparsity) within 0.5 %, and ``met`` must be mean <= goal, or
    mean >= goal where higher is better, taken from the values and not from the rounded mean; null without a goal.

    Example: ``check_result(load_result(path)) == []``.
    """
    rows = enumerate(result["rows"])
    found = [f"rows[{i}] ({row['method']}, {row['model']}): {problem}" for i, row in rows for problem in _check_row(row)]
    return found if result["rows"] else ["rows is empty: an experiment without a number"]


def _cell(value: object) -> str:
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row's cells by column, in the order they are shown."""
    digits = 2 if abs(row["mean"]) >= 1 else 4
    many = len(row["values"]) > 1
    published = _cell(row["published"])
    if row["source"] and row["published"] is not None:
        published += f" ({_cell(row['source'])})"
    return {
        **{key: _cell(row[key]) for key in ("method", "model", "data", "pattern")},
        "removed": "–" if row["sparsity"] is None else f"{100 * row['sparsity']:.4g} % ({row['compression']:.4g}×)",
        "metric": _cell(row["metric"]),
        "seeds": f"{len(row['values'])} seeds" if many else "1 seed",
        "ours": f"{row['mean']:.{digits}f}" + (f" ± {row['sd']:.{digits}f}" if many else ""),
        "published": published,
        "goal": "–" if row["goal"] is None else ("≥ " if row["higher_is_better"] else "≤ ") + _cell(row["goal"]),
        "met": {True: "yes", False: "**no**", None: "–"}[row["met"]],
    }


_NUMBERS = ("removed", "ours", "goal")
#: Told once above the table where they are the same in every row.
_COMMON = ("model", "data", "pattern", "metric", "seeds")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What all rows have in common in one line, then a table of the rest; columns that say nothing are left out."""
    cells = [_cells(row) for row in rows]
    values = {key: {row[key] for row in cells} for key in cells[0]}
    common = [next(iter(values[key])) for key in _COMMON if len(values[key]) == 1 and len(rows) > 1]
    shown = [
        key for key, found in values.items() if found != {"–"} and not (key in _COMMON and len(found) == 1 and len(rows) > 1)
    ]
    lines = [shown, ["---:" if key in _NUMBERS else "---" for key in shown], *([row[key] for key in shown] for row in cells)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    told = "; ".join(part for part in common if part != "–")
    return f"{told}\n\n{table}" if told else table


def results_markdown(paths: Sequence[Path]) -> str:
    """Return recorded experiments as Markdown: a question, its table and its command each, ordered by file name.

    Raises ``RecipeError`` when a file is unusable or a claim in it does not follow from its numbers.

    Example: ``results_markdown(sorted(Path("recipes/results").glob("*.json")))``.
    """
    sections = []
    for path in sorted(paths, key=lambda path: path.name):
        result = load_result(path)
        if problems := check_result(result):
            raise RecipeError(f"{path} does not follow from its numbers: {'; '.join(problems)}. Correct the file.")
        minutes = "" if result["seconds"] is None else f", {max(1, round(result['seconds'] / 60))} min"
        picture = f"\n\n![{result['question']}](recipes/results/{path.stem}.png)" if "curves" in result else ""
        sections.append(
            f"**{result['question']}**\n\n{_table(result['rows'])}\n\n"
            f"`{result['command']}` ({result['date']}, {result['machine']}{minutes}){picture}"
        )
    return "\n\n".join(sections)


def rewrite(readme: str, block: str) -> str:
    """Return a README with the text between the two markers replaced.

    Raises ``RecipeError`` unless each marker is there exactly once and in order.

    Example: ``rewrite("<!-- results:begin -->\\n<!-- results:end -->", "new")``.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise RecipeError(f"the README needs one line {BEGIN} and after it one line {END}; results go between them.")
    head, _, rest = readme.partition(BEGIN)
    return f"{head}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite (or with ``--check`` only compare) the results in a README; 0 done, 1 out of date, 2 not usable.

    Example: ``main(["--check", "README.md", "recipes/results/digits_gmp.json"])``.
    """
    parser = argparse.ArgumentParser(prog="python -m sparsetrain.report.results", description="Write results to README.")
    parser.add_argument("readme", type=Path)
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 when the README would change")
    options = parser.parse_args(arguments)
    try:
        before = options.readme.read_text(encoding="utf-8")
        after = rewrite(before, results_markdown(options.results))
    except (SparsetrainError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.check:
        if after != before:
            print(f"{options.readme} is out of date: run this command without --check.", file=sys.stderr)
        return int(after != before)
    options.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
