"""What a layer multiplies with its weight, as matrices: the shared ground of Wanda, RIA and SparseGPT.

A weight ``(out, in, *kernel)`` is a matrix ``(out, in * kernel)``, and each of its columns multiplies one feature: an input of
a linear layer, an entry of the patch under the kernel of a convolution (stride, padding and dilation as the layer has them).
The outputs of a layer may form groups that see different features (``groups`` of a convolution): statistics then have a
leading dimension of groups, which is 1 for all other layers, and the rows of a weight are cut into as many equal parts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.criteria.base import Known, Seen, StatisticsCriterion, wide
from sparsetrain.errors import DataError, DivergedError, RecipeError

#: Entries of the patches of a convolution that are made at a time: 32 MiB in float32.
_CHUNK = 1 << 23
#: Layers that multiply their weight with their input and do nothing else, by name as `Targets` knows them.
_LAYERS = frozenset({"Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d"})


def features(module: nn.Module, values: Tensor) -> Iterator[Tensor]:
    """An input, in pieces of shape ``(groups, samples * positions, in * kernel)``, float32 at least.

    Linear layers (and transformers' Conv1D) take ``(..., in)``, convolutions ``(N, in, *positions)`` or ``(in, *positions)``.

    Example: a `nn.Linear` (4, 2) and an input of shape (3, 5, 4) give one piece of shape (1, 15, 4).
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        yield from _patches(module, values)
    else:
        yield wide(values).reshape(1, -1, values.shape[-1])


def _patches(module: Any, values: Tensor) -> Iterator[Tensor]:
    """The patches under the kernel; their entries in the order of the weight's, ``(in, *kernel)``."""
    kernel: tuple[int, ...] = module.kernel_size
    batch = values if values.ndim == len(kernel) + 2 else values[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    for images in torch.split(batch, max(1, _CHUNK // max(1, batch[0].numel() * math.prod(kernel)))):
        found = F.pad(wide(images), module._reversed_padding_repeated_twice, mode=mode)
        for i, (size, step, apart) in enumerate(zip(kernel, module.stride, module.dilation, strict=True)):
            found = found.unfold(2 + i, apart * (size - 1) + 1, step)[..., ::apart]
        # (N, groups, in of a group, *positions, *kernel) -> (groups, N, *positions, in of a group, *kernel)
        split = found.reshape(len(images), module.groups, -1, *found.shape[2:])
        at = range(3, 3 + len(kernel))
        order = (1, 0, *at, 2, *(i + len(kernel) for i in at))
        yield split.permute(order).reshape(
            module.groups, -1, batch.shape[-len(kernel) - 1] // module.groups * math.prod(kernel)
        )


class InputCriterion(StatisticsCriterion):
    """A criterion on what layers multiply. A subclass needs `observe` and `rate`."""

    needs: ClassVar[Literal["gradient", "output", "input"]] = "input"

    def __init__(self, batches: int = 16) -> None:
        super().__init__(batches)
        self._known: dict[str, Known] = {}

    def prepare(self, model: nn.Module, tensors: Sequence[Known]) -> None:
        """Refuse layers that do not simply multiply weight and input."""
        super().prepare(model, tensors)
        for tensor in tensors:
            if not any(base.__name__ in _LAYERS for base in type(tensor.module).__mro__):
                raise RecipeError(
                    f"{tensor.name}: criterion {type(self).__name__} measures what a layer multiplies with its weight, which "
                    f"is not known of {type(tensor.module).__name__}; leave it out (targets.exclude), or use 'magnitude'"
                )
        self._known |= {tensor.name: tensor for tensor in tensors}

    @abstractmethod
    def rate(self, matrix: Tensor, name: str) -> Tensor:
        """Scores of a weight seen as ``(groups, out of a group, in * kernel)``, float32 at least; same shape."""

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        """The scores of a tensor as stored; see `rate`."""
        self.remembered(name)
        view = self._known[name].view
        seen = view(wide(weight))
        return view(self.rate(self.matrix(seen, name), name).view(seen.shape))

    def observe(self, seen: Seen) -> None:
        """Take in an input; a subclass adds to it."""
        self._known.setdefault(seen.tensor.name, seen.tensor)

    def pieces(self, seen: Seen) -> Iterator[Tensor]:
        """An input in pieces, as `features` gives it; counts its samples (and positions) in ``memory["rows"]``."""
        rows = 0
        for piece in () if seen.input is None else features(seen.tensor.module, seen.input):
            yield piece
            rows += piece.shape[1]
        if rows and seen.input is not None:
            self.add(seen.tensor.name, rows=torch.tensor(rows, device=seen.input.device))

    def matrix(self, weight: Tensor, name: str) -> Tensor:
        """A weight ``(out, in, *kernel)`` as ``(groups, out of a group, in * kernel)``."""
        groups = next(iter(self.remembered(name).values())).shape[0]
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def require_finite(self, name: str, sums: Tensor) -> None:
        """Raise `DivergedError` unless sums of products are finite."""
        if not bool(torch.isfinite(sums).all()):
            raise DivergedError(
                f"criterion {type(self).__name__}: the inputs of {name} are not finite, or overflow when squared; find what "
                "diverged, or leave the tensor out (targets.exclude)"
            )

    def require_usable(self, name: str, squares: Tensor) -> None:
        """Raise `DivergedError` unless sums of squares are finite, `DataError` if all are 0."""
        self.require_finite(name, squares)
        if not bool(squares.any()):
            raise DataError(
                f"criterion {type(self).__name__} cannot score {name}: all its inputs were 0 in every batch. Is the layer "
                "before it dead? Leave it out (targets.exclude), or use criterion 'magnitude'"
            )
