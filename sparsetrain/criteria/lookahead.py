"""Lookahead: a weight counts as much as the paths through it (Park et al. 2020, arXiv 2002.04809, eq. 5).

Formula: ``score_ij = |w_ij| * norm(W_before[j, :]) * norm(W_after[:, i])``, Frobenius norms of what the layer before gives to
input ``j`` and what the layer after takes from output ``i``: how far the product of the three matrices moves when the weight
goes, activations aside. The first layer has no layer before it and the last none after it; there the norm is 1.

Which layers are neighbours is read off the model's data flow, traced by torch.fx: on from layer to layer through activations,
norms, dropout, pooling and flattening (behind which one channel feeds several columns). The largest part of the model that
holds all targets and can be traced is taken, and its inputs and outputs are the open ends. Where the way forks, joins (a
residual sum) or passes something unknown, the layer is refused by name. Norms are passed as they are (the paper's plain
variant).

When to use it: plain chains (MLPs, LeNet, VGG) at high sparsity, where magnitude pruning cuts all paths of a neuron one by
one. Needs no data. All layers are scored on the weights before any of them is pruned.

How it fails: a norm layer rescales neurons, and the norms of the weights around it say little; networks that are no chains.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsetrain.criteria.base import Criterion, Known, wide
from sparsetrain.errors import RecipeError, TargetError

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Where torch.nn keeps layers that change no features, only their values or positions.
_PASSING = ("activation", "dropout", "batchnorm", "instancenorm", "normalization", "pooling")
_FUNCTIONS = re.compile(
    "relu_?|relu6|tanh|sigmoid|gelu|silu|mish|c?elu|selu|softplus|softsign|leaky_relu|hardtanh|hardswish|hardsigmoid|logsigmoid|"
    "(alpha_|feature_alpha_)?dropout[123]?d?|contiguous|clone|(layer|group|instance)_norm"
)


def lookahead(weight: Tensor, before: Tensor, after: Tensor, groups: int = 1) -> Tensor:
    """``|w_ij| * before_j * after_i``.

    Shapes: ``weight`` (out, in / groups, *kernel), ``before`` (in,), ``after`` (out,).

    Example: ``lookahead(torch.tensor([[2.]]), torch.tensor([3.]), torch.tensor([5.]))`` is 30.
    """
    inputs = before.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    kernel = [1] * (weight.ndim - 2)
    return wide(weight).abs() * inputs.view(*inputs.shape, *kernel) * after.view(-1, 1, *kernel)


def norms_of_outputs(weight: Tensor) -> Tensor:
    """Frobenius norm of each row of ``(out, in, *kernel)``. Example: a row ``(3, 4)`` has 5."""
    norms: Tensor = torch.linalg.vector_norm(wide(weight).flatten(1), dim=1)
    return norms


def norms_of_inputs(weight: Tensor, groups: int = 1) -> Tensor:
    """Frobenius norm of all that one input feeds, shape (in,). Example: a column ``(3, 4)`` has 5."""
    rows, columns = weight.shape[:2]
    norms: Tensor = torch.linalg.vector_norm(wide(weight).reshape(groups, rows // groups, columns, -1), dim=(1, 3))
    return norms.flatten()


@dataclass(frozen=True)
class _Layer:
    """A layer with a weight: a target, or the neighbour of one."""

    module: nn.Module = field(repr=False)
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        weight = self.module._parameters["weight"]
        assert weight is not None
        full = getattr(weight, "full_tensor", None)  # sharded by FSDP2
        whole: Tensor = weight.detach() if full is None else full().detach()
        return whole.transpose(0, 1) if self.transposed else whole

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel), where ``in`` counts all groups."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        rows, columns, *kernel = weight.shape
        return (columns, rows) if self.transposed else (rows, columns * self.groups, *kernel)

    @property
    def groups(self) -> int:
        return int(getattr(self.module, "groups", 1))


@dataclass(frozen=True)
class _Chain:
    """A target between its neighbours; None is an open end."""

    layer: _Layer
    before: _Layer | None
    after: _Layer | None


class Lookahead(Criterion):
    """Magnitude times the norms of the weights before and after.

    Raises `RecipeError` or `TargetError` when it is bound to a model in which a target's neighbours are not clear.

    Example: ``PruneFinetune(0.98, criterion="lookahead")``.
    """

    elementwise = False

    def __init__(self) -> None:
        self._chains: dict[str, _Chain] = {}

    def prepare(self, model: nn.Module, tensors: Sequence[Known]) -> None:
        """Find the neighbours of every target."""
        self._chains = chains(model, tensors)

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        """``|w_ij| * norm(W_before[j, :]) * norm(W_after[:, i])``."""
        if name not in self._chains:
            raise RecipeError(f"criterion Lookahead does not know the neighbours of {name}: call prepare(model, tensors) first")
        chain = self._chains[name]
        layer = chain.layer
        seen = weight.transpose(0, 1) if layer.transposed else weight
        outputs, inputs = layer.shape[:2]
        before = torch.ones(inputs, device=weight.device)
        after = torch.ones(outputs, device=weight.device)
        if chain.before is not None:  # flattened, a channel fills several columns
            given = norms_of_outputs(chain.before.weight)
            before = given.repeat_interleave(inputs // len(given))
        if chain.after is not None:
            taken = norms_of_inputs(chain.after.weight, chain.after.groups)
            after = taken.view(outputs, -1).norm(dim=1)
        scores = lookahead(seen, before, after, layer.groups)
        return scores.transpose(0, 1) if layer.transposed else scores


def chains(model: nn.Module, tensors: Sequence[Known]) -> dict[str, _Chain]:
    """Tensor name -> the layer between its neighbours. Raises `TargetError` naming the layer where that is not clear."""
    layers = {}
    for tensor in tensors:
        kinds = {kind.__name__ for kind in type(tensor.module).__mro__}
        if tensor.attribute != "weight" or not kinds & {"Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D"}:
            raise TargetError(
                f"{tensor.name}: criterion Lookahead multiplies by the weights before and after a Linear or convolution, and "
                f"this is {type(tensor.module).__name__}; leave it out (targets.exclude), or use criterion 'magnitude'"
            )
        layers[tensor.name] = _Layer(tensor.module, tensor.transposed)
    if all(layer.module is model for layer in layers.values()):
        return {name: _Chain(layer, None, None) for name, layer in layers.items()}
    known = {id(layer.module): layer for layer in layers.values()}
    root, graph = _trace(model, known)
    modules = dict(root.named_modules())
    found = {}
    for name, layer in layers.items():
        calls = [node for node in graph.nodes if node.op == "call_module" and modules[node.target] is layer.module]
        if len(calls) != 1:
            raise _unclear(name, f"its layer is used {len(calls)} times")
        before, after = (_Walk(name, modules, known, forwards).neighbour(calls[0]) for forwards in (False, True))
        found[name] = _Chain(layer, before, after)
    return found


class _Tracer(fx.Tracer):
    def __init__(self, known: dict[int, _Layer]) -> None:
        super().__init__()
        self.known = known

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.known or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, known: dict[int, _Layer]) -> tuple[nn.Module, fx.Graph]:
    """The largest part of the model that holds all targets and can be traced (a LightningModule often cannot)."""
    reason = "its targets are in no part of it"
    for part in model.modules():  # outer ones first
        if id(part) in known or not known.keys() <= {id(m) for m in part.modules()}:
            continue
        try:
            return part, _Tracer(known).trace(part)
        except Exception as error:  # whatever a forward does with stand-ins for tensors
            reason = f"{type(part).__name__}: {' '.join(str(error).split())[:200]}"
    raise RecipeError(
        f"criterion Lookahead cannot follow the data through {type(model).__name__} (torch.fx: {reason}); use criterion "
        "'magnitude'"
    )


@dataclass
class _Walk:
    """From one layer to the next, forwards or backwards."""

    name: str
    modules: dict[str, nn.Module]
    known: dict[int, _Layer]
    forwards: bool
    flattened: bool = False
    pooled: bool = False

    def neighbour(self, start: fx.Node) -> _Layer | None:
        layer = self._layer(start)
        assert layer is not None
        node = start
        while True:
            node = self._next(node)
            if node.op in ("placeholder", "output"):
                return None
            found = self._layer(node)
            if found is not None:
                self._fit(*((layer, found) if self.forwards else (found, layer)))
                return found
            self._pass(node)

    def _next(self, node: fx.Node) -> fx.Node:
        way = [n for n in (node.users if self.forwards else node.all_input_nodes) if not _asks_shape(n)]
        if len(way) != 1:
            found = ", ".join(str(n) for n in way) or "nothing"
            raise _unclear(self.name, f"{node} {'goes to' if self.forwards else 'comes from'} {found}")
        return way[0]

    def _layer(self, node: fx.Node) -> _Layer | None:
        if node.op != "call_module":
            return None
        module = self.modules[str(node.target)]
        plain = _Layer(module) if isinstance(module, _WEIGHTED) and not hasattr(module, "parametrizations") else None
        return self.known.get(id(module), plain)

    def _pass(self, node: fx.Node) -> None:
        """Go through an operation that leaves features where they are, or refuse."""
        if len([n for n in node.all_input_nodes if not _asks_shape(n)]) == 1:
            if _flattens(node, self.modules):
                self.flattened = True
                return
            if node.op == "call_module":
                module = self.modules[str(node.target)]
                home = type(module).__module__
                if isinstance(module, nn.Identity) or (
                    home.removeprefix("torch.nn.modules.") in _PASSING
                    and not isinstance(module, nn.GLU | nn.MultiheadAttention)
                ):
                    self.pooled |= home.endswith("pooling")
                    return
            elif _FUNCTIONS.fullmatch(name := _name(node)) or "_pool" in name:
                self.pooled |= "_pool" in name
                return
        raise _unclear(
            self.name, f"on its way is {node.target if node.op == 'call_module' else _name(node)}, which may mix features"
        )

    def _fit(self, first: _Layer, second: _Layer) -> None:
        outputs, inputs = first.shape[0], second.shape[1]
        convolved = len(first.shape) > 2
        if len(second.shape) > 2 or not convolved:
            right = inputs == outputs and len(first.shape) == len(second.shape) and not (self.pooled and not convolved)
        else:
            right = self.flattened and inputs % outputs == 0
        if not right:
            raise _unclear(
                self.name,
                f"{outputs} outputs of {type(first.module).__name__} meet {inputs} inputs of {type(second.module).__name__}",
            )


def _unclear(name: str, what: str) -> TargetError:
    return TargetError(
        f"{name}: criterion Lookahead needs one clear layer before it and one after it, and {what}; leave it out "
        "(targets.exclude), or use criterion 'magnitude'"
    )


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _asks_shape(node: fx.Node) -> bool:
    """It looks at the shape alone: ``x.size(0)``, ``x.shape``, and what is taken out of that."""
    if node.op not in ("call_method", "call_function"):
        return False
    source = node.args[0] if _name(node) == "getitem" else None
    return _name(node) in ("size", "dim", "getattr") or (isinstance(source, fx.Node) and _asks_shape(source))


def _flattens(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Everything but the batch becomes one dimension: Flatten(), flatten(x, 1), x.view(n, -1)."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    rest: tuple[Any, ...] = node.args[1:]
    if _name(node) == "flatten":
        start = rest[0] if rest else node.kwargs.get("start_dim", 0)
        end = rest[1] if len(rest) > 1 else node.kwargs.get("end_dim", -1)
        return (start, end) == (1, -1)
    sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    return _name(node) in ("view", "reshape") and len(sizes) == 2 and sizes[1] == -1
