"""One-shot pruning: a block is measured on what the finished model gives it, in bounded memory, and a kill costs one block."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from sparsetrain.calibration import calibrate, first_alone, rest
from sparsetrain.callbacks import PruneFinetune
from sparsetrain.criteria import Criterion, Seen, SparseGPT, StatisticsCriterion, Wanda
from sparsetrain.errors import (
    DataError,
    DivergedError,
    MaskStateError,
    PatternError,
    RecipeError,
    SparsetrainError,
    TargetError,
)
from sparsetrain.masks import MaskManager, Override
from sparsetrain.oneshot import OneShotReport, Streaming, prune_oneshot
from sparsetrain.oneshot.work import Work
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets
from tests.unit.test_calibration import differences, snapshot

from .promises import same_bits

torch.manual_seed(0)
_LLAMA = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
).eval()
_MIXTRAL = MixtralForCausalLM(
    MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
).eval()
BLOCKS = [f"model.layers.{i}" for i in range(3)]


def llama() -> LlamaForCausalLM:
    return copy.deepcopy(_LLAMA)


def windows(count: int = 6, length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(32, (1, length), generator=generator) for _ in range(count)]


def pruned(
    sparsity: float | None = None, pattern: str = "2:4", data: Any = None, **options: Any
) -> tuple[LlamaForCausalLM, MaskManager, OneShotReport]:
    model = llama()
    manager = MaskManager(model, pattern=pattern)
    report = prune_oneshot(manager, windows() if data is None else data, sparsity, **options)
    return model, manager, report


class Remembers(Wanda):
    """Keeps every input of some layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, list[Tensor]] = {}

    def observe(self, seen: Seen) -> None:
        super().observe(seen)
        assert seen.input is not None
        self.inputs.setdefault(seen.tensor.name, []).append(seen.input.clone())


class Kept(Wanda):
    """Keeps the sums that it scores by."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        self.kept[name] = self.memory[name]["squares"][0].clone()
        return super().score(weight, name=name, step=step)


def hooked(model: nn.Module, names: list[str], data: list[Tensor]) -> dict[str, list[Tensor]]:
    """What layers are given in an ordinary forward pass of the whole model."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, name=name: found[name].append(args[0].detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        for tokens in data:
            model(tokens)
    for handle in handles:
        handle.remove()
    return found


# -- what a block is measured on --------------------------------------------------------------------------------------------

#: The first layer of each block: what it is given depends on the blocks before it alone.
FIRST = [f"{block}.self_attn.q_proj.weight" for block in BLOCKS]


@pytest.mark.parametrize("criterion", [Remembers, pytest.param(SparseGPT, id="moved weights")])
def test_every_block_is_measured_on_what_the_pruned_model_gives_it(criterion: Any) -> None:
    seen = Remembers()
    if criterion is SparseGPT:

        class Both(SparseGPT):
            def observe(self, seen_now: Seen) -> None:
                super().observe(seen_now)
                Remembers.observe(seen, seen_now)

        model, _, _ = pruned(criterion=Both(), streaming=Streaming(batch=1))
    else:
        model, _, _ = pruned(criterion=seen, streaming=Streaming(batch=1))
    expected = hooked(model, FIRST, windows())
    for name in FIRST:
        same_bits(dict(enumerate(expected[name])), dict(enumerate(seen.inputs[name])))


def test_dense_inputs_are_those_of_the_dense_model_and_not_of_the_pruned_one() -> None:
    seen = Remembers()
    model, _, _ = pruned(criterion=seen, streaming=Streaming(batch=1, inputs="dense"))
    dense, sparse = hooked(llama(), FIRST, windows()), hooked(model, FIRST, windows())
    for name in FIRST:
        same_bits(dict(enumerate(dense[name])), dict(enumerate(seen.inputs[name])))
    for name in FIRST[1:]:
        assert not torch.allclose(sparse[name][0], seen.inputs[name][0], atol=1e-3)


@pytest.mark.parametrize("kind", [Wanda, SparseGPT])
def test_a_dense_stream_has_the_statistics_of_the_whole_model(kind: type[Wanda]) -> None:
    """The masks of block-by-block pruning on dense inputs are those of calibrating everything at once."""

    class Kept(kind):  # type: ignore[valid-type,misc]
        def finish(self) -> None:
            super().finish()
            self.kept = getattr(self, "kept", {})

        def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
            self.kept[name] = {k: v.clone() for k, v in self.memory[name].items()}
            return super().score(weight, name=name, step=step)

        def solve(self, *args: Any, name: str, **kwargs: Any) -> Any:
            self.kept[name] = {k: v.clone() for k, v in self.memory[name].items()}
            return super().solve(*args, name=name, **kwargs)

    streamed: Any = Kept()
    _, manager, _ = pruned(criterion=streamed, streaming=Streaming(batch=3, inputs="dense"))
    other = llama()
    whole, at_once = kind(batches=6), MaskManager(other, pattern="2:4")
    calibrate(at_once, whole, windows(), lambda batch: other(batch).logits.sum())
    assert streamed.kept.keys() == whole.memory.keys() == {t.name for t in manager}
    for name, memory in whole.memory.items():
        for key, value in memory.items():
            torch.testing.assert_close(streamed.kept[name][key], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


def test_the_output_error_is_that_of_the_block() -> None:
    # one weight of four goes: y = (3 + 1) x becomes 3 x for the first row, nothing changes in the second
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 1.0], [5.0, 5.0]]))
        model[1].weight.copy_(torch.eye(2) * 10)
    manager = MaskManager(model, Targets(head=True), overrides={"1": Override(sparsity=0.0)})
    report = prune_oneshot(manager, [torch.ones(1, 2)], 0.25)
    assert model[0].weight.tolist() == [[3.0, 0.0], [5.0, 5.0]]
    # y_dense = (4, 10), y = (3, 10)
    assert report.rows[0].error == pytest.approx(1 / 116**0.5)
    assert (report.rows[0].asked, report.rows[0].actual, report.rows[0].numel) == (0.25, 0.25, 4)


# -- what it costs ----------------------------------------------------------------------------------------------------------


def test_nothing_is_computed_whose_output_nobody_needs() -> None:
    observed = Counter[str]()

    class Counts(Wanda):
        def observe(self, seen: Seen) -> None:
            super().observe(seen)
            observed[seen.tensor.name.split(".")[-2]] += 1

    model, ran = llama(), Counter[str]()
    for name, module in model.named_modules():
        if name.endswith(("down_proj", "lm_head", "gate_proj")):
            module.register_forward_hook(lambda *_, key=name: ran.update([key]))
    prune_oneshot(MaskManager(model, pattern="2:4"), windows(6), criterion=Counts(), streaming=Streaming(batch=2))
    # 4 batches a block, the first sample by itself: q stands for k and v, gate for up
    assert observed == {"q_proj": 12, "o_proj": 12, "gate_proj": 12, "down_proj": 12}
    # twice one sample, to look at the model; then all four, and again with the pruned block; after the last block only the
    # first, and so with what the last layer makes of its input before pruning
    assert ran == {
        **{f"{block}.mlp.gate_proj": 2 + 4 + 4 for block in BLOCKS[:2]},
        f"{BLOCKS[2]}.mlp.gate_proj": 2 + 4 + 1,
        **{f"{block}.mlp.down_proj": 2 + 1 + 4 for block in BLOCKS[:2]},
        f"{BLOCKS[2]}.mlp.down_proj": 2 + 1 + 1,
        "lm_head": 1,
    }


@pytest.mark.parametrize("how", ["block by block", "at once"])
def test_no_keys_and_values_are_kept_for_nobody(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def caches() -> list[bool]:
        model, found = llama(), []
        for block in model.model.layers:
            block.self_attn.register_forward_pre_hook(
                lambda *call: found.append(call[2].get("past_key_values") is not None), with_kwargs=True
            )
        manager = MaskManager(model, pattern="2:4")
        if how == "at once":
            calibrate(manager, Wanda(batches=6), windows(), lambda batch: model(batch).logits.sum())
        else:
            prune_oneshot(manager, windows())
        assert model.config.use_cache
        return found

    assert not any(caches())
    monkeypatch.delitem(rest._SETTINGS, "use_cache")
    assert all(caches())


class Traces(Wanda):
    """How many inputs of layers are alive whenever another one comes, by block; ``hoard`` keeps them all."""

    def __init__(self, hoard: bool = False) -> None:
        super().__init__()
        self.hoard = hoard
        self.kept: list[Tensor] = []
        self.seen: list[tuple[str, weakref.ref[Any]]] = []
        self.most_memory = 0
        self.foreign: set[str] = set()

    def observe(self, seen: Seen) -> None:
        super().observe(seen)
        assert seen.input is not None
        block = seen.tensor.name[: len(BLOCKS[0])]
        if self.seen and self.seen[-1][0] != block:
            gc.collect()
        self.foreign |= {f"{b} in {block}" for b, ref in self.seen if ref() is not None and b != block}
        # the criterion is given a view; what is alive is its base
        self.seen.append((block, weakref.ref(seen.input.untyped_storage())))
        self.most_memory = max(self.most_memory, len(self.memory))
        self.kept += [seen.input] * self.hoard


def test_one_block_at_a_time_is_in_memory() -> None:
    traces = Traces()
    pruned(criterion=traces, streaming=Streaming(batch=2))
    assert traces.most_memory <= 7  # the statistics of one block
    assert not traces.foreign
    assert traces.memory == {}


def test_one_who_keeps_activations_would_be_caught() -> None:
    traces = Traces(hoard=True)
    pruned(criterion=traces, streaming=Streaming(batch=2))
    assert traces.foreign


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_where_hidden_states_wait_changes_nothing(offload: Any) -> None:
    model, _, _ = pruned(criterion="sparsegpt")
    other, _, _ = pruned(criterion="sparsegpt", streaming=Streaming(offload=offload))
    same_bits(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_blocks_in_bfloat16_give_nearly_the_same_masks_and_weights_in_float32(criterion: str) -> None:
    _, exact, _ = pruned(criterion=criterion)
    other, narrow, report = pruned(criterion=criterion, streaming=Streaming(dtype="bfloat16"))
    assert all(p.dtype == torch.float32 for p in other.parameters())
    same = sum(int((exact.masks[n] == narrow.masks[n]).sum()) for n in exact.masks)
    assert 0.95 < same / sum(m.numel() for m in exact.masks.values()) < 1  # less than all: it did run in bfloat16
    assert report.rows[-1].error == pytest.approx(pruned(criterion=criterion)[2].rows[-1].error, rel=0.2)


def test_the_number_of_samples_in_a_pass_changes_statistics_only_by_rounding() -> None:
    one, few = (pruned(streaming=Streaming(batch=size))[1] for size in (1, 5))
    same = sum(int((one.masks[n] == few.masks[n]).sum()) for n in one.masks)
    assert same >= sum(m.numel() for m in one.masks.values()) - 8


class Sometimes(nn.Module):
    """Two layers that are given the same tensor, but for long inputs, where the second is given another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) + self.b(x if len(x) < 3 else 2 * x)


def test_layers_that_share_their_input_only_sometimes_are_measured_each_for_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Sometimes(), Sometimes())
    data = [torch.randn(2, 4), torch.randn(3, 4)]
    seen = Remembers()
    prune_oneshot(MaskManager(model), data, 0.5, criterion=seen, streaming=Streaming(batch=3))
    assert torch.equal(torch.cat(seen.inputs["0.b.weight"][-3:]), torch.cat([data[0], 2 * data[1]]))


class Chosen(nn.Module):
    """Its second layer is called only for some samples: not for the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.seldom = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.always(x))
        picked = x[:, 0] > 0
        return y + torch.zeros_like(y).index_put((picked,), self.seldom(x[picked])) if bool(picked.any()) else y


class Repeated(nn.Module):
    """Calls its layer as often as the input is long."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        state, states = torch.zeros(len(x), 4), []
        for now in x.unbind(1):
            state = torch.tanh(self.cell(state + now))
            states.append(state)
        return torch.stack(states, 1)


class Overwritten(nn.Module):
    """Its second layer is given the same tensor as the first, written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        return torch.tanh(self.a(x) + self.b(F.relu_(x)))


class Late(nn.Module):
    """Its second layer is given what the first is given, but is not called for the first sample, which goes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def calls(self, x: Tensor) -> bool:
        return len(x) > 1

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return y + self.b(x) if self.calls(x) else y


class Leaves(Late):
    """Its second layer is called for the first sample alone."""

    def calls(self, x: Tensor) -> bool:
        return len(x) == 1


class Unlike(nn.Module):
    """Two layers that are given the same tensor and multiply other dimensions of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x) + self.b(x))


SIGNS = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0]).view(5, 1)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (Chosen, [SIGNS * torch.rand(5, 4, generator=torch.Generator().manual_seed(1))]),
        (Repeated, [torch.randn(2, n, 4, generator=torch.Generator().manual_seed(n)) for n in (2, 5, 3)]),
        (Overwritten, [torch.randn(5, 4, generator=torch.Generator().manual_seed(2))]),
        (Late, [torch.randn(5, 4, generator=torch.Generator().manual_seed(3))]),
        (Leaves, [torch.randn(5, 4, generator=torch.Generator().manual_seed(4))]),
        (Unlike, [torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(5))]),
    ],
)
def test_layers_are_measured_on_all_they_are_given_whatever_the_first_sample_did(kind: Any, data: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(), kind())
    dense, expected = copy.deepcopy(model[0]), dict[str, Tensor]()

    def note(layer: nn.Module, args: Any, name: str) -> None:
        features = args[0].detach().movedim(1, -1) if isinstance(layer, nn.Conv1d) else args[0].detach()
        expected[name] = expected.get(name, torch.zeros(4)) + features.flatten(0, -2).square().sum(0)

    for name, layer in dense.named_children():
        layer.register_forward_pre_hook(lambda layer, args, name=name: note(layer, args, name))
    for batch in first_alone(data):
        dense(batch)
    criterion = Kept()
    prune_oneshot(MaskManager(model), data, 0.5, criterion=criterion, streaming=Streaming(batch=5))
    for name, squares in expected.items():
        torch.testing.assert_close(criterion.kept[f"0.{name}.weight"], squares)


def test_sums_are_wide_in_a_model_that_runs_in_half_precision() -> None:
    class Grams(Kept):
        def observe(self, seen: Seen) -> None:
            assert seen.input is not None
            x = seen.input.float().flatten(0, -2)
            self.add(seen.tensor.name, squares=(x.T @ x).diagonal()[None])

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x, criterion = torch.full((300, 4), 1.0), Grams()
    x[:, 0] = 1.0 + 2**-6  # exact in bfloat16, its square and their sum are not
    with torch.autocast("cpu", torch.bfloat16):
        prune_oneshot(
            MaskManager(model, Targets(include=("0",))), [x], 0.5, criterion=criterion, streaming=Streaming(batch=300)
        )
    assert criterion.kept["0.weight"].tolist() == [300 * (1 + 2**-6) ** 2, 300.0, 300.0, 300.0]


class Held(SparseGPT):
    """How many layers it was shown, and how many bytes it held, when the first score was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = Counter[str]()
        self.held = 0

    def observe(self, seen: Seen) -> None:
        super().observe(seen)
        self.shown[seen.tensor.name] += not self.held

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        if not self.held:
            sums = {m["outer"].data_ptr(): m["outer"].nbytes for m in self.memory.values()}
            self.held = sum(sums.values())
        return super().score(weight, name=name, step=step)


@pytest.mark.parametrize("allocation", ["owl", "global"])
def test_an_allocation_that_needs_all_statistics_holds_those_of_each_input_once(allocation: str) -> None:
    criterion = Held()
    _, manager, _ = pruned(0.6, "unstructured", criterion=criterion, allocation=allocation)
    # q, k and v; o; gate and up: 16 inputs, down: 24; in each of three blocks
    assert criterion.held == 3 * (16**2 + 16**2 + 16**2 + 24**2) * 4
    assert {name.split(".")[-2] for name in criterion.shown} == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    assert set(criterion.shown.values()) == {4}  # batches
    assert manager.verify(strict=True).ok


def test_layers_that_share_their_input_only_sometimes_are_measured_apart_for_an_allocation_too() -> None:
    def masks(model: nn.Module) -> list[Tensor]:
        manager = MaskManager(model)
        prune_oneshot(manager, data, 0.5, criterion="sparsegpt", allocation="global", streaming=Streaming(batch=3))
        return list(manager.masks.values())

    torch.manual_seed(0)
    model = nn.Sequential(Sometimes(), Sometimes())
    data = [torch.randn(2, 4), torch.randn(3, 4)]
    apart = copy.deepcopy(model)
    for block in apart:
        block.b.register_forward_pre_hook(lambda layer, args: args[0].clone(), prepend=True)  # never the same tensor
    for one, other in zip(masks(model), masks(apart), strict=True):
        assert torch.equal(one, other)


# -- patterns, allocations, models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "allocation", "pattern", "sparsity"),
    [
        ("wanda", "uniform", "unstructured:row", 0.75),
        ("ria", "erk", "unstructured", 0.6),
        ("wanda", "global", "unstructured", 0.7),
        ("wanda", "owl", "unstructured:row", 0.75),
        ("sparsegpt", "owl", "unstructured", 0.7),
        ("sparsegpt", "uniform", "4:8", 0.5),
        ("activation", "uniform", "neurons", 0.25),
        ("magnitude", "global", "unstructured", 0.7),
        ("wanda", "uniform", "block:4x4", 0.5),
    ],
)
def test_what_is_asked_is_what_comes_out(criterion: str, allocation: str, pattern: str, sparsity: float | None) -> None:
    _, manager, report = pruned(sparsity, pattern, criterion=criterion, allocation=allocation)
    assert manager.verify(strict=True).ok
    assert all(row.actual == float(manager.counts()[row.name][0]) / row.numel for row in report.rows)
    if pattern == "unstructured" and allocation != "uniform":
        assert sum(dead for dead, _ in manager.counts().values()) == round((sparsity or 0) * 5760)
    assert abs(report.sparsity - (sparsity or 0.5)) < 0.03
    assert report.samples == (0 if criterion == "magnitude" else 6)


def test_what_a_block_gives_is_measured_where_the_block_is_a_layer_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([9.0, 0, 9, 0, 9, 0]) - 5)  # of the six neurons three are on
        model[0].weight.mul_(0.1)
    manager = MaskManager(model, Targets(include=("^0", "^2")), "neurons")
    report = prune_oneshot(manager, [torch.randn(6, 4)], 0.5, criterion="activation")
    assert report.blocks == ["0", "1", "2", "3", "4"]
    assert manager.masks["0.weight"].any(1).tolist() == [True, False] * 3


def test_an_allocation_that_needs_scores_measures_the_dense_model_first() -> None:
    _, manager, _ = pruned(0.7, "unstructured", allocation="global")
    other = llama()
    whole, at_once = Wanda(batches=6), MaskManager(other, pattern="unstructured")
    calibrate(at_once, whole, windows(), lambda batch: other(batch).logits.sum())
    prune(at_once, 0.7, criterion=whole, allocation="global")
    for name, (dead, _) in at_once.counts().items():
        assert abs(manager.counts()[name][0] - dead) <= 1


def test_targets_outside_of_blocks_are_measured_where_they_run() -> None:
    seen, model = Remembers(), llama()
    manager = MaskManager(model, Targets(head=True), "2:4", {"layers.1": Override(sparsity=0.0)})
    report = prune_oneshot(manager, windows(), criterion=seen, streaming=Streaming(batch=1))
    assert manager.verify(strict=True).ok
    assert [row.block for row in report.rows][-1] == "outside 3"
    assert report.rows[-1].error is None
    expected = hooked(model, ["lm_head.weight"], windows())["lm_head.weight"]
    same_bits(dict(enumerate(expected)), dict(enumerate(seen.inputs["lm_head.weight"])))
    assert {row.actual for row in report.rows if "layers.1" in row.name} == {0.0}


def test_everything_else_is_as_it_was() -> None:
    model = llama()
    model.train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    weight = model.model.layers[0].mlp.gate_proj.weight
    weight.grad = torch.ones_like(weight)
    before, cache = snapshot(model), model.config.use_cache
    manager = MaskManager(model, pattern="2:4")
    prune_oneshot(manager, windows())
    found = {d.split(":")[0] + ":" + d.split(":")[1] for d in differences(before, snapshot(model))}
    masked = {t.name for t in manager}
    assert found == {f"state: {name}" for name in masked} | {"grads: model.layers.0.mlp.gate_proj.weight"}
    assert torch.equal(weight.grad, manager.masks["model.layers.0.mlp.gate_proj.weight"].float())
    assert model.config.use_cache == cache


def test_masks_that_are_there_are_kept_and_made_sparser() -> None:
    model = llama()
    manager = MaskManager(model, pattern="unstructured")
    prune(manager, 0.25)
    before = {name: mask.clone() for name, mask in manager.masks.items()}
    prune_oneshot(manager, windows(), 0.5, criterion="sparsegpt")
    assert all(not bool((manager.masks[name] & ~mask).any()) for name, mask in before.items())
    assert manager.verify(strict=True).sparsity == 0.5
    prune_oneshot(manager, windows(), 0.25)  # never less sparse
    assert manager.sparsity() == 0.5


def test_masks_of_experts_are_kept_expert_by_expert() -> None:
    manager = MaskManager(copy.deepcopy(_MIXTRAL), Targets(include=("experts",)), "unstructured")
    prune(manager, 0.25)
    before = {name: mask.clone() for name, mask in manager.masks.items()}
    # 45 % of 256 and of 128 weights an expert is no whole number; of four it is 460.8 and 230.4
    prune_oneshot(manager, windows(), 0.45, criterion="sparsegpt")
    assert all(not bool((manager.masks[name] & ~mask).any()) for name, mask in before.items())
    for name, mask in manager.masks.items():
        lost = [int((~part).sum()) for part in mask]
        assert sum(lost) == (460 if "gate_up" in name else 230)
        assert max(lost) - min(lost) <= 1


# -- mixture of experts -----------------------------------------------------------------------------------------------------


def expert_inputs(model: nn.Module, data: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], Tensor]:
    """Sums of squares of what every slice of a fused weight is multiplied by: seen at `F.linear` itself."""
    found: dict[tuple[int, int], Tensor] = {}
    plain = F.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        key = (weight.untyped_storage().data_ptr(), weight.storage_offset())
        found[key] = found.get(key, torch.zeros(x.shape[-1])) + x.reshape(-1, x.shape[-1]).square().sum(0)
        return plain(x, weight, bias)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", watched)
        model.config._experts_implementation = "eager"
        for tokens in data:
            model(tokens)
    return found


def test_experts_are_measured_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(_MIXTRAL)
    manager, criterion = MaskManager(model, Targets(include=("experts",)), "2:4"), Wanda(batches=6)
    calibrate(manager, criterion, windows(), lambda batch: model(batch).logits.sum())
    found = expert_inputs(model, windows(), monkeypatch)
    for layer in model.model.layers:
        for which in ("gate_up_proj", "down_proj"):
            fused = getattr(layer.mlp.experts, which)
            name = next(n for n, p in model.named_parameters() if p is fused)
            for index in range(4):
                expected = found[fused.untyped_storage().data_ptr(), fused[index].storage_offset()]
                torch.testing.assert_close(criterion.memory[f"{name}[{index}]"]["squares"][0], expected)


def with_idle_experts() -> MixtralForCausalLM:
    """In the first layer expert 3 always comes last of four, and two are taken."""
    model = copy.deepcopy(_MIXTRAL)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[3] = 0
        model.model.layers[0].mlp.gate.weight[:3, 0] = 5
        model.model.embed_tokens.weight[:, 0] = 3
    return model


@pytest.mark.parametrize(("criterion", "pattern"), [("wanda", "2:4"), ("sparsegpt", "2:4"), ("sparsegpt", "unstructured")])
def test_experts_that_no_token_reached_are_told_and_pruned_by_magnitude(criterion: str, pattern: str) -> None:
    model = with_idle_experts()
    before = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    manager = MaskManager(model, pattern=pattern)
    report = prune_oneshot(manager, windows(), 0.5, criterion=criterion)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert f"{name}[3]" in report.unseen
    unseen = sum(text.startswith(name) for text in report.unseen)
    assert unseen in (1, 2)  # each token goes to two of the other three
    assert next(row.note for row in report.rows if row.name == name) == f"{unseen} of 4 experts saw no data"
    assert manager.verify(strict=True).ok
    lone = nn.Linear(16, 16, bias=False)
    lone.weight = nn.Parameter(before[3])
    by_size = MaskManager(lone, pattern=pattern)
    prune(by_size, 0.5)
    assert torch.equal(manager.masks[name][3], by_size.masks["weight"])
    torch.testing.assert_close(model.get_parameter(name)[3], lone.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4"])
def test_experts_that_no_token_reached_are_not_the_first_to_go(pattern: str) -> None:
    """Compared with the others they count as an average one; all are equally large."""
    model = with_idle_experts()
    manager = MaskManager(model, pattern=pattern)
    report = prune_oneshot(manager, windows(), 0.5)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    lost = [float((~part).float().mean()) for part in manager.masks[name]]
    idle = [lost[i] for i in range(4) if f"{name}[{i}]" in report.unseen]
    assert 0 < len(idle) < 4
    assert all(0.1 < share < 0.6 for share in idle)


def test_a_solver_prunes_as_many_blocks_of_each_expert_and_refuses_units_that_reach_over_several() -> None:
    model = copy.deepcopy(_MIXTRAL)
    manager = MaskManager(model, pattern="block:4x4")
    prune_oneshot(manager, windows(), 0.45, criterion="sparsegpt")
    assert manager.verify(strict=True).ok
    mask = manager.masks["model.layers.0.mlp.experts.gate_up_proj"]  # 4 experts of 16 blocks: 28 of 64 go
    assert [int((~part).sum()) // 16 for part in mask] == [7, 7, 7, 7]
    for pattern in ("channels", "block:3x4"):
        model = copy.deepcopy(_MIXTRAL)
        manager = MaskManager(model, pattern=pattern)
        with pytest.raises(RecipeError, match=rf"experts\.gate_up_proj: SparseGPT prunes its 4 experts one by one.*{pattern}"):
            prune_oneshot(manager, windows(), 0.45, criterion="sparsegpt")
        same_bits(_MIXTRAL.state_dict(), model.state_dict())
        assert not manager.masks


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_fused_experts_may_be_pruned_by_a_method_that_measures_the_whole_model(criterion: str) -> None:
    model = copy.deepcopy(_MIXTRAL)
    method = PruneFinetune(pattern="2:4", criterion=criterion)
    manager = method.use(model)  # validates
    assert isinstance(method.criterion, StatisticsCriterion)
    calibrate(manager, method.criterion, windows(), lambda batch: model(batch).logits.sum())
    prune(manager, criterion=method.criterion)
    assert manager.verify(strict=True).sparsity == 0.5


def test_fused_experts_keep_their_zeros_and_are_saved_and_adopted() -> None:
    model = copy.deepcopy(_MIXTRAL)
    manager = MaskManager(model, pattern="2:4")
    prune_oneshot(manager, windows())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    manager.attach(optimizer)
    tokens = windows(1)[0]
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert manager.verify(strict=True).ok
    again = MaskManager.adopt(copy.deepcopy(model), "2:4")
    other = MaskManager(copy.deepcopy(_MIXTRAL), pattern="2:4")
    other.load_state_dict(manager.state_dict())
    for name, mask in manager.masks.items():
        assert torch.equal(again.masks[name], mask)
        assert torch.equal(other.masks[name], mask)


# -- going on after a kill --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def dies_at(monkeypatch: pytest.MonkeyPatch, count: int, where: str) -> None:
    """The process dies at the count-th block: before anything of it is written, in the middle of writing, or right after."""
    calls, plain, write = [0], Work.finish_segment, Work._write

    def finish(self: Work, *args: Any) -> None:
        calls[0] += 1
        if calls[0] == count and where == "before":
            raise Killed
        plain(self, *args)
        if calls[0] == count and where == "after":
            raise Killed

    def writing(self: Work, name: str, call: Callable[[Path], Any]) -> None:
        if calls[0] == count and where == "while" and name.startswith("hidden"):
            assert self.folder is not None
            (self.folder / f"{name}.part").write_bytes(b"half")
            raise Killed
        write(self, name, call)

    monkeypatch.setattr(Work, "finish_segment", finish)
    monkeypatch.setattr(Work, "_write", writing)


def killed(folder: Path, count: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        dies_at(patch, count, "after")
        with pytest.raises(Killed):
            pruned(work=folder)


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
@pytest.mark.parametrize("where", ["before", "while", "after"])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_kill_at_any_block_changes_nothing(block: int, where: str, inputs: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"criterion": "sparsegpt", "streaming": Streaming(inputs=inputs)}
    if block == 2:
        options |= {"criterion": "wanda", "pattern": "unstructured:row", "sparsity": 0.7, "allocation": "owl"}
    whole, expected, report = pruned(**options)
    with pytest.MonkeyPatch.context() as patch:
        dies_at(patch, block, where)
        if not (block == 3 and where == "while"):  # nothing is kept of hidden states after the last block
            with pytest.raises(Killed):
                pruned(work=tmp_path, **options)
    resumed, manager, again = pruned(work=tmp_path, **options)
    same_bits(whole.state_dict(), resumed.state_dict())
    same_bits(expected.masks, manager.masks)
    assert manager.changes == expected.changes
    assert [(r.name, r.actual, r.error) for r in again.rows] == [(r.name, r.actual, r.error) for r in report.rows]
    assert manager.verify(strict=True).ok


def test_a_resumed_run_does_not_do_the_work_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path, 2)
    seen = Remembers()
    seen_now = Wanda.observe
    monkeypatch.setattr(Wanda, "observe", lambda self, s: (seen.inputs.setdefault(s.tensor.name, []), seen_now(self, s))[1])
    pruned(work=tmp_path)
    assert {name[: len(BLOCKS[0])] for name in seen.inputs} == {BLOCKS[2]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": windows(5)}, "another data"),
        ({"streaming": Streaming(batch=3)}, "another batch"),
        ({"criterion": Wanda(batches=3)}, "another criterion"),
        ({"pattern": "4:8"}, "another targets"),
        ({"streaming": Streaming(inputs="dense")}, "another inputs"),
        ({"streaming": Streaming(dtype="bfloat16")}, "another dtype"),
        ({"sparsity": 0.5}, "another sparsity"),
    ],
)
def test_a_folder_of_another_run_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    killed(tmp_path, 1)
    with pytest.raises(RecipeError, match=rf"holds a run with {says}.*another folder"):
        pruned(work=tmp_path, **change)
    _, manager, _ = pruned()
    with pytest.raises(RecipeError, match="another weights"):
        prune_oneshot(manager, windows(), work=tmp_path)


def test_another_allocation_or_other_masks_are_another_run(tmp_path: Path) -> None:
    pruned(0.6, "unstructured", work=tmp_path)
    with pytest.raises(RecipeError, match="another allocation"):
        pruned(0.6, "unstructured", work=tmp_path, allocation="erk")
    manager = MaskManager(llama(), pattern="unstructured")
    first = next(iter(manager))
    with torch.no_grad():  # masks of the same zeros, but for a weight that was zero before
        first.target.parameter[0, 0] = 0
    prune_oneshot(manager, windows(), 0.6, work=tmp_path / "other")
    again = MaskManager(llama(), pattern="unstructured")
    with torch.no_grad():
        next(iter(again)).target.parameter[0, 0] = 0
    mask = torch.ones(first.target.shape, dtype=torch.bool)
    mask[0, 0] = False
    again.install(first.name, mask, Fraction(1, mask.numel()))
    with pytest.raises(RecipeError, match="another masks"):
        prune_oneshot(again, windows(), 0.6, work=tmp_path / "other")


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    killed(tmp_path, 1)
    for name in ("hidden-1.safetensors", "segment-0.safetensors", "progress.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:9])
        with pytest.raises(MaskStateError, match=r"cannot be read.*start anew"):
            pruned(work=tmp_path)
        (tmp_path / name).write_bytes(content)
    pruned(work=tmp_path)


# -- what cannot work -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"criterion": "taylor"}, RecipeError, r"Taylor needs gradients.*'wanda'.*calibrate"),
        ({"criterion": "movement"}, RecipeError, r"Movement watches training.*PruneFinetune"),
        ({"data": []}, DataError, r"Wanda needs data.*gives no batches"),
        ({"sparsity": 0.6}, PatternError, r"0\.6 was asked"),
        ({"allocation": "owl"}, RecipeError, "2:4"),
        ({"pattern": "neurons", "sparsity": 0.5, "criterion": "sparsegpt"}, RecipeError, "neurons"),
        ({"pattern": "unstructured"}, PatternError, "how sparse"),
        ({"pattern": "unstructured", "sparsity": 0.0}, RecipeError, "sparsity 0: nothing would be pruned"),
        ({"data": torch.zeros(6, 12).long()}, DataError, r"is given one Tensor and not several batches.*\[batch\]"),
        ({"data": {"input_ids": torch.zeros(6, 12).long()}}, DataError, r"is given one dict"),
        ({"work": __file__}, RecipeError, r"work='.*test_oneshot\.py' cannot be a folder"),
    ],
)
def test_refused_before_anything_is_changed(options: dict[str, Any], error: type[SparsetrainError], says: str) -> None:
    model = llama()
    manager = MaskManager(model, pattern=options.pop("pattern", "2:4"))
    data, sparsity = options.pop("data", windows()), options.pop("sparsity", None)
    with pytest.raises(error, match=says):
        prune_oneshot(manager, data, sparsity, **options)
    same_bits(_LLAMA.state_dict(), model.state_dict())
    assert not manager.masks


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"batch": 2.5}, {"inputs": "both"}, {"dtype": "bf16"}, {"offload": "gpu"}])
def test_settings_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        Streaming(**wrong)


def test_no_data_at_all() -> None:
    with pytest.raises(DataError, match="give batches"):
        prune_oneshot(MaskManager(llama(), pattern="2:4"))


def test_weights_that_are_not_finite_and_zeros_that_are_no_masks() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"):
        prune_oneshot(MaskManager(model, pattern="2:4"), windows())
    model = llama()
    prune(MaskManager(model, pattern="unstructured"), 0.03)
    with pytest.raises(PatternError, match=r"3% zero already"):
        prune_oneshot(MaskManager(model, pattern="2:4"), windows())
    prune(MaskManager(model, pattern="unstructured"), 0.5)
    with pytest.raises(PatternError, match=r"50% zero already.*MaskManager\.adopt.*from the dense weights"):
        prune_oneshot(MaskManager(model, pattern="2:4"), windows())
    adopted = MaskManager.adopt(model, "unstructured")
    prune_oneshot(adopted, windows(), 0.6)
    assert adopted.verify(strict=True).ok


def test_activations_that_are_not_finite_say_where_and_what_is_done(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
    manager = MaskManager(model, pattern="2:4")
    with pytest.raises(
        DivergedError,
        match=r"the input of model\.layers\.1\.mlp\.down_proj\.weight is not finite in model\.layers\.1, batch 0.*"
        r"Pruned already: model\.layers\.0; start again from dense weights",
    ):
        prune_oneshot(manager, windows(), work=tmp_path)
    assert {name[: len(BLOCKS[0])] for name in manager.masks} == {BLOCKS[0]}
    assert model.config.use_cache
    assert not any("forward" in vars(module) for module in model.modules())


class Idle(nn.Module):
    """Its second layer is used by nobody, or is given zeros."""

    def __init__(self, given: float | None) -> None:
        super().__init__()
        self.used, self.other, self.given = nn.Linear(4, 4), nn.Linear(4, 4), given

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y if self.given is None else y + self.other(self.given * x)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (None, TargetError, r"0\.other\.weight: no batch used its layer"),
        (0.0, DataError, r"inputs of 0\.other\.weight are zero"),
    ],
)
def test_layers_that_see_nothing(given: float | None, error: type[SparsetrainError], says: str) -> None:
    model = nn.Sequential(Idle(given), Idle(given))
    manager = MaskManager(model, pattern="2:4")
    with pytest.raises(error, match=says):
        prune_oneshot(manager, [torch.randn(2, 4)])
    assert not manager.masks
    prune_oneshot(manager, criterion="magnitude")
    assert manager.verify(strict=True).ok


def test_what_stays_dense_by_an_override_is_not_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Idle(None), Idle(None))
    seen, manager = Remembers(), MaskManager(model, Targets(head=True), "2:4", {"other|1.used": Override(sparsity=0.0)})
    report = prune_oneshot(manager, [torch.randn(2, 4)], criterion=seen)
    assert seen.inputs.keys() == {"0.used.weight"}
    assert {row.name: row.actual for row in report.rows} == {
        "0.used.weight": 0.5,
        **dict.fromkeys(("0.other.weight", "1.used.weight", "1.other.weight"), 0.0),
    }


class Bare(nn.Module):
    """Multiplies by a weight that no layer holds, as XLNet and the experts of Llama 4 do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
def test_weights_that_no_layer_holds_are_told(criterion: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Bare(), nn.LayerNorm(4), nn.Linear(4, 4), *(Bare() for _ in range(3)))
    report = prune_oneshot(
        MaskManager(model, Targets(exclude=("0",), head=True), "2:4"), [torch.randn(6, 4)], criterion=criterion
    )
    assert list(report.dense) == ["1.weight", "4.weight", "5.weight", "6.weight"]  # what was asked to stay dense is not told
    assert "left dense: 1.weight, 4.weight, 5.weight and 1 more (no supported layer)" in str(report)
    assert "left dense" not in str(
        prune_oneshot(MaskManager(nn.Sequential(nn.Linear(4, 4))), None, 0.25, criterion="magnitude")
    )


def test_attention_in_one_piece_is_refused_by_name() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    with pytest.raises(RecipeError, match=r"self_attn\.in_proj_weight.*MultiheadAttention does not show.*exclude"):
        prune_oneshot(MaskManager(model, pattern="2:4"), [torch.randn(2, 3, 8)])
    for manager in (
        MaskManager(model, pattern="2:4", overrides={"self_attn": Override(sparsity=0.0)}),
        MaskManager(copy.deepcopy(model), Targets(exclude=("self_attn",)), "2:4"),
    ):
        assert prune_oneshot(manager, [torch.randn(2, 3, 8)]).blocks == ["layers.0", "layers.1"]


def test_the_report_reads_and_is_written(tmp_path: Path) -> None:
    _, _, report = pruned(progress=True)
    text = str(report)
    assert "sparsity 0.5000 over 21 tensors, 6 samples" in text
    assert report.blocks == BLOCKS
    report.to_json(tmp_path / "report.json")
    assert '"samples": 6' in (tmp_path / "report.json").read_text()


def test_what_had_to_be_done_to_a_matrix_is_in_the_report() -> None:
    with pytest.warns(UserWarning, match="damp 1e-10 raised to"):
        _, _, report = pruned(criterion=SparseGPT(damp=1e-10), data=windows(1, 4))  # 4 tokens, 16 inputs
    assert all(row.note.startswith("damp 1e-10 raised to") for row in report.rows)
    assert not any(row.note for row in pruned(criterion="sparsegpt")[2].rows)


def test_any_criterion_of_ones_own() -> None:
    class Sign(Criterion):
        def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
            return weight

    model, manager, report = pruned(0.5, "unstructured", criterion=Sign())
    assert manager.verify(strict=True).ok
    assert report.blocks == []
    assert float(model.model.layers[0].mlp.up_proj.weight.detach().min()) >= -0.05
