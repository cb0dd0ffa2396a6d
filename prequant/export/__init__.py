"""Export: Programs as files that other runtimes run, with their weights as packed as those have a form for."""

from typing import TYPE_CHECKING, Any

from .aoti import export_aoti
from .errors import ExportError
from .pt2 import export_pt2

if TYPE_CHECKING:
    from .onnx import export_onnx

__all__ = ["ExportError", "export_aoti", "export_onnx", "export_pt2"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: it needs libraries that come as an extra.
    if name == "export_onnx":
        from .onnx import export_onnx

        return export_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
