"""The native library: whether it is there, which version it is, and what this processor lets it use.

The library is one shared object beside this file, called through ctypes. It knows nothing of Python or torch, so a
single wheel serves every version of both. An installation without it is complete but slow: it was made where no C++17
compiler was at hand, and the operators run on their reference implementations.
"""

import ctypes
import functools
import sys
from pathlib import Path

ABI_VERSION = 1
"""The version of the C interface that this module calls; `native/prequant_native.h` holds the library's own."""

LIBRARY_NAME = "libprequant_native.dll" if sys.platform == "win32" else "libprequant_native.so"

ISAS = ("scalar", "avx2", "avx512vnni", "amx")
"""The instruction sets that kernels are written for, each including the ones before it."""


class NativeLibraryError(RuntimeError):
    """The native library is missing, or is not the one that this version of prequant was written for."""


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


def find_library() -> Path | None:
    """The path of the native library, or None where it was not built.

    An editable install keeps what was built apart from the sources; both folders are on the package's search path.
    """
    folders = [Path(__file__).parent, *map(Path, getattr(sys.modules.get(__package__), "__path__", ()))]
    return next((path for folder in folders if (path := folder / LIBRARY_NAME).is_file()), None)


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
    library.prequant_isa.restype = ctypes.c_char_p
    library.prequant_isa.argtypes = ()
    return library
