"""Blocks in half precision: products are, what a block adds up and what is measured is not; weights come back as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetrain.calibration import LayerWatch, Stream, at_rest, is_finite
from sparsetrain.calibration import stream as stream_module
from sparsetrain.criteria import Seen, SparseGPT, StatisticsCriterion, Wanda
from sparsetrain.masks import MaskManager
from sparsetrain.oneshot import Streaming, prune_oneshot
from sparsetrain.targets import Targets


class Layer(nn.Module):
    """x + down(tanh(up(norm(x)))): ``up`` is given what a norm gives, ``down`` what comes from a product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(3)))


def data(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, 16, generator=generator) for _ in range(count)]


class Keeps(SparseGPT):
    """Keeps every input as it is shown, and the statistics of a layer as they were when the next one was shown its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, list[Tensor]] = {}

    def observe(self, seen: Seen) -> None:
        super().observe(seen)
        assert seen.input is not None
        self.inputs.setdefault(seen.tensor.name, []).append(seen.input.clone())


def through(net: nn.Module, dtype: torch.dtype | None, criterion: StatisticsCriterion | None = None) -> list[Tensor]:
    """What the last block gives, for every batch, each block measured by the criterion."""
    manager, outputs = MaskManager(net, Targets(head=True)), []
    with at_rest(net, [], gradients=False):
        stream = Stream(net, list(manager), net, data(), dtype)
        for segment in stream.segments:
            if criterion is not None:
                watch = LayerWatch(stream.tensors_of(segment), criterion)
                stream.measure(segment, watch)
                watch.finish()
            stream.advance(segment)
        outputs = [stream._run(stream.segments[-1], item).clone() for item in range(len(data()))]
    return outputs


def off(found: list[Tensor], wanted: list[Tensor]) -> float:
    one, other = (torch.cat([t.detach().double().flatten() for t in part]) for part in (found, wanted))
    return float((one - other).norm() / other.norm())


def test_only_products_are_in_half_precision() -> None:
    exact, narrow = Keeps(), Keeps()
    wanted, found = through(model(), None, exact), through(model(), torch.bfloat16, narrow)
    for name, shown in narrow.inputs.items():
        dtype = torch.float32 if "up" in name else torch.bfloat16
        assert {t.dtype for t in shown} == {dtype}, name
    # The first block's input has met no product yet: bit for bit the same.
    assert all(map(torch.equal, narrow.inputs["0.up.weight"], exact.inputs["0.up.weight"]))
    assert not all(map(torch.equal, narrow.inputs["1.up.weight"], exact.inputs["1.up.weight"]))
    assert {t.dtype for t in found} == {torch.float32}
    whole = [t.float() for t in map(model().bfloat16(), (x.bfloat16() for x in data()))]
    # Twin: the whole block in bfloat16, sums and all, is further off.
    assert 0 < 2 * off(found, wanted) < off(whole, wanted)


def test_statistics_are_no_products_of_the_block() -> None:
    """``X X'`` is computed while the block runs, and in float32 all the same; autocast would be off by a thousandth."""
    criterion = Keeps()
    through(model(), torch.bfloat16, criterion)
    for name, shown in criterion.inputs.items():
        x = torch.cat([t.flatten(0, -2) for t in shown])
        wanted = (x.double().mT @ x.double()).triu()
        assert off([criterion.memory[name]["outer"][0].triu()], [wanted]) < 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            assert off([(x.mT @ x).triu()], [wanted]) > 1e-4


@pytest.mark.parametrize("breaks", [False, True])
def test_weights_are_as_before_afterwards(breaks: bool) -> None:
    net = model()
    net[1].up.weight.requires_grad_(False)
    before = {name: (p.clone(), p.data_ptr(), p.requires_grad) for name, p in net.named_parameters()}
    if breaks:
        net[2].register_forward_pre_hook(lambda *_: None)  # hooks outside stay too
        net[1].down.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            through(net, torch.bfloat16)
    else:
        through(net, torch.bfloat16)
    for name, p in net.named_parameters():
        values, where, need = before[name]
        assert torch.equal(p, values)
        assert (p.data_ptr(), p.requires_grad) == (where, need)
    assert not torch.is_autocast_enabled("cpu")


class Casts(TorchDispatchMode):
    """Counts how often a matrix of weights is made another type."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and args[0].shape in ((24, 16), (16, 24))
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_a_block_and_not_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def casts() -> int:
        with Casts() as counted:
            through(model(), torch.bfloat16)
        return counted.count

    once = casts()
    keep = stream_module._autocast
    monkeypatch.setattr(stream_module, "_autocast", lambda m, d: keep(m, d) if d else torch.no_grad())
    assert 0 < once < casts()


def test_the_type_a_model_has_leaves_it_as_it_is() -> None:
    net = model().bfloat16()
    assert all(map(torch.equal, _prunes(copy.deepcopy(net), None), _prunes(copy.deepcopy(net), "bfloat16")))


def test_a_half_precision_model_in_float32_is_as_if_it_were_float32() -> None:
    """Weights that bfloat16 holds exactly: what blocks hand on is rounded, the first block is the same."""
    narrow, wide, criterion, other = model().bfloat16(), model().bfloat16().float(), Keeps(), Keeps()
    with at_rest(narrow, [], gradients=False):
        manager = MaskManager(narrow, Targets(head=True))
        stream = Stream(narrow, list(manager), narrow, [x.bfloat16() for x in data()], torch.float32)
        watch = LayerWatch(stream.tensors_of(stream.segments[0]), criterion)
        stream.measure(stream.segments[0], watch)
    with at_rest(wide, [], gradients=False):
        manager = MaskManager(wide, Targets(head=True))
        stream = Stream(wide, list(manager), wide, [x.bfloat16().float() for x in data()])
        watch = LayerWatch(stream.tensors_of(stream.segments[0]), other)
        stream.measure(stream.segments[0], watch)
    for name, shown in other.inputs.items():
        assert all(map(torch.equal, criterion.inputs[name], shown))
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def _prunes(net: nn.Module, dtype: str | None) -> list[Tensor]:
    manager = MaskManager(net, Targets(head=True), "2:4")
    batches = [x.to(next(net.parameters()).dtype) for x in data()]
    prune_oneshot(manager, batches, criterion=Wanda(), streaming=Streaming(dtype=dtype))
    return [p.detach() for p in net.parameters()]


class Masked(nn.Module):
    """Attention with an additive mask that hides all from the first position, as left padding does."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # In place, the scores keep the type of the product.
        scores = (x @ x.mT).add_(mask)
        return x + torch.softmax(scores, -1) @ self.v(x)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Masked(), Masked()])

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(5, 5)
        mask[0] = torch.finfo(torch.float32).min
        for layer in self.layers:
            x = layer(x, mask)
        return x


def test_rows_that_a_mask_hides_entirely_stay_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert off(through(Padded(), torch.bfloat16), through(Padded(), None)) < 0.02
    assert all(bool(torch.isfinite(t).all()) for t in through(Padded(), torch.float16))
    monkeypatch.setattr(stream_module, "_float", lambda tensor, products: tensor)
    assert any(bool(t.isnan().any()) for t in through(Padded(), torch.bfloat16))


@pytest.mark.parametrize("offload", [None, "disk"])
def test_what_waits_between_blocks_is_float32(offload: Any, tmp_path: Path) -> None:
    net, seen = model(), []
    with at_rest(net, [], gradients=False):
        manager = MaskManager(net, Targets(head=True))
        stream = Stream(net, list(manager), net, data(), torch.bfloat16, offload, tmp_path)
        stream.advance(stream.segments[0])
        seen = [stream.hidden.get("", item) for item in range(3)]
    assert {t.dtype for t in seen} == {torch.float32}
    assert not all(torch.equal(t, t.bfloat16().float()) for t in seen)  # nor was it rounded on the way


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.half(), lambda t: t.bfloat16()])
def test_finite_or_not(make: Callable[[Tensor], Tensor]) -> None:
    assert is_finite(make(torch.ones(3, 4)))
    assert is_finite(make(torch.full((3000,), 6e4)))  # whose sum overflows in float16
    for bad in (torch.nan, torch.inf, -torch.inf):
        values = make(torch.ones(3, 4))
        values[1, 2] = bad
        assert not is_finite(values)
    assert not is_finite(make(torch.tensor([torch.inf, -torch.inf])))


def test_a_trained_network_is_pruned_alike_in_bfloat16() -> None:
    """Where weights are not random few scores are close to the threshold: 99 % of all masks agree."""
    torch.manual_seed(0)
    net = nn.Sequential(model(), nn.Linear(16, 16))
    target = nn.Linear(16, 16)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(100):
        x = torch.randn(64, 16)
        optimizer.zero_grad()
        F.mse_loss(net(x), target(x).sin()).backward()
        optimizer.step()
    masks = []
    for dtype in (None, "bfloat16"):
        manager = MaskManager(copy.deepcopy(net), Targets(head=True), "unstructured")
        batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(8)]
        prune_oneshot(manager, batches, 0.5, criterion="sparsegpt", streaming=Streaming(batch=64, dtype=dtype))
        masks.append(torch.cat([m.flatten() for m in manager.masks.values()]))
    assert float((masks[0] == masks[1]).float().mean()) >= 0.99
