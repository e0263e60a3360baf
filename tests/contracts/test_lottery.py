"""Lottery tickets: a rewound round is the run a fresh trainer would make, bit for bit; resume, losing, controls, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.callbacks import KeepMasks
from sparsetrain.callbacks.exact_resume import capture, restore
from sparsetrain.callbacks.lottery import LotteryTickets
from sparsetrain.callbacks.rewinding import Rewind, check_another, reinitialize
from sparsetrain.callbacks.tickets import Control, Lost, TicketRounds, ticket_file
from sparsetrain.data import VisionData
from sparsetrain.data.loading import ResumableDataModule, ResumableLoader, TensorSet
from sparsetrain.errors import DataError, MaskStateError, PatternError, RecipeError, SparsetrainError
from sparsetrain.masks import load_masks
from sparsetrain.targets import Targets
from sparsetrain.tasks import Classification

from .promises import same_bits
from .ranks import RANKS, Group
from .test_resume import SaveAlways
from .toys import TARGETS, Task, loaders, trainer

PER_EPOCH = 8


class Tickets(Task):
    """The toy with everything that has to be rewound: BatchNorm, dropout, AdamW, a schedule as long as a round of 3 epochs."""

    def __init__(self, steps: int = 3 * PER_EPOCH, **network: Any) -> None:
        super().__init__(**({"dropout": 0.3, "norm": True} | network))
        self.steps = steps

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if self._trainer is not None:
            assert self.trainer.estimated_stepping_batches > 0  # as many schedules do; it builds the train loader early
        optimizer = self.make_optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def tickets_task(seed: int = 0, **settings: Any) -> Tickets:
    torch.manual_seed(seed)
    return Tickets(**settings)


class Data(ResumableDataModule):
    """The toys' data through the project's loader, whose order depends on the epoch it is told."""

    def train_dataloader(self) -> ResumableLoader:
        dataset: Any = loaders()[0].dataset
        return self.loader(TensorSet(*dataset.tensors), batch_size=4, seed=5, train=True)

    def val_dataloader(self) -> Any:
        return loaders()[1]


def everything(run: Trainer) -> dict[str, Any]:
    optimizer, schedule = run.optimizers[0], run.lr_scheduler_configs[0].scheduler
    return copy.deepcopy(
        {
            "weights": run.lightning_module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "streams": capture(),
        }
    )


class Spy(Callback):
    """What the run is at the start of an epoch of round 0, before anybody rewinds, and after the last batch of every epoch."""

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self.start: dict[str, Any] = {}
        self.ends: list[dict[str, Any]] = []
        self.batches: list[Tensor] = []
        self.firsts: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.epoch == 0:
            self.start = everything(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch > 0:
            self.start = everything(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].clone())
        if trainer.is_last_batch:
            self.ends.append(everything(trainer))


class AtStart(Callback):
    """Weights as the first batch of every epoch finds them; listed after the tickets, so that it sees what they did."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.seen.append(copy.deepcopy(pl_module.state_dict()))


def plain_rounds(count: int = 2, every: str = "3ep", **settings: Any) -> TicketRounds:
    return TicketRounds(count=count, every=every, **({"prune_rate": 0.3} | settings))


def lottery(rewind: Rewind | None = None, **settings: Any) -> LotteryTickets:
    return LotteryTickets(**({"rounds": plain_rounds(), "rewind": rewind} | settings))


def fit(method: Callback, where: Path, *others: Callback, data: str = "ordinary", **settings: Any) -> Trainer:
    """A run of 9 epochs, as long as a dense round and two others of 3 epochs."""
    module = settings.pop("module", None) or tickets_task()
    checkpoint = settings.pop("ckpt_path", None)
    before = [c for c in others if isinstance(c, Spy)]
    after = [c for c in others if not isinstance(c, Spy)]
    run = trainer(*before, method, *after, **({"max_epochs": 9, "default_root_dir": where} | settings))
    own: dict[str, Any] = (
        {"datamodule": Data()}
        if data == "resumable"
        else dict(zip(("train_dataloaders", "val_dataloaders"), loaders(), strict=True))
    )
    run.fit(module, **own, ckpt_path=checkpoint, weights_only=True)
    return run


# -- counts -----------------------------------------------------------------------------------------------------------


def test_every_round_removes_its_share_of_the_survivors(tmp_path: Path) -> None:
    rounds = plain_rounds(prune_rate=0.25, output_rate=None, rates={"fc1": 0.5})
    method = lottery(rounds=rounds, targets=Targets(head=True))
    fit(method, tmp_path)
    # fc1 has 128 weights, fc2 256, head 48; the head loses an eighth: 48 -> 42 -> 36.75, whole weights are kept.
    assert [(change.tensor.split(".")[1], change.died) for change in method.masks.changes] == [
        ("fc1", 64), ("fc2", 64), ("head", 6), ("fc1", 32), ("fc2", 48), ("head", 5),
    ]  # fmt: skip
    rows = method.facts()["rounds"]
    assert [row["kept"] for row in rows] == [432, 298, 213]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[2]["sparsity"] == pytest.approx(1 - 213 / 432, abs=1e-12)
    assert [float(method.final(t)) for t in method.masks] == [0.75, 0.4375, 1 - 0.875**2]
    for number, kept in ((1, 298), (2, 213)):
        saved = load_masks(ticket_file(tmp_path, number))
        assert sum(int(mask.sum()) for mask in saved.values()) == kept
    assert method.verification is not None
    assert method.verification.ok


def test_a_pool_loses_its_share_together(tmp_path: Path) -> None:
    method = lottery(allocation="global", targets=Targets(head=True), rounds=plain_rounds(prune_rate=0.5, output_rate=0.25))
    fit(method, tmp_path)
    counts = {name.split(".")[1]: dead for name, (dead, _) in method.masks.counts().items()}
    assert counts["fc1"] + counts["fc2"] == 384 * 3 // 4
    assert counts["fc1"] * 2 != counts["fc2"]  # one threshold, not the same share of each
    assert counts["head"] == 48 * 7 // 16


def test_rows_say_how_the_round_went(tmp_path: Path) -> None:
    spy = Spy()
    method = lottery(Rewind(to="1ep"))
    run = fit(method, tmp_path, spy, max_epochs=7)
    rows = method.facts()["rounds"]
    assert [row["steps"] for row in rows] == [24, 16, 16]
    assert run.global_step == 56
    for row in rows:
        assert row["best"]["val/loss"] <= row["end"]["val/loss"]
        assert row["best"]["step"] in ((8, 16, 24) if row["round"] == 0 else (16, 24))
    module = tickets_task()
    module.load_state_dict(spy.ends[4]["weights"])  # the end of round 1
    x, y = loaders()[1].dataset.tensors  # type: ignore[attr-defined]
    accuracy = float((module.eval()(x).argmax(1) == y).float().mean())
    assert rows[1]["end"]["val/accuracy"] == pytest.approx(accuracy)


def test_the_run_ends_with_its_last_round(tmp_path: Path) -> None:
    run = fit(
        lottery(rounds=plain_rounds(count=1, every="11st"), rewind=Rewind(rng=False)), tmp_path, module=tickets_task(steps=11)
    )
    assert run.global_step == 22


# -- rewinding --------------------------------------------------------------------------------------------------------


def loop(start: dict[str, Any], masks: dict[str, Tensor], epochs: int, first: int, data: str) -> dict[str, Any]:
    """The round as a loop of plain PyTorch: no Lightning, no sparsetrain but the data."""
    module = tickets_task(seed=50)
    module.load_state_dict(start["weights"])
    module.train()
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    optimizer.load_state_dict(copy.deepcopy(start["optimizer"]))
    schedule.load_state_dict(copy.deepcopy(start["schedule"]))
    dead = {module.get_parameter(name): ~mask for name, mask in masks.items()}

    def clear() -> None:
        for parameter, pruned in dead.items():
            parameter.data[pruned] = 0.0
            for value in optimizer.state.get(parameter, {}).values():
                if value.ndim:
                    value[pruned] = 0.0

    clear()
    module_data = Data()
    loader: Any = loaders()[0] if data == "ordinary" else module_data.train_dataloader()
    restore(start["streams"])
    for epoch in range(first, first + epochs):
        if data == "resumable":
            loader.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            clear()
            schedule.step()
    return {
        "weights": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "streams": capture(),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any], random: bool = True) -> None:
    same_bits(one["weights"], other["weights"])
    assert one["schedule"] == other["schedule"]
    for first, second in zip(one["optimizer"]["param_groups"], other["optimizer"]["param_groups"], strict=True):
        assert first == second
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for key, state in one["optimizer"]["state"].items():
        same_bits(state, other["optimizer"]["state"][key])
    if random:
        assert torch.equal(one["streams"]["torch"], other["streams"]["torch"])


@pytest.mark.parametrize("data", ["ordinary", "resumable"])
@pytest.mark.parametrize("to", [0, 1])
def test_a_round_is_the_run_that_plain_pytorch_makes_from_the_rewound_state(to: int, data: str, tmp_path: Path) -> None:
    spy = Spy(to)
    fit(lottery(Rewind(to=f"{to}ep")), tmp_path, spy, data=data)
    for number, last in ((1, 5 - to), (2, 8 - 2 * to)):
        masks = load_masks(ticket_file(tmp_path, number))
        assert_same(loop(spy.start, masks, 3 - to, to, data), spy.ends[last])
    for batch in range((3 - to) * PER_EPOCH):  # the same samples in the same order
        assert torch.equal(spy.batches[to * PER_EPOCH + batch], spy.batches[3 * PER_EPOCH + batch])


class From(Callback):
    """Puts a fresh run into the state a round was rewound to."""

    def __init__(self, start: dict[str, Any]) -> None:
        self.start = start

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        restore(self.start["streams"])


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_is_the_run_of_a_fresh_trainer(number: int, tmp_path: Path) -> None:
    spy, again = Spy(), Spy()
    fit(lottery(), tmp_path / "tickets", spy)
    module = tickets_task(seed=3)
    module.load_state_dict(spy.start["weights"])
    with torch.no_grad():
        for name, mask in load_masks(ticket_file(tmp_path / "tickets", number)).items():
            module.get_parameter(name)[~mask] = 0.0
    run = trainer(From(spy.start), again, KeepMasks(), max_epochs=3)
    run.fit(module, *loaders())
    assert_same(again.ends[2], spy.ends[3 * number + 2])


OFF = ["weights", "buffers", "optimizer", "schedule", "rng"]


@pytest.mark.parametrize("off", OFF)
def test_what_is_not_rewound_makes_another_round(off: str, tmp_path: Path) -> None:
    spy = Spy()
    fit(lottery(Rewind(**{off: False})), tmp_path, spy)
    masks = load_masks(ticket_file(tmp_path, 1))
    expected = loop(spy.start, masks, 3, 0, "ordinary")
    with pytest.raises(AssertionError):
        assert_same(expected, spy.ends[5], random=False)


def test_another_order_of_the_data_is_seen_by_the_projects_loader_too(tmp_path: Path) -> None:
    spy = Spy()
    fit(lottery(Rewind(rng=False)), tmp_path, spy, data="resumable")
    assert not torch.equal(spy.batches[0], spy.batches[24])


def rounds_begin_at(to: str, where: Path) -> None:
    """The third round starts where the second did, and both where round 0 was at that step."""
    states: dict[int, dict[str, Tensor]] = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            states[trainer.global_step] = copy.deepcopy(pl_module.state_dict())

    back = int(to[:-2])
    fit(lottery(Rewind(to=to, rng=to != "5st"), rounds=plain_rounds(count=3)), where, Look(), max_epochs=12)
    for number in (1, 2, 3):
        expected = {name: value.clone() for name, value in states[back].items()}
        for name, mask in load_masks(ticket_file(where, number)).items():
            expected[name][~mask] = 0.0
        same_bits(states[24 + (number - 1) * (24 - back)], expected)


@pytest.mark.parametrize("to", ["0st", "8st", "5st"])
def test_every_rewind_goes_to_the_same_place(to: str, tmp_path: Path) -> None:
    rounds_begin_at(to, tmp_path)


def test_a_snapshot_that_shares_memory_drifts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.callbacks.rewinding.copied", lambda value: value)
    with pytest.raises(AssertionError):
        rounds_begin_at("0st", tmp_path)


class Verify(Callback):
    """Every promise, right before the first batch of every epoch."""

    def __init__(self, method: LotteryTickets) -> None:
        self.method = method
        self.problems: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.problems += self.method.masks.verify().problems


@pytest.mark.parametrize("keeps", [True, False])
def test_rewound_memory_holds_nothing_of_pruned_weights(keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not keeps:
        monkeypatch.setattr("sparsetrain.callbacks.rewinding.forget", lambda *args: None)
    method = lottery(Rewind(to="1ep"))
    verify = Verify(method)
    fit(method, tmp_path, verify)
    assert (verify.problems == []) == keeps
    assert keeps or "optimizer state 'exp_avg'" in verify.problems[0]


def test_it_rewinds_to_a_file(tmp_path: Path) -> None:
    other = tickets_task(seed=9)
    file = tmp_path / "other.pt"
    torch.save({"state_dict": other.state_dict()}, file)
    look = AtStart()
    fit(lottery(Rewind(to=str(file))), tmp_path, look)
    expected = {name: value.clone() for name, value in other.state_dict().items()}
    for name, mask in load_masks(ticket_file(tmp_path, 2)).items():
        expected[name][~mask] = 0.0
    same_bits(look.seen[6], expected)
    same_bits(look.seen[0], tickets_task().state_dict())
    torch.save(nn.Linear(2, 2).state_dict(), file)
    with pytest.raises(MaskStateError, match="another model"):
        fit(lottery(Rewind(to=str(file))), tmp_path)
    file.write_bytes(b"no weights")
    with pytest.raises(MaskStateError, match="cannot be read"):
        fit(lottery(Rewind(to=str(file))), tmp_path)


def test_a_schedule_longer_than_a_round_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="CosineAnnealingLR.*longer than a round of 24 steps"):
        fit(lottery(), tmp_path, module=tickets_task(steps=72))
    fit(lottery(Rewind(schedule=False)), tmp_path, module=tickets_task(steps=72))  # one schedule over the whole run: as said
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    method = lottery(rounds=plain_rounds(count=1, every="1ep"))
    run = trainer(method, max_epochs=2, default_root_dir=tmp_path, limit_train_batches=3)
    with pytest.warns(UserWarning, match="LambdaLR.*longer than a round of 3 steps"):
        run.fit(Classification(network, num_classes=10, lr_schedule="cosine"), datamodule=VisionData())


# -- resuming ---------------------------------------------------------------------------------------------------------


class SaveOften(SaveAlways):
    """A checkpoint after many batches (the first and last of every epoch and round), every validation and every epoch."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step % PER_EPOCH in (0, 1, 4, 7):
            super().on_train_batch_end(trainer, *args)


def result(method: LotteryTickets, run: Trainer) -> dict[str, Any]:
    return everything(run) | {"step": run.global_step, "facts": method.facts(), "changes": method.masks.changes}


RESUMED: dict[str, tuple[Callable[[], LotteryTickets], str, int]] = {
    "start": (lambda: lottery(rounds=plain_rounds(every="1ep")), "ordinary", 8),
    "later": (lambda: lottery(Rewind(to="1ep"), rounds=plain_rounds(every="2ep")), "ordinary", 16),
    "inside": (lambda: lottery(Rewind(to="2st", rng=False), rounds=plain_rounds(every="9st")), "ordinary", 9),
    "loader": (lambda: lottery(Rewind(to="1ep"), rounds=plain_rounds(every="2ep")), "resumable", 16),
    "lost": (
        lambda: lottery(rounds=plain_rounds(every="1ep", prune_rate=0.8), lost=Lost(tolerance=0.0, patience=2)),
        "ordinary",
        8,
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_equals_uninterrupted_from_every_checkpoint(name: str, tmp_path: Path) -> None:
    make, data, every = RESUMED[name]
    settings: dict[str, Any] = {"data": data, "max_epochs": 4}
    method = make()
    whole = result(method, fit(method, tmp_path / "whole", SaveOften(tmp_path), module=tickets_task(steps=every), **settings))
    assert len({change.step for change in whole["changes"]}) >= 2
    broken = {}
    for checkpoint in sorted(tmp_path.glob("*.ckpt")):
        method = make()
        module = tickets_task(seed=77, steps=every)
        torch.manual_seed(1234)
        resumed = result(method, fit(method, tmp_path / "again", module=module, ckpt_path=checkpoint, **settings))
        try:
            over = checkpoint.name.startswith(f"{whole['step']}-")  # nobody draws a number any more
            assert_same(resumed, whole, random=not over)
            assert resumed["facts"] == whole["facts"]
            assert resumed["changes"] == whole["changes"]
        except AssertionError as error:
            broken[checkpoint.name] = str(error).splitlines()[0]
    assert not broken, "\n".join(f"{n}: {why}" for n, why in broken.items())


def test_without_the_snapshot_resume_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, _, every = RESUMED["start"]
    method = make()
    whole = result(method, fit(method, tmp_path, SaveOften(tmp_path), module=tickets_task(steps=every), max_epochs=3))
    plain = LotteryTickets.load_method_state

    def amnesia(self: LotteryTickets, state: dict[str, Any]) -> None:
        plain(self, state | {"snapshot": None})

    monkeypatch.setattr(LotteryTickets, "load_method_state", amnesia)
    method = make()
    resumed = fit(method, tmp_path, module=tickets_task(steps=every), ckpt_path=tmp_path / "04-step.ckpt", max_epochs=3)
    with pytest.raises(AssertionError):
        assert_same(result(method, resumed), whole)


def test_a_run_that_has_ended_stays_ended(tmp_path: Path) -> None:
    make, _, every = RESUMED["inside"]
    run = fit(make(), tmp_path, SaveOften(tmp_path), module=tickets_task(steps=every), max_epochs=4)
    again = fit(make(), tmp_path, module=tickets_task(steps=every), max_epochs=20, ckpt_path=tmp_path / "23-step.ckpt")
    assert again.global_step == run.global_step == 23


def test_a_second_fit_searches_again_from_where_the_first_ended(tmp_path: Path) -> None:
    method = lottery(rounds=plain_rounds(count=1, every="1ep", prune_rate=0.5))
    first = fit(method, tmp_path, module=tickets_task(steps=8), max_epochs=2)
    second = trainer(method, max_epochs=2, default_root_dir=tmp_path)
    second.fit(first.lightning_module, *loaders())
    assert [row["sparsity"] for row in method.facts()["rounds"]] == [0.5, 0.75]


# -- two ranks --------------------------------------------------------------------------------------------------------


def ranked(folder: Path, ckpt_path: Path | None = None) -> dict[str, Any]:
    """A run of 6 epochs of 4 steps on each of two ranks: two rounds after the dense one."""
    spy = Spy()

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 12:
                trainer.save_checkpoint(folder / "inside.ckpt")

    method = lottery(rounds=plain_rounds(every="2ep", prune_rate=0.5))
    run = fit(
        method,
        folder,
        spy,
        *([] if ckpt_path else [Save()]),
        module=tickets_task(steps=8, norm=False),
        max_epochs=6,
        devices=RANKS,
        strategy=DDPStrategy(),
        ckpt_path=ckpt_path,
    )
    return everything(run) | {
        "batches": spy.batches,
        "masks": {name: mask.clone() for name, mask in method.masks.masks.items()},
        "facts": [row["kept"] for row in method.facts()["rounds"]],
    }


def on_each_rank(folder: Path) -> dict[str, Any]:
    return {"whole": ranked(folder), "resumed": ranked(folder, folder / "inside.ckpt")}


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_rewind_alike(tmp_path: Path) -> None:
    one, other = Group(on_each_rank, tmp_path).results()
    same_bits(one["whole"]["weights"], other["whole"]["weights"])
    assert one["whole"]["facts"] == [384, 192, 96]
    for name, mask in one["whole"]["masks"].items():
        assert torch.equal(mask, other["whole"]["masks"][name])
    for rank in (one, other):
        batches = rank["whole"]["batches"]
        assert len(batches) == 24
        for first, again in zip(batches[:8], batches[16:], strict=True):
            assert torch.equal(first, again)
        assert not torch.equal(batches[0], batches[4])
        assert_same(rank["resumed"], rank["whole"])
    assert not torch.equal(one["whole"]["batches"][0], other["whole"]["batches"][0])


# -- when the ticket is lost ------------------------------------------------------------------------------------------


class Scripted(Tickets):
    """Validations with known accuracies, one an epoch."""

    def __init__(self, script: list[float]) -> None:
        super().__init__(steps=8)
        self.script = script

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        value = self.script[min(self.trainer.current_epoch, len(self.script) - 1)]
        self.log_dict({"val/accuracy": value, "val/error": 1 - value})


def scripted(script: list[float]) -> Scripted:
    torch.manual_seed(0)
    return Scripted(script)


@pytest.mark.parametrize(
    ("script", "patience", "epochs", "winner"),
    [
        ([0.9, 0.9, 0.86, 0.95, 0.8, 0.99, 0.99], 1, 5, 3),  # within 0.05 at round 2, lost at round 4
        ([0.9, 0.8, 0.9, 0.8, 0.8, 0.99, 0.99], 2, 5, 2),  # lost once, back, lost twice
        ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.8], 2, 7, 5),  # lost in the last round: it ends with a winner all the same
        ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], 1, 7, 6),
        ([0.9, float("nan"), 0.9], 1, 2, 0),
    ],
)
@pytest.mark.parametrize("monitor", ["val/accuracy", "val/error"])
def test_the_last_winning_ticket_is_what_is_left(
    script: list[float], patience: int, epochs: int, winner: int, monitor: str, tmp_path: Path
) -> None:
    spy = Spy()
    lost = Lost(monitor, "max" if monitor == "val/accuracy" else "min", tolerance=0.05, patience=patience)
    method = lottery(rounds=plain_rounds(count=6, every="1ep"), lost=lost)
    run = fit(method, tmp_path, spy, module=scripted(script), max_epochs=7)
    assert run.current_epoch == epochs
    assert run.global_step == epochs * PER_EPOCH
    assert len(method.facts()["rounds"]) == epochs
    assert method.facts()["winner"] == winner
    same_bits(run.lightning_module.state_dict(), spy.ends[winner]["weights"])
    assert method.masks.masks.keys() == ({f"net.{name}" for name in TARGETS} if winner else set())
    for name, mask in load_masks(ticket_file(tmp_path, winner)).items() if winner else ():
        assert torch.equal(method.masks.masks[name], mask)
    assert method.shortfall() is None
    if winner < epochs - 1:
        assert f"that of round {winner} is back" in method.masks.changes[-1].why


def test_without_lost_all_rounds_are_run(tmp_path: Path) -> None:
    run = fit(lottery(rounds=plain_rounds(count=2, every="1ep")), tmp_path, module=scripted([0.9, 0.1, 0.1]), max_epochs=3)
    assert run.current_epoch == 3


# -- controls ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ticket_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where: Path = tmp_path_factory.mktemp("tickets")
    fit(lottery(allocation="global"), where)
    return where


def test_reinit_has_the_masks_of_the_ticket_and_weights_of_its_own(ticket_run: Path, tmp_path: Path) -> None:
    look = AtStart()
    method = lottery(control=Control("reinit", str(ticket_run), seed=4))
    fit(method, tmp_path, look)
    fresh = tickets_task(seed=4).state_dict()
    for number, epoch in ((1, 3), (2, 6)):
        masks = load_masks(ticket_file(ticket_run, number))
        for name, mask in load_masks(ticket_file(tmp_path, number)).items():
            assert torch.equal(mask, masks[name])
        expected = {name: value.clone() for name, value in fresh.items()}
        for name, mask in masks.items():
            expected[name][~mask] = 0.0
        same_bits(look.seen[epoch], expected)
    with pytest.raises(AssertionError):
        same_bits(look.seen[3], {**look.seen[0]})


def test_reinit_under_the_seed_of_the_tickets_is_refused(ticket_run: Path, tmp_path: Path) -> None:
    torch.manual_seed(11)
    module = tickets_task(seed=11)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RecipeError, match="seed 11 gives the initialization"):
        check_another(module, 11)
    check_another(module, 12)
    same_bits(module.state_dict(), before)
    with pytest.raises(RecipeError, match="another number"):
        fit(lottery(control=Control("reinit", str(ticket_run), seed=0)), tmp_path)


def test_random_has_as_many_weights_elsewhere_and_the_first_initialization(ticket_run: Path, tmp_path: Path) -> None:
    look = AtStart()
    method = lottery(control=Control("random", str(ticket_run), seed=4))
    fit(method, tmp_path, look)
    for number, epoch in ((1, 3), (2, 6)):
        own, masks = load_masks(ticket_file(tmp_path, number)), load_masks(ticket_file(ticket_run, number))
        expected = {name: value.clone() for name, value in tickets_task().state_dict().items()}
        for name, mask in own.items():
            assert int(mask.sum()) == int(masks[name].sum())
            assert not torch.equal(mask, masks[name])
            expected[name][~mask] = 0.0
        same_bits(look.seen[epoch], expected)
    again = lottery(control=Control("random", str(ticket_run), seed=5))
    fit(again, tmp_path / "other")
    assert any(not torch.equal(again.masks.masks[name], mask) for name, mask in method.masks.masks.items())


def test_a_control_can_compare_single_rounds(ticket_run: Path, tmp_path: Path) -> None:
    method = lottery(control=Control("random", str(ticket_run), rounds=(2,)), rounds=plain_rounds(count=1))
    fit(method, tmp_path)
    last = {name: int(mask.sum()) for name, mask in load_masks(ticket_file(ticket_run, 2)).items()}
    assert {name: int(mask.sum()) for name, mask in load_masks(ticket_file(tmp_path, 1)).items()} == last
    assert last != {name: int(mask.sum()) for name, mask in load_masks(ticket_file(ticket_run, 1)).items()}
    # What was asked is what the ticket has, not what one round of pruning would give.
    assert method.asked() == pytest.approx(method.masks.sparsity(), abs=1e-12)
    assert method.facts()["rounds"][1]["sparsity"] == pytest.approx(method.masks.sparsity())


def test_a_control_refuses_tickets_that_do_not_fit(ticket_run: Path, tmp_path: Path) -> None:
    control = Control("random", str(ticket_run))
    with pytest.raises(RecipeError, match="has no round 3"):
        fit(lottery(control=control, rounds=plain_rounds(count=3)), tmp_path)
    with pytest.raises(MaskStateError, match=r"net\.fc1\.weight.*shape"):
        fit(lottery(control=control), tmp_path, module=tickets_task(hidden=8))
    with pytest.raises(MaskStateError, match="pattern is neurons"):
        fit(lottery(control=control, pattern="neurons"), tmp_path)
    with pytest.raises(RecipeError, match="writes its own"):
        fit(lottery(control=control), ticket_run)
    with pytest.raises(RecipeError, match=r"names 1 rounds, rounds\.count is 2"):
        lottery(control=Control("random", str(ticket_run), rounds=(2,)))
    for rounds in ((0, 1), (2, 1), (1, 1)):
        with pytest.raises(RecipeError, match="ascending"):
            Control("random", str(ticket_run), rounds=rounds)
    with pytest.raises(RecipeError, match="no ticket run"):
        Control("random", str(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match="'shuffled' is unknown"):
        Control("shuffled", str(ticket_run))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"set rewind\.to to 0st"):
        lottery(Rewind(to="1ep"), control=Control("reinit", str(ticket_run)))


def test_reinit_refuses_what_it_cannot_initialize(ticket_run: Path) -> None:
    module = tickets_task()
    module.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(RecipeError, match=r"Tickets.*reset_parameters"):
        lottery(control=Control("reinit", str(ticket_run))).use(module)
    lottery(control=Control("random", str(ticket_run))).use(module)


def test_initializing_again_is_building_again_and_moves_no_stream() -> None:
    torch.manual_seed(3)
    built = nn.Sequential(nn.MultiheadAttention(8, 2), nn.BatchNorm1d(4), nn.Conv2d(2, 3, 3), nn.LSTM(3, 4), nn.LayerNorm(4))
    other = copy.deepcopy(built)
    for parameter in other.parameters():
        nn.init.constant_(parameter, 7.0)
    torch.manual_seed(20)
    reinitialize(other, seed=3)
    assert float(torch.rand(())) == float(torch.rand((), generator=torch.Generator().manual_seed(20)))
    same_bits(other.state_dict(), built.state_dict())


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TicketRounds(count=0), "at least 1 round"),
        (lambda: TicketRounds(prune_rate=1.0), r"prune_rate 1.0 is outside \(0, 1\)"),
        (lambda: TicketRounds(rates={"fc": 1.5}), "'fc' is 1.5"),
        (lambda: TicketRounds(output_rate=-0.1), "'output_rate' is -0.1"),
        (lambda: Rewind("0st", False, False, False, False, False), "nothing is rewound"),
        (lambda: Rewind(to="nowhere.ckpt"), "neither a duration"),
        (lambda: Lost(mode="most"), "'most' is unknown"),  # type: ignore[arg-type]
        (lambda: Lost(patience=0), "patience of at least 1"),
        (lambda: Lost(tolerance=float("nan")), "tolerance of 0 or more"),
        (lambda: LotteryTickets(pattern="2:4"), "2:4 has one sparsity"),
        (lambda: LotteryTickets(criterion="best"), "'best' is unknown"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(SparsetrainError, match=says):
        make()


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "short": ({}, {"max_epochs": 8}, "take 72 steps .* the run has 64: raise trainer.max_epochs"),
    "rng": ({"rewind": Rewind(to="5st")}, {}, "rewind.rng.*step 5.*set rewind.rng to false"),
    "rng every": ({"rounds": plain_rounds(every="10st")}, {}, "rewind.rng: rounds of 10 steps"),
    "back": ({"rewind": Rewind(to="3ep")}, {}, "round of 24 steps cannot rewind to its step 24"),
    "rates": ({"rounds": plain_rounds(rates={"fc9": 0.1})}, {}, "'fc9' matches no target"),
    "dense": ({"rounds": plain_rounds(rates={"fc": 0.0})}, {}, "nothing would be pruned"),
    "monitor": ({"lost": Lost("val/acuracy")}, {}, "'val/acuracy' is not among.*Did you mean 'val/accuracy'"),
    "no validation": ({"lost": Lost()}, {"limit_val_batches": 0}, "there are none"),
    "min epochs": ({"lost": Lost()}, {"min_epochs": 3}, "min_epochs or min_steps forbid it"),
    "min epochs after the end": ({}, {"min_epochs": 10, "max_epochs": 12}, "ends after 72 steps, and trainer.min_epochs"),
    "reload": ({}, {"reload_dataloaders_every_n_epochs": 1}, "reloaded data loaders"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_it_trains(name: str, tmp_path: Path) -> None:
    settings, options, says = REFUSED[name]
    with pytest.raises((RecipeError, PatternError), match=says):
        fit(lottery(**settings), tmp_path, **options)


def test_averages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="average of the weights"):
        fit(lottery(), tmp_path, EMAWeightAveraging(decay=0.9))


def test_a_run_that_stops_inside_a_round_says_so(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 30

    with pytest.warns(UserWarning, match=r"training ended in round 1 of 2, at sparsity 0\.29"):
        fit(lottery(), tmp_path, Stop())


# -- watching the test set --------------------------------------------------------------------------------------------


def test_rows_have_the_test_metrics_that_are_watched(tmp_path: Path) -> None:
    data = VisionData(batch_size=64, monitor_test=True)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    model = Classification(network, num_classes=10)
    method = lottery(rounds=plain_rounds(count=1, every="1ep"))
    run = trainer(method, max_epochs=2, default_root_dir=tmp_path, limit_train_batches=3)
    run.fit(model, datamodule=data)
    end = method.facts()["rounds"][1]["end"]
    assert list(end) == ["val/loss", "val/accuracy", "test/loss", "test/accuracy"]
    assert method.facts()["rounds"][1]["best"] == {"step": 3, **end}
    assert data.val_set is not None
    assert data.test_set is not None
    for stage, (x, y) in (("val", data.val_set.tensors), ("test", data.test_set.tensors)):
        with torch.no_grad():
            logits = network(x)
        assert end[f"{stage}/accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
        assert end[f"{stage}/loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert run.test(model, datamodule=data, verbose=False)[0] == pytest.approx({k: v for k, v in end.items() if "test" in k})


def test_watching_the_test_set_needs_two_sets() -> None:
    with pytest.raises(DataError, match="monitor_test needs a validation set"):
        VisionData(validation=0, monitor_test=True)
    data = VisionData(monitor_test=True)
    data.setup()
    data.test_set = None
    with pytest.raises(DataError, match="has no test set"):
        data.val_dataloader()
    plain = VisionData()
    plain.setup()
    assert isinstance(plain.val_dataloader(), ResumableLoader)
