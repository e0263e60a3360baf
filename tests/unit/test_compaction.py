"""Compaction: the compact model computes what the masked one did, and trains on as it would have."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from sparsetrain.errors import PatternError, TargetError
from sparsetrain.masks import erase
from sparsetrain.structure import Structure, compact, compact_again, coupled_manager, dead_units, find_structure, prune_units

Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """Convolutions with batch norm, flattened: 6 and 4 filters, 8 neurons. No bias before a norm: its gradient is noise."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(4 * 4, 8), nn.PReLU(8), nn.Linear(8, 3)),
    )
    return net.double()


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 2, 6, 6, generator=generator).double(), torch.randint(3, (5,), generator=generator)


def images() -> Tensor:
    return batch(99)[0]


def some_dead(structure: Structure) -> dict[str, Tensor]:
    """Every other unit of each group that makes features."""
    return {g.name: torch.arange(g.units) % 2 == 0 for g in structure.of_kind("neuron", "filter", "head", "residual")}


def masked(net: nn.Module, *optimizers: Optimizer) -> tuple[Structure, dict[str, Tensor], Any]:
    structure = find_structure(net, images())
    groups = [g for g in structure if not g.fixed and g.kind != "input"]
    manager = coupled_manager(net, groups).attach(*optimizers)
    dead = some_dead(structure)
    prune_units(manager, dead)
    return structure, dead, manager


def step(net: nn.Module, optimizer: Optimizer, data: Batch) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(data[0]), data[1])
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)  # type: ignore[arg-type]
    else:
        closure()
        optimizer.step()


def state_of(net: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Everything that compaction touches, by value."""
    memory = [optimizer.state.get(p, {}) for p in net.parameters()]
    return [
        *(p.detach().clone() for p in net.parameters()),
        *(None if p.grad is None else p.grad.clone() for p in net.parameters()),
        *(b.clone() for b in net.buffers()),
        *(v.clone() if isinstance(v, Tensor) else v for m in memory for v in m.values()),
        *(str(module) for module in net.modules()),
    ]


def same(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(one, two, strict=True)
    )


# Adafactor scales by means over whole tensors, which lose their zeros: without these two scales it is elementwise enough.
PLAIN = {"lr": 2e-5, "d": 1e9, "eps": (None, 1e3)}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.8, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.003, centered=True, momentum=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, **PLAIN),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_on_as_the_masked_model_would(name: str) -> None:
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    structure, dead, manager = masked(net, optimizer)
    for seed in range(4):
        step(net, optimizer, batch(seed))
        schedule.step()
    twin, twin_optimizer, twin_schedule, twin_manager = copy.deepcopy((net, optimizer, schedule, manager))
    twin_manager.detach()
    twin_manager.attach(twin_optimizer)  # hooks are not copied
    manager.detach()
    parameters = [id(p) for p in net.parameters()]
    found = compact(net, structure, dead, images(), optimizers=[optimizer])
    assert [id(p) for p in net.parameters()] == parameters
    assert schedule.get_last_lr() == twin_schedule.get_last_lr()
    for p in net.parameters():
        assert all(
            v.shape == p.shape or 1 in v.shape or not v.ndim for v in optimizer.state[p].values() if isinstance(v, Tensor)
        )
    for seed in range(4, 10):
        step(net, optimizer, batch(seed))
        step(twin, twin_optimizer, batch(seed))
        schedule.step()
        twin_schedule.step()
        for key, value in twin.state_dict().items():
            kept = value
            for dim, index in found.kept.get(key, {}).items():
                kept = kept.index_select(dim, index)
            torch.testing.assert_close(net.state_dict()[key], kept, rtol=0, atol=1e-10)
    assert found.after < 0.5 * found.before
    assert schedule.get_last_lr() == twin_schedule.get_last_lr()
    net.eval()
    twin.eval()
    torch.testing.assert_close(net(images()), twin(images()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("inputs", [1, 2])
def test_means_over_a_single_column_are_scaled(inputs: int) -> None:
    """Adafactor's mean over the rows of a one-column weight is one number, and a mean all the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    data = torch.randn(32, inputs).double()
    optimizer = OPTIMIZERS["Adafactor"](net.parameters())
    structure = find_structure(net, data)
    manager = coupled_manager(net, structure.of_kind("neuron")).attach(optimizer)
    dead = {"0": torch.arange(8) < 4}
    prune_units(manager, dead)

    def train(model: nn.Module, how: Optimizer, steps: int) -> None:
        for _ in range(steps):
            how.zero_grad()
            (model(data) - data.sum(1, keepdim=True).sin()).square().mean().backward()
            how.step()

    train(net, optimizer, 4)
    twin, twin_optimizer, twin_manager = copy.deepcopy((net, optimizer, manager))
    twin_manager.detach()
    twin_manager.attach(twin_optimizer)
    manager.detach()
    compact(net, structure, dead, data, optimizers=[optimizer])
    train(net, optimizer, 6)
    train(twin, twin_optimizer, 6)
    torch.testing.assert_close(net[0].weight, twin[0].weight[4:], rtol=0, atol=1e-10)
    torch.testing.assert_close(net[2].weight, twin[2].weight[:, 4:], rtol=0, atol=1e-10)


def test_forgotten_memory_is_noticed() -> None:
    """The twin of the test above: momentum that is not cut along trains on to other weights."""
    net = network()
    optimizer = OPTIMIZERS["momentum"](net.parameters())
    structure, dead, manager = masked(net, optimizer)
    for seed in range(3):
        step(net, optimizer, batch(seed))
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    manager.detach()
    compact(net, structure, dead, images(), optimizers=[optimizer])
    compact(twin, structure, dead, images(), optimizers=[twin_optimizer])
    twin_optimizer.state.clear()
    step(net, optimizer, batch(7))
    step(twin, twin_optimizer, batch(7))
    assert not torch.allclose(net[0].weight, twin[0].weight, atol=1e-6)


def test_what_is_left_is_counted() -> None:
    net = network()
    structure, dead, _ = masked(net)
    found = compact(net, structure, dead, images())
    # 3 filters of 2*9 and their norm, 2 of 3*9+1, 4 neurons of 2*4+1 and their slopes, 3 outputs of 4+1
    assert found.after == 3 * 18 + 2 * 3 + 2 * 28 + 4 * (2 * 4 + 1) + 4 + 3 * 5 == sum(p.numel() for p in net.parameters())
    assert found.units == {"0": (3, 6), "3": (2, 4), "6": (4, 8)}
    assert (net[0].out_channels, net[3].in_channels, net[6].in_features, net[6].out_features) == (3, 3, 8, 4)
    assert (net[1].num_features, net[1].running_mean.shape, net[7].num_parameters) == (3, (3,), 4)
    assert found.difference <= 1e-12 < found.scale


def test_gradients_averages_and_histories_are_cut_along() -> None:
    net = network()
    average, optimizer = AveragedModel(net), torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    structure, dead, manager = masked(net, optimizer)
    manager.follow(average)
    for seed in range(2):
        step(net, optimizer, batch(seed))
        average.update_parameters(net)
    manager.enforce()
    manager.detach()
    gradient = net[0].weight.grad.clone()
    before = average.eval()(images())
    compact(net, structure, dead, images(), optimizers=[optimizer], copies=[average])
    assert torch.equal(net[0].weight.grad, gradient[~dead["0"]])
    torch.testing.assert_close(average(images()), before)
    assert average.n_averaged == 2
    assert not optimizer.state  # one flat history of all weights
    for seed in range(2, 4):
        step(net, optimizer, batch(seed))
        average.update_parameters(net)


class Odd(torch.optim.SGD):
    """Remembers something of another shape."""

    def step(self, closure: Any = None) -> Any:
        made = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["flat"] = p.detach().flatten().clone()
        return made


@pytest.mark.parametrize("sabotage", ["memory", "nonzero", "fixed", "copy"])
def test_what_is_refused_is_put_back_bit_for_bit(sabotage: str) -> None:
    net = network()
    optimizer = (Odd if sabotage == "memory" else torch.optim.SGD)(net.parameters(), lr=0.1, momentum=0.9)
    structure, dead, manager = masked(net, optimizer)
    step(net, optimizer, batch(0))
    manager.detach()
    if sabotage == "nonzero":
        net[6].weight.data[1, 3] = 0.5  # out of a dead filter
    if sabotage == "fixed":
        structure = replace(structure, groups=tuple(replace(g, fixed="") for g in structure))
        dead["8"] = torch.tensor([True, False, False])
        net[8].weight.data[0] = net[8].bias.data[0] = 0
    before, train = state_of(net, optimizer), [m.training for m in net.modules()]
    says = {
        "memory": r"Odd remembers 'flat' of shape \(.*nobody knows how to cut that",
        "nonzero": r"unit 0 of group 3 would go, and 6\.weight of the model is not zero there \(dimension 1\)",
        "fixed": r"computes something else than with them masked: the model's outputs have another shape. Leave the groups out",
        "copy": r"which the copy \(Linear\) has not",
    }[sabotage]
    with pytest.raises(PatternError if sabotage in ("nonzero", "fixed") else TargetError, match=says):
        compact(net, structure, dead, images(), optimizers=[optimizer], copies=[nn.Linear(2, 2)] if sabotage == "copy" else [])
    assert same(state_of(net, optimizer), before)
    assert [m.training for m in net.modules()] == train
    step(net, optimizer, batch(1))


def test_units_that_the_sample_does_not_show_have_to_be_zero_too() -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(64, 4)
    off = net[0](data[0]) <= 0  # of the first sample, on which models are compared
    before = [p.detach().clone() for p in net.parameters()]
    structure = find_structure(net, data)
    with pytest.raises(PatternError, match=rf"unit {int(off.nonzero()[0])} of group 0 would go, and 0\.weight of the model is"):
        compact(net, structure, {"0": off}, data)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    prune_units(coupled_manager(net, structure.of_kind("neuron")), {"0": off})
    expected = net(data)
    compact(net, structure, {"0": off}, data)
    torch.testing.assert_close(net(data), expected)


@pytest.mark.parametrize("followed", [True, False])
def test_averaged_copies_have_to_have_the_zeros_too(followed: bool) -> None:
    net = network()
    average = AveragedModel(net)
    structure, dead, manager = masked(net)
    if followed:
        manager.follow(average)
    before, kept = average.eval()(images()), [p.detach().clone() for p in net.parameters()]
    if followed:
        compact(net, structure, dead, images(), copies=[average])
    else:
        with pytest.raises(
            PatternError, match=r"unit 0 of group 0 would go, and 0\.weight of the copy \(AveragedModel\) is not"
        ):
            compact(net, structure, dead, images(), copies=[average])
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), kept, strict=True))
    torch.testing.assert_close(average(images()), before)


FORGETFUL: dict[str, Callable[[Any, Any, nn.Module, dict[str, Tensor]], Any]] = {
    "step": lambda manager, optimizer, net, dead: step(net, optimizer, batch(0)),
    "enforce": lambda manager, optimizer, net, dead: manager.enforce(),
    "attach": lambda manager, optimizer, net, dead: manager.attach(optimizer),
    "verify": lambda manager, optimizer, net, dead: manager.verify(),
    "sparsity": lambda manager, optimizer, net, dead: manager.sparsity(),
    "save": lambda manager, optimizer, net, dead: manager.state_dict(),
    "install": lambda manager, optimizer, net, dead: manager.install("0.weight", net[0].weight > 9, 0.9),
    "prune_units": lambda manager, optimizer, net, dead: prune_units(manager, dead),
    "dead_units": lambda manager, optimizer, net, dead: dead_units(manager, manager.groups["0"]),
}


@pytest.mark.parametrize("what", FORGETFUL)
@pytest.mark.parametrize("optimizer", ["momentum", "Adafactor"])  # the second has its gradients masked
def test_a_manager_that_was_not_detached_says_so(what: str, optimizer: str) -> None:
    net = network()
    chosen = OPTIMIZERS[optimizer](net.parameters())
    structure, dead, manager = masked(net, chosen)
    compact(net, structure, dead, images(), optimizers=[chosen])
    with pytest.raises(TargetError, match=r"it was compacted under this manager; detach\(\) before compact"):
        FORGETFUL[what](manager, chosen, net, dead)
    manager.detach()
    step(net, chosen, batch(0))


def test_a_mask_that_is_too_long_erases_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erase, "CHUNK", 4)
    weight = torch.ones(10)
    with pytest.raises(RuntimeError):
        erase.Eraser()([weight], torch.zeros(15, dtype=torch.bool))
    assert weight.tolist() == [1.0] * 10
    erase.Eraser()([weight], torch.arange(10) % 3 == 0)
    assert weight.tolist() == [1, 0, 0, 1, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True)])
def test_norms_know_their_size(norm: nn.Module) -> None:
    net, data = nn.Sequential(nn.Conv2d(2, 4, 1), norm, nn.Conv2d(4, 2, 1)), torch.randn(2, 2, 6, 6)
    structure = find_structure(net, data)
    dead = {"0": torch.arange(4) < 1}
    prune_units(coupled_manager(net, structure.of_kind("filter")), dead)
    compact(net, structure, dead, data)
    assert norm.num_features == 3


def test_twice_and_again_on_a_new_model() -> None:
    net = network()
    structure, dead, _ = masked(net)
    inputs = {"0.inputs": torch.tensor([True, False])}
    with torch.no_grad():
        net[0].weight[:, 0] = 0
    first = compact(net, structure, dead | inputs, images())
    assert net[0].picked.tolist() == [1]
    with pytest.raises(TargetError, match="use find_structure again"):
        compact(net, structure, dead, images())
    structure, dead, _ = masked(net)
    assert structure["0.inputs"].units == 1
    expected = net.eval()(images())
    second = compact(net, structure, dead, images())
    assert [second.units[g] for g in ("0", "3", "6")] == [(1, 3), (1, 2), (2, 4)]
    fresh = network()
    compact_again(fresh, first)
    compact_again(fresh, second)
    fresh.load_state_dict(net.state_dict(), strict=True)
    torch.testing.assert_close(fresh.eval()(images()), expected)
    with pytest.raises(TargetError, match="which this model has not, or not as long"):
        compact_again(fresh, first)
    assert fresh[0].out_channels == 1


def test_inputs_are_picked_and_picked_again() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    sample = torch.randn(3, 6)
    for dead, left in (([1, 0, 0, 1, 0, 0], [1, 2, 4, 5]), ([0, 1, 0, 0], [1, 4, 5])):
        gone = torch.tensor(dead).bool()
        with torch.no_grad():
            net[0].weight[:, gone] = 0
        expected = net(sample)
        compact(net, find_structure(net, sample), {"0.inputs": gone}, sample)
        assert net[0].picked.tolist() == left
        assert net[0].in_features == len(left)
        torch.testing.assert_close(net(sample), expected)


def test_wrapped_models_keep_plain_names() -> None:
    net = network()
    structure, dead, _ = masked(net)
    average = AveragedModel(net)
    assert {g.name for g in find_structure(average, images())} == {g.name for g in structure}
    assert compact(average, structure, dead, images()).units == {"0": (3, 6), "3": (2, 4), "6": (4, 8)}
    inner = nn.Module()
    inner.module = network()  # a name, no wrapper
    inner.forward = lambda x: inner.module(x)  # type: ignore[method-assign]
    assert "module.0" in {g.name for g in find_structure(inner, images())}


Chain = tuple[list[int], list[list[bool]], bool]


@st.composite
def chains(draw: Any) -> Chain:
    widths = draw(st.lists(st.integers(2, 7), min_size=2, max_size=5))
    dead = [draw(st.lists(st.booleans(), min_size=w, max_size=w).filter(lambda d: not all(d))) for w in widths[1:-1]]
    return widths, dead, draw(st.booleans())


@settings(max_examples=25, deadline=None)
@given(chains())
def test_any_chain_shrinks_to_its_living_units(chain: Chain) -> None:
    widths, dead, convolutions = chain
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Conv1d(into, out, 2) if convolutions else nn.Linear(into, out), nn.SiLU()]
    net = nn.Sequential(*layers[:-1]).double()
    sample = torch.randn(2, widths[0], 6).double() if convolutions else torch.randn(2, widths[0]).double()
    structure = find_structure(net, sample)
    gone = {str(2 * i): torch.tensor(d) for i, d in enumerate(dead)}
    groups = structure.of_kind("neuron", "filter")
    if groups:
        prune_units(coupled_manager(net, groups), gone)
    expected = net(sample)
    found = compact(net, structure, gone, sample)
    left = [widths[0], *(d.count(False) for d in dead), widths[-1]]
    kernel = 2 if convolutions else 1
    assert found.after == sum((kernel * a + 1) * b for a, b in itertools.pairwise(left))
    torch.testing.assert_close(net(sample), expected, rtol=0, atol=1e-12)
