"""The contract checks bite: each part of the manager switched off in turn must be noticed, by the checks or by the package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from sparsetrain.errors import PatternError
from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.patterns import NM, Unstructured

from .promises import assert_promises
from .test_optimizers import Run

Patch = pytest.MonkeyPatch


def live(kind: type[torch.optim.Optimizer]) -> None:
    """A short life with everything in it: pruning, regrowing, an averaged copy, a restart from what was saved."""
    settings = {"lr": 0.02, "weight_decay": 0.1}
    run = Run(kind, settings, torch.float32)
    average = AveragedModel(run.net, avg_fn=get_ema_avg_fn(0.8))
    run.manager.follow(average)
    run.watched.copies = [average]
    changes = {10: 200, 20: 400, 30: 600, 40: 800}
    for index in range(50):
        run.change(changes.get(index, -1))
        run.step(index)
        average.update_parameters(run.net)
        assert_promises(run.watched)
    saved = copy.deepcopy((run.net.state_dict(), run.optimizer.state_dict(), run.manager.state_dict()))
    again = Run(kind, settings, torch.float32)
    again.net.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    again.manager.load_state_dict(saved[2])
    again.watched.asked, again.watched.masks = run.watched.asked, again.manager.masks
    for index in range(50, 60):
        for one in (run, again):
            one.step(index)
            assert_promises(one.watched)
        assert torch.equal(run.net.fc1.weight, again.net.fc1.weight)


KINDS = [torch.optim.AdamW, torch.optim.Muon]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_without_sabotage_the_promises_hold(kind: type[torch.optim.Optimizer]) -> None:
    live(kind)


def nothing(*args: Any, **kwargs: Any) -> None:
    """Does nothing."""


def attach_and_let_go(self: MaskManager, *optimizers: torch.optim.Optimizer, **settings: Any) -> MaskManager:
    _attach(self, *optimizers, **settings)
    for _, handles in self.optimizers:
        for handle in handles:
            handle.remove()
    return self


_attach = MaskManager.attach


def lying(select: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A selection that prunes one weight less than asked."""

    def lie(self: Any, scores: Tensor, sparsity: Any) -> Tensor:
        mask = select(self, scores, sparsity).clone()
        mask.view(-1)[(~mask).view(-1).nonzero()[0]] = True
        return mask

    return lie


def lie(kind: Any, unchecked: bool) -> Callable[[Patch], None]:
    def sabotage(patch: Patch) -> None:
        patch.setattr(kind, "select", lying(kind.select))
        if unchecked:
            patch.setattr(kind, "check", nothing)

    return sabotage


#: What is switched off -> (how, an optimizer that shows it, the first words of the error).
SABOTAGE: dict[str, tuple[Callable[[Patch], None], type[torch.optim.Optimizer], type[Exception], str]] = {
    "enforcement": (
        lambda patch: patch.setattr(MaskManager, "enforce", nothing),
        torch.optim.Muon,
        AssertionError,
        "pruned weights are not zero",
    ),
    "post-step hook": (
        lambda patch: patch.setattr(MaskManager, "attach", attach_and_let_go),
        torch.optim.Muon,
        AssertionError,
        "pruned weights are not zero",
    ),
    "gradient hook": (
        lambda patch: patch.setattr(MaskedTensor, "mask_gradient", nothing),
        torch.optim.Muon,
        AssertionError,
        "Muon.momentum_buffer remembers",
    ),
    "state clearing": (
        lambda patch: patch.setattr("sparsetrain.masks.manager.forget", nothing),
        torch.optim.Muon,
        AssertionError,
        "Muon.momentum_buffer remembers",
    ),
    "state masking": (
        lambda patch: patch.setattr("sparsetrain.masks.manager.per_weight_state", lambda *args: []),
        torch.optim.AdamW,
        AssertionError,
        "AdamW.exp_avg remembers",
    ),
    "selection": (lie(Unstructured, False), torch.optim.AdamW, PatternError, "fc1.weight: .*exactly 64 were asked"),
    "selection and check": (lie(Unstructured, True), torch.optim.AdamW, AssertionError, "63 of 128 pruned"),
    "N:M selection": (lie(NM, False), torch.optim.AdamW, PatternError, "fc2.weight: .*keeps 3 of 4"),
    "N:M selection and check": (lie(NM, True), torch.optim.AdamW, AssertionError, "groups of 4 with"),
    "restored masks": (
        lambda patch: patch.setattr(MaskManager, "load_state_dict", nothing),
        torch.optim.AdamW,
        AssertionError,
        "fc1.weight is dense",
    ),
    "followed copies": (
        lambda patch: patch.setattr(MaskManager, "follow", nothing),
        torch.optim.AdamW,
        AssertionError,
        "averaged copy of fc1.weight",
    ),
}


@pytest.mark.parametrize("part", SABOTAGE)
def test_sabotage_is_noticed(part: str, monkeypatch: Patch) -> None:
    sabotage, kind, error, message = SABOTAGE[part]
    sabotage(monkeypatch)
    with pytest.raises(error, match=message):
        live(kind)
