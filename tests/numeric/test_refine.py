"""Refinement on a mask: the exact minimum, never worse than before, and SparseGPT's weights better than the published ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.criteria import Known, Seen, SparseGPT
from sparsetrain.criteria.refine import refine
from sparsetrain.errors import RecipeError
from sparsetrain.patterns import parse_pattern


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(samples: int, columns: int, seed: int = 1) -> Tensor:
    return random(samples, columns, seed=seed) @ (torch.eye(columns) + 0.4 * random(columns, columns, seed=seed + 1))


def hessian_of(x: Tensor, ridge: float) -> Tensor:
    return (x.T @ x + ridge * torch.eye(x.shape[1]))[None]


def test_one_step_by_hand() -> None:
    hessian, dense = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), torch.ones(1, 2, 1)
    alive = torch.tensor([[[False], [True]]])
    assert refine(dense * alive, dense, alive, hessian, 1).flatten().tolist() == [0.0, 1.5]
    assert refine(dense * alive, dense, alive, hessian, 9).flatten().tolist() == [0.0, 1.5]  # it has arrived
    assert refine(dense, dense, alive | True, hessian, 9).flatten().tolist() == [1.0, 1.0]  # nothing to make up for


def test_it_ends_at_the_least_squares_of_what_is_left() -> None:
    x, dense = correlated(60, 12), random(12, 5, seed=4)
    alive = random(12, 5, seed=6) > 0
    found = refine((dense * alive)[None], dense[None], alive[None], hessian_of(x, 2.0), 40)[0]
    rows = torch.cat([x, 2.0**0.5 * torch.eye(12)])
    for column in range(5):
        kept = alive[:, column]
        best = torch.linalg.lstsq(rows[:, kept], rows @ dense[:, column, None]).solution[:, 0]
        assert torch.allclose(found[kept, column], best, atol=1e-9)
        assert not found[~kept, column].any()


def test_every_step_comes_closer() -> None:
    x, dense = correlated(60, 12), random(12, 5, seed=4)
    alive, hessian = random(12, 5, seed=6) > 0, hessian_of(x, 2.0)
    errors = []
    for steps in range(8):
        left = refine((dense * alive)[None], dense[None], alive[None], hessian, steps)[0] - dense
        errors.append((left * (hessian[0] @ left)).sum(0))
    assert all(bool((later < earlier + 1e-12).all()) for earlier, later in itertools.pairwise(errors))
    assert bool((errors[3] < errors[2]).all())


@pytest.mark.parametrize("pattern", ["unstructured:row", "2:4", "unstructured", "block:2x2"])
def test_sparsegpt_loses_less_with_it_and_keeps_its_mask(pattern: str) -> None:
    (x, fresh), weight = correlated(500, 32).split((400, 100)), random(24, 32, seed=5)  # judged by inputs it has not seen
    layer = nn.Linear(32, 24, bias=False).double()
    tensor = Known("w", layer, "weight", parse_pattern(pattern))

    def solved(steps: int) -> tuple[Tensor, float]:
        criterion = SparseGPT(refine=steps, block=8)
        criterion.observe(Seen(tensor, weight, input=x))
        found = criterion.solve(weight, tensor.pattern, 0.5, name="w", alive=None)
        assert found is not None
        assert not found[1][~found[0]].any()
        return found[0], float((fresh @ (found[1] - weight).T).square().sum())

    (mask, before), (same, after) = solved(0), solved(5)
    assert torch.equal(mask, same)
    assert after < 0.9 * before


def test_a_grouped_convolution_and_dead_inputs() -> None:
    layer = nn.Conv2d(6, 8, 2, groups=2, bias=False)
    tensor, weight = Known("w", layer, "weight", parse_pattern("unstructured:row")), layer.weight.detach()
    x = random(6, 6, 5, 5).float()
    x[:, 1] = 0

    def solved(steps: int) -> tuple[Tensor, float]:
        criterion = SparseGPT(refine=steps)
        criterion.observe(Seen(tensor, weight, input=x))
        found = criterion.solve(weight, tensor.pattern, 0.25, name="w", alive=None)
        assert found is not None
        gone = nn.functional.conv2d(x, found[1] - weight, groups=2)
        return found[1], float(gone.square().sum())

    (_, before), (values, after) = solved(0), solved(20)
    assert after < before
    assert int((values[:4, 1] == 0).sum()) == 12  # the dead input's weights, 4 of 12 in a row, are what goes: 3 of them
    kept = values[:4, 1] != 0
    assert torch.equal(values[:4, 1][kept], weight[:4, 1][kept])


def test_steps_out_of_range() -> None:
    with pytest.raises(RecipeError, match=r"SparseGPT refine=-1: a number of steps, 0 or more"):
        SparseGPT(refine=-1)
