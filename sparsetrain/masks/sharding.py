"""Selecting a mask on a tensor that may be sharded over ranks: the same mask, bit for bit, as on one rank.

FSDP2 shards dimension 0. Rows, N:M groups and blocks that do not cross a shard select shard-locally (blocks exchange one
number each); a whole-tensor or global threshold all-reduces radix counts; anything else gathers that one tensor. Plain
tensors (one process, DDP) take the ordinary path. A mask that is wrong on one rank is refused on all. Pure torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sparsetrain.errors import PatternError
from sparsetrain.patterns import Block, Pattern, Sparsity, Unstructured
from sparsetrain.patterns.base import require_count
from sparsetrain.selection import global_threshold, prune_lowest
from sparsetrain.targets import Layout

Reduce = Callable[[Tensor], Tensor]


def local(tensor: Tensor) -> Tensor:
    """The entries this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All entries, gathered where they are sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(values: Tensor, parameter: Tensor) -> Tensor:
    """Local values seen as a tensor sharded like ``parameter``."""
    if not isinstance(parameter, DTensor):
        return values
    return DTensor.from_local(
        values,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def take_local(values: Tensor, parameter: Tensor) -> Tensor:
    """The part of full values that belongs to this rank; every rank has them all, nothing is sent."""
    if not isinstance(parameter, DTensor):
        return values
    mine = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    return mine.clone(memory_format=torch.contiguous_format)  # a view would keep the whole alive


def reshard(model: nn.Module) -> None:
    """Take back the gathered parameters that FSDP2 leaves in a model's root after a forward pass without a backward."""
    if dist.is_available() and dist.is_initialized():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@dataclass(frozen=True)
class RowShard:
    """A tensor sharded by rows over the ranks of a one-dimensional mesh."""

    group: dist.ProcessGroup
    rank: int
    chunk: int
    device: str

    @staticmethod
    def of(parameter: Tensor) -> RowShard | None:
        """How a parameter is sharded by rows, or None if it is not, or otherwise."""
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim != 1:
            return None
        placement = parameter.placements[0]
        if not (isinstance(placement, Shard) and placement.dim == 0 and type(placement) is Shard):
            return None
        mesh = parameter.device_mesh
        chunk = math.ceil(parameter.shape[0] / mesh.size())
        return RowShard(mesh.get_group(), mesh.get_local_rank(), chunk, mesh.device_type)

    def sum(self, counts: Tensor) -> Tensor:
        """All-reduce by summing."""
        total = counts.to(self.device, copy=True)  # NCCL moves nothing that is on the CPU
        dist.all_reduce(total, group=self.group)
        return total.to(counts.device)

    def gather(self, value: int) -> list[int]:
        """One integer of every rank, in rank order."""
        mine = torch.tensor([value], dtype=torch.int64, device=self.device)
        everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everyone, mine, group=self.group)
        return [int(v) for v in everyone]


def reducer(parameters: list[Tensor]) -> Reduce | None:
    """The all-reduce that sums counts over the ranks that hold these parameters' rows; None if not all are held so."""
    shards = [RowShard.of(p) for p in parameters]
    known = [s for s in shards if s is not None and s.group == (shards[0] and shards[0].group)]
    return known[0].sum if known and len(known) == len(parameters) else None


def total(flags: list[Tensor], parameter: Tensor) -> list[int]:
    """How many are True in each of some bool tensors (this rank's parts), over all ranks."""
    if shard := RowShard.of(parameter):
        return [int(n) for n in shard.sum(torch.stack([f.sum() for f in flags]))]
    return [int(torch.count_nonzero(full(like(f.view(torch.uint8), parameter)))) for f in flags]


def agreed(problem: str | None, parameter: Tensor) -> str | None:
    """The first problem that any rank has with its rows of a tensor, the same on every rank."""
    shard = RowShard.of(parameter)
    if shard is None:
        return problem
    found: list[str | None] = [None] * dist.get_world_size(shard.group)
    dist.all_gather_object(found, problem, group=shard.group)
    return next((p for p in found if p is not None), None)


def check(pattern: Pattern, mask: Tensor, parameter: Tensor, layout: Layout, sparsity: Sparsity) -> None:
    """Raise `PatternError`, on every rank, unless the whole mask has its pattern; ``mask`` is this rank's part.

    Every rank of the mesh must call it. Rows are checked where they are and unstructured masks by counts; blocks, slices and
    transposed layouts gather the mask.
    """
    shape, shard = layout.shape(parameter.shape), RowShard.of(parameter)
    if shard is not None and pattern == Unstructured():
        return require_count(total([~mask], parameter)[0], pattern.pruned(shape, sparsity), "weights")
    if shard is None or layout != Layout() or not pattern.row_local:
        whole = full(like(mask.view(torch.uint8), parameter)).contiguous().view(torch.bool)
        return pattern.check(layout.view(whole), sparsity)
    pattern.validate(shape, sparsity)
    problem = None
    try:
        if mask.numel():
            pattern.check(mask, sparsity)
    except PatternError as error:
        problem = f"{error} (counted from row {shard.rank * shard.chunk}, rank {shard.rank})"
    problem = agreed(problem, parameter)
    if problem is not None:
        raise PatternError(problem)
    return None


def select(pattern: Pattern, scores: Tensor, parameter: Tensor, layout: Layout, sparsity: Sparsity) -> Tensor:
    """Select the mask of one tensor from the scores of this rank's entries (stored layout); local mask, stored layout.

    Every rank of the mesh must call it.
    """
    if not isinstance(parameter, DTensor):
        return layout.view(pattern.select(layout.view(scores), sparsity)).contiguous()
    shard = None if layout != Layout() else RowShard.of(parameter)
    if shard is not None and pattern.row_local:
        pattern.validate(tuple(parameter.shape), sparsity)
        return pattern.select(scores, sparsity) if scores.numel() else torch.ones_like(scores, dtype=torch.bool)
    if shard is not None and pattern == Unstructured():
        return _select_tensor(shard, scores, pattern.pruned(tuple(parameter.shape), sparsity))
    if shard is not None and isinstance(pattern, Block) and shard.chunk % pattern.rows == 0:
        return _select_blocks(pattern, scores, parameter, sparsity)
    everything = full(like(scores, parameter))
    return take_local(layout.view(pattern.select(layout.view(everything), sparsity)), parameter)


def _select_tensor(shard: RowShard, scores: Tensor, count: int) -> Tensor:
    threshold = global_threshold([lambda: scores], count, shard.sum)
    below, equal = threshold.below[0], threshold.equal[0]
    # Ties go to the lower index: rows of earlier ranks come first.
    wanted = count - sum(shard.gather(below))
    earlier = sum(shard.gather(equal)[: shard.rank])
    return prune_lowest(scores, below + min(max(wanted - earlier, 0), equal))


def _select_blocks(pattern: Block, scores: Tensor, parameter: DTensor, sparsity: Sparsity) -> Tensor:
    shape = tuple(parameter.shape)
    columns = math.prod(shape[1:])
    grid = (math.ceil(shape[0] / pattern.rows), math.ceil(columns / pattern.cols))
    kind = torch.promote_types(scores.dtype, torch.float32)
    mine = pattern.unit_scores(scores) if scores.numel() else scores.new_zeros((0, grid[1]), dtype=kind)
    units = DTensor.from_local(
        mine, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(grid), stride=(grid[1], 1)
    )
    alive = prune_lowest(units.full_tensor(), pattern.pruned(shape, sparsity))
    if not scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    shard = RowShard.of(parameter)
    first = 0 if shard is None else shard.rank * shard.chunk // pattern.rows
    return pattern.expand(alive[first : first + mine.shape[0]], tuple(scores.shape))
