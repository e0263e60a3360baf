"""Which format is fastest is measured on this machine: for each layer with zeros, at the batch sizes it will meet.

Zeros buy speed only in a format that skips them, and each format pays from another sparsity on (measured on a 1024 x 4096
layer, one thread: dead rows and columns at once, 16x16 blocks and single weights from about 75 to 90 %). So nothing is
assumed: the candidates race, the winner is measured once more against dense, and what is not at least 5 % faster at *every*
batch size stays dense. Asking for fewer batch sizes can therefore give more speed: name those that will be run.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.errors import ExportError, RecipeError, nearest
from sparsetrain.export.inference import Choice, InferenceModel, LayerFormat
from sparsetrain.export.layers import FastLayer, block_of, kind_of, matrix_of, stored_share
from sparsetrain.export.places import (
    Place,
    convert,
    device_of,
    probe,
    put,
    require_equal,
    require_plain,
    survey,
    tensors_of,
    twin,
)
from sparsetrain.export.speed import Sample, Speed, compare, measure_speed, race, run_on, thread_count

FORMATS = ("dense", "compact", "csr", "bsr:8x8", "bsr:16x16", "bsr:32x32")
#: A format must be so many times faster than dense.
FASTER = 1.05
#: Formats are tried only where they compute with at most this share of the weights; above they have never paid.
_WORTH = {"compact": 0.95, "csr": 0.5, "bsr": 0.5}


def for_inference(
    model: nn.Module,
    sample: Sample | None = None,
    batch_sizes: Sequence[int] = (1, 64),
    threads: int | None = None,
    formats: Sequence[str] = FORMATS,
    tolerance: float = 1e-4,
) -> InferenceModel:
    """A copy of a sparse model in eval mode whose layers run in the fastest format, measured here.

    Candidates are Linear, transformers' Conv1D and 1x1 Conv2d layers with at least 5 % zeros. Convolutions need a sample, which
    tells the size of their images. What has zeros and stays dense is told with the reason (``choice.left``).

    Args:
        model: the model; it is copied, not changed. Its weights hold plain zeros (masks enforced, adapters merged).
        sample: what the model is called with (a tensor, a tuple of arguments, a dictionary of keyword arguments); the whole
            copy is then verified and measured on it.
        batch_sizes: how many vectors a Linear gets at once (a sequence counts each of its tokens), images for a convolution.
        threads: torch's threads while measuring, as the model will run; None: as many as now.
        formats: what may be chosen: ``dense``, ``compact``, ``csr``, ``bsr:RxC``; what does not run on the model's device is
            left out.
        tolerance: ``max |y - y_dense| / max |y_dense|`` allowed, of each layer (else the format is not taken) and of the whole
            model (else `ExportError`); at least 8 roundings of the layer's type.

    Raises `RecipeError` for an unknown format or batch size, `ExportError` for a parametrized model or one that differs.
    Example: ``fast = for_inference(model, torch.randn(1, 784)); print(fast.choice); fast(x)``.
    """
    sizes = _check(batch_sizes, formats, tolerance)
    require_plain(model)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    places, left = survey(model)
    images, dense_output = _run_dense(model, places, sample)
    rows: list[LayerFormat] = []
    layers: list[tuple[Place, FastLayer]] = []
    known: dict[Any, _Measured] = {}
    with thread_count(threads) as count, torch.no_grad():
        for place in places:
            image = images.get(id(place.module))
            if kind_of(place.module) == "pointwise" and image is None:
                left[f"{place.name}.weight".removeprefix(".")] = (
                    "without a sample that reaches it the size of its images is unknown"
                )
                continue
            row, layer = _choose(place, image, sizes, formats, tolerance, known)
            rows.append(row)
            if layer is not None:
                layers.append((place, layer))
        dense = twin(model)
        for place, layer in layers:
            model = put(model, place, layer)
        whole, difference = _whole(dense, model, sample, dense_output, tolerance, bool(layers))
    if whole is not None and whole.high < 1:
        model, rows, difference = dense, [_back_to_dense(row) for row in rows], 0.0
    choice = Choice(rows, left, sizes, count, device_of(model), tolerance, whole, difference)
    return InferenceModel(model, choice)


def _check(batch_sizes: Sequence[int], formats: Sequence[str], tolerance: float) -> tuple[int, ...]:
    try:
        sizes = tuple(dict.fromkeys(map(operator.index, batch_sizes)))
    except TypeError:  # no sequence, or not of whole numbers
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise RecipeError(f"batch_sizes={batch_sizes!r}: give numbers of vectors, 1 or more, such as (1, 64)")
    if isinstance(formats, str):
        raise RecipeError(f"formats={formats!r} is one text; give a tuple, such as ({formats!r},)")
    for form in formats:
        if form not in FORMATS and block_of(form) == (0, 0):
            raise RecipeError(f"format {form!r} is unknown; there are {', '.join(FORMATS)}.{nearest(form, FORMATS)}")
    if not 0 < tolerance < 1:
        raise RecipeError(f"tolerance={tolerance}: give a relative difference between 0 and 1, such as 1e-4")
    return sizes


def _run_dense(
    model: nn.Module, places: Sequence[Place], sample: Sample | None
) -> tuple[dict[int, tuple[int, int]], list[Tensor]]:
    """Image sizes of the 1x1 convolutions by module id, and what the dense model gives for the sample."""
    if sample is None:
        return {}, []
    images: dict[int, tuple[int, int]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        images[id(module)] = (output.shape[-2], output.shape[-1])

    hooks = [p.module.register_forward_hook(note) for p in places if kind_of(p.module) == "pointwise"]
    try:
        with torch.no_grad():
            output = run_on(model, sample)
    finally:
        for hook in hooks:
            hook.remove()
    return images, tensors_of(output)


@dataclass
class _Measured:
    """What holds for every layer of one shape, type and share of zeros."""

    format: str
    speed: dict[int, float]
    tried: dict[str, dict[int, float]]
    notes: dict[str, str]


def _choose(
    place: Place,
    image: tuple[int, int] | None,
    sizes: tuple[int, ...],
    formats: Sequence[str],
    tolerance: float,
    known: dict[Any, _Measured],
) -> tuple[LayerFormat, FastLayer | None]:
    """The row of a layer and the layer to put there (None: dense); equal layers are measured once, each is verified."""
    module = place.module
    alive = matrix_of(module) != 0
    forms = [form for form in formats if form != "dense" and stored_share(alive, form) <= _WORTH[form.split(":")[0]]]
    shares = [round(float(part.float().mean()), 2) for part in (alive, alive.any(1), alive.any(0))]
    shares += [round(stored_share(alive, form), 2) for form in forms]
    weight = module.get_parameter("weight")
    key = (kind_of(module), weight.shape, weight.dtype, module._parameters.get("bias") is None, image, *shares, *forms)
    candidates: dict[str, tuple[FastLayer, float]] = {}
    notes: dict[str, str] = {}
    for form in [known[key].format] if key in known else forms:
        if form != "dense":
            try:
                candidates[form] = convert(module, form, tolerance, image)
            except ExportError as error:
                notes[form] = str(error)
    measured = known.get(key)
    if measured is None:
        layers = {form: layer for form, (layer, _) in candidates.items()}
        measured = known[key] = _measure(module, layers, [(size, probe(module, size, image)) for size in sizes])
        measured.notes = notes
    form = measured.format
    sparsity = 1 - float(alive.float().mean())
    shape = tuple(alive.shape)
    if form not in candidates:  # dense; or the format of its equals does not fit this one
        ones = dict.fromkeys(sizes, 1.0)
        return LayerFormat(place.names, shape, sparsity, "dense", ones, 0.0, measured.tried, measured.notes | notes), None
    layer, difference = candidates[form]
    row = LayerFormat(place.names, shape, sparsity, form, measured.speed, difference, measured.tried, measured.notes)
    return row, layer


def _measure(module: nn.Module, layers: dict[str, FastLayer], inputs: list[tuple[int, Tensor]]) -> _Measured:
    """Race all candidates, then measure the fastest against dense alone: the winner of a race was also lucky."""
    tried: dict[str, dict[int, float]] = {form: {} for form in layers}
    if layers:
        ways = [module, *layers.values()]
        for size, x in inputs:
            times = race([lambda way=way, x=x: way(x) for way in ways], rounds=5, seconds=3.0)  # type: ignore[misc]
            for form, seconds in zip(layers, times[1:], strict=True):
                tried[form][size] = compare(times[0], seconds).ratio
    hopeful = [form for form in layers if min(tried[form].values()) >= 1]
    for form in sorted(hopeful, key=lambda form: -math.prod(tried[form].values())):
        speeds: dict[int, Speed] = {}
        for size, x in inputs:
            speeds[size] = measure_speed(module, layers[form], x, seconds=3.0)
            if speeds[size].ratio < FASTER or speeds[size].low < 1:
                break
        else:
            return _Measured(form, {size: speed.ratio for size, speed in speeds.items()}, tried, {})
    return _Measured("dense", dict.fromkeys((size for size, _ in inputs), 1.0), tried, {})


def _back_to_dense(row: LayerFormat) -> LayerFormat:
    notes = row.notes if row.format == "dense" else {**row.notes, row.format: "the whole model was slower on the sample"}
    return replace(row, format="dense", speed=dict.fromkeys(row.speed, 1.0), difference=0.0, notes=notes)


def _whole(
    dense: nn.Module, fast: nn.Module, sample: Sample | None, expected: list[Tensor], tolerance: float, changed: bool
) -> tuple[Speed | None, float | None]:
    if sample is None:
        return None, None
    found = tensors_of(run_on(fast, sample))
    if len(found) != len(expected) or not expected:
        raise ExportError(
            f"the dense model gives {len(expected)} floating-point tensors for the sample and the copy {len(found)}: give a "
            "sample for which it returns tensors, in a tuple, list or mapping"
        )
    pairs = enumerate(zip(found, expected, strict=True))
    difference = max(require_equal(a, b, f"output {index} of the whole model", tolerance) for index, (a, b) in pairs)
    return (measure_speed(dense, fast, sample, rounds=7) if changed else None), difference
