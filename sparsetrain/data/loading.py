"""Fast, seeded, exactly resumable batches.

``ResumableLoader`` is not a ``torch.utils.data.DataLoader``. For data in memory a batch is one ``index_select``, so workers
buy nothing, and Lightning leaves a loader that it does not know as it is: it injects no sampler, and its
``state_dict``/``load_state_dict`` travel in the checkpoint. Three facts about Lightning 2.6 shape the class:

- Lightning builds the iterator *before* it announces the epoch (``set_epoch``) and, under some strategies, before
  it restores the state. Hence the order of an epoch is worked out when its first batch is asked for, not earlier.
- A loader with a length is never prefetched, so the batches handed out are the batches trained on, whether the checkpoint
  is written after a batch, after a validation inside the epoch, or at the end of the epoch.
- ``trainer.estimated_stepping_batches``, which schedules ask for, builds the train loader before the loop's state is read,
  and Lightning then forgets to hand the loader its state. ``ResumableDataModule`` therefore also carries it in the data
  module's own state. A bare loader given to ``fit`` resumes exactly only without such a schedule.

Two limits are Lightning's own, in its loops and out of a loader's reach. With ``max_steps``, a checkpoint written at the end
of a training epoch resumes with one epoch too many counted. After resuming from the last batch of an epoch, checkpoints
of the *resumed* run are taken for finished epochs; with ``accumulate_grad_batches`` or ``limit_train_batches`` a second
resume then differs.

Ranks: the loader deals batches itself. All ranks draw the same permutation and split each *global* batch (``batch_size``
on every rank), so two ranks with batches of 50 see the samples of one process with batches of 100, step for step, the
seed is the data's own, and no sample is repeated to fill a batch: a metric over a validation set counts each sample once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import TensorDataset

from sparsetrain.errors import DataError

_Batch = TypeVar("_Batch")


class BatchDataset(Protocol):
    """A map-style dataset that gathers a whole batch at once."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitems__(self, indices: Any) -> Any:
        """Return the batch of these samples; ``indices`` is an int64 tensor (or a sequence of ints)."""


class TensorSet(TensorDataset):
    """Tensors with a common first dimension; a batch is one ``index_select`` per tensor.

    Works in an ordinary ``DataLoader`` too, with ``collate_fn=identity`` since batches come collated.

    Example: ``images, labels = TensorSet(x, y).__getitems__([0, 2])``.
    """

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, ...]:
        """Return the samples of ``indices`` (B,), each tensor of shape (B, ...)."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return tuple(tensor.index_select(0, index) for tensor in self.tensors)


def identity(batch: _Batch) -> _Batch:
    """Return the batch as it is: the ``collate_fn`` for datasets with ``__getitems__``.

    Example: ``DataLoader(TensorSet(x, y), batch_size=100, shuffle=True, collate_fn=identity)``.
    """
    return batch


class ResumableLoader:
    """Batches of a dataset in memory, whose order depends on ``(seed, epoch)`` alone.

    The global random state is neither read nor moved. As with ``DistributedSampler``, tell the epoch with ``set_epoch``
    (Lightning does it); the same epoch always has the same order.

    Args:
        dataset: has ``__len__`` and ``__getitems__``, e.g. ``TensorSet``; with ``at_epoch(epoch)`` what that returns is read.
        batch_size: samples in a batch, per rank, at least 1. A remainder of fewer samples than ranks joins the batch before.
        shuffle: a new permutation every epoch. ``Trainer(overfit_batches=...)`` cannot turn it off, ``False`` does.
        seed: of the permutations, at least 0.
        drop_last: leave out the last batch when it is not full.
        shard: ``(rank, ranks)`` of this process; by default asked of ``torch.distributed`` when iterating.

    Raises:
        DataError: ``batch_size`` < 1, ``seed`` < 0, or fewer samples than one batch needs.

    Example: ``loader = ResumableLoader(TensorSet(x, y), batch_size=100, shuffle=True, seed=0)``.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        batch_size: int = 100,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        shard: tuple[int, int] | None = None,
    ) -> None:
        if batch_size < 1 or seed < 0:
            raise DataError(f"batch_size={batch_size}, seed={seed}: batch_size must be at least 1 and seed at least 0")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self._shard = shard
        self._start = 0  # where the next iteration begins; not 0 only after load_state_dict
        self._position = 0  # batches handed out in this epoch
        len(self)  # too few samples shows now

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning announces the epoch: ``loader.batch_sampler.sampler.set_epoch`` is the loader's own."""
        # A plain `sampler` would be announced to as well, but is also taken for the mark of a DataLoader.
        return SimpleNamespace(sampler=self)

    @property
    def shard(self) -> tuple[int, int]:
        """``(rank, ranks)`` of this process."""
        if self._shard is not None:
            return self._shard
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch, the same on all ranks."""
        ranks = self.shard[1]
        count, rest = divmod(len(self.dataset), self.batch_size * ranks)
        if rest >= ranks and not self.drop_last:
            count += 1
        if count == 0:
            way_out = "lower batch_size or set drop_last=False" if self.drop_last else "use fewer ranks or more data"
            raise DataError(
                f"{len(self.dataset)} samples do not fill one batch (batch_size={self.batch_size}, ranks={ranks}, "
                f"drop_last={self.drop_last}); {way_out}"
            )
        return count

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; a new epoch starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._start, self._position = epoch, 0, 0

    def order(self) -> Tensor:
        """Return this epoch's order of all samples over all ranks, an int64 tensor (N,)."""
        if not self.shuffle:
            return torch.arange(len(self.dataset))
        # Not seed + epoch: seed 0 in epoch 1 would then repeat seed 1 in epoch 0.
        mixed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0])
        return torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(mixed))

    def __iter__(self) -> Iterator[Any]:
        """Start the epoch, or go on from the loaded state; nothing is drawn before the first batch is asked for."""
        self._position = self._start
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        rank, ranks = self.shard
        count, stride = len(self), self.batch_size * ranks
        order = self.order()
        # A set that is another one every epoch (augmentation) says so.
        look = getattr(self.dataset, "at_epoch", None)
        dataset = self.dataset if look is None else look(self.epoch)
        for batch in range(start, count):
            stop = len(order) if batch == count - 1 and not self.drop_last else (batch + 1) * stride
            self._position = batch + 1
            yield dataset.__getitems__(order[batch * stride + rank : stop : ranks])

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the batches handed out in it, and what these counts rest on."""
        return {"epoch": self.epoch, "batch": self._position, "batches": len(self)} | self._basis()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batch where ``state`` was taken.

        Raises:
            DataError: the state lies inside an epoch of other batches: another seed, dataset size, or global batch size.
        """
        if missing := {"epoch", "batch", "batches"} - state.keys():
            raise DataError(f"the saved state of the data has no {sorted(missing)}; it was not written by ResumableLoader")
        start = state["batch"]
        if start >= state["batches"]:
            start = len(self)  # a finished epoch stays finished, however it was cut into batches
        elif start > 0:
            for name, here in self._basis().items():
                if state.get(name) != here:
                    raise DataError(
                        f"the checkpoint lies inside epoch {state['epoch']} of data with {name}={state.get(name)}, here it "
                        f"is {here}; resume with the same data settings, or from a checkpoint at the end of an epoch"
                    )
        self.epoch = state["epoch"]
        self._start = self._position = start

    def _basis(self) -> dict[str, int]:
        return {
            "samples": len(self.dataset),
            "global_batch_size": self.batch_size * self.shard[1],
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "drop_last": int(self.drop_last),
        }


class ResumableDataModule(pl.LightningDataModule):
    """Base of data modules whose train loader resumes exactly under every schedule and strategy.

    Subclasses build their loaders with ``loader``.

    Example: ``def train_dataloader(self): return self.loader(self.train_set, batch_size=100, seed=0, train=True)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._train_loader: ResumableLoader | None = None
        self._loaded: dict[str, int] | None = None

    def loader(self, dataset: BatchDataset, batch_size: int, seed: int = 0, train: bool = False) -> ResumableLoader:
        """Return a loader for this process' share; the train loader is shuffled and saved with the checkpoint.

        The share is the strategy's data-parallel one, which differs from the rank under tensor parallelism.
        """
        trainer = self.trainer
        replicas = trainer.distributed_sampler_kwargs if trainer is not None else None
        shard = (replicas["rank"], replicas["num_replicas"]) if replicas else None
        overfit = trainer is not None and trainer.overfit_batches > 0  # type: ignore[attr-defined]
        loader = ResumableLoader(dataset, batch_size, shuffle=train and not overfit, seed=seed, shard=shard)
        if train:
            if self._loaded is not None:
                loader.load_state_dict(self._loaded)
            self._train_loader, self._loaded = loader, None
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the train loader, empty before there is one."""
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the train loader, or keep its state until it is built.

        Lightning also calls this when a checkpoint is only tested; a later ``fit`` must not start in the middle then.
        """
        if "train" not in state_dict or (self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING):
            return
        self._loaded = state_dict["train"]
        # Strategies that restore late (ModelParallelStrategy) may have built this run's loader already.
        if self.trainer is not None and self._train_loader is not None and self._is_live():
            self._train_loader.load_state_dict(state_dict["train"])
            self._loaded = None

    def _is_live(self) -> bool:
        return self.trainer is not None and self.trainer.train_dataloader is self._train_loader
