"""Calibrating a whole model at once: stream batches through it, and let a criterion accumulate what it needs.

One batch at a time: forward, loss, backward; each target's gradient, or what its layer is given or gives, is handed to the
criterion and dropped. The model's weights, gradients, mode and buffers are as before afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from sparsetrain.calibration.data import samples
from sparsetrain.calibration.experts import siblings
from sparsetrain.calibration.layers import LayerWatch, require_seen, require_visible
from sparsetrain.calibration.rest import at_rest, require_some, require_sums, require_whole, sum_over_ranks
from sparsetrain.criteria import Known, Seen, StatisticsCriterion
from sparsetrain.errors import DivergedError, RecipeError, SparsetrainError
from sparsetrain.masks import MaskManager
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

    Raises `DataError` for no batches, a batch that cannot be cut into samples, or a layer whose inputs are all zero;
    `DivergedError` for a gradient, input or output that is not finite; `RecipeError` where the model is sharded, the loss
    depends on no target, or a layer does not show its inputs; `TargetError` for a tensor that no batch used, and what the
    criterion's `prepare` raises.

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
    require_sums(criterion)
    require_visible(manager.model, tensors, criterion)
    criterion.prepare(manager.model, [part for tensor in tensors for part in criterion.parts(tensor)])
    criterion.reset()
    shown = _shown(batches, criterion, progress)
    seen = (_gradients if criterion.needs == "gradient" else _activations)(manager, criterion, shown, loss)
    require_seen(criterion, tensors)
    return seen


def _gradients(
    manager: MaskManager, criterion: StatisticsCriterion, batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> int:
    tensors, seen, problem = list(manager), 0, None
    try:
        with at_rest(manager.model, [t.target.parameter for t in tensors], gradients=True):
            for batch in batches:
                _observe(tensors, criterion, batch, loss, seen)
                seen += 1
        criterion.finish()
        require_some(seen, f"criterion {type(criterion).__name__}")
    except SparsetrainError as error:
        problem = error
    sum_over_ranks(criterion, problem)
    return seen


def _activations(
    manager: MaskManager, criterion: StatisticsCriterion, batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> int:
    seen, problem = 0, None
    # What is shown only once cannot be shown again to layers that turn out not to share their input.
    watch = LayerWatch(list(manager), criterion, share=False, alike=siblings(manager.model, manager))
    try:
        with at_rest(manager.model, [], gradients=False), watch.on():
            for batch in batches:
                with watch.forward(f"batch {seen}"):
                    loss(batch)
                seen += 1
        require_some(seen, f"criterion {type(criterion).__name__}")
    except SparsetrainError as error:
        problem = error
    watch.finish(problem)
    return seen


def _shown(batches: Iterable[Any], criterion: StatisticsCriterion, progress: bool) -> Iterator[Any]:
    """As many batches as the criterion wants, cut into samples if it wants that."""
    stream: Iterable[Any] = itertools.islice(batches, criterion.batches)
    if progress:
        stream = track(stream, description=f"calibrating {type(criterion).__name__}", total=criterion.batches, transient=True)
    for batch in stream:
        yield from samples(batch) if criterion.per_sample else (batch,)


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
    value = loss(batch)
    if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
        raise RecipeError(
            f"criterion {type(criterion).__name__} needs gradients of a loss: one number that depends on the targets' "
            "weights, and not under torch.no_grad"
        )
    value.backward()  # type: ignore[no-untyped-call]
    for tensor in tensors:
        parameter = tensor.target.parameter
        pending, parameter.grad = parameter.grad, None
        if pending is None:  # a layer that the batch did not use has none
            continue
        gradient = _dense(pending)
        if not bool(torch.isfinite(gradient).all()):
            raise DivergedError(
                f"calibration: the gradient of {tensor.name} is not finite in batch {number}, where the loss is "
                f"{float(value.detach())}; find what diverged, or what is wrong with that batch"
            )
        criterion.observe(Seen(known(tensor), parameter.detach(), gradient))
