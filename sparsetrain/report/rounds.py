"""The rounds of a lottery-ticket run on the page: a table, and what accuracy and speed of learning did as weights went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl

from sparsetrain.report.curves import draw
from sparsetrain.report.plots import STYLE, figure, svg_bytes
from sparsetrain.report.wording import label

#: In this order the first that was logged is the metric of a round.
_METRICS = tuple(f"{split}/{kind}" for kind in ("accuracy", "perplexity", "loss") for split in ("test", "val"))


def round_metric(rounds: Sequence[Mapping[str, Any]]) -> str | None:
    """The metric to judge rounds by: accuracy, else perplexity, else loss, of the test set if there; None if there is none."""
    return next((name for name in _METRICS if rounds and name in rounds[0]["end"]), None)


def round_rows(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table: round, share kept, weights kept, metric at the end, step of the lowest validation loss.

    Example: ``round_rows(metrics["method"]["rounds"])``.
    """
    metric = round_metric(rounds)
    return [
        {
            "round": entry["round"],
            "sparsity": entry["sparsity"],
            "kept": entry["kept"],
            "value": None if metric is None else entry["end"].get(metric),
            "best_step": (entry["best"] or {}).get("step"),
        }
        for entry in rounds
    ]


def rounds_plot(rounds: Sequence[Mapping[str, Any]]) -> bytes | None:
    """SVG of the metric at the end of each round, and of the step of lowest validation loss, against weights kept.

    None with fewer than two rounds or no metric. Example: ``rounds_plot(metrics["method"]["rounds"])``.
    """
    metric = round_metric(rounds)
    if metric is None or len(rounds) < 2:
        return None
    kept = [100 * (1 - entry["sparsity"]) for entry in rounds]
    is_share = metric.endswith("accuracy")
    values = [100 * (1 - entry["end"][metric]) if is_share else entry["end"][metric] for entry in rounds]
    name = label(metric).replace("accuracy", "error") + (", %" if is_share else "")
    panels = [(f"{name.capitalize()} at the end of each round", name, values)]
    if all(entry["best"] for entry in rounds):
        panels.append(("Step of the lowest validation loss", "step in the round", [entry["best"]["step"] for entry in rounds]))
    with mpl.rc_context(STYLE):
        drawn = figure(5.2 * len(panels), 3.6)
        for axes, (title, y_label, y) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            line = {"label": "rounds", "x": kept, "mean": y, "sd": [0.0] * len(y)}
            draw(axes, {"title": title, "x_label": "weights kept, %", "y_label": y_label, "log_x": True, "lines": [line]})
        return svg_bytes(drawn)
