"""Figures and tables of measured sensitivity: heat maps of a scan, predicted against measured allocations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from rich.table import Table
from rich.text import Text

from sparsetrain.report.plots import BLUE, GREY, INK, STYLE, VERMILLION, figure
from sparsetrain.report.wording import number, percent, value_text

_HEAT = LinearSegmentedColormap.from_list("loss", ["#f7f7f5", "#fddbb0", "#f4935a", "#c8421f", "#67130b"])


def _increase(row: Mapping[str, Any], baseline: float) -> float:
    loss = row["loss"]
    return math.inf if loss is None or not math.isfinite(loss) else float(loss) - baseline


def _cell(value: float) -> str:
    """A loss increase in at most five characters."""
    if not math.isfinite(value):
        return "∞"
    if abs(value) < 0.0005:
        return "0"
    text = f"{value:+.3f}" if abs(value) < 0.1 else f"{value:+.2f}" if abs(value) < 10 else f"{value:+.0f}"
    return text.replace("-", "−")


def shorter(names: Sequence[str]) -> list[str]:
    """Names without what all of them have in common at the front and a ``.weight`` at the end.

    Example: ``shorter(["net.fc1.weight", "net.fc2.weight"])`` is ``["fc1", "fc2"]``.
    """
    parts = [name.removesuffix(".weight").split(".") for name in names]
    same = 0
    while len(names) > 1 and all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return [".".join(p[same:]) for p in parts]


def _grid(scan: Mapping[str, Any]) -> dict[str, tuple[list[str], list[float], dict[tuple[str, float], float]]]:
    """Kind of pattern -> names, sparsities, loss increase by both; neurons apart from the rest."""
    found: dict[str, tuple[list[str], list[float], dict[tuple[str, float], float]]] = {}
    baseline = float(scan["baseline"]["loss"])
    own = {row["name"]: row["pattern"] for row in reversed(scan["rows"])}
    for row in scan["rows"]:
        kind = "neurons" if row["pattern"] == "neurons" and own[row["name"]] != "neurons" else "own"
        names, sparsities, values = found.setdefault(kind, ([], [], {}))
        names += [row["name"]] * (row["name"] not in names)
        sparsities += [row["sparsity"]] * (row["sparsity"] not in sparsities)
        values[row["name"], row["sparsity"]] = _increase(row, baseline)
    return {kind: (names, sorted(sparsities), values) for kind, (names, sparsities, values) in found.items()}


def plot_scan(scan: Mapping[str, Any], path: Path, title: str = "") -> Path:
    """Draw a scan as a heat map, tensors by sparsity, each cell the loss increase; neurons in a second panel.

    ``scan`` is the content of sensitivity.json. Colours are logarithmic and shared by the panels.
    Example: ``plot_scan(asdict(found), Path("sensitivity.png"))``.
    """
    panels = _grid(scan)
    patterns = sorted({row["pattern"] for row in scan["rows"]} - ({"neurons"} if "neurons" in panels else set()))
    heads = {"own": ", ".join(patterns), "neurons": "neurons (whole outputs)"}
    finite = [v for _, _, values in panels.values() for v in values.values() if math.isfinite(v) and v > 0]
    top = max(finite, default=1.0)
    norm = LogNorm(max(1e-3, top / 1000), top) if top > 2e-3 else LogNorm(1e-3, 1.0)
    rows = [len(names) for names, _, _ in panels.values()]
    longest = max(len(name) for names, _, _ in panels.values() for name in shorter(names))
    columns = max(len(sparsities) for _, sparsities, _ in panels.values())
    with mpl.rc_context(STYLE):
        width = max(6.0, 1.8 + 0.085 * longest + 0.78 * columns)
        drawn = figure(width, 0.9 + sum(0.55 + 0.36 * n for n in rows))
        panes = drawn.subplots(len(panels), squeeze=False, height_ratios=rows)[:, 0]
        for axes, (kind, (names, sparsities, values)) in zip(panes, panels.items(), strict=True):
            _draw_heat(axes, names, sparsities, values, norm)
            axes.set_title(heads[kind], loc="left", fontsize=10, color=INK)
        panes[-1].set_xlabel("sparsity of this tensor alone")
        baseline = f"over {number(float(scan['baseline']['loss']))} unpruned"
        where = f" ({scan['evaluated_on']})" if scan.get("evaluated_on") else ""
        drawn.suptitle(f"{title + ': ' if title else ''}loss increase {baseline}{where}", fontsize=11, color=INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=150)
    return path


def _draw_heat(
    axes: Axes, names: Sequence[str], sparsities: Sequence[float], values: Mapping[tuple[str, float], float], norm: LogNorm
) -> None:
    table = np.array([[values.get((name, s), math.nan) for s in sparsities] for name in names])
    low, high = float(norm.vmin or 0), float(norm.vmax or 1)
    shown = np.clip(np.nan_to_num(table, nan=low, posinf=high), low, high)
    axes.imshow(shown, cmap=_HEAT, norm=norm, aspect="auto")
    for i, j in itertools.product(range(len(names)), range(len(sparsities))):
        value = float(table[i, j])
        if not math.isnan(value):
            dark = norm(float(shown[i, j])) > 0.6
            axes.text(j, i, _cell(value), ha="center", va="center", fontsize=9, color="white" if dark else INK)
        else:
            axes.text(j, i, "–", ha="center", va="center", fontsize=9, color=GREY)
    axes.set_xticks(range(len(sparsities)), [percent(s, 0) for s in sparsities])
    axes.set_yticks(range(len(names)), shorter(names))
    axes.set_xticks(np.arange(len(sparsities) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def scan_tables(scan: Mapping[str, Any]) -> list[Table]:
    """The loss increases as terminal tables, one a kind of pattern, and the single weights where they were compared.

    Example: ``for table in scan_tables(asdict(found)): rich.print(table)``.
    """
    tables = []
    for kind, (names, sparsities, values) in _grid(scan).items():
        title = "loss increase, whole neurons pruned" if kind == "neurons" else "loss increase, this tensor alone pruned"
        table = Table(title=Text(title, style="bold"), title_justify="left")
        table.add_column("tensor", overflow="fold")
        for s in sparsities:
            table.add_column(percent(s, 0), justify="right", no_wrap=True)
        for shown, name in zip(shorter(names), names, strict=True):
            table.add_row(shown, *(_cell(values[name, s]) if (name, s) in values else "–" for s in sparsities))
        caption = ", ".join(f"{name} {value_text(name, value)}" for name, value in scan["baseline"].items())
        table.caption, table.caption_justify = Text(f"unpruned: {caption} ({scan['evaluated_on']})", style="dim"), "left"
        tables.append(table)
    if scan["parameters"]:
        table = Table(title=Text("single weights: derivatives and removal", style="bold"), title_justify="left")
        for head in ("tensor", "weights", "derivative error", "1st order ρ", "2nd order ρ"):
            table.add_column(head, justify="left" if head == "tensor" else "right", overflow="fold")
        labels = shorter([row["name"] for row in scan["parameters"]])
        for name, row in zip(labels, scan["parameters"], strict=True):
            orders = ["–" if math.isnan(row[key]) else f"{row[key]:.3f}" for key in ("first_order", "second_order")]
            table.add_row(name, str(row["count"]), f"{row['derivative_error']:.1e}", *orders)
        note = "error: finite differences against autodiff, float64; ρ: Spearman, loss change of removal against Taylor"
        table.caption, table.caption_justify = Text(note, style="dim"), "left"
        tables.append(table)
    return tables


def plot_prediction(found: Mapping[str, Any], path: Path, title: str = "") -> Path:
    """Draw predicted against measured losses: allocations fitted, held out, the named ones, and the one that was found.

    ``found`` is the content of allocation.json. Example: ``plot_prediction(json.loads(text), Path("prediction.png"))``.
    """
    with mpl.rc_context(STYLE):
        drawn = figure(6.4, 5.2)
        axes = drawn.subplots()
        groups = {"fitted": (GREY, "o", 22), "held out": (BLUE, "o", 38)}
        for name, (color, marker, size) in groups.items():
            points = [point for point in found["points"] if point["group"] == name]
            axes.scatter(
                [p["predicted"] for p in points],
                [p["loss"] for p in points],
                s=size,
                c=color,
                marker=marker,
                alpha=0.85,
                linewidths=0,
                label=f"{name} ({len(points)})",
            )
        marks = iter("Ds^vPX")
        for point in (p for p in found["points"] if p["group"] not in groups):
            best = point["group"] == "found"
            style: dict[str, Any] = (
                {"c": VERMILLION, "marker": "*", "s": 150} if best else {"c": INK, "marker": next(marks), "s": 42}
            )
            axes.scatter(point["predicted"], point["loss"], label=point["group"], zorder=3, linewidths=0, **style)
        values = [v for point in found["points"] for v in (point["predicted"], point["loss"])]
        low, high = min(values), max(values)
        if low > 0 and high / low > 8:
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.axline((low, low), (high, high), color="#bdbdbd", linewidth=1, zorder=0)
        axes.set_xlabel("predicted loss")
        axes.set_ylabel(f"measured loss ({found['evaluated_on']})")
        axes.spines["right"].set_visible(False)
        axes.legend(loc="lower right", handletextpad=0.3)
        correlation = _correlation(found)
        axes.set_title(
            f"{title + ': ' if title else ''}{percent(found['sparsity'])} sparse, held-out rank correlation {correlation}",
            loc="left",
            fontsize=11,
            color=INK,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=150)
    return path


def _correlation(found: Mapping[str, Any]) -> str:
    value = found["rank_correlation"]
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def prediction_table(found: Mapping[str, Any]) -> Table:
    """The allocation found beside the named ones: predicted and measured loss, other metrics, sparsity by tensor.

    Example: ``rich.print(prediction_table(content))``.
    """
    rows = [point for point in found["points"] if point["group"] not in ("fitted", "held out")]
    metrics = [name for name in rows[0]["metrics"] if name != "loss"]
    table = Table(title=Text(f"allocations of {percent(found['sparsity'])}", style="bold"), title_justify="left")
    table.add_column("allocation")
    for head in ("predicted", "loss", *metrics):
        table.add_column(head, justify="right", no_wrap=True)
    for name in shorter(list(found["layers"])):
        table.add_column(name, justify="right", overflow="fold")
    for point in sorted(rows, key=lambda p: float(p["loss"])):
        cells = [value_text(name, point["metrics"][name]) for name in metrics]
        shares = [percent(point["layers"][name], 1) for name in found["layers"]]
        style = "bold" if point["group"] == found["chosen"] else ""
        table.add_row(point["group"], number(point["predicted"]), number(point["loss"]), *cells, *shares, style=style)
    table.caption_justify = "left"
    table.caption = Text(
        f"{found['model']} on {found['fitted']} measured allocations; Spearman {_correlation(found)} on "
        f"{found['held_out']} held out; {found['evaluated_on']}",
        style="dim",
    )
    return table
