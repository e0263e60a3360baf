"""What the terminal prints after a run: dense against sparse, and the layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from sparsetrain.report.wording import (
    change_text,
    diverged,
    failures,
    label,
    number,
    percent,
    shape_text,
    times,
    unclaimed,
    value_text,
)

#: With more groups of units than these the printed table adds them up; the report has all.
_MOST_GROUPS = 8


def unit_rows(metrics: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Group, units left, units at first; empty where whole units were not pruned.

    Example: ``unit_rows({"method": {"structure": {"units": {"fc1": [39, 300]}}}})`` is ``[("fc1", 39, 300)]``.
    """
    units = ((metrics.get("method") or {}).get("structure") or {}).get("units") or {}
    return [(name, int(left), int(of)) for name, (left, of) in units.items()]


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, float | None, float | None, float | None]]:
    """Return (name, dense, final, best) for every recorded metric, the run's own first, ``error`` beside accuracy.

    Error is 1 - accuracy and is added only where accuracy is a share of one and no error was recorded.

    Example: ``metric_rows({"metric": "test/accuracy", "final": {"test/accuracy": 0.9}})`` has two rows.
    """
    columns = [metrics.get(key) or {} for key in ("dense", "final", "best")]
    names = list(dict.fromkeys(name for column in columns for name in column))
    names.sort(key=lambda name: name != metrics.get("metric"))
    rows: list[tuple[str, float | None, float | None, float | None]] = []
    for name in names:
        values = [column.get(name) for column in columns]
        rows.append((name, *values))
        opposite = name[: -len("accuracy")] + "error"
        if name.endswith("accuracy") and opposite not in names and all(v is None or 0 <= v <= 1 for v in values):
            rows.append((opposite, *(None if value is None else 1 - value for value in values)))
    return rows


def _verified(metrics: Mapping[str, Any]) -> Text:
    problems = failures(metrics)
    if problems:
        return Text(f"NO: {len(problems)} problem{'s' if len(problems) > 1 else ''}", style="bold red")
    return Text("yes", style="bold green") if metrics.get("verified") else Text("not checked", style="yellow")


def result_table(metrics: Mapping[str, Any]) -> Table:
    """Return the table of a run: one row a metric, columns dense, sparse, change (and best when recorded).

    ``metrics`` is the content of metrics.json; dense, best and flops may be null. Problems are listed below.

    Example: ``rich.print(result_table(metrics))``.
    """
    best = bool(metrics.get("best"))
    title = "DIVERGED: no result" if diverged(metrics) else str(metrics.get("recipe") or "result")
    table = Table(title=Text(title, style="bold red" if diverged(metrics) else "bold"), title_justify="left", min_width=72)
    table.add_column("")
    for name in ("dense", "sparse", "change", *(["best"] if best else [])):
        table.add_column(name, justify="right")

    def add(*cells: str | Text) -> None:
        table.add_row(*cells[: 5 if best else 4])

    for name, dense, final, top in metric_rows(metrics):
        add(
            label(name),
            value_text(name, dense),
            value_text(name, final),
            change_text(name, dense, final),
            value_text(name, top),
        )
    sparsity = metrics.get("sparsity") or {}
    if sparsity.get("prunable"):
        asked = f"asked {percent(sparsity['asked'])}" if sparsity.get("asked") is not None else ""
        factor = f"{times(sparsity['compression'])} fewer" if sparsity.get("compression") else ""
        table.add_section()
        add("sparsity", "0 %", percent(sparsity["actual"]), asked, "")
        add("weights kept", number(sparsity["prunable"]), number(sparsity["kept"]), factor, "")
    units = unit_rows(metrics)
    if len(units) > _MOST_GROUPS:
        units = [("all groups", sum(left for _, left, _ in units), sum(of for _, _, of in units))]
    for group, alive, first in units:
        add(f"units: {group}", number(first), number(alive), f"{percent(alive / first)} left", "")
    if removed := (metrics.get("method") or {}).get("removed"):
        add("blocks removed", "0", str(len(removed)), "", "")
    if flops := metrics.get("flops"):
        saved = change_text("flops", flops["dense"], flops["sparse"])
        add("FLOPs, zeros skipped", number(flops["dense"]), number(flops["sparse"]), saved, "")
    table.add_section()
    add("verified", "", _verified(metrics), "", "")
    notes = [f"dense: {metrics['dense_from']}"] if metrics.get("dense") and metrics.get("dense_from") else []
    notes += [f"not claimed: {left}"] if (left := unclaimed(metrics)) else []
    notes += [f"problem: {problem}" for problem in failures(metrics)]
    notes += [str(metrics["message"])] if diverged(metrics) and metrics.get("message") else []
    if notes:
        table.caption = Text("\n".join(notes), style="red" if failures(metrics) or diverged(metrics) else "dim")
        table.caption_justify = "left"
    return table


def layer_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return one line a tensor: name, shape, pattern, sparsity asked and actual, weights kept, ok; problems in red.

    ``rows`` is ``metrics["layers"]``.

    Example: ``rich.print(layer_table(metrics["layers"]))``.
    """
    table = Table(title=Text("layers", style="bold"), title_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("pattern")
    for name in ("asked", "actual", "kept", "ok"):
        table.add_column(name, justify="right", no_wrap=True)
    problems: list[str] = []
    for row in rows:
        good = row.get("ok") is not False
        name = str(row["name"]) + "".join(f"\n  = {alias}" for alias in row.get("aliases") or [])
        asked = "–" if row.get("asked") is None else percent(row["asked"])
        cells = (
            name,
            shape_text(row["shape"]),
            str(row["pattern"]),
            asked,
            percent(row["actual"]),
            number(row["kept"]),
        )
        problems += [] if good else [f"{row['name']}: {row.get('problem') or 'does not hold'}"]
        table.add_row(*(Text(cell) for cell in cells), Text("yes" if good else "NO"), style="" if good else "bold red")
    if problems:
        table.caption, table.caption_justify = Text("\n".join(problems), style="red"), "left"
    return table


def pruned_table(found: Mapping[str, Any]) -> Table:
    """Return what `sparsetrain prune` did: one line a block (or tensor), then the perplexity before and after.

    ``found`` is the content of sparsetrain.json. Example: ``rich.print(pruned_table(found))``.
    """
    asked = found["asked"]
    title = (
        f"{asked['criterion']}, {asked['pattern']}, {found['samples']} windows of {asked['window']} tokens of {asked['data']}"
    )
    table = Table(title=Text(title, style="bold"), title_justify="left")
    table.add_column("block", overflow="fold")
    for name in ("tensors", "sparsity", "output error", "notes"):
        table.add_column(name, justify="right")
    blocks: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["layers"]:
        inside = re.match(r".*?\.\d+(?=\.)", row["name"])
        blocks.setdefault(row["block"] or (inside[0] if inside else row["name"]), []).append(row)
    for block, rows in blocks.items():
        share = sum(row["actual"] * row["numel"] for row in rows) / sum(row["numel"] for row in rows)
        error = "–" if rows[0]["error"] is None else f"{rows[0]['error']:.3f}"
        notes = "; ".join(dict.fromkeys(row["note"] for row in rows if row["note"]))
        table.add_row(Text(block), str(len(rows)), percent(share), error, Text(notes))
    table.add_section()
    table.add_row("all", str(len(found["layers"])), percent(found["sparsity"]), "", f"{found['seconds']:.0f} s")
    told = [f"left dense: {found['left_dense']}"] if found.get("left_dense") else []
    if found["dense"] and found["pruned"]:
        before, after = found["dense"], found["pruned"]
        told.append(
            f"perplexity {before['perplexity']:.3f} before, {after['perplexity']:.3f} after, by block windows of "
            f"{asked['window']} tokens over {number(before['tokens'])} tokens of {asked['data']}'s validation text"
        )
    if told:
        table.caption, table.caption_justify = Text("\n".join(told)), "left"
    return table
