"""The scan and the parameter-level look, on losses whose every number is known by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.allocation import Sensitivity
from sparsetrain.criteria import Magnitude
from sparsetrain.errors import DivergedError, RecipeError
from sparsetrain.masks import MaskManager, Override
from sparsetrain.pruning import prune
from sparsetrain.sensitivity import GRID, Scan, ScanRow, parameter_sensitivity, scan
from sparsetrain.targets import Targets

ALL = Targets(head=True)


class Sums(nn.Module):
    """Two 1 x 4 layers; the loss is ``sum |w - w0|`` of the first, the second does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.useless = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            self.used.weight.copy_(Tensor([[1.0, -2.0, 4.0, 8.0]]))
            self.useless.weight.copy_(Tensor([[5.0, 6.0, 7.0, 8.0]]))

    def loss(self) -> dict[str, float]:
        lost = float((self.used.weight.detach() - Tensor([[1.0, -2.0, 4.0, 8.0]])).abs().sum())
        return {"loss": 3 + lost, "error": lost / 15}


def test_a_scan_measures_each_tensor_alone() -> None:
    model = Sums()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = scan(MaskManager(model, ALL), model.loss, (0.25, 0.5, 0.75), "magnitude")
    assert found.baseline == {"loss": 3.0, "error": 0.0}
    losses = [(row.name, row.sparsity, row.pruned, row.loss) for row in found.rows]
    # the smallest goes first: 1, then 2, then 4; the second layer alone never matters
    assert losses == [
        *(("used.weight", s, n, loss) for s, n, loss in [(0.25, 1, 4.0), (0.5, 2, 6.0), (0.75, 3, 10.0)]),
        *(("useless.weight", s, n, 3.0) for s, n in [(0.25, 1), (0.5, 2), (0.75, 3)]),
    ]
    assert found.rows[1].metrics == {"error": pytest.approx(0.2)}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(t.mask is None for t in MaskManager(model, ALL))


def test_the_allocation_from_a_scan_prunes_the_useless_layer(tmp_path: Path) -> None:
    model = Sums()
    manager = MaskManager(model, ALL)
    scan(manager, model.loss, (0.25, 0.5, 0.75)).to_json(tmp_path / "sensitivity.json")
    prune(manager, 0.375, allocation=Sensitivity(str(tmp_path / "sensitivity.json")))
    assert manager.counts() == {"used.weight": (0, 4), "useless.weight": (3, 4)}
    assert model.loss()["loss"] == 3.0
    # twin: uniformly, the useful one pays
    again = Sums()
    prune(MaskManager(again, ALL), 0.375)
    assert again.loss()["loss"] > 3.0


def test_weights_are_back_when_evaluation_fails() -> None:
    model = Sums()
    calls = iter([{"loss": 1.0}])
    with pytest.raises(StopIteration):
        scan(MaskManager(model, ALL), lambda: next(calls), (0.5,))
    assert model.used.weight.tolist() == [[1.0, -2.0, 4.0, 8.0]]


def test_units_scan_whole_outputs_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 13.0).view(4, 3))
    found = scan(MaskManager(model, ALL), lambda: {"loss": -float(model[0].weight.detach().sum())}, (0.1, 0.5), units=True)
    assert [(r.pattern, r.sparsity, r.pruned, r.loss) for r in found.rows] == [
        ("unstructured", 0.1, 1, -77.0),
        ("unstructured", 0.5, 6, -57.0),
        ("neurons", 0.5, 6, -57.0),  # a tenth of four neurons is none
    ]
    assert [r.pattern for r in scan(MaskManager(model, ALL), lambda: {"loss": 1.0}, (0.5,)).rows] == ["unstructured"]


def test_patterns_and_masks_that_are_there() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False))
    manager = MaskManager(model, ALL, overrides={"^1": Override(pattern="2:4")})
    prune(manager, own={"0.weight": 0.5})
    zeros = model[0].weight == 0
    seen = []

    def evaluate() -> dict[str, float]:
        seen.append(model[0].weight.detach().clone())
        return {"loss": 0.0}

    found = scan(manager, evaluate, (0.25, 0.75))
    assert [(r.name, r.pattern, r.sparsity) for r in found.rows] == [
        ("0.weight", "unstructured", 0.25),
        ("0.weight", "unstructured", 0.75),
        ("1.weight", "2:4", 0.5),
    ]
    assert torch.equal(seen[0], seen[1])  # what is pruned goes first
    assert int((seen[2] == 0).sum()) == 6
    assert bool((seen[2][zeros] == 0).all())
    assert manager.verify().ok


def test_the_criterion_decides_what_goes() -> None:
    class Reversed(Magnitude):
        def score(self, weight: Tensor, *, name: str = "", step: int = 0) -> Tensor:
            return -super().score(weight)

    model = Sums()
    found = scan(MaskManager(model, ALL), model.loss, (0.25,), Reversed())
    assert (found.rows[0].loss, found.criterion) == (11.0, "reversed")


def test_a_criterion_that_looks_at_the_model_is_shown_it() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 4)
    manager = MaskManager(model, ALL)
    found = scan(manager, lambda: {"loss": float(model(x).detach().square().sum())}, (0.5,), "lookahead")
    assert [row.pruned for row in found.rows] == [6, 3]


def test_json_and_back(tmp_path: Path) -> None:
    path = tmp_path / "scan.json"
    rows = [ScanRow("a", "unstructured", 0.5, 1, 2, 1.5, {"accuracy": 0.5}), ScanRow("a", "neurons", 0.9, 1, 2, math.inf)]
    found = Scan({"loss": 1.0}, rows, "magnitude", "validation set")
    found.parameters = parameter_sensitivity(MaskManager(Quadratic(), ALL), lambda m: m.loss())
    found.to_json(path)
    back = Scan.from_json(path)
    assert (back.baseline, back.rows[0], back.parameters) == (found.baseline, rows[0], found.parameters)
    assert math.isnan(back.rows[1].loss)
    assert json.loads(path.read_text())["rows"][1]["loss"] is None
    for content in ("{", "[]", '{"rows": []}'):
        path.write_text(content)
        with pytest.raises(RecipeError, match=r"scan\.json is no scan"):
            Scan.from_json(path)


def test_what_cannot_be_scanned() -> None:
    manager = MaskManager(Sums(), ALL)
    with pytest.raises(RecipeError, match="accuracy and no 'loss'"):
        scan(manager, lambda: {"accuracy": 1.0})
    with pytest.raises(DivergedError, match="nan before anything"):
        scan(manager, lambda: {"loss": math.nan})
    with pytest.raises(RecipeError, match="count=1"):
        parameter_sensitivity(manager, lambda m: torch.zeros((), dtype=torch.float64), count=1)
    with pytest.raises(RecipeError, match=r"float32 of shape \(\).*float64"):
        parameter_sensitivity(manager, lambda m: torch.zeros(()), count=2)
    assert all(0 < s < 1 for s in GRID)


class Quadratic(nn.Module):
    """``sum (a_i w_i^2 + b_i w_i)``: its second-order expansion is exact, its first-order one is not."""

    def __init__(self, curvature: float = 1.0) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4, bias=False)
        source = torch.Generator().manual_seed(1)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(4, 6, generator=source))
        self.register_buffer("a", curvature * torch.rand(4, 6, generator=source))
        self.register_buffer("b", torch.randn(4, 6, generator=source))

    def loss(self) -> Tensor:
        return (self.a * self.fc.weight**2 + self.b * self.fc.weight).sum()


def test_taylor_is_exact_on_a_quadratic() -> None:
    model = Quadratic()
    before = model.fc.weight.detach().clone()
    [row] = parameter_sensitivity(MaskManager(model, ALL), lambda m: m.loss(), count=20)
    assert row.count == 20
    assert row.derivative_error < 1e-8
    assert row.second_order == pytest.approx(1.0)
    assert row.first_order < 0.99
    [linear] = parameter_sensitivity(MaskManager(Quadratic(curvature=0), ALL), lambda m: m.loss())
    assert (linear.count, linear.first_order, linear.second_order) == (24, pytest.approx(1.0), pytest.approx(1.0))
    assert torch.equal(model.fc.weight, before)
    assert model.fc.weight.dtype == torch.float32
    assert model.fc.weight.grad is None


def test_a_wrong_derivative_is_found() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return (x**2).sum()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * torch.ones(4, 6, dtype=torch.float64)

    [row] = parameter_sensitivity(MaskManager(Quadratic(), ALL), lambda m: Wrong.apply(m.fc.weight))
    assert row.derivative_error > 0.5


def test_masked_weights_are_not_drawn_and_seeds_decide() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    manager = MaskManager(model, ALL)
    prune(manager, 0.5)
    inputs, labels = torch.randn(10, 5, dtype=torch.float64), torch.arange(10) % 3

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(inputs), labels)

    rows = parameter_sensitivity(manager, loss, count=64, seed=2)
    assert [row.count for row in rows] == [20, 12]
    assert all(row.derivative_error < 1e-6 for row in rows)
    assert all(row.second_order >= 0.9 for row in rows)
    few = [parameter_sensitivity(manager, loss, count=6, seed=seed)[0].first_order for seed in (2, 2, 3)]
    assert few[0] == few[1] != few[2]
