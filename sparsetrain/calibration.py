"""Calibration: stream batches through a model, and let a criterion accumulate what it needs. Bounded memory, no Lightning.

One batch at a time: forward, loss, backward, each target's gradient (or its layer's output) is handed to the criterion and
dropped. The model's weights, gradients, mode and buffers are as before afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch import distributed as dist

from sparsetrain.criteria import Known, Seen, StatisticsCriterion
from sparsetrain.errors import DataError, DivergedError, RecipeError
from sparsetrain.masks import MaskManager, sharding
from sparsetrain.masks.tensor import MaskedTensor


def known(tensor: MaskedTensor) -> Known:
    """What a criterion may know of a masked tensor."""
    target = tensor.target
    return Known(tensor.name, target.module, target.attribute, tensor.pattern, target.layout.transposed)


def calibrate(
    manager: MaskManager,
    criterion: StatisticsCriterion,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    progress: bool = False,
) -> int:
    """Stream at most ``criterion.batches`` batches and let the criterion accumulate; returns how many it saw.

    Args:
        manager: whose tensors are scored.
        criterion: forgets what it knew before.
        batches: any iterable of batches: a DataLoader, a list.
        loss: batch -> scalar loss of the model in eval mode (for criteria of activations: anything that runs the model).
        progress: show a progress bar.

    Raises `DataError` for no batches or a batch that cannot be cut into samples, `DivergedError` for a gradient that is not
    finite, `RecipeError` where the model is sharded.

    Example: ``calibrate(manager, Taylor(), loader, lambda batch: F.cross_entropy(model(batch[0]), batch[1]))``.
    """
    tensors = list(manager)
    _require_whole(tensors, criterion)
    criterion.reset()
    seen = 0
    with _at_rest(manager.model, [t.target.parameter for t in tensors], gradients=criterion.needs == "gradient"):
        stream: Iterable[Any] = itertools.islice(batches, criterion.batches)
        if progress:
            stream = track(
                stream, description=f"calibrating {type(criterion).__name__}", total=criterion.batches, transient=True
            )
        for batch in stream:
            for part in samples(batch) if criterion.per_sample else (batch,):
                _observe(tensors, criterion, part, loss, seen)
                seen += 1
    if not seen:
        raise DataError(
            f"criterion {type(criterion).__name__} needs data, and the calibration loader gives no batches: is its data set "
            "smaller than one batch (drop_last), or was the iterator used up before?"
        )
    _sum_over_ranks(criterion)
    return seen


def _observe(
    tensors: Sequence[MaskedTensor], criterion: StatisticsCriterion, batch: Any, loss: Callable[[Any], Tensor], number: int
) -> None:
    outputs: dict[str, Tensor] = {}
    with _outputs_of(tensors, outputs) if criterion.needs == "output" else torch.enable_grad():
        value = loss(batch)
        if criterion.needs == "gradient":
            value.backward()  # type: ignore[no-untyped-call]
    for tensor in tensors:
        parameter = tensor.target.parameter
        gradient = parameter.grad if criterion.needs == "gradient" else None
        output = outputs.get(tensor.name)
        if gradient is None and output is None:
            continue  # a layer this batch did not use
        for what, found in (("gradient", gradient), ("output", output)):
            if found is not None and not bool(torch.isfinite(found).all()):
                raise DivergedError(
                    f"calibration: the {what} of {tensor.name} is not finite in batch {number}, where the loss is "
                    f"{float(value.detach())}; find what diverged, or what is wrong with that batch"
                )
        gradient = gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
        criterion.observe(Seen(known(tensor), parameter.detach(), gradient, output))
        parameter.grad = None


def samples(batch: Any) -> Iterator[Any]:
    """Cut a batch (tensor, tuple, list or mapping of tensors with samples along dimension 0) into batches of one sample."""
    sizes = {len(t) for t in _tensors(batch) if t.ndim}
    if len(sizes) != 1:
        raise DataError(
            f"a batch of {type(batch).__name__} with first dimensions {sorted(sizes)} cannot be cut into single samples; "
            "use batches of tensors that all count samples along dimension 0, or a criterion that takes whole batches"
        )
    for index in range(sizes.pop()):
        yield _cut(batch, index)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)


def _cut(batch: Any, index: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.ndim else batch
    if isinstance(batch, Mapping):
        # transformers' BatchEncoding and the like index by key, and models take plain dicts too.
        return {key: _cut(value, index) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [_cut(value, index) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


@contextmanager
def _at_rest(model: nn.Module, targets: Sequence[nn.Parameter], gradients: bool) -> Iterator[None]:
    """Eval mode, no gradients but the targets'; everything as before afterwards, buffers too."""
    modes = {module: module.training for module in model.modules()}
    needed = {p: p.requires_grad for p in model.parameters()}
    pending = {p: p.grad for p in model.parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    wanted = {id(p) for p in targets}
    model.eval()
    for parameter in needed:
        parameter.requires_grad_(gradients and id(parameter) in wanted)
        parameter.grad = None
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for parameter, value in needed.items():
            parameter.requires_grad_(value)
            parameter.grad = pending[parameter]
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@contextmanager
def _outputs_of(tensors: Sequence[MaskedTensor], into: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            into[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    handles = [t.target.module.register_forward_hook(keep(t.name)) for t in tensors]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_whole(tensors: Sequence[MaskedTensor], criterion: StatisticsCriterion) -> None:
    for tensor in tensors:
        if sharding.local(tensor.target.parameter) is not tensor.target.parameter:
            raise RecipeError(
                f"criterion {type(criterion).__name__} measures {tensor.name} with data, which is not possible while the model "
                "is sharded (FSDP2); use criterion 'magnitude', or DDP"
            )


def _sum_over_ranks(criterion: StatisticsCriterion) -> None:
    """Every rank saw other batches; the sums of all are the same on every rank, and so are the masks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    if not criterion.additive:
        raise RecipeError(
            f"criterion {type(criterion).__name__} keeps no sums that could be added over {dist.get_world_size()} processes; "
            "use one process, or criterion 'fisher'"
        )
    for name in sorted(criterion.memory):
        for key in sorted(criterion.memory[name]):
            dist.all_reduce(criterion.memory[name][key])
