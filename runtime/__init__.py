"""Numbers: weight formats, quantizers, and the ops that compute on packed codes. Knows nothing of graphs or models."""

from . import autocast as _autocast  # noqa: F401  (registers what autocast does to the ops)
from . import gradients as _gradients  # noqa: F401  (registers the ops' gradients)
from . import native_linear as _native_linear  # noqa: F401  (registers the native kernels)
from . import native_repeat as _native_repeat  # noqa: F401
from . import native_rounding as _native_rounding  # noqa: F401
from . import native_rows as _native_rows  # noqa: F401
from . import ops
from . import shapes as _shapes  # noqa: F401  (registers what tracers see of the ops)
from .backends import Backend, register_backend, registered_backends, unregister_backend
from .bcq import binary_code
from .calibrators import Calibrator, calibrator, calibrator_names
from .errors import FormatError, PrequantError
from .formats import LAYOUT_VERSION, Granularity, Scheme, WeightFormat
from .metrics import sqnr
from .quantizer import QuantizedWeight, Quantizer
from .reference import Outliers
from .strategies import register_strategy, strategy_names
from .triton_kernels import backends as _triton_backends  # noqa: F401  (registers the kernels for CUDA)

__all__ = [
    "LAYOUT_VERSION",
    "Backend",
    "Calibrator",
    "FormatError",
    "Granularity",
    "Outliers",
    "PrequantError",
    "QuantizedWeight",
    "Quantizer",
    "Scheme",
    "WeightFormat",
    "binary_code",
    "calibrator",
    "calibrator_names",
    "ops",
    "register_backend",
    "register_strategy",
    "registered_backends",
    "sqnr",
    "strategy_names",
    "unregister_backend",
]
