"""Layers that compute only with what is not zero. They stand in for Linear, transformers' Conv1D and 1x1 Conv2d layers.

- compact: rows of ``W`` (out, in) that are wholly zero are not computed, their output is the bias alone; columns that are
  wholly zero are not read: ``y[rows] = W[rows, cols] x[cols] + b[rows]``, a smaller dense product.
- CSR: the weights that are not zero, one by one, as ``W @ x.T`` (``F.linear(x, W)`` with a sparse ``W`` is 4 times slower).
- BSR: the same in blocks.

Indices are 32-bit: that halves what is read beside the weights, and MKL needs them so. What is zero is not multiplied: an input
that is infinite or NaN meets no ``0 * inf`` there, which is the one difference to the dense layer beyond rounding.
``state_dict`` writes the dense weight under its plain name.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.errors import ExportError


def kind_of(module: nn.Module) -> str | None:
    """``linear``, ``conv1d`` (transformers' layer, inputs first), ``pointwise`` (1x1 convolution), or None for any other.

    Example: ``kind_of(torch.nn.Linear(2, 3))`` is ``"linear"``.
    """
    if type(module) is nn.Linear:
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if type(module) is nn.Conv2d:
        plain = (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)
        return "pointwise" if plain and module.padding in ((0, 0), "valid", "same") else None
    return None


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a layer that has a kind, as ``(out, in)``: a view, detached."""
    weight = module.get_parameter("weight").detach()
    return weight.T if kind_of(module) == "conv1d" else weight.flatten(1)


def stored_share(alive: Tensor, form: str) -> float:
    """Share of the weights a format computes with, given where they are not zero (bool, ``(out, in)``).

    1 for blocks that do not divide the shape. Example: ``stored_share(torch.eye(4, dtype=torch.bool), "bsr:2x2")`` is 0.5.
    """
    if form == "compact":
        return float(alive.any(1).float().mean() * alive.any(0).float().mean())
    if form == "csr":
        return float(alive.float().mean())
    rows, cols = block_of(form)
    out, inputs = alive.shape
    if out % rows or inputs % cols:
        return 1.0
    blocks = alive.reshape(out // rows, rows, inputs // cols, cols)
    return float(blocks.any(3).any(1).float().mean())


def block_of(form: str) -> tuple[int, int]:
    """The block of a format's name. Example: ``block_of("bsr:16x8")`` is ``(16, 8)``; ``(0, 0)`` if it names none."""
    found = re.fullmatch(r"bsr:([1-9]\d*)x([1-9]\d*)", form)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def build(module: nn.Module, form: str) -> FastLayer:
    """The layer in a format: ``compact``, ``csr``, ``bsr:RxC``.

    Raises `ExportError` for blocks that do not divide the shape. Example: ``build(torch.nn.Linear(8, 8), "bsr:4x4")``.
    """
    if form == "compact":
        return Compact(module)
    rows, cols = block_of(form)
    out, inputs = matrix_of(module).shape
    if form != "csr" and (not rows or out % rows or inputs % cols):
        raise ExportError(f"{form}: a weight of shape {(out, inputs)} is not made of such blocks; take csr or leave it dense")
    return Sparse(module, None if form == "csr" else (rows, cols))


class FastLayer(nn.Module):
    """What the formats share: gradients, autocast and loading are refused; the saved state is the dense one."""

    bias: Tensor | None

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.kind = kind_of(source)
        self.shape: tuple[int, ...] = tuple(matrix_of(source).shape)
        self.dtype = source.get_parameter("weight").dtype
        bias = source._parameters.get("bias")
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.eval()

    @abstractmethod
    def matrix(self) -> Tensor:
        """The dense weight ``(out, in)``, made anew."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """The output for an input that `forward` has checked."""

    @property
    def weight(self) -> Tensor:
        """The dense weight as the layer before had it, made anew: for those who look at it, not for computing."""
        if self.kind == "conv1d":
            return self.matrix().T.contiguous()
        return self.matrix()[:, :, None, None] if self.kind == "pointwise" else self.matrix()

    def forward(self, x: Tensor) -> Tensor:
        """``W x + b`` for ``(..., in)``, of a 1x1 convolution for ``(N, in, H, W)``.

        Raises `ExportError` for gradients, autocast, or a type in which the format does not run.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise ExportError(
                "this model is for inference only: its sparse layers have no gradients. Run it under torch.no_grad(); train "
                "the model it was made from"
            )
        if torch.is_autocast_enabled(x.device.type):
            raise ExportError(
                "sparse layers do not run under autocast: their formats were measured in the type of the weights. Convert the "
                "model first (model.to(torch.bfloat16)) and make it for inference then"
            )
        try:
            return self.multiply(x)
        except RuntimeError as error:
            if x.dtype == self.dtype:
                raise
            raise ExportError(
                f"sparse layers made in {self.dtype} do not run in {x.dtype}: their formats were measured in the type of the "
                f"weights. Convert the model first (model.to({x.dtype})) and make it for inference then"
            ) from error

    def extra_repr(self) -> str:
        """The shape, and how many weights are kept."""
        return f"{self.shape[1]}, {self.shape[0]}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias

    def _load_from_state_dict(self, *given: Any, **named: Any) -> None:
        raise ExportError(
            "other weights have other zeros, so nothing can be loaded into a model made for inference; load them into the "
            "model it was made from and call for_inference again"
        )


class Compact(FastLayer):
    """A smaller dense product: without rows and columns that are wholly zero.

    Example: ``Compact(layer)(x)`` equals ``layer(x)`` for a ``torch.nn.Linear`` with dead neurons.
    """

    rows: Tensor | None
    cols: Tensor | None
    small: Tensor
    small_bias: Tensor | None

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        full = matrix_of(source)
        rows, cols = ((full != 0).any(dim).nonzero()[:, 0] for dim in (1, 0))
        self.register_buffer("rows", None if len(rows) == full.shape[0] else rows)
        self.register_buffer("cols", None if len(cols) == full.shape[1] else cols)
        small = full.index_select(0, rows).index_select(1, cols)  # a copy, contiguous
        self.register_buffer("small", small[:, :, None, None] if self.kind == "pointwise" else small)
        self.register_buffer("small_bias", None if self.bias is None else self.bias.index_select(0, rows))

    def matrix(self) -> Tensor:
        """The dense weight ``(out, in)``, made anew."""
        small = self.small.flatten(1)
        if self.cols is not None:
            small = small.new_zeros(small.shape[0], self.shape[1]).index_copy_(1, self.cols, small)
        if self.rows is not None:
            small = small.new_zeros(self.shape).index_copy_(0, self.rows, small)
        return small.clone()

    def multiply(self, x: Tensor) -> Tensor:
        """Select the inputs, multiply, put the outputs where they belong between the biases."""
        dim = -3 if self.kind == "pointwise" else -1
        if self.rows is not None and not len(self.rows):
            return self._idle(x, dim)
        inner = x if self.cols is None else x.index_select(dim, self.cols)
        product = F.conv2d if dim == -3 else F.linear
        y = product(inner, self.small, self.small_bias)
        return y if self.rows is None else self._idle(x, dim).index_copy_(dim, self.rows, y)

    def _idle(self, x: Tensor, dim: int) -> Tensor:
        shape = (*x.shape[:dim], self.shape[0], *x.shape[dim:][1:])
        if self.bias is None:
            return x.new_zeros(shape)
        bias = self.bias[:, None, None] if dim == -3 else self.bias
        return bias.expand(shape).clone(memory_format=torch.contiguous_format)  # never the bias itself: it is written to


class Sparse(FastLayer):
    """The weights that are not zero, one by one (CSR) or in blocks (BSR).

    Example: ``Sparse(layer, (16, 16))(x)`` equals ``layer(x)`` up to rounding.
    """

    crow: Tensor
    col: Tensor
    values: Tensor

    def __init__(self, source: nn.Module, block: tuple[int, int] | None) -> None:
        super().__init__(source)
        accept_beta()
        self.block = block
        self._held: Tensor | None = None
        full = matrix_of(source).contiguous()
        made = full.to_sparse_csr() if block is None else full.to_sparse_bsr(block)
        self.register_buffer("crow", made.crow_indices().int())
        self.register_buffer("col", made.col_indices().int())
        self.register_buffer("values", made.values().clone())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        accept_beta()  # unpickled in another process

    def _apply(self, fn: Any, recurse: bool = True) -> Sparse:
        self._held = None  # its parts move
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _sparse(self) -> Tensor:
        # A view of the buffers, made at the first call: torch can neither copy nor pickle a module that holds a sparse tensor,
        # and to make it in every call costs small layers more than their product.
        if self._held is None:
            make = torch.sparse_csr_tensor if self.block is None else torch.sparse_bsr_tensor
            self._held = make(self.crow, self.col, self.values, self.shape, check_invariants=False)
        return self._held

    def matrix(self) -> Tensor:
        """The dense weight ``(out, in)``, made anew."""
        return self._sparse().to_dense()

    def multiply(self, x: Tensor) -> Tensor:
        """``W @ x.T + b``, contiguous; image by image for a 1x1 convolution, whose inputs are columns already."""
        if self.kind == "pointwise":
            images = x.reshape(-1, x.shape[-3], math.prod(x.shape[-2:]))
            out = x.new_empty(images.shape[0], self.shape[0], images.shape[2])
            weight = self._sparse()
            for image, y in zip(images, out, strict=True):
                y.copy_(self._columns(weight, image))
            return out.view(*x.shape[:-3], self.shape[0], *x.shape[-2:])
        flat = x.reshape(-1, self.shape[1])
        if len(flat) == 1 and self.block is None:  # one vector: torch's CSR product of matrices takes twice as long
            y = self._sparse() @ flat[0] if self.bias is None else torch.addmv(self.bias, self._sparse(), flat[0])
        else:
            y = self._columns(self._sparse(), flat.T).T.contiguous()  # models call .view on what a Linear gives
        return y.view(*x.shape[:-1], self.shape[0])

    def _columns(self, weight: Tensor, columns: Tensor) -> Tensor:
        return weight @ columns if self.bias is None else torch.addmm(self.bias[:, None], weight, columns)


@functools.cache
def accept_beta() -> None:
    """Take note, once a process, that torch calls its CSR and BSR tensors beta: torch says so only at the first of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Sparse (CSR|BSR) tensor support is in beta", UserWarning)
        torch.ones(2, 2).to_sparse_csr()
        torch.ones(2, 2).to_sparse_bsr((2, 2))
