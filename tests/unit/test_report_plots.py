"""The pictures of the report and of a plan: density, masks, curves, phases, the staircase in text."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from sparsetrain.errors import RecipeError
from sparsetrain.report import plot_sparsity_curve, sparsity_curve_text
from sparsetrain.report.plots import density, mask_picture, mask_pictures, series, training_plot
from sparsetrain.report.schedule import phases


def image(uri: str) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


@pytest.mark.parametrize(("rows", "columns", "largest"), [(4, 4, 8), (7, 5, 3), (10, 23, 4), (1, 9, 2)])
def test_density_averages_every_weight_exactly_once(rows: int, columns: int, largest: int) -> None:
    mask = np.random.default_rng(rows).random((rows, columns)) < 0.4
    values, (high, wide) = density(mask, largest)
    assert max(values.shape) <= largest
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            cells = [
                mask[r, c]
                for r in range(i * high, min(rows, (i + 1) * high))
                for c in range(j * wide, min(columns, (j + 1) * wide))
            ]
            assert values[i, j] == sum(cells) / len(cells)


def test_a_mask_picture_is_white_exactly_where_weights_are_removed() -> None:
    mask = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[2] = False
    picture = mask_picture("conv.weight", mask)
    white = torch.from_numpy(image(picture.whole)[..., :3].min(axis=-1) == 1.0)
    assert torch.equal(white, ~mask.reshape(6, 12))
    assert (picture.empty_rows, picture.rows, picture.columns) == (1, 6, 12)
    assert picture.window == ""


def test_a_large_mask_is_averaged_with_its_middle_shown_weight_by_weight() -> None:
    mask = torch.zeros(300, 600, dtype=torch.bool)
    mask[134:, 284:] = True  # the window starts at 128 and 280: (300 - 32) / 2 and (600 - 32) / 2 down to a multiple of 8
    picture = mask_picture("w", mask)
    assert picture.block == (2, 3)
    assert image(picture.whole).shape[:2] == (150, 200)
    expected = np.ones((32, 32), dtype=bool)
    expected[6:, 4:] = False
    assert np.array_equal(image(picture.window)[..., :3].min(axis=-1) == 1.0, expected)


def test_the_largest_masks_are_shown_in_model_order_and_dense_ones_last() -> None:
    masks = {f"w{i}": torch.zeros(size, 2, dtype=torch.bool) for i, size in enumerate((5, 3, 9, 7))}
    masks["dense"] = torch.ones(50, 2, dtype=torch.bool)
    assert [picture.name for picture in mask_pictures(masks, most=3)] == ["w0", "w2", "w3"]


def test_the_training_plot_shows_what_was_logged_and_nothing_else() -> None:
    rows = [{"step": s, "val/accuracy": 0.5, "train/loss": 1.0, "sparsity/global": 0.1} for s in range(1, 9)]
    full = training_plot(rows, "test/accuracy", [3])
    bare = training_plot([{"step": row["step"], "train/loss": row["train/loss"]} for row in rows], "test/accuracy", [])
    assert full is not None
    assert bare is not None
    for text in (b"accuracy (val)", b"sparsity", b"mask changed"):
        assert text in full
        assert text not in bare
    assert b"loss (train)" in bare
    assert training_plot([{"step": 1, "lr": 0.1}], "test/accuracy", []) is None


def test_a_long_run_with_a_mask_change_every_step_stays_a_small_plot() -> None:
    rows = [{"step": s, "train/loss": 1.0, "sparsity/global": 0.9 * s / 9000} for s in range(1, 9001)]
    plot = training_plot(rows, "test/accuracy", range(1, 9001))
    assert plot is not None
    assert len(plot) < 200_000
    assert b"mask changed" in plot


def test_long_curves_are_averaged_and_keep_their_mean() -> None:
    rows = [{"step": s, "train/loss": float(s % 5)} for s in range(4000)]
    steps, values, merged = series(rows, "train/loss")
    assert (len(steps), merged) == (800, 5)
    assert set(values) == {2.0}


def test_a_plan_is_split_into_its_phases() -> None:
    staircase = [(100, 0.5), (150, 0.5), (200, 0.9)]
    assert phases(staircase, 300) == [("dense", 0, 100), ("pruning", 100, 200), ("fine-tuning", 200, 300)]
    assert phases([(0, 0.8)], 50) == [("constant sparsity", 0, 50)]
    assert phases([(10, 0.0)], 50) == [("dense", 0, 50)]


def test_the_text_plot_is_the_staircase() -> None:
    # 63 columns over 63 steps: column c shows step c + 1; half the height is 4 of 8 rows.
    lines = sparsity_curve_text([(21, 0.4), (42, 0.8)], 63).splitlines()
    assert lines[0] == " 80.0 % │" + " " * 41 + "█" * 22
    assert lines[3] == "        │" + " " * 41 + "█" * 22
    assert lines[4] == " 40.0 % │" + " " * 20 + "█" * 43
    assert lines[7] == "        │" + " " * 20 + "█" * 43
    assert lines[-1].strip() == "dense 0–21 · pruning 21–42 · fine-tuning 42–63"
    assert max(map(len, lines)) == 72
    assert "▁" in sparsity_curve_text([(10, 0.001), (30, 0.9)], 63), "a little sparsity must not look dense"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_plan_plot_is_written_and_depends_on_the_plan(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in "abc"]
    for path, end in zip(paths, (0.9, 0.9, 0.5), strict=True):
        plot_sparsity_curve([(10, 0.3), (20, end)], 30, path, "toy")
    first, same, other = (path.read_bytes() for path in paths)
    assert first[:5] in {b"\x89PNG\r", b"<?xml"}
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("points", "total"), [([], 10), ([(1, 0.5)], 0), ([(5, 0.5), (5, 0.6)], 10), ([(11, 0.5)], 10), ([(1, 1.0)], 10)]
)
def test_an_impossible_plan_is_refused(tmp_path: Path, points: list[tuple[int, float]], total: int) -> None:
    with pytest.raises(RecipeError):
        sparsity_curve_text(points, total)
    with pytest.raises(RecipeError):
        plot_sparsity_curve(points, total, tmp_path / "plan.png", "toy")
    with pytest.raises(RecipeError, match=r"\.gif"):
        plot_sparsity_curve([(1, 0.5)], 10, tmp_path / "plan.gif", "toy")
