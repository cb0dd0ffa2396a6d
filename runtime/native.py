"""The native library: whether it is there, which version it is, and what this processor lets it use.

The library is one shared object beside this file, called through ctypes. It knows nothing of Python or torch, so a
single wheel serves every version of both. An installation without it is complete but slow: it was made where no C++17
compiler was at hand, and the operators run on their reference implementations.
"""

import ctypes
import functools
import os
import sys
import warnings
from pathlib import Path

from .errors import PrequantError

ABI_VERSION = 6
"""The version of the C interface that this module calls; `native/prequant_native.h` holds the library's own."""

LIBRARY_NAME = "libprequant_native.dll" if sys.platform == "win32" else "libprequant_native.so"

ISAS = ("scalar", "avx2", "avx512vnni", "amx")
"""The instruction sets that kernels are written for, each including the ones before it."""

REFERENCE = "reference"
"""What ``PREQUANT_ISA`` says, beside one of :data:`ISAS`, for no native kernel at all."""


class NativeLibraryError(PrequantError):
    """The native library is missing, or is not the one that this version of prequant was written for."""


_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32

FUNCTIONS = {
    "prequant_isa": (ctypes.c_char_p, ()),
    "prequant_dequantize": (_INT, (_POINTER, _POINTER, _LONG, _POINTER, _INT, ctypes.c_char_p)),
    "prequant_round": (_INT, (_POINTER, _POINTER, _POINTER, _INT, ctypes.c_char_p)),
    "prequant_round_gradients": (_INT, (*(_POINTER,) * 6, _INT, ctypes.c_char_p)),
    "prequant_codes_bytes": (_LONG, (_POINTER,)),
    "prequant_pack_codes": (_INT, (_POINTER, _POINTER, _INT)),
    "prequant_scales_bytes": (_LONG, (_POINTER,)),
    "prequant_pack_scales": (_INT, (_POINTER, _POINTER, _POINTER, _INT)),
    "prequant_run_linears": (_INT, (_POINTER, _INT, _POINTER, _POINTER, _POINTER, _LONG, _POINTER)),
    "prequant_run_linear": (_INT, (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _POINTER)),
    "prequant_plan_scratch": (_LONG, (_POINTER, _LONG, _INT, ctypes.c_char_p)),
    "prequant_run_plan": (
        _INT,
        (_POINTER, _LONG, _POINTER, _POINTER, _LONG, _INT, ctypes.c_char_p, ctypes.POINTER(_LONG)),
    ),
}
"""The library's functions with their results and arguments; these and the structures are ``prequant_native.h``'s and
``prequant_plan.h``'s."""


class Weight(ctypes.Structure):
    """``prequant_weight``: a weight in the neutral layout."""

    _fields_ = (
        *((name, _LONG) for name in ("rows", "columns", "group_size")),
        *((name, _INT) for name in ("bits", "terms", "base3", "multiple", "subtrahend", "shared_scale")),
        ("outliers_replace", _INT),
        *((name, _POINTER) for name in ("codes", "scales", "zeros")),
        ("outliers", _LONG),
        *((name, _POINTER) for name in ("outlier_values", "outlier_columns", "outlier_offsets")),
    )


class Rounding(ctypes.Structure):
    """``prequant_rounding``: how floats become levels."""

    _fields_ = (
        *((name, _LONG) for name in ("elements", "columns", "group_size")),
        *((name, _INT) for name in ("levels", "shared_scale")),
        *((name, _POINTER) for name in ("scales", "zeros")),
    )


class Linear(ctypes.Structure):
    """``prequant_linear``: what a linear layer's calls have in common."""

    _fields_ = (
        *((name, _POINTER) for name in ("codes", "scales", "bias", "input_scale")),
        ("input_zero", ctypes.c_float),
        *((name, _INT) for name in ("input_levels", "input", "type", "activation")),
    )


class Workspace(ctypes.Structure):
    """``prequant_workspace``: what a caller lends to a call."""

    _fields_ = (
        ("scratch", _POINTER),
        *((name, _LONG) for name in ("scratch_bytes", "needed")),
        ("isa", ctypes.c_char_p),
        ("threads", _INT),
    )


MAX_LINEARS = 16
"""How many linears one call of the library takes."""

BAD_ROW, SMALL_SCRATCH = 5, 6

STATUS = {
    1: "a weight that makes no sense",
    2: "codes or scales that were not packed by this library, or not for each other",
    3: "an instruction set that this library does not have",
    4: "sizes that do not fit",
    BAD_ROW: "a row that the weight does not have",
    SMALL_SCRATCH: "too little scratch",
}


def check(status: int, what: str) -> None:
    """Raise :class:`NativeLibraryError` unless ``status``, a result of the library, is 0."""
    if status:
        raise NativeLibraryError(f"{what}: the native library was given {STATUS.get(status, f'status {status}')}")


def available() -> bool:
    """Whether the native library is installed. A library of another version is an error, not an absence."""
    if find_library() is None:
        return False
    load()
    return True


def abi_version() -> int:
    """The version of the native library's C interface."""
    return int(load().prequant_abi_version())


@functools.cache
def detected_isa() -> str:
    """The widest instruction set that this process may use: one of `ISAS`."""
    return str(load().prequant_isa().decode("ascii"))


@functools.cache
def chosen_isa() -> str:
    """The instruction set to use: that of ``PREQUANT_ISA`` if it is set, else the widest.

    Without a library it is ``reference``, which is said once. Raises :class:`NativeLibraryError` for a name that is
    none, or a set that this processor does not have.
    """
    wanted = os.environ.get("PREQUANT_ISA", "")
    if wanted and wanted not in (*ISAS, REFERENCE):
        raise NativeLibraryError(f"PREQUANT_ISA={wanted!r}: expected one of {', '.join((*ISAS, REFERENCE))}")
    if not (wanted or available()):
        warnings.warn(
            f"{LIBRARY_NAME} is not installed: packed operators run on their reference implementation in PyTorch, "
            "which is slower than float32. Install prequant where a C++17 compiler is at hand.",
            stacklevel=2,
        )
        return REFERENCE
    if wanted == REFERENCE:
        return REFERENCE
    widest = detected_isa()
    if wanted and ISAS.index(wanted) > ISAS.index(widest):
        raise NativeLibraryError(f"PREQUANT_ISA={wanted}: this processor has nothing wider than {widest}")
    return wanted or widest


def find_library() -> Path | None:
    """The path of the native library, or None where it was not built.

    An editable install keeps what was built apart from the sources; both folders are on the package's search path.
    """
    folders = [Path(__file__).parent, *map(Path, getattr(sys.modules.get(__package__), "__path__", ()))]
    return next((path for folder in folders if (path := folder / LIBRARY_NAME).is_file()), None)


def torch_ops() -> Path:
    """The folder of the sources that CMake makes ``libprequant_torch_ops.so`` of: the operators without Python."""
    return Path(__file__).parent / "torch_ops"


@functools.cache
def load() -> ctypes.CDLL:
    """Load the native library, once, and check that it speaks `ABI_VERSION`."""
    path = find_library()
    if path is None:
        raise NativeLibraryError(
            f"{LIBRARY_NAME} is not installed. It is built when prequant is installed from source with a C++17 "
            "compiler at hand; PREQUANT_REQUIRE_NATIVE=1 makes the installation fail with the reason if it can't be."
        )
    return open_library(path)


def open_library(path: Path) -> ctypes.CDLL:
    """Open the library at `path` and declare its functions, or say why it can't be used."""
    try:
        library = ctypes.CDLL(str(path))
        library.prequant_abi_version.restype = ctypes.c_int32
        library.prequant_abi_version.argtypes = ()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"{path} is not a library of prequant: {error}") from error
    found = library.prequant_abi_version()
    if found != ABI_VERSION:
        raise NativeLibraryError(
            f"{path} has ABI version {found}, but this prequant needs {ABI_VERSION}: "
            "the installation mixes two versions. Install prequant again."
        )
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
