"""Curves of an experiment: one line an arm, mean over seeds with its spread, drawn from the recorded numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from sparsetrain.report.plots import BLUE, GREY, INK, SKY, STYLE, VERMILLION, figure

#: Told apart by colour, marker and dash.
LINES = ((BLUE, "o", "-"), (VERMILLION, "s", "--"), (GREY, "^", ":"), (SKY, "D", "-."), (INK, "v", "-"))


def draw(axes: Axes, curve: Mapping[str, Any]) -> None:
    """Draw one recorded curve: ``title``, ``x_label``, ``y_label``, ``log_x`` and ``lines`` of label, x, mean, sd."""
    for line, (color, marker, dash) in zip(curve["lines"], LINES * len(curve["lines"]), strict=False):
        x, mean = line["x"], line["mean"]
        axes.plot(x, mean, color=color, marker=marker, linestyle=dash, markersize=4.5, linewidth=1.8, label=line["label"])
        if any(line["sd"]):
            low = [m - s for m, s in zip(mean, line["sd"], strict=True)]
            high = [m + s for m, s in zip(mean, line["sd"], strict=True)]
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    if curve.get("log_x"):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(
            [t for t in (100, 70, 50, 30, 20, 10, 5, 3, 2, 1, 0.5, 0.2) if t >= min(min(line["x"]) for line in curve["lines"])]
        )
        axes.invert_xaxis()
    axes.set_title(curve["title"], loc="left", fontsize=11, color=INK)
    axes.set_xlabel(curve["x_label"])
    axes.set_ylabel(curve["y_label"])
    axes.spines["right"].set_visible(False)
    axes.grid(axis="y", color="#d5d5d5", linewidth=0.6)


def plot_curves(curves: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw recorded curves side by side into a PNG; equal numbers give equal pictures.

    Example: ``plot_curves(json.loads(text)["curves"], Path("lottery.png"))``.
    """
    with mpl.rc_context(STYLE):
        drawn = figure(5.6 * len(curves), 3.9)
        drawn.get_layout_engine().set(wspace=0.08)  # type: ignore[union-attr, call-arg]
        panels = drawn.subplots(1, len(curves), squeeze=False)[0]
        for axes, curve in zip(panels, curves, strict=True):
            draw(axes, curve)
        panels[0].legend()
        drawn.savefig(path, dpi=110, metadata={"Software": None})
    return path
