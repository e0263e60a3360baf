"""Criteria: what scores a weight. One file a family; each is a pure function wrapped in a small class for recipes."""

from __future__ import annotations

from sparsetrain.criteria.activation import ActivationMean, APoZ
from sparsetrain.criteria.base import Criterion, Known, Seen, StatisticsCriterion
from sparsetrain.criteria.copal import Copal, OutputFisher
from sparsetrain.criteria.gradient import SNIP, Fisher, Gradient, Taylor
from sparsetrain.criteria.lookahead import Lookahead
from sparsetrain.criteria.magnitude import Magnitude, magnitude
from sparsetrain.criteria.movement import Movement
from sparsetrain.criteria.obs import OBS
from sparsetrain.criteria.platon import PLATON
from sparsetrain.criteria.random import Random, random_scores
from sparsetrain.criteria.sparsegpt import SparseGPT
from sparsetrain.criteria.wanda import RIA, Wanda
from sparsetrain.errors import RecipeError, nearest

__all__ = [
    "NAMES",
    "OBS",
    "PLATON",
    "RIA",
    "SNIP",
    "APoZ",
    "ActivationMean",
    "Copal",
    "Criterion",
    "Fisher",
    "Gradient",
    "Known",
    "Lookahead",
    "Magnitude",
    "Movement",
    "OutputFisher",
    "Random",
    "Seen",
    "SparseGPT",
    "StatisticsCriterion",
    "Taylor",
    "Wanda",
    "get_criterion",
    "magnitude",
    "random_scores",
]

NAMES: dict[str, type[Criterion]] = {
    "magnitude": Magnitude,
    "random": Random,
    "gradient": Gradient,
    "snip": SNIP,
    "taylor": Taylor,
    "fisher": Fisher,
    "obs": OBS,
    "movement": Movement,
    "platon": PLATON,
    "activation": ActivationMean,
    "apoz": APoZ,
    "lookahead": Lookahead,
    "wanda": Wanda,
    "ria": RIA,
    "sparsegpt": SparseGPT,
    "copal": Copal,
    "output_fisher": OutputFisher,
}


def get_criterion(criterion: Criterion | str) -> Criterion:
    """Turn a name into a criterion; raises `RecipeError` with the nearest name. Example: ``get_criterion("magnitude")``."""
    if isinstance(criterion, Criterion):
        return criterion
    if criterion not in NAMES:
        raise RecipeError(
            f"criterion {criterion!r} is unknown; known are {', '.join(NAMES)}, or the class path of a Criterion."
            + nearest(str(criterion), NAMES)
        )
    return NAMES[criterion]()
