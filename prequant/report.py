"""The report of a compression: the float model and the compressed one side by side, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from prequant.inspection import WeightRow, error_summary, rows_to_json
from prequant.reconstruction import ModuleFigures
from prequant.training import TrainingResult

LATENCY_BATCH = 32


@dataclass(frozen=True)
class ModelFigures:
    """One column of the comparison.

    ``scores`` by metric, the one that models are compared by first; ``bytes_on_disk`` are those of the safetensors
    files; ``parameters`` those of the model before compression, ``trainable`` those of them that were trained;
    ``latency`` is in seconds, the median for one padded batch of :data:`LATENCY_BATCH`, or as many as settings say.
    ``bits``: of a parameter, for methods whose papers count as if every one took so many.
    """

    scores: Mapping[str, float]
    bytes_on_disk: int
    parameters: int
    trainable: int
    latency: float
    training: TrainingResult | None = None
    bits: int | None = None

    @property
    def nominal_bytes(self) -> int | None:
        """Bytes as papers count them: those that stay in float, and scales, are not told apart."""
        return None if self.bits is None else math.ceil(self.parameters * self.bits / 8)

    @property
    def metric(self) -> float | None:
        """The score that models are compared by; None where nothing was scored."""
        return next(iter(self.scores.values()), None)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"metric": self.metric, **asdict(self)}


@dataclass(frozen=True)
class CompressionReport:
    """What :func:`prequant.compress.compress` measured. ``baseline`` is None if there was nothing to compare with."""

    metric_name: str
    examples: int
    baseline: ModelFigures | None
    compressed: ModelFigures
    weights: list[WeightRow]
    settings: Mapping[str, Any]
    passes: list[dict[str, Any]] = field(default_factory=list)

    def comparison(self) -> dict[str, float]:
        """The compressed model against the float one; empty without a baseline.

        ``metric``: how much higher its score is, by the first metric. ``size`` and ``latency``: how many times smaller
        and faster it is.
        """
        base, ours = self.baseline, self.compressed
        if base is None:
            return {}
        scored = {} if ours.metric is None or base.metric is None else {"metric": ours.metric - base.metric}
        return {
            **scored,
            "size": base.bytes_on_disk / ours.bytes_on_disk,
            "latency": base.latency / ours.latency,
        } | self._nominal()

    def _nominal(self) -> dict[str, float]:
        """How many times smaller it is as papers count, where they count otherwise than in bytes on disk."""
        ours = self.compressed.nominal_bytes
        return {} if ours is None or self.baseline is None else {"nominal_size": 4 * self.baseline.parameters / ours}

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, with the same keys whatever was measured."""
        return {
            "metric_name": self.metric_name,
            "examples": self.examples,
            "baseline": self.baseline.to_json() if self.baseline else None,
            "compressed": self.compressed.to_json(),
            "comparison": self.comparison() or None,
            "error": error_summary(self.weights),
            "weights": rows_to_json(self.weights),
            "passes": self.passes,
            "settings": dict(self.settings),
        }

    # ---- the table ---------------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """The comparison, one column per model."""
        task = self.settings["task"]
        title = Text(str(self.settings["model"]) + (f" on {task}" if task else ""))
        table = Table(title=title, title_justify="left")
        table.add_column("", overflow="fold")
        columns = [figures for figures in (self.baseline, self.compressed) if figures is not None]
        if self.baseline is not None:
            table.add_column("fp32", justify="right")
        table.add_column(self.settings["recipe"]["recipe"], justify="right")
        if self.baseline is not None:
            table.add_column("compressed is", justify="right")
        for label, cell, verdict in self._rows():
            table.add_row(label, *map(cell, columns), *([verdict] if self.baseline is not None else []))
        error = error_summary(self.weights)
        if error["median_sqnr"] is not None:
            worst = "\n".join(f"  {item['sqnr']:.1f}  {item['weight']}" for item in error["worst"])
            table.caption = Text(f"SQNR of the weights: median {error['median_sqnr']:.1f} dB; lowest:\n{worst}")
            table.caption_justify = "left"
        return table

    def _rows(self) -> list[tuple[str, Callable[[ModelFigures], str], str]]:
        versus, threads = self.comparison(), self.settings["threads"]
        rows: list[tuple[str, Callable[[ModelFigures], str], str]] = [
            *map(self._score_row, self.compressed.scores),
            (
                "bytes on disk",
                lambda figures: f"{figures.bytes_on_disk:,}",
                _times(versus.get("size"), "smaller", "larger"),
            ),
            *self._nominal_row(),
            ("parameters", lambda figures: f"{figures.parameters:,}", ""),
            ("trained", lambda figures: f"{figures.trainable:,}", ""),
            ("share trained", lambda figures: f"{figures.trainable / figures.parameters:.2%}", ""),
            (
                f"ms, batch of {self.settings.get('latency_batch', LATENCY_BATCH)}, {threads} threads",
                lambda figures: f"{1e3 * figures.latency:.1f}",
                _times(versus.get("latency"), "faster", "slower"),
            ),
        ]
        if any(figures and figures.training for figures in (self.baseline, self.compressed)):
            rows += [
                ("seconds of training", _of_training(lambda training: f"{training.seconds:.0f}"), ""),
                (
                    "MB in training: weights + growth",
                    _of_training(lambda training: f"{training.peak_memory / 1e6:.0f}"),
                    "",
                ),
            ]
        return rows

    def _nominal_row(self) -> list[tuple[str, Callable[[ModelFigures], str], str]]:
        if self.compressed.bits is None:
            return []
        verdict = _times(self._nominal().get("nominal_size"), "smaller", "larger")
        return [
            (
                "bytes as papers count: bits times parameters",
                lambda figures: f"{figures.nominal_bytes or 4 * figures.parameters:,}",
                verdict,
            )
        ]

    def _score_row(self, name: str) -> tuple[str, Callable[[ModelFigures], str], str]:
        gain = self.compressed.scores[name] - self.baseline.scores[name] if self.baseline else None
        return (
            f"{name} ({self.examples:,} examples)",
            lambda figures: f"{figures.scores[name]:.4f}",
            "" if gain is None else f"{gain:+.4f}",
        )


@dataclass(frozen=True)
class ReconstructionReport(CompressionReport):
    """What :func:`prequant.reconstruct.reconstruct` measured: the comparison, and how each module fared.

    ``metric_name`` is empty, and scores are, where there was no task.
    """

    modules: tuple[ModuleFigures, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """See :meth:`CompressionReport.to_json`."""
        return {**super().to_json(), "modules": [asdict(module) for module in self.modules]}

    def modules_table(self) -> Table:
        """A row for each module."""
        table = Table(title="modules", title_justify="left")
        for column in ("", "layers", "steps", "seconds", "squared error, first steps", "last steps", "peak MB"):
            table.add_column(column, justify="right")
        for module in self.modules:
            losses = (f"{loss:.3g}" for loss in (module.first_loss, module.last_loss))
            numbers = (module.number + 1, module.blocks, f"{module.steps:,}", f"{module.seconds:.0f}")
            table.add_row(*map(str, numbers), *losses, f"{module.peak_memory / 1e6:.0f}")
        return table


def _times(factor: float | None, above: str, below: str) -> str:
    if factor is None:
        return ""
    return f"{factor:.2f}x {above}" if factor >= 1 else f"{1 / factor:.2f}x {below}"


def _of_training(cell: Callable[[TrainingResult], str]) -> Callable[[ModelFigures], str]:
    return lambda figures: "" if figures.training is None else cell(figures.training)
