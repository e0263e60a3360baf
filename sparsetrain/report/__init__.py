"""From a run directory to things people read: one self-contained page, terminal tables, plots.

The result files live in ``sparsetrain.report.results`` (also a command: ``python -m sparsetrain.report.results``).
"""

from __future__ import annotations

from sparsetrain.report.page import write_report
from sparsetrain.report.schedule import plot_sparsity_curve, sparsity_curve_text
from sparsetrain.report.tables import layer_table, result_table

__all__ = ["layer_table", "plot_sparsity_curve", "result_table", "sparsity_curve_text", "write_report"]
