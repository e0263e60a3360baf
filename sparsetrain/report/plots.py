"""Figures of the report: training curves with the sparsity behind them, and pictures of masks.

Matplotlib's object interface only: no pyplot, no global figure, safe in threads and without a display.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

from sparsetrain.report.wording import is_fraction, label

# Okabe & Ito 2008: told apart under every common colour blindness, and by width and dash in grey print.
BLUE, SKY, VERMILLION, INK, GREY, PALE = "#0072B2", "#56B4E9", "#D55E00", "#222222", "#8a8a8a", "#e9e9e6"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsetrain",
    "font.size": 10,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "path.simplify": True,
}
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial"
MAX_POINTS = 800
MAX_PIXELS = 256
WINDOW = 32


def data_uri(content: bytes, kind: str) -> str:
    """Return bytes as a ``data:`` address, so that a page needs no second file.

    Example: ``data_uri(b"...", "image/png")``.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that belongs to nobody else.

    Example: ``figure(10, 5)``.
    """
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def svg_bytes(drawn: Figure) -> bytes:
    """Return a figure as SVG with real text in the reader's own font, the same bytes every time.

    Example: ``svg_bytes(figure(4, 2))``.
    """
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().replace(b"'DejaVu Sans'", FONT.replace("'", "&apos;").encode())


def series(history: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float], int]:
    """Return steps, values and the number of rows averaged into each point (1 unless the curve is very long).

    Example: ``steps, values, merged = series(rows, "train/loss")``.
    """
    rows = [(row["step"], float(row[name])) for row in history if isinstance(row.get(name), (int, float))]
    merged = max(1, math.ceil(len(rows) / MAX_POINTS))
    chunks = [rows[start : start + merged] for start in range(0, len(rows), merged)]
    steps = [sum(step for step, _ in chunk) / len(chunk) for chunk in chunks]
    return steps, [sum(value for _, value in chunk) / len(chunk) for chunk in chunks], merged


def _draw_sparsity(axes: Axes, history: Sequence[dict[str, float]], last: float) -> None:
    rows = [(row["step"], float(row["sparsity/global"])) for row in history if "sparsity/global" in row]
    if not rows:
        return
    # Only stairs that can be seen (0.2 % is under half a pixel): few points however long the run, no step averaged.
    stairs = rows[:1]
    for row in rows:
        if abs(row[1] - stairs[-1][1]) >= 0.002:
            stairs.append(row)
    steps, values = zip(*stairs, (last, rows[-1][1]), strict=True)
    right = axes.twinx()
    # The curves belong in front of the sparsity: twins are drawn in z-order, and the front one must be see-through.
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    right.fill_between(steps, values, step="post", color=PALE, linewidth=0)
    right.step(steps, values, where="post", color=GREY, linewidth=1.1)
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    right.set_ylabel("sparsity", color="#6a6a6a")
    right.tick_params(axis="y", length=0, labelcolor="#7a7a7a")
    right.spines["right"].set_visible(False)


def _draw_curves(axes: Axes, history: Sequence[dict[str, float]], names: Sequence[str]) -> None:
    lowest, highest = math.inf, -math.inf
    for name in names:
        steps, values, merged = series(history, name)
        train = name.startswith("train/")
        text = label(name) + (f", mean of {merged} rows a point" if merged > 1 else "")
        marker = "o" if len(steps) <= 60 and not train else None
        style = {"color": SKY, "linewidth": 1.0} if train else {"color": BLUE, "linewidth": 2.0, "marker": marker}
        if name.startswith("test/"):
            style |= {"color": INK, "linewidth": 1.2, "linestyle": "--"}
        axes.plot(steps, values, label=text, markersize=3.5, **style)  # type: ignore[arg-type]
        finite = [value for value in values if math.isfinite(value)]
        if len(finite) < len(values):
            lost = min(row["step"] for row in history if not math.isfinite(row.get(name, 0.0)))
            axes.axvline(lost, color=VERMILLION, linestyle="--", label=f"{label(name)} not finite from step {lost:,}")
        lowest, highest = min([lowest, *finite]), max([highest, *finite])
    if all(is_fraction(name, lowest, highest) for name in names):
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    elif lowest > 0 and highest / lowest > 30:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.spines["right"].set_visible(False)
    axes.grid(axis="y", color="#d5d5d5", linewidth=0.6)


def _draw_changes(axes: Axes, steps: Sequence[int]) -> None:
    if steps:
        marks = {"color": VERMILLION, "markersize": 5, "markeredgewidth": 0, "label": "mask changed"}
        bottom = [0.012] * len(steps)
        axes.plot(steps, bottom, "^", transform=axes.get_xaxis_transform(), clip_on=False, **marks)  # type: ignore[arg-type]


def training_plot(history: Sequence[dict[str, float]], metric: str, changed: Iterable[int]) -> bytes | None:
    """Draw the run's metric and its losses over the steps, sparsity behind them, mask changes as marks below.

    ``metric`` is the run's own metric, such as ``test/accuracy``: curves of the same last name are shown. ``changed``
    are the steps at which a mask changed. Returns SVG, or ``None`` when the history holds neither.

    Example: ``training_plot(rows, "test/accuracy", [300, 320])``.
    """
    names = sorted({name for row in history for name in row if "/" in name and not name.startswith("sparsity/")})
    wanted = metric.rsplit("/", 1)[-1]
    panels = [[name for name in names if name.rsplit("/", 1)[-1] == kind] for kind in dict.fromkeys((wanted, "loss"))]
    panels = [panel for panel in panels if any(series(history, name)[0] for name in panel)]
    if not panels:
        return None
    last = max(row["step"] for row in history)
    with mpl.rc_context(STYLE):
        drawn = figure(10, 0.5 + 2.25 * len(panels))
        panes = drawn.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(panes, panels, strict=True):
            _draw_sparsity(axes, history, last)
            _draw_curves(axes, history, panel)
            # Closer marks than 400 a run would only cover each other.
            _draw_changes(axes, sorted({round(400 * step / max(last, 1)): step for step in changed}.values()))
            axes.set_xlim(0, max(last, 1))
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.set_ylabel(label(panel[0].rsplit("/", 1)[-1]))
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncol=4, borderaxespad=0.2, handlelength=1.6)
        panes[-1].set_xlabel("optimizer step")
        return svg_bytes(drawn)


@dataclass(frozen=True)
class MaskPicture:
    """One mask as pictures: the whole tensor, and its middle at one pixel a weight when the whole had to be averaged.

    ``block`` is how many weights (rows, columns) are averaged into a pixel; ``darkest`` the share of kept weights that
    the darkest colour stands for.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    sparsity: float
    block: tuple[int, int]
    darkest: float
    empty_rows: int
    empty_columns: int
    whole: str
    window: str


def _middle(size: int) -> slice:
    # Aligned to 8, so that groups of 2:4 and 4:8 are seen whole.
    start = max(0, (size - WINDOW) // 2) // 8 * 8
    return slice(start, start + WINDOW)


def density(mask: NDArray[np.bool_], largest: int = MAX_PIXELS) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """Average a mask over equal blocks until neither side is larger than ``largest``: the share of kept weights.

    Every weight counts exactly once; the last block of a side is smaller when the block does not divide it.
    Returns densities in [0, 1], shape (ceil(rows / block), ceil(columns / block)), and the block.

    Example: ``density(np.eye(4, dtype=bool), largest=2)[0]`` gives ``[[0.5, 0.0], [0.0, 0.5]]``.
    """
    block = (math.ceil(mask.shape[0] / largest), math.ceil(mask.shape[1] / largest))
    starts = [np.arange(0, size, step) for size, step in zip(mask.shape, block, strict=True)]
    alive = np.add.reduceat(np.add.reduceat(mask, starts[0], axis=0, dtype=np.int64), starts[1], axis=1)
    lengths = [np.diff(np.append(start, size)) for start, size in zip(starts, mask.shape, strict=True)]
    return alive / np.outer(*lengths), block


def _png(values: NDArray[np.float64], darkest: float) -> str:
    # 64 shades are more than the eye tells apart here and compress several times better than all of them.
    shades = LinearSegmentedColormap.from_list("kept", ["#ffffff", "#9ecae1", BLUE, "#08306b"], N=64)
    buffer = io.BytesIO()
    imsave(buffer, values, cmap=shades, vmin=0, vmax=darkest, format="png")
    return data_uri(buffer.getvalue(), "image/png")


def mask_picture(name: str, mask: Tensor) -> MaskPicture:
    """Draw a mask as a matrix (first dimension by all others, a convolution as (out, in x kernel)).

    Example: ``mask_picture("fc.weight", torch.ones(3, 4, dtype=torch.bool)).sparsity`` gives ``0.0``.
    """
    flat = mask.reshape(mask.shape[0], -1) if mask.dim() > 1 else mask.reshape(1, -1)
    matrix: NDArray[np.bool_] = flat.cpu().numpy()
    values, block = density(matrix)
    averaged = block != (1, 1)
    darkest = float(values.max()) if averaged and values.max() > 0 else 1.0
    return MaskPicture(
        name=name,
        shape=tuple(mask.shape),
        rows=matrix.shape[0],
        columns=matrix.shape[1],
        sparsity=1 - int(matrix.sum()) / matrix.size,
        block=block,
        darkest=darkest,
        empty_rows=int((~matrix.any(axis=1)).sum()),
        empty_columns=int((~matrix.any(axis=0)).sum()),
        whole=_png(values, darkest),
        window=_png(matrix[_middle(matrix.shape[0]), _middle(matrix.shape[1])].astype(np.float64), 1.0) if averaged else "",
    )


def mask_pictures(masks: dict[str, Tensor], most: int = 6) -> list[MaskPicture]:
    """Draw the ``most`` largest masks, in the model's order; masks that removed nothing come last in the choice.

    Example: ``mask_pictures(load_masks(path))``.
    """
    sized = [name for name in masks if masks[name].numel()]
    ranked = sorted(sized, key=lambda name: (bool(masks[name].all()), -masks[name].numel()))
    return [mask_picture(name, masks[name]) for name in sized if name in ranked[:most]]
