"""What a run prints: its own lines, warnings and errors; not Lightning's tips, nor warnings about what is done on purpose."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_EXPECTED = (
    ".*does not have many workers.*",  # data in memory need none
    ".*LeafSpec.*",  # Lightning uses a deprecated name of torch
    ".*exists and is not empty.*",  # a resumed run writes where the first one did
    ".*smaller than the logging interval.*",  # short epochs; tasks log the last batch of each anyway
    ".*your dataloader is not resumable.*",  # the method makes that good
    ".*GPU available but not used.*",  # the recipe said so
    ".*Total length of `list` across ranks is zero.*",  # no validation set
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the above inside the block; every other warning is shown. Example: ``with quiet(): trainer.fit(model)``."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
