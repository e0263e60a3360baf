"""What taking units out is worth: compact models against dense ones, beside what their FLOPs promise. It prints a table.

Half of the heads and neurons of small transformers (built from configurations, random weights), half of the channels of two
convolutional networks, residual ones too. Every model is verified against the masked one as it is made. FLOPs are counted of
Linear layers and convolutions by torch's own counter; time is measured in turns in one process, one thread. For the
convolutional networks torch-pruning's pruner takes half of the channels out of the same network in the same process.

    python -m tests.benchmarks.bench_compact [--rounds 15]
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning
import transformers
from lightning.pytorch.callbacks import ModelPruning
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsetrain.calibration import runner
from sparsetrain.export import as_ordinary, measure_speed
from sparsetrain.structure import CoupledGroup, Structure, compact, coupled_manager, find_structure, prune_units
from sparsetrain.tasks import SmallResNet

#: A compact model is at most so many times slower than its FLOPs promise.
BAR = 1.3
WORDS = {"input_ids": torch.randint(3, 500, (8, 128), generator=torch.Generator().manual_seed(0))}
PIXELS = {"pixel_values": torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def llama() -> nn.Module:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = transformers.LlamaConfig(vocab_size=512, num_key_value_heads=4, **sizes)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=512, **sizes))


def vit() -> nn.Module:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=64, patch_size=8, **sizes))


def resnet() -> nn.Module:
    return SmallResNet(depth=20, widths=(64, 128, 256), shortcut="conv")


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 0):
        layers += (
            [nn.MaxPool2d(2)] if not width else [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        )
        channels = width or channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def half(group: CoupledGroup) -> Tensor:
    return torch.arange(group.units) >= group.units // 2


def halved(model: nn.Module, sample: Any, kinds: Sequence[Any]) -> tuple[nn.Module, str]:
    """A compact copy, and whether stock transformers load it."""
    net = copy.deepcopy(model)
    structure: Structure = find_structure(net, sample)
    groups = [group for group in structure.of_kind(*kinds) if group.units > 3]
    dead = {group.name: half(group) for group in groups}
    prune_units(coupled_manager(net, groups), dead)
    done = compact(net, structure, dead, sample)
    if not hasattr(net, "config"):
        return net, "–"
    try:
        as_ordinary(net, [done], lambda m: runner(m)(sample))
    except Exception:  # a class that computes the width of heads: said in the table
        return net, "no"
    return net, "yes"


def peer(model: nn.Module, sample: Tensor) -> nn.Module:
    """torch-pruning's magnitude pruner on a copy, half of the channels of every layer."""
    net = copy.deepcopy(model)
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    pruner = torch_pruning.pruner.MagnitudePruner(
        net, sample[:1], torch_pruning.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[last]
    )
    pruner.step()
    return net


def zeros(model: nn.Module) -> nn.Module:
    """Lightning's ModelPruning on a copy, structured: half of the filters of every convolution are zeros, none is gone."""
    net = copy.deepcopy(model)
    layers = [(m, "weight") for m in net.modules() if isinstance(m, nn.Conv2d)]
    options: dict[str, Any] = {"use_lottery_ticket_hypothesis": False, "pruning_dim": 0, "pruning_norm": 2}
    pruning = ModelPruning("ln_structured", parameters_to_prune=layers, amount=0.5, use_global_unstructured=False, **options)
    pruning.apply_pruning(0.5)
    pruning.make_pruning_permanent(net)
    return net


def flops(model: nn.Module, sample: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        runner(model)(sample)
    return counter.get_total_flops()


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of every comparison, at least 3 (default 15)")
    rounds = parser.parse_args().rounds
    transformers.logging.set_verbosity_error()
    logging.disable()
    torch.set_num_threads(1)
    table = Table(
        "model", "taken out", "batch", "FLOPs", "faster", "FLOPs / faster", "stock loads it", title="half of the units"
    )
    heads: tuple[str, ...] = ("head", "neuron")
    channels: tuple[str, ...] = ("filter", "residual", "neuron")
    cases: list[tuple[str, Callable[[], nn.Module], Any, tuple[str, ...]]] = [
        ("Llama-type", llama, WORDS, heads),
        ("BERT", bert, WORDS, heads),
        ("ViT", vit, PIXELS, heads),
        ("ResNet-20, 64-128-256", resnet, IMAGES, channels),
        ("VGG, 64-128-256", vgg, IMAGES, channels),
    ]
    for name, build, sample, kinds in cases:
        torch.manual_seed(0)
        dense = build().eval()
        ours, stock = halved(dense, sample, kinds)
        rows = [(" and ".join(kinds), ours.eval(), stock)]
        if isinstance(sample, Tensor):
            rows.append(("torch-pruning, half of the channels", peer(dense, sample).eval(), "–"))
            rows.append(("Lightning ModelPruning, half of the filters", zeros(dense).eval(), "–"))
        for what, small, loads in rows:
            for size in (1, 8):
                part = sample[:size] if isinstance(sample, Tensor) else {key: value[:size] for key, value in sample.items()}
                promise = flops(dense, part) / flops(small, part)
                speed = measure_speed(dense, small, part, rounds=rounds, threads=1)
                ratio = promise / speed.ratio
                mark = "" if what.startswith(("torch", "Lightning")) or ratio <= BAR else f" (bar {BAR})"
                row = (name, what, str(size), f"{promise:.2f}x fewer", f"{speed.ratio:.2f}x", f"{ratio:.2f}{mark}", loads)
                table.add_row(*row)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
