"""Small models and data for the contracts: quick, and with everything that makes resuming hard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

#: What the targets of `Net` are called; ``head`` is left dense by default.
TARGETS = ("fc1.weight", "fc2.weight")


class Net(nn.Module):
    """8 -> 16 -> 16 -> 3 with dropout; fc1 (128 weights) and fc2 (256) are targets."""

    def __init__(self, dropout: float = 0.0, hidden: int = 16, norm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.relu(self.fc1(x)))
        logits: Tensor = self.head(self.dropout(torch.tanh(self.norm(self.fc2(hidden)))))
        return logits


class Int8Linear(nn.Linear):
    """A stand-in for a quantized layer: the weight is an int8 buffer, dequantized in the forward pass."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features)
        scale = source.weight.detach().abs().max() / 127
        del self.weight
        self.register_buffer("weight", (source.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


class Task(LightningModule):
    """Classification with `Net`, any optimizer, an optional learning-rate schedule by step."""

    def __init__(self, optimizer: Callable[[Any], Optimizer] = adamw, scheduler: bool = False, **network: Any) -> None:
        super().__init__()
        self.net = Net(**network)
        self.make_optimizer = optimizer
        self.scheduler = scheduler

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if not self.scheduler:
            return optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def task(seed: int = 0, **settings: Any) -> Task:
    """A task whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return Task(**settings)


def loaders(batches: int = 8, size: int = 4) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """An ordinary shuffling training loader and a validation loader, over learnable data."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(batches * size, 8, generator=generator)
    y = x[:, :3].argmax(1)
    train = TensorDataset(x, y)
    return DataLoader(train, batch_size=size, shuffle=True), DataLoader(train, batch_size=2 * size)


def trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    """A quiet trainer on the CPU. It also seeds, as a script would on its first line."""
    seed_everything(7, verbose=False)
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 3,
    }
    return Trainer(callbacks=list(callbacks), **(quiet | settings))


def weights(module: Task) -> dict[str, Tensor]:
    return {name: module.net.get_parameter(name).detach() for name in TARGETS}


class Reader(Callback):
    """Counts the exact zeros wherever somebody else may look; a training run that prunes at once shows them always."""

    def __init__(self) -> None:
        self.seen: dict[str, set[tuple[int, ...]]] = {}

    def _read(self, where: str, module: LightningModule) -> None:
        assert isinstance(module, Task)
        zeros = tuple(int((w == 0).sum()) for w in weights(module).values())
        self.seen.setdefault(where, set()).add(zeros)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._read("batch start", pl_module)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._read("before zero_grad", pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._read("batch end", pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._read("validation", pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read("epoch end", pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read("train end", pl_module)
