"""Every notebook runs from top to bottom in a fresh kernel, and is committed with the outputs and plots of such a run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    # Jupyter warns about itself on import (paths it means to move).
    warnings.simplefilter("ignore")
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_CODE_CELLS = 10
A_PATH_OF_ONE_MACHINE = re.compile(r"(?<![\w.])/(home|Users|tmp|root|work|var|private|usr|opt)/|[A-Z]:\\")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code(notebook) for output in cell.outputs]


def plots(notebook: NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def text(output: NotebookNode) -> str:
    data = output.get("data", {})
    return output.get("text", "") + data.get("text/plain", "") + data.get("text/markdown", "")


def faults(notebook: NotebookNode) -> list[str]:
    """What a reader would stumble over."""
    found = []
    cells = code(notebook)
    if len(cells) > MOST_CODE_CELLS:
        found.append(f"{len(cells)} code cells")
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("not run once from top to bottom")
    found += [f"cell {cell.execution_count} shows nothing" for cell in cells if not cell.outputs]
    if not plots(notebook):
        found.append("no plot")
    for output in outputs(notebook):
        if output.output_type == "error" or output.get("name") == "stderr":
            found.append(f"{output.output_type}: {output.get('text', output.get('evalue'))}")
        if A_PATH_OF_ONE_MACHINE.search(text(output)):
            found.append(f"a path of one machine: {text(output)}")
    if not cells or "assert " not in cells[-1].source:
        found.append("the last cell asserts nothing")
    return found


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a notebook's code in a fresh kernel, in an empty directory; raises `CellExecutionError` where a cell does."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    here, scratch = tmp_path / "here", tmp_path / "scratch"
    here.mkdir()
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))

    def run(notebook: NotebookNode) -> NotebookNode:
        for cell in code(notebook):
            cell.outputs, cell.execution_count = [], None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return NotebookClient(
                notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(here)}}
            ).execute()

    return run


def read(path: Path) -> NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == [
        "dense_to_sparse",
        "one_mask_for_many_domains",
        "prune_a_language_model",
        "smaller_while_it_trains",
        "sparse_from_the_start",
        "what_to_prune",
    ]


@every_notebook
def test_runs_and_shows_what_is_committed(path, execute, tmp_path):
    committed = read(path)
    executed = execute(read(path))
    assert faults(executed) == []
    assert plots(executed) == plots(committed)
    assert list((tmp_path / "here").iterdir()) == []  # a reader's directory stays as it was


@every_notebook
def test_committed_outputs_are_fit_to_be_read(path):
    assert faults(read(path)) == []
    assert path.stat().st_size < 300_000


def test_cleared_outputs_and_chatter_are_faults():
    notebook = read(NOTEBOOKS[0])
    first = code(notebook)[0]
    first.outputs[0]["name"], first.outputs[0]["text"] = "stderr", "Restoring states from /tmp/x/last.ckpt"
    assert [fault.split(":")[0] for fault in faults(notebook)] == ["stream", "a path of one machine"]
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    assert {"no plot", "not run once from top to bottom"} < set(faults(notebook))


def test_a_notebook_whose_zeros_come_back_fails(execute):
    """The twin of the run above: weights are masked no longer, and the notebook cannot be run to its end."""
    notebook = read(NOTEBOOKS[0])
    first, second = code(notebook)[:2]
    sabotage = "import sparsetrain\nsparsetrain.MaskManager.enforce = lambda self, optimizer=None: None\n"
    second.source = sabotage + second.source
    notebook.cells = [first, second]
    with pytest.raises(CellExecutionError, match="pruned weights are not zero"):
        execute(notebook)
