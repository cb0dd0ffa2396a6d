"""GenerationError."""

from prequant.runtime import PrequantError


class GenerationError(PrequantError):
    """A Program that can't generate, or can't do it in the way that was asked for."""
