"""Loaders deal every sample once, in an order of their own, and resume exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from sparsetrain.data import ResumableDataModule, ResumableLoader, TensorSet, identity
from sparsetrain.errors import DataError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning",  # Lightning itself uses what torch calls deprecated
    "ignore:.*does not have many workers",  # about the ordinary loader of the twin
    "ignore:The dirpath has changed",  # resumed runs keep their checkpoints apart
)
N = 23
SET = TensorSet(torch.randn(N, 4, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3, torch.arange(N))


def indices(loader: Any) -> list[list[int]]:
    return [batch[2].tolist() for batch in loader]


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("batch_size", "ranks"), [(5, 1), (5, 2), (11, 2), (1, 3), (23, 1), (4, 5), (100, 4), (1, 23)])
def test_ranks_share_every_sample_once_in_equally_many_batches(batch_size: int, ranks: int, shuffle: bool) -> None:
    dealt = [indices(ResumableLoader(SET, batch_size, shuffle, shard=(rank, ranks))) for rank in range(ranks)]
    assert sorted(i for batches in dealt for batch in batches for i in batch) == list(range(N))
    assert len({len(batches) for batches in dealt}) == 1
    sizes = [len(batch) for batches in dealt for batch in batches]
    assert min(sizes) >= 1
    assert max(sizes) <= batch_size + (ranks > 1)
    assert len(dealt[0]) == len(ResumableLoader(SET, batch_size, shard=(0, ranks)))


def test_two_ranks_see_step_for_step_what_one_process_sees() -> None:
    one = indices(ResumableLoader(SET, 6, shuffle=True, seed=1))
    first, second = (indices(ResumableLoader(SET, 3, shuffle=True, seed=1, shard=(rank, 2))) for rank in (0, 1))
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(batch) for batch in one]


def test_order_depends_on_seed_and_epoch_only() -> None:
    orders = {}
    for seed in range(3):
        loader = ResumableLoader(SET, 5, shuffle=True, seed=seed)
        for epoch in range(3):
            loader.set_epoch(epoch)
            torch.manual_seed(seed)  # must not matter, nor be moved
            before = torch.get_rng_state()
            orders[seed, epoch] = [*chain(*indices(loader))]
            assert torch.equal(torch.get_rng_state(), before)
            torch.manual_seed(99)
            assert [*chain(*indices(loader))] == orders[seed, epoch]
    assert len({tuple(order) for order in orders.values()}) == 9  # in particular (0, 1) is not (1, 0)


def test_unshuffled_and_drop_last() -> None:
    assert indices(ResumableLoader(SET, 10)) == [[*range(10)], [*range(10, 20)], [20, 21, 22]]
    assert indices(ResumableLoader(SET, 10, drop_last=True)) == [[*range(10)], [*range(10, 20)]]
    assert indices(ResumableLoader(SET, 10, drop_last=True, shard=(1, 2))) == [[*range(1, 20, 2)]]


def test_tensor_set_works_in_an_ordinary_dataloader() -> None:
    batches = list(DataLoader(SET, batch_size=10, sampler=[7, 3, 3, 22, 0], collate_fn=identity))
    assert torch.equal(batches[0][0], torch.stack([SET.tensors[0][i] for i in (7, 3, 3, 22, 0)]))
    assert torch.equal(SET[4][0], SET.tensors[0][4])


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"seed": -1}, {"shard": (0, 24)}, {"batch_size": 24, "drop_last": True}]
)
def test_impossible_loaders_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        ResumableLoader(SET, **options)


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 4}, {"shuffle": False}, {"shard": (0, 2)}])
def test_a_state_inside_an_epoch_of_other_batches_is_refused(change: dict[str, Any]) -> None:
    settings = {"batch_size": 5, "shuffle": True}
    loader = ResumableLoader(SET, **settings)
    for batch, _ in enumerate(loader, 1):
        other = ResumableLoader(SET, **{**settings, **change})
        if batch < len(loader):
            with pytest.raises(DataError, match="inside epoch 0"):
                other.load_state_dict(loader.state_dict())
    other.load_state_dict(loader.state_dict())  # at the end of the epoch nothing is left to differ
    with pytest.raises(DataError, match="not written by"):
        loader.load_state_dict({})


# ---------------------------------------------------------------- resume under Lightning


class Data(ResumableDataModule):
    def train_dataloader(self) -> Any:
        return self.loader(SET, 4, seed=3, train=True)

    def val_dataloader(self) -> Any:
        return self.loader(SET, 10)


class Bare(pl.LightningDataModule):
    """The same loaders, without the state in the data module."""

    def train_dataloader(self) -> Any:
        return ResumableLoader(SET, 4, shuffle=True, seed=3)

    def val_dataloader(self) -> Any:
        return ResumableLoader(SET, 10)


class Forgetful(Bare):
    """Shuffled and seeded, but not stateful."""

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(3)
        return DataLoader(SET, batch_size=4, shuffle=True, generator=generator, collate_fn=identity)


class Tiny(pl.LightningModule):
    def __init__(self, schedule: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3)
        self.schedule = schedule
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch[2].tolist())
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if not self.schedule:
            return optimizer
        steps = self.trainer.estimated_stepping_batches  # builds the loaders before the state is read
        scheduler = LambdaLR(optimizer, lambda step: 1 - step / steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(data: pl.LightningDataModule, folder: Path, resume: Path | None = None, **options: Any) -> Tiny:
    module = Tiny(schedule=options.pop("schedule", False))
    save = options.pop("save", {"every_n_train_steps": 1})
    settings: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "num_sanity_val_steps": 0,
    } | options
    trainer = pl.Trainer(
        callbacks=[ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **save)],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    return module


def differing(data: type[pl.LightningDataModule], folder: Path, **options: Any) -> tuple[int, int]:
    """Return (checkpoints whose resumed run differs from the uninterrupted one, checkpoints)."""
    whole = fit(data(), folder / "whole", **options)
    checkpoints = sorted((folder / "whole").glob("*.ckpt"))
    wrong = 0
    for path in checkpoints:
        resumed = fit(data(), folder / path.stem, path, **options)
        same_batches = whole.seen[len(whole.seen) - len(resumed.seen) :] == resumed.seen
        same_weights = torch.equal(whole.layer.weight, resumed.layer.weight)
        wrong += not (same_batches and same_weights)
    return wrong, len(checkpoints)


INSIDE_AN_EPOCH_AND_AFTER = {"every_n_epochs": 1, "save_on_train_epoch_end": False}


@pytest.mark.parametrize(
    ("options", "checkpoints"),
    [
        ({}, 18),
        ({"val_check_interval": 0.5}, 18),
        ({"val_check_interval": 0.5, "save": INSIDE_AN_EPOCH_AND_AFTER}, 6),
        ({"save": {"every_n_epochs": 1, "save_on_train_epoch_end": True}}, 3),
        ({"accumulate_grad_batches": 2}, 9),
        ({"schedule": True}, 18),
        ({"limit_train_batches": 4}, 12),
        ({"max_epochs": -1, "max_steps": 16}, 16),
    ],
    ids=["steps", "half-epochs", "validation", "epochs", "accumulate", "schedule", "limit", "max-steps"],
)
def test_resume_from_every_checkpoint_is_exact(options: dict[str, Any], checkpoints: int, tmp_path: Path) -> None:
    assert differing(Data, tmp_path, **options) == (0, checkpoints)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_twin_a_loader_without_state_does_not_resume(tmp_path: Path) -> None:
    wrong, checkpoints = differing(Forgetful, tmp_path)
    assert checkpoints == 18
    assert wrong >= 15


def test_twin_a_schedule_makes_lightning_forget_a_bare_loaders_state(tmp_path: Path) -> None:
    assert differing(Bare, tmp_path / "plain")[0] == 0
    assert differing(Bare, tmp_path / "schedule", schedule=True)[0] == 15


def test_testing_a_checkpoint_does_not_move_a_later_fit(tmp_path: Path) -> None:
    fit(Data(), tmp_path / "a", max_epochs=1)
    data = Data()
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    state = torch.load(tmp_path / "a" / "epoch=0-step=2.ckpt", weights_only=True)["Data"]
    assert state["train"]["batch"] == 2
    data.load_state_dict(state)
    assert fit(data, tmp_path / "b", max_epochs=1).seen == fit(Data(), tmp_path / "c", max_epochs=1).seen


def test_overfit_batches_sees_the_same_batches_every_epoch(tmp_path: Path) -> None:
    seen = fit(Data(), tmp_path, overfit_batches=2).seen
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3


RANKS = """
import json, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import test_data
from test_data import *
folder = Path({folder!r})
class Tiny(Tiny):
    def on_train_end(self):
        out = {{"seen": self.seen, "weight": self.layer.weight.tolist()}}
        (folder / f"{{name}}-{{self.trainer.global_rank}}.json").write_text(json.dumps(out))
test_data.Tiny = Tiny
for name, checkpoint in (("whole", None), ("resumed", folder / "whole" / "epoch=1-step=5.ckpt")):
    fit(Data(), folder / name, checkpoint, devices=2, strategy="ddp_fork")
"""


def test_two_processes_share_the_batches_and_resume_in_mid_epoch(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(here=str(Path(__file__).parent), folder=str(tmp_path)))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"whole-{rank}.json").read_text()) for rank in (0, 1)]
    together = [sorted(a + b) for a, b in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)]
    loader, alone = ResumableLoader(SET, 8, shuffle=True, seed=3), []
    for epoch in range(3):
        loader.set_epoch(epoch)
        alone += [sorted(batch) for batch in indices(loader)]
    assert together == alone
    for rank in (0, 1):
        resumed = json.loads((tmp_path / f"resumed-{rank}.json").read_text())
        assert resumed["weight"] == ranks[0]["weight"]
        assert resumed["seen"] == ranks[rank]["seen"][5:]
