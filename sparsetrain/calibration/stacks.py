"""Finding the blocks of a model, and running the model's own code from block to block.

A stack is a ``ModuleList`` or ``Sequential`` of at least two modules of one class that hold targets, the outermost there are.
That is only a proposal; the model's behaviour decides. One sample is run through the whole model, and once more to each block
with all blocks before it replaced by stubs that return the output of the last one. Where every block is then given, bit for
bit, what it was given before, and makes the same of it (blocks may talk through an object that shows no tensor), the model can
be streamed block by block, whatever its own code does around the blocks (masks, positions, kinds of attention, a bias that the
first block makes and the others take). Where not, the list is no stack (blocks that run twice, skip connections), and the lists
inside it are looked at, or the model is taken as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsetrain.calibration.data import checksum
from sparsetrain.calibration.driver import Block, Driver, Run
from sparsetrain.errors import SparsetrainError


@dataclass(frozen=True)
class Segment:
    """What is measured and pruned together: a block, or the targets outside of all blocks that run at one place.

    ``index``: how many blocks run before it, for a block its place in the order of execution. ``idle``: targets never called.
    """

    name: str
    index: int
    targets: tuple[str, ...]
    is_block: bool
    idle: tuple[str, ...] = ()


def segments(model: nn.Module, run: Run, sample: Any, targets: Mapping[str, nn.Module]) -> tuple[list[Block], list[Segment]]:
    """The blocks of a model in the order they run, and its targets in segments; ``targets``: tensor name -> its layer.

    ``sample``: a batch of one sample. Every target is in one segment; those that no call was seen of are in the segment of
    their block, or in the last one. A model without a stack has one segment. Pure torch, nothing is changed.

    Example: ``segments(model, model, tokens[:1], {t.name: t.target.module for t in manager})``.
    """
    rejected: set[str] = set()
    while True:
        proposed = _proposals(model, targets, rejected)
        trace = _Trace(model, run, sample, proposed, targets)
        blocks = trace.blocks()
        bad = trace.unusual(blocks)
        if bad is None:
            bad = _not_chained(model, run, sample, blocks, trace)
        if bad is None:
            return blocks, trace.segments(blocks)
        rejected.add(bad)


def _proposals(model: nn.Module, targets: Mapping[str, nn.Module], rejected: set[str]) -> dict[str, list[str]]:
    """Stack name -> names of its blocks, outermost stacks only."""
    holders = {id(module) for module in targets.values()}
    found: dict[str, list[str]] = {}
    for name, container in model.named_modules():
        inside = any(name.startswith(f"{other}.") or not other for other in found)
        if not isinstance(container, nn.ModuleList | nn.Sequential) or name in rejected or inside:
            continue
        # What a Sequential repeats (an activation) is no block, but what happens between blocks.
        several = Counter(id(child) for child in container._modules.values())
        children = {key: child for key, child in container.named_children() if several[id(child)] == 1}
        holding = [type(c) for c in children.values() if any(id(m) in holders for m in c.modules())]
        if any(holding.count(kind) > 1 for kind in holding):
            found[name] = [f"{name}.{key}" if name else key for key in children]
    return found


class _Trace:
    """What a model calls for one sample: blocks and target layers in order, and what blocks are given and return."""

    def __init__(
        self, model: nn.Module, run: Run, sample: Any, stacks: Mapping[str, Sequence[str]], targets: Mapping[str, nn.Module]
    ) -> None:
        self.stacks = stacks
        self.stack_of = {name: stack for stack, names in stacks.items() for name in names}
        self.order: list[str] = []
        self.given: dict[str, str] = {}
        self.output: dict[str, Any] = {}
        #: Target -> where it was called: how many blocks had begun, and whether inside the last of them.
        self.calls: dict[str, list[tuple[int, bool]]] = {name: [] for name in targets}
        #: Target outside of all blocks -> what its layer was given.
        self.outside: dict[str, str] = {}
        self.targets = targets
        self._inside: list[str] = []
        modules = dict(model.named_modules())
        #: Target -> the block that holds its layer; of a layer that several share, the last.
        owner = {id(inner): name for name in self.stack_of for inner in modules[name].modules()}
        self.home = {name: owner.get(id(layer)) for name, layer in targets.items()}
        with ExitStack() as hooks:
            for name in self.stack_of:
                hooks.callback(modules[name].register_forward_pre_hook(self._enter(name), with_kwargs=True).remove)
                hooks.callback(modules[name].register_forward_hook(self._leave(name), always_call=False).remove)
            for name, layer in targets.items():
                hooks.callback(layer.register_forward_pre_hook(self._call(name)).remove)
            run(sample)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.order.append(name)
            self.given[name] = checksum([args, dict(kwargs)])
            self._inside.append(name)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.output[name] = _copied(output)
            self._inside.pop()

        return hook

    def _call(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.calls[name].append((len(self.order), bool(self._inside)))
            if not self._inside:
                self.outside[name] = checksum(args)

        return hook

    def blocks(self) -> list[Block]:
        """Those that were called, in order, once each."""
        return [Block(name, self.stack_of[name]) for name in dict.fromkeys(self.order)]

    def unusual(self, blocks: Sequence[Block]) -> str | None:
        """A stack that cannot be one: blocks that run not at all, twice, inside each other or return something else."""
        for stack, names in self.stacks.items():
            own = [name for name in self.order if name in names]
            if own != list(names) or not all(_first(self.output[name]) is not None for name in names):
                return stack
        places = {block.name: place for place, block in enumerate(blocks)}
        for name, calls in self.calls.items():
            at = {(begun - 1 if inside else begun, inside) for begun, inside in calls}
            home = self.home[name]
            if len(at) > 1 or (home is not None and any(place != (places[home], True) for place in at)):
                # A layer of several places can only be measured as a whole.
                return self.stack_of[home] if home is not None else next(iter(self.stacks), None)
        return None

    def segments(self, blocks: Sequence[Block]) -> list[Segment]:
        """Blocks, and between them what lies outside."""
        members: dict[tuple[int, bool], list[str]] = {(place, True): [] for place in range(len(blocks))}
        places = {block.name: place for place, block in enumerate(blocks)}
        for name, calls in self.calls.items():
            home = self.home[name]
            place = places[home] if home is not None else calls[0][0] if calls else len(blocks)
            members.setdefault((place, home is not None), []).append(name)
        # Outside targets at a place run before the block at that place.
        found = []
        for (place, is_block), names in sorted(members.items(), key=lambda item: (item[0][0], item[0][1])):
            where = blocks[place].name if is_block else f"outside {place}" if blocks else "the model"
            idle = tuple(name for name in names if not self.calls[name])
            found.append(Segment(where, place, tuple(names), is_block, idle))
        return found


def _not_chained(model: nn.Module, run: Run, sample: Any, blocks: Sequence[Block], trace: _Trace) -> str | None:
    """A stack whose blocks are given or make something else when those before them only hand on the last output."""
    if not blocks:
        return None
    driver = Driver(model, run, blocks)
    last: dict[str, Any] = {}

    noted = ""

    def given(forward: Any, args: Any, kwargs: Any) -> Any:
        nonlocal noted
        noted = checksum([args, dict(kwargs)])
        return forward(*args, **kwargs)

    def reach(index: int) -> Any:
        try:
            return driver.reach(sample, index, lambda stack: _copied(last[stack]), given)
        except SparsetrainError:
            raise
        except Exception:  # the model's own code stumbled over a stub: whatever it says, this is no chain
            return None

    for index in range(len(blocks) + 1):
        outside = [layer for layer in trace.outside if trace.calls[layer][-1][0] == index]
        if index == len(blocks) and not outside:
            break
        found: dict[str, str] = {}
        with ExitStack() as hooks:
            for layer in outside:
                hooks.callback(trace.targets[layer].register_forward_pre_hook(_noting(found, layer)).remove)
            met = reach(index)
        name = blocks[index].name if index < len(blocks) else None
        same = name is None or (met is not None and noted == trace.given[name] and _near(met, trace.output[name]))
        if not (same and all(found.get(layer) == trace.outside[layer] for layer in outside)):
            return blocks[min(index, len(blocks) - 1)].stack
        if name is not None:
            last[blocks[index].stack] = trace.output.pop(name)
    return None


def _near(one: Any, other: Any) -> bool:
    """Whether two outputs hold the same stream but for rounding (kernels may differ with hooks); NaN is like anything."""
    new, old = _first(one), _first(other)
    if new is None or old is None or new.shape != old.shape:
        return False
    return not bool((new - old).float().norm() > 0.01 * old.float().norm())


def _noting(found: dict[str, str], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        found[name] = checksum(args)

    return hook


def _first(output: Any) -> Tensor | None:
    """The stream in what a block returns: a tensor, or the first entry of a tuple; None if it is neither."""
    stream = output[0] if isinstance(output, tuple) and output else output
    return stream if isinstance(stream, Tensor) and stream.is_floating_point() else None


def _copied(output: Any) -> Any:
    """An output whose stream is a copy: what comes after may write into it."""
    stream = _first(output)
    return output if stream is None else with_stream(output, stream.clone())


def stream_of(output: Any, name: str) -> Tensor:
    """The stream in what a block returns. Raises `SparsetrainError` if there is none."""
    found = _first(output)
    if found is None:
        raise SparsetrainError(f"block {name} returns {type(output).__name__}, which holds no stream of numbers")
    return found


def with_stream(output: Any, stream: Tensor | None) -> Any:
    """What a block returns, with another stream in it."""
    return (stream, *output[1:]) if isinstance(output, tuple) else stream
