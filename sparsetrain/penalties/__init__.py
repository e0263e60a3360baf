"""Penalties that make whole units zero: pure functions of tensors."""

from sparsetrain.penalties.norms import Part, Units, unit_norms, unit_sizes
from sparsetrain.penalties.proximal import (
    adam_steps,
    group_soft_threshold,
    metric_group_soft_threshold,
    sparse_group_soft_threshold,
)
from sparsetrain.penalties.values import (
    group_hoyer_square,
    group_lasso,
    growing_l2,
    growing_strengths,
    sparse_group_lasso,
    ssl,
)

__all__ = [
    "Part",
    "Units",
    "adam_steps",
    "group_hoyer_square",
    "group_lasso",
    "group_soft_threshold",
    "growing_l2",
    "growing_strengths",
    "metric_group_soft_threshold",
    "sparse_group_lasso",
    "sparse_group_soft_threshold",
    "ssl",
    "unit_norms",
    "unit_sizes",
]
