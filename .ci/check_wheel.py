"""Check a wheel of prequant, and the native library as this interpreter has it installed. Needs no dependencies.

Usage: python check_wheel.py path/to/prequant-*.whl, in an environment where that wheel is installed.
"""

import ctypes
import importlib.metadata
import sys
import zipfile
from pathlib import Path

PAGE = ("page.html", "page.css", "app.js", "vendored/dagre.min.js", "vendored/dagre.min.js.LEGAL.txt")
WANTED = (
    "prequant/__init__.py",
    "prequant/passes/__init__.py",
    "prequant/runtime/__init__.py",
    *(f"prequant/view/assets/{name}" for name in PAGE),
)
LIBRARY = "prequant/runtime/libprequant_native.so"
TORCH_OPS = "prequant/runtime/torch_ops/"
"""Sources that users build, with the header that they include."""
HEADER = "prequant/runtime/native/prequant_native.h"


def main(wheel: Path) -> None:
    """Check the wheel's name, its content, and that the installed library can be loaded and answers."""
    python_tag, abi_tag, platform_tag = wheel.stem.split("-")[-3:]
    assert (python_tag, abi_tag) == ("py3", "none"), f"{wheel.name}: one wheel has to serve every Python"
    assert platform_tag != "any", f"{wheel.name}: a wheel with a native library belongs to a platform"

    names = zipfile.ZipFile(wheel).namelist()
    wanted = {*WANTED, LIBRARY, HEADER, f"{TORCH_OPS}CMakeLists.txt", f"{TORCH_OPS}ops.cpp"}
    assert not (missing := wanted - set(names)), f"{wheel.name} lacks {sorted(missing)}"
    sources = [name for name in names if name.endswith((".cpp", ".h", "CMakeLists.txt"))]
    strangers = [name for name in sources if name != HEADER and not name.startswith(TORCH_OPS)]
    assert not strangers, f"{wheel.name} carries sources: {strangers}"
    strays = sorted({top for name in names if not (top := name.split("/")[0]).startswith("prequant")})
    assert not strays, f"{wheel.name} would install {strays} beside prequant"

    library = ctypes.CDLL(str(importlib.metadata.distribution("prequant").locate_file(LIBRARY)))
    library.prequant_isa.restype = ctypes.c_char_p
    print(f"{wheel.name}: ABI {library.prequant_abi_version()}, {library.prequant_isa().decode()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
