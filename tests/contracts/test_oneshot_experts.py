"""Experts that are modules of their own: one that no sample reached is pruned by magnitude and told; what nobody uses is
refused while every weight is as it was.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

from sparsetrain.calibration import calibrate, siblings
from sparsetrain.calibration import layers as layers_module
from sparsetrain.criteria import RIA, SparseGPT, Wanda
from sparsetrain.errors import RecipeError, SparsetrainError, TargetError
from sparsetrain.masks import MaskManager, Override
from sparsetrain.oneshot import prune_oneshot
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

from .promises import same_bits

SPARSE = "encoder.block.1.layer.1.mlp.experts"


def switch() -> SwitchTransformersEncoderModel:
    """Four experts in its second block, of which the router prefers the first three whatever it is given."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_heads=2,
        num_experts=4,
        expert_capacity=64,
    )
    model = SwitchTransformersEncoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
        model.encoder.embed_tokens.weight[:, 0] = 9
        router = model.encoder.block[1].layer[1].mlp.router.classifier.weight
        router[:, 0] = torch.tensor([5.0, 5.0, 5.0, -50.0])
    return model


def tokens(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(32, (1, 16), generator=generator) for _ in range(count)]


def weights(model: nn.Module, which: str = "wi") -> list[Tensor]:
    return [model.get_parameter(f"{SPARSE}.expert_{i}.{which}.weight").detach().clone() for i in range(4)]


@pytest.mark.parametrize(
    ("criterion", "pattern"), [("wanda", "2:4"), ("wanda", "unstructured"), ("sparsegpt", "2:4"), ("sparsegpt", "unstructured")]
)
def test_an_expert_that_no_token_reached_is_told_and_pruned_by_magnitude(criterion: str, pattern: str) -> None:
    model = switch()
    before = weights(model)
    manager = MaskManager(model, pattern=pattern)
    report = prune_oneshot(manager, tokens(), 0.5, criterion=criterion)
    assert manager.verify(strict=True).ok
    assert {f"{SPARSE}.expert_3.{which}.weight" for which in ("wi", "wo")} <= set(report.unseen)
    assert {row.note for row in report.rows if row.name in report.unseen} == {"saw no data"}
    assert not any(row.note for row in report.rows if row.name not in report.unseen)
    lone = nn.Linear(16, 24, bias=False)
    lone.weight = nn.Parameter(before[3])
    by_size = MaskManager(lone, pattern=pattern)
    prune(by_size, 0.5)
    assert torch.equal(manager.masks[f"{SPARSE}.expert_3.wi.weight"], by_size.masks["weight"])
    torch.testing.assert_close(weights(model)[3], lone.weight.detach(), rtol=0, atol=1e-6)
    # One that tokens reached goes by what it was given too.
    reached = next(i for i in range(3) if f"{SPARSE}.expert_{i}.wi.weight" not in report.unseen)
    lone.weight = nn.Parameter(before[reached])
    by_size = MaskManager(lone, pattern=pattern)
    prune(by_size, 0.5)
    assert not torch.equal(manager.masks[f"{SPARSE}.expert_{reached}.wi.weight"], by_size.masks["weight"])


def test_without_siblings_the_same_model_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.oneshot.job.siblings", lambda model, tensors: [])
    model = switch()
    with pytest.raises(TargetError, match=r"cannot score .*expert_\d\.wi\.weight: no batch used.*Nothing was pruned"):
        prune_oneshot(MaskManager(model, pattern="2:4"), tokens())
    same_bits(switch().state_dict(), model.state_dict())


class Routed(nn.Module):
    """x goes to the expert that its first feature names; one list or dictionary of experts."""

    def __init__(self, experts: int = 3, named: bool = False) -> None:
        super().__init__()
        layers = [nn.Linear(4, 4, bias=False) for _ in range(experts)]
        self.experts: Any = nn.ModuleDict({f"e{i}": e for i, e in enumerate(layers)}) if named else nn.ModuleList(layers)
        self.empty = False

    def forward(self, x: Tensor) -> Tensor:
        y, items = torch.zeros_like(x), list(self.experts.values() if isinstance(self.experts, nn.ModuleDict) else self.experts)
        for index, expert in enumerate(items):
            chosen = x[:, 0] == index
            if self.empty or bool(chosen.any()):
                y = y.index_put((chosen,), expert(x[chosen]))
        return x + y * torch.tensor([0.0, 1.0, 1.0, 1.0])  # the first feature stays


def routed(named: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Routed(named=named), Routed(named=named))


#: Two rows for expert 0, one for expert 1, none for expert 2.
ROWS = torch.tensor([[0.0, 3.0, 3.0, 6.0], [0.0, 0.0, 0.0, 4.0], [1.0, 1.0, 5.0, 5.0]])


class Shown(Wanda):
    """Keeps the sums it scores by."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        self.kept[name] = self.memory[name]["squares"][0].clone()
        return super().score(weight, name=name, step=step)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_what_stands_for_the_missing_data_by_hand(named: bool, empty: bool) -> None:
    model, criterion = routed(named), Shown()
    for block in model:
        block.empty = empty  # an expert may be called with no rows at all
    report = prune_oneshot(MaskManager(model, Targets(head=True)), [ROWS], 0.5, criterion=criterion)
    e = "e" if named else ""
    assert criterion.kept[f"0.experts.{e}0.weight"].tolist() == [0.0, 9.0, 9.0, 52.0]
    assert criterion.kept[f"0.experts.{e}1.weight"].tolist() == [1.0, 1.0, 25.0, 25.0]
    # means of |x| over features: 3 and 1 for expert 0, 3 for expert 1; (9 + 1 + 9) / 2 experts
    torch.testing.assert_close(criterion.kept[f"0.experts.{e}2.weight"], torch.full((4,), 9.5))
    assert [name for name in report.unseen if name.startswith("0.")] == [f"0.experts.{e}2.weight"]


def test_masks_of_a_whole_model_at_once_follow_the_same_rule() -> None:
    model, criterion = nn.Sequential(routed(), nn.Linear(4, 2)), Wanda()
    manager = MaskManager(model)
    calibrate(manager, criterion, [ROWS], model)
    torch.testing.assert_close(criterion.memory["0.0.experts.2.weight"]["squares"][0], torch.full((4,), 9.5))


def test_who_is_a_sibling_of_whom() -> None:
    def names(model: nn.Module, **targets: Any) -> list[list[str]]:
        return siblings(model, MaskManager(model, Targets(head=True, **targets)))

    assert names(routed()) == [[f"{block}.experts.{i}.weight" for i in range(3)] for block in range(2)]
    # Blocks one behind the other, and layers with names of their own, are none.
    assert names(nn.ModuleDict({"h": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})["h"]) == []
    assert names(nn.Sequential(nn.ModuleDict({"q": nn.Linear(2, 2)}), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == []
    # Inner lists come first; nothing is imagined of a convolution's input.
    inner = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2)])
    assert names(nn.Sequential(inner, nn.Linear(2, 2))) == [
        ["0.0.0.weight", "0.0.1.weight"],
        ["0.1.0.weight", "0.1.1.weight"],
        ["0.0.0.weight", "0.1.0.weight"],
        ["0.0.1.weight", "0.1.1.weight"],
    ]
    assert names(nn.Sequential(nn.ModuleList([nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)]))) == []
    wrapped = nn.Module()
    wrapped._orig_mod = routed()
    assert names(wrapped) == names(routed())  # torch.compile puts its own word into names of modules


class Deaf(nn.Module):
    """A layer that no sample uses, beside one that all use; ``seldom`` uses it for a negative last feature."""

    def __init__(self, uses: bool = True, seldom: bool = False) -> None:
        super().__init__()
        self.used, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.uses, self.seldom = uses, seldom

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y + self.other(x) if self.uses or (self.seldom and bool((x[:, 3] < 0).any())) else y


def test_a_layer_that_nobody_uses_is_refused_while_all_is_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Deaf(), Deaf(), Deaf(uses=False))
    before, manager = copy.deepcopy(model.state_dict()), MaskManager(model, Targets(head=True), "2:4")
    with pytest.raises(TargetError, match=r"score 2\.other\.weight: no batch used its layer.*exclude.*Nothing was pruned"):
        prune_oneshot(manager, [torch.randn(2, 4) for _ in range(3)])
    assert not manager.masks
    same_bits(before, model.state_dict())
    kept = MaskManager(model, Targets(head=True), "2:4", {"2.other": Override(sparsity=0.0)})
    assert prune_oneshot(kept, [torch.randn(2, 4)]).unseen == []


def test_a_layer_that_only_the_last_sample_uses_is_found_in_time() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(Deaf(), Deaf(uses=False, seldom=True)), [torch.rand(1, 4) for _ in range(5)]
    with torch.no_grad():
        for layer in (model[0].used, model[0].other):
            layer.weight.copy_(torch.eye(4) + 0.01)  # what is negative stays so
            layer.bias.zero_()
    data[-1][0, 3] = -1
    report = prune_oneshot(MaskManager(copy.deepcopy(model), Targets(head=True)), data, 0.25)
    assert report.unseen == []
    with pytest.raises(TargetError, match=r"1\.other\.weight"):
        prune_oneshot(MaskManager(model, Targets(head=True)), data[:-1], 0.3)


def test_criteria_of_outputs_have_nothing_to_imagine() -> None:
    model = routed()
    with pytest.raises(SparsetrainError, match=r"cannot score 0\.experts\.2\.weight: no batch used"):
        prune_oneshot(MaskManager(model, Targets(head=True), "neurons"), [ROWS], 0.5, criterion="activation")
    same_bits(routed().state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", [Wanda, RIA, SparseGPT])
def test_a_rank_that_never_used_an_expert_takes_the_others_word(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two processes tell each other, with the other one's word made up: gate and up of expert 1 were seen there alone."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    model = nn.Sequential(nn.ModuleList([Gated(), Gated()]))
    manager, criterion = MaskManager(model, Targets(head=True)), kind()
    watches = []
    for rows in (torch.zeros(0, 4), torch.ones(3, 4)):
        criterion.reset()
        watch = layers_module.LayerWatch(list(manager), criterion, alike=siblings(model, manager))
        with watch.on(), watch.forward("batch 0"), torch.no_grad():
            for part, given in ((model[0][0], torch.ones(2, 4)), (model[0][1], rows)):
                if len(given):
                    part.gate(given)
                    part.up(given)
        watches.append((watch, criterion.memory))
    said: list[Any] = []
    watch, criterion.memory = watches[1]
    monkeypatch.setattr(layers_module, "agree", lambda problem, mine=None: said.append(mine) or [mine])
    watch.finish()
    other = iter(said)
    watch, criterion.memory = watches[0]
    criterion.memory |= {name: sums for name, sums in watches[1][1].items() if "0.1." in name}  # as summed over ranks
    monkeypatch.setattr(layers_module, "agree", lambda problem, mine=None: [mine, next(other)])
    assert watch.finish() == []


def test_a_pattern_over_several_layers_is_no_reason_to_refuse_experts_of_their_own() -> None:
    manager = MaskManager(switch(), pattern="block:4x4")
    assert prune_oneshot(manager, tokens(), 0.5, criterion="sparsegpt").unseen
    assert manager.verify(strict=True).ok
    with pytest.raises(RecipeError):
        prune_oneshot(MaskManager(switch(), pattern="neurons"), tokens(), 0.5, criterion="sparsegpt")


@pytest.mark.parametrize("allocation", ["global", "owl"])
def test_unseen_experts_are_not_the_first_to_go_in_a_common_budget(allocation: str) -> None:
    model = switch()
    manager = MaskManager(model, Targets(include=("experts",)))
    prune_oneshot(manager, tokens(), 0.5, allocation=allocation)
    lost = {name: float((~mask).float().mean()) for name, mask in manager.masks.items()}
    assert 0.1 < lost[f"{SPARSE}.expert_3.wi.weight"] < 0.9
    assert manager.verify(strict=True).ok
