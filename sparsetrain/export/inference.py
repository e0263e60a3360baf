"""A model for inference: its layers in the formats that were measured to be fastest, what was measured, and both at rest.

On disk it is a folder with two files: ``model.safetensors``, the dense weights under all of their plain names, which any
program loads, and ``formats.json``, the choice and the table. Loading needs no measuring, but verifies each layer again.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsetrain.errors import ExportError, MaskStateError
from sparsetrain.export.layers import kind_of, matrix_of
from sparsetrain.export.places import Place, convert, device_of, put, require_plain
from sparsetrain.export.speed import Speed
from sparsetrain.writing import whole_folder

_WEIGHTS, _CHOICE, _VERSION = "model.safetensors", "formats.json", 1


@dataclass(frozen=True)
class LayerFormat:
    """What a layer runs in, and why.

    ``names``: every name it is reached by; ``shape``: (out, in); ``sparsity``: fraction of zeros; ``format``: what was chosen;
    ``speed``: batch size -> how many times faster than dense, 1 for dense itself; ``difference``: ``max |y - y_dense|`` on
    random input; ``tried``: format -> batch size -> ratio of a first short race; ``notes``: format -> why it was left out.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    sparsity: float
    format: str
    speed: dict[int, float]
    difference: float = 0.0
    tried: dict[str, dict[int, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What was measured for a whole model: ``layers`` with zeros; ``left``: tensors with zeros that stay dense, and why.

    ``threads``: torch's threads while measuring; ``whole``: the model's speed on the sample, and ``difference``: ``max |y -
    y_dense|`` of its outputs there; both None without a sample.
    """

    layers: list[LayerFormat]
    left: dict[str, str]
    batch_sizes: tuple[int, ...]
    threads: int
    device: str
    tolerance: float
    whole: Speed | None = None
    difference: float | None = None

    def __str__(self) -> str:
        if not self.layers:
            reasons = "".join(f"\n  {name} stays dense: {why}" for name, why in self.left.items())
            return "no layer has zeros that another format could use: the model stays dense" + reasons
        head = "".join(f"{f'batch {size}':>11}" for size in self.batch_sizes)
        wide = max(len(row.names[0]) for row in self.layers) + 2
        lines = [f"{'layer':<{wide}}{'shape':>14}{'zeros':>9}  {'format':<10}{head}{'differs':>10}"]
        for row in self.layers:
            shape = "x".join(map(str, row.shape))
            ratios = "".join(f"{row.speed[size]:>10.2f}x" for size in self.batch_sizes)
            lines.append(
                f"{row.names[0]:<{wide}}{shape:>14}{row.sparsity:>9.2%}  {row.format:<10}{ratios}{row.difference:>10.1e}"
            )
            if row.format == "dense" and row.tried:
                best = max(row.tried, key=lambda form, row=row: min(row.tried[form].values()))  # type: ignore[misc]
                lines[-1] += f"  ({best} {', '.join(f'{ratio:.2f}x' for ratio in row.tried[best].values())})"
        lines.append(
            f"times faster than dense on {self.device}, {self.threads} threads; dense unless 5 % faster at each batch size"
        )
        lines += [f"{name} stays dense: {why}" for name, why in self.left.items()]
        lines += sorted({f"{form} left out: {why}" for row in self.layers for form, why in row.notes.items()})
        if self.whole is not None:
            lines.append(f"whole model on the sample: {self.whole}, differs by {self.difference:.1e}")
            if self.whole.high < 1:
                lines.append(
                    "that is slower, so every layer stays dense; give batch_sizes as layers meet them (tokens, images)"
                )
        return "\n".join(lines)


class InferenceModel(nn.Module):
    """A sparse model in the formats that run fastest; made by `for_inference` or `InferenceModel.load`.

    ``model`` is the copied model itself, with its own methods (``generate``); ``choice`` is what was measured, and prints as a
    table. ``state_dict()`` is the dense one under the plain names, equal to that of the model this was made from. It runs
    without gradients and only in eval mode, and takes no other weights. Example: ``print(for_inference(model).choice)``.
    """

    def __init__(self, model: nn.Module, choice: Choice) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.choice = choice
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives. Raises `ExportError` for an input that wants a gradient."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*args, *kwargs.values()) if isinstance(t, Tensor)):
            self._refuse("an input wants a gradient")
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> InferenceModel:
        """Only ``train(False)``, that is ``eval()``. Raises `ExportError`."""
        return self._refuse("train() was called") if mode else self

    def requires_grad_(self, requires_grad: bool = True) -> InferenceModel:
        """Only ``requires_grad_(False)``. Raises `ExportError`."""
        return self._refuse("requires_grad_() was called") if requires_grad else self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The dense weights under their plain names: the model this was made from loads them with ``strict=True``."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `ExportError`: other weights have other zeros."""
        self._refuse("load_state_dict() was called")

    def _refuse(self, why: str) -> NoReturn:
        raise ExportError(
            f"{why}, but this model is for inference only: its formats have no gradients and fit these zeros. Train or load "
            "the model it was made from, and call for_inference on that"
        )

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` (dense; tied tensors under each name) and ``formats.json`` into a folder; returns it.

        Raises `ExportError` for a state that is no tensor, or where the disk refuses; the folder is as it was then.
        Example: ``InferenceModel.load(fast.save("exported"), Net())``.
        """
        state = self.state_dict()
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise ExportError(
                    f"{name} is a {type(value).__name__}, and safetensors files hold only tensors: let get_extra_state return "
                    "one, or keep it elsewhere"
                )
        # A copy of each: safetensors refuses tensors that share memory.
        weights = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in state.items()}
        record = {"version": _VERSION, "torch": torch.__version__, "choice": asdict(self.choice)}
        with whole_folder(Path(folder), "the model", ExportError) as partial:
            save_file(weights, partial / _WEIGHTS, {"format": "pt"})
            (partial / _CHOICE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> InferenceModel:
        """Read what `save` wrote into a copy of ``model`` (the architecture, with any weights), without measuring again.

        Every layer is verified again. Raises `MaskStateError` for what is not there, damaged, of another model, another major
        version of torch, another type or kind of device, `ExportError` for a parametrized model or a format that does not run.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / _CHOICE).read_text(encoding="utf-8"))
            weights = load_file(folder / _WEIGHTS)
            choice = _choice(record["choice"])
            version, made_with = record["version"], str(record["torch"])
        except Exception as error:
            raise MaskStateError(
                f"{folder} holds no model for inference that can be read ({type(error).__name__}: {error}); write it with "
                "InferenceModel.save"
            ) from error
        again = "measure again: for_inference(model) with the weights of model.safetensors"
        if version != _VERSION or made_with.split(".")[0] != torch.__version__.split(".")[0]:
            raise MaskStateError(
                f"{folder} was written with torch {made_with} (layout {version}), this is torch {torch.__version__} (layout "
                f"{_VERSION}): which format is fastest may differ; {again}"
            )
        require_plain(model)
        model = copy.deepcopy(model).eval()
        device = device_of(model)
        if device != choice.device:
            raise MaskStateError(
                f"{folder} was measured on {choice.device}, this model is on {device}; move it there, or {again}"
            )
        for name, own in model.state_dict().items():
            stored = weights.get(name)
            if stored is not None and isinstance(own, Tensor) and own.dtype != stored.dtype:
                raise MaskStateError(
                    f"{folder} holds {name} in {stored.dtype}, this {type(model).__name__} in {own.dtype}: loading would "
                    f"change its type; call model.to({stored.dtype}) first"
                )
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise MaskStateError(
                f"{folder} holds the weights of another model than this {type(model).__name__}: {error}"
            ) from error
        return cls(_restore(model, choice, again), choice)


def _restore(model: nn.Module, choice: Choice, again: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    for row in choice.layers:
        if row.format == "dense":
            continue
        module = modules.get(row.names[0])
        if module is None or kind_of(module) is None or tuple(matrix_of(module).shape) != row.shape:
            raise MaskStateError(f"layer {row.names[0]!r} of shape {row.shape} is not in this {type(model).__name__}; {again}")
        try:
            layer, _ = convert(module, row.format, choice.tolerance)
        except ExportError as error:
            raise ExportError(f"{row.names[0]}: {error}; {again}") from error
        model = put(model, Place(row.names, module), layer)
    return model


def _choice(given: Mapping[str, Any]) -> Choice:
    def by_size(ratios: Mapping[str, float]) -> dict[int, float]:
        return {int(size): ratio for size, ratio in ratios.items()}

    rows = []
    for row in given["layers"]:
        tried = {form: by_size(ratios) for form, ratios in row["tried"].items()}
        read = {"names": tuple(row["names"]), "shape": tuple(row["shape"]), "speed": by_size(row["speed"]), "tried": tried}
        rows.append(LayerFormat(**{**row, **read}))
    whole = None if given["whole"] is None else Speed(**given["whole"])
    return Choice(**{**given, "layers": rows, "batch_sizes": tuple(given["batch_sizes"]), "whole": whole})
