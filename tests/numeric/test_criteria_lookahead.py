"""Lookahead's neighbours: found along the data, checked by how far the whole linear map moves; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from sparsetrain.criteria import Known, Lookahead
from sparsetrain.criteria.lookahead import chains
from sparsetrain.errors import RecipeError, TargetError
from sparsetrain.masks import MaskManager
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets


def bound(model: nn.Module, **targets: Any) -> tuple[Lookahead, list[str]]:
    manager, criterion = MaskManager(model, Targets(**({"head": True} | targets))), Lookahead()
    criterion.prepare(manager.model, [Known.of(t) for t in manager])
    return criterion, [t.name for t in manager]


def moved(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """How far the linear map x -> output moves (Frobenius norm) when each weight of a tensor goes."""
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def jacobian(weight: Tensor) -> Tensor:
        return jacrev(lambda x: functional_call(model, weights | {name: weight}, (x,)))(x)  # type: ignore[no-any-return]

    whole, found = jacobian(weights[name]), torch.zeros_like(weights[name])
    for index in range(found.numel()):
        less = weights[name].clone()
        less.view(-1)[index] = 0
        found.view(-1)[index] = (whole - jacobian(less)).norm()
    return found


LINEAR = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 6), nn.Identity(), nn.Linear(6, 3)), (1, 4)),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 8, 1, groups=4)),
        (1, 4, 1, 1),
    ),
    "flattened": (lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(4, 3)), (1, 2, 1)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_score_is_how_far_the_product_of_the_neighbours_moves(name: str) -> None:
    build, shape = LINEAR[name]
    torch.manual_seed(5)
    model = build().double().eval()
    criterion, names = bound(model)
    # of three layers the middle one has all the others for neighbours
    found = criterion.score(model.get_parameter(names[1]).detach(), name=names[1])
    expected = moved(model, names[1], torch.zeros(shape).double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found, model.get_parameter(names[1]).detach().abs())


class LeNet(nn.Module):
    """Functions, pooling, batch norm and a flattening that asks for the batch size."""

    def __init__(self, flatten: str = "view") -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(3 * 4, 5), nn.Linear(5, 2)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.norm(self.conv1(x)), 2))
        x = torch.tanh(self.conv2(x)).contiguous()
        x = {
            "view": lambda: x.view(x.size(0), -1),
            "reshape": lambda: x.reshape(x.shape[0], -1),
            "flatten": lambda: torch.flatten(x, 1),
            "method": lambda: x.flatten(start_dim=1),
        }[self.flatten]()
        result: Tensor = self.fc2(F.dropout(F.gelu(self.fc1(x)), training=self.training))
        return result


@pytest.mark.parametrize("flatten", ["view", "reshape", "flatten", "method"])
def test_the_way_through_a_small_convolutional_network(flatten: str) -> None:
    model = LeNet(flatten)
    assert model(torch.zeros(2, 1, 6, 6)).shape == (2, 2)
    found = chains(model, [Known.of(t) for t in MaskManager(model, Targets(head=True))])
    way = {name: tuple(n and n.module for n in (chain.before, chain.after)) for name, chain in found.items()}
    assert way == {
        "conv1.weight": (None, model.conv2),
        "conv2.weight": (model.conv1, model.fc1),
        "fc1.weight": (model.conv2, model.fc2),
        "fc2.weight": (model.fc1, None),
    }


def test_columns_behind_a_flattened_channel() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(6, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[3.0]], [[-5.0]]]))
        model[2].weight.copy_(torch.tensor([[1.0, 2.0, 2.0, -4.0, 0.0, 3.0]]))
    criterion, _ = bound(model)
    # three positions a channel: norm(1, 2, 2) = 3 and norm(4, 0, 3) = 5
    assert criterion.score(model[0].weight, name="0.weight").flatten().tolist() == [9.0, 25.0]
    assert criterion.score(model[2].weight, name="2.weight").tolist() == [[3.0, 6.0, 6.0, 20.0, 0.0, 15.0]]


def test_all_layers_are_scored_before_any_is_pruned() -> None:
    """Layer by layer, the second layer would see that the first has lost its row, and lose the column for it."""

    def network() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[3.0], [2.0]]))
            model[1].weight.copy_(torch.tensor([[1.0], [1.4]]).T)
        return model

    # products of both layers: 3 and 2.8
    for allocation in ("uniform", "global"):
        model = network()
        manager = MaskManager(model, Targets(head=True))
        prune(manager, 0.5, criterion="lookahead", allocation=allocation)
        assert model[0].weight.flatten().tolist() == [3.0, 0.0]
        assert model[1].weight.flatten().tolist() == [1.0, 0.0]


def test_a_pruned_neighbour_counts_as_pruned_later() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    manager = MaskManager(model, Targets(head=True))
    with torch.no_grad():
        model[0].weight[1] = 0
    prune(manager, 0.25, criterion="lookahead")
    assert not model[2].weight[:, 1].any()


class Module(LightningModule):
    """Its own forward cannot be traced, the network inside can."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 0:
            x = -x
        result: Tensor = self.network(x)
        return result


def test_the_largest_part_that_can_be_traced_is_taken() -> None:
    inner = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    _, names = bound(Module(inner))
    assert names == ["network.0.weight", "network.2.weight"]
    assert bound(nn.Linear(4, 3))[1] == ["weight"]  # a layer alone is open on both sides
    with pytest.raises(RecipeError, match=r"cannot follow the data through Module \(torch.fx: Module: .*'magnitude'"):
        bound(Module(nn.Linear(4, 3)))


class Way(nn.Module):
    """Two layers and something between them."""

    def __init__(self, between: Any, first: nn.Module | None = None, second: nn.Module | None = None) -> None:
        super().__init__()
        self.one, self.two = first or nn.Linear(4, 4), second or nn.Linear(4, 4)
        self.between = between if isinstance(between, nn.Module) else None
        self.function = between

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        hidden = self.between(hidden) if self.between is not None else self.function(hidden, self)
        result: Tensor = self.two(hidden)
        return result


UNCLEAR: dict[str, tuple[Any, str]] = {
    "residual": (Way(lambda h, m: h + F.relu(h)), r"one\.weight: .*one goes to"),
    "sum of two": (Way(lambda h, m: h + 1), r"one\.weight: .*add, which may mix"),
    "softmax over something": (Way(lambda h, m: h.transpose(0, 1)), r"transpose, which may mix"),
    "concatenated": (Way(lambda h, m: torch.cat([h, h])), r"cat, which may mix"),
    "gated": (Way(nn.GLU(), second=nn.Linear(2, 4)), r"between, which may mix"),
    "twice": (Way(lambda h, m: m.one(h)), r"one\.weight: .*used 2 times"),
    "pooled features": (Way(nn.AvgPool1d(3, 1, 1)), r"4 outputs of Linear meet 4 inputs of Linear"),
    "not flattened": (Way(nn.ReLU(), nn.Conv2d(1, 4, 1)), r"4 outputs of Conv2d meet 4 inputs of Linear"),
    "flattened tokens": (Way(nn.Flatten(), second=nn.Linear(8, 4)), r"4 outputs of Linear meet 8 inputs"),
    "seen as an image": (Way(lambda h, m: h.view(-1, 4, 1, 1), None, nn.Conv2d(4, 4, 1)), r"view, which may mix"),
    "batch flattened too": (Way(nn.Flatten(0), nn.Conv2d(1, 4, 1)), r"between, which may mix"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_not_clear_is_refused_by_name(case: str) -> None:
    model, says = UNCLEAR[case]
    with pytest.raises(TargetError, match=rf"criterion Lookahead.*{says.split(': ', 1)[-1].removeprefix('.*')}.*exclude"):
        bound(model)


def test_a_target_behind_a_fork_is_clear() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.stem(x)
            return self.left(hidden), self.right(hidden)

    with pytest.raises(TargetError, match=r"stem\.weight: .*stem goes to left, right"):
        bound(Fork())
    model = Fork()
    found = chains(model, [Known.of(t) for t in MaskManager(model, Targets(("left", "right")))])
    assert {n: (c.before and c.before.module, c.after) for n, c in found.items()} == {
        "left.weight": (model.stem, None),
        "right.weight": (model.stem, None),
    }


def test_without_prepare_it_says_so() -> None:
    with pytest.raises(RecipeError, match="does not know the neighbours of fc"):
        Lookahead().score(torch.ones(2, 2), name="fc")
