"""Calibration: stream batches through a model, and let a criterion accumulate what it needs. Bounded memory, no Lightning.

One batch at a time: forward, loss, backward, each target's gradient (or its layer's output) is handed to the criterion and
dropped. The model's weights, gradients, mode and buffers are as before afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch import distributed as dist

from sparsetrain.criteria import Known, Seen, StatisticsCriterion
from sparsetrain.errors import DataError, DivergedError, RecipeError, SparsetrainError, TargetError
from sparsetrain.masks import MaskManager, sharding
from sparsetrain.masks.tensor import MaskedTensor


def known(tensor: MaskedTensor) -> Known:
    """What a criterion may know of a masked tensor."""
    return Known.of(tensor)


def calibrate(
    manager: MaskManager,
    criterion: StatisticsCriterion,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    progress: bool = False,
) -> int:
    """Stream at most ``criterion.batches`` batches and let the criterion accumulate; returns how many passes it saw.

    Args:
        manager: whose tensors are scored.
        criterion: forgets what it knew before.
        batches: any iterable of batches: a DataLoader, a list.
        loss: batch -> scalar loss of the model in eval mode (for criteria of activations: anything that runs the model).
        progress: show a progress bar.

    Weights, gradients, buffers, modes and torch's random stream are as before afterwards. With several processes (DDP) each
    gives its own batches, and all end with the sums over all.

    Raises `DataError` for no batches or a batch that cannot be cut into samples, `DivergedError` for a gradient that is not
    finite, `RecipeError` where the model is sharded or the loss depends on no target, `TargetError` for a tensor that no batch
    used, and what the criterion's `prepare` raises.

    Example, which runs as it stands::

        import torch
        from sparsetrain import MaskManager, prune
        from sparsetrain.calibration import calibrate
        from sparsetrain.criteria import Taylor

        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        data = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(5)]
        manager, criterion = MaskManager(model), Taylor()
        calibrate(manager, criterion, data, lambda batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]))
        prune(manager, 0.5, criterion=criterion)
    """
    tensors = list(manager)
    require_whole(manager, criterion)
    _require_sums(criterion)
    criterion.prepare(manager.model, [known(t) for t in tensors])
    criterion.reset()
    seen, problem = 0, None
    try:
        with _at_rest(manager.model, [t.target.parameter for t in tensors], gradients=criterion.needs == "gradient"):
            for batch in _shown(batches, criterion, progress):
                _observe(tensors, criterion, batch, loss, seen)
                seen += 1
        criterion.finish()
        _require_some(seen, criterion)
    except SparsetrainError as error:
        problem = error
    _sum_over_ranks(criterion, problem)
    for tensor in tensors:
        if tensor.name not in criterion.memory:
            raise TargetError(
                f"criterion {type(criterion).__name__} cannot score {tensor.name}: no batch used its layer; leave it out "
                "(targets.exclude), or use criterion 'magnitude'"
            )
    return seen


def _shown(batches: Iterable[Any], criterion: StatisticsCriterion, progress: bool) -> Iterator[Any]:
    """As many batches as the criterion wants, cut into samples if it wants that."""
    stream: Iterable[Any] = itertools.islice(batches, criterion.batches)
    if progress:
        stream = track(stream, description=f"calibrating {type(criterion).__name__}", total=criterion.batches, transient=True)
    for batch in stream:
        yield from samples(batch) if criterion.per_sample else (batch,)


def _require_some(seen: int, criterion: StatisticsCriterion) -> None:
    if not seen:
        raise DataError(
            f"criterion {type(criterion).__name__} needs data, and the calibration loader gives no batches: is its data set "
            "smaller than one batch (drop_last), or was the iterator used up before?"
        )


def watch(
    manager: MaskManager, criterion: StatisticsCriterion, parameters: Iterable[Tensor] | None = None, scale: float = 1.0
) -> None:
    """Show a criterion that watches training (Movement, PLATON) the gradients there are now; call it before every step.

    ``parameters``: those the step moves; by default all. ``scale``: what a gradient scaler (AMP) has multiplied gradients by
    and not yet undone. Raises `DivergedError`, before anything is taken in, for a gradient that is not finite.

    Example, in a loop: ``loss.backward(); watch(manager, criterion); optimizer.step()``.
    """
    moved = None if parameters is None else {id(p) for p in parameters}
    found = []
    for tensor in manager:
        parameter = tensor.target.parameter
        if parameter.grad is None or (moved is not None and id(parameter) not in moved):
            continue
        gradient = _dense(parameter.grad) if scale == 1.0 else _dense(parameter.grad) / scale
        if not bool(torch.isfinite(gradient).all()):
            raise DivergedError(
                f"the gradient of {tensor.name} is not finite: criterion {type(criterion).__name__} cannot score it. Lower the "
                "learning rate, or clip gradients"
            )
        found.append(Seen(known(tensor), parameter.detach(), gradient))
    for seen in found:
        criterion.observe(seen)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _observe(
    tensors: Sequence[MaskedTensor], criterion: StatisticsCriterion, batch: Any, loss: Callable[[Any], Tensor], number: int
) -> None:
    outputs: dict[str, list[Tensor]] = {}
    with _outputs_of(tensors, outputs) if criterion.needs == "output" else nullcontext():
        value = loss(batch)
    if criterion.needs == "gradient":
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            raise RecipeError(
                f"criterion {type(criterion).__name__} needs gradients of a loss: one number that depends on the targets' "
                "weights, and not under torch.no_grad"
            )
        value.backward()  # type: ignore[no-untyped-call]
    for tensor in tensors:
        parameter = tensor.target.parameter
        gradients = [] if parameter.grad is None else [_dense(parameter.grad)]
        parameter.grad = None
        # A layer that the batch did not use has neither.
        what, found = ("gradient", gradients) if criterion.needs == "gradient" else ("output", outputs.get(tensor.name, []))
        for values in found:
            if not bool(torch.isfinite(values).all()):
                told = (
                    f", where the loss is {float(value.detach())}" if isinstance(value, Tensor) and value.numel() == 1 else ""
                )
                raise DivergedError(
                    f"calibration: the {what} of {tensor.name} is not finite in batch {number}{told}; find what diverged, or "
                    "what is wrong with that batch"
                )
            criterion.observe(Seen(known(tensor), parameter.detach(), **{what: values}))


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
    """Eval mode, no gradients but the targets'; everything as before afterwards, buffers and torch's random stream too."""
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
        devices = sorted({p.device.index for p in needed if p.device.type == "cuda"})
        with torch.random.fork_rng(devices), torch.set_grad_enabled(gradients):
            yield
    finally:
        for parameter, value in needed.items():
            parameter.requires_grad_(value)
            parameter.grad = pending[parameter]
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:  # a cache that the first forward pass makes is none of ours
                    buffer.copy_(buffers[name])


@contextmanager
def _outputs_of(tensors: Sequence[MaskedTensor], into: dict[str, list[Tensor]]) -> Iterator[None]:
    """Every output of every target's layer, in order: a layer may be used more than once."""

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            into.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output).detach())

        return hook

    handles = [t.target.module.register_forward_hook(keep(t.name)) for t in tensors]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_whole(manager: MaskManager, criterion: StatisticsCriterion) -> None:
    """Raise `RecipeError` where the model is sharded: statistics are of whole tensors."""
    for tensor in manager:
        if sharding.local(tensor.target.parameter) is not tensor.target.parameter:
            raise RecipeError(
                f"criterion {type(criterion).__name__} measures {tensor.name} with data, which is not possible while the model "
                "is sharded (FSDP2); use criterion 'magnitude', or DDP"
            )


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _require_sums(criterion: StatisticsCriterion) -> None:
    if _ranks() > 1 and not criterion.additive:
        raise RecipeError(
            f"criterion {type(criterion).__name__} keeps no sums that could be added over {_ranks()} processes; use one "
            "process, or criterion 'fisher'"
        )


def _sum_over_ranks(criterion: StatisticsCriterion, problem: SparsetrainError | None) -> None:
    """Every rank saw other batches; the sums of all are the same on every rank, and so are the masks.

    A problem of one rank is raised on all, so that none waits for it. A tensor that a rank never used counts 0 there.
    """
    if _ranks() > 1:
        mine = {n: {k: (tuple(v.shape), v.dtype) for k, v in sums.items()} for n, sums in criterion.memory.items()}
        everyone: list[Any] = [None] * _ranks()
        dist.all_gather_object(everyone, (problem, mine))
        problem = problem or next((error for error, _ in everyone if error is not None), None)
    if problem is not None:
        raise problem
    if _ranks() > 1:
        kinds = {name: sums for _, memory in everyone for name, sums in memory.items()}
        for name in sorted(kinds):
            memory = criterion.memory.setdefault(name, {})
            for key in sorted(kinds[name]):
                shape, dtype = kinds[name][key]
                dist.all_reduce(memory.setdefault(key, torch.zeros(shape, dtype=dtype, device=_device(criterion))))


def _device(criterion: StatisticsCriterion) -> torch.device:
    """Where the statistics of this rank are."""
    return next((v.device for sums in criterion.memory.values() for v in sums.values()), torch.device("cpu"))
