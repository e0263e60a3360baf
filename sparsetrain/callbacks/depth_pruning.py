"""Make a network shallower while it trains: residual blocks that matter least are bypassed, and removed at the end.

When to use it: a ResNet or transformer is deeper than the task needs, and real time and memory are to be saved on any
hardware. A plain callback, used beside others (under ``callbacks:`` in a recipe): it sets no masks.

What it does: at ``start`` the block is bypassed (hands its input through) without which the loss of a few training batches
rises least; the rest trains on, and what goes next is measured anew, one block at a time until ``end`` (greedy backward
elimination by the loss; for language models see Men et al. 2024, arXiv 2403.03853, and Kim et al. 2024, arXiv 2402.02834).
When training has ended the bypassed blocks are deleted: parameters, optimizer state, and the layers of a transformers model's
configuration, so that it loads without this package. The shorter model is compared with the bypassed one, bit for bit, first.

Knobs: ``blocks`` (how many, or which share of those found), ``start`` and ``end`` (leave a third of the run for recovery),
``batches`` (measured in evaluation mode with fixed random streams: the same in a resumed run).

Combines with: any optimizer, AMP, accumulation, other callbacks. A method whose targets lie in blocks that may go is refused:
fit the shortened model once more with it, in code (``init_from`` of a recipe loads whole models only). One process; no
averaged weights.

How it fails: too few residual blocks, or blocks that change the shape, are refused by name; a block that two others rely on
shows as a loss that recovers only with training. Checkpoints written before the end hold all blocks, later ones do not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from sparsetrain.callbacks.base import SparsityCallback, averaged_copies, current_step
from sparsetrain.callbacks.clock import clock_of
from sparsetrain.callbacks.exact_resume import capture, restore
from sparsetrain.callbacks.statistics import loss_of, silenced, training_batches
from sparsetrain.depth import Block, choose, find_blocks, install_bypass, remove
from sparsetrain.errors import DataError, MaskStateError, RecipeError, TargetError


class DepthPruning(Callback):
    """Bypass, then remove, the residual blocks that the loss misses least.

    Args:
        blocks: how many (1 or more), or the share of those found, in (0, 1), rounded down.
        start: duration (``3ep``, ``500st``, ``30%``) after which the first block goes.
        end: duration after which the last one goes; the others are spread evenly between.
        batches: training batches the loss is measured on, at least 1.

    ``bypassed`` has the blocks that went, in that order, each with the rise of the loss it caused when it went; ``removed``
    says after ``fit`` whether a block was ``"deleted"`` or ``"passed through"``, see `sparsetrain.depth.remove`.

    Raises `RecipeError` for numbers that cannot be and runs that cannot be measured, `TargetError` for too few blocks.

    Example: ``Trainer(callbacks=[DepthPruning(2, start="20%", end="50%")])``.
    """

    def __init__(self, blocks: int | float = 1, start: str = "30%", end: str = "60%", batches: int = 4) -> None:
        super().__init__()
        if not (math.isfinite(blocks) and blocks > 0 and (blocks < 1 or blocks == int(blocks))):
            raise RecipeError(f"blocks is {blocks}; give a number such as 2, or a share of those found in (0, 1) such as 0.25")
        if batches < 1:
            raise RecipeError(f"batches is {batches}; blocks are measured on at least 1 batch")
        self.blocks, self.start, self.end, self.batches = blocks, start, end, batches
        self.bypassed: dict[str, float] = {}
        self.removed: dict[str, str] = {}
        self._model: nn.Module | None = None
        self._found: list[Block] = []
        self._due: list[int] = []
        self._samples: list[Any] = []

    # -- what Lightning calls ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """On another model than before everything begins anew."""
        if stage == "fit" and self._model is not pl_module:
            self._model, self._found, self.bypassed, self.removed = pl_module, [], {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The blocks bypassed, and those removed."""
        return {"bypassed": dict(self.bypassed), "removed": dict(self.removed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts."""
        self.bypassed, self.removed = dict(state_dict["bypassed"]), dict(state_dict["removed"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks; bypass again what a resumed run had bypassed; refuse what cannot work."""
        if self.removed:
            return
        self._find(trainer)
        self._refuse_masks(trainer)
        count = self._count()
        clock = clock_of(trainer)
        start, end = clock.steps(self.start), clock.steps(self.end)
        if end < start or (clock.total_steps and end >= clock.total_steps):
            raise RecipeError(
                f"DepthPruning bypasses blocks from start (step {start}) to end (step {end}); end must not come before start, "
                f"and the rest of the run ({clock.total_steps} steps) recovers"
            )
        self._due = [start + round(i * (end - start) / max(count - 1, 1)) for i in range(count)]
        self._catch_up(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Bypass the next block if it is due."""
        self._catch_up(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what is bypassed, and say so in one line."""
        if self.removed:
            return
        if self.bypassed:
            if not self._samples:  # resumed at its very end, a run never starts
                self._find(trainer)
            with self._aside(trainer):
                gone = [block for block in self._found if block.name in self.bypassed]
                self.removed = remove(pl_module, gone, lambda: self._loss(trainer), trainer.optimizers)
            rises = ", ".join(f"{name} (loss {rise:+.3g})" for name, rise in self.bypassed.items())
            self._samples = []
            trainer.print(f"DepthPruning removed {len(gone)} of {len(self._found)} residual blocks: {rises}")
        if not self._due or len(self.bypassed) < len(self._due):
            went = f"{len(self.bypassed)} of {len(self._due) or self.blocks} blocks removed"
            warnings.warn(f"DepthPruning: training ended with {went}; train longer, or let end come earlier", stacklevel=2)

    # -- doing it -----------------------------------------------------------------------------------------------------------

    def _catch_up(self, trainer: Trainer) -> None:
        due = sum(at <= current_step(trainer) for at in self._due)
        while not self.removed and len(self.bypassed) < due:
            left = [block for block in self._found if block.name not in self.bypassed]
            with self._aside(trainer):
                self.bypassed |= choose(trainer.lightning_module, left, 1, lambda: float(self._loss(trainer)))
            self._install(trainer.lightning_module)

    def _install(self, model: nn.Module) -> None:
        install_bypass(model, [block for block in self._found if block.name in self.bypassed])

    def _find(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        if not module.automatic_optimization or trainer.world_size > 1 or averaged_copies(trainer):
            raise RecipeError(
                "DepthPruning runs training_step to measure, and takes parameters away: it works with automatic optimization, "
                "one process and no averaged copy of the weights; prune the depth in a run of its own"
            )
        with self._aside(trainer):
            self._samples = self._read(trainer)
            if not self._found:  # in a second fit some may be bypassed already
                self._found = find_blocks(module, lambda: self._loss(trainer))
        known = {block.name for block in self._found}
        lost = [name for name in self.bypassed if name not in known]
        if lost:
            raise MaskStateError(f"the checkpoint has bypassed {lost[0]}, which is no residual block of this model")
        self._install(module)

    def _count(self) -> int:
        count = int(self.blocks) if self.blocks >= 1 else int(self.blocks * len(self._found))
        if not 0 < count < len(self._found):
            names = ", ".join(block.name for block in self._found) or "none"
            raise TargetError(
                f"blocks={self.blocks} are to go, found are {len(self._found)} residual blocks that keep the shape ({names}); "
                "at least one must go and one must stay"
            )
        return count

    def _refuse_masks(self, trainer: Trainer) -> None:
        inside = {m: b.name for b in self._found for m in trainer.lightning_module.get_submodule(b.name).modules()}
        for method in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(method, SparsityCallback) and method.manager is not None:
                for tensor in method.manager:
                    if tensor.target.module in inside:
                        raise RecipeError(
                            f"{type(method).__name__} masks {tensor.name}, and DepthPruning may remove its block "
                            f"{inside[tensor.target.module]}; exclude the blocks, or fit the shortened model with it afterwards"
                        )

    @contextmanager
    def _aside(self, trainer: Trainer) -> Iterator[None]:
        """Nothing that training depends on moves: random streams, modes, statistics, gradients, logs."""
        module, streams = trainer.lightning_module, capture()
        training = [inner for inner in module.modules() if inner.training]
        try:
            with torch.no_grad(), silenced(module):
                module.eval()
                yield
        finally:
            for inner in training:
                inner.training = True
            restore(streams)

    def _read(self, trainer: Trainer) -> list[Any]:
        try:
            return list(islice(training_batches(trainer, 0), self.batches))
        except DataError as error:
            raise RecipeError(
                "DepthPruning measures blocks on training batches, which it reads apart from training: the training loader "
                "needs a dataset with __getitem__ and __len__, and a batch_size"
            ) from error

    def _loss(self, trainer: Trainer) -> Tensor:
        """The mean loss of the same batches each time, with the same random numbers."""
        torch.manual_seed(0)
        return torch.stack([loss_of(trainer, batch) for batch in self._samples]).mean()
