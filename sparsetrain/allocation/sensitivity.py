"""Sensitivity: a knapsack on measured curves; what costs the least loss for each weight goes first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

from sparsetrain.allocation.base import Allocation, Reduce, Share
from sparsetrain.allocation.files import is_number, read_json, require_names
from sparsetrain.allocation.filling import fill
from sparsetrain.errors import RecipeError
from sparsetrain.patterns import Sparsity

Points = list[tuple[float, float]]


def lower_hull(points: Points) -> Points:
    """The lower convex hull of a curve ``(sparsity, loss increase)``, from (0, 0) on, after it was made to rise only.

    Sparsities need no order; increases below 0 count as 0.
    Example: ``lower_hull([(0.5, 3.0), (0.9, 1.0)])`` rises to 3 at 0.5 and stays there; below it is ``[(0, 0), (0.9, 3)]``.
    """
    rising: Points = [(0.0, 0.0)]
    for x, y in sorted(points):
        if x > rising[-1][0]:
            rising.append((x, max(y, rising[-1][1])))
    hull: Points = []
    for x, y in rising:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


@dataclass(frozen=True)
class Sensitivity(Allocation):
    """Minimise the sum of measured loss increases for the budget, from a scan of `sparsetrain sensitivity`.

    Each tensor's curve (loss increase over its sparsity, measured with it alone pruned) is made to rise only and replaced by
    its lower convex hull, linear between the measured points. Pieces are taken in the order of loss per weight, which solves
    the continuous knapsack on those hulls exactly (Lagrangian relaxation); pieces of equal price are taken together. So a
    higher budget only adds. It assumes that increases add up over tensors, and that order survives fine-tuning.

    ``scan``: path of a ``sensitivity.json``. A tensor needs a curve for its own pattern (``--units`` adds ``neurons``).
    Raises `RecipeError` for a file that is no scan, a tensor it did not measure, a budget beyond what it measured.

    Example: ``Sensitivity("runs/quickstart-sensitivity/sensitivity.json")(shares, 0.9)``.
    """

    by_shape: ClassVar[bool] = True

    scan: str
    _curves: dict[tuple[str, str], Points] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = read_json(self.scan, "scan", "sparsetrain sensitivity")
        rows = found.get("rows")
        if not isinstance(found.get("baseline"), dict) or not isinstance(rows, list) or not rows:
            raise RecipeError(
                f"{self.scan} is no scan: it has no baseline and rows; `sparsetrain sensitivity RECIPE.yaml` makes one"
            )
        curves: dict[tuple[str, str], Points] = {}
        for row in rows:
            name, pattern, x, y = self._point(row, found["baseline"])
            curves.setdefault((name, pattern), []).append((x, y))
        object.__setattr__(self, "_curves", {key: lower_hull(points) for key, points in curves.items()})

    def _point(self, row: Any, baseline: Any) -> tuple[str, str, float, float]:
        try:
            name, pattern, share = str(row["name"]), str(row["pattern"]), row["pruned"] / row["numel"]
            # null is how a loss that is no number is written: as bad as can be.
            loss = 1e30 if row["loss"] is None else row["loss"] - baseline["loss"]
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise RecipeError(f"{self.scan} is no scan: a row lacks or garbles {error}; make it anew") from error
        if not (is_number(share) and 0 <= share <= 1 and is_number(loss)):
            raise RecipeError(f"{self.scan} is no scan: {name} at {share!r} with a loss increase of {loss!r}; make it anew")
        return name, pattern, share, loss

    def _curve(self, share: Share) -> Points:
        names = {name for name, _ in self._curves}
        way = "Scan this recipe: `sparsetrain sensitivity RECIPE.yaml` measures its own patterns, with --units neurons too"
        require_names(names, [share.name], self.scan, way)
        if (share.name, str(share.pattern)) not in self._curves:
            there = ", ".join(pattern for name, pattern in self._curves if name == share.name)
            raise RecipeError(f"{self.scan} measured {share.name} for {there}, not for {share.pattern}. {way}")
        return self._curves[share.name, str(share.pattern)]

    def __call__(self, shares: Sequence[Share], sparsity: Sparsity, reduce: Reduce | None = None) -> dict[str, Fraction]:
        """What the cheapest pieces add up to."""
        for share in shares:
            self.check(share.pattern, share.name)
        pieces = sorted(piece for i, share in enumerate(shares) for piece in _pieces(i, share.numel, self._curve(share)))
        steps = [list(group) for _, group in itertools.groupby(pieces, key=lambda piece: piece[0])]

        def path(t: float) -> list[float]:
            lost = [0.0] * len(shares)
            for number, step in enumerate(steps):
                part = min(1.0, max(0.0, t - number))
                for _, index, start, stop in step:
                    if part:
                        lost[index] = stop if part == 1 else min(stop, start + part * (stop - start))
            return lost

        return fill(shares, sparsity, path, end=float(max(1, len(steps))), why=f", as far as {self.scan} has measured")


def _pieces(index: int, numel: int, hull: Points) -> Iterator[tuple[float, int, float, float]]:
    """Each straight piece of a hull: price of a weight, tensor, from and to which sparsity."""
    for (x, y), (to, up) in itertools.pairwise(hull):
        yield (up - y) / ((to - x) * numel), index, x, to
