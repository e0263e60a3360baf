"""Data for criteria inside a Lightning run: batches streamed right before pruning, or every optimizer step watched.

Neither moves anything that training depends on: random streams, the position in the training data, gradients, buffers and
logs are as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch import distributed as dist
from torch.optim import Optimizer
from torch.utils.data import IterableDataset
from torchmetrics import Metric

from sparsetrain.calibration import calibrate, require_whole, watch
from sparsetrain.callbacks.exact_resume import capture, restore
from sparsetrain.criteria import Criterion, StatisticsCriterion
from sparsetrain.errors import DataError, DivergedError, RecipeError
from sparsetrain.masks import MaskManager


def recalibrate(trainer: Trainer, manager: MaskManager, criterion: Criterion, seed: int) -> None:
    """Let a criterion that calibrates see the training batches that ``seed`` decides; others need nothing."""
    if not isinstance(criterion, StatisticsCriterion) or criterion.source != "calibration":
        return
    module, streams = trainer.lightning_module, capture()
    torch.manual_seed(seed)  # random augmentation
    try:
        with silenced(module):
            calibrate(manager, criterion, training_batches(trainer, seed), lambda batch: loss_of(trainer, batch))
    finally:
        restore(streams)


def require_data(trainer: Trainer, manager: MaskManager, criterion: Criterion) -> None:
    """Raise, before training begins, if a criterion could not see its data in this run.

    `RecipeError` for a sharded model, or for manual optimization where it calibrates (its ``training_step`` would step the
    optimizers); `DataError` for a loader whose data set cannot be read apart from training.
    """
    if not isinstance(criterion, StatisticsCriterion):
        return
    require_whole(manager, criterion)
    if criterion.source == "calibration":
        _require_automatic(trainer.lightning_module, criterion)
        training_batches(trainer, 0)


def watch_step(trainer: Trainer, manager: MaskManager, criterion: Criterion, optimizer: Optimizer) -> None:
    """Show a criterion that watches training the gradients of this optimizer's step.

    Raises `DivergedError` for a gradient that is not finite; with AMP such a step is skipped, and so it is here.
    """
    if not isinstance(criterion, StatisticsCriterion) or criterion.source != "training":
        return
    # A fused optimizer undoes AMP's scale inside its step.
    scaled = trainer.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    scale = float(trainer.scaler.get_scale()) if scaled and trainer.scaler is not None else 1.0
    try:
        watch(manager, criterion, (p for group in optimizer.param_groups for p in group["params"]), scale)
    except DivergedError as error:
        if trainer.scaler is None:
            raise DivergedError(f"step {trainer.global_step}: {error}") from error


def _require_automatic(module: LightningModule, criterion: Criterion) -> None:
    if not module.automatic_optimization:
        raise RecipeError(
            f"criterion {type(criterion).__name__} runs training_step to measure, and that of {type(module).__name__} steps "
            "its optimizers itself (manual optimization); use criterion 'magnitude', or one that watches training ('movement', "
            "'platon')"
        )


def loss_of(trainer: Trainer, batch: Any) -> Tensor:
    """The loss that a model's ``training_step`` gives for a batch. Raises `RecipeError` if it gives none."""
    module: Any = trainer.lightning_module
    numbered = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    with trainer.precision_plugin.train_step_context():
        batch = trainer.strategy.batch_to_device(batch)
        output = module.training_step(batch, 0) if numbered else module.training_step(batch)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise RecipeError(
            f"{type(module).__name__}.training_step returns {type(output).__name__}: a criterion that needs data needs a loss, "
            "a tensor or a dict with 'loss'; use criterion 'magnitude'"
        )
    return loss


#: What a torchmetrics Metric remembers beside its states.
_COUNTS = ("_update_count", "_computed")


@contextmanager
def silenced(module: LightningModule) -> Iterator[None]:
    """``self.log`` of the module says nothing, and its metrics count nothing: what is measured here is no training step."""
    names = ("log", "log_dict")
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    states = [copy.deepcopy({key: getattr(m, key) for key in (*m._defaults, *_COUNTS)}) for m in metrics]
    try:
        for name in names:
            object.__setattr__(module, name, lambda *args, **kwargs: None)
        yield
    finally:
        for name in names:
            object.__delattr__(module, name)
        for metric, state in zip(metrics, states, strict=True):
            for key, value in state.items():
                setattr(metric, key, value)


def training_batches(trainer: Trainer, seed: int) -> Iterable[Any]:
    """Batches of the training data in an order that ``seed`` decides, apart from the loader that training uses.

    Under DDP every rank gets its own part. Raises `DataError` for data that can only be read in one pass.
    """
    loader = trainer.train_dataloader
    dataset, size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
    # A stream has a __getitem__ too, which it inherits and which raises.
    reads = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
    if not (reads and isinstance(size, int)):
        raise DataError(
            f"a criterion that needs data reads some training batches apart from training, which {type(loader).__name__} does "
            "not allow: it needs a dataset with __getitem__ and __len__ and a batch_size. Use criterion 'magnitude', or one "
            "that watches training ('movement', 'platon')"
        )
    return _batches(dataset, size, getattr(loader, "collate_fn", None), seed)


def _batches(dataset: Any, size: int, collate: Any, seed: int) -> Iterator[Any]:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_available() and dist.is_initialized() else (1, 0)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[rank::ranks]
    for indices in torch.split(order, size):
        chosen = indices.tolist()
        found = dataset.__getitems__(chosen) if hasattr(dataset, "__getitems__") else [dataset[i] for i in chosen]
        yield found if collate is None else collate(found)
