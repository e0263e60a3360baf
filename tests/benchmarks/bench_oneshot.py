"""One-shot pruning against the published code, as ratios of CPU time and of memory. It prints a table and writes nothing.

A Llama-type model with random weights is pruned to 50 % by the published `wanda` and `sparsegpt` classes, in the loop that both
repositories have in common (hooks on every linear layer, one window at a time, two passes a block), and by `prune_oneshot`;
all in one process, in turns, one thread, best of n. Memory is the growth of the peak resident size of a fresh process around
the call, model and tokens not counted.

    python -m tests.benchmarks.bench_oneshot --peers DIR [--layers 8] [--windows 32] [--rounds 1] [--trained MODEL]

DIR holds checkouts of github.com/locuslab/wanda and github.com/IST-DASLab/sparsegpt as ``wanda`` and ``sparsegpt``.

How far masks in bfloat16 can agree with those in float32: with random weights the gaps between scores are small, a flipped
entry changes what all later blocks are given, and the share of flips settles where it feeds itself, whatever began it. So
"as float32" has a ceiling, which is how float32 agrees with itself when the embedding is off by a millionth: the last table,
which also has a trained model (``--trained``, a folder of transformers) on text of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import importlib.util
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparsetrain.masks import MaskManager
from sparsetrain.oneshot import Streaming, prune_oneshot

HIDDEN, FFN, LENGTH, VOCABULARY = 512, 1376, 512, 256
#: Side -> criterion, pattern, and the share of the published code's time that is allowed.
OURS = {
    "wanda, ours": ("wanda", None, 0.85),
    "wanda, ours, bfloat16": ("wanda", "bfloat16", 0.5),
    "sparsegpt, ours": ("sparsegpt", None, 0.65),
    "sparsegpt, ours, bfloat16": ("sparsegpt", "bfloat16", 0.5),
}
THEIRS = ("wanda, published", "sparsegpt, published")
PATTERN = {"wanda": "unstructured:row", "sparsegpt": "unstructured"}


def model_of(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config).eval()


def tokens_of(windows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (1, LENGTH), generator=generator) for _ in range(windows)]


def published(peers: Path, criterion: str) -> Any:
    """The class that measures a layer: `WrappedGPT` or `SparseGPT`."""
    path = peers / ("wanda/lib/layerwrapper.py" if criterion == "wanda" else "sparsegpt/sparsegpt.py")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"published_{criterion}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WrappedGPT if criterion == "wanda" else module.SparseGPT


class Caught(Exception):
    pass


@torch.no_grad()
def prune_published(model: LlamaForCausalLM, tokens: list[Tensor], kind: Any, criterion: str) -> None:
    """The loop of both repositories, with what transformers 5 gives its layers."""
    model.config.use_cache = False
    layers = model.model.layers
    inputs = torch.zeros(len(tokens), LENGTH, HIDDEN)
    caught: dict[str, Any] = {"i": 0}

    class Catcher(nn.Module):
        def forward(self, hidden: Tensor, **kwargs: Any) -> None:
            inputs[caught["i"]] = hidden
            caught["i"] += 1
            caught["kwargs"] = kwargs
            raise Caught

    first, layers[0] = layers[0], Catcher()
    for window in tokens:
        with contextlib.suppress(Caught):
            model(window)
    layers[0] = first
    outputs = torch.zeros_like(inputs)
    for layer in layers:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        wrapped = {name: kind(module) for name, module in linears.items()}
        handles = [
            module.register_forward_hook(lambda _, given, out, one=wrapped[name]: one.add_batch(given[0].data, out.data))
            for name, module in linears.items()
        ]
        for j in range(len(tokens)):
            outputs[j] = layer(inputs[j].unsqueeze(0), **caught["kwargs"])[0]
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            if criterion == "wanda":
                metric = torch.abs(module.weight.data) * torch.sqrt(wrapped[name].scaler_row.reshape((1, -1)))
                mask = torch.zeros_like(metric) == 1
                order = torch.sort(metric, dim=-1, stable=True)[1]
                mask.scatter_(1, order[:, : int(metric.shape[1] * 0.5)], True)
                module.weight.data[mask] = 0
            else:
                wrapped[name].fasterprune(0.5)
                wrapped[name] = None
        for j in range(len(tokens)):
            outputs[j] = layer(inputs[j].unsqueeze(0), **caught["kwargs"])[0]
        inputs, outputs = outputs, inputs


def call_of(side: str, peers: Path, model: LlamaForCausalLM, tokens: list[Tensor], batch: int) -> Callable[[], None]:
    criterion = side.split(",")[0]
    if side in THEIRS:
        kind = published(peers, criterion)

        def theirs() -> None:
            torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
            with contextlib.redirect_stdout(io.StringIO()):
                prune_published(model, tokens, kind, criterion)

        return theirs
    manager = MaskManager(model, pattern=PATTERN[criterion])
    how = Streaming(batch=batch, dtype=OURS[side][1])
    return lambda: prune_oneshot(manager, tokens, 0.5, criterion=criterion, streaming=how) and None


def agreement(one: nn.Module, other: nn.Module) -> float:
    """The share of weights that both models have pruned, or both kept."""
    others = dict(other.named_parameters())
    pairs = [(p == 0, others[name] == 0) for name, p in one.named_parameters() if "proj" in name]
    return sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def spoken(model: Any, windows: int, length: int = 256) -> list[Tensor]:
    """Text that a model makes itself, from its token 1 on."""
    torch.manual_seed(2)
    start = torch.full((windows, 1), 1)
    text = model.generate(start, do_sample=True, min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=0)
    return list(text.split(1))


def agreements(model: Any, tokens: list[Tensor], criterion: str) -> list[str]:
    """How masks agree with those in float32: off by a millionth at the embedding, and in bfloat16."""

    def pruned(dtype: str | None, off: float = 0.0) -> nn.Module:
        own = copy.deepcopy(model)
        with torch.no_grad():
            embedding = own.get_input_embeddings().weight
            embedding.mul_(1 + off * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(3)))
        manager = MaskManager(own, pattern=PATTERN[criterion])
        prune_oneshot(manager, tokens, 0.5, criterion=criterion, streaming=Streaming(dtype=dtype))
        return own

    exact = pruned(None)
    return [f"{agreement(pruned(*how), exact):.4%}" for how in ((None, 1e-6), ("bfloat16",))]


def measure_memory(side: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    for layers, windows in ((1, 2), (options.layers, options.windows)):  # libraries and buffers are not the call's doing
        model, tokens = model_of(layers), tokens_of(windows)
        call = call_of(side, options.peers, model, tokens, options.batch)
        if layers == 1:
            call()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    call()
    print((resident("VmHWM") - before) / 2**20)


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def peak_mib(side: str, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.bench_oneshot", "--memory", side, "--peers", str(options.peers)]
    command += ["--layers", str(options.layers), "--windows", str(options.windows), "--batch", str(options.batch)]
    apart = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else the holes that glibc leaves between blocks count too
    return float(subprocess.run(command, env=apart, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=Streaming().batch)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--trained", type=Path, metavar="MODEL")
    parser.add_argument("--memory", metavar="SIDE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options.memory, options)
        return
    torch.set_num_threads(1)
    dense, tokens = model_of(options.layers), tokens_of(options.windows)
    seconds: dict[str, float] = {}
    models: dict[str, LlamaForCausalLM] = {}
    for _ in range(options.rounds):
        for side in (*THEIRS, *OURS):
            models[side] = copy.deepcopy(dense)
            call = call_of(side, options.peers, models[side], tokens, options.batch)
            gc.collect()
            start = time.process_time()
            call()
            seconds[side] = min(seconds.get(side, float("inf")), time.process_time() - start)
    title = f"{options.layers} layers, {options.windows} x {LENGTH} tokens, best of {options.rounds}, 1 thread, "
    table = Table(title=title + f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    for column in ("", "CPU s", "to published", "goal", "met", "masks as published", "as float32", "peak MiB"):
        table.add_column(column)
    for side in (*THEIRS, *OURS):
        criterion = side.split(",")[0]
        theirs = f"{criterion}, published"
        ratio, goal = seconds[side] / seconds[theirs], OURS[side][2] if side in OURS else 1.0
        table.add_row(
            side,
            f"{seconds[side]:.1f}",
            f"{ratio:.3f}",
            f"{goal:.2f}" if side in OURS else "",
            ("yes" if ratio <= goal else "NO") if side in OURS else "",
            f"{agreement(models[side], models[theirs]):.4%}",
            f"{agreement(models[side], models[f'{criterion}, ours']):.4%}",
            "" if options.no_memory else f"{peak_mib(side, options):.0f}",
        )
    Console(width=130).print(table)
    if options.trained:
        table = Table(title="masks as those in float32")
        for column in ("", "float32, off by 1e-6", "bfloat16"):
            table.add_column(column)
        trained = AutoModelForCausalLM.from_pretrained(options.trained, dtype=torch.float32).eval()
        for name, model, texts in (("trained", trained, spoken(trained, options.windows)), ("random", dense, tokens)):
            for criterion in PATTERN:
                table.add_row(f"{name}, {criterion}", *agreements(model, texts, criterion))
        Console(width=130).print(table)


if __name__ == "__main__":
    main()
