"""Promise 5: every method with every criterion and every pattern does exactly what was asked, or refuses before the first step.

The table is made of `criteria.NAMES`, the patterns and `callbacks.NAMES`: a criterion or a method that is added later is in it.
A method takes part if its constructor takes a pattern; what else it needs to run is in `SETTINGS`. Those of `KEEPING` do not:
they keep what is there and are asked for nothing.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparsetrain import callbacks, criteria
from sparsetrain.callbacks import PruneFinetune
from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.callbacks.growth_rules import Update
from sparsetrain.callbacks.tickets import TicketRounds
from sparsetrain.criteria import Criterion, StatisticsCriterion
from sparsetrain.errors import SparsetrainError
from sparsetrain.patterns import NAMES as PATTERN_TEXTS
from sparsetrain.patterns import parse_pattern
from sparsetrain.schedules import Cubic, OneShot, Rounds

from .toys import Task, trainer

#: Every kind of pattern, at a size that divides the toy.
PATTERNS = ("unstructured", "unstructured:row", "2:4", "block:2x2", "neurons", "channels")
SPARSITY = 0.5

#: Method -> variant -> what it is built with, beside criterion, pattern and (where it takes one) sparsity.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "PruneFinetune": {
        "once": {"schedule": OneShot("3st")},
        "rounds": {"schedule": Rounds(rounds=3, start="3st", every="3st")},
        "cubic, global": {"schedule": Cubic("2st", "8st", "2st"), "allocation": "global"},
    },
    "DynamicSparse": {
        rule: {"rule": rule, "allocation": None if rule == "granet" else "uniform", "update": Update("2st", 0.9, "8st")}
        for rule in ("set", "rigl", "granet", "sparse_momentum")
    },
    "NMTraining": {"straight-through": {}},
    "OneShotPruning": {"one shot": {}},
    "ContinualPruning": {"domains": {}},
    "PackNet": {"tasks": {}},
    "Supermask": {"tasks": {}},
    "LotteryTickets": {"tickets": {"rounds": TicketRounds(count=1, every="6st", prune_rate=SPARSITY)}},
}

KEEPING = {"KeepMasks", "SparseLoRA"}

DATA = [name for name, kind in criteria.NAMES.items() if kind.source != "weights"]

#: What is refused: (variant, criterion, pattern), each may be any -> words of the error.
REFUSED: dict[tuple[str, str, str], str] = {
    **{
        ("*", kind, p): "would find only ties"
        for kind in ("activation", "apoz")
        for p in ("unstructured:row", "2:4", "channels")
    },
    ("*", "sparsegpt", "neurons"): "SparseGPT moves the weights that are left in a row",
    ("rounds", "*", "2:4"): "only sparsity 0.5 and cannot follow Rounds; use schedule OneShot",
    ("cubic, global", "*", "2:4"): "only sparsity 0.5 and cannot follow Cubic; use schedule OneShot",
    ("granet", "*", "unstructured:row"): "cannot follow the one threshold of rule 'granet'; use allocation 'uniform'",
    ("granet", "*", "2:4"): "only one sparsity, and rule 'granet' raises it step by step; use rule 'rigl'",
    **{
        ("sparse_momentum", "*", p): "fixes how much is kept where, and rule 'sparse_momentum' moves it"
        for p in ("unstructured:row", "2:4", "block:2x2", "neurons", "channels")
    },
    **{("straight-through", "*", p): "is no N:M pattern; write keep:group such as 2:4" for p in PATTERNS if p != "2:4"},
    ("tickets", "*", "2:4"): "2:4 has one sparsity and cannot follow rounds",
    **{("tickets", name, "*"): "needs data; tickets need one of weights" for name in DATA},
    **{("one shot", name, "*"): "needs gradients of the loss" for name in ("gradient", "snip", "taylor", "fisher", "obs")},
    # What they do with each pattern on a sequence of tasks is in test_task_incremental.py.
    ("tasks", "*", "*"): "give the trainer a DomainSequence as datamodule",
    ("domains", "movement", "*"): "watches training, and one-shot pruning sees none",
    ("domains", "platon", "*"): "keeps no sums that could be added over domains",
    **{("one shot", name, "*"): "watches training, and one-shot pruning sees none" for name in ("movement", "platon")},
    ("cubic, global", "*", "unstructured:row"): "cannot follow a global threshold",
}


def methods() -> dict[str, type[SparsityCallback]]:
    """The methods whose constructor takes a pattern and that are asked for a sparsity."""
    return {name: kind for name, kind in callbacks.NAMES.items() if "pattern" in arguments(kind) and name not in KEEPING}


def arguments(kind: type[SparsityCallback]) -> set[str]:
    return set(inspect.signature(kind).parameters)


CASES = [
    (method, variant, criterion, pattern)
    for method, kind in methods().items()
    for variant in SETTINGS.get(method, {"default": {}})
    for criterion in (criteria.NAMES if "criterion" in arguments(kind) else ["its own"])
    for pattern in PATTERNS
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tickets are written to where a run is at home, which without a word is here."""
    monkeypatch.chdir(tmp_path)


class Network(nn.Module):
    """Two convolutions and a layer behind a flattening are targets; every dimension divides by 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 2), nn.Conv2d(8, 8, 2)
        self.fc, self.head = nn.Linear(8 * 4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        logits: Tensor = self.head(torch.relu(self.fc(hidden.flatten(1))))
        return logits


TARGETS = ("conv1.weight", "conv2.weight", "fc.weight")


class Images(Task):
    def __init__(self) -> None:
        super().__init__(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
        self.net = Network()  # type: ignore[assignment]


def data() -> tuple[DataLoader[Any], DataLoader[Any]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 4, 4, 4, generator=generator)
    images = TensorDataset(x, x.mean((2, 3))[:, :3].argmax(1))
    return DataLoader(images, batch_size=4, shuffle=True), DataLoader(images, batch_size=12)


def criterion_of(name: str) -> Criterion:
    """With few batches where it calibrates."""
    kind: Callable[..., Criterion] = criteria.NAMES[name]
    return kind(batches=2) if "batches" in inspect.signature(kind).parameters else kind()


def build(method: str, variant: str, criterion: str, pattern: str) -> SparsityCallback:
    kind: Callable[..., SparsityCallback] = callbacks.NAMES[method]
    given: dict[str, Any] = {"pattern": pattern, "sparsity": SPARSITY}
    if criterion != "its own":
        given["criterion"] = criterion_of(criterion)
    given |= SETTINGS.get(method, {}).get(variant, {})
    return kind(**{name: value for name, value in given.items() if name in arguments(callbacks.NAMES[method])})


def dead_as(pattern: str, weight: Tensor) -> list[int]:
    """Zeros of every unit of a pattern, counted here and not by the package."""
    zero = (weight == 0).long()
    if pattern == "unstructured":
        return [int(zero.sum())]
    if pattern == "unstructured:row":
        return zero.flatten(1).sum(1).tolist()
    if pattern == "2:4":
        return zero.movedim(1, -1).reshape(-1, 4).sum(1).tolist()
    if pattern == "block:2x2":
        rows, columns = len(zero) // 2, zero[0].numel() // 2
        return zero.reshape(rows, 2, columns, 2).sum((1, 3)).flatten().tolist()
    return zero.movedim(0 if pattern == "neurons" else 1, 0).flatten(1).sum(1).tolist()


def assert_as_asked(module: Images, pattern: str, pooled: bool, masks: dict[str, Tensor] | None = None) -> None:
    weights = [module.net.get_parameter(name).detach() for name in TARGETS]
    if masks is not None:  # what has just grown may still be 0.0: the masks are counted
        assert all(not weight[~masks[f"net.{name}"]].any() for name, weight in zip(TARGETS, weights, strict=True))
        weights = [masks[f"net.{name}"].float() for name in TARGETS]
    for weight in weights:
        counts = dead_as(pattern, weight)
        if pattern in ("block:2x2", "neurons", "channels"):
            whole = weight.numel() // len(counts)
            assert set(counts) <= {0, whole}, "a unit is half pruned"
            assert pooled or counts.count(whole) == math.floor(SPARSITY * len(counts))
        elif not pooled:
            assert set(counts) == {weight.numel() // len(counts) // 2}
    total = sum(weight.numel() for weight in weights)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    if not pooled or pattern == "unstructured":
        assert zeros == math.floor(SPARSITY * total)
    else:  # the longest run of lowest units that fits the budget: no unit of any tensor fits in the rest
        largest = max(weight.numel() // len(dead_as(pattern, weight)) for weight in weights)
        assert math.floor(SPARSITY * total) - largest < zeros <= math.floor(SPARSITY * total)


def outcome(method: str, variant: str, criterion: str, pattern: str) -> str:
    """Run one combination: the words of its refusal, or nothing when it did what was asked."""
    torch.manual_seed(0)
    module, run = Images(), trainer(max_epochs=2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    said = ""
    try:
        callback = build(method, variant, criterion, pattern)
        run.callbacks.insert(0, callback)  # type: ignore[attr-defined]
        run.fit(module, *data())
    except SparsetrainError as error:
        said = str(error)
    if said:
        assert run.global_step == 0, f"refused after {run.global_step} steps: {said}"
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
        return said
    assert run.global_step == 12
    assert callback.verification is not None
    assert callback.verification.ok
    assert callback.masks.verify(strict=True).ok
    alive = {tensor.name: tensor.full_mask() for tensor in callback.masks}
    assert_as_asked(module, pattern, callback.pooled, alive if method == "DynamicSparse" else None)
    return ""


def refusals(variant: str, criterion: str, pattern: str) -> list[str]:
    """Words of the pinned errors; where there are several reasons, the first one found is told."""
    keys = itertools.product((variant, "*"), (criterion, "*"), (pattern, "*"))
    return [REFUSED[key] for key in keys if key in REFUSED]


@pytest.mark.parametrize(("method", "variant", "criterion", "pattern"), CASES)
def test_every_combination_does_as_asked_or_refuses(method: str, variant: str, criterion: str, pattern: str) -> None:
    said, expected = outcome(method, variant, criterion, pattern), refusals(variant, criterion, pattern)
    if expected:
        assert any(words in said for words in expected), f"it was to be refused ({expected}), and said {said!r}"
    else:
        assert said == ""


def test_the_table_is_whole() -> None:
    assert {type(parse_pattern(text)) for text in PATTERNS} == {type(parse_pattern(text)) for text in PATTERN_TEXTS}
    assert len(PATTERNS) == len(PATTERN_TEXTS)
    assert SETTINGS.keys() <= methods().keys()
    assert len(CASES) >= 2 * len(criteria.NAMES) * len(PATTERNS)


def test_a_criterion_that_refuses_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria.APoZ, "prepare", Criterion.prepare)
    assert outcome("PruneFinetune", "rounds", "apoz", "channels") == ""  # and the pinned refusal would fail
    with pytest.raises(AssertionError, match="it was to be refused"):
        test_every_combination_does_as_asked_or_refuses("PruneFinetune", "rounds", "apoz", "channels")


def test_a_refusal_that_comes_late_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(self: StatisticsCriterion, *args: Any, **kwargs: Any) -> Tensor:
        raise SparsetrainError("too late")

    monkeypatch.setattr(criteria.PLATON, "score", late)
    with pytest.raises(AssertionError, match="refused after 3 steps: too late"):
        outcome("PruneFinetune", "rounds", "platon", "neurons")


def test_a_weight_more_or_less_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = PruneFinetune.final
    monkeypatch.setattr(PruneFinetune, "final", lambda self, tensor: float(asked(self, tensor)) - 0.05)
    with pytest.raises(AssertionError):
        outcome("PruneFinetune", "rounds", "taylor", "neurons")
