"""What continual pruning keeps: errors lose nothing, training is taken over, another process goes on, a folder is one run's."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.continual import ContinualPruner, Memory
from sparsetrain.criteria import Copal, Fisher, Wanda
from sparsetrain.errors import DataError, DivergedError, MaskStateError, PatternError, RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.targets import Targets

from .promises import same_bits
from .test_continual import domain, loss_of, one_layer
from .test_oneshot import llama, windows

# -- errors lose nothing ------------------------------------------------------------------------------------------------------


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


# -- training between domains, and going on -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("mode", ["accumulate", "fresh", "stasis"])
@pytest.mark.parametrize("in_files", [False, True])
def test_weights_that_have_diverged_are_not_taken_over(mode: Any, in_files: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
    memory = Memory(mode=mode, folder=tmp_path if in_files else None)
    pruner = ContinualPruner(MaskManager(model, Targets(head=True), "2:4"), memory=memory)
    pruner.learn("a", [domain(0)])
    good = copy.deepcopy(model.state_dict())
    kept = copy.deepcopy([pruner.kept.base.load(segment) for segment in pruner.kept.segments])
    with torch.no_grad():
        model[0].weight.mul_(2.0)
        model[1].weight[0, 0] = torch.inf
    with pytest.raises(
        DivergedError, match=r"1\.weight holds NaN or infinity after training on domain 'a': nothing was taken over"
    ):
        pruner.absorb()
    for was, segment in zip(kept, pruner.kept.segments, strict=True):
        assert {n: v["weight"].tolist() for n, v in was.items()} == {
            n: v["weight"].tolist() for n, v in pruner.kept.base.load(segment).items()
        }
    model.load_state_dict(good)
    assert pruner.absorb() == {}
    pruner.learn("b", [domain(16)])


def test_running_statistics_are_no_change_of_the_model() -> None:
    """Every forward pass in training mode moves them; parameters that move are told."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    pruner = ContinualPruner(MaskManager(model, Targets(head=True), "2:4"))
    pruner.learn("a", [domain(0)])
    model.train()(domain(0))
    assert pruner.absorb() == {}
    pruner.learn("b", [domain(16)])
    with torch.no_grad():
        model[1].weight += 1
    with pytest.raises(MaskStateError, match="the model was changed since domain 'b' was learned"):
        pruner.learn("c", [domain(8)])


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


@pytest.mark.parametrize(("back", "told"), [(2, None), (1, "is not at .* any more")])
def test_a_checkpoint_from_before_the_end_of_a_fit_goes_on(back: int, told: str | None, tmp_path: Path) -> None:
    """Learn, train, absorb, learn, and then a kill: the newest checkpoint may be the one before `absorb`."""

    def finished(pruner: ContinualPruner, model: nn.Sequential) -> dict[str, Tensor]:
        with torch.no_grad():
            model[0].weight.mul_(2.0)
            model[1].weight.mul_(0.5)
        pruner.absorb()
        pruner.learn("b", [domain(16, 3.0, 0.3)])
        return copy.deepcopy(dict(model.state_dict()))

    def pruner_of(model: nn.Module) -> ContinualPruner:
        pruner = ContinualPruner(MaskManager(model, Targets(head=True), "2:4"), memory=Memory(folder=tmp_path / "kept"))
        pruner.kept.base.back = back  # 1: the twin
        return pruner

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
    pruner = pruner_of(model)
    pruner.learn("a", [domain(0, 3.0, 0.3)])
    saved = copy.deepcopy((model.state_dict(), pruner.manager.state_dict(), pruner.state_dict()))
    whole = finished(pruner, model)
    for _ in range(2):  # killed and gone on with twice: what the first time has left is in the way of the second
        resumed = copy.deepcopy(model)
        resumed.load_state_dict(saved[0])
        later = pruner_of(resumed)
        later.manager.load_state_dict(saved[1])
        if told:
            with pytest.raises(MaskStateError, match=told):
                later.load_state_dict(saved[2])
            return
        later.load_state_dict(saved[2])
        same_bits(whole, finished(later, resumed))


def test_a_folder_is_of_one_run_alone(tmp_path: Path) -> None:
    def pruner_of(folder: str) -> ContinualPruner:
        return ContinualPruner(MaskManager(llama(), pattern="2:4"), memory=Memory(folder=tmp_path / folder))

    random = torch.get_rng_state()
    first, second = pruner_of("one"), pruner_of("two")
    first.learn("a", windows())
    second.learn("a", windows(3))
    assert torch.equal(torch.get_rng_state(), random)
    kept = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    intruder = pruner_of("one")
    with pytest.raises(
        RecipeError, match=r"memory\.folder: .*one/base holds what another run has learned.*give another folder"
    ):
        intruder.learn("a", windows())
    assert intruder.manager.masks == {}
    with pytest.raises(MaskStateError, match=r"two/base holds what another run has learned, not the one that wrote this"):
        pruner_of("two").load_state_dict(first.state_dict())
    assert kept == {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    first.learn("b", windows(3))
    # A copy of the folder, beside a copy of the checkpoint, is as good.
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    moved = pruner_of("moved")
    moved.manager.model.load_state_dict(first.manager.model.state_dict())
    moved.manager.load_state_dict(first.manager.state_dict())
    moved.load_state_dict(first.state_dict())
    for pruner in (first, moved):
        pruner.learn("c", windows(4))
    same_bits(dict(first.manager.model.state_dict()), dict(moved.manager.model.state_dict()))
    # Its folder given away while it is at work.
    shutil.rmtree(tmp_path / "one")
    pruner_of("one").learn("a", windows())
    with pytest.raises(RecipeError, match=r"one/base holds what another run has learned"):
        first.learn("d", windows())


def test_a_first_domain_that_fails_leaves_its_folder_free(tmp_path: Path) -> None:
    def pruner_of() -> ContinualPruner:
        return ContinualPruner(MaskManager(llama(), pattern="2:4"), memory=Memory(folder=tmp_path))

    failing = pruner_of()
    with torch.no_grad():
        failing.manager.model.model.layers[2].mlp.up_proj.weight[0, 0] = 1e38
        failing.manager.model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
    with pytest.raises(DivergedError):
        failing.learn("a", windows())
    pruner_of().learn("a", windows())
    assert list((tmp_path / "base").glob("[0-9]*"))


@pytest.mark.parametrize(
    ("other", "memory", "told"),
    [
        (Wanda(), Memory(), "is of criterion 'Copal', and this run has 'Wanda'"),
        (Copal(abs_order="final"), Memory(), "is of criterion.abs_order 'token', and this run has 'final'"),
        (Copal(), Memory(mode="fresh"), "is of memory.mode 'accumulate', and this run has 'fresh'"),
        (Copal(batches=3), Memory(decay=0.5), None),  # how much is looked at, and how long it counts, may change
    ],
)
def test_statistics_of_another_kind_are_told(other: Any, memory: Memory, told: str | None) -> None:
    pruner = ContinualPruner(MaskManager(llama(), pattern="2:4"), criterion=Copal())
    pruner.learn("a", windows())
    later = ContinualPruner(MaskManager(llama(), pattern="2:4"), criterion=other, memory=memory)
    if told is None:
        later.load_state_dict(pruner.state_dict())
        assert [learnt.name for learnt in later.domains] == ["a"]
        return
    with pytest.raises(MaskStateError, match=f"what was learned {told}.*start again from the first domain"):
        later.load_state_dict(pruner.state_dict())
    assert later.domains == []
    assert later.kept.segments == {}


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
