"""Promise 2 where memory is not one number a weight: histories, rows, and the sign of zero."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.masks import MaskManager
from sparsetrain.pruning import prune

from .test_training_loops import backward
from .toys import Net


def test_a_change_that_changes_nothing_leaves_the_optimizer_alone() -> None:
    torch.manual_seed(0)
    net = Net()
    opt = torch.optim.LBFGS(net.parameters(), lr=0.05, max_iter=3)
    manager = MaskManager(net).attach(opt)
    prune(manager, 0.5)

    def closure() -> Tensor:
        opt.zero_grad()
        return backward(net)

    opt.step(closure)
    remembered = len(opt.state[net.fc1.weight]["old_dirs"])
    for name, mask in manager.masks.items():
        change = manager.install(name, mask.clone(), 0.5)
        assert (change.died, change.grew) == (0, 0)
    assert remembered > 0
    assert len(opt.state[net.fc1.weight].get("old_dirs", [])) == remembered


def test_a_pruned_row_leaves_nothing_in_factored_memory() -> None:
    """Adafactor remembers rows: of a row that is pruned as a whole nothing may stay, or it regrows with old memory."""
    torch.manual_seed(0)
    net = Net()
    opt = torch.optim.Adafactor(net.parameters(), lr=0.01)
    manager = MaskManager(net, pattern="neurons").attach(opt)
    for index in range(5):
        opt.zero_grad()
        backward(net, index)
        opt.step()
    prune(manager, 0.25)
    rows = ~manager.masks["fc1.weight"].any(1)
    assert int(rows.sum()) == 4
    assert not opt.state[net.fc1.weight]["row_var"][rows].any()


def test_a_pruned_weight_is_plus_zero() -> None:
    """-0.0 equals 0.0 and yet is another bit pattern: a file with it is not the file of the resumed run."""
    torch.manual_seed(0)
    net = Net()
    opt = torch.optim.Muon([net.fc1.weight, net.fc2.weight], lr=0.02)
    manager = MaskManager(net).attach(opt)
    prune(manager, 0.5)
    for index in range(3):
        opt.zero_grad()
        backward(net, index)
        opt.step()
    for name, mask in manager.masks.items():
        assert not torch.signbit(net.get_parameter(name))[~mask].any()
