"""Export: Programs as files that other runtimes run, with their weights as packed as those have a form for."""

from .aoti import export_aoti
from .errors import ExportError
from .pt2 import export_pt2

__all__ = ["ExportError", "export_aoti", "export_pt2"]
