"""Recorded results: every claim follows from its numbers, and the README says what the files say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.errors import RecipeError
from sparsetrain.report.results import BEGIN, END, check_result, load_result, main, results_markdown


def record(tmp_path: Path, **changed: Any) -> Path:
    row = {"method": "gmp", "model": "LeNet-300-100", "data": "digits", "compression": 10.0, "sparsity": 0.9}
    row |= {"pattern": "unstructured", "metric": "error %", "higher_is_better": False, "values": [1.0, 2.0, 3.0]}
    row |= {"mean": 2.0, "sd": 1.0, "published": 2.1, "source": "Han 2015", "goal": 2.5, "met": True, **changed}
    result = {"question": "Does it hold?", "command": "make gmp", "date": "2026-07-14", "machine": "2 cores"}
    path = tmp_path / "gmp.json"
    path.write_text(json.dumps({**result, "versions": {}, "seconds": 120, "rows": [row]}))
    return path


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, None),
        ({"values": [1, 2, 4], "mean": 2.33, "sd": 1.53}, None),
        ({"values": [2.0], "sd": None}, None),
        ({"goal": None, "met": None}, None),
        ({"higher_is_better": True, "met": False}, None),
        ({"goal": 2.0}, None),
        ({"goal": 2.0, "higher_is_better": True}, None),
        ({"mean": 1.9}, "mean"),
        ({"mean": 2.004}, "mean"),
        ({"sd": 0.816}, "sd"),
        ({"values": [2.0], "sd": 1.0}, "sd"),
        ({"compression": 12.0}, "compression"),
        ({"compression": None}, "compression"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"met": False}, "met"),
        ({"goal": 1.99}, "met"),
        ({"higher_is_better": True}, "met"),
        ({"goal": None}, "met"),
        ({"values": []}, "values"),
    ],
)
def test_every_claim_of_a_result_follows_from_its_numbers(tmp_path: Path, changed: dict[str, Any], word: str | None) -> None:
    path = record(tmp_path, **changed)
    problems = check_result(load_result(path))
    if word is None:
        assert problems == []
        assert "Does it hold?" in results_markdown([path])
    else:
        assert [problem for problem in problems if word in problem] == problems != []
        with pytest.raises(RecipeError, match=word):
            results_markdown([path])


def test_a_result_file_that_lacks_something_is_refused(tmp_path: Path) -> None:
    path = record(tmp_path)
    content = json.loads(path.read_text())
    del content["rows"][0]["goal"]
    path.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=r"rows\[0\]\.goal"):
        load_result(path)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(RecipeError, match="truncated"):
        load_result(path)
    with pytest.raises(RecipeError, match="cannot read"):
        load_result(tmp_path / "none.json")


def test_the_readme_block_is_rewritten_checked_and_left_alone_otherwise(tmp_path: Path) -> None:
    path, readme = record(tmp_path), tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert main(["--check", str(readme), str(path)]) == 1
    assert "old" in readme.read_text()
    command = [sys.executable, "-W", "error", "-m", "sparsetrain.report.results", str(readme), str(path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    text = readme.read_text()
    row = "| gmp | LeNet-300-100 | digits | unstructured | 90 % (10×) | error % | 3 seeds | 2.00 ± 1.00 |"
    assert f"{row} 2.1 (Han 2015) | ≤ 2.5 | yes |" in text
    assert text.startswith(f"# Title\n\n{BEGIN}\n**Does it hold?**")
    assert text.endswith(f"(2026-07-14, 2 cores, 2 min)\n{END}\n\nafter\n")
    assert main(["--check", str(readme), str(path)]) == 0
    record(tmp_path, goal=1.5, met=False)
    assert main(["--check", str(readme), str(path)]) == 1
    assert main([str(readme), str(path)]) == 0
    assert "**no**" in readme.read_text()


def test_a_readme_without_markers_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("nothing\n")
    assert main([str(tmp_path / "README.md"), str(record(tmp_path))]) == 2
    assert BEGIN in capsys.readouterr().err
    assert main([str(tmp_path / "none.md")]) == 2
