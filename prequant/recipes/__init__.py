"""One file per paper's method."""

from collections.abc import Mapping

from prequant.passes.options import near_misses
from prequant.runtime import PrequantError

from .alphatuning import AlphaTuning
from .base import Recipe, Stage, StagedRecipe, TuningRecipe
from .mrem import MREM
from .prequant import PreQuant
from .xtc import XTC

RECIPES: Mapping[str, type[Recipe]] = {kind.name: kind for kind in (AlphaTuning, MREM, PreQuant, XTC)}


def recipe_type(name: str) -> type[Recipe]:
    """The recipe of that name. Raises :class:`PrequantError` with near misses if there is none."""
    if name not in RECIPES:
        raise PrequantError(f"there is no recipe {name!r}{near_misses(name, RECIPES)}")
    return RECIPES[name]


__all__ = [
    "RECIPES",
    "XTC",
    "AlphaTuning",
    "PreQuant",
    "Recipe",
    "Stage",
    "StagedRecipe",
    "TuningRecipe",
    "recipe_type",
]
