"""The error of this package."""

from prequant.runtime import PrequantError


class TaskError(PrequantError):
    """A task or data set that is not what it should be."""
