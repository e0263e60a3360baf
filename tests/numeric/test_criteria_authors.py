"""PLATON, SNIP and lookahead against what the authors' own code gave once; movement and activations by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.calibration import calibrate, watch
from sparsetrain.criteria import (
    PLATON,
    SNIP,
    ActivationMean,
    APoZ,
    Known,
    Lookahead,
    Movement,
    Seen,
    StatisticsCriterion,
    get_criterion,
)
from sparsetrain.errors import RecipeError
from sparsetrain.masks import MaskManager, Override
from sparsetrain.patterns import Unstructured
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((GOLDEN / f"criteria_{name}.json").read_text())
    assert data["source"].startswith("https://github.com/")
    assert len(data["commit"]) == 40
    return data


# -- PLATON -----------------------------------------------------------------------------------------------------------------


def test_platon_is_the_authors() -> None:
    data = golden("platon")
    model = nn.Linear(4, 3, bias=False)
    manager, criterion = MaskManager(model), PLATON(beta1=data["beta1"], beta2=data["beta2"])
    for step in data["steps"]:
        with torch.no_grad():
            model.weight.copy_(torch.tensor(step["weight"]).view(3, 4))
        model.weight.grad = torch.tensor(step["gradient"]).view(3, 4)
        watch(manager, criterion)
        memory = criterion.memory["weight"]
        for key in ("importance", "uncertainty"):
            assert memory[key].flatten().tolist() == pytest.approx(step[key], rel=1e-6, abs=1e-9)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for remaining, kept in data["kept"].items():
        # the authors' threshold itself stays, so one weight more is left
        pruned = math.floor(12 * (1 - float(remaining))) - 1
        fresh = MaskManager(model)
        prune(fresh, pruned / 12 + 1e-9, criterion=criterion)
        assert fresh.masks["weight"].flatten().tolist() == [bool(k) for k in kept]
        with torch.no_grad():
            model.weight.fill_(1.0)


def test_platon_by_hand() -> None:
    criterion = PLATON(beta1=0.5, beta2=0.75)
    for gradient in (-3.0, 1.0):  # sensitivities 6 and 2
        show(criterion, 2.0, gradient)
    # averages 3, then 2.5; deviations 3 and 0.5; their averages 0.75, then 0.6875
    assert criterion.score(torch.tensor([[2.0]]), name="w").item() == 2.5 * 0.6875


@pytest.mark.parametrize("wrong", [{"beta1": 1.0}, {"beta2": -0.1}])
def test_platon_refuses_what_is_no_average(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=r"PLATON beta. ?=.*in \[0, 1\)"):
        PLATON(**wrong)


def show(criterion: StatisticsCriterion, weight: float, gradient: float) -> None:
    known = Known("w", nn.Linear(1, 1), "weight", Unstructured())
    criterion.observe(Seen(known, torch.tensor([[weight]]), torch.tensor([[gradient]])))


# -- movement ---------------------------------------------------------------------------------------------------------------


def test_movement_by_hand() -> None:
    criterion = Movement(lr=0.5)
    for weight, gradient in ((2.0, -3.0), (1.0, 4.0)):  # away from zero, then towards it
        show(criterion, weight, gradient)
    assert criterion.score(torch.zeros(1, 1), name="w").tolist() == [[0.5 * 6 - 0.5 * 4]]


def learnt(form: Any, lr: float, penalty: float) -> tuple[list[Tensor], Movement, nn.Linear]:
    """The scores learnt by autograd and SGD through a mask of ones, as the paper does, beside those of the criterion."""
    torch.manual_seed(1)
    model = nn.Linear(5, 4, bias=False).double()
    scores = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    manager, criterion = MaskManager(model), Movement(form, lr=lr, penalty=penalty)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD([scores], lr=lr)]
    for _ in range(6):
        x, y = torch.randn(8, 5).double(), torch.randint(4, (8,))
        for optimizer in optimizers:
            optimizer.zero_grad()
        mask = torch.ones_like(scores) + scores - scores.detach()  # straight through
        loss = F.cross_entropy(F.linear(x, model.weight * mask), y) + penalty * torch.sigmoid(scores).sum()
        loss.backward()
        watch(manager, criterion)
        for optimizer in optimizers:
            optimizer.step()
    return [scores.detach(), torch.sigmoid(scores.detach())], criterion, model


@pytest.mark.parametrize(("form", "lr", "penalty"), [("hard", 0.3, 0.0), ("soft", 0.3, 0.0), ("soft", 0.7, 0.2)])
def test_movement_learns_what_autograd_learns(form: str, lr: float, penalty: float) -> None:
    (scores, gates), criterion, model = learnt(form, lr, penalty)
    found = criterion.score(model.weight.detach(), name="weight")
    torch.testing.assert_close(found, gates if form == "soft" else scores, rtol=1e-10, atol=1e-12)


def test_soft_and_hard_movement_rank_alike_without_a_penalty() -> None:
    masks = []
    for form in ("hard", "soft"):
        _, criterion, model = learnt(form, 0.3, 0.0)
        manager = MaskManager(model)
        prune(manager, 0.6, criterion=criterion, allocation="global")
        masks.append(manager.masks["weight"])
    assert torch.equal(*masks)
    assert not masks[0].all()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"form": "sfot"}, r"form 'sfot' is unknown.*Did you mean 'soft'"),
        ({"lr": 0.0}, "lr=0"),
        ({"penalty": 0.1}, "for form='soft' alone"),
        ({"form": "soft", "penalty": -1.0}, "penalty=-1"),
    ],
)
def test_movement_refuses(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Movement(**wrong)


# -- activations ------------------------------------------------------------------------------------------------------------


def test_activations_by_hand() -> None:
    model = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-2.0], [0.5]]))
    manager = MaskManager(model, pattern="neurons")
    batches = [torch.tensor([[[1.0], [-2.0]], [[3.0], [0.0]]]), torch.tensor([[[4.0]]])]  # 5 tokens: 1, -2, 3, 0, 4
    expected = {
        ActivationMean(): [8 / 5, 4 / 5, 4 / 5],
        ActivationMean(activation="identity"): [10 / 5, 20 / 5, 5 / 5],
        APoZ(): [3 / 5, 1 / 5, 3 / 5],
    }
    for criterion, scores in expected.items():
        assert calibrate(manager, criterion, batches, model) == 2
        assert criterion.score(model.weight, name="weight").flatten().tolist() == pytest.approx(scores)
    gelu = ActivationMean(activation="gelu")
    calibrate(manager, gelu, [torch.tensor([[1.0]])], model)
    assert gelu.score(model.weight, name="weight")[0].item() == pytest.approx(0.8413447)  # 1 * Phi(1)


@pytest.mark.parametrize("layer", [nn.Conv1d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv3d(1, 2, 1)], ids=lambda m: type(m).__name__)
def test_a_convolution_has_its_channels_in_dimension_1(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.flatten().copy_(torch.tensor([1.0, -1.0]))
        layer.bias.zero_()
    x = torch.tensor([1.0, 2.0, -4.0, 1.0]).view(1, 1, 4, *[1] * (layer.weight.ndim - 3))
    criterion = ActivationMean()
    calibrate(MaskManager(layer, pattern="neurons"), criterion, [x], layer)
    assert criterion.score(layer.weight, name="weight").flatten().tolist() == [1.0, 1.0]
    assert criterion.score(layer.weight, name="weight").shape == layer.weight.shape
    counted = APoZ()
    calibrate(MaskManager(layer, pattern="neurons"), counted, [x], layer)
    assert counted.score(layer.weight, name="weight").flatten().tolist() == [0.75, 0.25]


def test_a_transposed_layer_has_its_outputs_last() -> None:
    from transformers.pytorch_utils import Conv1D

    model = Conv1D(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]))
    criterion = ActivationMean()
    calibrate(MaskManager(model, pattern="neurons"), criterion, [torch.ones(2, 3)], model)
    assert criterion.score(model.weight, name="weight").tolist() == [[3.0, 6.0]] * 3


def test_a_layer_used_twice_is_seen_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    model = Twice()
    with torch.no_grad():
        model.fc.weight.fill_(2.0)
    criterion = ActivationMean()
    calibrate(MaskManager(model), criterion, [torch.ones(1, 1)], model)
    assert criterion.score(model.fc.weight, name="fc.weight").tolist() == [[(2 + 4) / 2]]


@pytest.mark.parametrize("pattern", ["unstructured:row", "2:4", "channels"])
def test_patterns_that_would_see_only_ties_are_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match=r"weight: criterion APoZ.*would find only ties; use pattern 'neurons'"):
        calibrate(MaskManager(nn.Linear(4, 4), pattern=pattern), APoZ(), [torch.ones(1, 4)], lambda batch: batch)


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (nn.Embedding(5, 4), {"embeddings": True}),
        (nn.GRU(4, 4), {}),
        (nn.MultiheadAttention(4, 2), {"include": ("in_proj",)}),
        (nn.Bilinear(4, 4, 4), {}),
    ],
)
def test_layers_whose_outputs_are_no_rows_are_refused(layer: nn.Module, settings: dict[str, Any]) -> None:
    model = nn.ModuleDict({"it": layer, "fc": nn.Linear(4, 4)})
    for criterion in (APoZ(), Lookahead()):
        with pytest.raises(Exception, match=rf"it\.\w+: criterion {type(criterion).__name__}.*{type(layer).__name__}"):
            prune(MaskManager(model, Targets(**settings)), 0.5, criterion=criterion)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"activation 'relo' is unknown.*Did you mean 'relu'"):
        ActivationMean(activation="relo")  # type: ignore[arg-type]


# -- lookahead --------------------------------------------------------------------------------------------------------------


def authors_network(case: dict[str, Any]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, shape in enumerate(case["shapes"]):
        if len(shape) == 4:
            layers += [nn.Conv2d(shape[1], shape[0], tuple(shape[2:])), nn.ReLU()]
        else:
            if index and len(case["shapes"][index - 1]) == 4:
                layers.append(nn.Flatten())
            layers += [nn.Linear(shape[1], shape[0]), nn.ReLU()]
    model = nn.Sequential(*layers)
    weights = [p for p in model.parameters() if p.ndim > 1]
    with torch.no_grad():
        for parameter, values in zip(weights, case["weights"], strict=True):
            parameter.copy_(torch.tensor(values).view(parameter.shape))
    return model


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_lookahead_is_the_authors(name: str) -> None:
    case = golden("lookahead")["cases"][name]
    model = authors_network(case)
    manager, criterion = MaskManager(model, Targets(head=True)), Lookahead()
    names = [tensor.name for tensor in manager]
    assert len(names) == len(case["shapes"])
    criterion.prepare(manager.model, [Known.of(t) for t in manager])
    for index, key in enumerate(names):
        found = criterion.score(model.get_parameter(key).detach(), name=key).square().flatten().tolist()
        assert found == pytest.approx(case["squared_scores"][index], rel=1e-5)
    sizes = [len(mask) for mask in case["masks"]]
    goals = [(n - sum(mask)) / n for n, mask in zip(sizes, case["masks"], strict=True)]
    fresh = MaskManager(
        model, Targets(head=True), overrides={f"^{n}$": Override(sparsity=g) for n, g in zip(names, goals, strict=True)}
    )
    prune(fresh, 0.5, criterion="lookahead")
    for key, mask in zip(names, case["masks"], strict=True):
        assert fresh.masks[key].int().flatten().tolist() == mask
    # the twin: magnitude keeps others
    plain = MaskManager(authors_network(case), Targets(head=True))
    prune(plain, 0.5)
    assert any(plain.masks[key].int().flatten().tolist() != mask for key, mask in zip(names, case["masks"], strict=True))


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("criterion", ["snip", "magnitude"])
def test_snip_prunes_what_the_authors_prune(case: int, criterion: str) -> None:
    """One threshold over the model, by the gradient to the masks; another criterion prunes something else."""
    stored = golden("snip")["cases"][case]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    layers = {"w1": model[0], "w2": model[2]}
    with torch.no_grad():
        for key, layer in layers.items():
            layer.weight.copy_(torch.tensor(stored["weights"][key]))
            layer.bias.copy_(torch.tensor(stored["biases"][key.replace("w", "c")]))
    batch = torch.tensor(stored["inputs"]), torch.tensor(stored["labels"])
    manager = MaskManager(model, Targets(head=True))
    score = get_criterion(criterion)
    if isinstance(score, SNIP):
        calibrate(manager, score, [batch], lambda b: F.cross_entropy(model(b[0]), b[1]))
        for name, key in (("0.weight", "w1"), ("2.weight", "w2")):
            ours = score.score(model.get_parameter(name).detach(), name=name, step=0)
            theirs = torch.tensor(stored["scores"][key])  # divided by the sum over the model
            assert torch.allclose(ours / ours.sum(), theirs / theirs.sum(), atol=1e-5)
    prune(manager, stored["sparsity"], criterion=score, allocation="global")
    same = all(
        torch.equal(manager[name].full_mask(), torch.tensor(stored["masks"][key]).bool())
        for name, key in (("0.weight", "w1"), ("2.weight", "w2"))
    )
    assert same is (criterion == "snip")
