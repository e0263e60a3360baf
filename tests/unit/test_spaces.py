"""Neurons and connections of tasks, by hand and by property; the memory of samples."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsetrain.errors import DataError, PatternError, TargetError
from sparsetrain.incremental.chain import require_chain
from sparsetrain.incremental.samples import SampleMemory
from sparsetrain.incremental.spaces import Spaces, fresh_weights


def spaces() -> Spaces:
    """A convolution of 10 channels, flattened to 2 x 2 pixels, 10 neurons, 6 classes."""
    return Spaces({"conv": (10, 3, 5, 5), "fc": (10, 40), "head": (6, 10)})


def test_a_task_is_given_neurons_and_connections() -> None:
    found = spaces()
    found.allocate(Fraction(1, 5), Fraction(1, 4), [0, 4], "a")
    assert {name: int(neurons.sum()) for name, neurons in found.selected.items()} == {"conv": 2, "fc": 2}
    # 2 x 3 kernels could be, of which 4; 2 x (2 channels x 4 pixels) weights could be, of which 12; 2 rows x 2 neurons, all.
    assert {name: int(mine.sum()) for name, mine in found.mine.items()} == {"conv": 4, "fc": 12, "head": 4}
    channels = found.mine["fc"].view(10, 10, 4).any(2).any(0)
    assert not bool((channels & ~found.selected["conv"]).any())
    assert torch.equal(found.mine["head"].any(0), found.selected["fc"])
    assert found.mine["head"].any(1).nonzero().flatten().tolist() == [0, 4]
    again = spaces()
    again.allocate(Fraction(1, 5), Fraction(1, 4), [0, 4], "a")
    assert all(torch.equal(again.mine[name], found.mine[name]) for name in found.names)


def test_connections_move_to_where_it_matters() -> None:
    found = Spaces({"fc1": (4, 5), "fc2": (3, 4), "head": (2, 3)})
    found.selected = {"fc1": torch.tensor([True, True, True, False]), "fc2": torch.tensor([True, True, False])}
    found.mine["fc1"][0, :4] = found.mine["fc1"][1, 0] = found.mine["fc1"][2, 1] = True
    importance = {"fc1": torch.zeros(4, 5)}
    importance["fc1"][0, :4] = torch.tensor([5.0, 4.0, 3.0, 0.1])
    importance["fc1"][1, 0], importance["fc1"][2, 1] = 2.0, 0.2
    found.renew("fc1", importance, 0.34)  # 2 of 6
    # Dropped: 0.1 and 0.2. Rows weigh 12.1, 2, 0.2, columns 7, 4.2, 3, 0.1, 0: best of the free are (1, 1): 8.4 and (1, 2): 6.
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[0, :3] = expected[1, :3] = True
    assert torch.equal(found.mine["fc1"], expected)
    # In the second layer columns weigh what comes into the neurons before.
    found.mine["fc2"][0, 0] = found.mine["fc2"][1, 0] = found.mine["fc2"][1, 1] = True
    importance["fc2"] = torch.zeros(3, 4)
    importance["fc2"][0, 0], importance["fc2"][1, 0], importance["fc2"][1, 1] = 1.0, 4.0, 0.5
    found.renew("fc2", importance, 0.4)  # 1 of 3: (1, 1) goes; (0, 1): 1 x 2, (0, 2): 1 x 0.2, (1, 2): 4.5 x 0.2
    assert found.mine["fc2"].nonzero().tolist() == [[0, 0], [0, 1], [1, 0]]


def test_the_most_important_neurons_are_reserved() -> None:
    found = Spaces({"fc1": (4, 2), "head": (2, 4)})
    found.selected["fc1"] = torch.tensor([True, False, True, True])
    found.mine["fc1"] = torch.tensor([[True, True], [False, False], [True, False], [False, True]])
    importance = {"fc1": torch.tensor([[1.0, 1.0], [9.0, 9.0], [3.0, 0.0], [0.0, 0.5]])}
    found.close(importance, Fraction(2, 3))
    assert found.reserved["fc1"].tolist() == [True, False, True, False]
    assert torch.equal(found.taken["fc1"], found.mine["fc1"])


@settings(max_examples=25, deadline=None)
@given(
    tasks=st.integers(1, 6),
    reserve=st.fractions(0, 1),
    sparsity=st.fractions(0, Fraction(19, 20)),
    fraction=st.floats(0, 0.9),
    seed=st.integers(0, 5),
)
def test_nobody_touches_what_is_reserved(tasks: int, reserve: Fraction, sparsity: Fraction, fraction: float, seed: int) -> None:
    found = spaces()
    generator = torch.Generator().manual_seed(seed)
    for task in range(tasks):
        reserved = {name: neurons.clone() for name, neurons in found.reserved.items()}
        taken = {name: entries.clone() for name, entries in found.taken.items()}
        if any(int((~neurons).sum()) < 3 for neurons in reserved.values()):
            with pytest.raises(PatternError, match=r"network is full: .* a task takes 3"):
                found.allocate(Fraction(3, 10), sparsity, [task], f"{seed}/{task}")
            return
        try:
            found.allocate(Fraction(3, 10), sparsity, [task], f"{seed}/{task}")
        except PatternError:  # neurons are free, and every connection between those selected is taken
            return
        counts = {name: int(mine.sum()) for name, mine in found.mine.items()}
        importance = {name: torch.rand(shape, generator=generator) for name, shape in found.shapes.items()}
        for name in found.hidden:
            found.renew(name, {n: i * found.mine[n] for n, i in importance.items()}, fraction)
        for name in found.names:
            mine = found.mine[name]
            assert int(mine.sum()) == counts[name]
            assert not bool((mine & taken[name]).any())
        assert not bool(found.mine["conv"][reserved["conv"]].any())
        assert not bool(found.mine["fc"][reserved["fc"]].any())
        assert not bool(found.mine["fc"].view(10, 10, 4).any(2)[:, reserved["conv"]].any())
        assert not bool(found.mine["head"][:, reserved["fc"]].any())
        found.close(importance, reserve)
        assert all(bool(found.reserved[name][neurons].all()) for name, neurons in reserved.items())


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"fc": (10, 4)}, "there is one layer only"),
        ({"conv": (6, 3, 3, 3), "shortcut": (16, 4, 1, 1), "head": (2, 16)}, r"shortcut has 4 inputs and conv, .* 6 outputs"),
    ],
)
def test_layers_must_be_a_chain(shapes: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(TargetError, match=says):
        Spaces(shapes)


class Branched(nn.Module):
    """Three layers; the last one reads the first around the second, or layers change places, or neurons of the first do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm, self.extra = nn.LayerNorm(4), nn.Linear(4, 4)

    def between(self, first: Tensor) -> Tensor:
        if self.kind == "inplace":
            return first.relu_()
        return {
            "layernorm": lambda: self.norm(torch.relu(first)),
            "groupnorm": lambda: nn.functional.group_norm(torch.relu(first), 2),
            "shuffled": lambda: torch.relu(first).view(-1, 2, 2).transpose(1, 2).flatten(1),
            "swapped": lambda: torch.relu(first)[:, [0, 1, 3, 2]],
            "leaking": lambda: torch.relu(first) + 1e-9 * torch.relu(first).roll(2, 1),
            "excluded": lambda: self.extra(torch.relu(first)),
        }.get(self.kind, lambda: torch.relu(first))()

    def forward(self, x: Tensor) -> Tensor:
        first = self.between(self.a(x))
        if self.kind == "unused":
            return first
        if self.kind == "order":
            return self.b(self.c(first).repeat(1, 2))  # type: ignore[no-any-return]
        second = torch.relu(self.b(first))
        return self.c({"around": second + first, "beside": first}.get(self.kind, second))  # type: ignore[no-any-return]


MIXED = ("layernorm", "groupnorm", "shuffled", "swapped", "leaking", "excluded")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("around", "c follows b and reads a too, around it"),
        ("beside", "c follows b and reads a too"),
        ("order", "c is called as number 2, and is target 3"),
        ("unused", "b is not called in the forward pass"),
        *((kind, "neurons are mixed between a and b .LayerNorm, an excluded layer") for kind in MIXED),
    ],
)
def test_branches_are_found_by_asking_the_network(kind: str, says: str) -> None:
    def ask(network: nn.Module) -> None:
        require_chain(network, {name: network.get_submodule(name) for name in "abc"}, torch.ones(2, 3))

    with pytest.raises(TargetError, match=says):
        ask(Branched(kind))
    for plain in (Branched("chain"), Branched("inplace")):
        ask(plain)
        assert plain.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_dead_neurons_hide_nothing() -> None:
    """Neurons that no task has yet say 0, and ReLU would let nothing of them through."""
    network = Branched("swapped")
    nn.init.zeros_(network.a.weight)
    nn.init.constant_(network.a.bias, -1.0)
    with pytest.raises(TargetError, match="neurons are mixed"):
        require_chain(network, {name: network.get_submodule(name) for name in "abc"}, torch.ones(2, 3))


class Image(nn.Module):
    """A channel is many pixels, and after the flattening as many inputs."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.a, self.b, self.c = nn.Conv2d(1, 5, 3, stride=2), nn.Conv2d(5, 6, 2), nn.Linear(24, 3)
        self.depth, self.norm = nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.b(self.depth(torch.relu(self.a(x))))))
        x = nn.functional.max_pool2d(x, 2, 1)
        return self.c((x.movedim(1, -1) if self.last else x).flatten(1))  # type: ignore[no-any-return]


def test_channels_stay_by_themselves() -> None:
    for last in (False, True):
        network = Image(last)
        layers = {name: network.get_submodule(name) for name in "abc"}
        images = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
        if last:
            with pytest.raises(TargetError, match="neurons are mixed between b and c"):
                require_chain(network, layers, images)
        else:
            require_chain(network, layers, images)


def test_new_weights_have_the_scale_of_their_few_inputs() -> None:
    mask = torch.zeros(40, 100, dtype=torch.bool)
    mask[:20, :12] = True
    found = fresh_weights((40, 100), mask, "a")
    assert 0.49 < float(found.abs().max()) <= 0.5  # sqrt(3 / 12)
    assert not torch.equal(found, fresh_weights((40, 100), mask, "b"))


# ---------------------------------------------------------------- samples


def test_a_few_samples_of_each_class_are_kept_and_come_back() -> None:
    memory = SampleMemory(3)
    inputs, labels = torch.arange(20.0).view(20, 1), torch.tensor([0, 1] * 10)
    batch = torch.ones(8, 1), torch.tensor([4, 5] * 4)
    assert memory.extend(*batch, key=(0,))[0] is batch[0]
    memory.add(inputs, labels, key=(1,))
    memory.add(inputs, labels * 0 + 2, key=(2,))
    assert memory.labels is not None
    assert sorted(memory.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(memory.inputs[:6].flatten().tolist())) == 6  # type: ignore[index]
    assert all(int(x) % 2 == y for x, y in zip(memory.inputs[:6], memory.labels[:6], strict=True))  # type: ignore[index]
    more, theirs = memory.extend(*batch, key=(3,))
    assert (len(more), theirs[:8].tolist()) == (8 + 12, [4, 5] * 4)  # 3 old classes, 4 samples each on average
    assert set(theirs[8:].tolist()) <= {0, 1, 2}
    assert torch.equal(more, memory.extend(*batch, key=(3,))[0])
    assert not torch.equal(more, memory.extend(*batch, key=(4,))[0])
    with pytest.raises(DataError, match="memory=-1"):
        SampleMemory(-1)
