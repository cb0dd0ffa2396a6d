"""The one exception family that every layer raises for bad input."""


class PrequantError(ValueError):
    """Bad input: the message names the thing, its value, and what would be right."""


class FormatError(PrequantError):
    """A weight format, or tensors that do not fit one."""
