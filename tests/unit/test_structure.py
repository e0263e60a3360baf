"""Coupled groups of small networks whose answer one knows by head, and masks over them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

from sparsetrain.errors import PatternError, TargetError
from sparsetrain.patterns import parse_pattern
from sparsetrain.structure import Structure, compact, coupled_manager, dead_units, find_structure, prune_units
from sparsetrain.targets import plain_name


class Net(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, forward: Callable[[Any, Any], Any], **layers: Any) -> None:
        super().__init__()
        self.do = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Any) -> Any:
        return self.do(self, x)


def told(structure: Structure) -> dict[str, tuple[str, int, dict[str, list[int]]]]:
    """Group -> kind, units, and the slices of unit 0 by ``tensor:dim``, of those whose units can go."""
    return {
        g.name: (g.kind, g.units, {f"{s.tensor}:{s.dim}": s.index[0].tolist() for s in g.slots})
        for g in structure
        if not g.fixed
    }


def images(channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def test_a_chain() -> None:
    structure = find_structure(mlp(), torch.ones(1, 4))
    assert told(structure) == {
        "0.inputs": ("input", 4, {"0.weight:1": [0]}),
        "0": ("neuron", 6, {"0.weight:0": [0], "0.bias:0": [0], "2.weight:1": [0]}),
        "2": ("neuron", 5, {"2.weight:0": [0], "2.bias:0": [0], "4.weight:1": [0]}),
    }
    every = structure["0"].slices("2.weight")[0].index
    assert every.tolist() == [[u] for u in range(6)]


def test_filters_take_norm_buffers_and_what_is_flattened_along() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    kind, units, slices = told(find_structure(net, images()))["0"]
    assert (kind, units) == ("filter", 4)
    assert set(slices) == {
        f"{n}:0" for n in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    } | {"4.weight:1"}
    assert slices["4.weight:1"] == list(range(36))


def test_a_gated_pair_of_halves_in_one_tensor() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        gate, up = net.both(x).chunk(2, -1)
        return net.down(F.silu(gate) * up)

    net = Net(forward, both=nn.Linear(4, 10, bias=False), down=nn.Linear(5, 2))
    kind, units, slices = told(find_structure(net, torch.ones(1, 4)))["both"]
    assert (kind, units, slices) == ("neuron", 5, {"both.weight:0": [0, 5], "down.weight:1": [0]})


@pytest.mark.parametrize("gate", [torch.relu, F.silu, F.hardsigmoid, lambda x: x])
@pytest.mark.parametrize("masked", [False, True])
def test_a_closed_gate_hides_nothing(gate: Callable[[Tensor], Tensor], masked: bool) -> None:
    torch.manual_seed(1)
    net = Net(lambda s, x: s.d(gate(s.g(x)) * s.u(x)), g=nn.Linear(4, 32), u=nn.Linear(4, 32), d=nn.Linear(32, 2))
    with torch.no_grad():
        net.g.bias[:8] = -9.0  # closed, whatever comes in
        for layer in (net.g, net.u) if masked else ():
            layer.weight[8:20] = 0
            layer.bias[8:20] = 0
    structure = find_structure(net, torch.ones(1, 4))
    assert structure["g"].units == 32
    assert {s.tensor for s in structure["g"].slots} == {"g.weight", "g.bias", "u.weight", "u.bias", "d.weight"}


def grouped_query(net: Any, x: Tensor) -> Tensor:
    def heads(value: Tensor, count: int) -> Tensor:
        return value.view(*value.shape[:2], count, 3).transpose(1, 2)

    q, k, v = heads(net.q(x), 4), heads(net.k(x), 2), heads(net.v(x), 2)
    mixed = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    made: Tensor = net.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
    return made


def test_heads_share_keys_and_values() -> None:
    net = Net(grouped_query, q=nn.Linear(4, 12), k=nn.Linear(4, 6), v=nn.Linear(4, 6), o=nn.Linear(12, 5, bias=False))
    group = find_structure(net, torch.randn(1, 7, 4))["q"]
    assert (group.kind, group.units) == ("head", 2)
    assert group.slices("q.weight")[0].index.tolist() == [list(range(6)), list(range(6, 12))]
    assert group.slices("k.weight")[0].index.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert group.slices("o.weight")[0].index.tolist() == [list(range(6)), list(range(6, 12))]
    assert "view" in group.fixed or "shape" in group.fixed  # the code has its numbers of heads in it


class Block(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(torch.relu(self.a(x))))


def test_a_residual_stream_is_one_group() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), Block(), Block(), nn.Conv2d(6, 2, 1))
    groups = told(find_structure(net, images()))
    assert groups["0"][:2] == ("residual", 6)
    assert {"0.weight:0", "1.a.weight:1", "1.b.weight:0", "2.a.weight:1", "2.b.weight:0", "3.weight:1"} < set(groups["0"][2])
    assert groups["1.a"][:2] == groups["2.a"][:2] == ("filter", 4)


def test_concatenation_and_skips() -> None:
    def dense(net: Any, x: Tensor) -> Any:
        first = torch.relu(net.a(x))
        return net.o(net.n(torch.cat([first, net.b(first)], 1)))

    net = Net(dense, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 5, 1), n=nn.BatchNorm2d(9), o=nn.Conv2d(9, 2, 1))
    groups = told(find_structure(net, images()))
    assert groups["a"][2]["o.weight:1"] == groups["a"][2]["n.weight:0"] == groups["a"][2]["b.weight:1"] == [0]
    assert groups["b"][2]["o.weight:1"] == groups["b"][2]["n.running_var:0"] == [4]


@pytest.mark.parametrize(
    ("net", "group", "units", "slices"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)), "0", 4, [1, 1, 1, 1, 1]),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 9, 3, groups=3), nn.Conv2d(9, 2, 1)), "0", 3, [2, 2, 3, 3, 3]),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.PReLU(4), nn.Conv2d(4, 2, 1)), "0", 4, [1, 1, 1, 1]),
        (nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1)), "0", 3, [1, 4, 4]),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1)), "0", 4, [1, 1, 1, 1, 1]),
    ],
)
def test_convolutions_of_all_kinds(net: nn.Module, group: str, units: int, slices: list[int]) -> None:
    found = find_structure(net, images())[group]
    assert not found.fixed
    assert (found.kind, found.units) == ("filter", units)
    assert sorted(slot.index.shape[1] for slot in found.slots) == sorted(slices)


def test_squeeze_and_excitation() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        y = net.c(x)
        return net.o(y * torch.sigmoid(net.e(torch.relu(net.s(y.mean((2, 3), keepdim=True))))))

    net = Net(forward, c=nn.Conv2d(3, 8, 3), s=nn.Conv2d(8, 2, 1), e=nn.Conv2d(2, 8, 1), o=nn.Conv2d(8, 3, 1))
    groups = told(find_structure(net, images()))
    assert set(groups["c"][2]) == {"c.weight:0", "c.bias:0", "s.weight:1", "e.weight:0", "e.bias:0", "o.weight:1"}
    assert groups["s"][1] == 2
    assert [groups[name][0] for name in "cs"] == ["filter", "filter"]


@pytest.mark.parametrize(
    ("kind", "join"),
    [
        ("filter", lambda y, gate: y * torch.sigmoid(gate)),
        ("filter", lambda y, gate: y * torch.relu(gate)),
        ("filter", lambda y, gate: torch.relu(y) * F.hardsigmoid(gate)),
        ("filter", lambda y, gate: F.silu(y * (1 + gate))),
        ("residual", lambda y, more: torch.relu(y + more)),
        ("residual", lambda y, more: y - 0.1 * torch.tanh(more)),
        ("residual", lambda y, more: y * torch.sigmoid(more) + more),
    ],
)
@pytest.mark.parametrize("between", [nn.Identity(), nn.Conv2d(8, 8, 3, padding=1, groups=8)])
def test_a_gate_scales_and_a_shortcut_adds(kind: str, join: Any, between: nn.Module) -> None:
    def forward(net: Any, x: Tensor) -> Any:
        y = net.between(net.c(x))
        return net.o(join(y, net.e(torch.relu(net.s(y)))))

    layers = {"c": nn.Conv2d(3, 8, 1), "between": between, "s": nn.Conv2d(8, 4, 1), "e": nn.Conv2d(4, 8, 1)}
    groups = told(find_structure(Net(forward, **layers, o=nn.Conv2d(8, 3, 1)), images()))
    assert groups["c"][:2] == (kind, 8)
    assert {"c.weight:0", "s.weight:1", "e.weight:0", "o.weight:1"} <= set(groups["c"][2])


def test_a_stream_that_adds_gated_features_is_residual() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        x = net.i(x)
        y = net.c(torch.relu(x))
        return net.o(torch.relu(x + y * torch.sigmoid(net.e(torch.relu(net.s(y))))))

    widths = {"i": (3, 6), "c": (6, 6), "s": (6, 2), "e": (2, 6), "o": (6, 2)}
    groups = told(find_structure(Net(forward, **{n: nn.Conv2d(*w, 1) for n, w in widths.items()}), images()))
    assert {name: kind for name, (kind, *_) in groups.items()} == {"i.inputs": "input", "i": "residual", "s": "filter"}


def test_layers_called_twice_and_tied_weights() -> None:
    twice = Net(
        lambda s, x: s.o(torch.relu(s.a(torch.relu(s.a(s.i(x)))))), i=nn.Linear(4, 6), a=nn.Linear(6, 6), o=nn.Linear(6, 2)
    )
    assert set(told(find_structure(twice, torch.ones(1, 4)))["i"][2]) == {
        *("i.weight:0", "i.bias:0", "a.weight:0", "a.weight:1", "a.bias:0", "o.weight:1")
    }
    tied = Net(
        lambda s, x: s.o(torch.relu(s.b(torch.relu(s.i(x)))) + torch.relu(s.a(x))),
        i=nn.Linear(4, 4),
        a=nn.Linear(4, 6),
        b=nn.Linear(4, 6),
        o=nn.Linear(6, 2),
    )
    tied.b.weight = tied.a.weight
    slices = told(find_structure(tied, torch.ones(1, 4)))["b"][2]  # one name for one tensor
    assert slices.keys() == {"a.weight:0", "a.bias:0", "b.bias:0", "o.weight:1"}
    twins = Net(
        lambda s, x: s.o(torch.relu(s.a(x))) + s.p(torch.relu(s.b(x))),
        **{name: nn.Linear(4, 6) for name in "ab"},
        **{name: nn.Linear(6, 2) for name in "op"},
    )
    twins.b.weight = twins.a.weight
    slices = told(find_structure(twins, torch.ones(1, 4)))["a"][2]  # nothing but the weight ties them
    assert slices.keys() == {"a.weight:0", "a.bias:0", "b.bias:0", "o.weight:1", "p.weight:1"}
    words = Net(lambda s, x: s.head(torch.relu(s.words(x))), words=nn.Embedding(7, 5), head=nn.Linear(5, 7, bias=False))
    words.head.weight = words.words.weight
    assert told(find_structure(words, torch.tensor([[1, 2, 3]])))["words"] == ("neuron", 5, {"words.weight:1": [0]})


def test_tokens_positions_and_scales() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.zeros(6))  # as trained models begin

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.places = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.zeros(1, 4, 6))
            self.i, self.o, self.scale, self.alpha = nn.Linear(5, 6), nn.Linear(6, 2), Scale(), nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.o(
                self.alpha * self.scale(torch.cat([self.token.expand(len(x), -1, -1), self.i(x)], 1) + self.places)
            )
            return made

    net, sample = Tokens(), torch.ones(1, 3, 5)
    structure = find_structure(net, sample)
    kind, units, slices = told(structure)["i"]
    assert (kind, units) == ("neuron", 6)
    assert set(slices) == {"i.weight:0", "i.bias:0", "o.weight:1", "scale.gamma:0", "token:2", "places:2"}
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    manager = coupled_manager(net, structure.of_kind("neuron"))
    dead = {"i": torch.tensor([0, 1, 0, 0, 0, 1]).bool()}
    assert prune_units(manager, dead) == 2 * (5 + 1 + 2 + 1 + 1 + 4)
    assert manager.verify().ok
    assert (net.token == 0).flatten().tolist() == dead["i"].tolist()
    assert torch.equal(dead_units(manager, structure["i"]), dead["i"])
    expected = net(sample)
    compact(net, structure, dead, sample)
    assert (net.token.shape, net.places.shape) == ((1, 1, 4), (1, 4, 4))
    torch.testing.assert_close(net(sample), expected)


@pytest.mark.parametrize(
    ("net", "sample", "group", "says"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)), images(), "0", "1 normalizes over all"),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.ones(1, 3), "0", "1 normalizes over all"),
        (nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)), torch.ones(1, 3), "1.inputs", "0 makes it"),
        (nn.Sequential(nn.Linear(3, 4), weight_norm(nn.Linear(4, 2))), torch.ones(1, 3), "0", "1 reads it"),
        (
            Net(
                lambda s, x: s.o(s.l(s.e(x))[0][:, -1]), e=nn.Linear(3, 4), l=nn.LSTM(4, 5, batch_first=True), o=nn.Linear(5, 2)
            ),
            torch.ones(1, 6, 3),
            "e",
            "l reads it",
        ),
        (
            Net(
                lambda s, x: s.o(s.l(s.e(x))[1][0][-1]), e=nn.Linear(3, 4), l=nn.LSTM(4, 5, batch_first=True), o=nn.Linear(5, 2)
            ),
            torch.ones(1, 6, 3),
            "o.inputs",
            "l makes it",
        ),
        (
            Net(
                lambda s, x: s.m(s.q(x), s.k(x), s.k(x))[0],
                q=nn.Linear(3, 4),
                k=nn.Linear(3, 4),
                m=nn.MultiheadAttention(4, 2, batch_first=True),
            ),
            torch.ones(1, 6, 3),
            "k",
            "reads it",
        ),
        (
            Net(lambda s, x: (s.a(x), s.b(x))[1], a=nn.Linear(3, 4), b=nn.Linear(3, 2)),
            torch.ones(1, 3),
            "a",
            "nothing that the model returns",
        ),
        (
            Net(lambda s, x: s.b(s.a(x).view(-1, 3)), a=nn.Linear(3, 3), b=nn.Linear(3, 2)),
            torch.ones(1, 3),
            "a",
            "the model stops with RuntimeError",
        ),
        (nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2)), torch.ones(1, 3), "0", "it has one unit"),
    ],
)
def test_what_cannot_go_says_why(net: nn.Module, sample: Tensor, group: str, says: str) -> None:
    assert says in find_structure(net, sample)[group].fixed


def test_layers_that_are_not_called() -> None:
    net = Net(lambda s, x: s.b(x), a=nn.Linear(3, 4), b=nn.Linear(3, 2))
    assert find_structure(net, torch.ones(1, 3)).unused == ("a",)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.route = nn.Linear(3, 4), nn.Linear(4, 2), nn.Module()
        self.route = Net(lambda s, x: s.only(x[x.sum(-1) > 0]).sum() + x, only=nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(self.route(self.a(x)))
        return made


def test_models_that_cannot_be_traced_say_what_to_do() -> None:
    torch.manual_seed(0)
    with pytest.raises(TargetError, match=r"leave_out") as raised:
        find_structure(Branching(), torch.ones(1, 3))
    assert "route.only" in str(raised.value)
    left = find_structure(Branching(), torch.ones(1, 3), leave_out=["route"])
    assert left["a"].fixed.startswith("route reads it")
    with pytest.raises(TargetError, match=r"no such module\. Did you mean 'route'"):
        find_structure(Branching(), torch.ones(1, 3), leave_out=["rout"])
    with pytest.raises(TargetError, match=r"one text; give a list of names: leave_out=\['route'\]"):
        find_structure(Branching(), torch.ones(1, 3), leave_out="route")
    with pytest.raises(TargetError, match=r"stops on one sample .*dimension 0"):
        find_structure(mlp(), torch.ones(4))
    with pytest.raises(TargetError, match="no dimension of samples"):
        find_structure(Net(lambda s, x: s.a(x).mean(), a=nn.Linear(3, 4)), torch.ones(1, 3))
    with pytest.raises(TargetError, match=r"b sees in one sample of a batch what a makes in another"):
        find_structure(
            Net(lambda s, x: s.b(torch.relu(s.a(x)).cumsum(0)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), torch.ones(1, 3)
        )
    with pytest.raises(TargetError, match="returns no tensor"):
        find_structure(Net(lambda s, x: s.a(x).argmax(1), a=nn.Linear(3, 4)), torch.ones(1, 3))


def test_randomness_and_nan_are_called_by_their_names() -> None:
    torch.manual_seed(0)

    def decoded(net: Any, x: Tensor) -> Any:
        mean = net.m(torch.relu(net.e(x)))
        return net.d(mean + torch.exp(net.v(net.e(x))) * torch.randn_like(mean))

    widths = {"e": (4, 6), "m": (6, 3), "v": (6, 3), "d": (3, 4)}
    net = Net(decoded, **{name: nn.Linear(*width) for name, width in widths.items()})
    with pytest.raises(TargetError, match=r"something else each time .*randomness in forward.* decodes the mean"):
        find_structure(net, torch.ones(1, 4))
    mean = find_structure(net, torch.ones(1, 4), run=lambda x: net.d(net.m(torch.relu(net.e(x)))))
    assert (mean["e"].units, mean["m"].units, mean["m"].fixed) == (6, 3, "")
    net = mlp()
    with torch.no_grad():
        net[4].bias[1] = float("nan")
    with pytest.raises(TargetError, match="makes NaN of the sample"):
        find_structure(net, torch.ones(1, 4))
    with pytest.raises(TargetError, match="makes NaN of the sample"):
        compact(net, find_structure(mlp(), torch.ones(1, 4)), {"0": torch.zeros(6).bool()}, torch.ones(1, 4))


def test_a_model_that_nobody_knows_has_no_groups() -> None:
    net = weight_norm(nn.Linear(3, 2))
    assert find_structure(net, torch.ones(1, 3)).groups == ()
    assert find_structure(nn.LSTM(3, 4, batch_first=True), torch.ones(1, 5, 3)).groups == ()


def test_many_numbers_of_one_size_are_no_many_trials() -> None:
    net = Net(lambda s, x: s.b(torch.relu(s.a(x)).view(-1, 8)), a=nn.Linear(8, 8), b=nn.Linear(8, 2))
    for number in range(40):  # 2**40 sets of them
        setattr(net, f"size{number}", 8)
    assert "the model stops with RuntimeError" in find_structure(net, torch.ones(1, 8))["a"].fixed


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float32])
def test_the_model_is_as_before(kind: torch.dtype) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.Dropout(), nn.Linear(8, 2)
    )
    net.to(kind)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])  # parameters that are views of one tensor
    start = 0
    for parameter in net.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    net[0].requires_grad_(False)
    net.train()
    net[1].eval()
    net(torch.cat([images(), images() + 1]).to(kind)).sum().backward()
    random = torch.get_rng_state()
    facts = [
        (p.detach().clone(), None if p.grad is None else p.grad.clone(), p.requires_grad, p.data_ptr())
        for p in net.parameters()
    ]
    buffers = [b.clone() for b in net.buffers()]
    structure = find_structure(net, images().to(kind))
    assert [structure[g].units for g in ("0", "4")] == [4, 8]
    assert not structure["0"].fixed
    for parameter, (value, gradient, needed, where) in zip(net.parameters(), facts, strict=True):
        assert torch.equal(parameter, value)
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
        assert (parameter.requires_grad, parameter.data_ptr()) == (needed, where)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))
    assert [m.training for m in net] == [True, False, True, True, True, True, True]
    assert torch.equal(torch.get_rng_state(), random)
    assert not any("forward" in vars(module) for module in net)


@pytest.mark.parametrize("sample", [torch.ones(3, 4), (torch.ones(3, 4), torch.zeros(3)), [torch.ones(3, 4)]])
def test_samples_of_all_forms(sample: Any) -> None:
    assert told(find_structure(mlp(), sample)).keys() == {"0.inputs", "0", "2"}
    named = Net(lambda s, x: x, a=nn.Linear(4, 3), b=nn.Linear(3, 2))
    named.forward = lambda first, scale: named.b(named.a(first) * scale)  # type: ignore[method-assign]
    assert find_structure(named, {"first": torch.ones(2, 4), "scale": torch.tensor(2.0)})["a"].units == 3
    assert find_structure(named, (torch.ones(2, 4), 3.0), run=lambda batch: named(*batch))["a"].units == 3


# -- masks ------------------------------------------------------------------------------------------------------------------


def test_whole_units_are_pruned_and_a_torn_one_is_found() -> None:
    net = mlp()
    structure = find_structure(net, torch.ones(1, 4))
    groups = structure.of_kind("neuron")
    manager = coupled_manager(net, groups)
    dead = {"0": torch.tensor([1, 0, 0, 1, 0, 0]).bool(), "2": torch.tensor([0, 0, 0, 0, 1]).bool()}
    # rows 2*4 + their biases 2 + columns 2*5; row 1*6, of which 2 are gone already, + bias 1 + column 2
    assert prune_units(manager, dead) == 8 + 2 + 10 + 4 + 1 + 2
    assert manager.verify().ok
    assert int((net[2].weight == 0).sum()) == 14
    assert all(torch.equal(dead_units(manager, structure[name]), units) for name, units in dead.items())
    assert prune_units(manager, {"0": torch.zeros(6).bool()}) == 8 + 2 + 8  # grown back, row 4 of fc2 stays dead
    prune_units(manager, dead)
    mask = manager["0.bias"].mask.clone()  # type: ignore[union-attr]
    mask[0] = True
    manager.install("0.bias", mask, Fraction(1, 6))
    with pytest.raises(PatternError, match=r"unit 0 of group 0 is pruned in .* masks of coupled tensors conflict"):
        dead_units(manager, structure["0"])
    entry = torch.ones(5, 6, dtype=torch.bool)
    entry[0, 0] = False
    with pytest.raises(PatternError, match=r"entry \[0, 0\] is pruned, and no slice it lies in"):
        manager.install("2.weight", entry, Fraction(1, 30))


def test_groups_that_are_not_named_stay_as_they_are() -> None:
    net = mlp()
    structure = find_structure(net, torch.ones(1, 4))
    manager = coupled_manager(net, structure.of_kind("neuron"))
    assert list(manager.groups) == ["0", "2"]
    prune_units(manager, {"0": torch.arange(6) < 3})
    assert prune_units(manager, {"2": torch.arange(5) < 2}) == 2 * 3 + 2 + 2 * 2  # rows, of which half is gone, bias, columns
    assert prune_units(manager, {}) == 0
    assert {name: int((p == 0).sum()) for name, p in net.named_parameters()} == {
        **{"0.weight": 12, "0.bias": 3, "2.weight": 30 - 3 * 3, "2.bias": 2, "4.weight": 4, "4.bias": 0}
    }
    few = coupled_manager(net, [structure["2"]])
    with pytest.raises(TargetError, match=r"'0' is no group of this manager; there are 2\."):
        prune_units(few, {"0": torch.arange(6) < 3})


def compiled(net: nn.Module) -> nn.Module:
    made: nn.Module = torch.compile(net, backend="eager")  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("wrap", [AveragedModel, compiled, lambda net: AveragedModel(compiled(net))])
def test_managers_look_through_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = wrap(mlp())
    structure = find_structure(net, torch.ones(1, 4))
    manager = coupled_manager(net, structure.of_kind("neuron"))
    assert list(manager.tensors) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight"]
    dead = {"0": torch.arange(6) < 3}
    assert prune_units(manager, dead) == 12 + 3 + 15
    zeros = {plain_name(name).removeprefix("module."): int((p == 0).sum()) for name, p in net.named_parameters()}
    assert (zeros["0.weight"], zeros["0.bias"], zeros["2.weight"]) == (12, 3, 15)
    assert torch.equal(dead_units(manager, structure["0"]), dead["0"])
    assert compact(net, structure, dead, torch.ones(1, 4)).units == {"0": (3, 6)}


def test_layers_that_are_compiled_each() -> None:
    net = mlp()
    net[2] = compiled(net[2])
    structure = find_structure(net, torch.ones(1, 4))
    manager = coupled_manager(net, structure.of_kind("neuron"))
    dead = {group: torch.arange(units.units) < 2 for group, units in manager.groups.items()}
    assert prune_units(manager, dead) == 2 * 4 + 2 + (30 - 3 * 4) + 2 + 4
    assert all(torch.equal(dead_units(manager, structure[name]), units) for name, units in dead.items())


def test_groups_of_another_model_are_refused() -> None:
    groups = find_structure(mlp(), torch.ones(1, 4)).of_kind("neuron")
    with pytest.raises(TargetError, match=r"the coupled groups cut 2\.weight, 2\.bias, 4\.weight, which Sequential has not"):
        coupled_manager(nn.Sequential(nn.Linear(4, 6)), groups)
    with pytest.raises(TargetError, match=r"2\.weight has shape \(4, 6\), and a coupled group slice 4 of its dimension 0"):
        coupled_manager(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(5, 2)), groups)


def test_a_mask_that_is_refused_is_refused_before_any_is_installed() -> None:
    net = mlp()
    manager = coupled_manager(net, find_structure(net, torch.ones(1, 4)).of_kind("neuron"))
    before = [p.detach().clone() for p in net.parameters()]
    manager["4.weight"].pattern = parse_pattern("2:4")  # the last of its tensors
    with pytest.raises(PatternError):
        prune_units(manager, {"2": torch.arange(5) < 2})
    assert not manager.masks
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("dead", "error", "says"),
    [
        ({"0": torch.ones(6).bool()}, PatternError, "all 6 units of group 0 would go"),
        ({"4": torch.tensor([True, False])}, PatternError, "no unit of group 4 can go: it is the model's output"),
        ({"1": torch.tensor([True, False])}, TargetError, r"'1' is no group of this manager; there are 0, 2, 4\."),
        ({"0": torch.ones(5).bool()}, PatternError, r"group 0 has 6 units, and was given bool \(5,\)"),
        ({"0": torch.zeros(6)}, PatternError, r"was given float32 \(6,\)"),
    ],
)
def test_what_cannot_be_pruned_changes_nothing(dead: dict[str, Tensor], error: type[Exception], says: str) -> None:
    net = mlp()
    structure = find_structure(net, torch.ones(1, 4))
    manager = coupled_manager(net, [group for group in structure if group.kind == "neuron"])
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(error, match=says):
        prune_units(manager, {"2": torch.tensor([1, 0, 0, 0, 0]).bool(), **dead})
    assert not manager.masks
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_nothing_to_prune() -> None:
    structure = find_structure(nn.Linear(3, 2), torch.ones(1, 3))
    with pytest.raises(TargetError, match="no coupled group is left"):
        coupled_manager(nn.Linear(3, 2), structure.of_kind("neuron"))
    with pytest.raises(TargetError, match=r"'fc' is no coupled group"):
        structure["fc"]
