"""What keeping masks costs: a training step of a 25 M-parameter GPT-2-like model, ours and the peers' ways, interleaved.

``python -m tests.benchmarks.bench_keeping``. One thread, batch 1 x 64 tokens, AdamW, CPU-seconds; every way trains a model of
its own, rounds take turns, and the ratio is the median over rounds of (this way's step / the dense step of the same round).
Memory is counted exactly: bytes a pruned-tensor weight that a way keeps beyond weight, gradient and AdamW state.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import GPT2Config, GPT2LMHeadModel

from sparsetrain import MaskManager, Targets, prune

Step = Callable[[], None]
INCLUDE = Targets(include=(r"(attn|mlp)\..*weight",))


def build(width: int, layers: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8192, n_positions=256, n_embd=width, n_layer=layers, n_head=8, bos_token_id=0, eos_token_id=0,
        loss_type="ForCausalLM",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def targets(model: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    return [(t.module, t.parameter) for t in INCLUDE.match(model).targets]


def step_of(model: nn.Module, tokens: torch.Tensor, before: Step | None = None, after: Step | None = None) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        if before is not None:
            before()
        optimizer.step()
        if after is not None:
            after()

    step.optimizer = optimizer  # type: ignore[attr-defined]
    return step


def median_masks(model: nn.Module) -> list[tuple[nn.Parameter, torch.Tensor]]:
    return [(p, p.detach().abs() > p.detach().abs().median()) for _, p in targets(model)]


def dense(width: int, layers: int, tokens: torch.Tensor) -> Step:
    return step_of(build(width, layers), tokens)


def ours(width: int, layers: int, tokens: torch.Tensor) -> Step:
    model = build(width, layers)
    step = step_of(model, tokens)
    manager = MaskManager(model, INCLUDE).attach(step.optimizer)  # type: ignore[attr-defined]
    prune(manager, 0.5)
    step.verify = lambda: manager.verify(strict=True)  # type: ignore[attr-defined]
    return step


def torch_pruning(width: int, layers: int, tokens: torch.Tensor) -> Step:
    model = build(width, layers)
    for module, _ in targets(model):
        torch_prune.l1_unstructured(module, "weight", 0.5)
    return step_of(model, tokens)


def ao_pruning(width: int, layers: int, tokens: torch.Tensor) -> Step:
    from torch.ao.pruning import WeightNormSparsifier

    model = build(width, layers)
    names = {id(module): name for name, module in model.named_modules()}
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": f"{names[id(module)]}.weight"} for module, _ in targets(model)])
    sparsifier.step()
    return step_of(model, tokens)


def masked_fill(width: int, layers: int, tokens: torch.Tensor) -> Step:
    model = build(width, layers)
    masks = [(p, ~mask) for p, mask in median_masks(model)]

    @torch.no_grad()
    def after() -> None:
        for p, dead in masks:
            p.masked_fill_(dead, 0.0)

    return step_of(model, tokens, after=after)


def gradient_and_weight(width: int, layers: int, tokens: torch.Tensor) -> Step:
    model = build(width, layers)
    masks = median_masks(model)

    @torch.no_grad()
    def before() -> None:
        for p, mask in masks:
            assert p.grad is not None
            p.grad.mul_(mask)

    @torch.no_grad()
    def after() -> None:
        for p, mask in masks:
            p.mul_(mask)

    return step_of(model, tokens, before, after)


WAYS: dict[str, tuple[Callable[[int, int, torch.Tensor], Step], str]] = {
    "dense": (dense, "0"),
    "dense again (noise)": (dense, "0"),
    "sparsetrain": (ours, "1"),
    "torch.nn.utils.prune": (torch_pruning, "9"),
    "torch.ao.pruning": (ao_pruning, "5"),
    "masked_fill_ after the step": (masked_fill, "1"),
    "bool-masked gradient and weight": (gradient_and_weight, "1"),
}


def measure(width: int, layers: int, rounds: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    tokens = torch.randint(0, 8192, (1, 64), generator=torch.Generator().manual_seed(0))
    steps = {name: make(width, layers, tokens) for name, (make, _) in WAYS.items()}
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.disable()
    for turn in range(rounds):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - began)
    gc.enable()
    steps["sparsetrain"].verify()  # type: ignore[attr-defined]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds: shows that it runs")
    known = parser.parse_args()
    width, layers, rounds = (128, 2, 5) if known.quick else (512, 7, 40)
    seconds = measure(width, layers, rounds)
    table = Table(title="cost of keeping 50 % unstructured masks")
    for column in ("way", "step, CPU-ms", "ratio to dense", "quartiles", "bytes a weight"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table.add_row(name, f"{1e3 * statistics.median(values):.1f}", f"{middle:.3f}", f"{low:.3f}-{high:.3f}", WAYS[name][1])
    Console().print(table)


if __name__ == "__main__":
    main()
