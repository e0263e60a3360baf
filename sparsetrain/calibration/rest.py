"""What calibration must not move: the model at rest while it is measured; and ranks that end with the same sums."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sparsetrain.criteria import StatisticsCriterion
from sparsetrain.errors import DataError, RecipeError, SparsetrainError
from sparsetrain.masks import MaskManager, sharding


@contextmanager
def at_rest(model: nn.Module, targets: Sequence[nn.Parameter], gradients: bool) -> Iterator[None]:
    """Eval mode, no gradients but the targets'; everything as before afterwards, buffers and torch's random stream too.

    Nothing is compiled, no cache of keys and values is filled, and fused experts run one by one, so that hooks see all.
    """
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
        with torch.random.fork_rng(devices), torch.set_grad_enabled(gradients), _plain(model):
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


#: Settings of transformers' configurations that hide from hooks what a layer is given, or keep what nobody reads.
_SETTINGS = {"use_cache": False, "_experts_implementation": "eager"}


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None and not isinstance(c, dict)}
    kept = [(c, key, getattr(c, key)) for c in configs.values() for key in _SETTINGS if getattr(c, key, None) is not None]
    for config, key, _ in kept:
        setattr(config, key, _SETTINGS[key])
    # Who has compiled nothing has not imported the compiler, and need not wait for that.
    compiled = "torch._dynamo" in sys.modules
    stance: Any = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    try:
        with stance:
            yield
    finally:
        for config, key, value in kept:
            setattr(config, key, value)


def require_whole(manager: MaskManager, criterion: StatisticsCriterion) -> None:
    """Raise `RecipeError` where the model is sharded: statistics are of whole tensors."""
    for tensor in manager:
        if sharding.local(tensor.target.parameter) is not tensor.target.parameter:
            raise RecipeError(
                f"criterion {type(criterion).__name__} measures {tensor.name} with data, which is not possible while the model "
                "is sharded (FSDP2); use criterion 'magnitude', or DDP"
            )


def require_some(seen: int, what: str) -> None:
    """Raise `DataError` unless there was data."""
    if not seen:
        raise DataError(
            f"{what} needs data, and the calibration loader gives no batches: is its data set "
            "smaller than one batch (drop_last), or was the iterator used up before?"
        )


def ranks() -> int:
    """How many processes calibrate together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def require_sums(criterion: StatisticsCriterion) -> None:
    """Raise `RecipeError` where several processes would have to add what does not add up."""
    if ranks() > 1 and not criterion.additive:
        raise RecipeError(
            f"criterion {type(criterion).__name__} keeps no sums that could be added over {ranks()} processes; use one "
            "process, or criterion 'fisher'"
        )


def agree(problem: SparsetrainError | None, mine: Any = None) -> list[Any]:
    """What every rank has to say; a problem of one rank is raised on all, so that none waits for it."""
    everyone: list[Any] = [(problem, mine)]
    if ranks() > 1:
        everyone = [None] * ranks()
        dist.all_gather_object(everyone, (problem, mine))
    problem = problem or next((error for error, _ in everyone if error is not None), None)
    if problem is not None:
        raise problem
    return [said for _, said in everyone]


def sum_over_ranks(
    criterion: StatisticsCriterion, problem: SparsetrainError | None = None, only: Collection[str] | None = None
) -> None:
    """Every rank saw other batches; the sums of all are the same on every rank, and so are the masks.

    A tensor that a rank never used counts 0 there. ``only``: names of what was measured just now; by default everything.
    """
    memory_of = {n: sums for n, sums in criterion.memory.items() if only is None or n in only}
    sizes = {n: {k: (tuple(v.shape), v.dtype) for k, v in sums.items()} for n, sums in memory_of.items()}
    everyone = agree(problem, sizes if ranks() > 1 else None)
    if ranks() > 1:
        device = next((v.device for sums in criterion.memory.values() for v in sums.values()), torch.device("cpu"))
        kinds = {name: sums for memory in everyone for name, sums in memory.items()}
        for name in sorted(kinds):
            memory = criterion.memory.setdefault(name, {})
            for key in sorted(kinds[name]):
                shape, dtype = kinds[name][key]
                dist.all_reduce(memory.setdefault(key, torch.zeros(shape, dtype=dtype, device=device)))


def is_finite(values: Tensor) -> bool:
    """Whether all are finite: by their sum, which costs one read, and one by one only where that is not.

    The sum is in the type of the values: in another it would cost a copy.
    """
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
