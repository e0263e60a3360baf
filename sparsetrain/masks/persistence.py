"""Between a manager and masks at rest: what is saved, and what is checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsetrain.errors import MaskStateError, PatternError
from sparsetrain.masks import sharding, state
from sparsetrain.masks.tensor import MaskChange, MaskedTensor

if TYPE_CHECKING:
    from sparsetrain.masks.manager import MaskManager


def saved_mask(tensor: MaskedTensor) -> state.SavedMask:
    """One mask at rest. Under sharding every rank must call it."""
    tensor.fitting()
    mask = tensor.full_mask()
    shape = tuple(mask.shape)
    return state.SavedMask(shape, str(tensor.pattern), tensor.sparsity, int(mask.sum()), state.pack_bits(mask))


def to_state(manager: MaskManager) -> dict[str, Any]:
    """The state of a manager for a checkpoint."""
    changes = [[c.step, c.tensor, c.died, c.grew, c.why] for c in manager.changes]
    return {**state.to_state(manager.saved()), "changes": changes}


def load_state(manager: MaskManager, given: Mapping[str, Any], where: str) -> None:
    """See `MaskManager.load_state_dict`."""
    saved = state.from_state(given, where)
    state.check_names(saved, {t.name: t.target.shape for t in manager}, where)
    try:
        changes = [MaskChange(*change) for change in given.get("changes", [])]
    except TypeError as error:
        raise MaskStateError(f"{where}: the history of mask changes is malformed ({error})") from error
    masks = {}
    for tensor in manager:
        entry = saved[tensor.name]
        masks[tensor.name] = entry.unpack(tensor.name)
        try:
            tensor.pattern.check(tensor.target.layout.view(masks[tensor.name]), entry.sparsity)
        except PatternError as error:
            raise MaskStateError(
                f"{where}: the mask of {tensor.name!r} was saved as {entry.pattern} and is no {tensor.pattern} ({error}); "
                "declare the pattern it has, or start dense"
            ) from error
    for tensor in manager:
        parameter = tensor.target.parameter
        mask = masks[tensor.name].to(sharding.local(parameter).device)
        manager.install(tensor.name, sharding.take_local(mask, parameter), saved[tensor.name].sparsity)
    manager.changes = changes
