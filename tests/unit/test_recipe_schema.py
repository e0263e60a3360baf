"""How a recipe's text is read: numbers, patterns, null, headers, and messages without jsonargparse's nesting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Union

import pytest
from jsonargparse import ArgumentParser

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import header, load_recipe, recipe_parser
from sparsetrain.recipe.explain import explain
from sparsetrain.recipe.schema import integers_first, parse_yaml, read_yaml

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"

VALUES = {
    "2:4": "2:4",  # 124 in YAML 1.1, which counts minutes
    "1:30:00": "1:30:00",
    "1e-3": 0.001,  # text in YAML 1.1, which wants 1.0e-3
    "5.0e-4": 0.0005,
    "1E5": 100000.0,
    "1.": 1.0,
    ".5": 0.5,
    "-.5": -0.5,
    "-3": -3,
    "+3": 3,
    "0": 0,
    "1_000": 1000,
    "010": "010",  # 8 in YAML 1.1
    "2024-01-01": "2024-01-01",
    "90%": "90%",
    "3ep": "3ep",
    "1e": "1e",
    ".inf": math.inf,
    "-.inf": -math.inf,
    "null": None,
    "None": None,
    "~": None,
    "true": True,
    "'1'": "1",
    "e1": "e1",
    ".": ".",
    "-": [None],
}


@pytest.mark.parametrize("text", VALUES)
def test_values(text: str) -> None:
    found = parse_yaml(text)
    assert found == VALUES[text]
    assert type(found) is type(VALUES[text])


def test_nan() -> None:
    assert math.isnan(parse_yaml(".nan"))


def test_a_count_stays_a_count_in_whatever_order_a_union_is_written() -> None:
    parser = ArgumentParser(exit_on_error=False, parser_mode="recipe")
    parser.add_argument("--limit", type=Union[float, int, None])  # noqa: UP007
    before = parser.parse_args(["--limit", "1"]).limit
    assert type(before) is float
    integers_first(parser)
    for text, kind in (("1", int), ("1.0", float), ("0.5", float), ("null", type(None))):
        assert type(parser.parse_args(["--limit", text]).limit) is kind
    limits = load_recipe(QUICKSTART, ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1.0"]).trainer
    assert type(limits.limit_train_batches) is int
    assert type(limits.limit_val_batches) is float


def test_the_header_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("# question: What: if?\n# A remark: here\n# minutes: 2\nseed: 1\n# command: later\n", encoding="utf-8")
    assert header(path) == {"question": "What: if?", "minutes": "2"}


def test_later_options_win(tmp_path: Path) -> None:
    config = load_recipe(QUICKSTART, ["--seed", "1", "--seed", "2"])
    assert config.seed == 2


def test_who_is_to_blame(tmp_path: Path) -> None:
    """A message names the file for what the file says and the command line for what that says."""
    with pytest.raises(RecipeError, match=r"^command line: seed: x is not int$"):
        load_recipe(QUICKSTART, ["--seed", "x"])
    path = tmp_path / "bad.yaml"
    path.write_text(QUICKSTART.read_text(encoding="utf-8").replace("seed: 0", "seed: x"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"bad\.yaml: seed: x is not int$"):
        load_recipe(path, ["--trainer.max_epochs", "2"])


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'quickstart\.yaml'\?"):
        read_yaml(QUICKSTART.with_name("quickstrat.yaml"))
    with pytest.raises(RecipeError, match="is no file"):
        read_yaml(tmp_path)


def test_an_unknown_message_loses_its_nesting() -> None:
    message = """Parser key "method":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'A'>, <class 'NoneType'>]
  Errors:
    - something nobody foresaw
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: x"""
    assert explain(message, recipe_parser()) == "method: something nobody foresaw"
