"""The selections against what people use today, as ratios of CPU time and of memory. It prints a table and writes nothing.

Each case interleaves the two sides in one process and takes the best of n. With 1 thread the CPU time decides, with 2 the wall
time (waiting threads burn CPU time too, and other work on the machine shows up as waiting: look at the load in the title).
Memory is the growth of the peak resident size of a fresh process around the call, per weight, returned masks included.

    python -m tests.benchmarks.bench_selection [--quick]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsetrain.selection import global_threshold, keep_n_of_m, prune_lowest, prune_lowest_rows


def column_loop(metric: Tensor, pruned: int, group: int) -> Tensor:
    """N of M as wanda publishes it: one topk and one scatter for every group of columns."""
    mask = torch.zeros_like(metric, dtype=torch.bool)
    for start in range(0, metric.shape[1], group):
        part = metric[:, start : start + group].float()
        mask.scatter_(1, start + torch.topk(part, pruned, dim=1, largest=False)[1], True)
    return ~mask


def stable_sort_rows(metric: Tensor, count: int) -> Tensor:
    """Per-row selection as wanda publishes it: a stable sort of every row."""
    mask = torch.zeros_like(metric, dtype=torch.bool)
    order = torch.sort(metric, dim=-1, stable=True)[1]
    return ~mask.scatter_(1, order[:, :count], True)


def flat_topk(metric: Tensor, count: int) -> Tensor:
    """Unstructured selection as torch.nn.utils.prune does it inside."""
    mask = torch.ones_like(metric, dtype=torch.bool)
    mask.view(-1)[torch.topk(metric.view(-1), count, largest=False).indices] = False
    return mask


def linears(number: int) -> list[nn.Linear]:
    return [nn.Linear(1000, 1000, bias=False) for _ in range(number)]


def torch_global(layers: list[nn.Linear]) -> list[Tensor]:
    """prune.global_unstructured, then removed again so that the next round starts from the same layers."""
    weights = [layer.weight.detach().clone() for layer in layers]
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.5)
    masks = [layer.get_buffer("weight_mask") for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
        layer.weight.data = weight
    return [mask.bool() for mask in masks]


def our_global(layers: list[nn.Linear]) -> list[Tensor]:
    with torch.no_grad():
        count = sum(layer.weight.numel() for layer in layers) // 2
        found = global_threshold([partial(torch.abs, layer.weight) for layer in layers], count)
        return [found.mask(i, layer.weight.abs()) for i, layer in enumerate(layers)]


@dataclass(frozen=True)
class Case:
    name: str
    ours: Callable[[], Tensor | list[Tensor]]
    theirs: Callable[[], Tensor | list[Tensor]]
    goal: float  # our time / theirs at most
    weights: int


def cases(quick: bool) -> dict[str, Case]:
    torch.manual_seed(0)
    rows, number = (512, 10) if quick else (4096, 100)
    metric = torch.randn(rows, 11008).abs()
    half, n = 11008 // 2, metric.numel()
    layers = linears(number)
    return {
        "2:4": Case("2:4", lambda: keep_n_of_m(metric, 2, 4), lambda: column_loop(metric, 2, 4), 1 / 4, n),
        "4:8": Case("4:8", lambda: keep_n_of_m(metric, 4, 8), lambda: column_loop(metric, 4, 8), 1 / 2.5, n),
        "rows": Case("50 % per row", lambda: prune_lowest_rows(metric, half), lambda: stable_sort_rows(metric, half), 0.25, n),
        "flat": Case("50 % of a tensor", lambda: prune_lowest(metric, n // 2), lambda: flat_topk(metric, n // 2), 0.25, n),
        "global": Case(
            f"global 50 %, {number} tensors",
            lambda: our_global(layers),
            lambda: torch_global(layers),
            0.10,
            number * 10**6,
        ),
    }


def timed(call: Callable[[], object]) -> tuple[float, float]:
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_bytes(key: str, side: str, quick: bool) -> float:
    """Growth of the peak resident size around one call, in a process that has made the inputs already."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_selection", "--memory", key, side]
    apart = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else the holes that glibc leaves between blocks count too
    done = subprocess.run(command + ["--quick"] * quick, env=apart, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_memory(key: str, side: str, quick: bool) -> None:
    torch.set_num_threads(1)
    case = cases(quick)[key]
    prune_lowest(torch.rand(1 << 16), 1 << 15)  # libraries and thread pools are not the call's doing
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory must not be there to be used again
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    kept = (case.ours if side == "ours" else case.theirs)()
    print((resident("VmHWM") - before) / case.weights)
    del kept


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller tensors, fewer rounds")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        key, side = options.memory
        measure_memory(key, side, options.quick)
        return
    rounds, load = 5 if options.quick else 3, os.getloadavg()[0]
    title = f"selection: best of {rounds}, {os.cpu_count()} CPUs, load {load:.1f}, torch {torch.__version__}"
    table = Table(title=title)
    for column in ("case", "threads", "ours CPU s", "theirs CPU s", "CPU ratio", "wall ratio", "goal", "met"):
        table.add_column(column)
    table.add_column("ours B/weight")
    table.add_column("theirs B/weight")
    console = Console(width=130)
    for key, case in cases(options.quick).items():
        memory = [f"{peak_bytes(key, side, options.quick):.2f}" for side in ("ours", "theirs")]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pairs = [(timed(case.ours), timed(case.theirs)) for _ in range(rounds)]
            cpu = [min(pair[side][0] for pair in pairs) for side in (0, 1)]
            wall = [min(pair[side][1] for pair in pairs) for side in (0, 1)]
            ours, theirs = cpu if threads == 1 else wall
            table.add_row(
                case.name,
                str(threads),
                f"{cpu[0]:.3f}",
                f"{cpu[1]:.3f}",
                f"{cpu[0] / cpu[1]:.3f}",
                f"{wall[0] / wall[1]:.3f}",
                f"{case.goal:.3f}",
                "yes" if ours <= case.goal * theirs else "NO",
                *memory,
            )
    console.print(table)


if __name__ == "__main__":
    main()
