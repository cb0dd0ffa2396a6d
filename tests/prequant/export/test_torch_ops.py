"""The operators in C++ (runtime/torch_ops), and the example that runs packages with them (examples/aoti)."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prequant.export import export_aoti
from prequant.passes import (
    BinaryCode,
    Canonicalize,
    ComposeOps,
    FuseEpilogue,
    FuseParallelLinears,
    Lower,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
)
from prequant.runtime import native, ops

from ...models import FAMILIES, traced
from .torch_ops_calls import COLUMNS, Call, hostile_calls, linear_call, linear_calls, other_calls

BACKWARD = {"dequantize_gradients", "fake_quantize_gradients"}
"""Operators that a backward alone calls: they are in no package."""

ROOT = Path(__file__).parents[3]
CALLER = Path(__file__).with_name("torch_ops_process.py")
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler, and so no native library either")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that examples/aoti was built in, as the README says."""
    assert CMAKE is not None, 'the extra "test" is not installed'
    folder = tmp_path_factory.mktemp("aoti")
    environment = {**os.environ, "CXX": str(COMPILER)}
    for words in (
        ["-S", str(ROOT / "examples" / "aoti"), "-B", str(folder), f"-DPython3_EXECUTABLE={sys.executable}"],
        ["--build", str(folder), "--parallel", "4"],
    ):
        done = subprocess.run([CMAKE, *words], capture_output=True, text=True, env=environment, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def in_cpp(built: Path, tmp_path: Path) -> Callable[[list[Call]], list[Any]]:
    """Makes calls of operators in a process that has them in C++ alone."""

    def run(calls: list[Call], **environment: str) -> list[Any]:
        library = next((built / "torch_ops").glob("libprequant_torch_ops.*"))
        paths = [str(tmp_path / "calls"), str(tmp_path / "results")]
        torch.save(calls, paths[0])
        words = [sys.executable, str(CALLER), str(library), *paths]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        results: list[Any] = torch.load(paths[1])
        return results

    return run


# ---- calls ----------------------------------------------------------------------------------------------------------


def in_python(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    op = getattr(torch.ops.aten, name[5:]) if name.startswith("aten.") else getattr(ops, name)
    return op(*arguments, **options)


@pytest.mark.parametrize("isa", ["", native.REFERENCE])
def test_operators_compute_what_they_do_in_python(
    isa: str, in_cpp: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: on native kernels, which are the same ones, and without."""
    calls = [*linear_calls(), *other_calls()]
    found = in_cpp(calls, PREQUANT_ISA=isa)
    monkeypatch.setenv("PREQUANT_ISA", isa)
    native.chosen_isa.cache_clear()
    try:
        wanted = [in_python(*call) for call in calls]
    finally:
        monkeypatch.undo()
        native.chosen_isa.cache_clear()
    for call, one, other in zip(calls, found, wanted, strict=True):
        assert not isinstance(one, str), (call, one)
        message = partial("{}\n{}".format, call)
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, check_stride=True, msg=message)


def test_schemas_are_those_of_python(in_cpp: Callable[..., list[Any]]) -> None:
    """All but of the operators that are part of a backward, which no package holds."""
    names = sorted(set(ops.OP_NAMES) - BACKWARD)
    schemas = [str(getattr(ops, name)._schema) for name in names]
    assert in_cpp([(name, (), {}) for name in names]) == schemas
    source = (native.torch_ops() / "ops.cpp").read_text(encoding="utf-8")
    assert source.count("library.def(") == source.count("library.impl(") == len(names)


def test_new_weights_where_others_were_are_packed_anew(built: Path) -> None:
    """What is kept of a weight goes with it, and is not taken for what comes into its memory."""
    library = next((built / "torch_ops").glob("libprequant_torch_ops.*"))
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
places = set()
input, scale = torch.randn(3, 64), torch.ones(16, 1)
for _ in range(50):
    codes = torch.randint(0, 256, (16, 32), dtype=torch.uint8)
    places.add(codes.data_ptr())
    options = {{"format": "affine4:row", "columns": 64}}
    found = torch.ops.prequant.packed_linear(input, codes, scale, *[None] * 4, False, *[None] * 4, **options)
    weight = torch.ops.prequant.dequantize(codes, scale, None, **options)
    torch.testing.assert_close(found, input @ weight.T, rtol=1e-5, atol=1e-3)
    del codes
assert len(places) < 50, "no memory was used again"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=built)


# ---- hostile calls ---------------------------------------------------------------------------------------------------


def test_hostile_calls_are_refused(in_cpp: Callable[..., list[Any]]) -> None:
    calls, messages = zip(*hostile_calls(), strict=True)
    for call, said, wanted in zip(calls, in_cpp(list(calls)), messages, strict=True):
        assert isinstance(said, str), f"{call} was taken"
        assert "prequant::" in said, said
        assert re.search(wanted, said.splitlines()[0]), said


def test_an_instruction_set_that_is_none_is_refused(in_cpp: Callable[..., list[Any]]) -> None:
    (said,) = in_cpp([linear_call("affine4:row", torch.randn(3, COLUMNS))], PREQUANT_ISA="mmx")
    assert "PREQUANT_ISA=mmx: expected reference, or one of scalar, avx2" in said


# ---- packages --------------------------------------------------------------------------------------------------------


def run_package(built: Path, package: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(built / "run_package"), str(package), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=package.parent)


def shown(done: subprocess.CompletedProcess[str]) -> dict[str, Tensor]:
    """The results that the program printed, by name."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for line in done.stdout.splitlines():
        if "]: " in line:
            head, values = line.split("]: ")
            name, shape = head.split(" [")
            found[name] = torch.tensor([float(value) for value in values.split()]).view(*map(int, shape.split(", ")))
    return found


def mixed_program() -> Program:
    """A BERT with 4 bits and outliers, binary planes, ternary weights, and 8-bit inputs: packed but for two linears."""
    simulated = ("classifier", "*.pooler.dense")
    passes = (
        Canonicalize(),
        BinaryCode(include=("*.intermediate.dense", "classifier")),
        QuantizeWeights(bits=2, ternary=True, include=("*.attention.output.dense",)),
        SplitOutliers(ratio=0.01),
        QuantizeWeights(bits=4),
        QuantizeActivations(bits=8),
        *(Lower(exclude=simulated), ComposeOps(), FuseEpilogue(), FuseParallelLinears()),
    )
    program = Pipeline(passes)(traced("bert-sequence-classification"))
    called = [node for node in program.graph.nodes if node.op == "call_function"]
    everything = set(ops.OP_NAMES) - BACKWARD - {"quantize", "scale_gradient", "uncalibrated"}
    assert {getattr(ops, name) for name in everything} <= {node.target for node in called}
    formats = {str(node.kwargs.get("format")) for node in called if node.target is ops.packed_linear}
    assert {"affine4:row", "bcq3:row", "ternary:row"} <= formats
    return program


def test_a_package_runs_without_python(built: Path, tmp_path: Path) -> None:
    program = mixed_program()
    package = export_aoti(program, tmp_path / "model.pt2")

    inputs = FAMILIES["bert-sequence-classification"]().make_inputs(1, 9)
    ids = [str(int(token)) for token in inputs["input_ids"][0]]
    done = run_package(built, package, *ids, "--repeat", "3")
    with torch.no_grad():
        torch.testing.assert_close(shown(done)["logits"], program(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert "ms a call (median of 3)" in done.stdout

    for words, wanted in (
        (["4", "97"], "prequant::packed_embedding: embedding ids reach from 4 to 97; the table has rows 0 to 96"),
        (["4", "-3"], "'-3' is not a whole number"),
        ([], "usage: run_package MODEL.pt2"),
    ):
        refused = run_package(built, package, *words)
        assert refused.returncode == 1 and f"run_package: {wanted}" in refused.stderr, refused.stderr
