"""Promise 4, the hard way: a training process is killed twenty times, and the twenty-first ends where an untouched one does."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from sparsetrain.callbacks import PruneFinetune
from sparsetrain.schedules import Rounds

from .promises import same_bits, zeros_of
from .toys import loaders, task, trainer

KILLS = 20
STEPS = 64  # 4 epochs of 32 batches, two of them a step


class Report(Callback):
    """Replace the one checkpoint after every step, and tell the parent of every batch."""

    def __init__(self, checkpoint: Path, pipe: Connection) -> None:
        self.checkpoint, self.pipe, self.saved = checkpoint, pipe, 0

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        self.saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.pipe.send(trainer.global_step)
        if trainer.global_step > self.saved:
            unfinished = self.checkpoint.with_suffix(".part")
            trainer.save_checkpoint(unfinished)
            os.replace(unfinished, self.checkpoint)
            self.saved = trainer.global_step


def script(folder: Path, pipe: Connection) -> None:
    """What a user's training script does: build, resume if there is something to resume from, fit, save."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    checkpoint = folder / "last.ckpt"
    prune = PruneFinetune(0.9, schedule=Rounds(rounds=4, start="5st", every="11st"))
    run = trainer(prune, Report(checkpoint, pipe), max_epochs=4, accumulate_grad_batches=2, val_check_interval=0.5)
    module = task(dropout=0.3, scheduler=True)
    resume = str(checkpoint) if checkpoint.exists() else None
    run.fit(module, *loaders(batches=32), ckpt_path=resume, weights_only=True)
    state = {**module.state_dict(), **{f"mask.{n}": m.view(torch.uint8) for n, m in prune.masks.masks.items()}}
    torch.save(state, folder / "final.pt")


def one_life(context: Any, folder: Path, batches: int | None, delay: float) -> bool:
    """Run the script; kill it some moments after so many batches. True if it was killed."""
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=script, args=(folder, there), daemon=True)
    child.start()
    there.close()
    try:
        seen = 0
        while batches is None or seen < batches:
            assert here.poll(60), "the training process hangs"
            here.recv()
            seen += 1
        time.sleep(delay)
        child.kill()
    except EOFError:  # it ended by itself
        pass
    child.join(60)
    here.close()
    return bool(child.exitcode)


def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    # The server imports torch and Lightning once; every life is a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "sparsetrain.callbacks", "pytest"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert not one_life(context, whole, None, 0.0)
    chance = random.Random(20)
    for _ in range(KILLS):
        assert one_life(context, killed, chance.randint(1, 7), chance.uniform(0.0, 0.02))
    assert not (killed / "final.pt").exists()
    step = torch.load(killed / "last.ckpt", weights_only=True)["global_step"]
    assert KILLS // 2 < step < STEPS
    assert not one_life(context, killed, None, 0.0)
    final = torch.load(killed / "final.pt", weights_only=True)
    same_bits(torch.load(whole / "final.pt", weights_only=True), final)
    assert zeros_of([final["net.fc1.weight"], final["net.fc2.weight"]]) == [115, 230]
