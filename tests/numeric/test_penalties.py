"""Norms, proximal operators and penalties of units: closed forms, scipy, scikit-learn, and what defines an optimum."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, root
from sklearn.linear_model import Lasso, MultiTaskLasso
from torch import Tensor, nn

from sparsetrain.errors import RecipeError, TargetError
from sparsetrain.penalties import (
    Part,
    Units,
    adam_steps,
    group_hoyer_square,
    group_lasso,
    group_soft_threshold,
    growing_l2,
    growing_strengths,
    metric_group_soft_threshold,
    sparse_group_lasso,
    sparse_group_soft_threshold,
    ssl,
    unit_norms,
    unit_sizes,
)

Operator = Callable[[Units], Tensor]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(tensor: Tensor) -> Units:
    return Units((Part(tensor, 0),))


def plus_zeros(tensor: Tensor) -> bool:
    return bool((tensor == 0).all()) and not bool(tensor.signbit().any())


# -- units ------------------------------------------------------------------------------------------------------------------


def test_a_neuron_is_a_row_a_bias_and_a_column() -> None:
    first, bias, second = (
        torch.tensor([[1.0, 4.0], [0.0, 0.0]]),
        torch.tensor([2.0, 0.0]),
        torch.tensor([[2.0, 3.0], [0.0, 4.0]]),
    )
    units = Units((Part(first, 0), Part(bias, 0), Part(second, 1)))
    assert unit_norms(units).tolist() == [5.0, 5.0]  # 1 + 16 + 4 + 4 and 9 + 16
    assert unit_sizes(units).tolist() == [5, 5]


INDICES = {
    "permuted": torch.tensor([[5], [0], [3], [1], [4], [2]]),
    "heads in order": torch.tensor([[0, 1, 2], [3, 4, 5]]),
    "heads mixed": torch.tensor([[0, 4], [5, 1], [2, 3]]),
    "some in order": torch.tensor([[2, 3], [4, 5]]),
    "some": torch.tensor([[4], [1]]),
}


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", INDICES)
def test_any_slices_of_any_dimension(name: str, dim: int) -> None:
    """Norms, the plain prox and the metric one, unit by unit, by hand."""
    index = INDICES[name]
    tensor, other = draw(6, 6, 6), draw(len(index), seed=1)
    start, moved = tensor.clone(), tensor.movedim(dim, 0)
    units = Units((Part(tensor, dim, index), Part(other, 0)))
    owned = [torch.cat([moved[own].flatten(), other[u : u + 1]]).clone() for u, own in enumerate(index)]
    norms = torch.stack([own.norm() for own in owned])
    torch.testing.assert_close(unit_norms(units), norms)
    assert unit_sizes(units).tolist() == [own.numel() for own in owned]

    limit = float(norms.median()) + 1e-9  # at least one dies
    twin, twin_other = tensor.clone(), other.clone()
    died = group_soft_threshold(units, limit, 1.0)
    assert died.tolist() == (norms <= limit).tolist()
    assert died.any()
    for u, own in enumerate(index):
        now = torch.cat([moved[own].flatten(), other[u : u + 1]])
        torch.testing.assert_close(now, owned[u] * max(0.0, 1 - limit / float(norms[u])))
        assert plus_zeros(now) == bool(died[u])
    rest = [i for i in range(6) if i not in index.flatten().tolist()]
    assert torch.equal(moved[rest], start.movedim(dim, 0)[rest])

    same = [torch.full_like(twin, 0.5), torch.full((), 0.5, dtype=torch.float64)]
    gone = metric_group_soft_threshold(Units((Part(twin, dim, index), Part(twin_other, 0))), same, 2 * limit, 1.0)
    torch.testing.assert_close(twin, tensor, rtol=0, atol=1e-12)
    torch.testing.assert_close(twin_other, other, rtol=0, atol=1e-12)
    assert torch.equal(gone, died)


class Slot(NamedTuple):
    """The facts that a coupled group tells about each of its tensors."""

    tensor: str
    dim: int
    index: Tensor
    buffer: bool = False


def test_a_coupled_group_becomes_units_in_one_line() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    parameters = dict(model.named_parameters())
    every = torch.arange(4)[:, None]
    slots = [
        Slot("0.weight", 0, every),
        Slot("0.bias", 0, every),
        Slot("1.running_var", 0, every, True),
        Slot("2.weight", 1, every),
    ]
    units = Units(tuple(Part(parameters[s.tensor], s.dim, s.index) for s in slots if not s.buffer))
    expected = (model[0].weight.square().sum(1) + model[0].bias.square() + model[2].weight.square().sum(0)).sqrt()
    torch.testing.assert_close(unit_norms(units), expected)
    died = group_soft_threshold(units, expected.min().item() * (1 + 1e-5), 1.0)
    assert int(died.sum()) == 1
    assert plus_zeros(model[0].weight[died])
    assert plus_zeros(model[0].bias[died])
    assert plus_zeros(model[2].weight[:, died])


# -- the plain prox ---------------------------------------------------------------------------------------------------------


def test_shrinks_by_the_threshold_and_zeroes_at_and_below_it() -> None:
    weight = torch.tensor([[6.0, 8.0], [3.0, -4.0], [-0.6, -0.8], [0.0, 0.0], [6.0, 8.0]])
    died = group_soft_threshold(rows(weight), 5.0, 1.0)
    assert weight.tolist() == [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]
    assert died.tolist() == [False, True, True, False, False]  # the zero unit was zero before
    assert plus_zeros(weight[1:4])
    before = weight.clone()
    assert not group_soft_threshold(rows(weight), 0.0).any()
    assert torch.equal(weight, before)


def test_units_count_by_the_root_of_their_size_unless_told() -> None:
    weight = torch.tensor([[6.0, 8.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0]])
    assert group_soft_threshold(rows(weight), 2.5).tolist() == [False, True]  # 2.5 * 2 = 5 of 10
    assert weight.tolist() == [[3.0, 4.0, 0.0, 0.0], [0.0] * 4]
    weight = torch.tensor([[6.0, 8.0], [6.0, 8.0], [1e-30, 0.0]])
    died = group_soft_threshold(rows(weight), 2.0, torch.tensor([1.0, 5.0, 0.0]))
    assert died.tolist() == [False, True, False]
    torch.testing.assert_close(weight, torch.tensor([[4.8, 6.4], [0.0, 0.0], [1e-30, 0.0]]))


def test_k_fold_at_once_is_k_times() -> None:
    once, often = draw(5, 4), draw(5, 4)
    group_soft_threshold(rows(once), 3 * 0.3)
    for _ in range(3):
        group_soft_threshold(rows(often), 0.3)
    assert 0 < (once == 0).all(1).sum() < 5
    torch.testing.assert_close(once, often)


# -- every prox is an optimum -----------------------------------------------------------------------------------------------


def objective(z: Tensor, x: Tensor, penalty: float, entries: float, steps: Tensor) -> float:
    """Of three rows of four."""
    return float(((z - x).square() / steps).sum() / 2 + penalty * z.norm(dim=1).sum() + entries * z.abs().sum())


@pytest.mark.parametrize("kind", ["group", "sparse", "metric", "metric with the plain prox"])
def test_no_point_is_lower_than_strong_convexity_allows(kind: str) -> None:
    """``F(y) >= F(z) + 1/2 |y - z|^2`` in the metric, for all y, holds for the minimizer z and for no other point."""
    worst = math.inf
    for seed in range(20):
        x = draw(3, 4, seed=seed)
        z, steps = x.clone(), draw(3, 4, seed=seed + 100).exp() if "metric" in kind else torch.ones(3, 4, dtype=x.dtype)
        entries = 0.2 if kind == "sparse" else 0.0
        if kind == "metric":
            metric_group_soft_threshold(rows(z), [steps], 0.8, 1.0)
        elif kind == "sparse":
            sparse_group_soft_threshold(rows(z), 0.2, 0.8, 1.0)
        else:
            group_soft_threshold(rows(z), 0.8 * float(steps.mean()), 1.0)
        at = objective(z, x, 0.8, entries, steps)
        for size in (1.0, 1e-2, 1e-4):
            for other in range(10):
                y = z + size * draw(3, 4, seed=1000 + other)
                worst = min(worst, objective(y, x, 0.8, entries, steps) - at - float(((y - z).square() / steps).sum() / 2))
    assert (worst > -1e-12) is (kind != "metric with the plain prox")


@pytest.mark.parametrize("seed", range(6))
def test_the_metric_prox_agrees_with_scipy(seed: int) -> None:
    x, steps = draw(7, seed=seed).numpy(), np.exp(2 * draw(7, seed=seed + 50).numpy())
    strength = 0.4 * float(np.linalg.norm(x / steps))

    def gradient(z: np.ndarray) -> np.ndarray:
        return (z - x) / steps + strength * z / np.linalg.norm(z)

    def value(z: np.ndarray) -> float:
        return float(((z - x) ** 2 / steps).sum() / 2 + strength * np.linalg.norm(z))

    found = root(gradient, minimize(value, x, jac=gradient, method="BFGS").x, tol=1e-14)
    mine = torch.tensor(x)[None]
    metric_group_soft_threshold(rows(mine), [torch.tensor(steps)[None]], strength, 1.0)
    np.testing.assert_allclose(mine[0].numpy(), found.x, rtol=0, atol=1e-8)
    assert value(mine[0].numpy()) < value(np.zeros(7))


@pytest.mark.parametrize("share", [1 - 1e-7, 1 + 1e-7])
def test_the_metric_prox_is_zero_from_the_dual_norm_on(share: float) -> None:
    x, steps = draw(6, 5), draw(6, 5, seed=1).exp()
    dual = (x / steps).norm(dim=1)
    died = metric_group_soft_threshold(rows(x), [steps], 1.0, share * dual)
    assert died.all() == (share > 1)
    assert died.any() == (share > 1)
    assert plus_zeros(x) == (share > 1)


def test_the_metric_prox_of_equal_steps_is_the_plain_one() -> None:
    weight, bias = draw(6, 5), draw(6, seed=1)
    weight[2], bias[2] = 0.0, 0.0
    plain, plain_bias = weight.clone(), bias.clone()
    died = group_soft_threshold(Units((Part(plain, 0), Part(plain_bias, 0))), 0.3 * 2.5)
    same = [torch.full_like(weight, 0.3), torch.full_like(bias, 0.3)]
    assert torch.equal(metric_group_soft_threshold(Units((Part(weight, 0), Part(bias, 0))), same, 2.5), died)
    assert 0 < died.sum() < 5
    torch.testing.assert_close(weight, plain, rtol=1e-14, atol=0)
    torch.testing.assert_close(bias, plain_bias, rtol=1e-14, atol=0)


def test_dead_inputs_with_giant_steps_do_not_hide_the_root() -> None:
    """Where a gradient never came Adam's step is lr / eps; the weight is zero and must not matter."""
    x, steps = draw(1, 6), torch.tensor([[1e-3, 2e-3, 1e-8, 1e-3, 1e5, 1e5]], dtype=torch.float64)
    x[0, 4:] = 0.0
    alone = x[:, :4].clone()
    metric_group_soft_threshold(rows(alone), [steps[:, :4]], 300.0, 1.0)
    metric_group_soft_threshold(rows(x), [steps], 300.0, 1.0)
    torch.testing.assert_close(x[:, :4], alone, rtol=1e-13, atol=0)
    norm = x.norm()
    torch.testing.assert_close(((alone - draw(1, 6)[:, :4]) / steps[:, :4] + 300.0 * alone / norm), torch.zeros_like(alone))


def test_steps_many_orders_apart_still_meet_the_condition_of_the_optimum() -> None:
    x, steps = draw(200, 8) * draw(200, 8, seed=1).mul(3).exp(), draw(200, 8, seed=2).mul(8).exp()
    limits = (x / steps).norm(dim=1) * torch.linspace(0.01, 0.999, 200, dtype=x.dtype)
    z = x.clone()
    assert not metric_group_soft_threshold(rows(z), [steps], 1.0, limits).any()
    pulls = (z - x) / steps + limits[:, None] * z / z.norm(dim=1, keepdim=True)
    assert (pulls.abs() / (x / steps).abs()).max() < 1e-12


def test_adam_steps_are_what_adam_makes() -> None:
    weight = nn.Parameter(draw(3, 2))
    optimizer = torch.optim.Adam([weight], lr=0.03, betas=(0.0, 0.7), eps=1e-3)
    for step in range(1, 4):
        before, weight.grad = weight.detach().clone(), draw(3, 2, seed=step)
        optimizer.step()
        made = adam_steps(0.03, optimizer.state[weight]["exp_avg_sq"], 0.7, step, 1e-3)
        torch.testing.assert_close(weight.detach() - before, -made * weight.grad)


# -- optima of a regression -------------------------------------------------------------------------------------------------


def regression(outputs: int) -> tuple[Tensor, Tensor]:
    x = draw(30, 8) @ (torch.eye(8, dtype=torch.float64) + 0.3)
    truth = draw(8, outputs, seed=1)
    truth[3:] = 0
    return x, x @ truth + 0.5 * draw(30, outputs, seed=2)


def descend(x: Tensor, y: Tensor, step: Tensor, shrink: Operator) -> Tensor:
    """Proximal gradient descent on ``|y - x w|^2 / 2n``."""
    weight = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype)
    units = rows(weight)
    for _ in range(1500):
        weight -= step * (x.T @ (x @ weight - y)) / len(x)
        shrink(units)
    return weight


def solvers(x: Tensor, alpha: float) -> dict[str, tuple[Tensor, Operator]]:
    hessian = x.T @ x / len(x)
    one = 1 / torch.linalg.eigvalsh(hessian)[-1]
    many = 1 / hessian.abs().sum(1, keepdim=True)  # 1 / many - hessian is diagonally dominant: an upper bound
    many = many * torch.tensor([1.0, 0.5] * 4, dtype=x.dtype)[:, None]
    return {
        "plain": (one, lambda units: group_soft_threshold(units, float(one) * alpha, 1.0)),
        "metric": (many, lambda units: metric_group_soft_threshold(units, [many], alpha, 1.0)),
        "none": (one, unit_norms),
        "unscaled": (one, lambda units: group_soft_threshold(units, alpha, 1.0)),
    }


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("solver", ["plain", "metric", "none", "unscaled"])
def test_the_optimum_is_that_of_scikit_learn(outputs: int, solver: str) -> None:
    """Units of one entry: the lasso. Rows: the multi-task lasso. Without the prox, or with a wrong threshold, it is not."""
    x, y = regression(outputs)
    model = Lasso if outputs == 1 else MultiTaskLasso
    fitted = model(alpha=0.4, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x.numpy(), y.numpy())
    expected = torch.tensor(fitted.coef_).reshape(outputs, 8).T
    found = descend(x, y, *solvers(x, 0.4)[solver])
    assert 0 < (expected == 0).all(1).sum() < 8
    right = solver in ("plain", "metric")
    assert torch.equal((found == 0).all(1), (expected == 0).all(1)) is right
    assert torch.allclose(found, expected, rtol=0, atol=1e-7) is right


def test_a_coupled_optimum_meets_the_conditions_of_karush_kuhn_and_tucker() -> None:
    """Units in two weights: ``-gradient = l w_u W_u / |W_u|`` for the living, ``|gradient| <= l w_u`` for the dead."""
    x, y = regression(4)
    weights = [torch.zeros(8, 1, dtype=x.dtype), torch.zeros(3, 8, dtype=x.dtype)]
    units = Units((Part(weights[0], 0), Part(weights[1], 1)))
    step = float(1 / torch.linalg.eigvalsh(x.T @ x / 30)[-1])

    def gradient() -> Tensor:
        return x.T @ (x @ torch.cat([weights[0], weights[1].T], 1) - y) / 30

    for _ in range(1500):
        g = step * gradient()
        weights[0] -= g[:, :1]
        weights[1] -= g[:, 1:].T
        group_soft_threshold(units, step * 0.25)
    norms, g = unit_norms(units), gradient()
    dead = norms == 0
    assert 0 < dead.sum() < 8
    assert (g[dead].norm(dim=1) <= 0.25 * 2).all()
    whole = torch.cat([weights[0], weights[1].T], 1)
    torch.testing.assert_close(-g[~dead], 0.5 * whole[~dead] / norms[~dead, None], rtol=0, atol=1e-9)


def test_sparse_groups_have_dead_entries_in_living_units() -> None:
    weight = torch.tensor([[5.0, 0.5, -4.0], [1.0, -1.0, 1.5]])
    died = sparse_group_soft_threshold(rows(weight), 1.0, 1.0, 1.0)  # (4, 0, -3) of norm 5; (0, 0, 0.5)
    torch.testing.assert_close(weight, torch.tensor([[3.2, 0.0, -2.4], [0.0, 0.0, 0.0]]))
    assert died.tolist() == [False, True]
    assert plus_zeros(weight[1])
    some = torch.tensor([[5.0, 5.0], [-0.5, 2.0], [-2.0, 0.5]])
    assert sparse_group_soft_threshold(Units((Part(some, 0, torch.tensor([[2], [0]])),)), 1.0, 0.0).tolist() == [False, False]
    assert some.tolist() == [[4.0, 4.0], [-0.5, 2.0], [-1.0, 0.0]]
    alone, plain = draw(4, 3), draw(4, 3)
    assert torch.equal(sparse_group_soft_threshold(rows(alone), 0.0, 0.5), group_soft_threshold(rows(plain), 0.5))
    assert torch.equal(alone, plain)


# -- anything goes in -------------------------------------------------------------------------------------------------------

OPERATORS: dict[str, Callable[[Units, float], Tensor]] = {
    "group": lambda units, t: group_soft_threshold(units, t),
    "sparse": lambda units, t: sparse_group_soft_threshold(units, t / 2, t / 2),
    "metric": lambda units, t: metric_group_soft_threshold(units, [uneven(p.tensor) for p in units.parts], t),
}


def uneven(tensor: Tensor) -> Tensor:
    return torch.logspace(-4, 0, tensor.numel(), dtype=tensor.dtype).view_as(tensor)


@st.composite
def weights(draw_one: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two weights of one shape, with zero units, equal units, and magnitudes of any size."""
    shape = draw_one(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw_one(st.integers(0, 2**31)))
    pair = torch.randn(2, *shape, generator=generator)
    scales = torch.tensor([draw_one(st.sampled_from([0.0, 1e-38, 1e-12, 1e-3, 1.0, 1e3, 1e15, 1e30])) for _ in range(shape[0])])
    pair = pair * scales.view(-1, *[1] * (len(shape) - 1))
    if draw_one(st.booleans()):
        pair[:, -1] = pair[:, 0]
    return pair[0], pair[1]


@settings(deadline=None, max_examples=80)
@given(
    pair=weights(),
    name=st.sampled_from(list(OPERATORS)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    threshold=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6]),
)
def test_results_are_finite_and_smaller_and_the_dead_are_reported(
    pair: tuple[Tensor, Tensor], name: str, dtype: torch.dtype, threshold: float
) -> None:
    now = pair[0].to(dtype)
    before = now.clone()
    died = OPERATORS[name](rows(now), threshold)
    assert now.isfinite().all()
    assert (now.abs() <= before.abs()).all()
    assert ((now == 0) | (now.signbit() == before.signbit())).all()
    dead = (now == 0).flatten(1).all(1) if now.ndim > 1 else now == 0
    alive = (before != 0).flatten(1).any(1) if now.ndim > 1 else before != 0
    tiny = before.double().flatten(1).norm(dim=1) < 1e-18 if now.ndim > 1 else before.double().abs() < 1e-18
    assert torch.equal(died | tiny, (dead & alive) | tiny)  # squares of the tiny are zero
    assert not died[~alive].any()
    assert plus_zeros(now[died])


@settings(deadline=None, max_examples=80)
@given(pair=weights(), name=st.sampled_from(list(OPERATORS)), threshold=st.sampled_from([1e-3, 0.3, 1.0, 100.0]))
def test_no_prox_moves_two_points_apart(pair: tuple[Tensor, Tensor], name: str, threshold: float) -> None:
    a, b = pair[0].double(), pair[1].double()
    metric = uneven(a) if name == "metric" else torch.ones_like(a)
    before = ((a - b) / metric.sqrt()).norm()
    for one in (a, b):
        OPERATORS[name](rows(one), threshold)
    assert ((a - b) / metric.sqrt()).norm() <= before * (1 + 1e-12)


@pytest.mark.parametrize("name", OPERATORS)
def test_nan_stays_to_be_seen_and_spares_the_others(name: str) -> None:
    weight = torch.tensor([[math.nan, 1.0], [1e-3, -1e-3], [3.0, 4.0]])
    assert OPERATORS[name](rows(weight), 1.0).tolist() == [False, True, False]
    assert weight[0].isnan().any()
    assert plus_zeros(weight[1])
    assert weight[2].isfinite().all()


def test_parameters_keep_their_type_and_their_graph() -> None:
    layer = nn.Linear(4, 3).to(torch.bfloat16)
    units = Units((Part(layer.weight, 0), Part(layer.bias, 0)))
    for operator in OPERATORS.values():
        operator(units, 0.01)
    assert unit_norms(units).dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad


# -- values -----------------------------------------------------------------------------------------------------------------


def test_values_by_head() -> None:
    weight = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 12.0, -5.0]])
    assert group_lasso(rows(weight)).item() == 36.0  # 2 * (5 + 13)
    assert group_lasso(rows(weight), 1.0).item() == 18.0
    assert group_lasso(rows(weight), torch.tensor([2.0, 9.0, 1.0])).item() == 23.0
    assert sparse_group_lasso(rows(weight), 0.5, 3.0, 1.0).item() == 66.0  # 24 / 2 + 54
    assert ssl(weight, 1.0, 0.5).item() == 30.0  # 18 + (3 + 4 + 12 + 5) / 2
    assert ssl(weight[..., None, None], 1.0, 0.5).item() == 30.0
    torch.testing.assert_close(group_hoyer_square(rows(weight)), torch.tensor(324 / 194))
    assert growing_l2(rows(weight), torch.tensor([2.0, 7.0, 0.0])).item() == 25.0
    assert group_lasso(rows(weight), torch.tensor([2, 9, 1])).item() == 23.0


def with_equal_steps(units: Units, threshold: float, weights: Tensor) -> Tensor:
    return metric_group_soft_threshold(units, [torch.ones(())], threshold, weights)


@pytest.mark.parametrize("operator", [group_soft_threshold, with_equal_steps])
def test_a_limit_above_the_largest_number_zeroes_its_unit(operator: Callable[[Units, float, Tensor], Tensor]) -> None:
    weight = torch.tensor([[3.0, 4.0], [-3.0, 4.0], [3.0, -4.0]])
    died = operator(rows(weight), 1e30, torch.tensor([1e30, 0.0, 1e-30]))
    assert died.tolist() == [True, False, False]
    assert plus_zeros(weight[0])
    torch.testing.assert_close(weight[1:], torch.tensor([[-3.0, 4.0], [2.4, -3.2]]))
    large = torch.tensor([[6e4, 8e4]])
    assert not operator(rows(large), 4e4, torch.tensor([2.0], dtype=torch.float16)).any()  # 80000 is no float16
    torch.testing.assert_close(large, torch.tensor([[1.2e4, 1.6e4]]))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e12])
def test_hoyer_counts_units_at_any_scale(scale: float) -> None:
    weight = torch.zeros(7, 3, dtype=torch.float64)
    weight[:4, 1] = scale
    torch.testing.assert_close(group_hoyer_square(rows(weight)).item(), 4.0)


VALUES: dict[str, Callable[[Units], Tensor]] = {
    "group lasso": group_lasso,
    "sparse group lasso": lambda units: sparse_group_lasso(units, 0.3, 0.7),
    "hoyer": group_hoyer_square,
    "growing": lambda units: growing_l2(units, torch.arange(1.0, 4.0, dtype=torch.float64)),
    "norms": lambda units: unit_norms(units).sum(),
}


@pytest.mark.parametrize("index", [None, torch.tensor([[4, 0], [1, 5], [3, 2]]), torch.tensor([[1], [2], [3]])])
@pytest.mark.parametrize("name", VALUES)
def test_gradients_away_from_zero(name: str, index: Tensor | None) -> None:
    def value(first: Tensor, bias: Tensor, second: Tensor) -> Tensor:
        return VALUES[name](Units((Part(first, 0), Part(bias, 0), Part(second, 1, index))))

    shapes = ((3, 2, 2), (3,), (2, 3 if index is None else 6))
    inputs = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradcheck(lambda first: ssl(first, 0.3, 0.7), draw(3, 2, 2).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VALUES)
def test_the_gradient_of_zero_units_is_zero(name: str, dtype: torch.dtype) -> None:
    for zero in ([1], [0, 1, 2]):
        weight, bias = draw(3, 2, dtype=dtype), draw(3, seed=1, dtype=dtype)
        weight[zero], bias[zero] = 0.0, 0.0
        weight.requires_grad_()
        bias.requires_grad_()
        value = VALUES[name](Units((Part(weight, 0), Part(bias, 0))))
        value.backward()
        assert value.isfinite()
        for tensor in (weight, bias):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
            assert (tensor.grad[zero] == 0).all()
            assert len(zero) == 3 or (tensor.grad[0] != 0).any()


def test_growth_is_a_function_of_the_step() -> None:
    chosen = torch.tensor([True, False, True])
    grown = [growing_strengths(chosen, step, 0.25, 3, 0.6).tolist() for step in (0, 2, 3, 5, 6, 9, 300)]
    assert [one[0] for one in grown] == pytest.approx([0, 0, 0.25, 0.25, 0.5, 0.6, 0.6])
    assert all(one[1] == 0 and one[2] == one[0] for one in grown)


def test_growing_decay_pulls_each_weight_by_its_unit() -> None:
    weight = draw(3, 2).requires_grad_()
    strengths = growing_strengths(torch.tensor([True, False, True]), 20, 0.25, 5).double()
    growing_l2(rows(weight), strengths).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[1.0], [0.0], [1.0]]) * weight.detach())


# -- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Part(torch.ones(2, 2, dtype=torch.int64), 0), "int64"),
        (lambda: Part(torch.ones(2, 2), 2), "no dimension 2"),
        (lambda: Part(torch.ones(2, 2), -1), "no dimension -1"),
        (lambda: Part(torch.tensor(1.0), 0), "no dimension 0"),
        (lambda: Part(torch.ones(0, 2), 0), "no entries"),
        (lambda: Part(torch.ones(3, 2), 0, torch.tensor([0, 1])), "units, slices a unit"),
        (lambda: Part(torch.ones(3, 2), 0, torch.tensor([[0.0]])), "int64"),
        (lambda: Part(torch.ones(3, 2), 0, torch.tensor([[0], [3]])), "slices 0 to 3"),
        (lambda: Part(torch.ones(3, 2), 0, torch.tensor([[0, 1], [1, 2]])), "in two units"),
        (lambda: Units(()), "one part or more"),
        (lambda: Units((Part(torch.ones(2, 3), 0), Part(torch.ones(2, 3), 1))), r"parts have \[2, 3\] units"),
        (lambda: ssl(torch.ones(3), 1.0, 1.0), "no filters"),
    ],
)
def test_units_that_cannot_be_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(TargetError, match=says):
        make()


def test_rows_and_columns_of_one_tensor_are_no_units() -> None:
    square = torch.ones(3, 3)
    with pytest.raises(TargetError, match="leave one of the parts out"):
        Units((Part(square, 0), Part(square, 1)))


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_numbers_that_make_no_penalty_are_refused(bad: float) -> None:
    weight = torch.ones(3, 2)
    for call in (
        lambda: group_soft_threshold(rows(weight), bad),
        lambda: group_soft_threshold(rows(weight), 0.1, bad),
        lambda: group_soft_threshold(rows(weight), 0.1, torch.tensor([1.0, 1.0, bad])),
        lambda: group_soft_threshold(rows(weight), 0.1, torch.ones(2)),
        lambda: sparse_group_soft_threshold(rows(weight), bad, 0.1),
        lambda: metric_group_soft_threshold(rows(weight), [weight], bad),
        lambda: group_lasso(rows(weight), bad),
        lambda: group_lasso(rows(weight), torch.tensor([1.0, bad, 1.0])),
        lambda: sparse_group_lasso(rows(weight), bad, 0.1),
        lambda: sparse_group_lasso(rows(weight), 0.1, bad),
        lambda: sparse_group_lasso(rows(weight), 0.1, 0.1, torch.tensor([bad, 1.0, 1.0])),
        lambda: ssl(weight, bad, 0.1),
        lambda: ssl(weight, 0.1, bad),
        lambda: growing_l2(rows(weight), torch.tensor([1.0, 1.0, bad])),
        lambda: growing_strengths(torch.tensor([True]), 1, bad, 1),
        lambda: growing_strengths(torch.tensor([True]), 1, 0.1, 1, ceiling=bad),
        lambda: growing_strengths(torch.tensor([True]), -1, 0.1, 1),
        lambda: growing_strengths(torch.tensor([True]), 1, 0.1, 0),
    ):
        with pytest.raises(RecipeError):
            call()
    assert torch.equal(weight, torch.ones(3, 2))


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (2,), (1,), ()])
def test_one_number_for_each_unit_and_no_other_shape(shape: tuple[int, ...]) -> None:
    """Some of them would broadcast, to a sum over all pairs of units."""
    weight, wrong = torch.ones(3, 2), torch.ones(shape)
    for call in (
        lambda: group_lasso(rows(weight), wrong),
        lambda: sparse_group_lasso(rows(weight), 0.1, 0.1, wrong),
        lambda: growing_l2(rows(weight), wrong),
        lambda: group_soft_threshold(rows(weight), 0.1, wrong),
    ):
        with pytest.raises(RecipeError, match=rf"of shape {re.escape(str(shape))} for 3 units: give one number for each"):
            call()


def test_steps_that_do_not_fit_are_refused() -> None:
    weight = torch.ones(3, 2)
    with pytest.raises(TargetError, match="2 tensors of steps for 1 parts"):
        metric_group_soft_threshold(rows(weight), [weight, weight], 0.1)
    with pytest.raises(TargetError, match=r"shape \(4, 2\) do not fit a tensor of shape \(3, 2\)"):
        metric_group_soft_threshold(rows(weight), [torch.ones(4, 2)], 0.1)
