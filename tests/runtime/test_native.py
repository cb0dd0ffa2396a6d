"""The native library: found, of the right version, and right about the processor."""

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from prequant.runtime import native

CPUINFO = Path("/proc/cpuinfo")
FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "amx": {"amx_tile", "amx_int8"},
}


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget what was loaded, before and after."""
    native.load.cache_clear()
    native.detected_isa.cache_clear()
    yield
    native.load.cache_clear()
    native.detected_isa.cache_clear()


def test_the_library_is_there_wherever_it_can_be_built() -> None:
    assert native.available() or not any(map(shutil.which, ("c++", "g++", "clang++")))


def test_the_library_has_the_version_that_was_asked_for() -> None:
    if native.available():
        assert native.abi_version() == native.ABI_VERSION


def test_the_header_and_the_loader_name_the_same_version() -> None:
    header = Path(__file__).parents[2] / "runtime" / "native" / "prequant_native.h"
    assert f"#define PREQUANT_ABI_VERSION {native.ABI_VERSION}\n" in header.read_text()


def test_the_instruction_set_agrees_with_the_operating_system() -> None:
    """Linux lists the features that both it and the processor support."""
    if not native.available():
        return
    assert native.detected_isa() in native.ISAS
    if CPUINFO.is_file():
        words = set(CPUINFO.read_text().split())
        expected = "scalar"
        for isa in native.ISAS[1:]:
            if not words >= FLAGS[isa]:
                break
            expected = isa
        assert native.detected_isa() == expected


def test_the_library_gives_nothing_but_its_own() -> None:
    """It has the C++ runtime in it; a program that links to it has its own, which must not be mixed with that."""
    if native.available():
        for name in ("__gxx_personality_v0", "__cxa_throw", "_Unwind_RaiseException", "_Znwm"):
            assert not hasattr(native.load(), name), name


@pytest.mark.usefixtures("fresh")
def test_a_missing_library_is_no_error_until_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_library", lambda: None)
    assert not native.available()
    for function in (native.abi_version, native.detected_isa):
        with pytest.raises(native.NativeLibraryError, match="is not installed"):
            function()


@pytest.mark.usefixtures("fresh")
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class NewerLibrary:
        def __init__(self, path: str) -> None:
            def prequant_abi_version() -> int:
                return native.ABI_VERSION + 1

            self.prequant_abi_version = prequant_abi_version

    monkeypatch.setattr(ctypes, "CDLL", NewerLibrary)
    monkeypatch.setattr(native, "find_library", lambda: Path("old.so"))
    for function in (native.available, native.abi_version, native.detected_isa):
        with pytest.raises(native.NativeLibraryError, match=rf"old\.so has ABI version {native.ABI_VERSION + 1}"):
            function()


def test_a_file_that_is_no_library_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(b"not a library")
    with pytest.raises(native.NativeLibraryError, match="is not a library of prequant"):
        native.open_library(path)
