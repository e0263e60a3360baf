"""The promises, checked from outside: nothing here asks the manager whether the manager is right.

`assert_promises` holds the weights, the averaged copies and the optimizers' memory against an oracle of its own. The
reference for memory is a *ghost*: a parameter of zeros of the same shape, in the same optimizer, that never sees anything but
zero gradients. What the optimizer remembers of a pruned weight must be what it remembers of the ghost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.swa_utils import AveragedModel


@dataclass
class Watched:
    """A model under the promises: its weights by name, what was asked of each, its optimizers, ghosts and copies."""

    model: nn.Module
    asked: dict[str, tuple[str, float]]
    masks: dict[str, Tensor]
    optimizers: list[Optimizer] = field(default_factory=list)
    ghosts: dict[str, nn.Parameter] = field(default_factory=dict)
    copies: list[nn.Module] = field(default_factory=list)
    _counted: dict[str, tuple[object, ...]] = field(default_factory=dict)
    _dead: dict[str, Tensor] = field(default_factory=dict)

    def dead(self, name: str) -> Tensor:
        """Flat indices of the pruned entries; the mask is counted anew whenever it is another or was written to."""
        mask, (pattern, sparsity) = self.masks[name], self.asked[name]
        known, *state = self._counted.get(name, (None,))
        if known is not mask or state != [mask._version, pattern, sparsity]:
            assert_pattern(mask, pattern, sparsity)
            self._dead[name] = (~mask).flatten().nonzero().flatten()
            self._counted[name] = (mask, mask._version, pattern, sparsity)
        return self._dead[name]


def assert_pattern(mask: Tensor, pattern: str, sparsity: float) -> None:
    """The mask has the pattern at the sparsity, counted by hand; a mask is ``(out, in)`` with True = alive."""
    dead = (~mask).long()
    numel = mask.numel()
    exact = Fraction(str(sparsity))
    if pattern == "unstructured":
        assert int(dead.sum()) == math.floor(exact * numel), f"{int(dead.sum())} of {numel} pruned, {sparsity} asked"
    elif pattern == "unstructured:row":
        found = set(dead.sum(1).tolist())
        assert found == {math.floor(exact * mask.shape[1])}, f"rows with {sorted(found)} pruned, {sparsity} asked"
    elif pattern == "2:4":
        groups = [tuple(row[i : i + 4]) for row in dead.tolist() for i in range(0, len(row), 4)]
        found = {sum(group) for group in groups}
        assert found == ({2} if sparsity else {0}), f"groups of 4 with {sorted(found)} pruned"
    elif pattern == "neurons":
        rows = dead.sum(1).tolist()
        assert set(rows) <= {0, mask.shape[1]}, "a neuron is half pruned"
        assert sum(row > 0 for row in rows) == math.floor(exact * mask.shape[0]), f"{rows} pruned, {sparsity} asked"
    else:
        raise AssertionError(f"no oracle for pattern {pattern!r}")


def assert_zeros(weight: Tensor, dead: Tensor, what: str) -> None:
    """Every entry at these flat indices is exactly 0.0 (NaN is not)."""
    revived = int(torch.count_nonzero(weight.detach().flatten()[dead]))
    assert not revived, f"{what}: {revived} of {len(dead)} pruned weights are not zero"


def assert_no_memory(optimizer: Optimizer, weight: nn.Parameter, dead: Tensor, ghost: nn.Parameter) -> None:
    """What the optimizer remembers of pruned entries is what it remembers of a parameter that never moved."""
    if isinstance(optimizer, LBFGS):
        _assert_no_flat_memory(optimizer, weight, dead)
        return
    reference = optimizer.state.get(ghost, {})
    for key, value in optimizer.state.get(weight, {}).items():
        if isinstance(value, Tensor) and value.shape == weight.shape and value.ndim:
            stale = value.flatten()[dead] != reference[key].flatten()[dead]
            if key == "exp_inf":  # Adamax lifts it from 0, where it starts, to eps: both are no memory
                stale &= value.flatten()[dead] != 0
            count = int(stale.sum())
            assert not count, f"{type(optimizer).__name__}.{key} remembers {count} pruned entries"


def _assert_no_flat_memory(optimizer: LBFGS, weight: nn.Parameter, dead: Tensor) -> None:
    parameters = optimizer.param_groups[0]["params"]
    start = 0
    for parameter in parameters:
        if parameter is weight:
            break
        start += parameter.numel()
    total = sum(p.numel() for p in parameters)
    for key, value in optimizer.state[parameters[0]].items():
        for flat in value if isinstance(value, list) else [value]:
            if isinstance(flat, Tensor) and flat.numel() == total:
                stale = int(torch.count_nonzero(flat[start : start + weight.numel()][dead]))
                assert not stale, f"LBFGS.{key} remembers {stale} pruned entries"


def assert_promises(watched: Watched) -> None:
    """Weights exactly zero where pruned, patterns exact, averaged copies as sparse, optimizer memory clear."""
    for name, (_, sparsity) in watched.asked.items():
        if name not in watched.masks:
            assert not sparsity, f"{name} is dense, sparsity {sparsity} was asked"
            continue
        weight, dead = watched.model.get_parameter(name), watched.dead(name)
        assert_zeros(weight, dead, name)
        for copy in watched.copies:
            inner = copy.module if isinstance(copy, AveragedModel) else copy
            assert_zeros(inner.get_parameter(name), dead, f"averaged copy of {name}")
        for optimizer in watched.optimizers:
            if name in watched.ghosts:
                assert_no_memory(optimizer, weight, dead, watched.ghosts[name])


def zeros_of(tensors: Iterable[Tensor]) -> list[int]:
    """Number of exact zeros of each tensor."""
    return [int((tensor == 0).sum()) for tensor in tensors]


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Two state dicts are equal bit for bit (so that -0.0 is not 0.0, and NaN is NaN)."""
    assert list(one) == list(other)
    for name in one:
        first, second = (t[name].detach().cpu().reshape(-1) for t in (one, other))
        assert first.dtype == second.dtype
        assert one[name].shape == other[name].shape
        differing = int(torch.count_nonzero(first.view(torch.uint8) != second.view(torch.uint8)))
        assert not differing, f"{name} differs in {differing} bytes"
