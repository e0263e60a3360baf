"""Spaces for tasks: each compacts its connections into few neurons of one sparse network, and reserves some of these.

After SpaceNet (Sokar, Mocanu and Pechenizkiy 2021, Neurocomputing 439, arXiv 2007.07617). A task selects neurons of every
hidden layer that nobody has reserved, and connects them at random; connections then move to where they matter: the least
important ones are dropped, and as many grow between the most important neurons. At its end its most important neurons are
reserved: no later task connects to or from them. The importance of a connection is ``sum_steps |dw * dL/dw|``, that of a neuron
the sum over the connections that come in.

Everything is counted in connections ``(out, in)``: of a convolution a whole kernel. Pure torch; randomness by key alone.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from sparsetrain.errors import PatternError, TargetError
from sparsetrain.selection import prune_lowest


class Spaces:
    """Which connections and neurons of a chain of layers belong to whom.

    Args:
        shapes: name -> ``(out, in, *kernel)`` of each layer in forward order, the output head last; each layer reads the one
            before (a flattened convolution counts: then every channel is several inputs).

    Raises `TargetError` where layers are no such chain. Example: ``Spaces({"fc1": (400, 784), "fc2": (10, 400)})``.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.names = list(shapes)
        self.shapes = {name: (shape[0], shape[1]) for name, shape in shapes.items()}
        if len(shapes) < 2:
            raise TargetError(f"{', '.join(shapes)}: a task needs hidden neurons to live in, and there is one layer only")
        for before, name in zip(self.names, self.names[1:], strict=False):
            out, inputs = self.shapes[before][0], self.shapes[name][1]
            if inputs % out:
                raise TargetError(
                    f"{name} has {inputs} inputs and {before}, the target before it, {out} outputs: the layers are no chain, "
                    "in which neurons could be reserved; use a plain network (MLP, LeNet5Caffe), or PackNet"
                )
        #: Connections of earlier tasks; neurons that are reserved; those of the task at work (hidden layers), its connections.
        self.taken = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        self.reserved = {name: torch.zeros(self.shapes[name][0], dtype=torch.bool) for name in self.hidden}
        self.selected = {name: torch.zeros(self.shapes[name][0], dtype=torch.bool) for name in self.hidden}
        self.mine = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in self.shapes.items()}

    @property
    def hidden(self) -> list[str]:
        """All layers but the head."""
        return self.names[:-1]

    @property
    def head(self) -> str:
        """The last layer."""
        return self.names[-1]

    def allocate(self, share: Fraction, sparsity: Fraction, rows: list[int], key: str) -> None:
        """Select neurons for a task, ``max(1, floor(share * width))`` of each hidden layer, and connect them at random.

        Of the connections there could be, ``max(1, floor((1 - sparsity) * n))`` are made; in the head all, to the rows of the
        task. Raises `PatternError` when too few neurons are free.
        """
        for name in self.hidden:
            free = ~self.reserved[name]
            wanted, left = max(1, math.floor(share * len(free))), int(free.sum())
            if wanted > left:
                raise PatternError(
                    f"{name}: the network is full: {left} of {len(free)} neurons are free, a task takes {wanted}; reserve "
                    "fewer, or give each task a smaller share"
                )
            self.selected[name] = _highest(_uniform(f"{key}/{name}/neurons", free.shape), wanted, free)
        for name in self.hidden:
            room = self._room(name) & ~self.taken[name]
            if not bool(room.any()):
                raise PatternError(f"{name}: the network is full: no connection between the selected neurons is free")
            wanted = max(1, math.floor((1 - sparsity) * int(room.sum())))
            self.mine[name] = _highest(_uniform(f"{key}/{name}", room.shape), wanted, room)
        self.mine[self.head] = torch.zeros(self.shapes[self.head], dtype=torch.bool)
        self.mine[self.head][rows] = self._columns(self.head)
        self.mine[self.head] &= ~self.taken[self.head]

    def open_head(self, rows: list[int], used: Tensor) -> None:
        """Let the task at work train the head in these rows, to all neurons in ``used`` (last hidden layer, bool)."""
        self.taken[self.head][:] = False
        self.mine[self.head][:] = False
        self.mine[self.head][rows] = used.repeat_interleave(self._copies(self.head))

    def renew(self, name: str, importance: dict[str, Tensor], fraction: float) -> None:
        """Drop the least important ``floor(fraction * n)`` connections of a hidden layer, grow as many between the most
        important neurons."""
        mine, own = self.mine[name], importance[name]
        room = self._room(name) & ~self.taken[name] & ~mine
        count = min(math.floor(fraction * int(mine.sum())), int(room.sum()))
        place = self.names.index(name)
        arriving = own.sum(0) if place == 0 else importance[self.names[place - 1]].sum(1).repeat_interleave(self._copies(name))
        grown = _highest(own.sum(1)[:, None] * arriving[None, :], count, room)
        kept = _highest(own, int(mine.sum()) - count, mine)
        self.mine[name] = kept | grown

    def close(self, importance: dict[str, Tensor], share: Fraction) -> None:
        """The task is over: its connections are taken, its ``floor(share * n)`` most important neurons of n reserved."""
        for name in self.names:
            self.taken[name] = self.taken[name] | self.mine[name]
        for name in self.hidden:
            mine = self.selected[name]
            count = math.floor(share * int(mine.sum()))
            self.reserved[name] = self.reserved[name] | _highest(importance[name].sum(1), count, mine)

    def alive(self, name: str) -> Tensor:
        """The connections there are, bool (out, in)."""
        return self.taken[name] | self.mine[name]

    def _copies(self, name: str) -> int:
        return self.shapes[name][1] // self.shapes[self.names[self.names.index(name) - 1]][0]

    def _columns(self, name: str) -> Tensor:
        """The inputs of a layer that the task at work may read."""
        place = self.names.index(name)
        if not place:
            return torch.ones(self.shapes[name][1], dtype=torch.bool)
        return self.selected[self.names[place - 1]].repeat_interleave(self._copies(name))

    def _room(self, name: str) -> Tensor:
        return self.selected[name][:, None] & self._columns(name)[None, :]

    def state_dict(self) -> dict[str, Any]:
        """Connections and neurons, by name."""
        return {key: dict(getattr(self, key)) for key in ("taken", "reserved", "selected", "mine")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for key, value in state.items():
            setattr(self, key, {name: tensor.clone() for name, tensor in value.items()})


def _uniform(key: str, shape: tuple[int, ...]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def fresh_weights(shape: tuple[int, ...], connections: Tensor, key: str) -> Tensor:
    """Uniform in plus or minus ``sqrt(3 / n)``, n the inputs each output of ``connections`` (out, in) has on average.

    Example: ``fresh_weights((80, 784), mask, "0/1/fc1.weight")``.
    """
    rows = connections.any(1).sum().clamp_min(1)
    fan_in = float(connections.sum() / rows) * math.prod(shape[2:])
    return (2 * _uniform(key, shape) - 1) * math.sqrt(3 / max(fan_in, 1.0))


def _highest(scores: Tensor, count: int, among: Tensor) -> Tensor:
    """The ``count`` highest of the entries marked, bool."""
    ranked = scores.masked_fill(~among, -math.inf)
    return prune_lowest(ranked, ranked.numel() - count)
