"""Criteria that see data, in runs: resumed ones are bit for bit the same, and two ranks agree on what they saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from sparsetrain.calibration import calibrate, watch
from sparsetrain.calibration import whole as in_calibration
from sparsetrain.callbacks import PruneFinetune
from sparsetrain.callbacks import statistics as in_lightning
from sparsetrain.criteria import NAMES, OBS, PLATON, Criterion, Fisher, Movement, StatisticsCriterion, Taylor
from sparsetrain.errors import DivergedError, RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.pruning import prune
from sparsetrain.schedules import Cubic, OneShot, Rounds
from sparsetrain.targets import Targets

from . import ranks as on
from .promises import same_bits
from .ranks import RANKS, Group, ddp, fsdp, said
from .test_resume import SaveAlways, fit
from .toys import loaders, task, trainer

Patch = pytest.MonkeyPatch

CRITERIA: dict[str, Callable[[], Criterion]] = {
    "movement": Movement,
    "soft movement": lambda: Movement("soft", lr=0.3, penalty=0.1),
    "platon": PLATON,
    "fisher": lambda: Fisher(batches=2),
    "obs": lambda: OBS(batches=2, block=7, damp=1e-3),
    "lookahead": NAMES["lookahead"],
}


def method(name: str) -> list[Callback]:
    allocation = "uniform" if name == "obs" else "global"
    return [PruneFinetune(0.8, "unstructured", CRITERIA[name](), allocation, Cubic("1st", "11st", "3st"))]


def assert_same_run(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    for part in ("weights", "optimizer", "masks"):
        same_bits(whole[part], resumed[part])
    assert resumed["changes"] == whole["changes"]
    assert torch.equal(resumed["random"], whole["random"])
    states = [run["method"].get("criterion", {}) for run in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for tensor in states[0]:
        same_bits(states[0][tensor], states[1][tensor])


@pytest.mark.parametrize("name", CRITERIA)
def test_resume_equals_uninterrupted_from_the_middle_of_a_schedule(name: str, tmp_path: Path) -> None:
    whole = fit([*method(name), SaveAlways(tmp_path)])
    assert len({change.step for change in whole["changes"]}) >= 3
    assert bool(whole["method"].get("criterion")) == (name in ("movement", "soft movement", "platon"))
    for step in (1, 4, 6, 10):
        assert_same_run(fit(method(name), tmp_path / f"{step:02d}-step.ckpt", seed=1234), whole)


@pytest.mark.parametrize("name", ["movement", "platon"])
def test_without_its_statistics_a_resumed_run_is_another(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    whole = fit([*method(name), SaveAlways(tmp_path)])
    monkeypatch.setattr(StatisticsCriterion, "load_state_dict", lambda self, state: None)
    with pytest.raises(AssertionError):
        assert_same_run(fit(method(name), tmp_path / "04-step.ckpt", seed=1234), whole)


def test_with_batches_in_any_order_a_resumed_run_is_another(tmp_path: Path, monkeypatch: Patch) -> None:
    whole = fit([*method("fisher"), SaveAlways(tmp_path)])
    plain, calls = in_lightning.training_batches, iter(range(1000, 2000))
    monkeypatch.setattr(in_lightning, "training_batches", lambda trainer, seed: plain(trainer, next(calls)))
    with pytest.raises(AssertionError):
        assert_same_run(fit(method("fisher"), tmp_path / "04-step.ckpt", seed=1234), whole)


# -- two ranks --------------------------------------------------------------------------------------------------------------


def toy() -> nn.Sequential:
    """Whole numbers everywhere: sums are exact in whatever order they are added."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))
    return model


def toy_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(-3, 4, (3, 6), generator=generator).float() for _ in range(6)]


def masks_of(kind: Callable[[], StatisticsCriterion], wrap: on.Wrap, batches: list[Tensor]) -> dict[str, Tensor]:
    model = wrap(toy())
    manager, criterion = MaskManager(model, Targets(head=True), "neurons" if kind is NAMES["apoz"] else "unstructured"), kind()
    calibrate(manager, criterion, batches, lambda batch: manager.model(batch).sum())
    prune(manager, 0.4, criterion=criterion, allocation="global")
    return {name: mask.clone() for name, mask in manager.masks.items()}


SUMMED = ("gradient", "snip", "taylor", "fisher", "apoz", "activation", "wanda", "ria", "sparsegpt")


def kind_of(name: str) -> Any:
    return NAMES[name]


def diverged(rank: int) -> None:
    batches = [torch.full((3, 6), torch.nan)] if rank else toy_batches()
    masks_of(Taylor, ddp, batches)


def used_on_one_rank(rank: int) -> dict[str, Tensor]:
    """The second rank never uses the second layer."""
    model = toy()
    manager, criterion = MaskManager(model, Targets(head=True)), Fisher()
    calibrate(manager, criterion, toy_batches()[:2], lambda b: (model[0](b) if rank else model(b)).sum())
    return {name: memory["squares"] for name, memory in criterion.memory.items()}


def lookahead(wrap: on.Wrap) -> dict[str, Tensor]:
    manager = MaskManager(wrap(toy()), Targets(head=True))
    prune(manager, 0.4, criterion="lookahead", allocation="global")
    return {tensor.name: tensor.full_mask() for tensor in manager}


def lightning(name: str) -> dict[str, Any]:
    callback = PruneFinetune(
        0.6, "unstructured", CRITERIA[name](), "uniform", Rounds(2, start="4st", every="4st"), Targets(head=True)
    )
    model = on.fit_plainly(callback, max_steps=10)
    assert callback.verification is not None
    return {"masks": callback.masks.masks, "weights": dict(model.state_dict()), "ok": callback.verification.ok}


def work(folder: Path) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    mine = toy_batches()[rank::RANKS]
    found: dict[str, Any] = {"masks": {name: masks_of(kind_of(name), ddp, mine) for name in SUMMED}}
    keep, in_calibration.sum_over_ranks = in_calibration.sum_over_ranks, lambda criterion, problem: None
    found["without sums"] = masks_of(Fisher, ddp, mine)
    in_calibration.sum_over_ranks = keep
    found["diverged"] = said(lambda: diverged(rank))
    found["not additive"] = said(lambda: masks_of(PLATON, ddp, mine))
    found["sharded"] = said(lambda: masks_of(Fisher, fsdp, mine))
    found["one rank"] = used_on_one_rank(rank)
    found["lookahead"] = lookahead(fsdp)
    found["lightning"] = {name: lightning(name) for name in ("fisher", "platon")}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return Group(work, tmp_path_factory.mktemp("ranks")).results()


@pytest.mark.parametrize("name", SUMMED)
def test_statistics_of_two_ranks_are_those_of_one(name: str, ranks: list[dict[str, Any]]) -> None:
    expected = masks_of(kind_of(name), on.alone, toy_batches())
    for rank in ranks:
        same_bits(expected, rank["masks"][name])


def test_without_the_sums_the_ranks_disagree(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["without sums"] for rank in ranks)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_problem_of_one_rank_is_raised_on_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["diverged"].startswith(f"{DivergedError.__name__}: calibration: the gradient of 0.weight is not finite")


def test_what_cannot_be_summed_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["not additive"].startswith(f"{RecipeError.__name__}: criterion PLATON keeps no sums")
        assert "Fisher measures 0.weight with data" in rank["sharded"]


def test_a_layer_that_one_rank_uses_is_measured_there(ranks: list[dict[str, Any]]) -> None:
    same_bits(ranks[0]["one rank"], ranks[1]["one rank"])
    assert ranks[1]["one rank"]["1.weight"].any()


def test_lookahead_sees_the_whole_of_sharded_neighbours(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        same_bits(lookahead(on.alone), rank["lookahead"])


@pytest.mark.parametrize("name", ["fisher", "platon"])
def test_in_lightning_two_ranks_have_the_same_masks(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["lightning"][name] for rank in ranks)
    assert first["ok"]
    assert second["ok"]
    same_bits(first["masks"], second["masks"])
    same_bits(first["weights"], second["weights"])
    assert int(sum((~mask).sum() for mask in first["masks"].values())) == sum(
        int(m.numel() * 6) // 10 for m in first["masks"].values()
    )


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_seen_as_they_are(fused: bool, monkeypatch: Patch) -> None:
    """A fused optimizer undoes AMP's scale inside its step, after a criterion has looked."""

    def scores(**settings: Any) -> dict[str, Tensor]:
        of = PruneFinetune(0.5, criterion=Movement(), schedule=OneShot("4st"))
        module = task(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, fused=fused))
        trainer(of, max_epochs=1, **settings).fit(module, *loaders())
        assert isinstance(of.criterion, Movement)
        return {name: memory["scores"] for name, memory in of.criterion.memory.items()}

    def amp() -> dict[str, Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # type: ignore[attr-defined]
        return scores(plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])

    def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.allclose(one[name], other[name], atol=0.05 * float(other[name].abs().max())) for name in other)

    whole = scores()
    assert close(amp(), whole)
    monkeypatch.setattr(in_lightning, "watch", lambda *args: watch(*args[:3]))  # as if there were no scale
    assert close(amp(), whole) != fused
