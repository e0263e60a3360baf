"""What one more domain costs, in forward passes and in memory. It prints a table and writes nothing.

A Llama-type model with random weights (that of `bench_oneshot`) has learned one domain and learns the next. Time is CPU time on
one thread, in turns with the two forward passes that block-by-block pruning needs (one to measure a block, one to give the next
its inputs), best of n. Memory is how much the peak of a fresh process grows during the call, beside the size of a block and of
what is remembered (base weights, statistics).

    python -m tests.benchmarks.bench_continual [--layers 4] [--windows 16] [--rounds 2]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaForCausalLM

from sparsetrain.continual import ContinualPruner, Memory
from sparsetrain.criteria import Copal, Criterion, OutputFisher, SparseGPT, Wanda
from sparsetrain.masks import MaskManager
from sparsetrain.oneshot import Streaming
from tests.benchmarks.bench_oneshot import model_of, resident, tokens_of

#: Side -> criterion, pattern, type the blocks run in.
SIDES: dict[str, tuple[Callable[[], Criterion], str, str | None]] = {
    "copal, token": (Copal, "unstructured:row", None),
    "copal, final": (lambda: Copal(abs_order="final"), "unstructured", None),
    "output fisher": (OutputFisher, "unstructured:row", None),
    "wanda": (Wanda, "unstructured:row", None),
    "sparsegpt": (SparseGPT, "unstructured", None),
}
FORWARD = "two forward passes"
#: What scoring a domain may cost, in the forward passes that it needs.
BAR = 1.5


def pruner_of(side: str, model: LlamaForCausalLM, tokens: list[Tensor], batch: int, folder: Path | None) -> ContinualPruner:
    """One that has learned a first domain."""
    make, pattern, dtype = SIDES[side]
    manager = MaskManager(model, pattern=pattern)
    how = Streaming(batch=batch, dtype=dtype, offload="disk" if folder else None)
    pruner = ContinualPruner(manager, 0.5, criterion=make(), memory=Memory(folder=folder), streaming=how)
    pruner.learn("first", tokens)
    return pruner


def twice(model: LlamaForCausalLM, tokens: list[Tensor], batch: int) -> None:
    with torch.no_grad():
        for _ in range(2):
            for start in range(0, len(tokens), batch):
                model(torch.cat(tokens[start : start + batch]), use_cache=False)


def times(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    tokens, later = tokens_of(options.windows), tokens_of(options.windows)[::-1]
    plain = model_of(options.layers)
    pruners = {side: pruner_of(side, model_of(options.layers), tokens[:2], options.batch, None) for side in SIDES}
    best: dict[str, float] = {}
    for turn in range(options.rounds):
        for side in (FORWARD, *SIDES):
            gc.collect()
            began = time.process_time()
            if side == FORWARD:
                twice(plain, later, options.batch)
            else:
                pruners[side].learn(f"domain {turn}", later)
            best[side] = min(best.get(side, float("inf")), time.process_time() - began)
    return best


def measure_memory(side: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.files else None
        pruner = pruner_of(side, model_of(options.layers), tokens_of(2), options.batch, folder)
        tokens = tokens_of(options.windows)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = resident("VmRSS")
        pruner.learn("second", tokens)
        print((resident("VmHWM") - before) / 2**20)


def megabytes(side: str, options: argparse.Namespace, files: bool) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.bench_continual", "--memory", side, *(["--files"] * files)]
    command += ["--layers", str(options.layers), "--windows", str(options.windows), "--batch", str(options.batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("windows", 16), ("rounds", 2), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--files", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options.memory, options)
        return
    found = times(options)
    table = Table(title=f"one more domain, {options.layers} layers, {options.windows} x 512 tokens")
    for head in ("side", "CPU-s", "ratio", "bar", "MiB more, in memory", "MiB more, in files"):
        table.add_column(head, justify="left" if head == "side" else "right")
    for side, seconds in found.items():
        memory = ["", ""] if side == FORWARD else [f"{megabytes(side, options, files):.0f}" for files in (False, True)]
        bar = "" if side in (FORWARD, "sparsegpt") else f"{BAR}"
        table.add_row(side, f"{seconds:.1f}", f"{seconds / found[FORWARD]:.2f}", bar, *memory)
    model = model_of(options.layers)
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4 / 2**20
    table.caption = f"a block has {block:.0f} MiB of weights, the model {options.layers} of them"
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
