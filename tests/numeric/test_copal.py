"""COPAL-style sensitivity against autograd: gradients of the output energy, per token and summed; its identities."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from sparsetrain.criteria import Copal, Criterion, Known, OutputFisher, Seen, StatisticsCriterion, Wanda
from sparsetrain.criteria.sparsegpt import symmetric
from sparsetrain.errors import DivergedError, RecipeError
from sparsetrain.patterns import Unstructured

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def layer(dtype: torch.dtype = torch.float64, out: int = 5, size: int = 7) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(size, out, dtype=dtype)


def tokens(shape: tuple[int, ...] = (3, 4, 7), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=dtype)


def watched(criterion: StatisticsCriterion, module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    known = Known("weight", module, "weight", Unstructured())
    for x in inputs:
        criterion.observe(Seen(known, module.weight.detach(), input=x))  # type: ignore[arg-type]
    return criterion.settled(criterion.memory["weight"])


def energy(weight: Tensor, x: Tensor) -> Tensor:
    return (x @ weight.mT).square().sum()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_final_is_the_gradient_of_the_output_energy(dtype: torch.dtype) -> None:
    module, x = layer(dtype), tokens(dtype=dtype)
    found = watched(Copal(abs_order="final"), module, x[:1], x[1:])  # in two batches of other sizes
    weight = module.weight.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(energy(weight, x), weight)
    sensitivity = module.weight.detach() @ symmetric(found["outer"])[0]
    torch.testing.assert_close(2 * 12 * sensitivity, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_token_is_half_the_mean_of_absolute_gradients(dtype: torch.dtype) -> None:
    module, x = layer(dtype), tokens(dtype=dtype)
    found = watched(Copal(), module, x)["outer"][0]
    each = vmap(grad(energy), (None, 0))(module.weight.detach(), x.flatten(0, 1))
    torch.testing.assert_close(found, each.abs().mean(0) / 2, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_sequence_takes_the_absolute_value_of_each_samples_sum() -> None:
    module, x = layer(), tokens()
    found = watched(Copal(abs_order="sequence"), module, x)["outer"][0]
    each = vmap(grad(energy), (None, 0))(module.weight.detach(), x)
    torch.testing.assert_close(found, each.abs().sum(0) / 2 / 12, rtol=1e-12, atol=1e-12)


def test_domain_takes_it_of_the_domains_mean() -> None:
    module, x = layer(), tokens()
    found = watched(Copal(abs_order="domain"), module, x[:2], x[2:])["outer"][0]
    (wanted,) = torch.autograd.grad(energy(weight := module.weight.detach().requires_grad_(), x), weight)
    torch.testing.assert_close(found, wanted.abs() / 2 / 12, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["token", "sequence", "domain", "final"])
@pytest.mark.parametrize("e", [1e-2, 1e-3, 1e-4])
def test_it_is_the_finite_difference_of_a_change_in_proportion(e: float, order: str) -> None:
    """How much ``||dy||^2`` of ``dy = f(x + dx, W + dW) - f(x, W)`` answers to ``dW``, at ``dx = e x`` and ``dW = e W``.

    ``dy = e (2 + e) y`` there, so that the answer is ``2 e (2 + e) (1 + e) y x'``.
    """
    module, x = layer(), tokens()
    weight, size = module.weight.detach(), 1e-3 * e
    found = watched(criterion := Copal(abs_order=order), module, x)["outer"][0]  # type: ignore[arg-type]
    answers = torch.zeros(3, 4, *weight.shape, dtype=torch.float64)
    for i, j in itertools.product(*map(range, weight.shape)):
        for sign in (1, -1):
            there = (1 + e) * weight
            there[i, j] += sign * size
            change = nn.functional.linear((1 + e) * x, there) - nn.functional.linear(x, weight)
            answers[:, :, i, j] += sign * change.square().sum(-1) / (2 * size)
    answers /= 2 * e * (2 + e) * (1 + e)
    wanted = {
        "token": answers.abs().mean((0, 1)),
        "sequence": answers.sum(1).abs().sum(0) / 12,
        "domain": answers.mean((0, 1)).abs(),
        "final": answers.mean((0, 1)).abs(),
    }[order]
    sensitivity = found if order != "final" else (weight @ symmetric(found)).abs()
    torch.testing.assert_close(sensitivity, wanted, rtol=1e-6, atol=1e-9)
    criterion.memory["weight"] = criterion.settled(criterion.memory["weight"])
    torch.testing.assert_close(criterion.score(weight, name="weight"), weight.abs() * wanted, rtol=1e-6, atol=1e-9)


def test_signed_scores_of_a_row_add_up_to_its_energy() -> None:
    module, x = layer(), tokens()
    found = watched(Copal(abs_order="final"), module, x)
    weight = module.weight.detach()
    rows = (weight * (weight @ symmetric(found["outer"])[0])).sum(1)
    torch.testing.assert_close(rows, (x @ weight.mT).square().mean((0, 1)), rtol=1e-12, atol=1e-12)


def test_with_orthogonal_features_final_is_wanda_squared() -> None:
    module = layer(out=5, size=8)
    x = torch.linalg.qr(tokens((16, 8)))[0] * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8], dtype=torch.float64)
    scores = {}
    for criterion in (Copal(abs_order="final"), Wanda()):
        watched(criterion, module, x)
        scores[type(criterion)] = criterion.score(module.weight.detach(), name="weight")
    torch.testing.assert_close(scores[Copal], scores[Wanda].square(), rtol=1e-6, atol=1e-12)
    assert torch.equal(scores[Copal].argsort(1), scores[Wanda].argsort(1))


def test_output_fisher_is_the_mean_square_gradient() -> None:
    module, x = layer(), tokens()
    criterion = OutputFisher()
    watched(criterion, module, x)
    each = vmap(grad(energy), (None, 0))(module.weight.detach(), x.flatten(0, 1))
    wanted = module.weight.detach().abs() * (each / 2).square().sum(0).sqrt()
    torch.testing.assert_close(criterion.score(module.weight.detach(), name="weight"), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("make", [Copal, lambda: Copal(abs_order="final"), OutputFisher])
def test_a_convolution_is_its_patches(make: Callable[[], StatisticsCriterion], groups: int) -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, bias=False, dtype=torch.float64)
    x = tokens((2, 4, 7, 7))
    criterion = make()
    watched(criterion, conv, x)
    found = criterion.score(conv.weight.detach(), name="weight")
    patches = nn.functional.unfold(x, 3, stride=2, padding=1).mT.reshape(-1, groups, 36 // groups)
    for group in range(groups):
        rows = slice(group * 6 // groups, (group + 1) * 6 // groups)
        linear = nn.Linear(36 // groups, 6 // groups, bias=False, dtype=torch.float64)
        linear.weight.data.copy_(conv.weight[rows].flatten(1))
        alone = make()
        watched(alone, linear, patches[:, group])
        wanted = alone.score(linear.weight.detach(), name="weight")
        torch.testing.assert_close(found[rows].flatten(1), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (4, 2, 5, 7)),
        (lambda: nn.Conv2d(2, 3, (2, 3), dilation=2, padding="same", padding_mode="circular", bias=False), (4, 2, 5, 7)),
        (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect", bias=False), (4, 2, 9)),
        (lambda: nn.Conv1d(2, 3, 3, bias=False), (2, 9)),
        (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 5, 7)),
    ],
)
@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_a_sequence_is_an_image_whatever_memory_takes_at_a_time(
    images: int, make: Callable[[], nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    conv = make().double()
    x = tokens(shape)
    batch = x if x.ndim == conv.weight.ndim else x[None]
    kernel = conv.weight[0, 0].numel()
    monkeypatch.setattr("sparsetrain.criteria.inputs._CHUNK", images * batch[0].numel() * kernel)
    found = watched(Copal(abs_order="sequence"), conv, x)
    total = torch.zeros_like(conv.weight)
    for image in batch:
        conv.weight.grad = None
        made = conv(image[None])
        made.square().sum().backward()
        total += conv.weight.grad.abs() / 2
    positions = made[0, 0].numel() * len(batch)
    torch.testing.assert_close(found["outer"][0], total.flatten(1).detach() / positions, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [Copal, lambda: Copal(abs_order="sequence"), lambda: Copal(abs_order="domain"), OutputFisher])
def test_what_a_layer_gave_is_its_output_without_bias(make: Callable[[], StatisticsCriterion]) -> None:
    module, x = layer(), tokens()
    assert float(module.bias.detach().abs().min()) > 0.01
    computed, given = watched(make(), module, x), make()
    known = Known("weight", module, "weight", Unstructured())
    given.observe(Seen(known, module.weight.detach(), input=x, output=module(x).detach()))
    torch.testing.assert_close(given.settled(given.memory["weight"])["outer"], computed["outer"], rtol=1e-12, atol=1e-12)


def test_layers_with_one_input_are_measured_apart_unless_weights_play_no_part() -> None:
    assert Copal().of_weights
    assert OutputFisher().of_weights
    assert not Copal(abs_order="final").of_weights
    assert not Wanda().of_weights


def test_bad_arguments_and_inputs() -> None:
    with pytest.raises(RecipeError, match=r"abs_order='tokens'; use one of token, sequence, domain, final.*Did you mean"):
        Copal(abs_order="tokens")  # type: ignore[arg-type]
    criterion: Criterion = Copal()
    watched(criterion, module := layer(torch.float32), tokens(dtype=torch.float32) * 1e30)  # type: ignore[arg-type]
    with pytest.raises(DivergedError, match="overflow when squared"):
        criterion.score(module.weight.detach(), name="weight", step=0)
