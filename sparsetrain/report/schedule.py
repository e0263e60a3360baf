"""The sparsity a recipe plans, before it runs: a picture for a file and a small one for the terminal."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import matplotlib as mpl
from matplotlib.ticker import FuncFormatter, PercentFormatter

from sparsetrain.errors import RecipeError
from sparsetrain.report.plots import BLUE, INK, STYLE, figure
from sparsetrain.report.wording import percent

BLOCKS = " ▁▂▃▄▅▆▇█"
HEIGHT = 8
SHADES = {"dense": "#ffffff", "pruning": "#fbe3d2", "constant sparsity": "#eef3f7", "fine-tuning": "#e1eff8"}

Points = list[tuple[int, float]]


def _checked(points: Points, total_steps: int) -> Points:
    if total_steps < 1 or not points:
        raise RecipeError(
            f"nothing to plot: {len(points)} points over {total_steps} steps. "
            "Give the plan at least one (step, sparsity) and one step."
        )
    for (step, sparsity), before in zip(points, [(-1, 0.0), *points], strict=False):
        if not before[0] < step <= total_steps or not 0 <= sparsity < 1:
            raise RecipeError(
                f"plan point (step {step}, sparsity {sparsity}) is out of order or range: steps rise strictly from 0 "
                f"to {total_steps} and sparsity lies in [0, 1). Correct the schedule that made it."
            )
    return points if points[0][0] == 0 else [(0, 0.0), *points]


def phases(points: Points, total_steps: int) -> list[tuple[str, int, int]]:
    """Split a plan into (name, first step, end step): dense, pruning (sparsity moves), fine-tuning (it stays).

    Without any change the whole plan is one phase, "dense" at sparsity 0 or "constant sparsity".

    Example: ``phases([(100, 0.5), (200, 0.9)], 300)`` gives dense to 100, pruning to 200, fine-tuning to 300.
    """
    stairs = _checked(points, total_steps)
    moves = [after[0] for before, after in itertools.pairwise(stairs) if after[1] != before[1]]
    if not moves:
        return [("constant sparsity" if stairs[0][1] > 0 else "dense", 0, total_steps)]
    start = moves[0] if stairs[0][1] == 0 else 0
    found = [("dense", 0, start), ("pruning", start, moves[-1]), ("fine-tuning", moves[-1], total_steps)]
    return [phase for phase in found if phase[2] > phase[1]]


def plot_sparsity_curve(points: Points, total_steps: int, path: Path, title: str) -> None:
    """Draw the staircase of planned sparsity with its phases shaded; ``path`` ends in .png or .svg.

    ``points`` are (step, sparsity from that step on), steps rising; before the first point sparsity is 0.
    Raises ``RecipeError`` when the points are empty, out of order or out of range, or the ending is another one.

    Example: ``plot_sparsity_curve([(100, 0.5), (200, 0.9)], 300, Path("plan.png"), "digits_gmp")``.
    """
    stairs = _checked(points, total_steps)
    if path.suffix not in {".png", ".svg"}:
        raise RecipeError(f"cannot plot to {path}: the ending {path.suffix!r} is neither .png nor .svg. Use one of them.")
    with mpl.rc_context(STYLE):
        drawn = figure(8, 3.6)
        axes = drawn.subplots()
        top = max(sparsity for _, sparsity in stairs)
        for name, start, end in phases(points, total_steps):
            axes.axvspan(start, end, color=SHADES[name], linewidth=0)
            middle, wide = (start + end) / 2, (end - start) / total_steps > 0.11
            axes.text(middle, 1.02, name if wide else "", transform=axes.get_xaxis_transform(), ha="center", color="#555555")
        x, y = zip(*stairs, (total_steps, stairs[-1][1]), strict=True)
        axes.step(x, y, where="post", color=BLUE, linewidth=2)
        axes.set(xlim=(0, total_steps), ylim=(0, min(1.0, max(0.1, 1.15 * top))), xlabel="optimizer step", ylabel="sparsity")
        axes.annotate(
            percent(y[-1]),
            (total_steps, y[-1]),
            (-4, -14 if y[-1] > 0.5 * top else 5),
            textcoords="offset points",
            ha="right",
            color=BLUE,
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.spines["right"].set_visible(False)
        axes.grid(axis="y", color="#cccccc", linewidth=0.6)
        axes.set_title(title, loc="left", pad=22, color=INK, fontweight="bold")
        drawn.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _sparsity_at(stairs: Points, step: float) -> float:
    return next((sparsity for start, sparsity in reversed(stairs) if start <= step), 0.0)


def sparsity_curve_text(points: Points, total_steps: int, width: int = 72) -> str:
    """Draw the same staircase with block characters, no line wider than ``width`` (at least 40), 11 lines high.

    Each column shows the sparsity at the last step it covers, so the right edge is the sparsity at the end.
    Raises ``RecipeError`` as :func:`plot_sparsity_curve` does.

    Example: ``print(sparsity_curve_text([(100, 0.5), (200, 0.9)], 300))``.
    """
    stairs = _checked(points, total_steps)
    columns = max(40, width) - 9
    top = max(sparsity for _, sparsity in stairs) or 1.0
    ends = [total_steps * (column + 1) / columns for column in range(columns)]
    # Rounding up keeps every non-zero sparsity visible: a plan that prunes a little must not look dense.
    eighths = [math.ceil(8 * HEIGHT * _sparsity_at(stairs, step) / top - 1e-9) for step in ends]
    lines = []
    for row in reversed(range(HEIGHT)):
        tick = percent(top * (row + 1) / HEIGHT) if row in (HEIGHT - 1, HEIGHT // 2 - 1) else ""
        bars = "".join(BLOCKS[min(8, max(0, height - 8 * row))] for height in eighths)
        lines.append(f"{tick:>7} │{bars}".rstrip())
    lines.append(f"{'0 %':>7} └" + "─" * columns)
    end = f"step {total_steps:,}"
    lines.append(" " * 9 + "0" + end.rjust(columns - 1))
    lines.append("  " + " · ".join(f"{name} {start:,}–{stop:,}" for name, start, stop in phases(points, total_steps)))
    return "\n".join(lines)
