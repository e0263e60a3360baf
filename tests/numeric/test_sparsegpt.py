"""SparseGPT: the authors' masks and weights, the exact minimum, exact counts, and what is told when a matrix is bad.

Golden data: golden/sparsegpt.npz (IST-DASLab/sparsegpt 147d215, sparsegpt.py: SparseGPT.add_batch for three samples (1, 16, 32)
one by one, then fasterprune with percdamp=.01, run once on a CPU); inputs, weight and new weights are stored. ``dead``: input 7
was set to 0. Its unstructured threshold prunes the entry at the threshold too, so half an entry less was asked of every block.
A dead column enters its mean diagonal as 1 whatever the scale of the inputs, ours as 0: 1e-5 in the weights.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.criteria import Known, Seen, SparseGPT, Wanda, sparsegpt
from sparsetrain.criteria.columns import Choice
from sparsetrain.criteria.inputs import InputCriterion
from sparsetrain.criteria.sparsegpt import add_outer, inverse_factor, sweep, symmetric
from sparsetrain.errors import DataError, DivergedError, RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.patterns import parse_pattern
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

GOLDEN = Path(__file__).parent / "golden" / "sparsegpt.npz"


def golden() -> dict[str, Any]:
    with np.load(GOLDEN) as file:
        data = {key: file[key] if file[key].ndim == 0 else torch.from_numpy(file[key]) for key in file.files}
    assert str(data["source"]).startswith("https://github.com/")
    assert len(str(data["commit"])) == 40
    return data


def linear(weight: Tensor | list[list[float]]) -> nn.Linear:
    values = torch.as_tensor(weight).float()
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
    layer.weight = nn.Parameter(values.clone())
    return layer


def shown(criterion: InputCriterion, manager: MaskManager, *batches: Tensor) -> InputCriterion:
    """The criterion after it has seen these inputs of every layer."""
    criterion.reset()
    tensors = [Known.of(t) for t in manager]
    criterion.prepare(manager.model, tensors)
    for batch in batches:
        for tensor in tensors:
            criterion.observe(Seen(tensor, tensor.parameter.detach(), input=batch))
    return criterion


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(samples: int, columns: int, seed: int = 1) -> Tensor:
    return random(samples, columns, seed=seed) @ (torch.eye(columns) + 0.4 * random(columns, columns, seed=seed + 1))


def pruned(layer: Any, pattern: str, criterion: InputCriterion, sparsity: float, *batches: Tensor) -> Tensor:
    manager = MaskManager(layer, pattern=pattern)
    prune(manager, sparsity, criterion=shown(criterion, manager, *batches))
    assert manager.verify(strict=True).ok
    weight: Tensor = layer.weight.detach()
    return weight


# -- what the authors' code gives -------------------------------------------------------------------------------------------

PUBLISHED = [
    (case, block, key, pattern)
    for case in ("alive", "dead")
    for block in (32, 16)
    for key, pattern in (("50", "unstructured"), ("2:4", "2:4"), ("4:8", "4:8"))
]


@pytest.mark.parametrize(("case", "block", "key", "pattern"), PUBLISHED)
def test_masks_and_weights_are_the_authors(case: str, block: int, key: str, pattern: str) -> None:
    data = golden()
    inputs = data["inputs"].clone()
    if case == "dead":
        inputs[..., 7] = 0
    expected = data[f"{case}_{key}_block{block}"]
    found = pruned(linear(data["weight"]), pattern, SparseGPT(block=block), 0.5, *inputs[:, None])
    assert torch.equal(found != 0, expected != 0)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert case == "alive" or not found[:, 7].any()


def test_without_its_update_or_with_another_block_it_is_not_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    data = golden()
    expected = data["alive_50_block16"]
    other = pruned(linear(data["weight"]), "unstructured", SparseGPT(block=32), 0.5, *data["inputs"])
    assert not torch.equal(other != 0, expected != 0)

    def apart(hessian: Tensor) -> Tensor:
        factor = inverse_factor(hessian)
        assert factor is not None
        return torch.diag_embed(factor.diagonal(dim1=1, dim2=2))

    monkeypatch.setattr(sparsegpt, "inverse_factor", apart)
    unmoved = pruned(linear(data["weight"]), "unstructured", SparseGPT(block=16), 0.5, *data["inputs"])
    assert torch.equal(unmoved[unmoved != 0], data["weight"][unmoved != 0])
    assert not torch.allclose(unmoved, expected, atol=1e-4)


# -- what the mathematics says ----------------------------------------------------------------------------------------------


def test_two_inputs_by_hand() -> None:
    """``X X' = [[2, 1], [1, 2]]``: the second weight moves by ``0.5 * 1 / 2`` when the first, 0.5, goes."""
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    found = pruned(linear([[0.5, 1.0]]), "unstructured:row", SparseGPT(damp=1e-7), 0.5, x)
    assert found[0].tolist() == pytest.approx([0.0, 1.25], abs=1e-5)
    # nothing is left behind the last column that could move
    found = pruned(linear([[1.0, 0.5]]), "unstructured:row", SparseGPT(damp=1e-7), 0.5, x)
    assert found.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(("block", "panel"), [(128, 16), (5, 2), (8, 8), (1, 1), (24, 5)])
def test_what_is_left_is_at_the_minimum_when_the_first_columns_go(block: int, panel: int) -> None:
    """Then the columns left are a least squares problem: ``|W'X - WX|^2 + ridge |W' - W|^2`` over them alone."""
    x, weight = correlated(60, 24).double(), random(5, 24, seed=3).double()
    factor = inverse_factor((x.T @ x + 3.0 * torch.eye(24))[None])
    assert factor is not None
    first = Choice(block, panel, False, lambda start, stop, scores: (torch.arange(start, stop) < 8).expand_as(scores))
    moved = weight.T.clone()[None]
    gone = sweep(moved, factor, first)
    rows = torch.cat([x, 3.0**0.5 * torch.eye(24)])
    best = torch.linalg.lstsq(rows[:, 8:], rows @ weight.T).solution
    assert gone[0, :8].all()
    assert not gone[0, 8:].any()
    assert not moved[0, :8].any()
    assert torch.allclose(moved[0, 8:], best, atol=1e-10)
    # where nothing goes, nothing moves
    moved = weight.T.clone()[None]
    sweep(moved, factor, Choice(block, panel, False, lambda start, stop, scores: torch.zeros_like(scores, dtype=torch.bool)))
    assert torch.equal(moved[0], weight.T)


def test_a_dead_column_goes_first_and_moves_nothing() -> None:
    x, weight = correlated(40, 8), random(4, 8, seed=3)
    x[:, 5] = 0
    weight[:, 5] = 100.0
    found = pruned(linear(weight), "2:4", SparseGPT(), 0.5, x)
    assert not found[:, 5].any()
    found = pruned(linear(weight), "block:4x4", SparseGPT(block=8), 0.5, x * torch.tensor([1e-3] * 4 + [1.0] * 4))
    assert not found[:, :4].any()
    assert found[:, 5].tolist() == [100.0] * 4  # the mask keeps it, and so it stays


def test_it_loses_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    x, weight = correlated(200, 32), random(24, 32, seed=5)
    x[:, 3] *= 30

    def error(pattern: str, criterion: Any) -> float:
        layer = linear(weight)
        manager = MaskManager(layer, pattern=pattern)
        if isinstance(criterion, InputCriterion):
            shown(criterion, manager, x)
        prune(manager, 0.5, criterion=criterion)
        return float((x @ (layer.weight.detach() - weight).T).square().sum())

    for pattern in ("unstructured:row", "2:4", "block:2x2", "channels"):
        best, middle, worst = (error(pattern, criterion) for criterion in (SparseGPT(), Wanda(), "magnitude"))
        assert best < 0.8 * middle, pattern
        assert middle < worst, pattern


def test_the_score_is_what_removing_a_weight_alone_costs() -> None:
    x, weight = correlated(50, 6), random(3, 6, seed=4)
    manager = MaskManager(linear(weight))
    score = shown(SparseGPT(damp=1e-4), manager, x).score(weight, name="weight")
    gram = x.T @ x
    hessian = gram + 1e-4 * gram.diagonal().mean() * torch.eye(6)
    cost = weight.square() / torch.linalg.inv(hessian).diagonal()
    assert torch.allclose(score.square(), cost, rtol=1e-3)
    apart = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))  # inputs that do not correlate
    score = shown(SparseGPT(damp=1e-7), manager, apart).score(weight, name="weight")
    assert torch.allclose(score, shown(Wanda(), manager, apart).score(weight, name="weight"), rtol=1e-4)
    apart[0] = 0
    assert not shown(SparseGPT(), manager, apart).score(weight, name="weight")[:, 0].any()


@pytest.mark.parametrize("columns", [1, 3, 4, 7, 33])
def test_the_matrix_is_that_of_the_inputs(columns: int) -> None:
    x = random(2, 10, columns)
    outer = torch.zeros(2, columns, columns)
    add_outer(outer, x[:, :6])
    add_outer(outer, x[:, 6:])
    assert torch.allclose(symmetric(outer), x.mT @ x, atol=1e-5)


def test_the_factor_is_that_of_the_inverse() -> None:
    x = random(400, 300, seed=7).double()
    hessian = (x.T @ x + torch.eye(300))[None]
    factor = inverse_factor(hessian)
    assert factor is not None
    assert torch.allclose(factor, torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True), atol=1e-10)
    assert inverse_factor(torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])) is None


# -- patterns and counts ----------------------------------------------------------------------------------------------------

PATTERNS = ("unstructured", "unstructured:row", "2:4", "1:2", "3:4", "block:2x2", "block:3x4", "block:4x1", "channels")


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    rows=st.integers(1, 7),
    groups=st.integers(1, 5),
    block=st.integers(1, 20),
    first=st.integers(1, 95),
    second=st.integers(1, 95),
    seed=st.integers(0, 99),
)
def test_counts_are_exact_and_what_is_pruned_stays_so(
    pattern: str, rows: int, groups: int, block: int, first: int, second: int, seed: int
) -> None:
    shape = parse_pattern(pattern)
    layer = linear(random(rows, 4 * groups, seed=seed))
    tensor = Known("w", layer, "weight", shape)
    criterion = SparseGPT(block=block)
    criterion.observe(Seen(tensor, layer.weight.detach(), input=correlated(30, 4 * groups, seed=seed)))
    weight, alive = layer.weight.detach(), None
    for percent in sorted((first, second)):
        sparsity = shape.sparsity or percent / 100
        found = criterion.solve(weight, shape, sparsity, name="w", alive=alive)
        assert found is not None
        mask, weight = found
        shape.check(mask, sparsity)
        assert not weight[~mask].any()
        assert torch.isfinite(weight).all()
        assert alive is None or not (mask & ~alive).any()
        alive = mask


def test_every_block_of_columns_loses_its_share() -> None:
    """10 of 30 in blocks that end at 12, 24 and 30: floor(4), floor(8), 10."""
    layer = linear(random(3, 10))
    tensor = Known("w", layer, "weight", parse_pattern("unstructured"))
    criterion = SparseGPT(block=4)
    criterion.observe(Seen(tensor, layer.weight.detach(), input=correlated(30, 10)))
    found = criterion.solve(layer.weight.detach(), tensor.pattern, 0.35, name="w", alive=None)
    assert found is not None
    assert [int((~part).sum()) for part in found[0].split(4, dim=1)] == [4, 4, 2]
    # Half of the first block is gone: 6 of the 24 others are to go, 2 of 6 there being a quarter; then 3 of 12 and 1 of 6.
    alive = torch.ones(3, 10, dtype=torch.bool)
    alive[:, :2] = False
    found = criterion.solve(layer.weight.detach() * alive, tensor.pattern, 0.4, name="w", alive=alive)
    assert found is not None
    assert [int((~part).sum()) for part in found[0].split(4, dim=1)] == [6 + 1, 3, 2]


def test_every_row_loses_its_share_of_what_lives_in_a_block() -> None:
    """3 of the first 4 are gone and 6 of 12 asked: 3 more of the living 1, 5 and 9 up to each end: floors 0, 1 and 3."""
    layer = linear(random(1, 12))
    tensor = Known("w", layer, "weight", parse_pattern("unstructured:row"))
    criterion = SparseGPT(block=4)
    criterion.observe(Seen(tensor, layer.weight.detach(), input=correlated(30, 12)))
    alive = torch.ones(1, 12, dtype=torch.bool)
    alive[0, :3] = False
    found = criterion.solve(layer.weight.detach() * alive, tensor.pattern, 0.5, name="w", alive=alive)
    assert found is not None
    assert [int((~part).sum()) for part in found[0].split(4, dim=1)] == [3, 1, 2]


def test_what_is_pruned_stays_so_though_an_update_makes_it_large() -> None:
    """Columns 0 and 2 have the same input: when 1.0 goes in column 0, it moves to the pruned weight in column 2."""
    x = random(200, 4)
    x[:, 2] = x[:, 0]
    weight = torch.tensor([[1.0, 10.0, 0.0, 0.5], [10.0, 10.0, 0.0, 0.1]])
    layer = linear(weight)
    tensor = Known("w", layer, "weight", parse_pattern("unstructured"))
    criterion = SparseGPT(block=2, damp=1e-3)
    criterion.observe(Seen(tensor, weight, input=x))
    found = criterion.solve(weight, tensor.pattern, 0.5, name="w", alive=weight != 0)
    assert found is not None
    assert found[0].tolist() == [[False, True, False, True], [True, True, False, False]]


def test_a_lower_sparsity_brings_zeros_back_and_moves_nothing() -> None:
    layer = linear(random(4, 8))
    manager = MaskManager(layer)
    criterion = shown(SparseGPT(), manager, correlated(30, 8))
    prune(manager, 0.75, criterion=criterion)
    before = layer.weight.detach().clone()
    prune(manager, 0.25, criterion=criterion)
    assert manager.sparsity() == 0.25
    assert torch.equal(layer.weight, before)
    prune(manager, 0.0, criterion=criterion)
    assert torch.equal(layer.weight, before)
    assert not manager.masks


def test_neurons_are_refused() -> None:
    manager = MaskManager(linear(random(4, 4)), pattern="neurons")
    with pytest.raises(RecipeError, match=r"weight: SparseGPT moves .* pattern neurons leaves none .* use 'channels'"):
        prune(manager, 0.5, criterion=SparseGPT())


# -- layers and types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "unstructured:row", "2:4", "block:2x3", "channels"])
def test_a_convolution_is_a_linear_layer_on_patches(pattern: str) -> None:
    x, conv = random(3, 4, 6, 5), nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False)
    patches = F.unfold(x, 3, padding=1, stride=2).mT.flatten(0, 1)  # (N * positions, in * kernel)
    weight = conv.weight.detach().flatten(1).clone()
    found = pruned(conv, pattern, SparseGPT(block=16), 0.5, x).flatten(1)
    order = torch.arange(36)
    flat = pattern
    if pattern == "2:4":  # groups lie along the channels at one position of the kernel
        order = order.view(4, 9).T.flatten()
    if pattern == "channels":
        flat = "block:6x9"
    expected = pruned(linear(weight[:, order]), flat, SparseGPT(block=16), 0.5, patches[:, order])
    assert torch.allclose(found[:, order], expected, atol=1e-5)


def test_one_matrix_serves_every_pattern() -> None:
    """The order of a convolution's columns is another for N:M: what was factorized for one pattern is not for the next."""
    layer, x = nn.Conv2d(4, 6, 3, bias=False), random(3, 4, 6, 5)
    weight, criterion, fresh = layer.weight.detach(), SparseGPT(), SparseGPT()
    for known in (criterion, fresh):
        known.observe(Seen(Known("w", layer, "weight", parse_pattern("2:4")), weight, input=x))
    for pattern in ("unstructured", "2:4", "unstructured"):
        found = criterion.solve(weight, parse_pattern(pattern), 0.5, name="w", alive=None)
        fresh._last = None
        expected = fresh.solve(weight, parse_pattern(pattern), 0.5, name="w", alive=None)
        assert torch.equal(found[1], expected[1])  # type: ignore[index]


def test_groups_of_a_convolution_are_solved_apart() -> None:
    x, whole = random(4, 6, 5, 5), nn.Conv2d(6, 8, 2, groups=2, bias=False)
    halves = [nn.Conv2d(3, 4, 2, bias=False) for _ in range(2)]
    for half, part in zip(halves, whole.weight.detach().chunk(2), strict=True):
        half.weight = nn.Parameter(part.clone())
    found = pruned(whole, "unstructured:row", SparseGPT(), 0.5, x)
    parts = [
        pruned(half, "unstructured:row", SparseGPT(), 0.5, values)
        for half, values in zip(halves, x.chunk(2, dim=1), strict=True)
    ]
    assert torch.allclose(found, torch.cat(parts), atol=1e-6)


def test_inputs_first() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(6, 8)
    weight, x = layer.weight.detach().clone(), correlated(40, 8)
    assert torch.equal(pruned(layer, "2:4", SparseGPT(), 0.5, x).T, pruned(linear(weight.T), "2:4", SparseGPT(), 0.5, x))


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.03), (torch.float16, 3e-3), (torch.float64, 1e-4)])
def test_weights_of_any_type_are_solved_in_float32_at_least(dtype: torch.dtype, close: float) -> None:
    x, weight = correlated(60, 16), random(6, 16, seed=9).to(dtype)
    layer = linear(weight).to(dtype)
    found = pruned(layer, "2:4", SparseGPT(), 0.5, x.to(dtype) if dtype == torch.float64 else x)
    expected = pruned(linear(weight), "2:4", SparseGPT(), 0.5, x)
    assert found.dtype == dtype
    assert torch.equal(found != 0, expected != 0)
    assert torch.allclose(found.float(), expected, rtol=0, atol=close)


def test_sums_of_half_precision_inputs_are_exact() -> None:
    manager = MaskManager(linear([[1.0, 1.0]]))
    criterion = shown(SparseGPT(), manager, torch.ones(4097, 2, dtype=torch.bfloat16))
    assert symmetric(criterion.memory["weight"]["outer"]).unique().tolist() == [4097.0]


def test_layers_that_share_their_inputs_factorize_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {f"{name}.weight": linear(random(4, 8, seed=i)) for i, name in enumerate("qkv")}
    manager = MaskManager(nn.ModuleDict({name.partition(".")[0]: layer for name, layer in layers.items()}), Targets(head=True))
    criterion, calls = SparseGPT(), []

    def counted(hessian: Tensor) -> Tensor | None:
        calls.append(hessian.shape)
        return inverse_factor(hessian)

    def solved(name: str) -> Tensor:
        found = criterion.solve(layers[name].weight.detach(), parse_pattern("2:4"), 0.5, name=name, alive=None)
        assert found is not None
        return found[1]

    monkeypatch.setattr(sparsegpt, "inverse_factor", counted)
    shown(criterion, manager, correlated(30, 8))
    alone = [solved(name) for name in layers]
    assert len(calls) == 3
    for name in ("k.weight", "v.weight"):
        criterion.memory[name] = dict(criterion.memory["q.weight"])
    together = [solved(name) for name in layers]
    assert len(calls) == 4
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    for tensor in manager:  # more data: another matrix
        criterion.observe(Seen(Known.of(tensor), tensor.target.parameter.detach(), input=correlated(30, 8, seed=40)))
    assert not torch.equal(solved("v.weight"), alone[-1])
    assert len(calls) == 5


# -- what is told -----------------------------------------------------------------------------------------------------------


def test_damping_is_raised_until_it_holds_and_told() -> None:
    model = nn.Sequential(linear(random(4, 8)), linear(random(4, 8)))
    manager = MaskManager(model, Targets(head=True))
    criterion = SparseGPT(damp=1e-12)
    shown(criterion, manager, random(1, 8))  # one sample: rank 1
    with pytest.warns(UserWarning, match=r"SparseGPT: 0.weight: damp 1e-12 raised to 1e-\d+: not positive definite") as told:
        prune(manager, 0.5, criterion=criterion)
    assert len(told) == 1
    assert set(criterion.notes) == {"0.weight", "1.weight"}
    assert manager.verify(strict=True).ok
    with warnings.catch_warnings(record=True) as silent:
        shown(criterion, manager, correlated(200, 8), torch.eye(8) * 100)
        prune(manager, 0.75, criterion=criterion)
    assert not silent
    assert not criterion.notes


def test_raised_damping_is_what_the_note_says() -> None:
    layer = linear(random(4, 8))
    manager, x = MaskManager(layer), random(1, 8)
    criterion = SparseGPT(damp=1e-12)
    shown(criterion, manager, x)
    with pytest.warns(UserWarning, match="raised"):
        found = criterion.score(layer.weight.detach(), name="weight")
    raised = float(criterion.notes["weight"].split()[4].rstrip(":"))
    expected = shown(SparseGPT(damp=raised), manager, x).score(layer.weight.detach(), name="weight")
    assert torch.allclose(found, expected, rtol=1e-2)


def test_a_matrix_that_no_damping_helps_is_an_error_and_changes_nothing() -> None:
    layer = linear(random(2, 2))
    before = layer.weight.detach().clone()
    manager = MaskManager(layer)
    criterion = shown(SparseGPT(), manager, torch.eye(2))
    criterion.memory["weight"]["outer"] = torch.tensor([[[1.0, 100.0], [100.0, 1.0]]])
    with pytest.raises(RecipeError, match=r"inputs of weight is not positive definite even with damp=1; .* criterion 'wanda'"):
        prune(manager, 0.5, criterion=criterion)
    assert torch.equal(layer.weight, before)
    assert not manager.masks


def test_what_cannot_be_solved_is_refused_and_left_alone() -> None:
    layer = linear(random(2, 4))
    before = layer.weight.detach().clone()
    manager = MaskManager(layer)
    for x, error, words in (
        (torch.zeros(3, 4), DataError, r"SparseGPT cannot score weight: all its inputs were 0"),
        (torch.tensor([[1.0, torch.nan, 1.0, 1.0]]), DivergedError, r"the inputs of weight are not finite"),
    ):
        with pytest.raises(error, match=words):
            prune(manager, 0.5, criterion=shown(SparseGPT(), manager, x))
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"weight has weights that are not finite. Its weights were not finite before"):
        prune(manager, 0.5, criterion=shown(SparseGPT(), manager, correlated(9, 4)))
    assert torch.equal(layer.weight[1], before[1])
    assert not manager.masks


def test_an_update_that_overflows_its_type_is_refused() -> None:
    layer = linear([[6e4, 6e4]]).half()
    manager = MaskManager(layer, pattern="unstructured:row")
    x = torch.tensor([[1.0, 1.0]])
    with pytest.raises(DivergedError, match=r"not finite. Raise damp, which is 0.001"):
        prune(manager, 0.5, criterion=shown(SparseGPT(damp=1e-3), manager, x))
    assert layer.weight.tolist() == [[6e4, 6e4]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"damp": 0.0}, r"damp=0.0: a share"),
        ({"damp": 1.5}, r"damp=1.5"),
        ({"block": 0}, r"block=0"),
        ({"batches": 0}, r"1 batch"),
    ],
)
def test_what_is_out_of_range(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        SparseGPT(**given)
