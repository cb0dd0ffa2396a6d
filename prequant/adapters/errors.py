"""What goes wrong with adapters."""

from prequant.runtime import PrequantError


class AdapterError(PrequantError):
    """A file that is no adapter or belongs to another base, or a Program that can't take or give one."""
