"""How a number is written for a person, and the one-sentence verdict of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FRACTIONS = ("accuracy", "acc", "error", "top1", "top5", "f1", "precision", "recall")


def percent(fraction: float, digits: int = 1) -> str:
    """Write a fraction as ``"90.0 %"``; digits are added rather than rounding a non-zero share to 0 or to 100 %.

    Example: ``percent(0.99996)`` gives ``"99.996 %"``, never ``"100.0 %"``.
    """
    if not math.isfinite(fraction):
        return number(fraction)
    while digits < 6 and 0 < abs(fraction) < 1 and round(100 * abs(fraction), digits) in (0.0, 100.0):
        digits += 1
    return f"{100 * fraction:.{digits}f} %".replace("-", "−")


def number(value: float) -> str:
    """Write a plain number with four significant digits; NaN and infinities by name.

    Example: ``number(0.123456)`` gives ``"0.1235"``.
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:,.0f}" if abs(value) >= 10_000 or value == int(value) else f"{value:.4g}"
    return text.replace("-", "−")


def times(factor: float) -> str:
    """Write a factor as ``"10×"`` or ``"9.6×"``.

    Example: ``times(9.61)`` gives ``"9.6×"``.
    """
    return f"{number(round(factor, 1))}×"


def is_fraction(name: str, *values: float | None) -> bool:
    """Tell whether a metric is a share of one, to be written in percent (``accuracy`` recorded in [0, 1]).

    Example: ``is_fraction("test/accuracy", 0.97)`` is true; with 97.0 it is false, the value is printed as it is.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    return name.rsplit("/", 1)[-1].lower().endswith(FRACTIONS) and all(0 <= value <= 1 for value in known)


def label(name: str) -> str:
    """Write ``"test/accuracy"`` as ``"accuracy (test)"``.

    Example: ``label("val/loss")`` gives ``"loss (val)"``.
    """
    split, _, metric = name.rpartition("/")
    return f"{metric.replace('_', ' ')} ({split})" if split else metric.replace("_", " ")


def value_text(name: str, value: float | None) -> str:
    """Write a metric's value: percent for shares, four digits for the rest, a dash when there is none.

    Example: ``value_text("test/accuracy", 0.972)`` gives ``"97.20 %"``.
    """
    if value is None:
        return "–"
    return percent(value, 2) if is_fraction(name, value) else number(value)


def change_text(name: str, before: float | None, after: float | None) -> str:
    """Write the change of a metric: percentage points for shares, relative percent for the rest.

    Example: ``change_text("test/accuracy", 0.972, 0.969)`` gives ``"−0.30 pp"``.
    """
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return "–"
    if is_fraction(name, before, after):
        text = f"{100 * (after - before):+.2f} pp"
    elif before == 0:
        text = f"{after:+.4g}"
    else:
        text = f"{100 * (after - before) / abs(before):+.1f} %"
    return text.replace("-", "−")


def shape_text(shape: list[int]) -> str:
    """Write a shape as ``"300 × 784"``.

    Example: ``shape_text([300, 784])``.
    """
    return " × ".join(str(size) for size in shape)


def failures(metrics: Mapping[str, Any]) -> list[str]:
    """Return every recorded reason why a run is not what it promised; empty only when nothing failed.

    A run that says ``verified: false`` without a reason still yields one line, and a layer that is not ok counts even
    when the run claims to be verified: a contradiction is a failure too.

    Example: ``failures({"verified": True, "problems": [], "layers": []})`` gives ``[]``.
    """
    found = [str(problem) for problem in metrics.get("problems") or []]
    for layer in metrics.get("layers") or []:
        text = str(layer.get("problem") or "does not hold its pattern or its sparsity")
        if layer.get("ok") is False and not any(layer["name"] in known or text in known for known in found):
            found.append(f"{layer['name']}: {text}")
    if metrics.get("verified") is False and not found:
        found.append("verification failed and metrics.json names no reason; run `sparsetrain verify` on this directory")
    return found


def diverged(metrics: Mapping[str, Any]) -> bool:
    """Tell whether the run ended early on a loss that was NaN or infinite.

    Example: ``diverged({"status": "diverged"})`` is true.
    """
    return metrics.get("status") == "diverged"


def unclaimed(metrics: Mapping[str, Any]) -> str:
    """The weights that masks could have held and do not, in a line: the first three by name, and why; empty without any.

    Example: ``unclaimed({"unclaimed": {"head.weight": "has no zeros, stays dense"}})``.
    """
    found = metrics.get("unclaimed") or {}
    more = f"; and {len(found) - 3} more, in metrics.json" if len(found) > 3 else ""
    return "; ".join(f"{name}: {why}" for name, why in list(found.items())[:3]) + more


def main_change(metrics: Mapping[str, Any]) -> str:
    """Write the run's own metric, dense to sparse: ``"accuracy 97.20 % → 96.90 % (−0.30 pp)"``; empty without one.

    Example: ``main_change(metrics)``.
    """
    name = metrics.get("metric") or ""
    after = (metrics.get("final") or {}).get(name)
    before = (metrics.get("dense") or {}).get(name)
    if after is None:
        return ""
    short = label(name.rsplit("/", 1)[-1])
    if before is None:
        return f"{short} {value_text(name, after)}"
    return f"{short} {value_text(name, before)} → {value_text(name, after)} ({change_text(name, before, after)})"


def verdict(metrics: Mapping[str, Any]) -> str:
    """Say in one sentence what was removed, what it cost and whether it was verified.

    Example: ``verdict(metrics)`` gives ``"90.0 % of the prunable weights removed (10× fewer), accuracy 97.20 % →
    96.90 % (−0.30 pp), every promise verified."``
    """
    parts: list[str] = []
    sparsity = metrics.get("sparsity") or {}
    if sparsity.get("actual"):
        fewer = f" ({times(sparsity['compression'])} fewer)" if sparsity.get("compression") else ""
        parts.append(f"{percent(sparsity['actual'])} of the prunable weights removed{fewer}")
    elif removed := (metrics.get("method") or {}).get("removed"):
        parts.append(f"{len(removed)} residual blocks removed ({', '.join(removed)})")
    elif sparsity:
        parts.append("no weight removed")
    if cost := main_change(metrics):
        parts.append(cost)
    failed = failures(metrics)
    if failed:
        parts.append(f"VERIFICATION FAILED ({len(failed)} problem{'s' if len(failed) > 1 else ''})")
    else:
        parts.append("every promise verified" if metrics.get("verified") else "not verified")
    sentence = ", ".join(parts)
    if diverged(metrics):
        return f"This run diverged and has no result: {metrics.get('message') or 'the loss became NaN or infinite'}"
    return sentence[0].upper() + sentence[1:] + "."
