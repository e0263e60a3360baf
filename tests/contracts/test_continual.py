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
from sparsetrain.criteria import Copal, Criterion, Fisher, OutputFisher, SparseGPT, Wanda
from sparsetrain.errors import DataError, DivergedError, MaskStateError, PatternError, RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.oneshot import Streaming
from sparsetrain.targets import Targets

from . import ranks as on
from .promises import same_bits
from .ranks import RANKS, Group
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
    """Why stasis is stasis: a weight of 0 has a score of exactly 0, whatever the data."""
    model = one_layer()
    manager = MaskManager(model, Targets(head=True), "unstructured")
    pruner = ContinualPruner(manager, 0.5, memory=Memory(mode="stasis"))
    pruner.learn("a", [domain(0)])
    criterion = Copal()
    calibrate(manager, criterion, [domain(16)], model)
    mask = manager["0.weight"].mask
    assert mask is not None
    assert float(criterion.score(model[0].weight.detach(), name="0.weight")[~mask].abs().max()) == 0


def test_the_same_domain_twice_changes_nothing() -> None:
    a = domain(0, 3.0, 0.3)
    kept = Learned(a, a)
    assert torch.equal(kept.masks[0], kept.masks[1])
    assert kept.pruner.domains[1].revived == 0


@pytest.mark.parametrize("name", CRITERIA)
def test_dense_streams_do_not_know_the_order(name: str) -> None:
    """What was accumulated of a, then b, is what was of b, then a."""
    found = []
    for order in (0, 1):
        model = llama()
        manager = MaskManager(model, pattern="unstructured:row")
        pruner = ContinualPruner(manager, 0.5, criterion=CRITERIA[name](), streaming=Streaming(inputs="dense"))
        data = [windows(4, 12), windows(6, 9)]
        for number in (order, 1 - order):
            pruner.learn(f"domain {number}", data[number])
        found.append({n: v for segment in pruner.kept.segments for n, v in pruner.kept.sums.load(segment).items()})
    for tensor, values in found[0].items():
        for key, value in values.items():
            torch.testing.assert_close(value, found[1][tensor][key], rtol=1e-4, atol=1e-6)


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
            assert sorted(p.name for p in (folder / "statistics").iterdir()) == ["2", "3"]  # the last and the one before it
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


# -- errors lose nothing -----------------------------------------------------------------------------------------------------


class Breaks(Wanda):
    """Fails in the middle of the second domain."""

    fail = False

    def rate(self, matrix: Tensor, name: str) -> Tensor:
        if self.fail and "layers.1.mlp.up" in name:
            raise DivergedError("in the middle")
        return super().rate(matrix, name)


@pytest.mark.parametrize("mode", ["accumulate", "fresh", "stasis", "joint"])
@pytest.mark.parametrize("in_files", [False, True])
def test_a_domain_that_fails_half_way_leaves_no_trace(mode: Any, in_files: bool, tmp_path: Path) -> None:
    runs = []
    for fails in (False, True):
        model = llama()
        manager = MaskManager(model, pattern="unstructured:row")
        criterion = Breaks()
        folder = tmp_path / str(fails) if in_files else None
        pruner = ContinualPruner(manager, 0.5, criterion=criterion, memory=Memory(mode=mode, folder=folder))
        for first in (True, False):
            if fails:
                before = {n: p.detach().clone() for n, p in model.named_parameters()}
                masks, changes = manager.masks, list(manager.changes)
                criterion.fail = True
                with pytest.raises(DivergedError, match=r"^in the middle$"):
                    pruner.learn("fails", windows(5, 7))
                criterion.fail = False
                same_bits(before, dict(model.named_parameters()))
                same_bits(masks, manager.masks)
                assert manager.changes == changes
            pruner.learn("a" if first else "b", windows(3, 8 if first else 12))
        runs.append(dict(model.state_dict()))
    same_bits(runs[0], runs[1])


def test_nan_activations_are_refused_and_undone() -> None:
    manager = MaskManager(one_layer(), Targets(head=True), "unstructured")
    pruner = ContinualPruner(manager, 0.5)
    pruner.learn("a", [domain(0)])
    before = manager.masks["0.weight"].clone()
    with pytest.raises(DivergedError, match=r"input of 0\.weight is not finite in the model, batch 0"):
        pruner.learn("b", [domain(16).clone().fill_(torch.nan)])
    assert torch.equal(manager.masks["0.weight"], before)
    assert [d.name for d in pruner.domains] == ["a"]


def test_bad_domains() -> None:
    model = one_layer()
    manager = MaskManager(model, Targets(head=True), "unstructured")
    pruner = ContinualPruner(manager, 0.5)
    with pytest.raises(DataError, match="a domain needs a name"):
        pruner.learn("", [domain(0)])
    with pytest.raises(DataError, match="criterion Copal needs data, and the calibration loader gives no batches"):
        pruner.learn("a", [])
    with pytest.raises(DataError, match="needs data: give batches"):
        pruner.learn("a")
    with pytest.raises(RecipeError, match=r"weight=0\.0; a positive number"):
        pruner.learn("a", [domain(0)], weight=0.0)
    assert manager.masks == {}
    pruner.learn("a", [domain(0)])
    with pytest.raises(DataError, match=r"domain 'a' was learned already \(so far: a\)"):
        pruner.learn("a", [domain(0)])
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(MaskStateError, match=r"changed since domain 'a' was learned.*call absorb\(\)"):
        pruner.learn("b", [domain(16)])


def test_refused_when_it_is_built() -> None:
    def make(**options: Any) -> ContinualPruner:
        return ContinualPruner(MaskManager(llama(), pattern=options.pop("pattern", "unstructured")), 0.5, **options)

    with pytest.raises(RecipeError, match="allocation Global gives every tensor another share in every domain"):
        make(allocation="global")
    with pytest.raises(RecipeError, match="criterion Movement watches training"):
        make(criterion="movement")
    with pytest.raises(RecipeError, match=r"memory\.mode='forget'; use one of accumulate, fresh, stasis, joint"):
        make(memory=Memory(mode="forget"))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"memory\.decay=0\.0: a factor in \(0, 1\]"):
        make(memory=Memory(decay=0.0))
    with pytest.raises(PatternError, match="divides by 16"):
        make(pattern="8:16")
    with pytest.raises(RecipeError, match="needs gradients: give loss"):
        make(criterion=Fisher()).learn("a", windows())


# -- training between domains, and going on ------------------------------------------------------------------------------------


def test_training_between_domains_is_taken_over() -> None:
    model = one_layer()
    manager = MaskManager(model, Targets(head=True), "unstructured")
    pruner = ContinualPruner(manager, 0.5, criterion=Wanda())
    pruner.learn("a", [domain(0)])
    assert pruner.absorb() == {}  # nothing was trained
    base = pruner.kept.base.load("the model")["0.weight"]["weight"].clone()
    mask = manager.masks["0.weight"]
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    drift = pruner.absorb()["0.weight"]
    now = pruner.kept.base.load("the model")["0.weight"]["weight"]
    assert torch.equal(now, torch.where(mask, 2 * base, base))
    assert drift == pytest.approx(float((base * mask).norm() / base.norm()), rel=1e-6)
    pruner.learn("b", [domain(16)])
    alive = manager.masks["0.weight"]
    assert torch.equal(model[0].weight.detach(), now * alive)


@pytest.mark.parametrize("criterion", ["copal", "sparsegpt", "fisher", "magnitude"])
@pytest.mark.parametrize("mode", ["accumulate", "joint"])
def test_another_process_goes_on_bit_for_bit(criterion: str, mode: Any, tmp_path: Path) -> None:
    def pruner_of(model: nn.Module, folder: Path | None) -> ContinualPruner:
        memory = Memory(mode=mode, folder=folder)
        return ContinualPruner(MaskManager(model, pattern="2:4"), criterion=criterion, memory=memory)

    for folder in (None, tmp_path / criterion):
        whole = llama()
        pruner = pruner_of(whole, folder)
        pruner.learn("a", windows(3, 8), loss=loss_of(whole))
        saved = copy.deepcopy((whole.state_dict(), pruner.manager.state_dict(), pruner.state_dict()))
        torch.save(saved[2], tmp_path / "state.pt")
        pruner.learn("b", windows(3, 12), loss=loss_of(whole))
        resumed = llama()
        resumed.load_state_dict(saved[0])
        later = pruner_of(resumed, folder)
        later.manager.load_state_dict(saved[1])
        later.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert [d.name for d in later.domains] == ["a"]
        later.learn("b", windows(3, 12), loss=loss_of(resumed))
        same_bits(dict(whole.state_dict()), dict(resumed.state_dict()))
        if mode == "accumulate" and criterion == "copal":
            forgetful = pruner_of(llama(), None)  # the twin that knows nothing of the first domain
            forgetful.learn("b", windows(3, 12))
            other = dict(forgetful.manager.model.state_dict())
            assert any(not torch.equal(other[name], value) for name, value in whole.state_dict().items())


def test_files_that_are_gone_are_told(tmp_path: Path) -> None:
    pruner = ContinualPruner(MaskManager(llama(), pattern="2:4"), memory=Memory(folder=tmp_path / "kept"))
    pruner.learn("a", windows())
    state = pruner.state_dict()
    other = ContinualPruner(MaskManager(llama(), pattern="2:4"))
    with pytest.raises(MaskStateError, match=r"kept in .*, and this run keeps it in main memory"):
        other.load_state_dict(state)
    for path in (tmp_path / "kept").rglob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(MaskStateError, match="cannot be read as what was learned"):
        pruner.learn("b", windows(3))
    for path in (tmp_path / "kept").rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(MaskStateError, match=r"is not at .* any more"):
        pruner.load_state_dict(state)


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


# -- two ranks -----------------------------------------------------------------------------------------------------------------


def learned(rank: int, ranks: int, wrap: on.Wrap) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)))
    manager = MaskManager(model, Targets(head=True), "unstructured:row")
    pruner = ContinualPruner(manager, 0.5, criterion=Copal(), streaming=Streaming(batch=400))
    for name, x in (("a", domain(0, 3.0, 0.3)), ("b", domain(16, 3.0, 0.3))):
        pruner.learn(name, [x[rank::ranks]])
    return {t.name: t.full_mask() for t in manager}


def work(folder: Path) -> dict[str, Tensor]:
    return learned(torch.distributed.get_rank(), RANKS, on.ddp)


def test_two_ranks_are_one(tmp_path: Path) -> None:
    first, second = Group(work, tmp_path).results()
    same_bits(first, second)
    one = learned(0, 1, on.alone)
    for name, mask in one.items():
        assert int((mask != first[name]).sum()) <= 2, name  # sums in another order
