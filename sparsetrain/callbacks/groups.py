"""Which coupled groups a structured method may prune, and the sample on which the model is run to find them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from sparsetrain.errors import RecipeError, nearest
from sparsetrain.structure.groups import Kind


@dataclass(frozen=True)
class Groups:
    """Which coupled groups a method may prune, and how few of their units may be left.

    Args:
        kinds: ``"neuron"``, ``"filter"``, ``"head"``, ``"input"`` (of the model), ``"residual"``.
        exclude: regular expressions searched in group names; what matches stays whole.
        at_least: units that no group falls below, 1 or more.
        alike: the same layer of every block loses as many units, so that one configuration describes them all.
        multiple: of what is left of a group that loses units: 8 or 16 where kernels like that.
        sample: a batch as the model takes it, on which it is run to see what belongs together; by default the model's
            ``example_input_array``, else the first training sample.

    Raises `RecipeError` for a kind that is none, none at all, or ``at_least`` below 1.

    Example: ``Groups(kinds=("neuron", "input"), at_least=4)``.
    """

    kinds: tuple[Kind, ...] = ("neuron", "filter", "head")
    exclude: tuple[str, ...] = ()
    at_least: int = 1
    alike: bool = False
    multiple: int = 1
    sample: Any = None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in get_args(Kind):
                raise RecipeError(f"kinds has {kind!r}.{nearest(kind, get_args(Kind))} Known are {', '.join(get_args(Kind))}")
        if not self.kinds:
            raise RecipeError(f"kinds is empty; name at least one of {', '.join(get_args(Kind))}")
        if self.at_least < 1 or self.multiple < 1:
            raise RecipeError(f"at_least={self.at_least} multiple={self.multiple}: every group keeps at least 1 unit")


def first_training_sample(data: Any) -> Any:
    """What the model is given of the first training sample of a data module or a loader, in a batch of one where it can be.

    Example: ``first_training_sample(VisionData("digits"))`` is one image.
    """
    if isinstance(data, LightningDataModule):
        data.prepare_data()
        data.setup("fit")
        data = data.train_dataloader()
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        # Not through the loader, which would draw random numbers.
        fetch = getattr(data.dataset, "__getitems__", lambda indices: [data.dataset[i] for i in indices])
        return without_labels(data.collate_fn(fetch([0])))
    if isinstance(data, DataLoader) or (isinstance(data, Iterable) and not isinstance(data, Mapping | list | tuple)):
        return without_labels(next(iter(data), None))
    raise RecipeError(
        f"the training data are a {type(data).__name__}, of which no first sample can be told: set the model's "
        "example_input_array, or give groups.sample"
    )


def without_labels(batch: Any) -> Any:
    """What a model is given of a batch: a mapping without ``labels``, the first of a tuple.

    Example: ``without_labels((torch.ones(4, 2), torch.zeros(4)))`` is ``torch.ones(4, 2)``.
    """
    if isinstance(batch, dict):
        return {name: value for name, value in batch.items() if name != "labels"}
    return batch[0] if isinstance(batch, list | tuple) else batch
