"""Promise 7: one process, two ranks with DDP, two ranks with FSDP2: the same mask, bit for bit, and every promise on each.

The ranks do all their work once (`work`); the tests read what they brought back and compare it with one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import AdamW

from sparsetrain.errors import PatternError
from sparsetrain.masks import MaskManager, sharding
from sparsetrain.patterns import Unstructured
from sparsetrain.pruning import prune
from sparsetrain.targets import Layout, Targets

from . import ranks as on
from .ranks import RANKS, Case, Group, Watch, Wrap, alone, cases, ddp, fill, fsdp, layers, run_case, same

WRAPS: dict[str, Wrap] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "hybrid": on.hybrid,
    "partly": on.partly,
    "by_columns": on.by_columns,
}
ROWS, COLUMNS = 304, 512  # 152 rows a rank: fewer entries than all of them, more than a histogram of 2^16 counts
SHARD, HISTOGRAM = ROWS // RANKS * COLUMNS, 1 << 16


def work(folder: Path) -> dict[str, Any]:
    """What each rank does, and brings back."""
    plain, sharded = folder / "plain", folder / "sharded"
    return {
        "cases": {case: run_case(case, WRAPS[case.wrap]) for case in cases()},
        "traffic": {name: traffic(*name) for name in TRAFFIC},
        "no all-reduce": no_all_reduce(),
        "broken": {pattern: broken(pattern) for pattern in BROKEN},
        "stale": stale(),
        "adopted": {wrap: adopted(WRAPS[wrap]) for wrap in ("ddp", "fsdp", "hybrid")},
        "after validation": after_validation(fsdp),
        "left gathered": left_gathered(),
        "shrunk": on.shrunk(),
        "noisy": on.noisy(),
        "runs": {
            "a loop, DDP": on.loop(ddp),
            "a loop, FSDP2": on.loop(fsdp),
            "Lightning, DDP": on.fit_ddp(),
            "Lightning, FSDP2": on.fit_fsdp(False, plain),
            "Lightning, FSDP2, saved by shards": on.fit_fsdp(True, sharded),
            "resumed inside an epoch": on.fit_fsdp(False, None, plain / "inside.ckpt"),
            "resumed after validation": on.fit_fsdp(False, None, plain / "validated.ckpt"),
            "resumed inside an epoch, by shards": on.fit_fsdp(True, None, sharded / "inside.ckpt"),
            "resumed after validation, by shards": on.fit_fsdp(True, None, sharded / "validated.ckpt"),
        },
    }


# -- what the ranks do ------------------------------------------------------------------------------------------------------

TRAFFIC = [("unstructured", "uniform"), ("unstructured", "global"), ("unstructured:row", "uniform"), ("2:4", "uniform")]
TRAFFIC += [("neurons", "uniform")]  # the twin: a pattern that does gather
BROKEN = ("unstructured", "unstructured:row", "2:4", "block:4x4")


def wide() -> nn.Module:
    return fill(nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Linear(COLUMNS, ROWS)), "normal")


def traffic(pattern: str, allocation: str) -> tuple[int, int]:
    """The largest tensor moved between ranks, and the largest made on one, while pruning twice."""
    manager = MaskManager(fsdp(wide()), Targets(head=True), pattern)
    with Watch() as watch:
        for sparsity in (0.5, 0.5) if pattern == "2:4" else (0.3, 0.6):
            prune(manager, sparsity, allocation=allocation)
    return watch.moved, watch.made


def no_all_reduce() -> dict[str, Any]:
    """A selection, and one whose counts stay on their rank."""
    parameter = fsdp(fill(nn.Linear(24, 33), "ties")).weight
    scores = sharding.local(parameter.detach()).abs() * (1 + dist.get_rank())

    def select() -> Tensor:
        mask = sharding.select(Unstructured(), scores, parameter, Layout(), 0.3)
        return sharding.full(sharding.like(mask.view(torch.uint8), parameter)).view(torch.bool)

    right = select()
    with patch.object(sharding.RowShard, "sum", lambda self, counts: counts):
        return {"scores": sharding.full(sharding.like(scores, parameter)), "right": right, "wrong": select()}


def broken(pattern: str) -> list[str]:
    """What installing a mask says: a good one, then the same with one entry of the last rank revived."""
    manager = MaskManager(fsdp(fill(nn.Linear(24, 32), "normal")), pattern=pattern)
    prune(manager, 0.5)
    mask = manager["weight"].mask
    assert mask is not None
    said = []
    for revive in (False, dist.get_rank() == RANKS - 1):
        changed = mask.clone()
        if revive:
            changed.view(-1)[(~mask).view(-1).nonzero()[0]] = True
        try:
            manager.install("weight", changed, 0.5)
            said.append("installed")
        except PatternError as error:
            said.append(str(error))
    return said


def stale() -> list[list[str]]:
    """Problems before and after an optimizer on the last rank alone remembers pruned weights."""
    model = fsdp(on.Net())
    optimizer = AdamW(model.parameters())
    manager = MaskManager(model).attach(optimizer)
    prune(manager, 0.5)
    model(torch.ones(2, 24)).sum().backward()
    optimizer.step()
    found = [manager.verify().problems]
    if dist.get_rank() == RANKS - 1:
        sharding.local(optimizer.state[model.fc1.weight]["exp_avg"]).fill_(1.0)
    return [*found, manager.verify().problems]


def adopted(wrap: Wrap) -> dict[str, Any]:
    """Zeros made by somebody else, adopted; and the state that gives, loaded into a fresh model."""
    model = nn.Sequential(nn.Embedding(5, 12), nn.Linear(12, 9), nn.Linear(9, 1))
    manager = MaskManager.adopt(wrap(fill(model, "ties")), targets=Targets(head=True))
    fresh = MaskManager(wrap(fill(layers("linear"), "normal")), Targets(head=True))
    prune(fresh, 0.7, allocation="global")
    loaded = MaskManager(wrap(fill(layers("linear"), "normal")), Targets(head=True))
    loaded.load_state_dict(fresh.state_dict())
    return {
        "state": manager.state_dict(),
        "loaded": loaded.state_dict(),
        "problems": manager.verify().problems + loaded.verify().problems,
    }


def after_validation(wrap: Wrap) -> dict[str, Any]:
    """Pruning between a forward pass without a backward, after which FSDP2 leaves gathered weights behind, and the next."""
    model = wrap(on.Net())
    manager = MaskManager(model, Targets(head=True))
    prune(manager, 0.3)
    with torch.no_grad():
        model(torch.ones(2, 24))
    before = manager.state_dict()
    prune(manager, 0.6)
    return {"states": [before, manager.state_dict()], "output": model(torch.ones(2, 24)).detach()}


def left_gathered() -> str:
    """The same, were the gathered weights not given back."""
    with patch.object(sharding, "reshard", lambda model: None):
        try:
            after_validation(fsdp)
        except Exception as error:
            return repr(error)
    return "nothing"


# -- the tests --------------------------------------------------------------------------------------------------------------

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Ranks:
    return Group(work, folder).results()


@pytest.fixture(scope="module")
def one(folder: Path) -> Callable[[bool], dict[str, Any]]:
    """The run through Lightning in one process, and as a plain loop."""
    runs = {True: on.fit(None, folder / "one"), False: on.loop(alone)}
    return runs.__getitem__


@pytest.mark.parametrize("case", cases(), ids=str)
def test_selection_is_the_same_on_two_ranks_as_on_one(case: Case, ranks: Ranks) -> None:
    expected = run_case(case, alone)
    assert expected["problems"] == []
    for rank in ranks:
        assert same(rank["cases"][case], expected)


def test_ties_over_ranks_go_to_the_lower_index(ranks: Ranks) -> None:
    """Against Python's own sort of (score, index): whole numbers of -3 to 3, of which hundreds are equal at the threshold."""
    masks = ranks[0]["cases"][Case("linear", "unstructured")]["masks"][0]
    for name, parameter in fill(layers("linear"), "ties").named_parameters():
        if name in masks:
            weights = parameter.flatten().tolist()
            order = sorted(range(len(weights)), key=lambda i: (abs(weights[i]), i))
            dead = (~masks[name]).flatten().nonzero().flatten().tolist()
            assert dead == sorted(order[: math.floor(len(weights) * 3 / 10)])


def test_selection_without_the_all_reduce_is_another(ranks: Ranks) -> None:
    for rank in ranks:
        found = rank["no all-reduce"]
        order = found["scores"].flatten().sort(stable=True).indices[: 33 * 24 * 3 // 10]
        assert sorted(order.tolist()) == (~found["right"]).flatten().nonzero().flatten().tolist()
        assert not torch.equal(found["right"], found["wrong"])


@pytest.mark.parametrize(("pattern", "allocation"), TRAFFIC)
def test_no_rank_ever_sees_more_than_its_shard(pattern: str, allocation: str, ranks: Ranks) -> None:
    for rank in ranks:
        moved, made = rank["traffic"][pattern, allocation]
        if pattern == "neurons":
            assert moved >= SHARD
            assert made >= ROWS * COLUMNS
        else:
            assert moved <= (HISTOGRAM if pattern == "unstructured" else 64)
            assert made <= SHARD + 512


@pytest.mark.parametrize("pattern", BROKEN)
def test_a_mask_broken_on_one_rank_is_refused_on_all(pattern: str, ranks: Ranks) -> None:
    for rank in ranks:
        good, bad = rank["broken"][pattern]
        assert good == "installed"
        assert bad == ranks[0]["broken"][pattern][1] != "installed"


def test_a_promise_broken_on_one_rank_is_told_by_all(ranks: Ranks) -> None:
    for rank in ranks:
        before, after = rank["stale"]
        assert before == []
        assert after == ranks[0]["stale"][1]
        assert "'exp_avg'" in after[0]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "hybrid"])
def test_adopting_and_loading_are_the_same_on_two_ranks_as_on_one(wrap: str, ranks: Ranks) -> None:
    expected = adopted(alone)
    assert expected["problems"] == []
    for rank in ranks:
        assert same(rank["adopted"][wrap], expected)


def test_pruning_after_a_validation(ranks: Ranks) -> None:
    expected = after_validation(alone)
    for rank in ranks:
        assert same(rank["after validation"]["states"], expected["states"])
        torch.testing.assert_close(rank["after validation"]["output"], expected["output"])
        assert "Error" in rank["left gathered"]


def test_units_taken_out_are_the_same_on_both_ranks(ranks: Ranks) -> None:
    first, second = (rank["shrunk"] for rank in ranks)
    assert first["left"] == second["left"]
    assert same(first["weights"], second["weights"])
    assert first["weights"]["fc1.weight"].shape[0] == first["left"]["fc1"][0] < 33
    for rank in (first, second):
        assert "2 processes share their gradients by shapes; use compact: end" in rank["between"]
        assert "sharded (FSDP2): use DDP, or one process" in rank["sharded"]


def test_noise_is_learned_alike_on_both_ranks_from_gradients_that_differ(ranks: Ranks) -> None:
    first, second = (rank["noisy"] for rank in ranks)
    assert not torch.equal(first["own"], second["own"])
    assert same(first["weights"], second["weights"])
    assert same(first["masks"], second["masks"])
    assert sum(int((~mask).sum()) for mask in first["masks"].values()) > 0
    for rank in (first, second):
        assert "VariationalDropout does not train under FSDP2; use ddp" in rank["sharded"]


RUNS = [
    "a loop, DDP",
    "a loop, FSDP2",
    "Lightning, DDP",
    "Lightning, FSDP2",
    "Lightning, FSDP2, saved by shards",
    "resumed inside an epoch",
    "resumed after validation",
    "resumed inside an epoch, by shards",
    "resumed after validation, by shards",
]


@pytest.mark.parametrize("name", RUNS)
def test_a_training_run_is_the_same_on_two_ranks_as_on_one(
    name: str, ranks: Ranks, one: Callable[[bool], dict[str, Any]]
) -> None:
    expected = one("loop" not in name)
    assert (expected["optimizers"], expected["problems"]) == (1, [])
    for rank in ranks:
        run = rank["runs"][name]
        assert same(run["masks"], expected["masks"])
        assert same(run["state"], expected["state"])
        assert (run["problems"], run["revived"], run["remembered"]) == ([], 0, 0)
        # Each rank takes the optimizer's step on its own rows: the same numbers but for the rounding of other loops.
        torch.testing.assert_close(run["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
        if name.startswith("resumed"):
            assert same(run["weights"], rank["runs"]["Lightning, FSDP2"]["weights"])


def saved(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("inside.ckpt", "validated.ckpt"):
        for path in (folder / "plain" / name, folder / "sharded" / name / "meta.pt"):
            yield name, torch.load(path, weights_only=True)


@pytest.mark.usefixtures("ranks", "one")
def test_masks_that_ranks_saved_load_in_one_process(folder: Path) -> None:
    for name, checkpoint in saved(folder):
        (state,) = (s["masks"] for s in checkpoint["callbacks"].values() if "masks" in s)
        model = on.Net()
        if "state_dict" in checkpoint:  # kept in other files when saved by shards
            model.load_state_dict(checkpoint["state_dict"], strict=True)
        manager = MaskManager(model, on.TARGETS, overrides=on.OVERRIDES)
        manager.load_state_dict(state)
        assert manager.verify().problems == []
        alone_saved = torch.load(folder / "one" / name, weights_only=True)
        (expected,) = (s["masks"] for s in alone_saved["callbacks"].values() if "masks" in s)
        assert same(manager.state_dict(), expected)
        assert 0.2 < manager.sparsity() < 0.6
