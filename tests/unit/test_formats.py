"""Layers in other formats: what they compute and skip, what they refuse, and how the choice and the clock work."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsetrain.errors import ExportError, RecipeError
from sparsetrain.export import compare, for_inference, measure_speed, race, run_on, speed
from sparsetrain.export.layers import Compact, Sparse, accept_beta, block_of, build, kind_of, matrix_of, stored_share
from sparsetrain.export.places import convert, require_equal, survey

FORMS = ("compact", "csr", "bsr:4x4")


def sparse(module: nn.Module) -> nn.Module:
    """Seen as (out, in): the last four rows and the first eight columns are zero, and about 70 % of the rest."""
    torch.manual_seed(3)
    with torch.no_grad():
        weight = matrix_of(module)
        weight.copy_(torch.randn(weight.shape) * (torch.rand(weight.shape) > 0.7))
        weight[-4:] = 0
        weight[:, :8] = 0
        if module.bias is not None:
            module.bias.copy_(torch.arange(len(module.bias)))  # type: ignore[arg-type]
    return module.requires_grad_(False).eval()


def layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    return [
        (sparse(nn.Linear(16, 12)), (5, 16)),
        (sparse(nn.Linear(16, 12, bias=False)), (2, 3, 16)),
        (sparse(nn.Linear(16, 12)), (16,)),
        (sparse(nn.Linear(16, 12)), (0, 16)),
        (sparse(nn.Linear(16, 12, bias=False)), (1, 16)),
        (sparse(Conv1D(12, 16)), (2, 3, 16)),
        (sparse(nn.Conv2d(16, 12, 1)), (2, 16, 3, 5)),
        (sparse(nn.Conv2d(16, 12, 1, bias=False)), (16, 3, 5)),
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", range(8))
def test_a_format_gives_what_the_dense_layer_gives(form: str, case: int) -> None:
    module, shape = layers()[case]
    layer, x = build(module, form), torch.randn(shape)
    y = layer(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)
    state, dense = layer.state_dict(), module.state_dict()
    assert state.keys() == dense.keys()
    assert all(torch.equal(state[name], dense[name]) for name in dense)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), y)
    torch.testing.assert_close(copy.deepcopy(layer).double()(x.double()), module.double()(x.double()))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_zero_is_neither_read_nor_computed(form: str) -> None:
    module = sparse(nn.Linear(16, 12))
    x = torch.ones(2, 16)
    x[:, :8] = torch.nan  # columns that are wholly zero
    assert module(x).isnan().all()
    y = build(module, form)(x)
    assert y.isfinite().all()
    assert torch.equal(y[:, -4:], torch.tensor([[8.0, 9, 10, 11]] * 2))  # dead rows: their bias alone


def test_a_format_stores_only_what_it_needs() -> None:
    module = sparse(nn.Linear(16, 12))
    alive = module.weight != 0
    compact = build(module, "compact")
    assert isinstance(compact, Compact)
    assert compact.small.shape == (alive.any(1).sum(), alive.any(0).sum())
    csr = build(module, "csr")
    assert isinstance(csr, Sparse)
    assert csr.values.numel() == alive.sum()
    assert csr.col.dtype == torch.int32
    assert stored_share(alive, "csr") == pytest.approx(float(alive.sum()) / 192)
    eye = torch.eye(8, dtype=torch.bool)
    assert [stored_share(eye, form) for form in ("compact", "csr", "bsr:4x4", "bsr:3x3")] == [1, 0.125, 0.5, 1]


def test_a_layer_that_is_wholly_zero_is_its_bias() -> None:
    for module, x in ((nn.Linear(4, 3), torch.ones(2, 4)), (nn.Conv2d(4, 3, 1), torch.ones(2, 4, 5, 5))):
        nn.init.zeros_(module.weight)
        for form in ("compact", "csr"):
            assert torch.equal(build(module.requires_grad_(False), form)(x), module(x))


def test_kinds() -> None:
    class Own(nn.Linear):
        pass

    kinds = [nn.Linear(2, 2), Conv1D(2, 2), nn.Conv2d(2, 2, 1), Own(2, 2), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1, stride=2)]
    assert [kind_of(kind) for kind in kinds] == ["linear", "conv1d", "pointwise", None, None, None]
    assert kind_of(nn.Conv2d(2, 2, 1, groups=2)) is None
    assert kind_of(nn.Conv2d(2, 2, 1, padding=1)) is None


def test_what_has_zeros_and_stays_dense_is_told() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleDict({"encoder": encoder, "conv": nn.Conv2d(8, 8, 3), "hooked": nn.Linear(8, 8), "full": nn.Linear(8, 8)})
    with torch.no_grad():
        for weight in (encoder.linear1.weight, encoder.self_attn.out_proj.weight, model["conv"].weight, model["hooked"].weight):
            weight[:4] = 0  # type: ignore[index]
    model["hooked"].register_forward_hook(lambda *given: None)
    places, left = survey(model)
    assert places == []
    names = {"encoder.linear1.weight": "fused", "encoder.self_attn.out_proj.weight": "plain", "conv.weight": "plain"}
    assert left.keys() == {*names, "hooked.weight"}
    assert "hooks" in left["hooked.weight"]
    assert all(word in left[name] for name, word in names.items())


def test_a_weight_of_another_kind_stays_dense() -> None:
    class Quantized(nn.Parameter):
        pass

    layer = nn.Linear(8, 8)
    layer.weight = Quantized(torch.eye(8))
    places, left = survey(layer)
    assert places == []
    assert left == {"weight": "its weight is a Quantized (sharded or quantized): gather it first"}


def test_a_format_that_is_wrong_or_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sparse(nn.Linear(16, 12))
    _, difference = convert(module, "csr", 1e-4)
    assert difference < 1e-5
    with pytest.raises(ExportError, match=r"bsr:8x8.*\(12, 16\) is not made of such blocks"):
        convert(module, "bsr:8x8", 1e-4)
    with pytest.raises(ExportError, match=r"csr does not run here.*BFloat16"):
        convert(copy.deepcopy(module).bfloat16(), "csr", 1e-4)
    multiply = Sparse.multiply
    monkeypatch.setattr(Sparse, "multiply", lambda self, x: multiply(self, x) + 0.25)
    with pytest.raises(ExportError, match=r"csr differs from the dense output by 0\.25"):
        convert(module, "csr", 1e-4)
    assert convert(module, "csr", 0.5)[1] == pytest.approx(0.25, abs=1e-4)


def test_equal_means_also_where_nothing_is_finite() -> None:
    dense = torch.tensor([torch.inf, torch.nan, 2.0, 1.0])
    assert require_equal(dense + torch.tensor([0, 0, 0, 0.125]), dense, "y", 0.0625) == 0.125  # 2 is the largest
    for wrong in (torch.tensor([torch.inf, 0.0, 2.0, 1.0]), torch.tensor([1.0, torch.nan, 2.0, 1.0]), dense + 0.25, dense[:3]):
        with pytest.raises(ExportError, match="y "):
            require_equal(wrong, dense, "y", 0.0625)
    assert require_equal(torch.zeros(2), torch.zeros(2), "y", 0.1) == 0


def test_gradients_autocast_and_other_weights_are_refused() -> None:
    module = sparse(nn.Linear(16, 12))
    layer = build(module, "csr")
    with pytest.raises(ExportError, match="for inference only"):
        layer(torch.ones(1, 16, requires_grad=True))
    with torch.no_grad():
        layer(torch.ones(1, 16, requires_grad=True))
    with pytest.raises(ExportError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(1, 16))
    with pytest.raises(
        ExportError, match=r"made in torch\.float32 do not run in torch\.bfloat16.*to\(torch\.bfloat16\)\) and make"
    ):
        copy.deepcopy(layer).to(torch.bfloat16)(torch.ones(1, 16, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"size|shape") as told:  # torch's own words for torch's own errors
        layer(torch.ones(2, 15))
    assert type(told.value) is RuntimeError
    with pytest.raises(ExportError, match="other weights have other zeros"):
        layer.load_state_dict(module.state_dict())


class Clock:
    """A clock that ways move by hand; a busy spell makes everything three times slower."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def way(self, seconds: Callable[[int], float]) -> Callable[..., None]:
        def run(*given: object) -> None:
            self.now += seconds(self.calls)
            self.calls += 1

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(speed, "thread_time", lambda: made.now)
    monkeypatch.setattr(speed, "perf_counter", lambda: made.now)
    return made


def test_ways_take_turns(clock: Clock) -> None:
    busy = [1, 1, 1, 1, 1, 3, 3, 3, 3, 1, 1, 1]  # four calls of warm-up, then four rounds of two
    dense = clock.way(lambda call: 6.0 * busy[call])
    other = clock.way(lambda call: 2.0 * busy[call])
    found = measure_speed(dense, other, torch.zeros(1), rounds=4, seconds=1e9)
    assert clock.calls == 12
    assert found.rounds == 4
    assert found.ratio == 3
    assert found.dense_ms == 6000
    assert found.other_ms == 2000


def test_short_ways_are_repeated_and_long_ones_stop(clock: Clock) -> None:
    quick, slow = clock.way(lambda _: 1.0 / 2**16), clock.way(lambda _: 8.0)
    times = race([quick], rounds=3)
    assert times == [[1.0 / 2**16] * 3]
    assert clock.calls == 2 + 3 * 33
    assert [len(seconds) for seconds in race([slow, slow], rounds=50, seconds=70)] == [5, 5]  # 16 s a round
    assert len(race([slow], rounds=50, seconds=1)[0]) == 3


def test_a_speed_is_the_median_of_the_rounds() -> None:
    found = compare([4.0, 4.0, 6.0, 8.0, 100.0], [2.0, 4.0, 2.0, 2.0, 1.0])
    assert (found.ratio, found.low, found.high) == (3, 2, 4)
    assert str(found).startswith("3.00x (2.00-4.00; ")


def test_samples_and_threads() -> None:
    def take(*args: int, **kwargs: int) -> tuple[tuple[int, ...], dict[str, int]]:
        return args, kwargs

    assert run_on(take, (1, 2)) == ((1, 2), {})
    assert run_on(take, {"a": 1}) == ((), {"a": 1})
    seen: list[int] = []

    def look(x: Tensor) -> None:
        assert not torch.is_grad_enabled()
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    measure_speed(look, look, torch.zeros(1), rounds=3, threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"formats": ("dense", "crs")}, "'crs' is unknown.*Did you mean 'csr'"),
        ({"formats": ("bsr:0x4",)}, "'bsr:0x4' is unknown"),
        ({"formats": "csr"}, "is one text"),
        ({"batch_sizes": ()}, "numbers of vectors"),
        ({"batch_sizes": (1, 0)}, "numbers of vectors"),
        ({"batch_sizes": 8}, "batch_sizes=8: give numbers of vectors"),
        ({"batch_sizes": (1, 2.5)}, "numbers of vectors"),
        ({"batch_sizes": "64"}, "numbers of vectors"),
        ({"threads": 0}, "threads=0"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        for_inference(nn.Linear(2, 2), **given)  # type: ignore[arg-type]
    assert for_inference(nn.Linear(2, 2), batch_sizes=np.array([1, 2, 1])).choice.batch_sizes == (1, 2)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="rounds=2"):
        race([lambda: None], rounds=2)
    assert block_of("bsr:16x8") == (16, 8)


def test_torchs_warning_about_sparse_tensors_is_silenced_and_no_other() -> None:
    filters = list(warnings.filters)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # not only at the first of the process
    try:
        with pytest.raises(UserWarning, match="beta"):
            torch.ones(2, 2).to_sparse_csr()
        accept_beta.__wrapped__()
    finally:
        torch.set_warn_always(before)
    assert warnings.filters == filters


def test_what_running_a_layer_changes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sparse(nn.Linear(16, 12))
    multiply = Compact.multiply

    def careless(self: Compact, x: Tensor) -> Tensor:
        y = multiply(self, x)
        assert self.bias is not None
        self.bias[0] += 1  # an alive row: no output shows it
        return y

    monkeypatch.setattr(Compact, "multiply", careless)
    with pytest.raises(ExportError, match="compact does not hold the weights"):
        convert(module, "compact", 1e-4)
