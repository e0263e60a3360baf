"""Experts that share a layer's work: what of them is seen, whichever way a model stores them, and what no sample uses.

Fused experts are slices of one tensor; others are modules side by side in a ``ModuleList`` or ``ModuleDict``, called the same
from there on. Either way a sample may be routed past some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsetrain.masks.tensor import MaskedTensor

#: What an expert's slice of a fused weight is multiplied by.
_PRODUCTS = (F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_LISTS = (nn.ModuleList, nn.ModuleDict)


class Products(TorchFunctionMode):
    """Sees the products with slices of fused weights: ``see(tensor, which expert, what it is given)``.

    Example: ``with Products(fused, see): model(x)``.
    """

    def __init__(self, tensors: Sequence[MaskedTensor], see: Callable[[MaskedTensor, int, Tensor], None]) -> None:
        super().__init__()
        self.tensors = tensors
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor) and args[1].ndim == 2:
            given, weight = args[0], args[1]
            where = weight.untyped_storage().data_ptr()
            for tensor in self.tensors:
                whole = tensor.target.parameter
                if where == whole.untyped_storage().data_ptr():
                    self.see(tensor, (weight.storage_offset() - whole.storage_offset()) // whole.stride(0), given)
        return func(*args, **(kwargs or {}))


def siblings(model: nn.Module, tensors: Iterable[MaskedTensor]) -> list[list[str]]:
    """Names of matrices that are called the same in modules side by side in one list, inner lists first.

    A list that lies in no other one holds blocks, or what the model is made of, and not experts: its items are no siblings.

    Example: ``h.0.experts.0.up.weight`` and ``h.0.experts.1.up.weight``; not ``h.0.q.weight`` and ``h.1.q.weight``.
    """
    known = {(id(t.target.module), t.target.attribute): t.name for t in tensors if len(t.target.shape) == 2}
    lists = {name: m for name, m in model.named_modules() if isinstance(m, (*_LISTS, nn.Sequential))}
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(lists, key=lambda name: -name.count(".")):
        inside = any(name.startswith(f"{outer}.") or (name and not outer) for outer in lists)
        for item in lists[name].children() if inside and isinstance(lists[name], _LISTS) else ():
            for path, module in item.named_modules():
                for attribute in module._parameters:
                    if (id(module), attribute) in known:
                        found.setdefault((name, f"{path}.{attribute}"), []).append(known[id(module), attribute])
    return [names for names in found.values() if len(names) > 1]


def unused(
    layers: Mapping[str, nn.Module], alike: Sequence[Sequence[str]], run: Callable[[Any], Any], batches: Iterable[Any]
) -> set[str]:
    """Which tensors' layers no batch calls, where none is called of their siblings either; no more is run than that takes.

    Args:
        layers: tensor name -> its layer, of those of which no call has been seen yet.
        alike: names of siblings; see `siblings`.
        run: gives a batch to the model.
        batches: the data.

    Example: ``unused({"idle.weight": model.idle}, [], model, [x])`` is ``{"idle.weight"}``.
    """
    left = dict(layers)

    def alone() -> set[str]:
        saved = {name for names in alike if any(name not in left for name in names) for name in names}
        return set(left) - saved

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(lambda *_, name=name: left.pop(name, None) and None).remove)
        for batch in batches:
            if not alone():
                break
            run(batch)
    return alone()
