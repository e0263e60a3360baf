"""Owner maps, frozen entries, supermasks and the rest of a model, by hand and by property."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.errors import DivergedError, PatternError, TargetError
from sparsetrain.incremental import FREE, FrozenEntries, Rest, claim, head_of, serving_mask
from sparsetrain.incremental.supermask import Scored, chosen, initial_scores
from sparsetrain.patterns import NM, Block, Pattern, Slices, Unstructured
from sparsetrain.tasks import MLP, LeNet300

# ---------------------------------------------------------------- owners


def test_a_claim_by_hand() -> None:
    weight = torch.tensor([[4.0, -9.0, 1.0, 3.0], [8.0, 2.0, -7.0, 5.0]])
    owners = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.uint8)
    mask, sparsity = claim(weight.abs(), owners, Unstructured(), Fraction(1, 3))
    # Free are 4 1 3 2 7 5: a third of the six are two, 7 and 5.
    assert mask.tolist() == [[False, False, False, False], [False, False, True, True]]
    assert sparsity == Fraction(6, 8)
    owners[mask] = 2
    assert serving_mask(owners, 1).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert serving_mask(owners, 2).tolist() == [[False, True, False, False], [True, False, True, True]]


@pytest.mark.parametrize(
    ("pattern", "share", "taken"),
    [
        (Unstructured("row"), Fraction(1, 2), [3, 1]),  # of 6 in each of 4 rows; then of the 3 that are left
        (NM(1, 3), None, [1, 1]),
        (Slices(0), Fraction(1, 2), [2, 1]),  # of 4 rows; of 2
        (Slices(1), Fraction(1, 3), [2, 1]),  # of 6 columns; of 4
        (Block(2, 2), Fraction(1, 2), [3, 1]),  # of 2 x 3 blocks; of 3
    ],
)
def test_each_task_has_its_pattern_on_free_weights(pattern: Pattern, share: Fraction | None, taken: list[int]) -> None:
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    owners = torch.zeros(4, 6, dtype=torch.uint8)
    units = {Slices(0): 6, Slices(1): 4, Block(2, 2): 4}.get(pattern)
    for task, expected in enumerate(taken, 1):
        mask, sparsity = claim(scores, owners, pattern, share)
        pattern.check(mask, sparsity)
        assert not bool((owners[mask] != FREE).any())
        if units:
            assert int(mask.sum()) == expected * units
        elif isinstance(pattern, NM):
            assert set(mask.view(4, 2, 3).sum(-1).flatten().tolist()) == {expected}
        else:
            assert set(mask.sum(1).tolist()) == {expected}
        owners[mask] = task


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 9),
    shares=st.lists(st.fractions(Fraction(1, 20), 1), min_size=1, max_size=8),
    seed=st.integers(0, 9),
)
def test_owner_maps_keep_what_they_promise(rows: int, columns: int, shares: list[Fraction], seed: int) -> None:
    """Tasks are disjoint, never lose a weight, take the largest of what is free, and stop where nothing is free."""
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    owners = torch.zeros(rows, columns, dtype=torch.uint8)
    for task, share in enumerate(shares, 1):
        free = owners == FREE
        left = int(free.sum())
        if not left:
            with pytest.raises(PatternError, match="full"):
                claim(scores, owners, Unstructured(), share)
            return
        mask, _ = claim(scores, owners, Unstructured(), share)
        count = int(mask.sum())
        assert 1 <= count <= left
        assert count == 1 or count <= share * left < count + 1
        assert bool(free[mask].all())
        if bool((free & ~mask).any()):
            assert float(scores[mask].min()) >= float(scores[free & ~mask].max())
        before = owners.clone()
        owners[mask] = task
        assert torch.equal(serving_mask(before, task - 1), serving_mask(owners, task - 1))


@pytest.mark.parametrize(
    ("pattern", "share", "taken", "says"),
    [
        (Unstructured(), Fraction(1, 2), 8, "full: earlier tasks own every weight"),
        (NM(1, 2), None, 8, "full: a group has 0 of 2 weights left, 1:2 takes 1 for each task; it holds 2 tasks"),
        (Unstructured(), None, 0, "share None"),
        (Unstructured(), Fraction(3, 2), 0, "share 3/2"),
    ],
)
def test_a_claim_that_cannot_be(pattern: Pattern, share: Fraction | None, taken: int, says: str) -> None:
    owners = torch.zeros(8, dtype=torch.uint8)
    owners[:taken] = 1
    with pytest.raises(PatternError, match=says):
        claim(torch.rand(2, 4), owners.view(2, 4), pattern, share)


# ---------------------------------------------------------------- frozen entries

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
}


def train(optimizer: str, frozen: FrozenEntries | None, entries: Tensor) -> tuple[nn.Linear, Tensor, torch.optim.Optimizer]:
    torch.manual_seed(3)
    layer = nn.Linear(6, 4, bias=False)
    start = layer.weight.detach().clone()
    stepper = OPTIMIZERS[optimizer]([layer.weight])
    if frozen is not None:
        frozen.freeze(layer.weight, entries)
        frozen.attach(stepper)
    x, y = torch.randn(32, 6), torch.randn(32, 4)

    def closure() -> Tensor:
        stepper.zero_grad()
        loss = F.mse_loss(layer(x), y)
        loss.backward()
        return loss

    for _ in range(12):
        stepper.step(closure)
    return layer, start, stepper


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_moves_frozen_entries_by_a_bit(optimizer: str) -> None:
    entries = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    layer, start, stepper = train(optimizer, FrozenEntries(), entries)
    weight = layer.weight.detach()
    assert torch.equal(weight[entries].view(torch.int32), start[entries].view(torch.int32))
    assert bool((weight[~entries] != start[~entries]).all())
    if optimizer in ("sgd", "adam", "adamw", "rmsprop", "muon"):
        for key, value in stepper.state[layer.weight].items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert not bool(value[entries].any()), key
                assert bool(value[~entries].any()), key
    free, _, _ = train(optimizer, None, entries)
    assert not torch.equal(free.weight[entries], start[entries])  # nothing would have held them


def test_frozen_entries_add_up_and_are_let_go() -> None:
    parameter = nn.Parameter(torch.ones(3))
    stepper = torch.optim.SGD([parameter], lr=1.0)
    frozen = FrozenEntries()
    frozen.freeze(parameter, torch.tensor([True, False, False]))
    frozen.freeze(parameter, torch.tensor([False, True, False]))
    frozen.attach(stepper)
    parameter.sum().backward()
    stepper.step()
    assert parameter.tolist() == [1.0, 1.0, 0.0]
    frozen.release()
    stepper.step()
    assert parameter.tolist() == [0.0, 0.0, -1.0]
    with pytest.raises(TargetError, match=r"shape \(2,\) for a parameter of shape \(3,\)"):
        frozen.freeze(parameter, torch.tensor([True, False]))


# ---------------------------------------------------------------- supermasks


class Masked(torch.autograd.Function):
    """``m(s) * w`` with the identity for the derivative of ``m``: the reference for the straight-through gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, scores: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        weight, mask = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * weight, grad * mask, None


def test_gradients_are_those_of_autograd_straight_through() -> None:
    torch.manual_seed(0)
    x, y, dense = torch.randn(5, 4), torch.randn(5, 3), torch.randn(3, 4)
    scores = torch.randn(3, 4, requires_grad=True)
    mask, sparsity = chosen(scores.detach(), Unstructured(), Fraction(2, 3), 0.5)
    assert (int(mask.sum()), sparsity) == (4, Fraction(2, 3))
    weight = dense.clone().requires_grad_()
    F.mse_loss(x @ Masked.apply(scores, weight, mask).T, y).backward()
    seen = (dense * mask).requires_grad_()
    F.mse_loss(x @ seen.T, y).backward()
    frozen = torch.rand(3, 4) < 0.5
    scored = Scored(dense, nn.Parameter(scores.detach()), mask, frozen)
    scored.score_gradient(seen.grad * 8, scale=8)
    scored.weight_gradient(seen.grad)
    assert torch.allclose(scored.scores.grad, scores.grad)
    assert torch.allclose(seen.grad, weight.grad.masked_fill(frozen, 0.0))


def test_a_mask_is_chosen_by_threshold_or_by_pattern() -> None:
    scores = torch.tensor([[0.3, 0.1, -2.0, 0.2], [0.0, 0.4, 0.5, 0.6]])
    mask, sparsity = chosen(scores, Unstructured(), None, 0.15)
    assert (mask.int().tolist(), sparsity) == ([[1, 0, 0, 1], [0, 1, 1, 1]], Fraction(3, 8))
    mask, sparsity = chosen(scores, NM(1, 2), Fraction(1, 2), 9.0)
    assert (mask.int().tolist(), sparsity) == ([[1, 0, 0, 1], [0, 1, 0, 1]], Fraction(1, 2))
    with pytest.raises(DivergedError, match="no score is above the threshold 7"):
        chosen(scores, Unstructured(), None, 7.0)
    with pytest.raises(DivergedError, match="lower score_lr"):
        chosen(scores * float("nan"), Unstructured(), Fraction(1, 2), 7.0)


def test_scores_start_as_a_layer_does_and_by_their_key_alone() -> None:
    one = initial_scores((30, 16), (4, "fc1.weight"))
    assert torch.equal(one, initial_scores((30, 16), (4, "fc1.weight")))
    assert not torch.equal(one, initial_scores((30, 16), (5, "fc1.weight")))
    assert 0.24 < float(one.abs().max()) <= 0.25  # 1 / sqrt(16)
    assert abs(float(one.mean())) < 0.02


# ---------------------------------------------------------------- the rest


def test_the_head_is_found() -> None:
    assert head_of(LeNet300()) == ("fc3.weight", "fc3.bias")
    assert head_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False))) == ("1.weight",)
    assert head_of(nn.Linear(4, 2)) == ()


def test_rows_of_the_head_belong_to_the_first_task_with_their_class() -> None:
    network = MLP(4, [3], 5)
    rest = Rest(network, {"fc1.weight"})
    for task, classes, mine in ((1, [0, 2], [0, 2]), (2, [2, 3], [3]), (3, [0, 2], [])):
        frozen = FrozenEntries()
        rest.begin(task, classes, frozen)
        before = network.fc2.weight.detach().clone()
        stepper = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1)
        frozen.attach(stepper)
        network(torch.ones(1, 4)).sum().backward()
        stepper.step()
        moved = (network.fc2.weight != before).all(1).nonzero().flatten().tolist()
        assert moved == mine
        frozen.release()
        rest.end(task)
    assert rest.owners is not None
    assert rest.owners.tolist() == [1, 0, 1, 2, 0]
    with pytest.raises(TargetError, match=r"fc2.weight is the output head.*targets.head: false"):
        Rest(network, {"fc1.weight", "fc2.weight"})


def test_a_head_without_classes_is_one_of_the_rest_after_a_file_too() -> None:
    def made() -> tuple[nn.Module, Rest]:
        network = MLP(4, [3], 5)
        return network, Rest(network, {"fc1.weight"}, per_task=True)

    network, rest = made()
    rest.begin(1, None, FrozenEntries())
    rest.end(1)
    other, again = made()
    again.load_state_dict(rest.state_dict())
    for name in ("fc1.bias", "fc2.weight", "fc2.bias"):
        now = other.get_parameter(name).detach().clone()
        with again.serving(1):
            assert torch.equal(other.get_parameter(name), network.get_parameter(name))
        assert torch.equal(other.get_parameter(name), now)
        assert not torch.equal(now, network.get_parameter(name))
    rows, last = made()  # with classes rows stay rows
    last.begin(1, [0, 1], FrozenEntries())
    last.end(1)
    other, again = made()
    again.load_state_dict(last.state_dict())
    with again.serving(1):
        assert torch.equal(other.get_parameter("fc1.bias"), rows.get_parameter("fc1.bias"))
        assert not torch.equal(other.get_parameter("fc2.weight"), rows.get_parameter("fc2.weight"))


def test_norms_that_keep_statistics_are_named() -> None:
    for norm, told in (
        (nn.BatchNorm1d(3), True),
        (nn.BatchNorm1d(3, track_running_stats=False), False),
        (nn.LayerNorm(3), False),
    ):
        rest = Rest(nn.Sequential(nn.Linear(4, 3), norm, nn.Linear(3, 2)), {"0.weight"})
        if told:
            with pytest.raises(TargetError, match=r"1 keeps running statistics.* do something"):
                rest.refuse_norms("do something")
        else:
            rest.refuse_norms("do something")


def test_copies_of_the_rest_count() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    rest = Rest(network, {"0.weight"}, per_task=True)
    for task in (1, 2, 3):
        rest.begin(task, [0, 1], FrozenEntries())
        rest.end(task)
    # A bias and two of the norm: 9; the head: 8. Each further task has 9, and 3 + 3 + 1 running statistics, again.
    assert rest.weights() == 17 + 2 * 16
