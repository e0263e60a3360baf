"""What zeros buy: a 1024 x 4096 Linear in every format, at several sparsities and batch sizes, against itself dense.

``python -m tests.benchmarks.bench_formats``. One thread; ratios are medians over interleaved rounds (above 1 is faster), with
quartiles. What `for_inference` then chooses for both batch sizes together stands in the last column. 2:4 runs as CSR: torch's
semi-structured format needs a GPU.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sparsetrain.export import FORMATS, compare, for_inference, race
from sparsetrain.export.layers import block_of, build
from sparsetrain.export.places import probe
from sparsetrain.patterns import NM

KINDS = {
    "unstructured": (0.5, 0.75, 0.9, 0.95),
    "2:4": (0.5,),
    "blocks 16x16": (0.5, 0.75, 0.9, 0.95),
    "rows": (0.5, 0.75, 0.9, 0.95),
}


def layer(kind: str, sparsity: float, out: int, inputs: int) -> nn.Linear:
    made = nn.Linear(inputs, out).requires_grad_(False)
    if kind == "2:4":
        made.weight.mul_(NM(2, 4).select(torch.rand(out, inputs), sparsity))
        return made
    unit = {"unstructured": (1, 1), "blocks 16x16": (16, 16), "rows": (1, inputs)}[kind]
    alive = torch.rand(out // unit[0], inputs // unit[1]) >= sparsity
    made.weight.mul_(alive.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1))
    return made


def forms_for(kind: str) -> list[str]:
    if kind == "rows":
        return ["compact", "csr"]
    return ["csr"] if kind in ("unstructured", "2:4") else ["csr", *(form for form in FORMATS if block_of(form) != (0, 0))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small layer and few rounds: shows that it runs")
    quick = parser.parse_args().quick
    out, inputs, rounds = (128, 256, 3) if quick else (1024, 4096, 15)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(title=f"{out} x {inputs}, one thread: times faster than dense (quartiles)")
    for column in ("zeros", "format", "batch 1", "batch 64", "chosen"):
        table.add_column(column, justify="right" if column.startswith("batch") else "left")
    for kind, sparsities in KINDS.items():
        for sparsity in sparsities:
            dense = layer(kind, sparsity, out, inputs)
            forms = forms_for(kind)
            ways = [dense, *(build(dense, form) for form in forms)]
            cells: dict[str, list[str]] = {form: [] for form in forms}
            for size in (1, 64):
                x = probe(dense, size, None)
                times = race([lambda way=way, x=x: way(x) for way in ways], rounds=rounds)  # type: ignore[misc]
                for form, seconds in zip(forms, times[1:], strict=True):
                    speed = compare(times[0], seconds)
                    cells[form].append(f"{speed.ratio:.2f} ({speed.low:.2f}-{speed.high:.2f})")
            [row] = for_inference(nn.Sequential(dense)).choice.layers
            for form in forms:
                chosen = row.format if form == forms[0] else ""
                table.add_row(f"{sparsity:.0%} {kind}" if form == forms[0] else "", form, *cells[form], chosen)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
