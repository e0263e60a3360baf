"""What the proximal step of a group lasso costs beside a training step. It prints a table and writes nothing.

LeNet-300-100, batch 100, SGD with momentum, random inputs, one thread. Units: the neurons of both hidden layers (row, bias,
column of the next layer) and the inputs of the first (its columns), so that every weight but the output's is read and scaled
twice. CPU time of every side, in turns, in one process: the best of all turns, and the median over turns of the ratio to the
dense step of the same turn. The bar is for the proximal step after every step.

    python -m tests.benchmarks.bench_proximal [--rounds 60] [--steps 20] [--every 4]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.callbacks.group_penalty import Reading
from sparsetrain.penalties import (
    Part,
    Units,
    adam_steps,
    group_lasso,
    group_soft_threshold,
    metric_group_soft_threshold,
    sparse_group_soft_threshold,
)
from sparsetrain.structure import find_structure

DENSE, PROX = "dense step", "+ proximal step"
BAR = 1.08
RATE, STRENGTH = 0.01, 1e-5


class Side:
    """A network of its own that takes steps."""

    def __init__(self, after: Callable[[Side], object] | None = None, penalty: bool = False, adam: bool = False) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
        weights = self.network.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(weights, RATE) if adam else torch.optim.SGD(weights, RATE, momentum=0.9)
        )
        one, two, three = (self.network[i] for i in (0, 2, 4))
        self.groups = [
            Units((Part(one.weight, 0), Part(one.bias, 0), Part(two.weight, 1))),
            Units((Part(two.weight, 0), Part(two.bias, 0), Part(three.weight, 1))),
            Units((Part(one.weight, 1),)),
        ]
        self.x, self.y = torch.rand(100, 784), torch.randint(0, 10, (100,))
        self.after, self.penalty, self.taken = after, penalty, 0

    def step(self) -> None:
        loss = F.cross_entropy(self.network(self.x), self.y)
        if self.penalty:
            loss = loss + STRENGTH * sum((group_lasso(units) for units in self.groups), torch.zeros(()))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.taken += 1
        if self.after:
            self.after(self)


def prox(side: Side) -> None:
    for units in side.groups:
        group_soft_threshold(units, RATE * STRENGTH)


def half_dead(side: Side) -> None:
    """Every other unit of each group is revived by the optimizer and dies again, every step."""
    for units in side.groups:
        weights = torch.ones(units.count)
        weights[::2] = 1e9
        group_soft_threshold(units, RATE * STRENGTH, weights)


def prox_every(every: int) -> Callable[[Side], object]:
    def after(side: Side) -> None:
        if side.taken % every == 0:
            for units in side.groups:
                group_soft_threshold(units, RATE * STRENGTH * every)

    return after


def adaptive(every: int) -> Callable[[Side], object]:
    """What `GroupLasso` does by default: importance looked at, and the units in line shrunk, on the weights that read them."""
    readings: list[Reading] = []

    def after(side: Side) -> None:
        if side.taken % every:
            return
        if not readings:
            groups = find_structure(side.network, side.x).of_kind("neuron", "input")
            readings.extend(Reading(side.network, group) for group in groups)
        for reading in readings:
            reading.watch(0.98)
            assert reading.reads is not None
            group_soft_threshold(reading.reads, RATE * STRENGTH, torch.ones(reading.reads.count))

    return after


def sparse_prox(side: Side) -> None:
    for units in side.groups:
        sparse_group_soft_threshold(units, RATE * STRENGTH, RATE * STRENGTH)


def metric_prox(side: Side) -> None:
    state = side.optimizer.state
    for units in side.groups:
        moments: list[tuple[Tensor, int]] = [(s["exp_avg_sq"], int(s["step"])) for s in (state[p.tensor] for p in units.parts)]
        metric_group_soft_threshold(units, [adam_steps(RATE, v, 0.999, step) for v, step in moments], STRENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 60), ("steps", 20), ("every", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sides = {
        DENSE: Side(),
        PROX: Side(prox),
        f"+ proximal step, every {options.every}": Side(prox_every(options.every)),
        f"+ GroupLasso, adaptive, every {options.every}": Side(adaptive(options.every)),
        "+ proximal step, half the units dead": Side(half_dead),
        "+ sparse-group proximal step": Side(sparse_prox),
        "+ penalty in the loss (autograd)": Side(penalty=True),
        "Adam: dense step": Side(adam=True),
        "Adam: + proximal step in its metric": Side(metric_prox, adam=True),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds + 1):
        for name, side in sides.items():
            began = time.process_time()
            for _ in range(options.steps):
                side.step()
            if turn:  # the first one warms up
                times[name].append((time.process_time() - began) / options.steps)
    table = Table(title=f"LeNet-300-100, batch 100, best of {options.rounds} x {options.steps} steps")
    for head in ("side", "CPU-us a step", "ratio of bests", "median ratio", "bar"):
        table.add_column(head, justify="left" if head == "side" else "right")
    for name, found in times.items():
        base = times["Adam: dense step" if name.startswith("Adam") else DENSE]
        ratios = [mine / other for mine, other in zip(found, base, strict=True)]
        row = [f"{min(found) * 1e6:.0f}", f"{min(found) / min(base):.3f}", f"{statistics.median(ratios):.3f}"]
        table.add_row(name, *row, f"{BAR}" if name == PROX or "GroupLasso" in name else "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
