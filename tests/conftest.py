"""Every test runs on one thread, with warnings as errors; here are the few warnings nobody outside Lightning can avoid."""

from __future__ import annotations

import pytest
import torch

UNAVOIDABLE = (
    r"ignore:.*LeafSpec:FutureWarning",  # Lightning's combined loader uses a deprecated name of torch
    r"ignore:.*does not have many workers",  # toys are loaded in the main process on purpose
    r"ignore:.*is smaller than the logging interval",  # short runs
    r"ignore:Checkpoint directory .* exists and is not empty",  # a resumed run writes where the first one did
    r"ignore:.*your dataloader is not resumable",  # the very thing that sparsetrain makes good
    r"ignore:.*GPU available but not used",
    r"ignore:.*CUDA is not available.*:UserWarning",  # 16-bit mixed precision on a CPU
)


def pytest_configure(config: pytest.Config) -> None:
    """Add the exceptions after the ``error`` of pyproject.toml, so that they win."""
    torch.set_num_threads(1)
    for line in UNAVOIDABLE:
        config.addinivalue_line("filterwarnings", line)
