"""What there is to show of a Program and its way through a pipeline, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from prequant.measure import plain


class TensorRecord(NamedTuple):
    """A tensor that a node reads."""

    name: str
    shape: str
    dtype: str
    bytes: int


@dataclass(frozen=True)
class NodeRecord:
    """One node of a graph, as it was for one or several stages; tensors are not nodes but belong to their readers.

    ``kind``: ``input``, ``op`` or ``output``. ``data``: whether it is a value, not a size or a check. ``uses``: names
    of the weights that it computes with as a linear or an embedding; ``makes``: the one whose value it makes of codes,
    scales or outliers.
    """

    name: str
    kind: str
    data: bool
    target: str
    text: str
    module: str
    shape: str
    dtype: str
    inputs: tuple[str, ...]
    tensors: tuple[TensorRecord, ...]
    uses: tuple[str, ...]
    makes: str | None


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width from ``low`` to ``high``: of the weight as it was at first
    (``original``, None where that is not known), as it is (``current``), and of the outliers among these.
    """

    low: float
    high: float
    original: tuple[int, ...] | None
    current: tuple[int, ...]
    outliers: tuple[int, ...] | None


@dataclass(frozen=True)
class WeightRecord:
    """One weight as it was for one or several stages.

    ``bits``: stored per element, with scales and outliers. ``sqnr``: in dB against the weight as it was at first, None
    where that is not known, ``inf`` where it is the same. ``levels``: the values that codes have at the median scale
    (and median zero point, or alphas); empty where there are none or too many to mark. ``codes``: how often each code
    occurs. ``scales``: least, median and largest.
    """

    name: str
    kind: str
    format: str
    input_format: str
    shape: tuple[int, int]
    bytes: int
    float_bytes: int
    bits: float
    outliers: int
    lowered: bool
    sqnr: float | None
    recorded: bool
    """Whether ``sqnr`` was written down when the model was saved, instead of measured now."""
    histogram: Histogram | None
    levels: tuple[float, ...]
    codes: tuple[int, ...]
    scales: tuple[float, float, float] | None


@dataclass(frozen=True)
class Stage:
    """The Program before the pipeline, or after one of its passes.

    ``title``: the name of the pass, ``source``: its text form; it ran for ``seconds``. ``nodes``, ``removed`` and
    ``weights`` are places in the lists of the :class:`Record`; ``removed`` holds nodes of the stage before. ``added``
    and ``rewritten`` go by the name of the node; the latter says what the node was before. ``errors`` (dB) are of the
    nodes' values on the batch, ``times`` (seconds) of the nodes, by name. ``results``: SQNR in dB of what the Program
    returns.
    """

    title: str
    source: str
    seconds: float
    changed: int
    kept: int
    bytes: int
    float_bytes: int
    mean_bits: float | None
    nodes: tuple[int, ...]
    weights: tuple[int, ...]
    added: tuple[str, ...] = ()
    removed: tuple[int, ...] = ()
    rewritten: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)


@dataclass
class Record:
    """Everything that the page and the pictures show.

    ``original_bytes``: of the Program that it began with; of a compressed one, as if its weights were float32.
    ``modules``: class by path. ``batch``: what errors and times were measured on, empty if they were not. ``notes``:
    what the reader should know of what is missing, and why.
    """

    title: str
    pipeline: str = ""
    batch: str = ""
    original_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)
    nodes: list[NodeRecord] = field(default_factory=list)
    weights: list[WeightRecord] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON knows; infinite numbers are text (``"inf"``)."""
        content: dict[str, Any] = plain(asdict(self))
        return content
