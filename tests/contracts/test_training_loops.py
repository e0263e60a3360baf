"""Promises 1 and 2 in plain PyTorch loops: whatever a loop does between two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.masks import MaskManager
from sparsetrain.pruning import prune

from .promises import Watched, assert_promises
from .toys import TARGETS, Net


def batch(index: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(8, 8, generator=generator), torch.randint(3, (8,), generator=generator)


def backward(model: nn.Module, index: int = 0) -> Tensor:
    x, y = batch(index)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def muon(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=0.01)


def sparse_net(optimizer: Callable[[Any], torch.optim.Optimizer] = adam) -> tuple[Net, Any, MaskManager, Watched]:
    """A net trained for some steps, then pruned to 50 %, as it is at the start of the tests below."""
    torch.manual_seed(0)
    net = Net()
    opt = optimizer(net.parameters())
    manager = MaskManager(net).attach(opt)
    for index in range(5):
        opt.zero_grad()
        backward(net, index)
        opt.step()
    prune(manager, 0.5)
    return net, opt, manager, watch(net, manager, opt)


def watch(net: nn.Module, manager: MaskManager, *optimizers: torch.optim.Optimizer, sparsity: float = 0.5) -> Watched:
    """Ghosts here are newborn: none of these optimizers' states moves under zero gradients."""
    found = Watched(net, dict.fromkeys(TARGETS, ("unstructured", sparsity)), manager.masks, list(optimizers))
    for optimizer in optimizers:
        for name in TARGETS:
            found.ghosts[name] = nn.Parameter(torch.zeros_like(net.get_parameter(name)))
            weight_state = optimizer.state.get(net.get_parameter(name), {})
            optimizer.state[found.ghosts[name]] = {
                key: torch.zeros_like(value) for key, value in weight_state.items() if isinstance(value, Tensor)
            }
    return found


def test_gradients_accumulate_over_a_change_of_the_mask() -> None:
    net, opt, manager, watched = sparse_net()
    for index in range(30):
        backward(net, index)
        if index == 13:  # pending gradients are there
            prune(manager, 0.75)
            watched.asked = dict.fromkeys(TARGETS, ("unstructured", 0.75))
            watched.masks = manager.masks
        if index % 4 == 3:
            opt.step()
            opt.zero_grad()
        assert_promises(watched)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_masked_run_is_the_run_of_a_network_without_those_weights(optimizer: str, clip: float | None) -> None:
    """The oracle multiplies by the mask in its forward pass, so that autograd itself sees no pruned weight. Clipping
    included: pruned entries do not count in the norm."""
    settings = {"lr": 0.05, "momentum": 0.9} if optimizer != "AdamW" else {"lr": 0.05}
    torch.manual_seed(0)
    net = Net()
    manager = MaskManager(net)
    prune(manager, 0.6)
    oracle = copy.deepcopy(net)
    masks = {name: mask.clone() for name, mask in manager.masks.items()}
    mine = getattr(torch.optim, optimizer)(net.parameters(), **settings)
    theirs = getattr(torch.optim, optimizer)(oracle.parameters(), **settings)
    manager.attach(mine, mask_gradients=clip is not None)
    for index in range(50):
        x, y = batch(index)
        mine.zero_grad()
        backward(net, index)
        theirs.zero_grad()
        masked = {n: p * masks[n] if n in masks else p for n, p in oracle.named_parameters()}
        F.cross_entropy(torch.func.functional_call(oracle, masked, (x,)), y).backward()
        if clip is not None:
            norms = [nn.utils.clip_grad_norm_(m.parameters(), clip) for m in (net, oracle)]
            assert norms[0] == norms[1] > clip
        mine.step()
        theirs.step()
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, oracle.get_parameter(name)), (index, name)
    assert sum(int((w == 0).sum()) for w in (net.fc1.weight, net.fc2.weight)) == 76 + 153


def test_a_closure_may_be_called_often() -> None:
    torch.manual_seed(0)
    net = Net()
    opt = torch.optim.LBFGS(net.parameters(), lr=0.05, max_iter=5, line_search_fn="strong_wolfe")
    manager = MaskManager(net).attach(opt)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        opt.zero_grad()
        return backward(net)

    for index in range(10):
        if index == 3:
            prune(manager, 0.5)
        opt.step(closure)
        if index >= 3:
            assert_promises(watch(net, manager, opt))
    assert calls > 20


def test_several_optimizers() -> None:
    torch.manual_seed(0)
    net = Net()
    first = torch.optim.SGD(net.fc1.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.AdamW([*net.fc2.parameters(), *net.head.parameters()], lr=0.01)
    manager = MaskManager(net).attach(first, second)
    for index in range(20):
        if index == 5:
            prune(manager, 0.5)
        net.zero_grad()
        backward(net, index)
        (first if index % 2 else second).step()
        if index >= 5:
            for optimizer, name in ((first, "fc1.weight"), (second, "fc2.weight")):
                watched = watch(net, manager, optimizer)
                watched.asked = {name: watched.asked[name]}
                assert_promises(watched)


def test_skipped_steps_of_a_gradient_scaler() -> None:
    net, opt, _, watched = sparse_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    skipped = 0
    for index in range(30):
        opt.zero_grad()
        x, y = batch(index)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x).float(), y)
        scaler.scale(loss).backward()
        if index % 5 == 2:
            net.fc1.weight.grad.view(-1)[index] = float("inf")  # type: ignore[union-attr]
        before = scaler.get_scale()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        skipped += scaler.get_scale() < before
        assert_promises(watched)
    assert skipped == 6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch.compile
def test_compiled_model_keeps_plain_names(backend: str) -> None:
    torch.manual_seed(0)
    net = Net()
    compiled = torch.compile(net, backend=backend)
    opt = adam(compiled.parameters())  # type: ignore[attr-defined]
    manager = MaskManager(compiled).attach(opt)  # type: ignore[arg-type]
    assert tuple(t.name for t in manager) == TARGETS
    prune(manager, 0.5)
    for index in range(5):
        opt.zero_grad()
        backward(compiled, index)  # type: ignore[arg-type]
        opt.step()
        assert_promises(watch(net, manager, opt))


def test_somebody_writes_between_two_steps() -> None:
    net, opt, _, watched = sparse_net()
    for index in range(6):
        opt.zero_grad()
        backward(net, index)
        net.fc1.weight.data.fill_(1.0)
        with pytest.raises(AssertionError, match="not zero"):
            assert_promises(watched)
        opt.step()
        assert_promises(watched)


def test_parameter_groups_may_come_later() -> None:
    torch.manual_seed(0)
    net = Net()
    opt = torch.optim.SGD(net.head.parameters(), lr=0.1, momentum=0.9)
    manager = MaskManager(net).attach(opt)
    prune(manager, 0.5)
    for index in range(10):
        if index == 3:
            opt.add_param_group({"params": [*net.fc1.parameters(), *net.fc2.parameters()]})
        opt.zero_grad()
        backward(net, index)
        opt.step()
        assert_promises(watch(net, manager, opt))


@pytest.mark.parametrize("optimizer", [adam, muon])
@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_frozen_layers_may_thaw(when: str, optimizer: Any) -> None:
    torch.manual_seed(0)
    net = Net()
    if when == "before attach":
        net.fc1.requires_grad_(False)
    opt = optimizer(net.parameters())
    manager = MaskManager(net).attach(opt)
    prune(manager, 0.5)
    net.fc1.requires_grad_(False)
    for index in range(8):
        net.fc1.requires_grad_(index >= 4)
        opt.zero_grad()
        backward(net, index)
        opt.step()
        assert_promises(watch(net, manager, opt))
    assert net.fc1.weight in opt.state


@pytest.mark.parametrize("optimizer", [adam, muon])
def test_gradients_written_by_hand(optimizer: Any) -> None:
    """``torch.autograd.grad`` accumulates nothing, so no hook of the parameter sees its gradient."""
    net, opt, _, watched = sparse_net(optimizer)
    for index in range(5):
        x, y = batch(index)
        parameters = list(net.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(F.cross_entropy(net(x), y), parameters), strict=True):
            parameter.grad = grad
        opt.step()
        assert_promises(watched)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_the_gradient_of_a_pruned_weight_may_be_infinite(value: float) -> None:
    """d sqrt(w) / dw at w = 0 is infinite: a penalty on the norm of a pruned slice gives such gradients."""
    net, opt, manager, watched = sparse_net()
    dead = ~manager.masks["fc1.weight"]
    for index in range(3):
        opt.zero_grad()
        backward(net, index)
        poison = torch.zeros(16, 8).masked_fill_(dead, value)
        net.fc1.weight.backward(poison)  # accumulates, as a second loss would
        opt.step()
        assert_promises(watched)
    assert bool(torch.isfinite(net.fc1.weight).all())
