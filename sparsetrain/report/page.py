"""One self-contained ``report.html`` from a run directory: no network, no second file, no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sparsetrain.report import wording
from sparsetrain.report.domains import domain_facts, domains_plot
from sparsetrain.report.plots import data_uri, mask_pictures, training_plot
from sparsetrain.report.rounds import round_metric, round_rows, rounds_plot
from sparsetrain.report.run_directory import Run, read_run
from sparsetrain.report.tables import metric_rows, unit_rows

FOLD = 12
MOST_SINGLE = 40
MOST_CHANGES = 200
# A run that diverged may lack any of these; the template asks for each by name and refuses a name it does not know.
OPTIONAL = (
    "best",
    "command",
    "date",
    "dense",
    "dense_from",
    "device",
    "message",
    "metric",
    "recipe",
    "seconds",
    "seed",
)
LAYER_OPTIONAL = ("aliases", "asked", "ok", "problem")


def change_rows(changes: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of the change table and a note on what was left out.

    Up to 40 changes are shown one by one; beyond that the changes of one step and reason are summed into one row, and
    beyond 200 of those rows the first and last hundred remain. Totals are never dropped silently: the note says so.

    Example: ``rows, note = change_rows(metrics["changes"])``.
    """
    rows = [dict(change) for change in changes]
    if len(rows) <= MOST_SINGLE:
        return rows, ""
    steps: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["step"], row["why"])
        into = steps.setdefault(key, {**row, "tensors": 0, "died": 0, "grew": 0})
        into.update(tensors=into["tensors"] + 1, died=into["died"] + row["died"], grew=into["grew"] + row["grew"])
    merged = [{**row, "tensor": f"{row['tensors']} tensors"} for row in steps.values()]
    note = f"{len(rows):,} changes, one row a step"
    if len(merged) > MOST_CHANGES:
        half = MOST_CHANGES // 2
        note += f", the first and last {half} of {len(merged):,} steps"
        merged = merged[:half] + merged[-half:]
    return merged, note + "; the full list is in metrics.json."


def _facts(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the strip of large numbers under the verdict: (title, value, remark)."""
    facts = []
    sparsity = metrics.get("sparsity") or {}
    if sparsity.get("prunable"):
        asked = sparsity.get("asked")
        whole = f"; {wording.percent(sparsity['model'])} of the whole model" if sparsity.get("model") else ""
        remark = (f"asked {wording.percent(asked)}" if asked is not None else "of the prunable weights") + whole
        facts.append(("Sparsity", wording.percent(sparsity["actual"]), remark))
        facts.append(("Weights kept", wording.number(sparsity["kept"]), f"of {wording.number(sparsity['prunable'])} prunable"))
        if sparsity.get("compression"):
            facts.append(("Compression", wording.times(sparsity["compression"]), "fewer prunable weights"))
    name = metrics.get("metric") or ""
    final, dense = ((metrics.get(key) or {}).get(name) for key in ("final", "dense"))
    if final is not None:
        remark = f"{wording.change_text(name, dense, final)} against dense" if dense is not None else "no dense reference"
        facts.append((wording.label(name).capitalize(), wording.value_text(name, final), remark))
    if flops := metrics.get("flops"):
        facts.append(("FLOPs", wording.times(flops["dense"] / flops["sparse"]), "fewer, if zeros are skipped"))
    return facts


def _state(metrics: Mapping[str, Any]) -> str:
    if wording.diverged(metrics) or wording.failures(metrics):
        return "failed"
    return "verified" if metrics.get("verified") else "unverified"


def _context(run: Run, name: str) -> dict[str, Any]:
    metrics = run.metrics
    changes, change_note = change_rows(metrics.get("changes") or [])
    # Over domains every stage counts its steps from 0: they are no places in the curves.
    told = [] if metrics.get("continual") else metrics.get("changes") or []
    changed = {int(change["step"]) for change in told if change["died"] or change["grew"]}
    plot = training_plot(run.history, metrics.get("metric") or "", changed)
    rounds = (metrics.get("method") or {}).get("rounds") or []
    drawn = rounds_plot(rounds)
    domains = domains_plot(metrics)
    layers = [{**dict.fromkeys(LAYER_OPTIONAL), **layer} for layer in metrics.get("layers") or []]
    return {
        "metrics": {**dict.fromkeys((*OPTIONAL, "versions")), **metrics},
        "title": metrics.get("question") or metrics.get("recipe") or name,
        "verdict": _unbroken(wording.verdict)(metrics),
        "changed": bool(changed),
        "state": _state(metrics),
        "diverged": wording.diverged(metrics),
        "failures": wording.failures(metrics),
        "facts": _facts(metrics),
        "results": metric_rows(metrics),
        "plot": data_uri(plot, "image/svg+xml") if plot else "",
        "rounds": round_rows(rounds),
        "round_metric": round_metric(rounds),
        "rounds_plot": data_uri(drawn, "image/svg+xml") if drawn else "",
        "domains_plot": data_uri(domains, "image/svg+xml") if domains else "",
        "domain_facts": domain_facts(metrics),
        "units": unit_rows(metrics),
        "notes": run.notes,
        "pictures": mask_pictures(run.masks),
        "masks": len(run.masks),
        "patterns": {layer["name"]: layer["pattern"] for layer in layers},
        "layers": layers,
        "unclaimed": metrics.get("unclaimed") or {},
        "changes": changes,
        "change_note": change_note,
        "fold": FOLD,
        "config": run.config,
    }


def _unbroken(write: Callable[..., str]) -> Callable[..., str]:
    """Keep a number and its unit on one line."""
    return lambda *values: write(*values).replace(" %", "\u00a0%").replace(" pp", "\u00a0pp").replace(" ×", "\u00a0×")


def render(run: Run, name: str) -> str:
    """Return the page of a run as HTML text; ``name`` titles it when the run has neither question nor recipe.

    Example: ``render(read_run(path), path.name)``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for helper in ("change_text", "label", "number", "percent", "shape_text", "times", "value_text"):
        environment.filters[helper] = _unbroken(getattr(wording, helper))
    return environment.get_template("template.html").render(_context(run, name))


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Needs ``metrics.json``; ``history.jsonl``, ``masks.safetensors`` and ``config.yaml`` are shown when they are there.
    Equal inputs give equal bytes. Raises ``RecipeError`` when ``metrics.json`` is missing, truncated or lacks a key,
    ``MaskStateError`` when the mask file is broken.

    Example: ``write_report(Path("runs/digits"))``.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    path.write_text(render(read_run(run_dir), run_dir.resolve().name), encoding="utf-8")
    return path
