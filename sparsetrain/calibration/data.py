"""Batches of any shape: cut into samples, put together again, and told apart."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.errors import DataError

#: What can be compared by ``==``; arrays and the like cannot.
_PLAIN = (str, bytes, int, float, type(None))


def samples(batch: Any) -> Iterator[Any]:
    """Cut a batch (tensor, tuple, list or mapping of tensors with samples along dimension 0) into batches of one sample.

    Raises `DataError` where the tensors do not agree how many samples there are.
    """
    count = _count(batch)
    if count is None:
        sizes = sorted({len(t) for t in tensors_in(batch) if t.ndim})
        raise DataError(
            f"a batch of {type(batch).__name__} with first dimensions {sizes} cannot be cut into single samples; "
            "use batches of tensors that all count samples along dimension 0, or a criterion that takes whole batches"
        )
    for index in range(count):
        yield _cut(batch, index, index + 1)


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Every tensor in a batch, or in what a module is given or returns."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors_in(value)


def rebatch(batches: Iterable[Any], size: int) -> list[Any]:
    """The same samples in batches of at most ``size``: large ones are cut, small neighbours of one shape put together.

    Order is kept. A batch whose tensors do not all count samples along dimension 0 stays as it is.

    Example: ``[len(b) for b in rebatch([torch.zeros(3, 2), torch.zeros(2, 2)], 4)]`` is ``[3, 2]``.
    """
    found: list[Any] = []
    room = 0  # how many more samples the last batch may take
    for batch in batches:
        count = _count(batch)
        if count is None:
            found.append(batch)
            room = 0
            continue
        for start in range(0, count, size):
            piece = _cut(batch, start, min(start + size, count))
            many = min(size, count - start)
            if many <= room and _alike(found[-1], piece):
                found[-1] = _joined([found[-1], piece])
                room -= many
            else:
                found.append(piece)
                room = size - many
    return found


def first_alone(batches: list[Any]) -> list[Any]:
    """The same batches with the first sample in one of its own: what is looked at once more is cheap then.

    Example: ``[len(b) for b in first_alone([torch.zeros(3, 2)])]`` is ``[1, 2]``.
    """
    count = _count(batches[0]) if batches else None
    if count is None or count == 1:
        return batches
    return [_cut(batches[0], 0, 1), _cut(batches[0], 1, count), *batches[1:]]


def count_samples(batches: Iterable[Any]) -> int:
    """How many samples there are; a batch that cannot be cut counts as one."""
    return sum(_count(batch) or 1 for batch in batches)


def first_sample(batch: Any) -> Any:
    """The first sample of a batch, or the batch if it cannot be cut."""
    return batch if _count(batch) is None else _cut(batch, 0, 1)


def checksum(values: Iterable[Any]) -> str:
    """CRC-32 of every tensor in order, shapes and types included. Example: ``checksum([torch.zeros(2)])``."""
    crc = 0
    for tensor in tensors_in(list(values)):
        crc = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), crc)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc) if flat.numel() else crc
    return f"{crc:08x}"


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor on a device."""
    return mapped(batch, lambda tensor: tensor.to(device))


def runner(model: nn.Module) -> Callable[[Any], Any]:
    """How a batch is given to a model where nobody says: a mapping by name, of a tuple or list the first, a tensor as it is.

    Example: ``runner(model)({"input_ids": tokens})`` calls ``model(input_ids=tokens)``.
    """

    def run(batch: Any) -> Any:
        parameter = next(model.parameters(), None)
        given = batch if parameter is None else to_device(batch, parameter.device)
        if isinstance(given, Mapping):
            return model(**given)
        return model(given[0] if isinstance(given, list | tuple) else given)

    return run


def _count(batch: Any) -> int | None:
    sizes = {len(t) for t in tensors_in(batch) if t.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch, or what a module is given, with every tensor changed; containers are made anew."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return _refilled(batch, {key: mapped(value, change) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        parts = [mapped(value, change) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _refilled(like: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """The values in a mapping of the same kind: who wrote ``batch.input_ids`` finds it."""
    if type(like) is dict or not isinstance(like, MutableMapping):
        return values
    found = copy.copy(like)
    for key, value in values.items():
        found[key] = value
    return found


def _cut(batch: Any, start: int, stop: int) -> Any:
    return mapped(batch, lambda tensor: tensor[start:stop] if tensor.ndim else tensor)


def _alike(one: Any, other: Any) -> bool:
    """Whether two batches differ only in how many samples they have."""
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.dtype == other.dtype and one.ndim == other.ndim
        if not same:
            return False
        return one.shape[1:] == other.shape[1:] if one.ndim else bool(one == other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return (
            type(one) is type(other) and len(one) == len(other) and all(_alike(a, b) for a, b in zip(one, other, strict=True))
        )
    return one is other or (isinstance(one, _PLAIN) and type(one) is type(other) and one == other)


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else first
    if isinstance(first, Mapping):
        return _refilled(first, {key: _joined([part[key] for part in parts]) for key in first})
    if isinstance(first, list | tuple):
        joined = [_joined(list(values)) for values in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    return first
