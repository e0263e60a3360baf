"""Continual pruning: nothing is forgotten that an earlier domain needs, nothing stays dead that a later one needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsetrain.calibration import calibrate
from sparsetrain.continual import ContinualPruner, Memory
from sparsetrain.continual.remembering import ranked
from sparsetrain.criteria import Copal, Criterion, OutputFisher, SparseGPT, Wanda
from sparsetrain.errors import DataError, MaskStateError
from sparsetrain.masks import MaskManager
from sparsetrain.oneshot import Streaming
from sparsetrain.targets import Targets

from .promises import same_bits
from .test_oneshot import _MIXTRAL, llama, windows

#: Criteria whose statistics add up; every one of them must pass the two-domain tests.
CRITERIA: dict[str, Callable[[], Criterion]] = {
    "token": Copal,
    "final": lambda: Copal(abs_order="final"),
    "wanda": Wanda,
    "fisher": OutputFisher,
    "sparsegpt": SparseGPT,
}


def one_layer(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    model[0].weight.data.normal_()
    return model


def domain(first: int, high: float = 1.0, low: float = 0.0) -> Tensor:
    """400 tokens of 32 features, of which the 16 from ``first`` on are large."""
    scale = torch.full((32,), low)
    scale[first : first + 16] = high
    return torch.randn(400, 32, generator=torch.Generator().manual_seed(first)) * scale


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: model(batch, labels=batch).loss


class Learned:
    """One layer that has learned two domains; relative squared output errors on both, after each."""

    def __init__(self, a: Tensor, b: Tensor, pattern: str = "unstructured", criterion: Any = None, **memory: Any) -> None:
        self.model = one_layer()
        self.base = self.model[0].weight.detach().clone()
        self.manager = MaskManager(self.model, Targets(head=True), pattern)
        criterion = Copal() if criterion is None else criterion
        self.pruner = ContinualPruner(self.manager, 0.5, criterion=criterion, memory=Memory(**memory))
        self.errors, self.masks = [], []
        for name, data in (("a", a), ("b", b)):
            self.pruner.learn(name, [data[:100], data[100:]])
            self.errors.append((self.off(a), self.off(b)))
            self.masks.append(self.manager["0.weight"].mask)

    def off(self, x: Tensor) -> float:
        wanted = x @ self.base.mT
        return float(((x @ self.model[0].weight.detach().mT) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("pattern", ["unstructured", "unstructured:row"])
@pytest.mark.parametrize("name", CRITERIA)
def test_two_domains_that_share_no_feature(name: str, pattern: str) -> None:
    a, b = domain(0), domain(16)
    kept = Learned(a, b, pattern, CRITERIA[name]())
    assert kept.errors[0][0] < 0.001
    assert kept.errors[0][1] > 0.999
    assert kept.errors[1][0] < 0.15
    assert kept.errors[1][1] < 0.15
    assert (kept.pruner.domains[1].churn or 0) > 0.3
    fresh = Learned(a, b, pattern, CRITERIA[name](), mode="fresh")  # the twin that forgets
    assert fresh.errors[1][0] > 0.999
    assert fresh.errors[1][1] < 0.001


@pytest.mark.parametrize("pattern", ["unstructured", "unstructured:row"])
@pytest.mark.parametrize("name", CRITERIA)
def test_two_domains_that_overlap(name: str, pattern: str) -> None:
    a, b = domain(0, 3.0, 0.3), domain(16, 3.0, 0.3)
    kept = Learned(a, b, pattern, CRITERIA[name]())
    assert kept.errors[0][0] < 0.02
    assert kept.errors[0][1] > 0.3
    assert max(kept.errors[1]) < 0.15
    assert (kept.pruner.domains[1].churn or 0) > 0.3
    stasis = Learned(a, b, pattern, CRITERIA[name](), mode="stasis")  # the twin that never learns
    assert stasis.errors[1][1] > 0.3
    assert torch.equal(stasis.masks[0], stasis.masks[1])
    assert stasis.pruner.domains[1].churn == 0
    fresh = Learned(a, b, pattern, CRITERIA[name](), mode="fresh")
    assert fresh.errors[1][0] > 0.3
    assert fresh.errors[1][1] < 0.02
    joint = Learned(a, b, pattern, CRITERIA[name](), mode="joint")
    assert float((joint.masks[1] == kept.masks[1]).float().mean()) > 0.99


def test_pruned_weights_score_nothing_once_they_are_gone() -> None:
    """Why stasis is stasis: a weight of 0 has a score of exactly 0, whatever the data; where all do, masks stay."""
    model = one_layer()
    manager = MaskManager(model, Targets(head=True), "unstructured")
    pruner = ContinualPruner(manager, 0.5, memory=Memory(mode="stasis"))
    pruner.learn("a", [domain(0)])
    criterion = Copal()
    calibrate(manager, criterion, [domain(16)], model)
    mask = manager["0.weight"].mask
    assert mask is not None
    assert float(criterion.score(model[0].weight.detach(), name="0.weight").abs().max()) == 0  # dead on this domain
    pruner.learn("b", [domain(16)])
    assert torch.equal(manager.masks["0.weight"], mask)
    assert manager.verify(strict=True).sparsity == 0.5
    assert (pruner.domains[1].died, pruner.domains[1].revived) == (0, 0)


def test_the_same_domain_twice_changes_nothing() -> None:
    a = domain(0, 3.0, 0.3)
    kept = Learned(a, a)
    assert torch.equal(kept.masks[0], kept.masks[1])
    assert kept.pruner.domains[1].revived == 0
    once = sums_of(Learned(a, a, mode="accumulate", decay=1e-9).pruner)["0.weight"]["outer"]  # the twin that forgets
    torch.testing.assert_close(sums_of(kept.pruner)["0.weight"]["outer"], 2 * once, rtol=1e-6, atol=0)


def sums_of(pruner: ContinualPruner) -> dict[str, dict[str, Tensor]]:
    """What is remembered, by tensor (and expert)."""
    return {n: v for segment in pruner.kept.segments for n, v in pruner.kept.sums.load(segment).items()}


#: Those of which nothing but sums over tokens or samples is kept, and the one that takes absolute values of each domain.
SIGNED = CRITERIA | {f"{order}s": lambda order=order: Copal(abs_order=order) for order in ("sequence", "domain")}  # type: ignore[misc]


@pytest.mark.parametrize("name", SIGNED)
def test_dense_streams_do_not_know_the_order(name: str) -> None:
    """What was accumulated of a, then b, is what was of b, then a."""
    found = []
    for order in (0, 1):
        model = llama()
        manager = MaskManager(model, pattern="unstructured:row")
        pruner = ContinualPruner(manager, 0.5, criterion=SIGNED[name](), streaming=Streaming(inputs="dense"))
        data = [windows(4, 12), windows(6, 9)]
        for number in (order, 1 - order):
            pruner.learn(f"domain {number}", data[number])
        found.append(sums_of(pruner))
    for tensor, values in found[0].items():
        for key, value in values.items():
            torch.testing.assert_close(value, found[1][tensor][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SIGNED)
def test_two_domains_of_one_size_are_twice_the_mean_of_both(name: str) -> None:
    """With absolute values of each domain they are more: the twin."""
    a, b = domain(0, 3.0, 0.3), domain(16, 3.0, 0.3)
    found = []
    for domains in ([[a], [b]], [[a, b]]):
        manager = MaskManager(one_layer(), Targets(head=True), "unstructured")
        pruner = ContinualPruner(manager, 0.5, criterion=SIGNED[name](), streaming=Streaming(inputs="dense"))
        for number, data in enumerate(domains):
            pruner.learn(f"domain {number}", data)
        found.append(sums_of(pruner)["0.weight"])
    key = next(key for key in found[0] if key not in ("rows", "count"))
    apart, joint = found[0][key], found[1][key] * 2
    close = torch.allclose(apart, joint, rtol=1e-4, atol=1e-4)
    assert close is (name != "domains")


def test_rows_and_layers_are_different_groups() -> None:
    """Rows of weights 1, 2, 3, 4 on inputs of one size score 1, 4, 9, 16 times the same: as a matrix it loses its first two."""
    x = torch.where(torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) > 0, 1.0, -1.0)
    kept = {}
    for pattern in ("unstructured", "unstructured:row"):
        model = nn.Sequential(nn.Linear(8, 4, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.arange(1.0, 5.0)[:, None].expand(4, 8))
        manager = MaskManager(model, Targets(head=True), pattern)
        ContinualPruner(manager, 0.5).learn("a", [x])
        kept[pattern] = manager.masks["0.weight"].sum(1).tolist()
    assert kept == {"unstructured": [0, 0, 8, 8], "unstructured:row": [4, 4, 4, 4]}


@pytest.mark.parametrize("mode", ["accumulate", "fresh", "stasis", "joint"])
@pytest.mark.parametrize("in_files", [False, True])
def test_data_that_the_model_makes_is_made_by_the_base(mode: Any, in_files: bool, tmp_path: Path) -> None:
    """A policy plays its own calibration data; pruned for another domain it would show its failures, not its needs."""
    model = one_layer()
    dense = model[0].weight.detach().clone()
    manager = MaskManager(model, Targets(head=True), "unstructured")
    memory = Memory(mode=mode, folder=tmp_path / "kept" if in_files else None)
    pruner = ContinualPruner(manager, 0.5, criterion=SparseGPT(), memory=memory)
    pruner.learn("a", [domain(0, 3.0, 0.3)])
    pruned = model[0].weight.detach().clone()
    played = []

    def play(fails: bool) -> Any:
        played.append(model[0].weight.detach().clone())
        yield domain(16, 3.0, 0.3)
        if fails:
            raise DataError("the world has ended")

    with pytest.raises(DataError, match="the world has ended"):
        pruner.learn("b", play(fails=True))
    assert torch.equal(model[0].weight, pruned)
    pruner.learn("b", play(fails=False))
    assert [torch.equal(weight, pruned if mode == "stasis" else dense) for weight in played] == [True, True]
    assert manager.verify(strict=True).ok


def test_domains_weigh_the_same_whatever_their_size() -> None:
    model = one_layer()
    manager = MaskManager(model, Targets(head=True), "unstructured")
    pruner = ContinualPruner(manager, 0.5, criterion=Wanda())
    a, b = domain(0), domain(16)
    pruner.learn("a", [a])
    pruner.learn("b", [b[:40]], weight=3.0)
    squares = pruner.kept.sums.load("the model")["0.weight"]["squares"][0]
    torch.testing.assert_close(squares, a.square().mean(0) + 3 * b[:40].square().mean(0))


def test_decay_forgets_by_its_factor() -> None:
    model = one_layer()
    manager = MaskManager(model, Targets(head=True), "unstructured")
    pruner = ContinualPruner(manager, 0.5, criterion=Wanda(), memory=Memory(decay=0.25))
    for number in range(3):
        pruner.learn(str(number), [torch.full((2, 32), 2.0**number)])
    squares = pruner.kept.sums.load("the model")["0.weight"]["squares"]
    assert squares.unique().tolist() == [1 / 16 + 4 / 4 + 16]


# -- base weights, patterns, memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured:row", "block:2x4"])
@pytest.mark.parametrize("criterion", ["copal", "wanda", "sparsegpt", "magnitude"])
def test_base_weights_never_change_and_patterns_hold(criterion: str, pattern: str) -> None:
    model = llama()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    manager = MaskManager(model, pattern=pattern)
    pruner = ContinualPruner(manager, 0.5, criterion=criterion)
    for number in range(3):
        pruner.learn(f"domain {number}", windows(3, 6 + 3 * number))
        assert manager.verify(strict=True).sparsity == pytest.approx(0.5)
        for segment in pruner.kept.segments:
            for name, values in pruner.kept.base.load(segment).items():
                assert torch.equal(values["weight"], dense[name]), name
        for tensor in manager:
            if criterion != "sparsegpt":
                assert tensor.mask is not None
                assert torch.equal(tensor.target.parameter, dense[tensor.name] * tensor.mask)


@pytest.mark.parametrize("criterion", ["copal", "sparsegpt", "fisher"])
def test_files_are_as_good_as_memory(criterion: str, tmp_path: Path) -> None:
    found = []
    for folder in (None, tmp_path / "kept"):
        model = llama()
        manager = MaskManager(model, pattern="2:4")
        pruner = ContinualPruner(manager, criterion=criterion, memory=Memory(folder=folder))
        for number in range(3):
            pruner.learn(f"domain {number}", windows(3, 6 + 3 * number), loss=loss_of(model))
        found.append(dict(model.state_dict()))
        if folder is not None:
            assert sorted(p.name for p in (folder / "statistics").glob("[0-9]*")) == [
                "2",
                "3",
            ]  # the last and the one before it
    same_bits(found[0], found[1])


def test_shared_statistics_are_kept_once(tmp_path: Path) -> None:
    """Query, key and value have one matrix of their inputs."""
    manager = MaskManager(llama(), pattern="2:4")
    pruner = ContinualPruner(manager, criterion="sparsegpt", memory=Memory(folder=tmp_path))
    for name in "ab":
        pruner.learn(name, windows())
    content = pruner.kept.sums.load("model.layers.0")
    q, k, o = (content[f"model.layers.0.self_attn.{x}_proj.weight"]["outer"] for x in "qko")
    assert q is k
    assert q is not o


def test_bfloat16_halves_what_is_kept() -> None:
    manager = MaskManager(llama(), pattern="2:4")
    pruner = ContinualPruner(manager, memory=Memory(dtype="bfloat16"))
    pruner.learn("a", windows())
    values = [v for s in pruner.kept.segments for c in pruner.kept.sums.load(s).values() for v in c.values() if v.ndim]
    assert {v.dtype for v in values} == {torch.bfloat16}
    pruner.learn("b", windows(3))
    assert manager.verify(strict=True).ok


def test_a_model_in_bfloat16_keeps_float32_sums() -> None:
    sums = {}
    for dtype in (torch.bfloat16, torch.float32):
        manager = MaskManager(llama().to(torch.bfloat16).to(dtype), pattern="2:4")
        pruner = ContinualPruner(manager, memory=Memory(), streaming=Streaming(inputs="dense"))
        for name in "ab":
            pruner.learn(name, windows(6 if name == "a" else 3))
        assert all(t.target.parameter.dtype == dtype for t in manager)
        sums[dtype] = sums_of(pruner)
    for name, values in sums[torch.bfloat16].items():
        assert values["outer"].dtype == torch.float32
        # Not sums that were rounded to 8 bits on the way: these have all 24.
        assert not torch.equal(values["outer"], values["outer"].to(torch.bfloat16).float()), name
        off = (values["outer"] - sums[torch.float32][name]["outer"]).norm() / sums[torch.float32][name]["outer"].norm()
        assert off < 0.03, name


class Routed(nn.Module):
    """x goes to the expert that its first feature names; experts are slices of one tensor, or modules of their own."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        values = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.is_transposed, self.num_experts = False, 3  # what transformers says of fused experts
        if fused:
            self.weight = nn.Parameter(values)
        else:
            self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
            for expert, value in zip(self.experts, values, strict=True):
                expert.weight.data.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for index in range(3):
            chosen = x[:, 0] == index
            if bool(chosen.any()):
                given = x[chosen]
                made = (
                    nn.functional.linear(given, self.weight[index]) if hasattr(self, "weight") else self.experts[index](given)
                )
                y = y.index_put((chosen,), made)
        return y


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("criterion", [Wanda, Copal])
def test_experts_count_by_how_often_they_are_used(fused: bool, criterion: Any) -> None:
    """Domain a: 2 rows for expert 0, 1 for 1 and 2; domain b: 2 rows for expert 0, none for the others."""
    a = torch.tensor([[0.0, 3, 3, 6], [0, 1, 0, 2], [1, 1, 5, 5], [2, 4, 4, 4]])
    b = torch.tensor([[0.0, 2, 4, 0], [0, 4, 2, 2]])
    model = nn.Sequential(nn.ModuleDict({"moe": Routed(fused)})["moe"], nn.Identity())
    base = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    manager = MaskManager(model, Targets(head=True), "2:4")
    pruner = ContinualPruner(manager, criterion=criterion())
    pruner.learn("a", [a])
    report = pruner.learn("b", [b])
    names = [f"0.weight[{i}]" if fused else f"0.experts.{i}.weight" for i in range(3)]
    assert report.unseen == names[1:]
    found = [{k: v[0] for k, v in sums_of(pruner)[name].items() if v.ndim} for name in names]
    if criterion is Wanda:  # squares over 4 rows of a, and over 2 of b
        assert [values["squares"].tolist() for values in found] == [
            [0.0, (9 + 1) / 4 + (4 + 16) / 2, 9 / 4 + (16 + 4) / 2, (36 + 4) / 4 + 4 / 2],
            [1 / 4, 1 / 4, 25 / 4, 25 / 4],
            [4 / 4, 16 / 4, 16 / 4, 16 / 4],
        ]
    else:
        each = [
            [sum((w @ row).abs().outer(row.abs()) for row in rows if row[0] == i) for rows in (a, b)]
            for i, w in enumerate(base)
        ]
        for values, (of_a, of_b) in zip(found, each, strict=True):
            torch.testing.assert_close(values["outer"], of_a / 4 + of_b / 2)


class Ways(nn.Module):
    """Runs its blocks once or twice, and what is around them one way or the other."""

    way = "once"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        before, after = (self.last, self.first) if self.way == "swapped" else (self.first, self.last)
        x = before(x).tanh()
        for block in [*self.blocks] * (2 if self.way == "twice" else 1):
            x = block(x).tanh()
        return after(x)


@pytest.mark.parametrize(
    ("way", "told"),
    [
        (
            "twice",
            r"^the model was not measured by itself in the first domain \(but blocks\.0, blocks\.1, outside 0, \.\.\.\): ",
        ),
        ("swapped", r"^outside 0 holds other targets than in the first domain \(last\.weight, \.\.\.\): "),
    ],
)
def test_a_model_that_runs_another_way_is_told(way: str, told: str) -> None:
    """Segments are then others than those that base weights are kept of."""
    model = Ways()
    manager = MaskManager(model, Targets(head=True), "2:4")
    pruner = ContinualPruner(manager)
    pruner.learn("a", [torch.randn(6, 8)])
    before, masks = copy.deepcopy(model.state_dict()), dict(manager.masks)
    model.way = way
    with pytest.raises(MaskStateError, match=told + "the data runs the model another way"):
        pruner.learn("b", [torch.randn(6, 8)])
    same_bits(before, model.state_dict())
    same_bits(masks, manager.masks)
    model.way = "once"
    pruner.learn("b", [torch.randn(6, 8)])
    assert [learnt.name for learnt in pruner.domains] == ["a", "b"]


def test_an_expert_without_data_in_one_domain_keeps_what_it_had() -> None:
    model = copy.deepcopy(_MIXTRAL)
    manager = MaskManager(model, pattern="2:4")
    pruner = ContinualPruner(manager, criterion="wanda")
    pruner.learn("all", windows(6))
    one = torch.full((1, 6), 3)
    name = next(t.name for t in manager if t.target.layout.experts)
    segment = next(s for s, names in pruner.kept.segments.items() if name in names)
    before = pruner.kept.sums.load(segment)
    report = pruner.learn("one word", [one])
    after = pruner.kept.sums.load(segment)
    assert report.unseen
    idle = [n for n in report.unseen if n in before]
    assert idle
    for part in idle:
        assert torch.equal(before[part]["squares"], after[part]["squares"])


# -- ties ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-9, 9), st.booleans()), min_size=1, max_size=20))
def test_zero_scores_rank_by_who_was_alive_and_then_by_size(entries: list[tuple[int, int, bool]]) -> None:
    scores = torch.tensor([float(s) for s, _, _ in entries])
    weight = torch.tensor([float(w) for _, w, _ in entries])
    alive = torch.tensor([a for _, _, a in entries])
    found = ranked(scores, weight, alive)
    keys = [(s, a and s == 0, abs(w) if s == 0 else 0) for s, w, a in entries]
    for i, one in enumerate(keys):
        for j, other in enumerate(keys):
            if one < other:
                assert found[i] < found[j]
