"""Removing residual blocks for good: parameters, optimizer state, and what a transformers configuration says of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.depth.blocks import Block, PassThrough, bypass
from sparsetrain.errors import PatternError, TargetError


def remove(
    model: nn.Module, blocks: Iterable[Block], run: Callable[[], Any], optimizers: Iterable[Optimizer] = ()
) -> dict[str, str]:
    """Take blocks out of a model for good: their parameters are gone, and so is what optimizers remember of them.

    A block is deleted from its list where the model stays the same without it: later ones move up, a transformers model
    gets its ``layer_idx`` and ``config`` (``num_hidden_layers``, lists of that length) adjusted and loads with
    ``from_pretrained``. Elsewhere (a config of another kind, code that counts blocks) a `PassThrough` takes its place.

    Args:
        model: any module.
        blocks: as found by `find_blocks`, bypassed or not.
        run: a deterministic forward pass; its result, and the outputs of the blocks that stay, must be those of the bypassed
            model, bit for bit.
        optimizers: their groups and state lose the parameters.

    Returns name -> ``"deleted"`` or ``"passed through"`` (with the number of outputs, if it returned a tuple). Raises
    `PatternError`, that list as it was, if both change the pass.

    Example: ``remove(net, [Block("layer1.1")], lambda: net(images), [optimizer])``.
    """
    lists: dict[str, dict[str, Block]] = {}
    for block in blocks:
        where, _, key = block.name.rpartition(".")
        lists.setdefault(where, {})[key] = block
    before = {id(p) for p in model.parameters()}
    result: dict[str, str] = {}
    for where, gone in lists.items():
        with bypass(model, gone.values()):
            expected = _trace(model, where, gone, run)
        for how, take_out in (("deleted", _delete), ("passed through", _replace)):
            undo = take_out(model, where, gone)
            with suppress(Exception):  # code that counts on every block may fail in any way
                found = [] if undo is None else _trace(model, where, () if how == "deleted" else gone, run)
                if undo and expected and len(found) == len(expected) and all(map(torch.equal, found, expected)):
                    break
            for step in reversed(undo or []):
                step()
        else:
            names = ", ".join(block.name for block in gone.values())
            raise PatternError(f"without {names} the model computes something else than with them bypassed; is run() random?")
        result |= {block.name: "deleted" if how == "deleted" else _passing(block) for block in gone.values()}
    lost = before - {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in lost]
        for parameter in [p for p in optimizer.state if id(p) in lost]:
            del optimizer.state[parameter]
    return result


def remove_again(model: nn.Module, removed: Mapping[str, str]) -> None:
    """Take the same blocks out of a model built anew, so that weights saved after `remove` fit it.

    ``removed`` is what `remove` returned. Raises `TargetError` for a block that the model has not, `PatternError` for one that
    cannot be deleted here. Example: ``remove_again(net, {"layer1.1": "deleted"})``.
    """
    lists: dict[tuple[str, bool], dict[str, Block]] = {}
    for name, how in removed.items():
        where, _, key = name.rpartition(".")
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise TargetError(f"block {name!r}, removed when the weights were saved, is not in this model ({error})") from error
        outputs = re.search(r"(\d+) outputs", how)
        lists.setdefault((where, how == "deleted"), {})[key] = Block(name, int(outputs[1]) if outputs else 0)
    for (where, deleted), gone in lists.items():
        if (_delete if deleted else _replace)(model, where, gone) is None:
            raise PatternError(
                f"blocks {', '.join(gone)} of {where!r} cannot be deleted: the model's configuration counts them"
            )


def _passing(block: Block) -> str:
    return f"passed through ({block.outputs} outputs)" if block.outputs else "passed through"


def _delete(model: nn.Module, where: str, gone: dict[str, Block]) -> list[Callable[[], Any]] | None:
    """Delete blocks of one list; how to undo it, or None if the model's configuration could not follow."""
    container = model.get_submodule(where)
    old = dict(container._modules)
    kept = {key: module for key, module in old.items() if key not in gone}
    parts = where.split(".") if where else []
    owners = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    configs = {id(o.config): o.config for o in owners if getattr(o, "config", None) is not None}.values()
    if any(getattr(c, "num_hidden_layers", 0) != len(old) or getattr(c, "is_encoder_decoder", False) for c in configs):
        return None
    numbered = list(old) == [str(index) for index in range(len(old))]
    undo = _put(container, {str(i): m for i, m in enumerate(kept.values())} if numbered else kept)

    def change(owner: Any, key: str, value: Any) -> None:
        undo.append(partial(setattr, owner, key, getattr(owner, key)))
        setattr(owner, key, value)

    for index, (key, module) in enumerate(kept.items()):
        for inner in module.modules() if numbered and module is not None else ():
            if getattr(inner, "layer_idx", None) == int(key):
                change(inner, "layer_idx", index)
    for config in configs:
        for key, value in list(vars(config).items()):
            if "layer" in key and isinstance(value, list) and len(value) == len(old):
                change(config, key, [v for v, name in zip(value, old, strict=True) if name in kept])
        change(config, "num_hidden_layers", len(kept))
    return undo


def _replace(model: nn.Module, where: str, gone: dict[str, Block]) -> list[Callable[[], Any]]:
    container = model.get_submodule(where)
    return _put(container, container._modules | {key: PassThrough(block.outputs) for key, block in gone.items()})


def _put(container: nn.Module, children: dict[str, nn.Module | None]) -> list[Callable[[], Any]]:
    undo = partial(_put, container, dict(container._modules))
    container._modules.clear()
    container._modules.update(children)
    return [undo]


@torch.no_grad()
def _trace(model: nn.Module, where: str, without: Iterable[str], run: Callable[[], Any]) -> list[Tensor]:
    """What every block in a list puts out, and the result of the run."""
    outputs: list[Tensor] = []
    watched = [module for key, module in model.get_submodule(where).named_children() if key not in without]
    handles = [module.register_forward_hook(lambda *call: outputs.extend(_leaves(call[2]))) for module in watched]
    try:
        return [*_leaves(run()), *outputs]
    finally:
        for handle in handles:
            handle.remove()


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [leaf for part in parts for leaf in _leaves(part)]
