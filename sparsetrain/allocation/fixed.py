"""Fixed: sparsities of single tensors that are known already, from a file or a mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

from sparsetrain.allocation.base import Allocation, Reduce, Share
from sparsetrain.allocation.files import is_number, read_json, require_names
from sparsetrain.allocation.filling import fill
from sparsetrain.errors import RecipeError, nearest
from sparsetrain.patterns import Sparsity, exact

#: How far numbers that were rounded by hand (three digits) may be from the budget they are meant to make.
ROUNDED = Fraction(1, 1000)


@dataclass(frozen=True)
class Fixed(Allocation):
    """The sparsity of every tensor as written down: a file of `sparsetrain predict`, or ``{name: sparsity}``.

    A file is JSON: ``{"sparsity": s, "layers": {name: sparsity}}``. The numbers make one budget; on the way to it (a gradual
    schedule) every tensor has lost the same share of what it is to lose: ``s_l(S) = s_l * S / S_final``. Counts meet each
    budget exactly, so that numbers with three digits will do; a tensor at 0 stays dense.

    Raises `RecipeError` for a file that is none, numbers outside [0, 1), tensors it does not name or that are not there, and
    for a budget above the one it makes.

    Example: ``Fixed({"fc1.weight": 0.95, "fc2.weight": 0.8})(shares, 0.9)``, ``Fixed("runs/x/allocation.json")``.
    """

    by_shape: ClassVar[bool] = True

    source: str | dict[str, float]
    _layers: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_layers", dict(self._read()))

    def _read(self) -> Mapping[str, float]:
        if not isinstance(self.source, str | Path):
            layers: object = self.source
        else:
            layers = read_json(self.source, "allocation", "sparsetrain predict").get("layers")
        if not isinstance(layers, Mapping) or not layers:
            raise RecipeError(f"{self._where} names no layers; it needs {{name: sparsity}}, in a file under 'layers'")
        for name, value in layers.items():
            if not (is_number(value) and 0 <= value < 1):
                raise RecipeError(f"{self._where}: sparsity {value!r} of {name} is no number in [0, 1)")
        return layers

    @property
    def _where(self) -> str:
        return f"allocation {self.source}" if isinstance(self.source, str | Path) else "allocation Fixed"

    def __call__(self, shares: Sequence[Share], sparsity: Sparsity, reduce: Reduce | None = None) -> dict[str, Fraction]:
        """The sparsities written down, or their share at a lower budget."""
        names = [share.name for share in shares]
        way = "It was made for another model or other targets; make one for these, or give them an override"
        require_names(self._layers, names, self._where, way)
        unknown = [name for name in self._layers if name not in names]
        if unknown and names:
            raise RecipeError(f"{self._where} names {unknown[0]}, which is not pruned here.{nearest(unknown[0], names)} {way}")
        for share in shares:
            self.check(share.pattern, share.name)
        if not shares:
            return {}
        losses = [float(self._layers[name]) for name in names]
        total = sum(share.numel for share in shares)
        made = sum((exact(lost) * share.numel for lost, share in zip(losses, shares, strict=True)), Fraction(0)) / total
        if exact(sparsity) > made + ROUNDED:
            raise RecipeError(
                f"{self._where} makes sparsity {float(made):.4g} over these tensors and has no answer for {float(sparsity):g}; "
                f"ask for {float(made):.4g} or less, or make one for that budget (sparsetrain predict --budget)"
            )
        # Beyond 1 only as far as rounded numbers fall short.
        return fill(shares, sparsity, lambda t: [min(1.0, t * lost) for lost in losses], end=2.0)
