"""What variational dropout costs beside a dense training step. It prints a table and writes nothing.

LeNet-300-100, batch 100, random inputs, one thread, fused Adam on both sides. CPU time of both, in turns, in one process: the
best of all turns, and the median over turns of the ratio.

    python -m tests.benchmarks.bench_variational [--rounds 40] [--steps 24]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from sparsetrain.callbacks.weight_noise import Noise, NoisyWeights
from sparsetrain.masks import MaskManager
from sparsetrain.targets import Targets

BAR = 2.5


class Side:
    """A network of its own that takes steps."""

    def __init__(self, noisy: bool) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-3, fused=True)
        self.x, self.y = torch.rand(100, 784), torch.randint(0, 10, (100,))
        tensors = list(MaskManager(self.network, Targets(head=True)))
        self.noisy = NoisyWeights(tensors, Noise(), 3.0) if noisy else None
        self.owned = {id(p) for p in self.network.parameters()}

    def step(self) -> None:
        loss = F.cross_entropy(self.network(self.x), self.y)
        self.optimizer.zero_grad()
        if self.noisy is not None:
            self.noisy.adam.zero_grad()
        loss.backward()
        if self.noisy is not None:
            self.noisy.gradients(self.owned, 1 / 60_000, 1.0, lambda grad: grad)
        self.optimizer.step()
        if self.noisy is not None:
            self.noisy.step(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=24, help="a multiple of 8: every eighth looks at the divergence anew")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    sides = {"dense step": Side(noisy=False), "variational step": Side(noisy=True)}
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(asked.rounds + 2):
        for name, side in sides.items():
            begun = time.process_time()
            for _ in range(asked.steps):
                side.step()
            if turn >= 2:
                turns[name].append((time.process_time() - begun) / asked.steps)
    table = Table("LeNet-300-100, batch 100", "ms", "ratio to dense", f"bar {BAR}")
    for name, times in turns.items():
        ratio = statistics.median(a / b for a, b in zip(times, turns["dense step"], strict=True))
        table.add_row(name, f"{1e3 * min(times):.2f}", f"{ratio:.2f}", "met" if ratio <= BAR else "not met")
    Console().print(table)


if __name__ == "__main__":
    main()
