"""What a model costs without some units, and which units go: numbers to be done in the head."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsetrain.structure import compact, find_structure
from sparsetrain.structure.budget import Budget, alike, positions
from sparsetrain.structure.groups import CoupledGroup


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def none(groups: list[CoupledGroup]) -> dict[str, Tensor]:
    return {group.name: torch.zeros(group.units, dtype=torch.bool) for group in groups}


def test_rows_and_columns_multiply() -> None:
    net = mlp(4, 6, 5, 2)
    groups = find_structure(net, torch.ones(1, 4)).of_kind("neuron")
    budget = Budget(net, groups)
    assert budget.full == (4 * 6 + 6) + (6 * 5 + 5) + 5 * 2  # the last bias is of no unit
    assert budget.cost({"0": 2, "2": 1}) == (4 * 4 + 4) + (4 * 4 + 4) + 4 * 2
    assert budget.saved(none(groups)) == {"0": 4 + 1 + 5, "2": 6 + 1 + 2}
    assert budget.gone(none(groups) | {"2": torch.ones(5, dtype=torch.bool)}) == pytest.approx((30 + 5 + 10) / 75)


def test_a_convolution_counts_for_every_position() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2), nn.Flatten(), nn.Linear(3 * 9, 5)
    )
    image = torch.ones(1, 2, 7, 7)
    used = positions(net, lambda: net(image))
    assert used == {"0.weight": 49, "2.weight": 9, "4.weight": 1}
    groups = find_structure(net, image).of_kind("filter")
    budget = Budget(net, groups, used)
    assert budget.full == 49 * 4 * 2 * 9 + 9 * 3 * 4 * 9 + 27 * 5
    assert budget.cost({"2": 1}) == 49 * 4 * 2 * 9 + 9 * 2 * 4 * 9 + 18 * 5


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 5), min_size=3, max_size=3), st.integers(0, 10**6))
def test_it_costs_what_the_compact_model_has(counts: list[int], seed: int) -> None:
    net = mlp(5, 6, 7, 6, 3)
    structure = find_structure(net, torch.ones(1, 5))
    groups = structure.of_kind("neuron")
    budget = Budget(net, groups)
    generator = torch.Generator().manual_seed(seed)
    dead = {g.name: torch.randperm(g.units, generator=generator) < count for g, count in zip(groups, counts, strict=True)}
    tensors = dict(net.named_parameters())
    for group in groups:
        for slot in group.slots:
            tensors[slot.tensor].data.index_fill_(slot.dim, slot.index[dead[group.name]].flatten(), 0.0)
    compact(net, structure, dead, torch.ones(1, 5))
    assert budget.cost({name: int(units.sum()) for name, units in dead.items()}) == sum(p.numel() for p in net.parameters()) - 3


def test_the_least_worth_for_its_cost_goes_first() -> None:
    net = mlp(4, 6, 5, 2)
    groups = find_structure(net, torch.ones(1, 4)).of_kind("neuron")
    budget = Budget(net, groups)
    # A unit of "0" saves 10 and one of "2" saves 9; when one of "2" has gone, a unit of "0" saves 9.
    scores = {"0": torch.tensor([5.0, 1.0, 5.0, 5.0, 5.0, 5.0]), "2": torch.tensor([0.85, 5.0, 5.0, 5.0, 0.8])}

    def gone(share: float, dead: dict[str, Tensor]) -> tuple[list[int], ...]:
        return tuple(units.nonzero().flatten().tolist() for units in budget.choose(scores, dead, share).values())

    assert gone(9 / 75, none(groups)) == ([], [4])  # 0.8 / 9 against 1 / 10
    assert gone(18 / 75, none(groups)) == ([], [0, 4])  # 0.85 / 9 against 1 / 9
    assert gone(19 / 75, none(groups)) == ([1], [0, 4])
    other = none(groups) | {"2": torch.tensor([False, True, False, False, False])}
    assert gone(9 / 75, other) == ([], [1])  # that is gone already


def test_nothing_falls_below_the_least() -> None:
    net = mlp(4, 6, 5, 2)
    groups = find_structure(net, torch.ones(1, 4)).of_kind("neuron")
    scores = {group.name: torch.arange(group.units).float() for group in groups}
    chosen = Budget(net, groups).choose(scores, none(groups), 1.0, at_least=2)
    assert {name: (~units).nonzero().flatten().tolist() for name, units in chosen.items()} == {"0": [4, 5], "2": [3, 4]}


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.floats(0.05, 0.9), st.integers(0, 10**6))
def test_groups_alike_lose_alike_and_leave_multiples(multiple: int, share: float, seed: int) -> None:
    net = mlp(4, 12, 12, 12, 2)
    groups = find_structure(net, torch.ones(1, 4)).of_kind("neuron")
    assert alike(groups) == [["0", "2", "4"]]
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(group.units, generator=generator) for group in groups}
    chosen = Budget(net, groups).choose(scores, none(groups), share, 1, alike(groups), multiple)
    left = {12 - int(units.sum()) for units in chosen.values()}
    assert len(left) == 1
    assert left == {12} or left.pop() % multiple == 0
    for name, units in chosen.items():
        assert units.sum() == 0 or scores[name][units].max() < scores[name][~units].min()


def test_alike_needs_one_kind_and_size() -> None:
    groups = find_structure(mlp(4, 12, 8, 12, 2), torch.ones(1, 4)).of_kind("neuron")
    assert alike(groups) == [["0", "4"], ["2"]]
