"""Resume equals uninterrupted: random streams and the position in the training data.

Lightning restores weights, optimizers, schedulers and counters, but no random state, and it starts an ordinary DataLoader
anew when a checkpoint was written inside an epoch. So the state saved here is: every random stream now, the streams as they
were when this epoch's iterator was made, how many batches of it are done, and the seed of the run. On resume the iterator is
made again from the same streams and the done batches are skipped; a loader that restores its own position (``state_dict``) is
left to itself.

Validation is kept from moving the streams of training: how often one validates changes nothing, and a checkpoint written
before a validation resumes like one written after it.

What cannot be repeated: random augmentation in the main process (``num_workers=0``) of an ordinary DataLoader resumed inside an
epoch; a checkpoint written between two batches of one accumulated step (Lightning saves no gradients); Lightning's own
``StochasticWeightAveraging`` resumed inside an epoch.
"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import distributed as dist
from torch.utils.data import DataLoader


def capture() -> dict[str, Any]:
    """The state of every random stream, as plain tensors and numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, torch.tensor(numbers, dtype=torch.int64), next_gauss],
    }


def restore(state: dict[str, Any]) -> None:
    """Set every random stream to a captured state."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, numbers, next_gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), next_gauss))


def watch(fetcher: Any, resume: ExactResume) -> None:
    """Let a fetcher tell when Lightning makes the epoch's iterator and takes a batch: no hook does, and it is at odd times."""

    def make_iterator(self: Any) -> Any:
        resume.before_iterator()
        plain.__iter__(self)
        resume.after_iterator(self)
        return self

    def take(self: Any) -> Any:
        resume.before_batch()
        return plain.__next__(self)

    plain = getattr(type(fetcher), "plain", type(fetcher))
    members = {"__iter__": make_iterator, "__next__": take, "plain": plain}
    fetcher.__class__ = type("WatchedFetcher", (plain,), members)


def finish_epoch(trainer: Trainer) -> None:
    """Let the counters agree that an epoch is over, if the checkpoint was written right at its end.

    Lightning 2.6 leaves its restart flags set then: with ``max_steps`` it counts one epoch too many, and checkpoints of the
    resumed run are taken for finished epochs when they are resumed in turn.
    """
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress
    if not (epochs.current.ready and epochs.current.ready == epochs.current.processed and loop.epoch_loop.restarting):
        return
    loop.reset_restart_stage()
    epochs.current.completed, epochs.total.completed = epochs.current.processed, epochs.total.processed
    batches = loop.epoch_loop.batch_progress.current
    if batches.ready == batches.completed:
        loop.epoch_loop.restarting = False
        loop._restarting = False


class ExactResume:
    """Owned by a sparsity callback, which calls these hooks; see the module's text."""

    def __init__(self) -> None:
        self.seed = 0
        self.batches = 0
        self._skip = 0
        self._epoch_streams: dict[str, Any] | None = None
        self._pending: dict[str, Any] | None = None
        self._iterator_streams: dict[str, Any] | None = None
        self._fetch_streams: dict[str, Any] | None = None
        self._batch_streams: dict[str, Any] | None = None
        self._torch_stream: torch.Tensor | None = None
        self._other_streams: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Streams of every rank, and the position. Every rank must call it."""
        mine = {"now": capture(), "epoch": self._epoch_streams}
        everyone: list[Any] = [mine]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        return {"seed": self.seed, "batches": self.batches, "streams": everyone}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Kept until training starts: Lightning still builds loaders and moves streams in between."""
        self._pending = state

    def on_train_start(self, trainer: Trainer) -> None:
        """Make the epoch's iterator anew from known streams, and skip what was done."""
        fetcher, loaders = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
        ordinary = loaders is not None and all(
            isinstance(loader, DataLoader) and not hasattr(loader, "load_state_dict") for loader in loaders.flattened
        )
        pending, self._pending = self._pending, None
        # Lightning's seed_everything leaves it there, for all ranks; a recipe's seed.
        self.seed = int(os.environ.get("PL_GLOBAL_SEED") or 0) if pending is None else int(pending["seed"])
        if pending is not None:
            finish_epoch(trainer)
        self.batches, self._skip = 0, 0
        self._iterator_streams, self._batch_streams = capture(), None
        if pending is not None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            streams = pending["streams"][rank] if rank < len(pending["streams"]) else pending["streams"][0]
            inside = 0 < pending["batches"] < trainer.num_training_batches
            self.batches = int(pending["batches"]) if inside else 0
            self._skip = self.batches
            self._iterator_streams = streams["epoch"] if inside and streams["epoch"] else streams["now"]
            self._batch_streams = streams["now"] if inside or not ordinary else None
        if ordinary and fetcher is not None:
            watch(fetcher, self)
            iter(fetcher)

    def seed_at(self, step: int) -> int:
        """A seed for what is drawn apart from training at a step, such as calibration batches; the same in a resumed run."""
        # Not the sum: seed 0 at step 1 would then be seed 1 at step 0.
        return int(np.random.SeedSequence([self.seed, step]).generate_state(1, np.uint64)[0])

    def validate(self, trainer: Trainer) -> None:
        """Run the validation that was due when the checkpoint was written."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True

    def before_iterator(self) -> None:
        """Before the first batch every iterator is made from the same streams, however often Lightning makes it."""
        if self._iterator_streams is not None:
            restore(self._iterator_streams)
        self._epoch_streams = capture()

    def after_iterator(self, fetcher: Any) -> None:
        """Skip the batches that are done; note the streams the next batch is taken from."""
        skip, self._skip = self._skip, 0
        for _ in range(skip):
            next(fetcher)
        self._skip = skip
        # The loop adds the batches that are done itself.
        fetcher.fetched -= skip
        self._fetch_streams = capture() if self._iterator_streams is not None else None

    def before_batch(self) -> None:
        """Whatever was drawn since the iterator was made (a validation that is repeated or skipped) is undone."""
        if self._fetch_streams is not None:
            restore(self._fetch_streams)

    def on_train_batch_start(self) -> None:
        """The first batch of a run resumed inside an epoch starts from the streams saved."""
        if self._batch_streams is not None:
            restore(self._batch_streams)
        self._iterator_streams = self._fetch_streams = self._batch_streams = None
        self._skip = 0

    def on_train_batch_end(self, batch_idx: int) -> None:
        """Count, and note the stream a validation loader would draw its seed from."""
        self.batches = batch_idx + 1
        self._torch_stream = torch.get_rng_state()

    def on_validation_start(self) -> None:
        """Note the streams validation will move."""
        self._other_streams = capture()

    def on_validation_end(self) -> None:
        """Put the streams back to where training left them."""
        if self._other_streams is None:
            return
        if self._torch_stream is not None:
            self._other_streams["torch"] = self._torch_stream
        restore(self._other_streams)
        self._other_streams = None
