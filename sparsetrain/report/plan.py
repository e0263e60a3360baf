"""A plan in the terminal: what would be pruned, what stays dense and why, when, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsetrain.report.schedule import sparsity_curve_text
from sparsetrain.report.wording import percent, shape_text

MOST_ROWS = 40


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Print a plan (a mapping of the fields of `sparsetrain.recipe.plan.Plan`)."""
    if plan["tensors"]:
        console.print(_tensor_table(plan["tensors"]))
    if plan["skipped"]:
        reasons = Counter(plan["skipped"].values())
        console.print(Text("left dense", "bold"))
        for reason, count in reasons.most_common():
            names = [name for name, why in plan["skipped"].items() if why == reason]
            shown = ", ".join(names[:4]) + (", ..." if count > 4 else "")
            console.print(Text(f"  {count:>5}  {reason}: {shown}"))
    clock = plan["clock"]
    if plan["curve"]:
        console.print(Text("sparsity over the run", "bold"))
        if clock["total_steps"]:
            console.print(Text(sparsity_curve_text(plan["curve"], clock["total_steps"])))
        console.print(_curve_table(plan["curve"], clock))
    console.print(Text("cost", "bold"))
    for label, text in _costs(plan):
        console.print(Text(f"  {label:<26} {text}"))
    for note in plan["notes"]:
        console.print(Text(f"note: {note}", "yellow"))
    for problem in plan["problems"]:
        console.print(Text(f"problem: {problem}", "bold red"))
    if not plan["problems"]:
        console.print(Text("this recipe can do what it asks", "green"))


def _tensor_table(rows: list[Mapping[str, Any]]) -> Table:
    table = Table(title="to prune", title_justify="left", title_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    table.add_column("pattern")
    table.add_column("sparsity", justify="right")
    table.add_column("pruned", justify="right")
    table.add_column("", overflow="fold")
    for row in rows[:MOST_ROWS]:
        remark = (
            Text(row["problem"], "bold red")
            if row["problem"]
            else Text("tied: " + ", ".join(row["tied"]) if row["tied"] else "")
        )
        sparsity = row["follows"] or "" if row["sparsity"] is None else percent(row["sparsity"])
        pruned = "" if row["prune"] is None else f"{row['prune']:,}"
        table.add_row(row["name"], shape_text(list(row["shape"])), row["pattern"], sparsity, pruned, remark)
    if len(rows) > MOST_ROWS:
        table.add_row(
            f"... and {len(rows) - MOST_ROWS} more",
            "",
            "",
            "",
            f"{sum(r['prune'] or 0 for r in rows[MOST_ROWS:]):,}",
            "",
        )
    return table


def _curve_table(curve: list[tuple[int, float]], clock: Mapping[str, Any]) -> Table:
    table = Table(title_justify="left")
    for column in ("change", "step", "epoch", "sparsity"):
        table.add_column(column, justify="right")
    numbered = list(enumerate(curve, 1))
    shown = numbered if len(numbered) <= 12 else [*numbered[:6], *numbered[-6:]]
    for index, (step, sparsity) in shown:
        epoch = f"{step / clock['steps_per_epoch']:.2f}" if clock["steps_per_epoch"] else ""
        table.add_row(str(index), str(step), epoch, percent(sparsity, 2))
        if len(numbered) > 12 and index == 6:
            table.add_row("...", "", "", "")
    return table


def _costs(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("parameters", f"{plan['parameters']:,}")]
    if plan["prunable"]:
        kept = plan["prunable"] - plan["pruned"]
        known = all(row["follows"] in (None, "global") for row in plan["tensors"])
        told = f", kept {kept:,} ({plan['prunable'] / max(kept, 1):.2f}x fewer)" if known else ""
        rows.append(("prunable weights", f"{plan['prunable']:,}{told}"))
        rows.append(
            (
                "mask memory",
                f"{_bytes(plan['mask_bytes'])} in training, {_bytes(plan['checkpoint_bytes'])} in a checkpoint",
            )
        )
    if plan["flops"]:
        dense, sparse = plan["flops"]["dense"], plan["flops"].get("sparse")
        told = "" if sparse is None else f", {sparse:,.0f} without pruned weights"
        rows.append(("FLOPs a sample (on paper)", f"{dense:,.0f} dense{told}"))
    clock = plan["clock"]
    if clock["total_steps"]:
        of = f" a domain, in the first of {plan['domains']}" if plan["domains"] > 1 else ""
        rows.append(("optimizer steps", f"{clock['total_steps']:,}{of} ({clock['steps_per_epoch'] or '?'} an epoch)"))
    return rows


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return ""
