"""What a model could do on every domain after every stage, and what follows from it: average, forgetting, transfer.

``R[t, i]`` is a metric on domain ``i`` after stage ``t`` (``T`` stages, as many domains), ``before[i]`` before the first.

* average: ``1/T sum_i R[T, i]``;
* backward transfer (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, eq. 3): ``1/(T-1) sum_(i<T) (R[T, i] - R[i, i])``, with its
  sign as it is; ``forgetting`` is the same turned so that more is worse, whatever the metric;
* forward transfer (eq. 4): ``1/(T-1) sum_(i>1) (R[i-1, i] - before[i])``;
* learned: ``1/T sum_i R[i, i]``, what each domain had when it was learned.

Where the data of an earlier domain is gone, ``R[T, i]`` is None; average and backward transfer are then over the domains that
are measured in the end. A method that never changes its mask has a backward transfer of exactly 0, and may still be poor: read
it beside the average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from sparsetrain.errors import DataError

_Row = Sequence[float | None]
_Rows = Sequence[_Row]


class ContinualMatrix(Metric):
    """``R`` as a torchmetrics metric: `update` with every evaluation, `compute` for everything that follows from it.

    Args:
        domains: how many there are.
        higher_is_better: of the metric that is put in: True for accuracy and return, False for perplexity and loss.

    Raises `DataError` for a place outside of the matrix, and from ``compute`` while evaluations are missing.

    Example::

        matrix = ContinualMatrix(3, higher_is_better=False)
        matrix.update(0, 1, 20.0)                     # after the first stage, on the second domain
        matrix.compute()["backward_transfer"]         # once all nine are there
    """

    values: Tensor
    gone: Tensor
    before: Tensor
    full_state_update = False

    def __init__(self, domains: int, higher_is_better: bool) -> None:
        super().__init__()
        self.domains = domains
        object.__setattr__(self, "higher_is_better", higher_is_better)
        nothing = torch.full((domains, domains), torch.nan, dtype=torch.float64)
        self.add_state("values", nothing, dist_reduce_fx=None)
        self.add_state("gone", torch.zeros(domains, domains, dtype=torch.bool), dist_reduce_fx=None)
        self.add_state("before", nothing[0].clone(), dist_reduce_fx=None)

    def update(self, stage: int, domain: int, value: float | None) -> None:
        """The metric on a domain after a stage, both counted from 0; stage -1 is before the first. None: its data is gone."""
        if not (-1 <= stage < self.domains and 0 <= domain < self.domains):
            raise DataError(f"stage {stage}, domain {domain}: there are {self.domains} of them, counted from 0")
        (self.before if stage < 0 else self.values[stage])[domain] = math.nan if value is None else value
        if stage >= 0:
            self.gone[stage, domain] = value is None

    def compute(self) -> dict[str, float]:
        """``average``, ``learned``, ``backward_transfer``, ``forgetting`` and ``forward_transfer``; see the module.

        With one domain there is no transfer, which is then left out; so is backward transfer where no earlier domain is
        measured in the end, and forward transfer where ``before`` is not known.
        """
        rows, last = self.values, self.values[-1]
        measured = ~self.gone[-1]
        if bool(torch.isnan(last[measured]).any() or torch.isnan(rows.diagonal()).any()):
            raise DataError(
                "the matrix lacks evaluations, or has some that are no number: every domain is needed after its own stage, and "
                "all after the last, but for those whose data is gone (None)"
            )
        found = {"average": float(last[measured].mean()), "learned": float(rows.diagonal().mean())}
        if bool(measured[:-1].any()):
            backward = float((last - rows.diagonal())[:-1][measured[:-1]].mean())
            found["backward_transfer"] = backward
            found["forgetting"] = 0.0 - backward if self.higher_is_better else backward  # never -0.0
        if self.domains > 1:
            forward = rows.diagonal(1) - self.before[1:]
            if not bool(torch.isnan(forward).any()):
                found["forward_transfer"] = float(forward.mean())
        return found


def continual_metrics(rows: _Rows, higher_is_better: bool, before: _Row | None = None) -> dict[str, float]:
    """What follows from a whole matrix ``R``, one row a stage, None where nothing was measured; see `ContinualMatrix`.

    Example: ``continual_metrics([[10, 9], [12, 20]], higher_is_better=False)["forgetting"]`` is 2.
    """
    matrix = ContinualMatrix(len(rows), higher_is_better)
    for t, row in enumerate([before or (), *rows], start=-1):
        for i, value in enumerate(row):
            matrix.update(t, i, value)
    found: dict[str, float] = matrix.compute()
    return found


def reference_metrics(rows: _Rows, higher_is_better: bool, fresh: _Rows, joint: _Rows) -> dict[str, float]:
    """How far a matrix is from two others of the same domains; both numbers are turned so that more is worse.

    ``intransigence`` (Chaudhry et al. 2018, arXiv 1801.10112): the mean of ``R[i, i] - fresh[i, i]``, ``fresh`` having every
    domain pruned for itself; ``joint_gap``: the difference of the averages, ``joint`` having all data at once, over the domains
    that both have measured in the end.

    Example: ``reference_metrics([[10, 9], [12, 20]], False, [[9, 9], [9, 19]], [[9, 9], [10, 20]])["joint_gap"]`` is 1.
    """
    sign = -1.0 if higher_is_better else 1.0
    mine, alone, at_once = (_numbers(found) for found in (rows, fresh, joint))
    own, gap = (mine - alone).diagonal(), (mine - at_once)[-1]
    return {"intransigence": sign * float(own.mean()), "joint_gap": sign * float(gap.nanmean())}


def _numbers(rows: _Rows) -> Tensor:
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float64)
