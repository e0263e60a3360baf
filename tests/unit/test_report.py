"""The page and the terminal tables, on a run directory made by hand."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from sparsetrain.errors import MaskStateError, RecipeError
from sparsetrain.report import layer_table, result_table, write_report
from sparsetrain.report.page import change_rows
from sparsetrain.report.wording import change_text, number, percent, verdict

VERDICT = "90.0 % of the prunable weights removed (10× fewer), accuracy 97.20 % → 96.90 % (−0.30 pp), every promise verified."


def metrics(**changed: Any) -> dict[str, Any]:
    layer = {"name": "fc.weight", "aliases": ["tied.weight"], "shape": [20, 50], "pattern": "unstructured"}
    return {
        "recipe": "toy",
        "question": "Is <b>it</b> sparse?",
        "command": "sparsetrain run toy.yaml",
        "date": "2026-07-14T09:30:00+00:00",
        "seed": 7,
        "metric": "test/accuracy",
        "higher_is_better": True,
        "dense": {"test/accuracy": 0.972, "test/loss": 0.08},
        "dense_from": "end of the dense phase (step 300)",
        "final": {"test/accuracy": 0.969, "test/loss": 0.1},
        "best": None,
        "sparsity": {"asked": 0.9, "actual": 0.9, "prunable": 1000, "kept": 100, "compression": 10.0, "model": 0.8},
        "layers": [{**layer, "asked": 0.9, "actual": 0.9, "kept": 100, "ok": True, "problem": None}],
        "verified": True,
        "problems": [],
        "changes": [{"step": 30, "tensor": "fc.weight", "died": 900, "grew": 0, "why": "magnitude"}],
        "seconds": {"total": 3.5, "fit": 2.5},
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "flops": {"dense": 2000, "sparse": 200},
        **changed,
    }


def write_masks(path: Path, masks: dict[str, np.ndarray]) -> None:
    packed = {name: np.packbits(mask.ravel(), bitorder="little") for name, mask in masks.items()}
    about = {
        name: {
            "shape": list(mask.shape),
            "pattern": "unstructured",
            "sparsity": "9/10",
            "alive": int(mask.sum()),
            "crc": zlib.crc32(packed[name].tobytes()),
        }
        for name, mask in masks.items()
    }
    save_file(packed, str(path), metadata={"sparsetrain": json.dumps({"version": 1, "masks": about})})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    mask = np.zeros((20, 50), dtype=bool)
    mask[::2, :10] = True
    write_masks(tmp_path / "masks.safetensors", {"fc.weight": mask})
    rows = [{"step": s, "train/loss": 1 / s, "sparsity/global": 0.9 * (s >= 30)} for s in range(1, 61)]
    rows += [{"step": s, "val/accuracy": s / 100, "val/loss": 1.5 / s} for s in range(10, 61, 10)]
    (tmp_path / "history.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "config.yaml").write_text("seed: 7\nname: a & b\n")
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()))
    return tmp_path


def page(run: Path, **changed: Any) -> str:
    if changed:
        (run / "metrics.json").write_text(json.dumps(metrics(**changed)))
    return write_report(run).read_text(encoding="utf-8").replace("\u00a0", " ")


def printed(table: Table, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return text


def test_the_page_needs_no_other_file_no_network_and_no_script(run: Path) -> None:
    html = page(run)
    links = re.findall(r"""(?:src|href)=["']([^"']+)|url\(([^)]*)""", html)
    assert len(links) == 2, "one training plot, one mask"
    assert all(link.startswith("data:image/") for link, _ in links)
    assert "<script" not in html
    assert "@import" not in html


def test_the_page_says_the_verdict_and_escapes_what_people_wrote(run: Path) -> None:
    html = page(run)
    assert VERDICT in html
    assert "Is &lt;b&gt;it&lt;/b&gt; sparse?" in html
    assert "a &amp; b" in html
    assert "end of the dense phase (step 300)" in html
    for fact in ("sparsetrain run toy.yaml", "torch 2.13.0", "total 3.5", "= tied.weight", "80.0 % of the whole model"):
        assert fact in html
    assert "Verification failed" not in html


def test_what_no_mask_claims_is_told(run: Path) -> None:
    left = {f"{name}.weight": "has no zeros, stays dense" for name in ("head", "<b>", "c", "d")}
    assert "Not claimed" not in page(run)
    html = page(run, unclaimed=left)
    assert "<h2>Not claimed</h2>" in html
    assert all(f"{name}.weight" in html for name in ("head", "&lt;b&gt;", "c", "d"))
    told = " ".join(printed(result_table(metrics(unclaimed=left))).split())
    assert "not claimed: head.weight: has no zeros, stays dense; <b>.weight" in told
    assert "; and 1 more, in metrics.json" in told
    assert "Not claimed" not in page(run, unclaimed={})
    assert "not claimed" not in printed(result_table(metrics()))


def test_a_failed_verification_is_first_and_names_each_problem(run: Path) -> None:
    layers = [{**metrics()["layers"][0], "ok": False, "problem": "917 weights too many"}]
    html = page(run, verified=False, problems=["momentum at 12 pruned entries"], layers=layers)
    assert html.index("<h2>Verification failed") < html.index("<h1>")
    for problem in ("momentum at 12 pruned entries", "fc.weight: 917 weights too many"):
        assert f"<li>{problem}</li>" in html
    assert "VERIFICATION FAILED (2 problems)" in html
    assert "every promise verified" not in html


@pytest.mark.parametrize(
    "changed",
    [
        {"verified": False},
        {"layers": [{**metrics()["layers"][0], "ok": False}]},
        {"problems": ["claims to be verified all the same"]},
    ],
)
def test_a_failure_without_a_reason_or_against_the_claim_is_still_shown(run: Path, changed: dict[str, Any]) -> None:
    html = page(run, **changed)
    assert "<h2>Verification failed" in html
    assert "every promise verified" not in html
    assert "NO: 1 problem" in printed(result_table(metrics(**changed)))


def test_optional_parts_may_be_missing(run: Path) -> None:
    for name in ("history.jsonl", "masks.safetensors", "config.yaml"):
        (run / name).unlink()
    html = page(run, dense=None, dense_from=None, flops=None, changes=[], question=None)
    assert "No dense reference was measured" in html
    assert "<h1>toy</h1>" in html
    for absent in ("<h2>Training", "<h2>Masks", "<h2>Mask changes", "config.yaml", "FLOPs"):
        assert absent not in html
    assert "accuracy 96.90 %, every promise verified" in html


def test_a_diverged_run_says_so_first_and_marks_where(run: Path) -> None:
    message = "train/loss became NaN at step 12"
    (run / "metrics.json").write_text(json.dumps({"status": "diverged", "message": message}))
    rows = [{"step": s, "train/loss": 1.0 if s < 12 else None} for s in range(20)]
    (run / "history.jsonl").write_text("\n".join(map(json.dumps, rows)))
    html = page(run)
    assert html.index(message) < html.index("<h1>")
    assert "verified" not in html[html.index("<body>") :]
    plot = re.search(r'class="plot" src="data:image/svg\+xml;base64,([^"]+)', html)
    assert plot is not None
    assert "not finite from step 12" in base64.b64decode(plot[1]).decode()
    assert message in " ".join(printed(result_table({"status": "diverged", "message": message})).split())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is missing"),
        ('{"final": {"test', "truncated"),
        ("[]", "list"),
        ('{"final": {}}', "'sparsity', 'layers'"),
    ],
)
def test_an_unusable_metrics_file_is_an_error_with_its_path(run: Path, content: str | None, says: str) -> None:
    path = run / "metrics.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(RecipeError, match=says) as caught:
        write_report(run)
    assert str(path) in str(caught.value)
    assert not (run / "report.html").exists()


def test_no_directory_and_a_broken_mask_file_are_errors(run: Path) -> None:
    with pytest.raises(RecipeError, match="not a directory"):
        write_report(run / "nowhere")
    whole = (run / "masks.safetensors").read_bytes()
    (run / "masks.safetensors").write_bytes(whole[:-7])
    with pytest.raises(MaskStateError):
        write_report(run)


def test_a_cut_off_last_history_line_is_told_and_a_broken_middle_refused(run: Path) -> None:
    path = run / "history.jsonl"
    lines = path.read_text()
    assert "is cut off" not in page(run)
    path.write_text(lines + '{"step": 61, "trai')
    assert "The last line of history.jsonl is cut off" in page(run)
    path.write_text('{"step": \n' + lines)
    with pytest.raises(RecipeError, match="line 1 "):
        write_report(run)


def test_equal_runs_give_equal_bytes_and_large_masks_a_small_page(run: Path) -> None:
    generator = np.random.default_rng(0)
    write_masks(run / "masks.safetensors", {f"w{i}": generator.random((1500, 700)) < 0.1 for i in range(8)})
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert len(first) < 1_500_000
    assert first.count(b"<figure>") == 6


def test_many_changes_are_summed_by_step_and_the_cut_is_told() -> None:
    few = [{"step": 1, "tensor": f"t{i}", "died": 2, "grew": 1, "why": "w"} for i in range(40)]
    assert change_rows(few) == (few, "")
    many = [{"step": s, "tensor": f"t{i}", "died": 2, "grew": 1, "why": "w"} for s in range(300) for i in range(3)]
    rows, note = change_rows(many)
    assert [row["step"] for row in rows] == [*range(100), *range(200, 300)]
    assert {(row["tensor"], row["died"], row["grew"]) for row in rows} == {("3 tensors", 6, 3)}
    assert "900 changes" in note
    assert "300 steps" in note


def test_the_result_table_reads_dense_against_sparse() -> None:
    cells = [[cell.strip() for cell in line.split("│")] for line in printed(result_table(metrics())).splitlines()]
    assert ["", "accuracy (test)", "97.20 %", "96.90 %", "−0.30 pp", ""] in cells
    assert ["", "error (test)", "2.80 %", "3.10 %", "+0.30 pp", ""] in cells
    assert ["", "loss (test)", "0.08", "0.1", "+25.0 %", ""] in cells
    assert ["", "weights kept", "1,000", "100", "10× fewer", ""] in cells
    assert ["", "verified", "", "yes", "", ""] in cells
    with_best = printed(result_table(metrics(best={"test/accuracy": 0.975})))
    assert "97.50 %" in with_best
    assert "not checked" in printed(result_table(metrics(verified=None)))


def test_the_layer_table_fits_and_names_what_does_not_hold() -> None:
    good = metrics()["layers"][0]
    bad = {**good, "name": "encoder.layers.11.attention.output.dense.weight", "ok": False, "problem": "not 2:4 [row 3]"}
    text = printed(layer_table([good, bad]))
    assert "= tied.weight" in text
    assert "weight: not 2:4 [row 3]" in text
    assert "NO" in text
    assert "NO" not in printed(layer_table([good]))


def test_numbers_are_never_rounded_to_all_or_nothing() -> None:
    assert [percent(x) for x in (0.9, 0.99996, 0.0001, 0.0, 1.0)] == [
        "90.0 %",
        "99.996 %",
        "0.01 %",
        "0.0 %",
        "100.0 %",
    ]
    assert [number(x) for x in (26620, 0.123456, float("nan"))] == ["26,620", "0.1235", "NaN"]
    assert change_text("perplexity", 20.0, 25.0) == "+25.0 %"
    assert change_text("test/accuracy", 97.2, 96.9) == "−0.3 %", "an accuracy recorded in percent is no share of one"
    assert verdict(metrics(sparsity={**metrics()["sparsity"], "actual": 0.0})).startswith("No weight removed")


ROUNDS = [
    {
        "round": number,
        "sparsity": 1 - 0.5**number,
        "kept": 1000 // 2**number,
        "end": {"val/accuracy": 0.5, "test/accuracy": 0.9 + 0.01 * number},
        "best": {"step": 700 - 100 * number},
    }
    for number in range(3)
]


def test_units_left_are_told(run: Path) -> None:
    few = {"method": {"structure": {"units": {"fc1": [39, 300], "fc2": [49, 100]}}}}
    assert "Units left" not in page(run)
    text = page(run, **few)
    assert "Units left" in text
    assert '<tr><td>fc1</td><td class="n">300</td><td class="n">39</td><td class="n">13.0 %</td></tr>' in text
    rows = printed(result_table(metrics(**few)), 100)
    assert re.search(r"units: fc2 +│ +100 │ +49 │ +49.0 % left", rows)
    many = {"method": {"structure": {"units": {f"h.{i}": [1, 4] for i in range(9)}}}}
    assert re.search(r"units: all groups +│ +36 │ +9 │ +25.0 % left", printed(result_table(metrics(**many)), 100))


def test_rounds_are_a_table_and_a_plot(run: Path) -> None:
    text = page(run, method={"rounds": ROUNDS})
    rounds = re.search(r'<table class="rounds">.*?</table>', text, re.DOTALL)
    assert rounds
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rounds[0].split("<tr>")[2:]]
    assert [row[0] for row in cells] == ["0", "1", "2"]
    assert [row[2:] for row in cells] == [["1,000", "90.00 %", "700"], ["500", "91.00 %", "600"], ["250", "92.00 %", "500"]]
    [drawn] = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)" alt="The metric at the end of each round', text)
    assert "Error (test), % at the end of each round" in base64.b64decode(drawn).decode()
    assert "Rounds" not in page(run, method={})


def test_rounds_without_metrics_are_a_table_alone(run: Path) -> None:
    bare = [{**entry, "end": {}, "best": None} for entry in ROUNDS]
    text = page(run, method={"rounds": bare})
    assert '<table class="rounds">' in text
    assert "The metric at the end of each round" not in text
