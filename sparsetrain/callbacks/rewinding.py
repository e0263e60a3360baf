"""Rewinding: a run's state at one step, copied whole, and put back piece by piece. No callback; `LotteryTickets` says when.

A snapshot shares no memory with what it was taken from, nor with what it is put back into: training moves weights and
optimizer state in place, and a second rewind must go where the first one went. It is plain tensors, numbers and text, so
that it travels in a checkpoint, which is as much larger.

Random streams are put back where the first batch of the round was drawn, and samplers that shuffle by epoch are told the
epoch of the round, so that every round sees the same samples, dropout masks and augmentations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from sparsetrain.callbacks.base import averaged_copies
from sparsetrain.callbacks.exact_resume import ExactResume, capture, restore
from sparsetrain.errors import MaskStateError, RecipeError, nearest
from sparsetrain.masks import MaskManager
from sparsetrain.masks.optimizer_state import forget
from sparsetrain.masks.sharding import local
from sparsetrain.schedules import Clock

Snapshot = dict[str, Any]


@dataclass(frozen=True)
class Rewind:
    """What goes back to where, when a round begins.

    Args:
        to: a duration inside a round (``0st`` is the initialization, ``500st``, ``1ep``, ``10%`` of a round), or a file of
            weights (a checkpoint or safetensors): a file gives weights and buffers, the rest goes back to the start of the run.
        weights: all parameters of the module.
        buffers: what BatchNorm has counted, and its like.
        optimizer: its memory, and the loss scale of AMP.
        schedule: learning-rate schedulers, and the optimizer's settings they change.
        rng: random streams and the order of the data.

    Raises `RecipeError` if nothing is rewound, or ``to`` is neither a duration nor a file. Example: ``Rewind(to="1ep")``.
    """

    to: str = "0st"
    weights: bool = True
    buffers: bool = True
    optimizer: bool = True
    schedule: bool = True
    rng: bool = True

    def __post_init__(self) -> None:
        if not (self.weights or self.buffers or self.optimizer or self.schedule or self.rng):
            raise RecipeError("rewind: nothing is rewound; pruning that trains on is PruneFinetune with schedule Rounds")
        if self.file is not None and not self.file.is_file():
            raise RecipeError(f"rewind.to {self.to!r} is neither a duration (0st, 500st, 1ep) nor a file")

    @property
    def file(self) -> Path | None:
        """The file it rewinds to, or None for a duration."""
        duration = re.fullmatch(r"\s*\d+(\.\d+)?\s*(ep|st|%|)\s*", str(self.to))
        return None if duration else Path(self.to)


def copied(value: Any) -> Any:
    """The same content in memory of its own, on the CPU; containers of tensors, numbers and text."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def check(trainer: Trainer, rewind: Rewind) -> None:
    """Raise `RecipeError` for a run that cannot be rewound exactly."""
    problem = None
    if averaged_copies(trainer):
        problem = "an average of the weights (EMA, SWA) would mix rounds; average in a run that starts from a ticket"
    elif any(local(p) is not p for p in trainer.lightning_module.parameters()):
        problem = "a sharded model (FSDP2) cannot be rewound; use DDP or one process"
    elif rewind.rng and trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        problem = "reloaded data loaders cannot be rewound; set rewind.rng to false, or reload_dataloaders_every_n_epochs to 0"
    if problem:
        raise RecipeError(f"LotteryTickets: {problem}")


def take(trainer: Trainer, rewind: Rewind, resume: ExactResume) -> Snapshot:
    """Everything ``rewind`` asks for, as it is before the next batch. With several ranks every one must call it."""
    taken: Snapshot = {}
    if rewind.weights and rewind.file is None:
        taken["weights"] = copied(dict(trainer.lightning_module.named_parameters()))
    if rewind.buffers and rewind.file is None:
        taken["buffers"] = copied(dict(trainer.lightning_module.named_buffers()))
    if rewind.optimizer or rewind.schedule:
        taken["optimizers"] = [copied(optimizer.state_dict()) for optimizer in trainer.optimizers]
    if rewind.optimizer:
        taken["precision"] = copied(trainer.precision_plugin.state_dict())
    if rewind.schedule:
        taken["schedules"] = [copied(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
    if rewind.rng:
        mine = {"iterator": resume._epoch_streams, "batch": capture()}
        everyone: list[Any] = [mine]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        taken["streams"] = everyone
    if rewind.file is not None:
        taken |= read_file(rewind, trainer.lightning_module)
    return taken


def put(taken: Snapshot, rewind: Rewind, trainer: Trainer, manager: MaskManager, resume: ExactResume) -> None:
    """Put a snapshot back, masked: pruned weights stay exactly zero, and so does what the optimizer remembers of them."""
    write_weights(taken, trainer.lightning_module, manager)
    for optimizer, saved in zip(trainer.optimizers, taken.get("optimizers", []), strict=False):
        now = optimizer.state_dict()
        chosen = {
            "state": copied(saved["state"]) if rewind.optimizer else now["state"],
            "param_groups": copied(saved["param_groups"]) if rewind.schedule else now["param_groups"],
        }
        optimizer.load_state_dict(chosen)
        for tensor in manager:
            if tensor.mask is not None:
                forget(optimizer, tensor.target.parameter, ~tensor.mask, ~tensor.mask)
    if rewind.optimizer:
        trainer.precision_plugin.load_state_dict(copied(taken["precision"]))
    for config, saved in zip(trainer.lr_scheduler_configs, taken.get("schedules", []), strict=False):
        config.scheduler.load_state_dict(copied(saved))
    if "streams" in taken:
        _put_streams(taken["streams"], trainer, resume)


@torch.no_grad()
def write_weights(taken: Snapshot, module: nn.Module, manager: MaskManager) -> None:
    """Write the weights and buffers a snapshot has; targets go through the manager, which masks them."""
    targets = {id(tensor.target.parameter): tensor.name for tensor in manager}
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    for name, value in taken.get("weights", {}).items():
        parameter = parameters[name]
        if id(parameter) in targets:
            manager.write(targets[id(parameter)], value.to(parameter.device))
        else:
            parameter.copy_(value)
    for name, value in taken.get("buffers", {}).items():
        buffers[name].copy_(value)


def _put_streams(everyone: list[Any], trainer: Trainer, resume: ExactResume) -> None:
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    streams = everyone[rank] if rank < len(everyone) else everyone[0]
    resume._batch_streams = streams["batch"]
    if streams["iterator"] is None:
        restore(streams["batch"])
        return
    # Lightning may make the iterator once more (or, just resumed, not at all): either way it comes from these streams.
    resume._iterator_streams = streams["iterator"]
    iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
    restore(streams["iterator"])


def read_file(rewind: Rewind, module: nn.Module) -> Snapshot:
    """Weights and buffers of a file. Raises `MaskStateError` unless they are exactly those of the model."""
    path = rewind.file
    assert path is not None
    try:
        safe = path.suffix == ".safetensors"
        content: Any = load_file(str(path)) if safe else torch.load(path, "cpu", weights_only=True)
        found: dict[str, Tensor] = content.get("state_dict", content)
        shapes = {name: tuple(value.shape) for name, value in found.items()}
    except Exception as error:
        raise MaskStateError(
            f"rewind.to {path} cannot be read as weights ({error}); give a checkpoint or safetensors"
        ) from error
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name in own.keys() | shapes.keys():
        if own.get(name) != shapes.get(name):
            raise MaskStateError(
                f"rewind.to {path} is of another model: {name} has shape {shapes.get(name)} there, {own.get(name)} here."
                + nearest(name, shapes.keys() - {name})
            )
    taken: Snapshot = {}
    if rewind.weights:
        taken["weights"] = {name: found[name] for name, _ in module.named_parameters()}
    if rewind.buffers:
        taken["buffers"] = {name: found[name] for name, _ in module.named_buffers() if name in found}
    return taken


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module


def _reset(module: nn.Module) -> Callable[[], None] | None:
    found = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return found if callable(found) else None


def check_resettable(model: nn.Module) -> None:
    """Raise `RecipeError` naming the first module whose own parameters nothing can initialize again."""
    for name, module in model.named_modules():
        if _reset(module) is None and any(p is not None for p in module._parameters.values()):
            raise RecipeError(
                f"control 'reinit' cannot initialize {name or 'the model'} ({type(module).__name__}) again: it has parameters "
                "and no reset_parameters(); write one, or use control 'random'"
            )


def reinitialize(model: nn.Module, seed: int) -> None:
    """Call every module's ``reset_parameters`` under a seed, children first, as building the model would.

    What a network's constructor does to its layers afterwards is repeated only if it is in the network's own
    ``reset_parameters``. The random streams stay where they are. Example: ``reinitialize(network, seed=1)``.
    """
    streams = capture()
    torch.manual_seed(seed)
    done: set[int] = set()
    for module in _children_first(model):
        reset = _reset(module)
        if reset is not None and id(module) not in done:
            reset()
        done.add(id(module))
    restore(streams)


@torch.no_grad()
def check_another(model: nn.Module, seed: int) -> None:
    """Raise `RecipeError` if initializing under ``seed`` gives the very weights that the model has now: no control at all."""
    own = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    reinitialize(model, seed)
    same = all(torch.equal(p, own[name]) for name, p in model.named_parameters())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        value.copy_(own[name])
    if same:
        raise RecipeError(f"control.seed {seed} gives the initialization that the tickets have already; choose another number")


def tell_epochs(trainer: Trainer, epoch_of: Callable[[int], int] | None) -> None:
    """Let samplers that shuffle by epoch be told ``epoch_of(epoch)`` from now on; None ends it.

    Lightning announces the run's epoch, also when it resumes inside one: the only place to say otherwise is the sampler.
    """
    for sampler, plain in _samplers(trainer):
        sampler.__dict__.pop("set_epoch", None)
        if epoch_of is not None:
            sampler.__dict__["set_epoch"] = _translated(plain, epoch_of)


def begin_epoch(trainer: Trainer) -> None:
    """Announce the epoch as a new one, even if it has the number of the last: a loader would take it for finished."""
    for sampler, plain in _samplers(trainer):
        plain(trainer.current_epoch + 1)
        sampler.set_epoch(trainer.current_epoch)


def _samplers(trainer: Trainer) -> Iterator[tuple[Any, Callable[[int], None]]]:
    """What shuffles the training data by epoch, and its own way to be told."""
    loader: Any = trainer.fit_loop._combined_loader
    for part in [] if loader is None else loader.flattened:
        for sampler in (getattr(part, "sampler", None), getattr(getattr(part, "batch_sampler", None), "sampler", None)):
            plain = getattr(type(sampler), "set_epoch", None)
            if plain is not None:
                yield sampler, MethodType(plain, sampler)


def _translated(plain: Callable[[int], None], epoch_of: Callable[[int], int]) -> Callable[[int], None]:
    return lambda epoch: plain(epoch_of(epoch))


def outlasting(trainer: Trainer, every: int, clock: Clock) -> str | None:
    """The name of a learning-rate schedule that is not at its end when a round of ``every`` steps is, or None."""
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        unit = clock.steps_per_epoch or 1 if config.interval == "epoch" else 1
        end, later = every // unit, (clock.total_steps or every * 1000) // unit
        factors = [f for f in scheduler.lr_lambdas if callable(f)] if isinstance(scheduler, LambdaLR) else []
        lengths = [vars(scheduler)[name] for name in ("total_steps", "T_max", "total_iters") if name in vars(scheduler)]
        if any(f(end) != f(later) for f in factors) or any(length > end for length in lengths):
            return type(scheduler).__name__
    return None
