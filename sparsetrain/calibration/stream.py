"""Block-by-block streaming: every batch is taken through one block at a time, and only what the next block is given is kept.

What is kept is, for each batch, the last output of each stack; arguments around it (masks, positions) are made anew by the
model's own code whenever a block runs (`stacks`). Memory: the hidden states of all samples, on the device, in main memory or
in memory-mapped files, and what one block needs for one batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsetrain.calibration.data import first_sample, mapped, tensors_in
from sparsetrain.calibration.driver import Driver, Run
from sparsetrain.calibration.layers import LayerWatch
from sparsetrain.calibration.stacks import Segment, segments, stream_of, with_stream
from sparsetrain.errors import MaskStateError, RecipeError
from sparsetrain.masks.tensor import MaskedTensor

Offload = Literal["cpu", "disk"] | None


class Stream:
    """Batches on their way through a model, all at the same place.

    Args:
        model: at rest (`calibration.rest.at_rest`).
        tensors: the targets; their layers are what is measured.
        run: gives a batch to the model.
        data: the batches, any number of times the same.
        dtype: the floating type blocks run in; None, and the model's own: as they are. A half-precision type is that of
            products alone (autocast): what a block adds up and normalizes is float32, and so is what it hands on, and the input
            of a layer after a norm. Weights stay as they are.
        offload: where hidden states wait: ``"cpu"``, ``"disk"`` (memory-mapped files in ``folder``), None: where they are.
        folder: for ``"disk"``.
        tick: called after every batch.

    Raises what the model raises for the first sample. Example::

        stream = Stream(model, list(manager), model, batches)
        for segment in stream.segments:
            watch = LayerWatch(stream.tensors_of(segment), criterion)
            stream.measure(segment, watch)
            watch.finish()
            ...                      # prune segment.targets
            stream.advance(segment)
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Sequence[MaskedTensor],
        run: Run,
        data: Sequence[Any],
        dtype: torch.dtype | None = None,
        offload: Offload = None,
        folder: Path | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        layers = {t.name: t.target.module for t in tensors}
        plain = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.dtype = None if dtype == plain else dtype
        with _autocast(model, self.dtype):  # the order of calls is the same, and found in half the time
            self.blocks, self.segments = segments(model, run, first_sample(data[0]), layers)
        self.driver = Driver(model, run, self.blocks)
        self.tensors = {t.name: t for t in tensors}
        self.data = data
        self.tick = tick
        self.hidden = Hidden(None if self.dtype is None else plain, offload, folder)

    def tensors_of(self, segment: Segment) -> list[MaskedTensor]:
        """The targets of a segment."""
        return [self.tensors[name] for name in segment.targets]

    def is_last(self, segment: Segment) -> bool:
        """Whether nothing is measured after it."""
        return segment is self.segments[-1]

    def measure(self, segment: Segment, watch: LayerWatch, keep: bool = False) -> Any:
        """Show a criterion what the layers of a segment are given; returns what its block returns for the first batch.

        From the second batch on a block ends right after its last layer has been shown. ``keep``: it runs to its end, and
        its outputs, but for the first batch, are what the next block will be given; see `put`. Raises `DivergedError` for
        values that are not finite, `NotShared` if layers must be measured each for itself.
        """
        first = None
        with watch.on(), self._cast(segment):
            for item in range(len(self.data)):
                with watch.forward(f"{segment.name}, batch {item}", stop=not keep):
                    output = self._run(segment, item)
                if item == 0:
                    first = output
                elif keep:
                    self.put(segment, item, output)
                self.tick()
        return first

    def advance(self, segment: Segment) -> Any:
        """Take every batch through a block as it is now; returns what it returns for the first."""
        first = None
        if segment.is_block:
            with self._cast(segment):
                for item in range(len(self.data)):
                    output = self._run(segment, item)
                    self.put(segment, item, output)
                    first = output if item == 0 else first
                    self.tick()
        return first

    def peek(self, segment: Segment) -> Any:
        """What a block as it is now returns for the first batch."""
        with self._cast(segment):
            return self._run(segment, 0)

    def put(self, segment: Segment, item: int, output: Any) -> None:
        """Keep what a block returned for one batch: what the next block will be given."""
        if segment.is_block:
            block = self.blocks[segment.index]
            self.hidden.put(block.stack, item, output, stream_of(output, block.name))

    def _run(self, segment: Segment, item: int) -> Any:
        def meet(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if self.dtype is None:
                return forward(*args, **kwargs)
            dtype, stream = self.dtype, next(tensors_in([args, kwargs]), None)
            args, kwargs = mapped([args, kwargs], lambda tensor: _float(tensor, None if tensor is stream else dtype))
            with _autocast(self.driver.modules[segment.index], dtype):
                return forward(*args, **kwargs)

        def carried(stack: str) -> Any:
            return self.hidden.get(stack, item)

        return self.driver.reach(self.data[item], segment.index, carried, meet if segment.is_block else None)

    @contextmanager
    def _cast(self, segment: Segment) -> Iterator[None]:
        module = self.driver.modules[segment.index] if segment.is_block else None
        with nullcontext() if module is None or self.dtype is None else _cast(module):
            yield


@contextmanager
def _cast(module: nn.Module) -> Iterator[None]:
    """A module in float32 inside the ``with``, all of which is one autocast; the values themselves come back afterwards."""
    cast: list[Tensor] = [p for p in module.parameters() if p.is_floating_point()]
    needed = [p.requires_grad for p in cast]
    # Buffers may be positions or frequencies that need their precision; those of batch norms must go with the weights.
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    values = [(t, t.data) for t in (*cast, *(b for norm in norms for b in norm.buffers() if b.is_floating_point()))]
    try:
        for tensor, value in values:
            tensor.data = value.float()
        for parameter in cast:  # autocast keeps what it made of a weight, to its own end, if that needs a gradient
            parameter.requires_grad_(True)
        with _autocast(module, None):
            yield
    finally:
        for tensor, value in values:
            tensor.data = value
        for parameter, need in zip(cast, needed, strict=True):
            parameter.requires_grad_(need)


def _autocast(module: nn.Module, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to a half-precision type, off for None and for all others, on the device of a module."""
    device = next((p.device.type for p in module.parameters()), "cpu")
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device, dtype if half else None, enabled=half)


def _float(tensor: Tensor, products: torch.dtype | None) -> Tensor:
    """In float32; an additive mask, which is as low as its type goes, is no lower than ``products`` go, which take it in."""
    if not tensor.is_floating_point():
        return tensor
    wide = tensor.float()
    if products is not None and bool((tensor == torch.finfo(tensor.dtype).min).any()):
        # Made -inf, rows of nothing else would give NaN.
        return wide.clamp_min(torch.finfo(products).min)
    return wide


class Hidden:
    """What each stack's last block returned, for every batch: hidden states, parked where they are asked to be.

    ``dtype``: what they are handed on as; None: as the block gave them.
    """

    def __init__(self, dtype: torch.dtype | None, offload: Offload, folder: Path | None) -> None:
        self.dtype = dtype
        self.offload = offload
        self.folder = folder
        self._streams: dict[tuple[str, int], Tensor] = {}
        self._shells: dict[tuple[str, int], Any] = {}
        self._like: dict[tuple[str, int], Tensor] = {}
        self._files: dict[tuple[str, int], Path] = {}

    def put(self, stack: str, item: int, output: Any, stream: Tensor) -> None:
        """Keep one output; ``stream`` is the hidden state in it."""
        key = stack, item
        # What the model's own code is given is as it was: same type, same device.
        self._like[key] = stream.new_empty(0, dtype=self.dtype or stream.dtype)
        self._shells[key] = with_stream(output, None)
        self._streams[key] = self._parked(key, stream.detach())

    def _parked(self, key: tuple[str, int], stream: Tensor) -> Tensor:
        if self.offload == "disk":
            assert self.folder is not None
            path = self._files.setdefault(key, self.folder / f"hidden-{len(self._files)}.bin")
            there = self._streams.get(key)
            if there is None or (there.shape, there.dtype) != (stream.shape, stream.dtype):
                path.unlink(missing_ok=True)
                there = torch.from_file(str(path), shared=True, size=stream.numel(), dtype=stream.dtype).view(stream.shape)
            return there.copy_(stream)
        own = stream.cpu() if self.offload == "cpu" else stream
        whole = own.is_contiguous() and own.untyped_storage().nbytes() == own.numel() * own.itemsize
        return own if whole else own.contiguous().clone()

    def get(self, stack: str, item: int) -> Any:
        """An output to hand on; its hidden state is a copy."""
        key = stack, item
        return with_stream(self._shells[key], self._streams[key].to(self._like[key], copy=True))

    def clear(self) -> None:
        """Forget everything: the stream is before the first block again."""
        for kept in (self._streams, self._shells, self._like):
            kept.clear()

    def save(self, path: Path) -> None:
        """Write everything to a file. Raises `RecipeError` for outputs that hold other things than tensors."""
        tensors: dict[str, Tensor] = {}
        about: list[Any] = []
        for number, (key, stream) in enumerate(self._streams.items()):
            shell = self._shells[key]
            parts = shell[1:] if isinstance(shell, tuple) else ()
            if not all(part is None or isinstance(part, Tensor) for part in parts):
                raise RecipeError(
                    f"blocks of {key[0]} return more than tensors: such a run cannot be resumed; leave `work` out"
                )
            tensors |= {f"{number}.0": stream} | {
                f"{number}.{i}": part.detach().contiguous().clone() for i, part in enumerate(parts, 1) if part is not None
            }
            like = self._like[key]
            form = [part is not None for part in parts] if isinstance(shell, tuple) else None
            about.append([*key, form, str(like.dtype).removeprefix("torch."), str(like.device)])
        save_file(tensors, str(path), {"hidden": json.dumps(about)})

    def load(self, path: Path) -> None:
        """Read everything back. Raises `MaskStateError` for a file that is none."""
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                for number, (stack, item, form, dtype, device) in enumerate(json.loads(file.metadata()["hidden"])):
                    key = stack, item
                    like = torch.empty(0, dtype=getattr(torch, dtype), device=device)
                    parts = [
                        file.get_tensor(f"{number}.{i}").to(device) if there else None for i, there in enumerate(form or (), 1)
                    ]
                    self._like[key] = like
                    self._shells[key] = None if form is None else (None, *parts)
                    stream = file.get_tensor(f"{number}.0")
                    self._streams[key] = self._parked(key, stream if self.offload else stream.to(device))
        except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise MaskStateError(
                f"{path} cannot be read as hidden states ({error}); delete its folder and start anew"
            ) from error


def relative_error(found: Any, wanted: Any, name: str) -> float:
    """``||found - wanted|| / ||wanted||`` of two outputs of a block, in float32. Example: 0.0 for equal ones."""
    new, old = stream_of(found, name).float(), stream_of(wanted, name).float()
    size = float(torch.linalg.vector_norm(old))
    return float(torch.linalg.vector_norm(new - old)) / size if size else math.nan
