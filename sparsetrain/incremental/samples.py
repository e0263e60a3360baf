"""A small memory of samples, a few for each class, that later tasks see again. Pure torch; randomness by key alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsetrain.errors import DataError


class SampleMemory:
    """Keeps ``per_class`` samples of each class (all of a class that has fewer), and adds some to a batch.

    Example: ``SampleMemory(20).add(images, labels, key=(0, 1))``.
    """

    def __init__(self, per_class: int) -> None:
        if per_class < 0:
            raise DataError(f"memory={per_class} samples a class: give 0 or more")
        self.per_class = per_class
        self.inputs: Tensor | None = None
        self.labels: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.labels is None else len(self.labels)

    def add(self, inputs: Tensor, labels: Tensor, key: tuple[int, ...]) -> None:
        """Keep samples of the classes in ``labels`` (N,), chosen at random by the key; classes known before keep theirs."""
        known = set() if self.labels is None else set(self.labels.tolist())
        chosen = []
        for label in sorted(set(labels.tolist()) - known):
            places = (labels == label).nonzero().flatten()
            order = torch.randperm(len(places), generator=_generator((*key, label)))
            chosen.append(places[order[: self.per_class]])
        if chosen and self.per_class:
            index = torch.cat(chosen).to(labels.device)
            more, theirs = inputs[index].cpu(), labels[index].cpu()
            self.inputs = more if self.inputs is None else torch.cat([self.inputs, more])
            self.labels = theirs if self.labels is None else torch.cat([self.labels, theirs])

    def extend(self, inputs: Tensor, labels: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The batch and old samples, drawn with replacement: in a batch of n samples of c classes n / c of each old class on
        average, so that all classes weigh the same. The batch itself while there is no memory.
        """
        if self.inputs is None or self.labels is None:
            return inputs, labels
        old, new = len(self.labels.unique()), len(labels.unique())  # type: ignore[no-untyped-call]
        index = torch.randint(len(self), (len(labels) * old // new,), generator=_generator(key))
        return torch.cat([inputs, self.inputs[index].to(inputs)]), torch.cat([labels, self.labels[index].to(labels)])

    def state_dict(self) -> dict[str, Any]:
        """The samples."""
        return {"inputs": self.inputs, "labels": self.labels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.inputs, self.labels = state["inputs"], state["labels"]


def _generator(key: tuple[int, ...]) -> torch.Generator:
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)
