"""OWL: the authors' sparsities, blocks found by names, exact counts, and what it refuses.

Golden data: ../numeric/golden/owl.npz (luuyin/OWL dddb7a4, lib/prune_all.py, prune_wanda_outlier with Hyper_m=3, Lamda=0.08 and
sparsity_ratio=0.7, run once on a CPU) on a model of four blocks of two Linears (32 -> 16 and 32 -> 8) that pass their input on;
inputs, weights, outlier shares in percent, and the sparsity of each block are stored.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsetrain.allocation import OWL, Share, get_allocation
from sparsetrain.allocation.owl import blocks_of, outlier_share, owl_sparsities
from sparsetrain.criteria import Known, Seen, SparseGPT, Wanda
from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.patterns import Pattern, Unstructured, parse_pattern
from sparsetrain.pruning import prune

GOLDEN = Path(__file__).parent.parent / "numeric" / "golden" / "owl.npz"


def share(name: str, scores: Tensor, pattern: Pattern | None = None) -> Share:
    return Share(name, pattern or Unstructured(), tuple(scores.shape), lambda: scores, lambda: scores)


def test_sparsities_are_the_authors() -> None:
    with np.load(GOLDEN) as file:
        data = dict(file)
    assert str(data["source"]) == "https://github.com/luuyin/OWL"
    norms = torch.from_numpy(data["inputs"]).flatten(0, 1).norm(dim=0)
    weights = {name: torch.from_numpy(value) for name, value in data.items() if name.startswith("layers.")}
    shares = [share(name, weight.abs() * norms) for name, weight in weights.items()]
    groups = [[s.gathered() for s in shares if s.name.startswith(f"layers.{i}.")] for i in range(4)]
    found = [outlier_share(group, 3.0) for group in groups]
    assert found == pytest.approx([percent / 100 for percent in data["outliers"]], rel=1e-12)
    assert owl_sparsities(found, [768] * 4, 0.7, 0.08) == pytest.approx(list(data["sparsity"]), rel=1e-12)
    asked = OWL(factor=3.0)(shares, 0.7)
    for s in shares:  # to the nearest whole weight, and one more where the budget is met
        assert abs(asked[s.name] - data["sparsity"][int(s.name.split(".")[1])]) * s.numel < 1.6
    assert sum(asked[s.name] * s.numel for s in shares) == math.floor(0.7 * 4 * 768)


def test_by_hand() -> None:
    assert outlier_share([torch.tensor([1.0, 1.0, 7.0])], 2) == 1 / 3
    # mean (12 + 0) / 4: the 12 is the outlier; what is pruned counts as 0
    assert outlier_share([torch.tensor([12.0, 0.0]), torch.tensor([-torch.inf, -torch.inf])], 3.5) == 1 / 4
    assert owl_sparsities([0.0, 0.1], [1, 1], 0.7, 0.08) == pytest.approx([0.78, 0.62])
    # r = 0, 0.1, 0.2 and sizes 1, 1, 2: mean 0.125
    assert owl_sparsities([0.1, 0.2, 0.3], [1, 1, 2], 0.6, 0.1) == pytest.approx([0.725, 0.625, 0.525])
    assert owl_sparsities([0.2, 0.2], [1, 5], 0.7, 0.08) == [0.7, 0.7]
    assert owl_sparsities([0.0, 0.1], [1, 1], 0.7, 0.0) == [0.7, 0.7]
    assert owl_sparsities([0.0, 0.1], [1, 3], 0.7, 5e-324) == [0.7, 0.7]  # lost in rounding


def test_near_0_and_1_blocks_move_together() -> None:
    # 0.95 + 0.08 would be all: half of the 0.05 is the most
    assert owl_sparsities([0.0, 0.1], [1, 1], 0.95, 0.08) == pytest.approx([0.975, 0.925])
    assert owl_sparsities([0.0, 0.1], [1, 1], 0.02, 0.08) == pytest.approx([0.04, 0.0])
    assert owl_sparsities([0.0, 0.1], [1, 1], 0.0, 0.08) == [0.0, 0.0]


def test_blocks_are_found_by_names() -> None:
    names = {
        "model.embed.weight": "model.embed.weight",
        "model.layers.0.attn.q.weight": "model.layers.0",
        "model.layers.1.attn.q.weight": "model.layers.1",
        "model.layers.1.mlp.experts.0.up.weight": "model.layers.1",  # a list in a list: the outer one counts
        "model.layers.1.mlp.experts.1.up.weight": "model.layers.1",
        "model.layers.1.extra.weight": "model.layers.1",
        "decoder.0.weight": "decoder.0",  # another list
        "decoder.2.weight": "decoder.2",
        "heads.0.weight": "heads.0.weight",  # a list of one
    }
    assert blocks_of(names) == names
    unlike = {"net.0.weight": "net.0.weight", "net.1.h.0.fc.weight": "net.1.h.0", "net.1.h.1.fc.weight": "net.1.h.1"}
    assert blocks_of(unlike) == unlike
    assert blocks_of(["0.weight", "2.weight"]) == {"0.weight": ".0", "2.weight": ".2"}


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=6),
    percent=st.integers(0, 80),
    spread=st.floats(0, 0.4),
    seed=st.integers(0, 99),
)
def test_counts_are_exact(shapes: list[tuple[int, int]], percent: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = [share(f"h.{i // 2}.{i}", torch.rand(s, generator=generator).pow(4)) for i, s in enumerate(shapes)]
    sparsity, total = Fraction(percent, 100), sum(s.numel for s in shares)
    try:
        found = OWL(factor=2.0, spread=spread)(shares, sparsity)
    except PatternError as error:
        assert "each keeps one unit at least" in str(error)  # noqa: PT017
        assert percent > 50
        return
    assert sum(found[s.name] * s.numel for s in shares) == math.floor(sparsity * total)
    assert all(0 <= value < 1 for value in found.values())


class Blocks(nn.Module):
    """Two blocks of two layers; the inputs of the second have one channel far above the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(20, 10), "b": nn.Linear(20, 30)}) for _ in range(2))


def pruned(allocation: Any, criterion: Wanda | SparseGPT, pattern: str = "unstructured:row") -> dict[str, float]:
    model = Blocks()
    manager = MaskManager(model, pattern=pattern)
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    tensors = [Known.of(t) for t in manager]
    criterion.prepare(model, tensors)
    for tensor in tensors:
        scale = torch.ones(20)
        scale[4] = 40.0 if tensor.name.startswith("h.1") else 1.0
        criterion.observe(Seen(tensor, tensor.parameter.detach(), input=x * scale))
    prune(manager, 0.7, criterion=criterion, allocation=allocation)
    assert manager.verify(strict=True).ok
    assert manager.sparsity() == pytest.approx(0.7, abs=0.02 if pattern == "unstructured:row" else 1e-3)
    return {name: dead / size for name, (dead, size) in manager.counts().items()}


@pytest.mark.parametrize("criterion", [Wanda, SparseGPT])
@pytest.mark.parametrize("pattern", ["unstructured", "unstructured:row"])
def test_the_block_with_outliers_stays_denser(criterion: type[Wanda | SparseGPT], pattern: str) -> None:
    found = pruned("owl", criterion(), pattern)
    assert found["h.0.a.weight"] == pytest.approx(found["h.0.b.weight"], abs=0.06)
    assert found["h.1.a.weight"] == pytest.approx(found["h.1.b.weight"], abs=0.06)
    assert found["h.0.b.weight"] - found["h.1.b.weight"] > 0.1
    flat = pruned(OWL(spread=0.0), criterion(), pattern)  # the twin: without its spread it is uniform
    assert max(flat.values()) - min(flat.values()) < 0.06


def test_what_it_refuses() -> None:
    scores = torch.rand(4, 4)
    with pytest.raises(RecipeError, match=r"w: pattern 2:4 always has sparsity 0.5, OWL cannot decide it"):
        OWL()([share("w", scores, parse_pattern("2:4"))], 0.5)
    for given_, words in (({"factor": 1.0}, r"OWL factor=1.0"), ({"factor": math.nan}, r"factor"), ({"spread": 0.5}, r"0.5")):
        with pytest.raises(RecipeError, match=words):
            OWL(**given_)
    assert OWL()([], 0.5) == {}
    assert get_allocation("owl") == OWL(5.0, 0.08)
