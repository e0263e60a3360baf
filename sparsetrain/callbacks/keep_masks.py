"""Keep the zeros a model already has: fine-tuning after somebody else pruned it.

When to use it: a checkpoint pruned in one shot (Wanda, SparseGPT, any tool) is to be fine-tuned without losing a zero.

What it does: when training starts, the zeros of the targets become masks, checked against the declared pattern, and are kept
through every step. Formula: none. Knobs: ``pattern`` (what the zeros are meant to be), ``targets``, ``overrides``.

Combines with: everything `PruneFinetune` combines with. How it fails: a model without zeros, or whose zeros are not the
declared pattern, is refused when training starts; of zeros that are no target's, or more than the pattern holds, it warns.
"""

from __future__ import annotations

import warnings

from lightning.pytorch import Trainer
from torch import nn

from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.errors import PatternError
from sparsetrain.masks import MaskManager, Override
from sparsetrain.masks.verification import adopt_zeros, free_zeros
from sparsetrain.patterns import Pattern, parse_pattern
from sparsetrain.targets import Targets


class KeepMasks(SparsityCallback):
    """Adopt existing zeros as masks and keep them.

    ``masks.unclaimed`` tells what was not claimed. Raises `PatternError` for zeros that are not the declared pattern and for
    a model without any. Example: ``Trainer(callbacks=[KeepMasks(pattern="2:4")])``.
    """

    def __init__(
        self,
        pattern: Pattern | str = "unstructured",
        targets: Targets | None = None,
        overrides: dict[str, Override] | None = None,
    ) -> None:
        super().__init__()
        self.pattern = parse_pattern(pattern)
        self.targets = targets or Targets()
        self.overrides = overrides or {}

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager for the targets, still dense."""
        return MaskManager(model, self.targets, self.pattern, self.overrides)

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Adopt, unless masks are there already (a resumed run, a second fit)."""
        if resumed:
            return
        if not self.masks.masks:
            self.masks.unclaimed = adopt_zeros(self.masks)
        if not self.masks.masks:
            raise PatternError("the model has no zeros to keep: no target holds any; is this the pruned checkpoint?")
        for name, share in free_zeros(self.masks).items():
            why = self.masks.unclaimed.get(name, "it was pruned further after its mask was made")
            warnings.warn(
                f"{share:.0%} of {name} are zeros that no mask keeps, and training fills them ({why}); make it a target "
                "(targets.include, head, embeddings), or declare the pattern its zeros have",
                stacklevel=2,
            )
