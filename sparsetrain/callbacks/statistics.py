"""Data for criteria inside a Lightning run: batches streamed right before pruning, or every optimizer step watched.

Neither moves anything that training depends on: random streams, the position in the training data, gradients, buffers and
logs are as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch import distributed as dist
from torch.optim import Optimizer

from sparsetrain.calibration import calibrate, known
from sparsetrain.callbacks.exact_resume import capture, restore
from sparsetrain.criteria import Criterion, Seen, StatisticsCriterion
from sparsetrain.errors import DataError, DivergedError, RecipeError
from sparsetrain.masks import MaskManager, sharding


def recalibrate(trainer: Trainer, manager: MaskManager, criterion: Criterion, step: int) -> None:
    """Let a criterion that calibrates see fresh training batches; others need nothing.

    The batches are a function of the step alone, the same in a run that was interrupted.
    """
    if not isinstance(criterion, StatisticsCriterion) or criterion.source != "calibration":
        return
    module, streams = trainer.lightning_module, capture()
    torch.manual_seed(step)  # random augmentation
    try:
        with silenced(module):
            calibrate(manager, criterion, training_batches(trainer, step), lambda batch: loss_of(trainer, batch))
    finally:
        restore(streams)


def watch_step(trainer: Trainer, manager: MaskManager, criterion: Criterion, optimizer: Optimizer) -> None:
    """Show a criterion that watches training the gradients of this optimizer's step.

    Raises `DivergedError` for a gradient that is not finite; with AMP such a step is skipped, and so it is here.
    """
    if not isinstance(criterion, StatisticsCriterion) or criterion.source != "training":
        return
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for tensor in manager:
        parameter = tensor.target.parameter
        if parameter.grad is None or id(parameter) not in owned:
            continue
        gradient = sharding.local(parameter.grad)
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        if not bool(torch.isfinite(gradient).all()):
            if trainer.scaler is not None:
                return
            raise DivergedError(
                f"the gradient of {tensor.name} is not finite at step {trainer.global_step}: criterion "
                f"{type(criterion).__name__} cannot score it. Lower the learning rate, or clip gradients"
            )
        criterion.observe(Seen(known(tensor), sharding.local(parameter.detach()), gradient))


def loss_of(trainer: Trainer, batch: Any) -> Tensor:
    """The loss that a model's ``training_step`` gives for a batch. Raises `RecipeError` if it gives none."""
    module = trainer.lightning_module
    with trainer.precision_plugin.train_step_context():
        output = module.training_step(trainer.strategy.batch_to_device(batch), 0)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise RecipeError(
            f"{type(module).__name__}.training_step returns {type(output).__name__}: a criterion that needs data needs a loss, "
            "a tensor or a dict with 'loss'; use criterion 'magnitude' with manual optimization"
        )
    return loss


@contextmanager
def silenced(module: LightningModule) -> Iterator[None]:
    """``self.log`` of the module says nothing: what is measured here is no training step."""
    names = ("log", "log_dict")
    try:
        for name in names:
            object.__setattr__(module, name, lambda *args, **kwargs: None)
        yield
    finally:
        for name in names:
            object.__delattr__(module, name)


def training_batches(trainer: Trainer, seed: int) -> Iterable[Any]:
    """Batches of the training data in an order that ``seed`` decides, apart from the loader that training uses.

    Under DDP every rank gets its own part. Raises `DataError` for data that can only be read in one pass.
    """
    loader = trainer.train_dataloader
    dataset, size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and isinstance(size, int)):
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
