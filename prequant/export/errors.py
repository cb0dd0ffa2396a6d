"""What goes wrong in an export."""

from prequant.runtime import PrequantError


class ExportError(PrequantError):
    """What a format can't hold, or an option that does not fit; nothing has been written."""
