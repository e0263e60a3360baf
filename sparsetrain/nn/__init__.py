"""Layers that are swapped in. ``lora`` and ``adapters`` need peft: they are imported where they are used, not from here."""

from __future__ import annotations

from importlib.util import find_spec

from sparsetrain.errors import RecipeError

__all__ = ["require_peft"]


def require_peft() -> None:
    """Raise `RecipeError` if peft is not installed. Example: ``require_peft()``."""
    if find_spec("peft") is None:
        raise RecipeError("LoRA needs the package peft, which is not installed: pip install 'sparsetrain[lora]'")
