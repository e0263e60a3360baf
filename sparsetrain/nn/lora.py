"""LoRA that keeps zeros: the effective weight is ``W + m * (s * B A)``, in training as after merging.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds ``s * B A`` to a frozen weight W; that product is dense, so merging it fills the
zeros of a pruned W. Here it is multiplied by the mask m (1 where a weight is alive), as in SPP (Lu et al. 2024, arXiv
2405.16057) and LoRS (Hu et al. 2025, arXiv 2501.08582), in the forward pass too: what is trained is what is merged.

The product is as large as W. It is made anew where it is needed, also in the backward pass, and never kept in between (as in
LoRS), so that a layer keeps its input alive and no more. Everything else is PEFT's: scaling (rsLoRA too), dropout,
initialization. The layer is what PEFT calls a custom module (``LoraConfig._register_custom_module``).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparsetrain.errors import PatternError, RecipeError

#: The name PEFT knows the adapter by.
ADAPTER = "default"


def effective_weight(
    weight: Tensor | None, a: Tensor, b: Tensor, mask: Tensor | None, scaling: float, transposed: bool = False
) -> Tensor:
    """``W + m * (s * B A)`` as stored: (out, in), or (in, out) if ``transposed`` (transformers' Conv1D).

    Args:
        weight: W as stored, or None for the product alone.
        a: (rank, in).
        b: (out, rank).
        mask: m as stored, bool, True = alive; None for no zeros to keep.
        scaling: s = alpha / rank, or alpha / sqrt(rank) (rsLoRA).
        transposed: W is stored with inputs first.

    Computed in the precision of ``a``, rounded once to that of W. Where the mask is False it is exactly W.
    Example: ``effective_weight(torch.eye(2), torch.ones(1, 2), torch.ones(2, 1), torch.eye(2).bool(), 1.0)`` is ``2 * eye(2)``.
    """
    product = a.t() @ b.t() if transposed else b @ a
    product *= scaling
    if mask is not None:
        product *= mask
    if weight is None:
        return product
    return product.add_(weight) if weight.dtype == product.dtype else (weight.to(product.dtype) + product).to(weight.dtype)


class _MaskedLora(torch.autograd.Function):
    """``x`` times the effective weight, which is recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        scaling: float,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, weight, mask)
        ctx.scaling, ctx.transposed = scaling, transposed
        # In half precision the product is rounded once, where the merged weight would be.
        with torch.autocast(x.device.type, enabled=False):
            full = effective_weight(weight, a, b, mask, scaling, transposed).to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
            if not transposed:
                return F.linear(x, full, bias)
            # As Conv1D does it, so that the merged layer gives the same bits.
            rows = x.reshape(-1, x.shape[-1])
            flat = rows @ full if bias is None else torch.addmm(bias, rows, full)
            return flat.view(*x.shape[:-1], full.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, weight, mask = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 8
        out = grad.reshape(-1, grad.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                full = effective_weight(weight, a, b, mask, ctx.scaling, ctx.transposed).to(x.dtype)
                grads[0] = (out @ (full.t() if ctx.transposed else full)).view_as(x)
                del full
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                dense = (out.t() @ x.reshape(-1, x.shape[-1])).to(a.dtype)
                if mask is not None:
                    dense *= mask.t() if ctx.transposed else mask
                grads[1] = (b.t() @ dense) * ctx.scaling
                grads[2] = (dense @ a.t()) * ctx.scaling
            if ctx.needs_input_grad[4]:
                grads[4] = out.sum(0)
        return tuple(grads)


def masked_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    scaling: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """``x`` (..., in) times the transpose of `effective_weight`, plus ``bias``: (..., out).

    Differentiable once, with respect to x, a, b and bias; W is frozen. Between forward and backward only x is kept alive.
    Under autocast x and the effective weight are cast, as those of an ordinary layer would be.

    Example: ``masked_lora(x, a, b, mask, alpha / rank, layer.weight, layer.bias)``.
    """
    kind = x.device.type
    x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
    result: Tensor = _MaskedLora.apply(x, a, b, weight, bias, mask, scaling, transposed)  # type: ignore[no-untyped-call]
    return result


def plain_weight(layer: nn.Module) -> nn.Parameter | None:
    """The floating-point weight of a layer, as stored; None if it has another kind (quantized, sharded, packed)."""
    weight = layer._parameters.get("weight")
    return weight if type(weight) is nn.Parameter and weight.is_floating_point() else None


class MaskedLoraLinear(PeftLinear):
    """PEFT's LoRA layer around a Linear or Conv1D, its product masked. Made by `sparsetrain.nn.adapters.Adapters`.

    ``mask`` is a bool buffer as the weight is stored (True = alive; None: no zeros to keep), absent from the state dict. An
    ordinary layer's output is, to the bit, that of the merged layer on the same device; with dropout on, and around layers of
    another kind (quantized), it is ``base(x) + dropout(x) (m * (s * B A))^T``, and the base's weight is never looked at.

    Raises `RecipeError` for what PEFT could add and a mask cannot keep: a second adapter, DoRA and other variants, a bias of B.
    """

    mask: Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.register_buffer("mask", None, persistent=False)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone."""
        return {(): None}

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Make the adapter; there is one."""
        if len(self.lora_A) and adapter_name not in self.lora_A:
            raise RecipeError(f"a second adapter {adapter_name!r}: a masked LoRA layer holds one; merge the first")
        super().update_layer(adapter_name, *args, **kwargs)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter, float]:
        """A (rank, in), B (out, rank) and s."""
        a: Any = self.lora_A[ADAPTER].weight
        b: Any = self.lora_B[ADAPTER].weight
        return a, b, self.scaling[ADAPTER]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the effective weight."""
        base = self.get_base_layer()
        if self.disable_adapters or self.merged:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        a, b, scaling = self.factors
        dropout = self.lora_dropout[ADAPTER]
        weight = plain_weight(base) if not (args or kwargs) and _is_ordinary(base) else None
        if weight is not None and not weight.requires_grad and not (self.training and isinstance(dropout, nn.Dropout)):
            bias: Any = base.bias
            return masked_lora(x, a, b, self.mask, scaling, weight, bias, self.fan_in_fan_out)
        result = base(x, *args, **kwargs)
        inner = x if x.is_floating_point() and x.dtype == result.dtype else x.to(result.dtype)
        delta = masked_lora(dropout(inner), a, b, self.mask, scaling, transposed=self.fan_in_fan_out)
        return result + delta.to(result.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def get_delta_weight(self, adapter: str = ADAPTER) -> Tensor:
        """``m * (s * B A)`` as the weight is stored."""
        a, b, scaling = self.factors
        return effective_weight(None, a, b, self.mask, scaling, self.fan_in_fan_out)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The effective weight, checked: finite, and exactly 0.0 wherever the mask says so.

        Raises `PatternError` if it is not, and for a base whose weight is no ordinary floating-point one.
        """
        base = self.get_base_layer()
        weight = plain_weight(base)
        if weight is None:
            raise PatternError(
                f"the weight of a {type(base).__name__} is no ordinary floating-point tensor (it is quantized, packed or "
                "sharded), and rounding a merged one could move it and its zeros; save the adapter (Adapters.save), or merge "
                "it into the model before quantization"
            )
        a, b, scaling = self.factors
        full = effective_weight(weight, a, b, self.mask, scaling, self.fan_in_fan_out)
        if not bool(torch.isfinite(full).all()):
            raise PatternError("the merged weights would hold NaN or infinity; training has diverged")
        revived = 0 if self.mask is None else int(torch.count_nonzero(full[~self.mask]))
        if revived:
            raise PatternError(f"{revived} pruned weights would not be zero after merging: the mask is not that of the weight")
        return full

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight into the base, once. Raises `PatternError` as `merged_weight` does, writing nothing."""
        if not self.merged:
            full = self.merged_weight()
            weight: Any = self.get_base_layer().weight
            weight.copy_(full)
            self.merged_adapters.append(ADAPTER)

    def unmerge(self) -> None:
        """Refused with a `RecipeError`: subtracting does not give the rounded weights back."""
        if self.merged:
            raise RecipeError("merged adapters cannot be taken out exactly; start again from the checkpoint and the adapter")


def _is_ordinary(layer: nn.Module) -> bool:
    """The forward pass is that of Linear or Conv1D, and nobody listens to it."""
    plain = type(layer).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(layer)
    return plain and not (layer._forward_hooks or layer._forward_pre_hooks)
