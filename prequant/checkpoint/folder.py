"""A Program as an ordinary Hugging Face model folder, and back.

* ``config.json``: the model's configuration, with ``quantization_config`` (see ``config.py``)
* ``model.safetensors``: the model's state: floats under the model's names, a compressed weight ``W`` as ``W.codes``,
  ``W.scale``, ... (see ``weight_tensors.py``); tied weights once
* ``prequant.json``: the graph (see ``graph_file.py``), the list of tensors, the digests of the tensor files
* ``prequant-constants.safetensors``: tensors of the graph that the model's own state does not have, if there are any

and ``generation_config.json`` and the tokenizer's files where there are such. :func:`load` reads the graph;
``AutoModel....from_pretrained`` reads ``config.json`` and ``model.safetensors`` only. Weights that the graph keeps as
``[out, in]`` and the model the other way round (GPT-2) are written as the model has them while they are plain floats.
"""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prequant.model import ModelProgram
from prequant.passes import Program, ProgramInfo
from prequant.passes.plan import is_lowered
from prequant.runtime import LAYOUT_VERSION, PrequantError
from prequant.traced import TracedProgram

from .atomic import replacing
from .check import check_graph
from .config import QuantizationSpec, decode_spec
from .describe import describe_program
from .errors import CheckpointError
from .graph_file import decode_aliases, decode_graph, decode_signature, encode_graph, encode_signature, is_tensor_name
from .json_file import Record, describe, read_json
from .model_file import GENERATION_FILE, config_json, decode_extra, encode_extra, write_generation_config
from .paths import inside
from .targets import NAMESPACES
from .tensors import Stored, decode_table, digest, read_tensors, write_tensors

GRAPH_VERSION = 1
"""Version of ``prequant.json``. A reader refuses every version it does not know."""

MODEL_FILE, CONSTANTS_FILE = "model.safetensors", "prequant-constants.safetensors"
GRAPH_FILE, CONFIG_FILE = "prequant.json", "config.json"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5}\.safetensors|\.safetensors\.index\.json)")


# ---- saving ----------------------------------------------------------------------------------------------------------


def save(program: Program, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Save a Program, with its tokenizer if one is given. Returns the folder.

    The folder appears whole or not at all. If there is one already, its model is replaced and its other files stay;
    after an error it is as it was. What is saved does not depend on train or eval mode. Raises :class:`CheckpointError`
    for a Program that could not be loaded again, for instance one with NaN in a scale.
    """
    program = program.copy().train(False)
    folder = Path(folder)
    tensors = {name: program.tensor(name) for name in _read_names(program)}
    check_graph(program.graph, tensors, lambda name: name, "the Program")
    spec = describe_program(program)
    constants = set(program.info.constants)
    stored = {name: _stored(program, name, tensor) for name, tensor in tensors.items()}
    files = {
        MODEL_FILE: {n: t.t() if stored[n].transposed else t for n, t in tensors.items() if n not in constants},
        CONSTANTS_FILE: {n: t for n, t in tensors.items() if n in constants},
    }
    content = _graph_json(program, stored, files)
    with replacing(folder, is_ours) as staging:
        for name, held in files.items():
            if held or name == MODEL_FILE:
                write_tensors(staging / name, held)
                content["files"][name] |= {"sha256": digest(staging / name)}
        _write_json(staging / CONFIG_FILE, config_json(program, spec), indent=2)
        _write_json(staging / GRAPH_FILE, content)
        write_generation_config(program, staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
    return folder


def is_ours(name: str) -> bool:
    """Whether a file of a folder that is saved over belongs to the version before: one written here, or a shard."""
    ours = (MODEL_FILE, CONSTANTS_FILE, GRAPH_FILE, CONFIG_FILE, GENERATION_FILE)
    return name in ours or _SHARD.fullmatch(name) is not None


def _read_names(program: Program) -> list[str]:
    """Names of the tensors that the graph reads, in the order of the model's modules."""
    read = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    held = [name for name, _ in (*program.named_parameters(), *program.named_buffers()) if name in read]
    if missing := sorted(read - set(held)):
        raise CheckpointError(f"the graph reads {missing[0]}, which is no tensor of the Program")
    if bad := [name for name in held if not is_tensor_name(name)]:
        raise CheckpointError(
            f"the tensor {bad[0]!r} can't be saved: names are letters, digits, '_' and '-', with dots between"
        )
    return held


def _stored(program: Program, name: str, tensor: Tensor) -> Stored:
    parameter = isinstance(tensor, nn.Parameter)
    transposed = name in program.info.transposed and name not in program.info.constants
    return Stored(tensor.dtype, tuple(tensor.shape), parameter, parameter and tensor.requires_grad, transposed)


def _graph_json(program: Program, stored: dict[str, Stored], files: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    return {
        "version": GRAPH_VERSION,
        "layout": LAYOUT_VERSION,
        "written_by": {name: _version(name) for name in ("prequant", "torch", "transformers")},
        "signature": encode_signature(program.signature),
        "aliases": {name: list(names) for name, names in program.info.aliases.items()},
        "transposed": list(program.info.transposed),
        "extra": encode_extra(program),
        "files": {
            name: {"tensors": {n: stored[n].encode() for n in held}}
            for name, held in files.items()
            if held or name == MODEL_FILE
        },
        **encode_graph(program.graph),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout on the path, not installed
        return "unknown"


def _write_json(path: Path, value: dict[str, Any], indent: int | None = None) -> None:
    separators = None if indent else (",", ":")
    path.write_text(json.dumps(value, indent=indent, separators=separators, allow_nan=False) + "\n", encoding="utf-8")


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    trusted_ops: tuple[str, ...] = (),
    verify: bool = True,
    mapped: bool = True,
) -> Program:
    """Load the Program that :func:`save` wrote: a :class:`ModelProgram` if it came from a transformers model; in eval
    mode.

    The folder may come from anywhere: everything in it is checked before anything is computed, and nothing in it is run
    but graphs of known operators. ``trusted_ops``: further operator namespaces (of passes from other packages) that its
    graph may call. ``verify=False`` accepts tensor files that are well-formed but not the ones that were saved together
    with the graph. ``mapped``: packed codes stay in the file and in the system's cache of it, until kernels pack them
    anew, so that no process holds them twice. Replacing the folder's files does no harm then, as :func:`save` does it;
    writing into them would. Raises :class:`CheckpointError` that names the file, what is wrong in it, and what would be
    right.
    """
    folder = Path(folder)
    config = Record(read_json(inside(folder, CONFIG_FILE)), str(folder / CONFIG_FILE))
    if not (folder / GRAPH_FILE).exists():
        raise CheckpointError(
            f"{folder} has no {GRAPH_FILE}, so it holds no Program; 'prequant opt' makes one of a model, and "
            "AutoModel....from_pretrained loads it as it is"
        )
    record = Record(read_json(inside(folder, GRAPH_FILE)), str(folder / GRAPH_FILE))
    _check_versions(record)
    try:
        return _load(folder, config, record, device, (*NAMESPACES, *trusted_ops), verify, mapped)
    except CheckpointError:
        raise
    except PrequantError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _load(
    folder: Path,
    config: Record,
    record: Record,
    device: torch.device | str,
    namespaces: tuple[str, ...],
    verify: bool,
    mapped: bool,
) -> Program:
    spec = QuantizationSpec()
    if "quantization_config" in config.value:
        spec = decode_spec(config.value["quantization_config"], f"{config.where}, quantization_config")
    files = dict(record.records("files"))
    if not {MODEL_FILE} <= files.keys() <= {MODEL_FILE, CONSTANTS_FILE}:
        names = describe(sorted(files))
        raise CheckpointError(
            f"{record.where}, files: {names}; expected {MODEL_FILE}, and perhaps {CONSTANTS_FILE}, in the same folder"
        )
    tables = {name: decode_table(entry.only(("tensors", "sha256")), "tensors") for name, entry in files.items()}
    holders = {tensor: name for name, table in tables.items() for tensor in table}
    if len(holders) != sum(map(len, tables.values())):
        twice = sorted(set.intersection(*(set(table) for table in tables.values())))
        raise CheckpointError(f"{record.where}: the tensor {twice[0]} stands in more than one file")
    graph = decode_graph(record, holders.keys(), namespaces)
    info = ProgramInfo(
        signature=decode_signature(record.record("signature"), graph),
        aliases=decode_aliases(record.record("aliases")),
        extra=decode_extra(record.record("extra"), config, folder),
        constants=tuple(tables.get(CONSTANTS_FILE, ())),
        transposed=record.strings("transposed"),
    )
    tensors: dict[str, Tensor] = {}
    for name, table in tables.items():
        tensors |= read_tensors(inside(folder, name), table, mapped)
    check_graph(graph, tensors, lambda name: f"{folder / holders[name]}: {name}", record.where)
    if verify:
        for name, entry in files.items():
            _check_digest(folder / name, entry)
    stored = {tensor: entry for table in tables.values() for tensor, entry in table.items()}
    program = _assemble(tensors, stored, graph, info, record, device)
    found = describe_program(program)
    if not found.is_plain or "quantization_config" in config.value:
        _check_spec(config, spec, found)
    return program


def _check_spec(config: Record, spec: QuantizationSpec, found: QuantizationSpec) -> None:
    """What transformers would load has to be what the graph computes with."""
    said, meant = spec.encode(), found.encode()
    for key in meant:
        if said[key] != meant[key]:
            raise CheckpointError(
                f"{config.where}, quantization_config: {key} is not what {GRAPH_FILE} says; "
                "the files don't belong together"
            )


def _check_versions(record: Record) -> None:
    for key, known in (("version", GRAPH_VERSION), ("layout", LAYOUT_VERSION)):
        if (found := record.get(key, int)) != known:
            raise CheckpointError(f"{record.where}: {key} {found}; this prequant reads {key} {known}")
    record.only(
        ("version", "layout", "written_by", "signature", "aliases", "transposed", "extra", "files", "stacks", "nodes")
    )


def _check_digest(path: Path, entry: Record) -> None:
    expected, found = entry.get("sha256", str), digest(path)
    if found != expected:
        raise CheckpointError(
            f"{path}: its SHA-256 is {found}, not {describe(expected)} as when it was saved: "
            "the file is damaged or was replaced. verify=False loads it all the same"
        )


def _assemble(
    tensors: dict[str, Tensor],
    stored: dict[str, Stored],
    graph: Any,
    info: ProgramInfo,
    record: Record,
    device: torch.device | str,
) -> Program:
    root = nn.Module()
    try:
        for name, tensor in tensors.items():
            _register(root, name, tensor.to(device), stored[name])
    except KeyError as error:  # what nn.Module says of a name that is an attribute of modules
        raise CheckpointError(f"{record.where}: a tensor can't have that name: {error}") from error
    kind = ModelProgram if "model" in record.record("extra").value else TracedProgram
    program = kind(root, graph, info)
    program.planned = is_lowered(program)
    return program.train(False)


def _register(root: nn.Module, name: str, tensor: Tensor, stored: Stored) -> None:
    module = root
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    if stored.parameter:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=stored.trainable))
    else:
        module.register_buffer(leaf, tensor)
