"""Penalties that make units or weights zero: pure functions of tensors."""

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
from sparsetrain.penalties.variational import add_kl_gradient, kl_slope, log_alpha, variational_kl

__all__ = [
    "Part",
    "Units",
    "adam_steps",
    "add_kl_gradient",
    "group_hoyer_square",
    "group_lasso",
    "group_soft_threshold",
    "growing_l2",
    "growing_strengths",
    "kl_slope",
    "log_alpha",
    "metric_group_soft_threshold",
    "sparse_group_lasso",
    "sparse_group_soft_threshold",
    "ssl",
    "unit_norms",
    "unit_sizes",
    "variational_kl",
]
