"""The native kernels, built with address and undefined-behaviour sanitizers, on buffers of exactly their size."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "runtime" / "native"
DRIVERS = sorted((Path(__file__).parent / "native").glob("exercise*.cpp"))
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

OPTIONS = ["-std=c++17", "-O1", "-g", "-fopenmp", f"-I{NATIVE}", "-fno-omit-frame-pointer"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
X86_64 = os.uname().machine == "x86_64"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma"]
AMX = [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
ISA_OPTIONS = {
    "kernels_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512vnni": AVX512,
    "floats_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "floats_avx512": AVX512,
    "kernels_amx": AMX,
    "floats_amx": AMX,
}


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler, and so no native library either")
def test_kernels_touch_nothing_but_their_buffers(tmp_path: Path) -> None:
    sources = [path for path in sorted(NATIVE.glob("*.cpp")) if X86_64 or path.stem not in ISA_OPTIONS]

    def compile(source: Path) -> Path:
        result = tmp_path / f"{source.stem}.o"
        defined = ["-DPREQUANT_X86_64"] if X86_64 else []
        options = [*OPTIONS, *SANITIZERS, *defined, *ISA_OPTIONS.get(source.stem, [])]
        subprocess.run([str(COMPILER), *options, "-c", str(source), "-o", str(result)], check=True, capture_output=True)
        return result

    with ThreadPoolExecutor(2) as pool:
        library, drivers = list(pool.map(compile, sources)), list(pool.map(compile, DRIVERS))
    for driver in drivers:
        program, objects = driver.with_suffix(""), map(str, [*library, driver])
        subprocess.run([str(COMPILER), *SANITIZERS, "-fopenmp", *objects, "-o", str(program), "-ldl"], check=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "3"}
        done = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "cases up to" in done.stdout
