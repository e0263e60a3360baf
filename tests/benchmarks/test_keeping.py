"""The benchmark measures what it says: every way trains, ours is verified, and its masks cost one byte a weight."""

from __future__ import annotations

import pytest
import torch

from sparsetrain import MaskManager, prune

from .bench_keeping import INCLUDE, WAYS, build, measure


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_every_way_takes_its_turn() -> None:
    seconds = measure(64, 1, 2)
    assert list(seconds) == list(WAYS)
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())


def test_masks_cost_one_byte_a_weight_and_nothing_while_dense() -> None:
    manager = MaskManager(build(64, 1), INCLUDE)
    assert manager.masks == {}
    prune(manager, 0.5)
    weights = sum(t.target.parameter.numel() for t in manager)
    assert sum(mask.untyped_storage().nbytes() for mask in manager.masks.values()) == weights
    assert all(mask.dtype == torch.bool for mask in manager.masks.values())
