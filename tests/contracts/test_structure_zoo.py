"""Many architectures: their units are found, masked, taken out, and the compact model computes what the masked one did.

Another opinion, torch-pruning's dependency graph, names the same tensors and dimensions for the architectures that it knows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
import transformers
from torch import Tensor, nn

from sparsetrain.calibration.data import runner
from sparsetrain.structure import (
    Compacted,
    CoupledGroup,
    Structure,
    compact,
    coupled_manager,
    dead_units,
    find_structure,
    prune_units,
    remaining,
)
from sparsetrain.structure.recording import outputs_of
from sparsetrain.tasks import SmallResNet

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WORDS = {"input_ids": torch.tensor([[7, 19, 3, 42, 8]])}
PICTURE = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
IMAGE = PICTURE["pixel_values"]


def stock(config: str, task: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = getattr(transformers, f"{config}Config")(**sizes)
        built: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(settings)
        return built

    return build


def causal(config: str, **sizes: Any) -> Callable[[], nn.Module]:
    return stock(config, "CausalLM", **(SIZES | SPECIAL | sizes))


def vgg() -> nn.Module:
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 5)),
    )
    return net


class Inverted(nn.Module):
    """MobileNet's block: widen, filter each channel by itself, squeeze and excite, narrow."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.widen, self.n1 = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.each, self.n2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.s, self.e = nn.Conv2d(wide, 3, 1), nn.Conv2d(3, wide, 1)
        self.narrow, self.n3 = nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.n2(self.each(F.hardswish(self.n1(self.widen(x))))))
        y = y * F.hardsigmoid(self.e(F.relu(self.s(F.adaptive_avg_pool2d(y, 1)))))
        result: Tensor = x + self.n3(self.narrow(y))
        return result


def mobile() -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), Inverted(8, 12), Inverted(8, 12), *head)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up, self.o = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.leaky_relu(self.i(x))
        result: Tensor = self.o(torch.cat([first, F.gelu(self.up(F.relu(self.down(first))))], 1))
        return result


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4 + 3 * i) for i in range(3)])
        self.layers = nn.ModuleList([nn.Conv2d(4 + 3 * i, 3, 3, padding=1) for i in range(3)])
        self.head = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(torch.relu(norm(x)))], 1)
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def resnext() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=4), nn.BatchNorm2d(12), nn.PReLU(12)),
        *(nn.Conv2d(12, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1)),
    )


def sound() -> nn.Module:
    ends = (nn.AdaptiveMaxPool1d(2), nn.Flatten(), nn.Linear(10, 3))
    return nn.Sequential(nn.Conv1d(2, 6, 5), nn.SiLU(), nn.Conv1d(6, 5, 3), nn.BatchNorm1d(5, affine=False), *ends)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(60, 6), nn.LSTM(6, 5, batch_first=True)
        self.a, self.o = nn.Linear(5, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.o(torch.relu(self.a(self.lstm(self.words(x))[0][:, -1])))
        return result


#: Name -> model, sample, and the groups whose units must be found to go: kind -> how many units each has, in order.
ZOO: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, list[int]]]] = {
    "vgg": (vgg, IMAGE, {"filter": [6, 8], "neuron": [12], "input": [3]}),
    "resnet": (lambda: SmallResNet(depth=8), IMAGE, {"filter": [16, 32, 64], "residual": [16]}),
    "mobilenet": (mobile, IMAGE, {"residual": [8], "filter": [12, 3, 12, 3]}),
    "resnext": (resnext, IMAGE, {"filter": [4, 4]}),
    "unet": (UNet, IMAGE, {"filter": [6, 8, 6]}),
    "densenet": (DenseNet, IMAGE, {"filter": [4, 3, 3, 3]}),
    "sound": (sound, torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(0)), {"filter": [6, 5], "input": [2]}),
    "lstm": (Recurrent, WORDS["input_ids"], {"neuron": [9]}),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(16, 4, 20, batch_first=True),
        torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0)),
        {"neuron": [20]},
    ),
    "llama": (causal("Llama", num_key_value_heads=2, tie_word_embeddings=True), WORDS, {"head": [2, 2], "neuron": [20, 20]}),
    "qwen2": (causal("Qwen2", num_key_value_heads=2), WORDS, {"head": [2, 2], "neuron": [20, 20]}),
    "qwen3": (causal("Qwen3", num_key_value_heads=2, head_dim=6), WORDS, {"head": [2, 2], "neuron": [20, 20]}),
    "mistral": (causal("Mistral", num_key_value_heads=2), WORDS, {"head": [2, 2], "neuron": [20, 20]}),
    "mixtral": (causal("Mixtral", num_key_value_heads=2, num_local_experts=3), WORDS, {"head": [2, 2], "neuron": []}),
    "gemma": (causal("Gemma", num_key_value_heads=2, head_dim=4), WORDS, {"head": [2, 2], "neuron": [20, 20]}),
    "phi": (causal("Phi"), WORDS, {"head": [4, 4], "neuron": [20, 20]}),
    "phi3": (causal("Phi3", num_key_value_heads=2), WORDS, {"head": [], "neuron": [20, 20]}),
    "gpt-neox": (causal("GPTNeoX"), WORDS, {"head": [4, 4], "neuron": [20, 20]}),
    "gpt2": (causal("GPT2", n_embd=16, n_head=4, n_layer=2, n_inner=20), WORDS, {"head": [4, 4], "neuron": [20, 20]}),
    "opt": (
        causal("OPT", ffn_dim=20, word_embed_proj_dim=16, max_position_embeddings=16),
        WORDS,
        {"head": [4, 4], "neuron": [20, 20]},
    ),
    "bloom": (causal("Bloom", n_layer=2, n_head=4), WORDS, {"head": [], "neuron": [64, 64]}),
    "falcon": (
        causal("Falcon", num_kv_heads=2, new_decoder_architecture=True),
        WORDS,
        {"head": [2, 2], "neuron": [64, 64]},
    ),
    "mamba": (causal("Mamba", state_size=3), WORDS, {"head": [], "neuron": []}),
    "bert": (stock("Bert", "SequenceClassification", **SIZES), WORDS, {"head": [4, 4], "neuron": [20, 20, 16]}),
    "roberta": (stock("Roberta", "SequenceClassification", **SIZES), WORDS, {"head": [4, 4], "neuron": [20, 20, 16]}),
    "distilbert": (
        stock("DistilBert", "SequenceClassification", vocab_size=60, dim=16, hidden_dim=20, n_layers=2, n_heads=4),
        WORDS,
        {"head": [4, 4], "neuron": [20, 20, 16]},
    ),
    "t5": (
        stock("T5", "Seq2SeqLM", vocab_size=60, d_model=16, d_kv=4, d_ff=20, num_layers=2, num_heads=4),
        {**WORDS, "decoder_input_ids": torch.tensor([[0, 9, 4, 5]])},
        {"head": [4, 4], "neuron": [20, 20, 20, 20]},
    ),
    "vit": (
        stock("ViT", "ImageClassification", **SIZES, image_size=16, patch_size=8),
        PICTURE,
        {"head": [4, 4], "neuron": [20, 20], "input": [3]},
    ),
    "dinov2": (
        stock("Dinov2", "ImageClassification", **SIZES, mlp_ratio=2, image_size=16, patch_size=8, layerscale_value=1e-5),
        PICTURE,
        {"head": [4, 4], "neuron": [32, 32]},
    ),
    "convnext": (
        stock("ConvNext", "ImageClassification", hidden_sizes=[4, 6, 6, 6], depths=[1, 1, 1, 1], image_size=32),
        {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
        {"neuron": [16, 24, 24, 24]},
    ),
    "whisper": (
        stock(
            *("Whisper", "AudioClassification"),
            **{"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 20, "num_mel_bins": 4},
            **{"max_source_positions": 5, "classifier_proj_size": 7},
        ),
        {"input_features": torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(0))},
        {"filter": [16], "head": [4, 4], "neuron": [20, 20, 7], "input": [4]},
    ),
}


def every_other(group: CoupledGroup) -> Tensor:
    return torch.arange(group.units) % 2 == 1


@pytest.mark.parametrize("name", ZOO)
def test_masked_and_compact_models_agree(name: str) -> None:
    torch.manual_seed(1)
    build, sample, expected = ZOO[name]
    net = build().eval()
    structure = find_structure(net, sample)
    for kind, units in expected.items():
        assert [group.units for group in structure.of_kind(kind)] == units  # type: ignore[arg-type]
    groups = [group for group in structure if not group.fixed]
    if not groups:
        return
    manager = coupled_manager(net, groups)
    dead = {group.name: every_other(group) for group in groups}
    assert prune_units(manager, dead) > 0
    assert manager.verify().ok
    assert all(torch.equal(dead_units(manager, group), dead[group.name]) for group in groups)
    masked = copy.deepcopy(net)
    found = compact(net, structure, dead, sample)
    with torch.no_grad():
        pairs = list(zip(outputs_of(runner(masked)(sample)), outputs_of(runner(net)(sample)), strict=True))
    assert max(float((a - b).abs().max()) for a, b in pairs) <= 1e-5 * max(1.0, found.scale)
    assert found.scale > 0
    gone = sum(int((tensor.mask == 0).sum()) for tensor in manager if tensor.mask is not None)
    assert found.before - found.after == gone  # nothing stays of what was masked, and nothing else went


@pytest.mark.parametrize("name", ["llama", "mobilenet", "dinov2"])
def test_structure_found_after_pruning_is_the_same(name: str) -> None:
    """The structure does not depend on weights: a model pruned by somebody else, whatever is zero, has the same."""
    torch.manual_seed(1)
    build, sample, _ = ZOO[name]
    net = build().eval()
    before = find_structure(net, sample)
    groups = [group for group in before if not group.fixed]
    prune_units(coupled_manager(net, groups), {group.name: every_other(group) for group in groups})
    after = find_structure(net, sample)
    assert [(g.name, g.kind, g.units, g.fixed) for g in after] == [(g.name, g.kind, g.units, g.fixed) for g in before]
    for one, two in zip(before, after, strict=True):
        assert all(torch.equal(a.index, b.index) and a.tensor == b.tensor for a, b in zip(one.slots, two.slots, strict=True))


def apart(known: Structure, found: Structure) -> list[str]:
    """In which groups two structures of one model differ; why units are fixed may have numbers in it that are others now."""
    if [group.name for group in known] != [group.name for group in found]:
        return ["names"]
    differ = []
    for one, two in zip(known, found, strict=True):
        cuts = [[(s.tensor, s.dim, s.buffer, s.index.tolist()) for s in group.slots] for group in (one, two)]
        same = cuts[0] == cuts[1] and (one.kind, one.units, bool(one.fixed)) == (two.kind, two.units, bool(two.fixed))
        differ += [] if same else [one.name]
    return differ


@pytest.mark.parametrize(
    "name", ["vgg", "mobilenet", "resnext", "unet", "densenet", "sound", "lstm", "llama", "qwen3", "gpt2", "bloom", "vit"]
)
def test_what_remains_is_what_would_be_found(name: str) -> None:
    """Two units stay of each group: the last one is always fixed, and goes for something else in models that find it alone
    (one group of a convolution is an ordinary convolution, the norm of every head that of one)."""
    torch.manual_seed(1)
    build, sample, _ = ZOO[name]
    net = build().eval()
    structure = find_structure(net, sample)
    for _ in range(2):
        groups = [group for group in structure if not group.fixed]
        places = {group.name: torch.arange(group.units) for group in groups}
        dead = {group: (unit % 2 == 0) & (unit < len(unit) - 2) for group, unit in places.items()}
        prune_units(coupled_manager(net, groups), dead)
        compacted = compact(net, structure, dead, sample)
        found = find_structure(net, sample)
        assert apart(remaining(structure, dead, compacted), found) == []
        cut = any(bool(units.any()) for units in dead.values())
        assert cut == bool(apart(remaining(structure, dead, Compacted()), found))  # the numbers of the large model are no good
        structure = remaining(structure, dead, compacted)
    picking = [layer for layer in net.modules() if hasattr(layer, "picked")]
    assert len(picking) == (name in ("vgg", "mobilenet", "resnext", "unet", "densenet", "vit"))


# -- another opinion --------------------------------------------------------------------------------------------------------


def opinion(net: nn.Module, graph: Any, layer: nn.Module) -> set[tuple[str, str]]:
    """(layer, side) of everything that torch-pruning cuts with outputs of a layer."""
    names = {module: name for name, module in net.named_modules()}
    outputs = graph.get_out_channels(layer)
    members = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(range(outputs)))
    found = set()
    for dependency, _ in members:
        module = dependency.target.module
        if module in names and isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
            whole = isinstance(module, nn.BatchNorm2d) or getattr(module, "groups", 1) > 1
            side = "out" if whole or graph.is_out_channel_pruning_fn(dependency.handler) else "in"
            found.add((names[module], side))
    return found


def ours(net: nn.Module, group: CoupledGroup) -> set[tuple[str, str]]:
    found = set()
    for slot in group.slots:
        layer = net.get_submodule(slot.tensor.rpartition(".")[0])
        if not slot.buffer and isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
            found.add((slot.tensor.rpartition(".")[0], "in" if slot.dim else "out"))
    return found


class Padded(nn.Module):
    """A residual net without the shortcut that pads, which torch-pruning cuts and must not."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.n = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.a, self.b, self.c = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2)
        self.short, self.d, self.o = nn.Conv2d(6, 8, 1, 2), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n(self.i(x)))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = torch.relu(self.short(x)[:, :, :6, :6] + self.d(torch.relu(self.c(x))))
        result: Tensor = self.o(x.mean((2, 3)))
        return result


@pytest.mark.filterwarnings("ignore")  # of torch-pruning
@pytest.mark.parametrize("name", ["residual", "vgg", "mobilenet", "bert"])
def test_another_opinion(name: str) -> None:
    torch.manual_seed(1)
    build, sample, _ = (Padded, IMAGE, {}) if name == "residual" else ZOO[name]
    net = build().eval()
    structure = find_structure(net, sample)
    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(net, sample, output_transform=lambda made: getattr(made, "logits", made), verbose=False)
    compared = 0
    for group in structure:
        layer = net.get_submodule(group.name.partition("#")[0]) if group.kind != "input" else None
        if isinstance(layer, nn.Linear | nn.Conv2d) and group.fixed != "it is the model's output":
            assert ours(net, group) == opinion(net, graph, layer), group.name
            compared += 1
    assert compared >= {"residual": 4, "vgg": 3, "mobilenet": 5, "bert": 5}[name]
