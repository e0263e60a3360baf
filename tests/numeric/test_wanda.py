"""Wanda and RIA: the authors' masks, values by hand, and what a layer really multiplies.

Golden data: golden/wanda.npz (locuslab/wanda 8e8fc87, lib/prune.py, prune_wanda) and golden/ria.npz (biomedical-cybernetics/
Relative-importance-and-activation-pruning 7bc55b0, lib/prune.py, prune_ria with a=0.5), each run once on a CPU on a model of
one Linear (32 -> 24), three samples (1, 16, 32) shown one by one; inputs, weight and masks are stored. RIA's threshold over the
whole layer prunes the entry at the threshold too, so it was asked for half an entry less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsetrain.criteria import RIA, Known, Magnitude, Seen, Wanda, inputs
from sparsetrain.criteria.inputs import InputCriterion, features
from sparsetrain.criteria.wanda import ria, wanda
from sparsetrain.errors import DataError, DivergedError, PatternError, RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        data = {key: file[key] if file[key].ndim == 0 else torch.from_numpy(file[key]) for key in file.files}
    assert str(data["source"]).startswith("https://github.com/")
    assert len(str(data["commit"])) == 40
    return data


def linear(weight: Any) -> nn.Linear:
    values = torch.as_tensor(weight, dtype=torch.float32)
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(values)
    return layer


def shown(criterion: InputCriterion, manager: MaskManager, *batches: Tensor) -> InputCriterion:
    """The criterion after it has seen these inputs of every layer."""
    tensors = [Known.of(t) for t in manager]
    criterion.prepare(manager.model, tensors)
    for batch in batches:
        for tensor in tensors:
            criterion.observe(Seen(tensor, tensor.parameter.detach(), input=batch))
    return criterion


def pruned(layer: nn.Linear, pattern: str, criterion: Any, sparsity: float, *batches: Tensor) -> Tensor:
    manager = MaskManager(layer, pattern=pattern)
    if isinstance(criterion, InputCriterion):
        shown(criterion, manager, *batches)
    prune(manager, sparsity, criterion=criterion)
    assert manager.verify(strict=True).ok
    return layer.weight.detach() != 0


PUBLISHED = [
    (Wanda, "wanda", "rows_50", "unstructured:row"),
    (Wanda, "wanda", "2:4", "2:4"),
    (Wanda, "wanda", "4:8", "4:8"),
    (RIA, "ria", "rows_50", "unstructured:row"),
    (RIA, "ria", "layer_50", "unstructured"),
    (RIA, "ria", "2:4", "2:4"),
]


@pytest.mark.parametrize(("kind", "file", "key", "pattern"), PUBLISHED)
def test_masks_are_the_authors(kind: type[Wanda], file: str, key: str, pattern: str) -> None:
    data = golden(file)
    alive = pruned(linear(data["weight"]), pattern, kind(), 0.5, *data["inputs"])
    assert torch.equal(alive, data[f"alive_{key}"])
    # Twins: without the inputs, and with those of the first sample alone, the masks are others.
    assert not torch.equal(pruned(linear(data["weight"]), pattern, Magnitude(), 0.5), data[f"alive_{key}"])
    assert not torch.equal(pruned(linear(data["weight"]), pattern, kind(), 0.5, data["inputs"][0]), data[f"alive_{key}"])


def test_wanda_by_hand() -> None:
    manager = MaskManager(linear([[2, -1], [1, 3]]))
    criterion = shown(Wanda(), manager, torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[[4.0, 0.0]]]))
    weight = manager.model.weight.detach()  # type: ignore[operator,union-attr]
    assert criterion.score(weight, name="weight").tolist() == [[10.0, 1.0], [5.0, 3.0]]  # norms 5 and 1
    assert wanda(torch.tensor([[-2.0, 1.0]]), torch.tensor([1.0, 3.0])).tolist() == [[2.0, 3.0]]


def test_ria_by_hand() -> None:
    manager = MaskManager(linear([[2, -6], [2, 4]]))
    # columns sum to 4 and 10, rows to 8 and 6; norms 16 and 81
    criterion = shown(RIA(), manager, torch.tensor([[16.0, 0.0], [0.0, 81.0]]))
    found = criterion.score(manager.model.weight.detach(), name="weight")  # type: ignore[operator,union-attr]
    expected = [[4 * (1 / 2 + 1 / 4), 9 * (3 / 5 + 3 / 4)], [4 * (1 / 2 + 1 / 3), 9 * (2 / 5 + 2 / 3)]]
    assert found.tolist() == [pytest.approx(row) for row in expected]
    assert ria(torch.tensor([[1.0, 3.0]]), torch.tensor([4.0, 1.0])).tolist() == [[2.5, 1.75]]
    alone = shown(RIA(power=0.0), manager, torch.tensor([[16.0, 0.0], [0.0, 81.0]]))
    found = alone.score(manager.model.weight.detach(), name="weight")  # type: ignore[operator,union-attr]
    assert found[0].tolist() == pytest.approx([3 / 4, 27 / 20])


def test_ria_of_zeros_is_zero() -> None:
    scores = ria(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([5.0, 4.0]))
    assert scores.tolist() == [[0.0, 4.0], [0.0, 0.0]]


def test_an_outlier_channel_is_kept_where_magnitude_loses_it() -> None:
    """Feature 0 is 50 times the other: losing it costs 4 * (0.5 * 50)^2 = 2500, losing the other 4 * (1 * 1)^2 = 4."""
    x = torch.tensor([[50.0, 1.0], [50.0, -1.0], [-50.0, 1.0], [-50.0, -1.0]])
    dense = x @ torch.tensor([[0.5, 1.0]]).T

    def error(criterion: Any) -> float:
        layer = linear([[0.5, 1.0]])
        pruned(layer, "unstructured:row", criterion, 0.5, x)
        return float((layer(x).detach() - dense).square().sum())

    assert error(Magnitude()) == 2500.0
    assert error(Wanda()) == 4.0
    assert error(RIA()) == 4.0  # (1 + 1/3) * sqrt(100) against (1 + 2/3) * sqrt(2)


# -- what a layer multiplies ------------------------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "2d": (nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(0, 1)), (2, 3, 5, 6)),
    "dilated": (nn.Conv2d(2, 4, 2, dilation=(2, 3), padding="same"), (2, 2, 6, 6)),
    "circular": (nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="circular"), (2, 2, 5, 6)),
    "groups": (nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 4, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (3, 4, 4, 5)),
    "3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 3, 4, 3)),
    "single": (nn.Conv2d(3, 4, 2), (3, 5, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_features_times_the_weight_are_what_a_convolution_gives(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any
    layer, shape = CONVOLUTIONS[kind]
    monkeypatch.setattr(inputs, "_CHUNK", chunk)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pieces = list(features(layer, x))
    assert len(pieces) == (1 if chunk > 1 or kind == "single" else shape[0])
    found = torch.cat(pieces, dim=1)  # (groups, N * positions, in * kernel)
    outputs = found @ layer.weight.detach().view(layer.groups, layer.out_channels // layer.groups, -1).mT
    output = layer(x).detach() - layer.bias.detach().view(-1, *[1] * len(layer.kernel_size))
    batch = output if kind != "single" else output[None]
    assert torch.allclose(outputs.movedim(1, -1).flatten(0, 1), batch.movedim(1, 0).flatten(1), atol=1e-5)


def test_norms_of_a_grouped_convolution_are_those_of_each_group() -> None:
    layer = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1).expand(1, 4, 2, 2)  # norms 2, 4, 6, 8
    with torch.no_grad():
        layer.weight.fill_(1.0)
    manager = MaskManager(layer)
    scores = shown(Wanda(), manager, x).score(layer.weight.detach(), name="weight")
    assert scores.flatten(1).tolist() == [[2.0, 4.0], [2.0, 4.0], [6.0, 8.0], [6.0, 8.0]]


def test_a_weight_that_is_stored_with_inputs_first() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(3, 2)  # (in 2, out 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]))
    manager = MaskManager(layer, Targets(head=True))
    x = torch.tensor([[2.0, 0.0], [0.0, 7.0]])
    assert shown(Wanda(), manager, x).score(layer.weight.detach(), name="weight").tolist() == [[2, 4, 6], [7, 7, 7]]
    # of all outputs' shares column sums (over outputs) are 6 and 3, row sums 2, 3, 4
    scores = shown(RIA(power=0.0), manager, x).score(layer.weight.detach(), name="weight")
    assert scores[0].tolist() == pytest.approx([1 / 6 + 1 / 2, 2 / 6 + 2 / 3, 3 / 6 + 3 / 4])


def test_sums_of_half_precision_inputs_are_exact() -> None:
    manager = MaskManager(linear([[1.0]]))
    ones = torch.ones(4097, 1, dtype=torch.bfloat16)  # in bfloat16 such a sum stops at 256
    criterion = shown(Wanda(), manager, ones, ones)
    assert criterion.memory["weight"]["squares"].tolist() == [[8194.0]]


def test_more_is_pruned_of_what_is_left() -> None:
    generator = torch.Generator().manual_seed(2)
    for kind in (Wanda, RIA):
        manager = MaskManager(linear(torch.randn(6, 8, generator=generator)), pattern="unstructured:row")
        criterion = shown(kind(), manager, torch.randn(20, 8, generator=generator))
        prune(manager, 0.5, criterion=criterion)
        before = manager.masks["weight"].clone()
        prune(manager, 0.75, criterion=criterion)
        assert not (manager.masks["weight"] & ~before).any()
        assert manager.verify(strict=True).ok


# -- what cannot be scored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Wanda, RIA])
def test_what_cannot_be_scored_is_refused_and_left_alone(kind: type[Wanda]) -> None:
    layer = linear([[1.0, -2.0], [3.0, 4.0]])
    before = layer.weight.detach().clone()
    manager = MaskManager(layer)
    with pytest.raises(DataError, match=rf"{kind.__name__} cannot score weight: all its inputs were 0 .* use criterion 'mag"):
        prune(manager, 0.5, criterion=shown(kind(), manager, torch.zeros(5, 2)))
    with pytest.raises(DivergedError, match=r"the inputs of weight are not finite"):
        prune(manager, 0.5, criterion=shown(kind(), manager, torch.tensor([[1.0, torch.inf]])))
    with pytest.raises(RecipeError, match=rf"{kind.__name__} scores weight from data and has seen none"):
        prune(manager, 0.5, criterion=kind())
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(PatternError, match=r"weight: .*NaN"):
        prune(manager, 0.5, criterion=shown(kind(), manager, torch.ones(5, 2)))
    assert torch.equal(layer.weight[1], before[1])
    assert not manager.masks


def test_layers_that_do_not_simply_multiply_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 4))
    for include, layer in (("0.weight", "Embedding"), ("weight_ih", "LSTM")):
        manager = MaskManager(model, Targets(include=(include,)))
        with pytest.raises(RecipeError, match=rf"Wanda measures what a layer multiplies .* not known of {layer}; leave it out"):
            prune(manager, 0.5, criterion=Wanda())


def test_ria_power_out_of_range() -> None:
    with pytest.raises(RecipeError, match=r"RIA power=-0.5: give a number of 0 or more"):
        RIA(power=-0.5)


def test_a_batch_without_inputs_is_passed_over() -> None:
    manager = MaskManager(linear([[1.0, 2.0]]))
    tensor = Known.of(next(iter(manager)))
    criterion = Wanda()
    criterion.observe(Seen(tensor, tensor.parameter.detach(), output=torch.ones(1, 1)))
    assert not criterion.memory
