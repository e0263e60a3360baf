"""A run over domains on the page: what the model could do on every domain after every stage, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsetrain.report.curves import LINES
from sparsetrain.report.plots import INK, STYLE, figure, svg_bytes
from sparsetrain.report.wording import label, value_text

_SHADES = LinearSegmentedColormap.from_list("change", ["#0072b2", "#a9cfe6", "#f7f7f5", "#f4a36a", "#a63a12"])
#: What is told under the matrix: key, in words, whether it is a value of the metric (or a difference of two).
_FACTS = (
    ("average", "average over the domains, at the end"),
    ("learned", "average when each was learned"),
    ("forgetting", "forgetting: how much worse than when it was learned, in the mean"),
    ("forward_transfer", "forward transfer: a domain before its turn, less what it was in the beginning"),
    ("joint_gap", "worse than all domains pruned for at once"),
    ("intransigence", "worse, when learned, than each domain pruned for alone"),
)


def domain_facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of (what, value) that follow from the matrix, and what the domains did to the masks.

    Example: ``domain_facts(metrics)[0]`` is ``("average over the domains, at the end", "211.1")``.
    """
    found, name = metrics.get("continual") or {}, metrics.get("metric") or ""
    rows = [(words, _text(name, key, found[key])) for key, words in _FACTS if key in found]
    churn = [d["churn"] for d in (metrics.get("method") or {}).get("domains") or [] if d.get("churn") is not None]
    if churn:
        rows.append(("churn: share of the pruned weights that came back, by domain", ", ".join(f"{c:.2%}" for c in churn)))
    if found.get("missing"):
        rows.append(("in no average: not measured in the end, their data is gone", ", ".join(found["missing"])))
    return rows


def _text(name: str, key: str, value: float) -> str:
    text = value_text(name, abs(value))
    return f"{'-' if value < 0 else '' if key in ('average', 'learned') else '+'}{text}".replace("-", "−")


def domains_plot(metrics: Mapping[str, Any]) -> bytes | None:
    """`domains_figure` as SVG, the same bytes every time. Example: ``domains_plot(metrics)``."""
    with mpl.rc_context(STYLE):
        drawn = domains_figure(metrics)
        return None if drawn is None else svg_bytes(drawn)


def domains_figure(metrics: Mapping[str, Any]) -> Figure | None:
    """The matrix (stages down, domains across), and each domain's way through the stages.

    Colours and the second panel show by how much a domain is worse than right after its own stage, in percent of what it was
    then. None with fewer than two domains. Example: ``domains_figure(metrics)`` as the last line of a notebook's cell.
    """
    found, name = metrics.get("continual") or {}, metrics.get("metric") or ""
    domains, matrix = found.get("domains") or [], found.get("matrix") or []
    if len(domains) < 2 or len(matrix) != len(domains):
        return None
    sign = -1.0 if metrics.get("higher_is_better") else 1.0
    own = [matrix[i][i] for i in range(len(domains))]

    def worse(stage: int, i: int) -> float:
        value = matrix[stage][i]
        return math.nan if value is None or not own[i] else 100 * sign * (value - own[i]) / abs(own[i])

    with mpl.rc_context(STYLE):
        drawn = figure(4.0 + 1.7 * len(domains), 1.7 + 0.42 * len(domains) + 0.8)
        left, right = drawn.subplots(1, 2, width_ratios=(1.1, 1))
        _heat(left, domains, matrix, worse, name)
        for i, (domain, (color, marker, dash)) in enumerate(zip(domains, LINES * len(domains), strict=False)):
            points = [(t + 1, worse(t, i)) for t in range(i, len(domains))]
            right.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=dash, markersize=4.5, label=domain)
        right.axhline(0, color="#9a9a9a", linewidth=0.8)
        right.set_title("Worse than when it was learned, %", loc="left", fontsize=10, color=INK)
        right.set_xlabel("domains learned")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.legend(fontsize=8)
        return drawn


def _heat(axes: Axes, domains: Sequence[str], matrix: Sequence[Sequence[float | None]], worse: Any, name: str) -> None:
    count = range(len(domains))
    shades = [[worse(t, i) for i in count] for t in count]
    learned = [abs(shades[t][i]) for t in count for i in count if t > i and math.isfinite(shades[t][i])]
    top = max([1.0, *learned])
    shown = [[shades[t][i] if t >= i else math.nan for i in count] for t in count]
    axes.imshow(shown, cmap=_SHADES, norm=TwoSlopeNorm(0, -top, top), aspect="auto")
    for t in count:
        for i in count:
            dark = t > i and abs(shades[t][i]) > 0.7 * top
            ink = "white" if dark else INK if t >= i else "#8a8a8a"
            weight = "bold" if t == i else "normal"
            axes.text(i, t, value_text(name, matrix[t][i]), ha="center", va="center", color=ink, fontsize=9, fontweight=weight)
    axes.set_xticks(list(count), [f"on {domain}" for domain in domains], fontsize=9)
    axes.set_yticks(list(count), [f"after {domain}" for domain in domains], fontsize=9)
    axes.tick_params(length=0)
    axes.set_title(f"{label(name).capitalize()}; grey: not learned yet", loc="left", fontsize=10, color=INK)
    for side in axes.spines.values():
        side.set_visible(False)
