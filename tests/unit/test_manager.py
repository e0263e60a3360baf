"""MaskManager: adopting zeros, proving promises, overrides, memory, and everything it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsetrain.errors import PatternError, SparsetrainError, TargetError
from sparsetrain.masks import MaskedTensor, MaskManager, Override
from sparsetrain.patterns import NM, Block, Slices
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

ALL = Targets(head=True)
PATTERNS = ["unstructured", "unstructured:row", "2:4", "1:4", "block:2x4", "neurons", "channels"]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def zeros_of(model: nn.Module) -> dict[str, list[bool]]:
    return {n: (p == 0).flatten().tolist() for n, p in model.named_parameters() if p.ndim > 1}


def sparse_net(pattern: str = "unstructured", sparsity: float | None = 0.5) -> nn.Sequential:
    """A model somebody else pruned: plain zeros, no manager left."""
    model = net()
    manager = MaskManager(model, pattern=pattern)
    prune(manager, None if ":" in pattern and pattern[0].isdigit() else sparsity)
    manager.detach()
    return model


@pytest.mark.parametrize("pattern", PATTERNS)
def test_adopt_makes_the_zeros_masks(pattern: str) -> None:
    model = sparse_net(pattern)
    before, zeros = {n: p.clone() for n, p in model.named_parameters()}, zeros_of(model)
    manager = MaskManager.adopt(model, pattern)
    assert {n: (~m).flatten().tolist() for n, m in manager.masks.items()} == {n: zeros[n] for n in manager.masks}
    assert list(manager.masks) == ["0.weight", "2.weight"]
    assert manager.unclaimed == {}
    assert manager.verify(strict=True).ok
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert manager.sparsity() == (0.75 if pattern == "1:4" else 0.5)
    assert {c.why for c in manager.changes} == {"adopt"}


def test_adopted_zeros_survive_training_and_without_a_manager_they_do_not() -> None:
    def train(keep: bool) -> bool:
        model = sparse_net()
        zeros = zeros_of(model)["0.weight"]
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        if keep:
            MaskManager.adopt(model).attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 8)).pow(2).sum().backward()
            optimizer.step()
        return zeros_of(model)["0.weight"] == zeros

    assert train(keep=True)
    assert not train(keep=False)


def test_adopt_handles_a_layer_that_stores_inputs_first() -> None:
    model = nn.Sequential(Conv1D(6, 8), Conv1D(8, 6))
    manager = MaskManager(model, Targets(include="^0"), "2:4")
    prune(manager)
    # groups of 4 inputs lie along dim 0 of the stored (in, out)
    assert (model[0].weight.view(2, 4, 6) == 0).sum(1).unique().tolist() == [2]
    adopted = MaskManager.adopt(model, "2:4", Targets(include="^0"))
    assert torch.equal(adopted["0.weight"].mask, manager["0.weight"].mask)


@pytest.mark.parametrize(
    ("declared", "says"),
    [("2:4", ["0.weight", "32 zeros", "2:4", "declare another pattern", "exclude"]), ("1:4", ["0.weight", "1:4"])],
)
def test_a_wrong_pattern_is_refused_by_name(declared: str, says: list[str]) -> None:
    with pytest.raises(PatternError) as caught:
        MaskManager.adopt(sparse_net("unstructured"), declared)
    assert [text for text in says if text not in str(caught.value)] == []
    # twin: the pattern the zeros have is taken
    assert MaskManager.adopt(sparse_net(declared), declared).verify().ok


def test_adopt_refuses_zeros_that_cannot_be_the_pattern() -> None:
    odd = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 2))
    with torch.no_grad():
        odd[0].weight[:, 0] = 0
    with pytest.raises(PatternError, match=r"0\.weight: its 4 zeros cannot be adopted as 2:4: .*divides by 4.*10"):
        MaskManager.adopt(odd, "2:4")
    with torch.no_grad():
        odd[0].weight.zero_()
    with pytest.raises(PatternError, match=r"0\.weight is zero throughout.*targets\.exclude"):
        MaskManager.adopt(odd)


def test_what_is_not_claimed_is_told() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[:, :2] = 0  # 1 of the 2 pruned in every other group, and the pattern holds
        model[0].weight[:, 4:6] = 0
        model[0].weight[0, 2] = 0  # a third zero in a group of 2:4
        model[4].weight[:, :2] = 0  # the head, which is no target
    manager = MaskManager.adopt(model, "2:4")
    assert manager.unclaimed == {
        "0.weight": "1 more zeros than the pattern 2:4 holds stay free to train",
        "2.weight": "has no zeros, stays dense",
        "4.weight": "is 25% zero but no target: the output head (targets.head: true prunes it)",
    }
    assert list(manager.masks) == ["0.weight"]


@pytest.mark.parametrize("strays", [1, 2, 3])
def test_a_hundredth_of_stray_zeros_is_told_and_more_is_refused(strays: int) -> None:
    """200 weights: 2 zeros are 1 %."""
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 4))
    with torch.no_grad():
        model[0].weight.view(-1)[:strays] = 0
    if strays == 3:
        with pytest.raises(PatternError, match=r"0\.weight: its 3 zeros hold no 2:4|0\.weight: its 3 zeros are no 2:4"):
            MaskManager.adopt(model, "2:4")
        return
    manager = MaskManager.adopt(model, "2:4", Targets(include=("^0",)))
    assert manager.unclaimed == {"0.weight": f"{strays} stray zeros are no 2:4, stays dense"}
    assert manager.masks == {}


def test_what_is_not_claimed_is_told_of_a_compiled_model_too() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = model[4].weight[0, 0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on its first import of the compiler
        compiled = torch.compile(model)
    assert MaskManager.adopt(compiled).unclaimed == MaskManager.adopt(model).unclaimed != {}


# -- verify --------------------------------------------------------------------------------------------------------------


def trained() -> tuple[nn.Sequential, MaskManager, nn.Sequential]:
    """A pruned model after a step of Adam, and an averaged copy of it."""
    model, copy = net(), net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    manager = MaskManager(model).attach(optimizer).follow(copy)
    prune(manager, 0.5)
    manager.enforce()
    model(torch.ones(4, 8)).pow(2).sum().backward()
    optimizer.step()
    return model, manager, copy


def dead_at(manager: MaskManager) -> tuple[int, ...]:
    mask = manager["2.weight"].mask
    assert mask is not None
    return tuple((~mask).nonzero()[0].tolist())


def revive(model: nn.Sequential, manager: MaskManager, copy: nn.Sequential) -> None:
    model[2].weight[dead_at(manager)] = 1e-30


def revive_as_nan(model: nn.Sequential, manager: MaskManager, copy: nn.Sequential) -> None:
    model[2].weight[dead_at(manager)] = torch.nan


def break_mask(model: nn.Sequential, manager: MaskManager, copy: nn.Sequential) -> None:
    manager["2.weight"].mask[dead_at(manager)] = True  # type: ignore[index]


def diverge(model: nn.Sequential, manager: MaskManager, copy: nn.Sequential) -> None:
    model[2].weight[manager["2.weight"].mask] = torch.inf  # type: ignore[index]


def revive_copy(model: nn.Sequential, manager: MaskManager, copy: nn.Sequential) -> None:
    copy[2].weight[dead_at(manager)] = 1.0


def remember(model: nn.Sequential, manager: MaskManager, copy: nn.Sequential) -> None:
    manager.optimizers[0][0].state[model[2].weight]["exp_avg"][dead_at(manager)] = 1.0


@pytest.mark.parametrize(
    ("sabotage", "says"),
    [
        (revive, "1 pruned weights are not zero"),
        (revive_as_nan, "1 pruned weights are not zero"),
        (break_mask, "the mask breaks its pattern: 31 weights are pruned, exactly 32"),
        (diverge, "the weights hold NaN or infinity"),
        (revive_copy, "1 pruned weights of an averaged copy are not zero"),
        (remember, "1 pruned entries of optimizer state 'exp_avg' are not zero"),
    ],
)
def test_verify_finds_a_broken_promise(sabotage: Callable[..., None], says: str) -> None:
    model, manager, copy = trained()
    assert manager.verify(strict=True).ok  # twin: untouched, every promise holds
    with torch.no_grad():
        sabotage(model, manager, copy)
    found = manager.verify()
    assert not found.ok
    assert [problem.startswith(f"2.weight: {says}") for problem in found.problems] == [True]
    assert [row.ok for row in found.rows] == [True, False]
    with pytest.raises(PatternError, match=rf"2\.weight: {says}"):
        manager.verify(strict=True)


def test_the_table_of_a_verification() -> None:
    manager = MaskManager(net(), overrides={"^2": Override(sparsity=0.25)})
    prune(manager, 0.75)
    found = manager.verify()
    assert [(r.name, r.shape, r.asked, r.actual, r.kept) for r in found.rows] == [
        ("0.weight", (8, 8), 0.75, 0.75, 16),
        ("2.weight", (8, 8), 0.25, 0.25, 48),
    ]
    assert found.sparsity == manager.sparsity() == 0.5
    header, first, second = str(found).splitlines()
    assert header.split() == ["tensor", "pattern", "asked", "actual", "kept", "verified"]
    assert first.split() == ["0.weight", "unstructured", "0.7500", "0.7500", "16", "yes"]
    assert second.split()[0] == "2.weight"


# -- overrides -----------------------------------------------------------------------------------------------------------


def test_overrides_change_pattern_and_sparsity_by_name() -> None:
    overrides = {"^0": Override(pattern="2:4"), "^2": Override(sparsity=0), "4": Override(NM(1, 4))}
    manager = MaskManager(net(), ALL, "neurons", overrides)
    assert [str(t.pattern) for t in manager] == ["2:4", "neurons", "1:4"]
    prune(manager)
    assert {n: Fraction(*c) for n, c in manager.counts().items()} == {
        "0.weight": Fraction(1, 2),
        "2.weight": 0,
        "4.weight": Fraction(3, 4),
    }
    assert manager["2.weight"].mask is None
    assert manager.verify(strict=True).ok
    # twin: without overrides all three are one pattern
    assert {str(t.pattern) for t in MaskManager(net(), ALL, "neurons")} == {"neurons"}


def test_the_first_override_that_matches_wins() -> None:
    overrides = {"^0": Override(pattern="2:4"), "weight": Override(pattern="neurons", sparsity=0.25)}
    manager = MaskManager(net(), overrides=overrides)
    assert [(str(t.pattern), t.goal) for t in manager] == [("2:4", None), ("neurons", 0.25)]


def test_a_tensor_left_dense_need_not_fit_the_pattern() -> None:
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    manager = MaskManager(model, pattern="2:4", overrides={"^0": Override(sparsity=0)})
    prune(manager)
    assert manager.verify(strict=True).ok
    again = MaskManager(model, pattern="2:4", overrides={"^0": Override(sparsity=0)})
    again.load_state_dict(manager.state_dict())
    assert list(again.masks) == ["1.weight"]


# -- changing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_costs_one_byte_a_weight_and_nothing_while_dense(pattern: str) -> None:
    manager = MaskManager(net(), ALL, pattern)
    assert manager.masks == {}
    prune(manager) if NM is type(manager["0.weight"].pattern) else prune(manager, 0.5)
    for name, mask in manager.masks.items():
        assert mask.untyped_storage().nbytes() == manager[name].target.parameter.numel(), name
        assert mask.dtype == torch.bool


def test_pruned_weights_stay_pruned_until_the_sparsity_falls() -> None:
    manager = MaskManager(net(), Targets(include="^0"))
    [first] = prune(manager, 0.5, step=3, why="round 1")
    assert (first.step, first.tensor, first.died, first.grew, first.why) == (3, "0.weight", 32, 0, "round 1")
    dead = ~manager.masks["0.weight"]
    backwards = -torch.arange(64.0).view(8, 8)
    change = manager.update("0.weight", 0.75, backwards)
    assert (change.died, change.grew) == (16, 0)
    assert not (dead & manager.masks["0.weight"]).any()
    change = manager.update("0.weight", 0.25, backwards)
    assert (change.died, change.grew) == (0, 32)
    assert len(manager.changes) == 3


def test_written_values_are_masked() -> None:
    model = net()
    manager = MaskManager(model)
    prune(manager, 0.5)
    manager.write("0.weight", torch.ones(8, 8))
    assert torch.equal(model[0].weight, manager.masks["0.weight"].float())


def test_a_mask_that_is_not_the_pattern_is_not_installed() -> None:
    model = net()
    manager = MaskManager(model)
    prune(manager, 0.5)
    before, mask = model[0].weight.clone(), manager.masks["0.weight"].clone()
    with pytest.raises(PatternError):
        manager.install("0.weight", torch.zeros(8, 8, dtype=torch.bool), 0.5)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(manager.masks["0.weight"], mask)


@pytest.mark.parametrize(
    ("broken", "kind", "says"),
    [
        (lambda: MaskManager(net(), overrides={"fc9": Override("2:4")}), TargetError, ["override 'fc9'", "no target"]),
        (lambda: MaskManager(net(), overrides={"0.weigth": Override("2:4")}), TargetError, ["Did you mean '0.weight'"]),
        (lambda: MaskManager(net(), overrides={"4": Override("2:4")}), TargetError, ["override '4'"]),
        (lambda: MaskManager(net(), overrides={"(": Override("2:4")}), TargetError, ["overrides", "'('", "regular"]),
        (lambda: MaskManager(net(), overrides={"0": Override("5:4")}), PatternError, ["5:4"]),
        (lambda: Override(sparsity=1.5), PatternError, ["1.5", "[0, 1)"]),
        (lambda: MaskManager(net(), pattern="2-4"), PatternError, ["'2-4'", "2:4"]),
        (lambda: MaskManager(net())["0.weights"], TargetError, ["'0.weights'", "Did you mean '0.weight'"]),
        (
            lambda: MaskManager(net()).update("0.weight", 0.5, torch.ones(2, 2)),
            TargetError,
            ["0.weight", "(2, 2)", "(8, 8)"],
        ),
        (
            lambda: MaskManager(net()).update("0.weight", 0.5, torch.full((8, 8), torch.nan)),
            PatternError,
            ["0.weight", "NaN"],
        ),
        (lambda: MaskManager(net()).follow(nn.Linear(2, 2)), TargetError, ["Linear", "another model"]),
        (lambda: prune(MaskManager(net())), PatternError, ["0.weight", "how sparse", "0.9"]),
        (lambda: prune(MaskManager(net(), pattern="2:4"), 0.6), PatternError, ["0.weight", "2:4", "0.6"]),
        (
            lambda: prune(MaskManager(net(), ALL, Slices(0)), 0.3),
            PatternError,
            ["4.weight", "neurons", "2 units", "0.3"],
        ),
        (lambda: prune(MaskManager(net(), ALL, Block(9, 9)), 0.5), PatternError, ["0.weight", "block:9x9", "smaller"]),
    ],
)
def test_errors_name_the_value_and_the_way_out(
    broken: Callable[[], Any], kind: type[SparsetrainError], says: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        broken()
    assert [text for text in says if text not in str(caught.value)] == []


def test_masks_go_where_the_model_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved() -> MaskManager:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        manager = MaskManager(model, pattern="2:4")
        prune(manager, 0.5)
        model.to("meta")  # as good as a GPU: tensors of two devices do not meet
        return manager

    manager = moved()
    manager.enforce()
    assert {mask.device.type for mask in manager.masks.values()} == {"meta"}
    monkeypatch.setattr(MaskedTensor, "go_along", lambda self: None)
    assert {mask.device.type for mask in moved().masks.values()} == {"cpu"}
