"""Promise 4: resume equals uninterrupted, bit for bit, from every checkpoint there is; and what cannot be resumed says so."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from sparsetrain.callbacks import PruneFinetune, Recovery
from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.errors import MaskStateError
from sparsetrain.masks import MaskManager
from sparsetrain.pruning import prune
from sparsetrain.schedules import Cubic, OneShot, Rounds

from .promises import same_bits, zeros_of
from .toys import TARGETS, Net, loaders, task, trainer

STEPS = 12  # 3 epochs of 8 batches, two of them a step


class SaveAlways(Callback):
    """A checkpoint after every optimizer step, every validation and every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, trainer: Trainer, when: str) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:02d}-{when}.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        # Not between two batches of one step: Lightning saves no gradients, whoever resumes there has lost some.
        if trainer.global_step and not (self.folder / f"{trainer.global_step:02d}-step.ckpt").exists():
            self._save(trainer, "step")

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self._save(trainer, f"validation{trainer.fit_loop.epoch_loop.batch_idx}")

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self._save(trainer, "epoch")


class Trace(Callback):
    """The loss of every batch: two runs that drew another sample or another dropout mask show it here."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def recovering() -> PruneFinetune:
    schedule = Rounds(rounds=3, start="2st", every="4st")
    return PruneFinetune(0.8, schedule=schedule, recovery=Recovery(tolerance=0.1, patience=1))


METHODS: dict[str, Callable[[], list[Callback]]] = {
    "rounds": lambda: [PruneFinetune(0.8, schedule=Rounds(rounds=3, start="2st", every="3st"))],
    "cubic": lambda: [PruneFinetune(0.8, allocation="global", schedule=Cubic("1st", "9st", "2st"))],
    "recovery": lambda: [recovering()],
    "average": lambda: [
        PruneFinetune(0.8, schedule=Rounds(rounds=3, start="2st", every="3st")),
        EMAWeightAveraging(decay=0.8),
    ],
}


def fit(callbacks: list[Callback], checkpoint: Path | None = None, seed: int = 7, **settings: Any) -> dict[str, Any]:
    """One run; everything that must be equal afterwards."""
    trace = Trace()
    own = {"accumulate_grad_batches": 2, "val_check_interval": 0.5} | settings
    run = trainer(*callbacks, trace, **own)
    seed_everything(seed, verbose=False)
    module = task(seed=0 if checkpoint is None else 99, dropout=0.3, scheduler=True)
    run.fit(module, *loaders(), ckpt_path=checkpoint, weights_only=True)
    method = next(c for c in callbacks if isinstance(c, PruneFinetune))
    optimizer = [{k: v for k, v in state.items() if isinstance(v, Tensor)} for state in run.optimizers[0].state.values()]
    return {
        "weights": module.state_dict(),
        "optimizer": {f"{i}.{k}": v for i, state in enumerate(optimizer) for k, v in state.items()},
        "masks": {n: m.view(torch.uint8) for n, m in method.masks.masks.items()},
        "changes": method.masks.changes,
        "losses": trace.losses,
        "method": method.method_state(),
        "random": torch.get_rng_state(),
    }


def assert_same_run(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    for part in ("weights", "optimizer", "masks"):
        same_bits(whole[part], resumed[part])
    assert resumed["changes"] == whole["changes"]
    assert resumed["method"] == whole["method"]
    missed = len(whole["losses"]) - len(resumed["losses"])
    assert resumed["losses"] == whole["losses"][missed:]
    assert torch.equal(resumed["random"], whole["random"])


@pytest.mark.parametrize("name", METHODS)
def test_resume_equals_uninterrupted_from_every_checkpoint(name: str, tmp_path: Path) -> None:
    whole = fit([*METHODS[name](), SaveAlways(tmp_path)])
    bare = fit(METHODS[name]())
    assert_same_run(bare, whole)  # saving changes nothing
    assert len({change.step for change in whole["changes"]}) >= 3
    assert zeros_of([whole["weights"][f"net.{n}"] for n in TARGETS]) != [0, 0]
    checkpoints = sorted(tmp_path.iterdir())
    assert {f"{step:02d}-step.ckpt" for step in range(1, STEPS + 1)} <= {c.name for c in checkpoints}
    assert sum("validation" in c.name for c in checkpoints) == 6
    broken = {}
    for checkpoint in checkpoints:
        if not checkpoint.name.startswith(f"{STEPS}-"):  # there the run is over
            try:
                assert_same_run(fit(METHODS[name](), checkpoint, seed=1234), whole)
            except AssertionError as error:
                broken[checkpoint.name] = str(error).splitlines()[0]
    assert not broken, "\n".join(f"{n}: {why}" for n, why in broken.items())


@pytest.mark.filterwarnings("ignore:.*zero already")
@pytest.mark.parametrize("off", [MaskManager, SparsityCallback])
def test_without_the_masks_resume_is_another_run(off: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit([*METHODS["rounds"](), SaveAlways(tmp_path)])
    monkeypatch.setattr(off, "load_state_dict", lambda self, state, *args: None)
    with pytest.raises(AssertionError):
        assert_same_run(fit(METHODS["rounds"](), tmp_path / "06-step.ckpt", seed=1234), whole)


def test_lightnings_own_checkpoints_resume(tmp_path: Path) -> None:
    def keep() -> list[Callback]:
        own: dict[str, Any] = {"dirpath": tmp_path, "save_top_k": -1, "filename": "{step}"}
        return [*METHODS["rounds"](), ModelCheckpoint(every_n_train_steps=1, **own)]

    settings: dict[str, Any] = {"enable_checkpointing": True}
    whole = fit(keep(), **settings)
    for step in (1, 5, 7, 11):
        assert_same_run(fit(keep(), tmp_path / f"step={step}.ckpt", seed=1234, **settings), whole)


def test_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    run = trainer(Trace(), max_epochs=1)
    run.fit(task(dropout=0.3, scheduler=True), *loaders())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(MaskStateError, match=r"no masks of PruneFinetune.*init_from"):
        fit(METHODS["rounds"](), tmp_path / "dense.ckpt")
    with pytest.raises(KeyError, match="contains only the model"):  # Lightning itself refuses these
        fit(METHODS["rounds"](), tmp_path / "weights.ckpt")


# -- states that are not what they should be --------------------------------------------------------------------------


def pruned(sparsity: float = 0.5, **settings: Any) -> MaskManager:
    torch.manual_seed(3)
    manager = MaskManager(Net(**settings))
    prune(manager, sparsity)
    return manager


def flip_bit(state: Any) -> None:
    state["tensors"]["fc2.weight"]["bits"][3] ^= 16


def flip_two(state: Any) -> None:
    """One weight dies and another one lives: the count stays what it was."""
    bits = state["tensors"]["fc2.weight"]["bits"]
    on, off = (next(i for i in range(256) if bool(bits[i // 8] >> (i % 8) & 1) == alive) for alive in (True, False))
    for i in (on, off):
        bits[i // 8] ^= 1 << (i % 8)


def cut(state: Any) -> None:
    state["tensors"]["fc2.weight"]["bits"] = state["tensors"]["fc2.weight"]["bits"][:-1].clone()


def lose(key: str) -> Callable[[Any], None]:
    return lambda state: state["tensors"]["fc2.weight"].pop(key)


def put(key: str, value: Any) -> Callable[[Any], None]:
    return lambda state: state["tensors"]["fc2.weight"].update({key: value})


DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "flipped bit": (flip_bit, "fc2.weight.*damaged"),
    "two flipped bits": (flip_two, "fc2.weight.*damaged"),
    "truncated": (cut, "fc2.weight.*truncated"),
    "newer version": (lambda s: s.update(version=99), "version 99"),
    "foreign": (lambda s: s.update(kind="other"), "no sparsetrain masks"),
    "no bits": (lose("bits"), "fc2.weight.*incomplete"),
    "no shape": (lose("shape"), "fc2.weight.*incomplete"),
    "bits are text": (put("bits", "1010"), "fc2.weight"),
    "sparsity of nothing": (put("sparsity", [1, 0]), "fc2.weight"),
    "another sparsity": (put("sparsity", [1, 4]), "fc2.weight"),
    "tensor missing": (lambda s: s["tensors"].pop("fc2.weight"), "no mask of 'fc2.weight'"),
    "tensor too many": (lambda s: s["tensors"].update({"fc3.weight": s["tensors"]["fc2.weight"]}), "fc3.weight"),
    "changes malformed": (lambda s: s.update(changes=[[1, "fc1.weight"]]), "changes"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_state_is_refused_and_changes_nothing(name: str) -> None:
    damage, message = DAMAGE[name]
    state = copy.deepcopy(pruned(0.5).state_dict())
    damage(state)
    manager = pruned(0.25)
    before = {
        n: (t.mask.clone(), t.target.parameter.detach().clone()) for n, t in manager.tensors.items() if t.mask is not None
    }
    changes = list(manager.changes)
    with pytest.raises(MaskStateError, match=message):
        manager.load_state_dict(state)
    assert manager.changes == changes
    for tensor in manager:
        assert torch.equal(before[tensor.name][0], manager.masks[tensor.name])
        assert torch.equal(before[tensor.name][1], tensor.target.parameter)


def test_the_undamaged_state_is_taken() -> None:
    manager, source = pruned(0.25), pruned(0.5)
    manager.load_state_dict(copy.deepcopy(source.state_dict()))
    assert all(torch.equal(mask, source.masks[name]) for name, mask in manager.masks.items())
    assert manager.changes == source.changes


@pytest.mark.parametrize(
    "other", [Net(hidden=32), torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))], ids=["shape", "names"]
)
def test_state_of_another_model_is_refused(other: torch.nn.Module) -> None:
    manager = MaskManager(other)
    with pytest.raises(MaskStateError, match=r"fc1\.weight"):
        manager.load_state_dict(pruned().state_dict())
    assert not manager.masks


def test_a_mask_takes_one_bit_a_weight() -> None:
    state = pruned().state_dict()
    for name, weights in (("fc1.weight", 128), ("fc2.weight", 256)):
        bits = state["tensors"][name]["bits"]
        assert bits.dtype == torch.uint8
        assert bits.numel() == bits.untyped_storage().nbytes() == math.ceil(weights / 8)


def test_the_whole_checkpoint_costs_little_more(tmp_path: Path) -> None:
    sizes = []
    for callback in (Trace(), PruneFinetune(0.5, schedule=OneShot("0st"))):
        run = trainer(callback, max_epochs=1)
        run.fit(task(hidden=512), *loaders(batches=1))
        run.save_checkpoint(tmp_path / "one.ckpt")
        sizes.append((tmp_path / "one.ckpt").stat().st_size)
    weights = 8 * 512 + 512 * 512
    assert sizes[1] - sizes[0] < weights / 8 + 40_000  # the streams of torch, numpy and python are 2 x 8 kB
