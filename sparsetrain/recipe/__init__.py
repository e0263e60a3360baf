"""Recipes: one YAML file says what is trained on what and how it becomes sparse; the only room that knows every name."""

from __future__ import annotations

from sparsetrain.recipe.build import Built, build
from sparsetrain.recipe.inspect import inspect_checkpoint
from sparsetrain.recipe.plan import Plan, plan
from sparsetrain.recipe.run import run
from sparsetrain.recipe.schema import header, load_recipe, recipe_parser

__all__ = ["Built", "Plan", "build", "header", "inspect_checkpoint", "load_recipe", "plan", "recipe_parser", "run"]
