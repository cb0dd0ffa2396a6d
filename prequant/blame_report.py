"""What blame found, in a table: which weights cost how much of the outputs, and what would help."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class NodeBlame:
    """One weight, with the linears and embeddings that read it. SQNRs are in dB, infinite where nothing moves.

    ``weight_sqnr``: of the weight against the original's. ``output_sqnr``: of what its consumers give for the inputs
    that they have in the original. ``only_sqnr``: of the model's outputs if this node alone is compressed.
    ``restored_sqnr``: the same if all but it are. ``gain``: how much more that is than with all of them.
    """

    name: str
    kind: str
    format: str
    input_format: str
    bytes: int
    weight_sqnr: float
    output_sqnr: float
    only_sqnr: float
    restored_sqnr: float
    gain: float


@dataclass(frozen=True)
class Advice:
    """What to do about a node: the ``format`` to store it in, what the outputs gain in dB, all else being as it is, and
    how many bytes more it takes.
    """

    name: str
    format: str
    gain: float
    extra_bytes: int

    def __str__(self) -> str:
        scheme = self.format.partition(":")[0]
        how = f"at {scheme.removeprefix('affine')} bits" if scheme.startswith("affine") else f"in {scheme}"
        return f"keep {_short(self.name)} {how}: {_gain(self.gain)} dB for {self.extra_bytes / 1e6:.3g} MB"


@dataclass(frozen=True)
class BlameReport:
    """Every compressed weight, the one whose restoration gains most first.

    ``whole_sqnr``: of the outputs of the compressed model against the original's. ``rest_sqnr``: the same with all of
    these weights restored, so what everything else (biases, norms, products of activations) is to blame for.
    """

    nodes: tuple[NodeBlame, ...]
    whole_sqnr: float
    rest_sqnr: float
    advice: tuple[Advice, ...]
    batches: int

    def table(self) -> Table:
        """A row for each node."""
        table = Table(title=Text(f"blame: {_decibel(self.whole_sqnr)} dB in all"), title_justify="left")
        table.caption = Text(
            "SQNR in dB: of the weight, of its node's output, of the model's outputs with only this node compressed, "
            f"with all but it, and what that gains. All of them restored: {_decibel(self.rest_sqnr)}."
        )
        table.caption_justify = "left"
        table.add_column("node", overflow="fold")
        table.add_column("format", overflow="fold")
        for heading in ("bytes", "weight", "output", "only", "all but", "gain"):
            table.add_column(heading, justify="right", no_wrap=True)
        for node in self.nodes:
            figures = (node.weight_sqnr, node.output_sqnr, node.only_sqnr, node.restored_sqnr)
            format = "\n".join([node.format, *([f"x {node.input_format}"] if node.input_format else [])])
            cells = (_short(node.name), format, f"{node.bytes:,}", *map(_decibel, figures), _gain(node.gain))
            table.add_row(*map(Text, cells))
        return table

    def to_dict(self) -> dict[str, Any]:
        """The report as values that JSON knows; an infinite figure is None."""
        return {
            "whole_sqnr": _finite(self.whole_sqnr),
            "rest_sqnr": _finite(self.rest_sqnr),
            "batches": self.batches,
            "nodes": [{key: _finite(value) for key, value in asdict(node).items()} for node in self.nodes],
            "advice": [{key: _finite(value) for key, value in asdict(item).items()} for item in self.advice],
        }


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decibel(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.2f}"


def _gain(value: float) -> str:
    return "all" if value == math.inf else f"{value:+.2f}"
