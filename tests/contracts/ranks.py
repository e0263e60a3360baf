"""Two ranks on this machine's CPU: how they are started, the models they share, what they hand back, what they are watched by.

The same functions run in one process and on every rank, so that a test compares like with like.
"""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

from sparsetrain.callbacks import GroupLasso, Groups, Noise, Penalty, PruneFinetune, VariationalDropout
from sparsetrain.callbacks.weight_noise import NoisyWeights
from sparsetrain.errors import SparsetrainError
from sparsetrain.masks import MaskManager, Override, sharding
from sparsetrain.pruning import prune
from sparsetrain.schedules import Rounds
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
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", datetime.timedelta(seconds=60), world_size=RANKS, rank=rank)
    try:
        torch.save(work(folder), folder / f"rank{rank}.pt")
    except BaseException:
        # a peer may fail of this one's absence: let the first cause be read
        print(f"rank {rank}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        raise
    dist.destroy_process_group()


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
    by_row = ["unstructured:row", "2:4", "4:8"]  # refuse to be global
    found = []
    for model in ("linear", "conv", "conv1d"):
        for pattern in ["unstructured", *by_row, *blocks, "neurons", "channels"]:
            found += [Case(model, pattern, a) for a in ("uniform", "global") if a == "uniform" or pattern not in by_row]
            if model == "linear":
                found.append(Case(model, pattern, criterion="random"))
                found.append(Case(model, pattern, "uniform" if pattern in by_row else "global", values="normal"))
    found += [Case("linear", pattern, values="double") for pattern in ("unstructured", *blocks)]
    found += [Case(model, "unstructured", a) for model in ("linear", "conv", "conv1d") for a in ("erk", "lamp")]
    found += [Case("linear", pattern, "erk") for pattern in ("unstructured:row", "block:4x4", "neurons")]
    for wrap in ("ddp", "hybrid", "partly", "by_columns"):
        for pattern, allocation in [
            ("unstructured", "lamp"),
            ("unstructured", "global"),
            ("2:4", "uniform"),
            ("block:4x4", "global"),
        ]:
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


# -- comparing and watching -------------------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    """Equal through and through: tensors bit for bit, everything else by ``==``."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any collective moved, and the largest that any operation made on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, result) if func.namespace in ("c10d", "_c10d_functional") else result)
        size = max([0, *(sharding.local(t).numel() for t in leaves if isinstance(t, Tensor))])
        if func.namespace in ("c10d", "_c10d_functional"):
            self.moved = max(self.moved, size)
        else:
            self.made = max(self.made, size)
        return result


# -- training: every rank sees the same batches, so that averaged gradients are exactly those of one process ---------------

STEPS, EPOCH = 30, 10
OVERRIDES = {"fc1": Override(pattern="2:4", sparsity=0.5)}
TARGETS = Targets(head=True)


class Net(LightningModule):
    """33 rows do not divide by 2, one row is fewer than 2, and Conv1D has its inputs first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.fc1, self.mid, self.out = nn.Linear(24, 33), Conv1D(17, 33), nn.Linear(17, 1)
        nn.init.normal_(self.mid.weight, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.mid(F.relu(self.fc1(x)))))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class ShardedNet(Net):
    """Layer by layer and then the rest, as one shards a large model."""

    def configure_model(self) -> None:
        if not isinstance(self.fc1.weight, DTensor):
            fully_shard(self.mid, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


def data() -> TensorDataset:
    x = torch.randn(8 * EPOCH, 24, generator=torch.Generator().manual_seed(4))
    return TensorDataset(x, (x[:, :5].prod(1, keepdim=True) + x[:, 5:6]).tanh())


@torch.no_grad()
def outcome(manager: MaskManager, model: nn.Module) -> dict[str, Any]:
    """What a run leaves on this rank: whole weights and masks, and the promises looked at without `verify`."""
    tensors = list(manager)
    revived = forgot = 0
    for tensor in tensors:
        parameter, dead = tensor.target.parameter, ~tensor.mask
        revived += int(torch.count_nonzero(sharding.local(parameter)[dead]))
        for optimizer, _ in manager.optimizers:
            for key in ("exp_avg", "exp_avg_sq"):
                forgot += int(torch.count_nonzero(sharding.local(optimizer.state[parameter][key])[dead]))
    return {
        "masks": {t.name: t.full_mask() for t in tensors},
        "weights": {t.name: sharding.full(t.target.parameter).clone() for t in tensors},
        "state": manager.state_dict(),
        "problems": manager.verify().problems,
        "optimizers": len(manager.optimizers),
        "revived": revived,
        "remembered": forgot,
    }


def loop(wrap: Wrap) -> dict[str, Any]:
    """Plain torch: two lines of sparsetrain around an ordinary loop."""
    model = wrap(Net())
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    manager = MaskManager(model, TARGETS, overrides=OVERRIDES).attach(optimizer)
    for step, batch in enumerate(list(DataLoader(data(), batch_size=8)) * (STEPS // EPOCH)):
        if step in (4, 12, 20):
            prune(manager, {4: 0.3, 12: 0.5, 20: 0.6}[step], allocation="global", step=step)
        optimizer.zero_grad()
        F.mse_loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return outcome(manager, model)


class Save(Callback):
    """Writes a checkpoint inside an epoch, and one right after a validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 15:
            trainer.save_checkpoint(self.folder / "inside.ckpt")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == EPOCH:
            trainer.save_checkpoint(self.folder / "validated.ckpt")


def fit(strategy: Strategy | None, folder: Path | None = None, resume: Path | None = None) -> dict[str, Any]:
    """Lightning, with a validation after every epoch; writes checkpoints to ``folder``, starts from ``resume``."""
    model = ShardedNet() if isinstance(strategy, ModelParallelStrategy) else Net()
    seed_everything(7, verbose=False)  # after the model: strategies over ranks set this seed again once it exists
    method = PruneFinetune(
        0.6, allocation="global", schedule=Rounds(3, start="4st", every="8st"), targets=TARGETS, overrides=OVERRIDES
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if strategy is None else RANKS,
        strategy=strategy or SingleDeviceStrategy("cpu"),
        callbacks=[method, *([Save(folder)] if folder else [])],
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loaders = DataLoader(data(), batch_size=8, shuffle=True), DataLoader(data(), batch_size=40)
    trainer.fit(model, *loaders, ckpt_path=resume)
    assert method.verification is not None
    return outcome(method.masks, model) | {"ok": method.verification.ok}


def fit_plainly(callback: Callback, max_steps: int, model: Net | None = None) -> Net:
    """Lightning's DDP, every rank on its own half of the data; the trained model, a new one by default."""
    torch.manual_seed(3)
    model = model or Net()
    seed_everything(7, verbose=False)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy=DDPStrategy(), callbacks=[callback], max_steps=max_steps, **silent
    )
    trainer.fit(model, DataLoader(data(), batch_size=4, shuffle=True), DataLoader(data(), batch_size=40))
    return model


def shrunk() -> dict[str, Any]:
    """Units taken out at the end by group lasso, and what it says to taking them out in between, and to a sharded model."""
    method = GroupLasso(0.5, span=("2st", "8st"), penalty=Penalty(every=1), compact="end")
    model = fit_plainly(method, max_steps=10)
    between = GroupLasso(0.5, span=("2st", "8st"), penalty=Penalty(every=1), compact="3st")
    sample = Groups(sample=torch.zeros(1, 24))
    sharded = GroupLasso(0.5, span=("2st", "8st"), penalty=Penalty(every=1), groups=sample)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy=ModelParallelStrategy(RANKS, 1), callbacks=[sharded], max_steps=10, **silent
    )
    return {
        "weights": model.state_dict(),
        "left": method.left(),
        "between": said(lambda: fit_plainly(between, max_steps=10)),
        "sharded": said(lambda: trainer.fit(ShardedNet(), DataLoader(data(), batch_size=8))),
    }


def noisy() -> dict[str, Any]:
    """Variational dropout: what is noise at the end, and what it says to a sharded model."""
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def method() -> VariationalDropout:
        only = Targets(include=("fc1",))
        return VariationalDropout(kl=5.0, warmup=("1st", "2st"), until="8st", noise=Noise(-5.0, 0.2), targets=only)

    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy=ModelParallelStrategy(RANKS, 1), callbacks=[method()], max_steps=10, **silent
    )
    dropout = method()
    gradients: list[Tensor] = []
    add = NoisyWeights.gradients

    def watched(self: NoisyWeights, owned: Any, strength: float, scale: float, share: Any) -> None:
        add(self, owned, strength, scale, lambda grad: gradients.append(grad.clone()) or share(grad))

    NoisyWeights.gradients = watched  # type: ignore[method-assign]
    try:
        model = fit_plainly(dropout, max_steps=10)
    finally:
        NoisyWeights.gradients = add  # type: ignore[method-assign]
    return {
        "weights": model.state_dict(),
        "masks": dropout.masks.masks,
        "own": gradients[0],
        "sharded": said(lambda: trainer.fit(ShardedNet(), DataLoader(data(), batch_size=8))),
    }


def said(function: Callable[[], Any]) -> str:
    """The error of a call, by its class and in its words."""
    try:
        function()
    except SparsetrainError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fit_ddp() -> dict[str, Any]:
    return fit(DDPStrategy())


def fit_fsdp(distributed: bool, folder: Path | None = None, resume: Path | None = None) -> dict[str, Any]:
    strategy = ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=distributed)
    return fit(strategy, folder, resume)
