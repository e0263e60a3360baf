"""Block-wise OBS on a quadratic loss that is known exactly: least squares, by another route, says what is best."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.calibration import calibrate
from sparsetrain.criteria import OBS, Criterion, Fisher, Known, Seen
from sparsetrain.criteria.obs import obs_scores, obs_update
from sparsetrain.errors import RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.patterns import Unstructured
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

BLOCK, DAMP = 5, 0.03


class Quadratic:
    """``L(w) = 1/2 (w - w0)' H (w - w0)``, H block-diagonal in the order of the view; gradients of samples make up H.

    ``1/2 |R (w - w0)|^2`` with the stacked samples as R, so that the minimum is a least-squares problem.
    """

    def __init__(self, shape: tuple[int, ...], samples: int = 9, seed: int = 0, transposed: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(shape, generator=generator).double()
        self.gradients = torch.randn((samples, *shape), generator=generator).double()
        module = nn.Module()
        module.register_parameter("weight", nn.Parameter(self.weight))
        self.known = Known("w", module, "weight", Unstructured(), transposed)

    def flat(self, tensor: Tensor) -> Tensor:
        return self.known.view(tensor).reshape(-1)

    def criterion(self) -> OBS:
        criterion = OBS(block=BLOCK, damp=DAMP)
        criterion.prepare(self.known.module, [self.known])
        for gradient in self.gradients:
            criterion.observe(Seen(self.known, self.weight, gradient))
        return criterion

    def blocks(self) -> list[tuple[slice, Tensor]]:
        found = []
        for start in range(0, self.weight.numel(), BLOCK):
            rows = slice(start, min(start + BLOCK, self.weight.numel()))
            samples = torch.stack([self.flat(g)[rows] for g in self.gradients]) / len(self.gradients) ** 0.5
            damped = torch.eye(samples.shape[1]).double() * DAMP**0.5
            found.append((rows, torch.cat([samples, damped])))
        return found

    def best(self, free: Tensor) -> tuple[Tensor, float]:
        """The minimum of L over the weights that are free, with all others zero; and L there."""
        w0, free = self.flat(self.weight), self.flat(free)
        w, loss = torch.zeros_like(w0), 0.0
        for rows, root in self.blocks():
            here = free[rows]
            if bool(here.any()):
                w[rows] = w[rows].masked_scatter(
                    here, torch.linalg.lstsq(root[:, here], root @ w0[rows], driver="gelsd").solution
                )
            loss += float((root @ (w[rows] - w0[rows])).square().sum()) / 2
        return w, loss


CASES = [((3, 5), False), ((4, 7), False), ((2, 3, 2, 2), False), ((7, 4), True)]


@pytest.mark.parametrize(("shape", "transposed"), CASES)
def test_the_score_is_the_exact_rise_of_the_loss(shape: tuple[int, ...], transposed: bool) -> None:
    toy = Quadratic(shape, transposed=transposed)
    scores = toy.criterion().score(toy.weight, name="w")
    assert scores.shape == toy.weight.shape
    for index in range(toy.weight.numel()):
        free = torch.ones(shape, dtype=torch.bool)
        free.view(-1)[index] = False
        assert float(scores.reshape(-1)[index]) == pytest.approx(toy.best(free)[1], rel=1e-9)


@pytest.mark.parametrize(("shape", "transposed"), CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_survivors_move_to_the_constrained_minimum(shape: tuple[int, ...], transposed: bool, seed: int) -> None:
    toy = Quadratic(shape, seed=seed, transposed=transposed)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    moved = toy.criterion().compensate(toy.weight, mask, name="w")
    torch.testing.assert_close(toy.flat(moved), toy.best(mask)[0], rtol=1e-9, atol=1e-12)
    assert not moved[~mask].any()
    assert not torch.allclose(moved[mask], toy.weight[mask])  # the twin: it does move them


@pytest.mark.parametrize("seed", range(4))
def test_what_is_dead_already_neither_moves_nor_makes_up_for_others(seed: int) -> None:
    toy = Quadratic((3, 10), seed=seed)
    dead = torch.rand((3, 10), generator=torch.Generator().manual_seed(seed + 50)) < 0.3
    toy.weight[dead] = 0.0
    criterion = toy.criterion()
    scores = criterion.score(toy.weight, name="w")
    assert not scores[dead].any()
    for index in (~dead).view(-1).nonzero().flatten().tolist():
        free = ~dead
        free.view(-1)[index] = False
        assert float(scores.view(-1)[index]) == pytest.approx(toy.best(free)[1], rel=1e-9)
    mask = ~dead & (torch.rand((3, 10), generator=torch.Generator().manual_seed(seed + 90)) > 0.4)
    moved = criterion.compensate(toy.weight, mask, name="w")
    torch.testing.assert_close(toy.flat(moved), toy.best(mask)[0], rtol=1e-9, atol=1e-12)
    assert not moved[~mask].any()


def test_by_hand() -> None:
    # F = [[2, 1], [1, 2]]: F^-1 = [[2, -1], [-1, 2]] / 3
    curvature = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]).double()
    weight = torch.tensor([[1.0, 2.0]]).double()
    assert obs_scores(weight, curvature)[0].tolist() == pytest.approx([0.75, 3.0])
    assert obs_update(weight, curvature, torch.tensor([[True, False]]))[0].tolist() == pytest.approx([2.0, 0.0])
    assert obs_scores(torch.tensor([[1.0, 0.0]]).double(), curvature)[0].tolist() == pytest.approx([1.0, 0.0])


def test_blocks_of_one_are_the_diagonal() -> None:
    model, batches = nn.Linear(6, 3), [torch.randn(4, 6, generator=torch.Generator().manual_seed(1))]
    manager = MaskManager(model)
    obs, fisher = OBS(block=1, damp=1e-12), Fisher()
    for criterion in (obs, fisher):
        assert calibrate(manager, criterion, batches, lambda batch: model(batch).square().sum()) == 4
    found = obs.score(model.weight, name="weight")
    torch.testing.assert_close(found.float(), fisher.score(model.weight, name="weight").detach(), rtol=1e-5, atol=0)


class Still(OBS):
    """The twin: scores alone."""

    compensate = Criterion.compensate  # type: ignore[assignment]


@pytest.mark.parametrize("pattern", ["unstructured", "unstructured:row", "2:4", "block:2x2", "channels"])
def test_pruning_a_regression_costs_less_with_the_update(pattern: str) -> None:
    def loss_after(criterion: Any) -> float:
        torch.manual_seed(4)
        x, mixing = torch.randn(64, 8), torch.randn(8, 8)
        x = x @ mixing  # correlated inputs: others can make up for a weight
        model = nn.Linear(8, 6, bias=False)
        y = model(x).detach() + 0.1 * torch.randn(64, 6)
        manager = MaskManager(model, pattern=pattern)
        for sparsity in (None,) if pattern == "2:4" else (0.25, 0.5):
            calibrate(
                manager, criterion, zip(x.split(16), y.split(16), strict=True), lambda b: (model(b[0]) - b[1]).square().sum()
            )
            prune(manager, sparsity, criterion=criterion)
            assert manager.verify(strict=True).ok
        assert manager.sparsity() == 0.5
        return float((model(x) - y).detach().square().mean())

    assert loss_after(OBS(block=8)) < 0.9 * loss_after(Still(block=8))


def test_memory_is_refused_before_it_is_taken() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(RecipeError, match=r"block=32 needs 0\.00195 GiB for 8192 weights.*use block=16"):
        prune(MaskManager(model, Targets(head=True)), 0.5, criterion=OBS(block=32, memory_gib=2**-10))
    criterion = OBS(block=16, memory_gib=2**-10)
    criterion.prepare(model, [Known(n, m, "weight", Unstructured()) for n, m in model.named_children()])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"block": 0}, "block=0"),
        ({"damp": 0.0}, "damp=0"),
        ({"memory_gib": 0.0}, "memory_gib=0"),
        ({"batches": 0}, "batches=0"),
    ],
)
def test_what_is_out_of_range_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        OBS(**wrong)


def test_a_matrix_that_is_none_is_refused() -> None:
    model = nn.Linear(4, 4, bias=False)
    manager, criterion = MaskManager(model), OBS(damp=1e-300)  # 1 sample, 16 weights in a block: rank 1
    calibrate(manager, criterion, [torch.ones(1, 4)], lambda batch: model(batch).sum())
    with pytest.raises(RecipeError, match="raise damp"):
        prune(manager, 0.5, criterion=criterion)
