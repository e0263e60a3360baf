"""Blocks are proposed by structure and decided by behaviour: what chains is streamed, what does not is taken as a whole."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from sparsetrain.calibration import segments
from sparsetrain.calibration.driver import Driver
from sparsetrain.masks import MaskManager
from sparsetrain.targets import Targets


class Layer(nn.Module):
    """x + tanh(fc x), optionally with a bias that is made by whoever has none yet and handed on."""

    def __init__(self, width: int = 4, tuples: bool = False, in_place: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.tuples, self.in_place = tuples, in_place

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Any:
        if self.tuples:
            bias = self.fc.bias * 2 if bias is None else bias
        out = torch.tanh(self.fc(x) + (0 if bias is None else bias))
        out = x.add_(out) if self.in_place else x + out
        return (out, bias) if self.tuples else out


class Model(nn.Module):
    """Layers driven in different ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList([Layer(tuples=kind == "bias", in_place=kind == "in place") for _ in range(3)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        first, bias = x, None
        for index, layer in enumerate(self.layers):
            if self.kind in ("plain", "in place", "to the head"):
                x = layer(x)
            elif self.kind == "by index":
                x = layer(x, bias=torch.full((4,), float(index)))
            elif self.kind == "bias":
                x, bias = layer(x, bias)
            elif self.kind == "norm between":
                x = self.norm(layer(x))
            elif self.kind == "skip":
                x = layer(x) + first
            elif self.kind == "history":
                x = layer(x + 0.1 * first)
                first = first + x
            elif self.kind == "backwards":
                x = self.layers[2 - index](x)
            elif self.kind == "parallel":
                first = first + layer(x)
                x = first if index == 2 else x
            elif self.kind == "twice":
                x = layer(layer(x))
            first = x if self.kind == "to the head" and index == 0 else first
        x = x + first if self.kind == "to the head" else x
        result: Tensor = self.head(x)
        return result


def found(model: nn.Module, x: Any, run: Callable[[Any], Any] | None = None, **targets: Any) -> tuple[list[str], list[Any]]:
    manager = MaskManager(model, Targets(head=True, **targets))
    with torch.no_grad():
        blocks, parts = segments(model, run or model, x, {t.name: t.target.module for t in manager})
    assert sorted(name for s in parts for name in s.targets) == sorted(t.name for t in manager)
    assert not any("forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    return [b.name for b in blocks], [(s.name, list(s.targets)) for s in parts if s.targets]


LAYERS = [f"layers.{i}" for i in range(3)]


@pytest.mark.parametrize("kind", ["plain", "by index", "bias", "norm between", "in place"])
def test_what_the_driver_does_around_blocks_is_its_own_affair(kind: str) -> None:
    blocks, parts = found(Model(kind), torch.randn(1, 5, 4))
    assert blocks == LAYERS
    assert parts == [
        ("outside 0", ["embed.weight"]),
        *[(name, [f"{name}.fc.weight"]) for name in LAYERS],
        ("outside 3", ["head.weight"]),
    ]


@pytest.mark.parametrize("kind", ["history", "backwards", "parallel", "twice", "to the head"])
def test_what_does_not_chain_is_taken_as_a_whole(kind: str) -> None:
    blocks, parts = found(Model(kind), torch.randn(1, 5, 4))
    assert blocks == []
    assert [name for name, _ in parts] == ["the model"]


def test_a_value_from_before_the_blocks_is_made_anew_and_chains() -> None:
    assert found(Model("skip"), torch.randn(1, 5, 4))[0] == LAYERS


def test_without_the_check_of_behaviour_a_wrong_stack_would_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.calibration.stacks._not_chained", lambda *args: None)
    assert found(Model("history"), torch.randn(1, 5, 4))[0] == LAYERS


class Talks(nn.Module):
    """Blocks that read what the one before left in an object."""

    class Block(Layer):
        def forward(self, x: Tensor, notes: Any) -> Tensor:  # type: ignore[override]
            notes.value = super().forward(x) + getattr(notes, "value", 0.0)
            result: Tensor = notes.value
            return result

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Talks.Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        notes = SimpleNamespace()
        for layer in self.layers:
            x = layer(x, notes)
        return x


def test_blocks_that_talk_through_an_object_are_no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(Talks(), torch.randn(1, 4))[0] == []
    monkeypatch.setattr("sparsetrain.calibration.stacks._near", lambda one, other: True)
    assert found(Talks(), torch.randn(1, 4))[0] == LAYERS  # by what they are given alone they would be one


def test_a_sequential_model_and_what_it_repeats() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 6), act, nn.Linear(6, 3))
    assert found(model, torch.randn(1, 4))[0] == ["0", "2", "4"]
    twice = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(4, 6), twice, nn.ReLU(), twice, nn.Linear(6, 3))
    assert found(model, torch.randn(1, 4)) == ([], [("the model", ["0.weight", "1.weight", "4.weight"])])
    separate = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    assert found(separate, torch.randn(1, 4))[0] == ["0", "1", "2", "3", "4"]


def test_stages_of_a_convolutional_network_follow_each_other() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU())
            self.classifier = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

        def forward(self, x: Tensor) -> Any:
            return self.classifier(self.features(x).mean((2, 3)))

    blocks, parts = found(Net(), torch.randn(1, 1, 8, 8))
    assert blocks == [f"features.{i}" for i in range(4)] + [f"classifier.{i}" for i in range(3)]
    assert [name for name, _ in parts] == ["features.0", "features.2", "classifier.0", "classifier.2"]


def test_blocks_inside_a_wrapper_are_found_and_lists_inside_blocks_are_not() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            return x + sum((expert(x) for expert in self.experts), torch.zeros(()))

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Experts(), Experts()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    blocks, parts = found(nn.Sequential(Inner(), nn.Linear(4, 2)), torch.randn(1, 4))
    assert blocks == ["0.blocks.0", "0.blocks.1"]
    assert [len(names) for _, names in parts] == [3, 3, 1]


def test_two_lists_that_take_turns() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.ModuleList([Layer() for _ in range(2)])
            self.mlp = nn.ModuleList([Layer() for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for mix, mlp in zip(self.mix, self.mlp, strict=True):
                x = mlp(mix(x))
            return x

    assert found(Turns(), torch.randn(1, 4))[0] == ["mix.0", "mlp.0", "mix.1", "mlp.1"]


def test_an_encoder_and_a_decoder_in_order() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    tokens = torch.randint(16, (1, 6))
    blocks, parts = found(model, tokens, lambda x: model(input_ids=x, decoder_input_ids=x))
    assert blocks == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert [len(names) for _, names in parts] == [6, 6, 10, 10, 1]
    assert parts[-1] == ("outside 4", ["shared.weight"])  # tied to the head


def test_a_layer_that_two_blocks_share_makes_the_model_one() -> None:
    model = Model("plain")
    model.layers[2].fc = model.layers[0].fc
    blocks, parts = found(model, torch.randn(1, 4))
    assert blocks == []
    assert len(parts[0][1]) == 4


def test_a_forward_that_somebody_replaced_comes_back() -> None:
    model = Model("plain")
    mine = model.layers[1].forward
    model.layers[1].forward = mine
    x = torch.randn(1, 4)
    assert [b.name for b in segments(model, model, x, {"fc": model.layers[0].fc, "f": model.layers[1].fc})[0]] == LAYERS
    assert vars(model.layers[1])["forward"] is mine


def test_the_model_stops_where_it_is_told() -> None:
    model = Model("plain")
    blocks, _ = segments(model, model, torch.randn(1, 4), {f"{i}": layer.fc for i, layer in enumerate(model.layers)})  # type: ignore[misc]
    driver, seen = Driver(model, model, blocks), []
    model.head.register_forward_pre_hook(lambda *_: seen.append("head"))
    kept = torch.full((1, 4), 7.0)
    given = driver.reach(torch.randn(1, 4), 2, lambda stack: kept, lambda forward, args, kwargs: args[0])
    assert torch.equal(given, kept)
    assert seen == []
    driver.reach(torch.randn(1, 4), 3, lambda stack: kept, None)
    assert seen == ["head"]
