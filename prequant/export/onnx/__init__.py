"""ONNX: Programs as models of ONNX, with weights and activations as QuantizeLinear and DequantizeLinear have them, or
as ONNX Runtime's own packed operators.
"""

from ..errors import ExportError

try:
    import onnx  # noqa: F401
    import onnxscript  # noqa: F401
except ImportError as error:
    raise ExportError(f"exporting to ONNX needs the extra: pip install 'prequant[onnx]' ({error})") from error

from .export import Exported, ExportedWeight, export_onnx

__all__ = ["Exported", "ExportedWeight", "export_onnx"]
