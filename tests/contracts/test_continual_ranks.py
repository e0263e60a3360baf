"""Continual pruning on two ranks: the masks of one process, domain after domain, and what is refused there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.calibration import layers as in_layers
from sparsetrain.callbacks import ContinualPruning
from sparsetrain.continual import ContinualPruner, Memory
from sparsetrain.criteria import Copal
from sparsetrain.masks import MaskManager
from sparsetrain.oneshot import Streaming
from sparsetrain.targets import Targets

from . import ranks as on
from .promises import same_bits
from .ranks import RANKS, Group, said
from .test_continual import domain


def learned(rank: int, ranks: int, wrap: on.Wrap) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)))
    manager = MaskManager(model, Targets(head=True), "unstructured:row")
    pruner = ContinualPruner(manager, 0.5, criterion=Copal(), streaming=Streaming(batch=400))
    for name, x in (("a", domain(0, 3.0, 0.3)), ("b", domain(16, 3.0, 0.3))):
        pruner.learn(name, [x[rank::ranks]])
    return {t.name: t.full_mask() for t in manager}


class Normed(on.Net):
    """A BatchNorm whose running statistics are each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def two_fits() -> dict[str, Any]:
    """Lightning, two domains with training in between; each rank has half of the data."""
    model, method = Normed(), ContinualPruning(0.5, criterion=Copal(batches=2), targets=Targets(head=True))
    found = []
    for _ in range(2):
        on.fit_plainly(method, max_steps=4, model=model)
        found.append(dict(method.masks.masks))
    assert method.pruner is not None
    names = [learnt.name for learnt in method.pruner.domains]
    return {"masks": found, "names": names, "mean": model.norm.running_mean, "drift": method.drift}


def changed(rank: int) -> str:
    """One rank's model is not as it was."""
    model = on.ddp(nn.Sequential(nn.Linear(32, 16)))
    pruner = ContinualPruner(MaskManager(model, Targets(head=True), "unstructured"), 0.5)
    pruner.learn("a", [domain(0)])
    with torch.no_grad():
        model.module[0].weight[0] += rank
    return said(lambda: pruner.learn("b", [domain(16)]))


def refused(wrap: on.Wrap, criterion: str = "copal", **memory: Any) -> str:
    manager = MaskManager(wrap(nn.Sequential(nn.Linear(32, 16))), Targets(head=True), "unstructured")
    return said(lambda: ContinualPruner(manager, 0.5, criterion=criterion, memory=Memory(**memory)))


def sharded_later() -> str:
    """Sharded once the method is there, as Lightning does."""
    model = nn.Sequential(nn.Linear(32, 16))
    pruner = ContinualPruner(MaskManager(model, Targets(head=True), "unstructured"), 0.5, criterion="magnitude")
    on.fsdp(model)
    return said(lambda: pruner.learn("a"))


def work(folder: Path) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    found: dict[str, Any] = {"masks": learned(rank, RANKS, on.ddp)}
    keep, in_layers.sum_over_ranks = in_layers.sum_over_ranks, lambda criterion, only: None
    found["without sums"] = learned(rank, RANKS, on.ddp)
    in_layers.sum_over_ranks = keep
    found["fits"] = two_fits()
    found["changed"] = changed(rank)
    found["sharded"] = [refused(on.fsdp, criterion) for criterion in ("copal", "magnitude")] + [sharded_later()]
    found["folder"] = refused(on.ddp, folder=folder / "kept")
    found["joint"] = refused(on.ddp, mode="joint")
    found["fine"] = refused(on.ddp)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return Group(work, tmp_path_factory.mktemp("ranks")).results()


def test_two_ranks_are_one(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["masks"] for rank in ranks)
    same_bits(first, second)
    one = learned(0, 1, on.alone)
    for name, mask in one.items():
        assert int((mask != first[name]).sum()) <= 2, name  # sums in another order
    # The twin without the sums over ranks.
    alone, other = (rank["without sums"] for rank in ranks)
    assert any(int((mask != alone[name]).sum()) > 2 for name, mask in one.items())
    assert any(not torch.equal(alone[name], other[name]) for name in one)


def test_running_statistics_of_a_rank_are_no_change_of_the_model(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["fits"] for rank in ranks)
    assert not torch.equal(first["mean"], second["mean"])
    assert first["names"] == second["names"] == ["domain 1", "domain 2"]
    for one, other in zip(first["masks"], second["masks"], strict=True):
        same_bits(one, other)
    assert first["drift"] == second["drift"] != {}


def test_a_change_on_one_rank_is_told_by_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["changed"].startswith("MaskStateError: the model was changed since domain 'a' was learned")


def test_what_several_ranks_cannot_do(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for told in rank["sharded"]:
            assert told.startswith("RecipeError: continual pruning keeps the base weights of 0.weight")
            assert "sharded (FSDP2)" in told
        assert "2 processes would write into one folder" in rank["folder"]
        assert rank["joint"].startswith("RecipeError: memory.mode 'joint' keeps the data of all domains")
        assert rank["fine"] == "nothing"
