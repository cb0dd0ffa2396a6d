"""prequant recipes: every recipe with its options."""

from __future__ import annotations

from .app import command, show


@command("recipes", "List every recipe with its options.")
def recipes() -> None:
    """List every recipe, the options that 'prequant compress --set' takes with their defaults, and what it does."""
    from inspect import cleandoc

    from prequant.passes.options import options_of
    from prequant.recipes import RECIPES

    from .listing import listing
    from .settings import TRAININGS

    def summary(kind: type) -> str:
        return " ".join(cleandoc(kind.__doc__ or "").split("\n\n")[0].split())

    options = {
        name: [option for option in options_of(kind) if option.name not in TRAININGS] for name, kind in RECIPES.items()
    }
    show(listing((name, summary(kind), options[name]) for name, kind in RECIPES.items()))
