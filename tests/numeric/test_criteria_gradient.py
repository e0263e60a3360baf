"""Criteria of gradients, against numbers done in the head and against autograd through a mask that multiplies the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from sparsetrain.calibration import calibrate
from sparsetrain.criteria import OBS, SNIP, Fisher, Gradient, StatisticsCriterion, Taylor
from sparsetrain.errors import RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.patterns import parse_pattern
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

# -- a toy: the loss is the mean of w.x, so that the gradient of a sample is x itself ---------------------------------------

WEIGHT = [[2.0, -1.0]]
BATCHES = [torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[-4.0, 1.0], [-4.0, 3.0]])]


@pytest.mark.parametrize(
    ("criterion", "pattern", "expected"),
    [
        (Gradient(), "unstructured", [[1.0, 1.5]]),  # gradients (2, 1) and (-4, 2)
        (SNIP(), "unstructured", [[4.0, 3.0]]),  # products (4, -1) and (-8, -2)
        (Taylor(), "unstructured", [[40.0, 2.5]]),  # their squares (16, 1) and (64, 4)
        (Taylor(form="group"), "neurons", [[54.5, 54.5]]),  # sums 3 and -10
        (Taylor(form="group"), "channels", [[40.0, 2.5]]),  # every column has one weight
        (Fisher(), "unstructured", [[21.0, 1.75]]),  # mean squares 10.5 and 3.5
        (Fisher(batches=1), "unstructured", [[10.0, 1.0]]),  # of the first batch alone: 5 and 2
    ],
)
def test_scores_by_hand(criterion: StatisticsCriterion, pattern: str, expected: list[list[float]]) -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(WEIGHT))
    manager = MaskManager(model, pattern=pattern)
    calibrate(manager, criterion, BATCHES, lambda batch: model(batch).mean())
    assert criterion.score(model.weight, name="weight").tolist() == expected


# -- a small network with a convolution -------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(2)
    layers = [
        nn.Conv2d(2, 3, 2, stride=2),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.ReLU(),
        nn.Linear(4, 3),
    ]
    model = nn.Sequential(*layers).double().eval()
    model(torch.randn(9, 2, 4, 4).double())
    return model


def data(size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 2, 4, 4, generator=generator).double(), torch.randint(3, (12,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


NAMES = ("0.weight", "4.weight", "6.weight")


def scores_of(criterion: StatisticsCriterion, pattern: str = "unstructured", size: int = 4) -> dict[str, Tensor]:
    model = network()
    manager = MaskManager(model, Targets(head=True), pattern)
    calibrate(manager, criterion, data(size), lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
    return {name: criterion.score(model.get_parameter(name).detach(), name=name) for name in NAMES}


def gated(model: nn.Module, spread: Callable[[str, Tensor], Tensor]) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    """The loss as a function of gates that multiply the weights; ``spread`` says which weights a gate is of."""

    def loss(gates: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        parameters |= {name: parameters[name] * spread(name, gate) for name, gate in gates.items()}
        return F.cross_entropy(functional_call(model, parameters, (x,)), y)

    return loss


def same(name: str, gate: Tensor) -> Tensor:
    return gate


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in NAMES:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-9, atol=1e-15)


def per_batch() -> list[dict[str, Tensor]]:
    """dL/dc of every batch, by autograd."""
    model = network()
    gates = {name: torch.ones_like(model.get_parameter(name)) for name in NAMES}
    return [grad(gated(model, same))(gates, x, y) for x, y in data(4)]


def test_snip_is_the_derivative_by_the_mask() -> None:
    found = per_batch()
    assert_close(scores_of(SNIP()), {name: torch.stack([g[name] for g in found]).sum(0).abs() for name in NAMES})


def test_taylor_is_the_mean_square_of_that_derivative() -> None:
    found = per_batch()
    assert_close(scores_of(Taylor()), {name: torch.stack([g[name] for g in found]).square().mean(0) for name in NAMES})


@pytest.mark.parametrize("text", ["neurons", "channels", "block:2x3"])
def test_taylor_of_groups_is_the_derivative_by_one_gate_a_unit(text: str) -> None:
    model = network()
    pattern: Any = parse_pattern(text)
    units = {name: pattern.unit_scores(torch.ones_like(model.get_parameter(name))).double() for name in NAMES}
    shapes = {name: tuple(model.get_parameter(name).shape) for name in NAMES}

    def spread(name: str, gate: Tensor) -> Tensor:
        index = pattern.expand(torch.arange(gate.numel()).view(gate.shape), shapes[name])
        return gate.flatten()[index]

    found = [grad(gated(model, spread))(units, x, y) for x, y in data(4)]
    means = {name: torch.stack([g[name] for g in found]).square().mean(0) for name in NAMES}
    scores = scores_of(Taylor(form="group"), text)
    assert_close(scores, {name: spread(name, means[name]) for name in NAMES})
    # ragged edges: a smaller block counts with its whole sum
    assert_close({n: pattern.unit_scores(scores[n]) for n in NAMES}, means)


def test_fisher_is_half_the_mean_square_over_single_samples() -> None:
    model = network()
    gates = {name: torch.ones_like(model.get_parameter(name)) for name in NAMES}
    x, y = data(12)[0]

    def one(gates: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return gated(model, same)(gates, x.unsqueeze(0), y.unsqueeze(0))

    found = vmap(grad(one), in_dims=(None, 0, 0))(gates, x, y)
    assert_close(scores_of(Fisher()), {name: found[name].square().mean(0) / 2 for name in NAMES})
    # the twin: gradients of whole batches are another thing
    whole = torch.stack([g["4.weight"] for g in per_batch()]).square().mean(0) / 2
    assert not torch.allclose(whole, found["4.weight"].square().mean(0) / 2, rtol=0.1)


@pytest.mark.parametrize("kind", [Fisher, OBS])
def test_per_sample_statistics_do_not_depend_on_the_batch_size(kind: type[StatisticsCriterion]) -> None:
    first, *others = (scores_of(kind(12), size=size) for size in (12, 5, 1))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in NAMES)


def test_sums_over_batches_are_the_sum_over_the_whole() -> None:
    # three equal batches: the sum of their mean gradients is three times the gradient of the whole
    parts, whole = scores_of(SNIP(), size=4), scores_of(SNIP(), size=12)
    assert_close(parts, {name: 3 * whole[name] for name in NAMES})
    assert_close(scores_of(Gradient(), size=4), scores_of(Gradient(), size=12))


def test_half_precision_is_summed_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    manager, criterion = MaskManager(model), Gradient(batches=600)
    calibrate(manager, criterion, [torch.ones(1, 1, dtype=torch.bfloat16)] * 600, lambda batch: model(batch).sum())
    assert criterion.memory["weight"]["total"].tolist() == [[600.0]]  # bfloat16 stops counting at 256
    assert criterion.score(model.weight, name="weight").tolist() == [[1.0]]


def test_taylor_refuses_groups_without_units_and_unknown_forms() -> None:
    with pytest.raises(RecipeError, match=r"0\.weight: Taylor\(form='group'\).*pattern 2:4 has none.*form='weight'"):
        prune(MaskManager(nn.Sequential(nn.Linear(4, 4)), pattern="2:4"), criterion=Taylor(form="group"))
    with pytest.raises(RecipeError, match=r"form 'groups' is unknown.*Did you mean 'group'\?"):
        Taylor(form="groups")  # type: ignore[arg-type]


def test_group_sums_see_a_transposed_weight_with_outputs_first() -> None:
    from transformers.pytorch_utils import Conv1D

    model = Conv1D(2, 3)  # stored (in=3, out=2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    manager, criterion = MaskManager(model, pattern="neurons"), Taylor(form="group")
    # y.sum(): the gradient is 1 everywhere, so the sums are 9 and 12
    calibrate(manager, criterion, [torch.ones(1, 3)], lambda batch: model(batch).sum())
    assert criterion.score(model.weight, name="weight").tolist() == [[81.0, 144.0]] * 3
