"""Two ranks on this machine's CPU: how they are started, the models they share, what they hand back, what they are watched by.

The same functions run in one process and on every rank, so that a test compares like with like.
"""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from sparsetrain.masks import MaskManager, Override
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

RANKS = 2
Wrap = Callable[[nn.Module], nn.Module]


class Group:
    """Ranks at work; `results` waits for them."""

    def __init__(self, work: Callable[[Path], Any], folder: Path) -> None:
        self.folder = folder
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the ranks
        self.context = mp.start_processes(_rank, (work, folder), nprocs=RANKS, join=False, start_method="spawn")

    def results(self) -> list[Any]:
        """What `work` returned on each rank."""
        while not self.context.join():
            pass
        return [torch.load(self.folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _rank(rank: int, work: Callable[[Path], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",  # read by Lightning, used by nobody: the group is there already
    }
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", datetime.timedelta(seconds=60), world_size=RANKS, rank=rank
    )
    try:
        torch.save(work(folder), folder / f"rank{rank}.pt")
    except BaseException:
        # a peer may fail of this one's absence: let the first cause be read
        print(f"rank {rank}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        raise
    dist.destroy_process_group()


@contextmanager
def one_thread() -> Iterator[None]:
    """As on a rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- ways to put a model on ranks -------------------------------------------------------------------------------------------


def alone(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    """One parameter group; rows over all ranks."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def hybrid(model: nn.Module) -> nn.Module:
    """A mesh of two dimensions: replicas of shards."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("replicate", "shard")))


def partly(model: nn.Module) -> nn.Module:
    """Only the first layer is sharded, the others are whole on every rank."""
    fully_shard(next(model.children()), mesh=init_device_mesh("cpu", (RANKS,)))
    return model


def by_columns(model: nn.Module) -> nn.Module:
    """FSDP2 told to shard another dimension than the first."""
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (RANKS,))
    return fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else None)


# -- selection --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way to prune one model, twice: to 0.3 and then to 0.6 (a fixed pattern: to its sparsity, twice)."""

    model: str
    pattern: str
    allocation: str = "uniform"
    criterion: str = "magnitude"
    values: str = "ties"
    wrap: str = "fsdp"


def layers(kind: str) -> nn.Module:
    """Tensors that do not divide by 2 ranks, that do, whose blocks meet the shard's edge, that have one row only."""
    if kind == "linear":
        shapes = [(24, 33), (24, 31), (24, 32), (24, 1)]
        return nn.Sequential(*[nn.Linear(i, o) for i, o in shapes])
    if kind == "conv":
        return nn.Sequential(*[nn.Conv2d(8, 13, 3), nn.Conv2d(16, 8, (1, 2)), nn.Conv2d(16, 1, 1)])
    return nn.Sequential(*[Conv1D(7, 24), Conv1D(12, 40), Conv1D(9, 8)])


@torch.no_grad()
def fill(model: nn.Module, values: str) -> nn.Module:
    """The same weights everywhere: whole numbers of -3 to 3 (ties without end), or normal ones, or those in float64."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if values == "ties":
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.double() if values == "double" else model


def cases() -> list[Case]:
    """Every pattern on every layout; global where scores can be compared; the criteria and the number types."""
    blocks = ["block:4x4", "block:4x5", "block:1x4"]
    found = []
    for model in ("linear", "conv", "conv1d"):
        for pattern in ["unstructured", "unstructured:row", "2:4", "4:8", *blocks, "neurons", "channels"]:
            for allocation in ("uniform", "global"):
                if allocation == "global" and pattern in ("unstructured:row", "2:4", "4:8"):
                    continue  # refused by name: fixed row by row
                found += [
                    Case(model, pattern, allocation, "magnitude", "ties"),
                    Case(model, pattern, allocation, "magnitude", "normal"),
                    Case(model, pattern, allocation, "magnitude", "double"),
                    Case(model, pattern, allocation, "random", "ties"),
                ]
    for wrap in ("ddp", "hybrid", "partly", "by_columns"):
        for pattern, allocation in [("unstructured", "global"), ("2:4", "uniform"), ("block:4x4", "global")]:
            found.append(Case("linear", pattern, allocation, wrap=wrap))
    return found


def run_case(case: Case, wrap: Wrap) -> dict[str, Any]:
    """The masks after each round, and everything else that must not depend on the number of ranks."""
    model = wrap(fill(layers(case.model), case.values))
    # one row has no neuron to spare
    single = {"linear": "3.weight", "conv": "2.weight"}.get(case.model) if case.pattern == "neurons" else None
    overrides = {single: Override(sparsity=0.0)} if single else {}
    manager = MaskManager(model, Targets(head=True), case.pattern, overrides)
    masks = []
    for sparsity in (None, None) if ":" in case.pattern and case.pattern[0].isdigit() else (0.3, 0.6):
        prune(manager, sparsity, criterion=case.criterion, allocation=case.allocation)
        masks.append({tensor.name: tensor.full_mask() for tensor in manager})
    return {
        "masks": masks,
        "state": manager.state_dict(),
        "counts": manager.counts(),
        "problems": manager.verify().problems,
    }


# -- watching -----------------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any collective moved, and the largest that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, Tensor)]
        if func.namespace in ("c10d", "_c10d_functional"):
            self.moved = max([self.moved, *(t.numel() for t in tensors)])
        else:
            self.made = max([self.made, *(t.numel() for t in tensors)])
        return result
