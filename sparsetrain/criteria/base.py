"""What every criterion is: a score for each weight, from the weight alone or from statistics it has accumulated.

A criterion that needs data says where it comes from (``source``) and what it looks at (``needs``):

* ``"calibration"``: batches are streamed through the model right before scoring (`sparsetrain.calibration.calibrate`);
* ``"training"``: it watches every optimizer step, from the first one on.

Either way it sees one `Seen` for each tensor and batch and keeps sums in ``memory``: memory is bounded by the model, never by
the data. Sums add up over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsetrain.errors import RecipeError
from sparsetrain.patterns import Pattern, Sparsity


class Criterion(ABC):
    """Scores each weight of a tensor; higher = more important. A subclass needs `score`.

    ``elementwise``: the score of a weight depends on that weight alone (and on its own statistics), so a shard of the tensor
    can be scored by itself. Set it to False where it does not: the whole tensor is given, and all tensors are scored before
    the first of them is pruned.
    """

    elementwise: ClassVar[bool] = True
    source: ClassVar[Literal["weights", "calibration", "training"]] = "weights"

    @abstractmethod
    def score(self, weight: Tensor, *, name: str, step: int) -> Tensor:
        """Scores of the same shape as ``weight``; never modifies it. ``name`` and ``step`` are there for seeds and memory."""

    def prepare(self, model: nn.Module, tensors: Sequence[Known]) -> None:
        """Look at the model once, when the criterion is bound to it; raise `RecipeError` or `TargetError` if it cannot work.

        Called again when it is bound to another model.
        """
        return None

    def parts(self, masked: Any) -> list[Known]:
        """What it looks at in a `MaskedTensor`: its layer, or where it looks at inputs and experts are fused, each of them."""
        return [Known.of(masked)]

    def compensate(self, weight: Tensor, mask: Tensor, *, name: str) -> Tensor | None:
        """New values of the weights that stay, given those before pruning and the new mask; None leaves them as they are."""
        return None

    def solve(
        self, weight: Tensor, pattern: Pattern, sparsity: Sparsity, *, name: str, alive: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Mask and new values at once, for criteria that choose on weights they have already moved (SparseGPT).

        ``weight`` is the whole tensor seen with outputs first, ``alive`` its present mask (None: dense); what is pruned already
        stays so. None (the default) means: score, select, compensate.
        """
        return None


@dataclass(frozen=True)
class Known:
    """What a criterion may know of one tensor: its name, its layer, its pattern, and how it is stored.

    ``transposed``: stored as ``(in, out)``, as transformers' Conv1D does; `view` gives ``(out, in, *kernel)``.
    """

    name: str
    module: nn.Module
    attribute: str
    pattern: Pattern
    transposed: bool = False

    @classmethod
    def of(cls, masked: Any) -> Known:
        """What there is to know of a `MaskedTensor` (criteria do not know masks; its attributes are all this takes)."""
        target = masked.target
        return cls(masked.name, target.module, target.attribute, masked.pattern, target.layout.transposed)

    @classmethod
    def parts(cls, masked: Any) -> list[Known]:
        """The linear layers in a `MaskedTensor`: itself, or where experts are fused, ``name[0]``, ``name[1]``, ... one by one.

        An expert looks like the weight of an `nn.Linear`; its values are those of the fused tensor.
        """
        layout, parameter = masked.target.layout, masked.target.parameter
        if not layout.experts:
            return [cls.of(masked)]
        found = []
        for index, expert in enumerate(parameter.detach()):
            linear = nn.Linear(1, 1, bias=False, device="meta")
            linear.weight = nn.Parameter(expert.transpose(0, 1) if layout.transposed else expert, requires_grad=False)
            linear.out_features, linear.in_features = linear.weight.shape
            found.append(cls(f"{masked.name}[{index}]", linear, "weight", masked.pattern))
        return found

    @property
    def parameter(self) -> Tensor:
        """The parameter as it is now (sharding and ``.to()`` replace parameters)."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor as stored, seen with outputs first; its own inverse."""
        return tensor.transpose(0, 1) if self.transposed else tensor


@dataclass(frozen=True)
class Seen:
    """One tensor in one batch (or one sample, where ``per_sample``): this rank's part, as stored.

    ``output`` is what the tensor's layer gave, for criteria that need activations (and, where it is known, those of inputs and
    weights), else None; ``gradient`` likewise; ``input`` is what the layer multiplied, as it got it: (..., in) for linear
    layers, (N, in, *positions) for convolutions.
    """

    tensor: Known
    weight: Tensor
    gradient: Tensor | None = None
    output: Tensor | None = None
    input: Tensor | None = None


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: sums and squares of half-precision numbers need it."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


class StatisticsCriterion(Criterion):
    """A criterion on accumulated statistics. A subclass needs `observe`, `score`, and says what it looks at.

    Args:
        batches: how many batches are streamed when it calibrates (`source` "calibration"), at least 1.

    ``needs``: ``"gradient"`` of the weight, ``"output"`` of its layer, or the ``"input"`` that its layer multiplies.
    ``per_sample``: batches are cut into samples.
    ``of_weights``: what is kept of an input depends on the weight too, so that layers with one input cannot share it.
    ``additive``: memory holds sums, which may be added over ranks. Memory is one dictionary of tensors for each tensor scored.
    """

    source: ClassVar[Literal["weights", "calibration", "training"]] = "calibration"
    needs: ClassVar[Literal["gradient", "output", "input"]] = "gradient"
    per_sample: ClassVar[bool] = False
    additive: ClassVar[bool] = True
    of_weights: bool = False

    def __init__(self, batches: int = 16) -> None:
        if batches < 1:
            raise RecipeError(f"criterion {type(self).__name__}: batches={batches}; it needs at least 1 batch of data")
        self.batches = batches
        self.memory: dict[str, dict[str, Tensor]] = {}

    def parts(self, masked: Any) -> list[Known]:
        """See `Criterion.parts`."""
        return Known.parts(masked) if self.needs == "input" else super().parts(masked)

    @abstractmethod
    def observe(self, seen: Seen) -> None:
        """Take in one tensor of one batch; keeps no reference to what it is given."""

    def finish(self) -> None:
        """All data has been seen; what is still on its way into memory goes there now."""

    def settled(self, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the sums of one tensor over one domain come to: means, which count the same whatever a domain's size.

        They are in the place of sums with a count of 1. ``rows`` (of inputs) or ``count`` (of gradients) is what is divided by.
        """
        count = memory.get("rows", memory.get("count"))
        if count is None:
            return {key: value.clone() for key, value in memory.items()}
        return {key: value / count for key, value in memory.items()}

    def reset(self) -> None:
        """Forget everything, before a new calibration."""
        self.memory = {}

    def add(self, name: str, **values: Tensor) -> None:
        """Add to the sums of a tensor; the first values begin them."""
        memory = self.memory.setdefault(name, {})
        for key, value in values.items():
            if key in memory:
                memory[key] += value
            else:
                memory[key] = value.detach().clone()

    def remembered(self, name: str) -> dict[str, Tensor]:
        """The statistics of a tensor; raises `RecipeError` if it has seen none."""
        if name not in self.memory:
            way = (
                "it watches training, so prune after the first steps (schedule.start in a callback); in a loop of your own "
                "call calibration.watch(manager, criterion) before every optimizer step"
                if self.source == "training"
                else "call calibration.calibrate(manager, criterion, batches, loss) first; the callbacks do so by themselves"
            )
            raise RecipeError(f"criterion {type(self).__name__} scores {name} from data and has seen none: {way}")
        return self.memory[name]

    def beside(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The statistics there are of a tensor, on its weight's device: what was loaded from a checkpoint is elsewhere."""
        return {key: value.to(weight.device) for key, value in self.memory.get(name, {}).items()}

    def state_dict(self) -> dict[str, Any]:
        """The statistics, as plain tensors: what an exact resume needs of a criterion that watches training."""
        return {name: {key: value.clone() for key, value in memory.items()} for name, memory in self.memory.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the statistics back."""
        self.memory = {
            name: {key: torch.as_tensor(value).clone() for key, value in memory.items()} for name, memory in state.items()
        }
