"""Which nodes cost the accuracy: each weight compressed alone, and restored alone, in one Program and its original."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from tqdm.auto import tqdm

from prequant.blame_report import Advice, BlameReport, NodeBlame
from prequant.inspection import WeightRow, weight_rows
from prequant.passes import ExampleBatches, Program, weights
from prequant.passes.output_noise import OutputNoise, float_results
from prequant.passes.substitution import Change, Form, Substitution, forms_of
from prequant.passes.weights import WeightView
from prequant.runtime import PrequantError, Quantizer, Scheme, WeightFormat, reference

ADVISED_BITS = 8
"""What a weight that costs much is advised to be stored in."""
ENOUGH = 0.5
"""The share of what float32 would gain that these have to; else that is the advice."""


class BlameError(PrequantError):
    """Programs that can't be set against each other, or nothing to blame."""


@dataclass(frozen=True)
class _Node:
    """A weight in both Programs: its row, and the forms of its consumers by their nodes, in either."""

    row: WeightRow
    compressed: dict[fx.Node, Form]
    original: dict[fx.Node, Form]

    @property
    def only(self) -> Change:
        """In the original: this one as it is compressed."""
        return Change(forms=dict(zip(self.original, self.compressed.values(), strict=True)))

    @property
    def restored(self) -> Change:
        """In the compressed Program: this one as it is in the original."""
        return Change(forms=dict(zip(self.compressed, self.original.values(), strict=True)))

    def stored_in(self, format: WeightFormat) -> Change:
        """In the compressed Program: this one's weight in another format."""
        exact = next(iter(self.original.values())).weight
        codes, scale, zero_point = Quantizer(format)(exact)
        weight = reference.dequantize(codes, scale, zero_point, format, exact.shape[1]).to(exact.dtype)
        return Change(forms={node: replace(form, weight=weight) for node, form in self.compressed.items()})


def blame(
    program: Program,
    original: Program,
    batches: ExampleBatches | Iterable[Mapping[str, Tensor]],
    *,
    advise: int = 3,
    progress: bool = True,
) -> BlameReport:
    """Which of the weights of ``program`` cost how much of its outputs, against ``original``.

    ``program`` is compressed, simulated or lowered; ``original`` is the model that it was made of, in canonical form.
    ``batches`` are inputs of both, by name; padding counts like all else. A node is a weight with the linears and
    embeddings that read it, and the quantization of their inputs. Of each: what the outputs of ``original`` lose if it
    alone is compressed, and those of ``program`` gain if it alone is not. For ``N`` of them that takes about ``N`` runs
    of every batch, as a run begins where the node is. For the ``advise`` nodes whose restoration gains most, 8 bits are
    tried; where they are what there is, or gain less than half as much, the advice is float32.

    Both are held as float weights meanwhile. Raises :class:`BlameError` for Programs of different models or without a
    compressed weight, and :class:`PrequantError` for batches that they don't take.
    """
    if not isinstance(batches, ExampleBatches):
        batches = ExampleBatches(batches)
    exact, close = Substitution(original), Substitution(program)
    nodes = _nodes(exact.program, close.program)
    everything = Change(forms={node: form for each in nodes for node, form in each.restored.forms.items()})
    only, restored, outputs = ([OutputNoise() for _ in nodes] for _ in range(3))
    whole, rest = OutputNoise(), OutputNoise()
    places = {node: (i, form) for i, each in enumerate(nodes) for node, form in each.only.forms.items()}
    references: list[dict[str, Tensor]] = []
    bar = tqdm(total=2 * len(nodes) * len(batches), desc="blaming", unit="run", disable=not progress)
    with torch.no_grad(), bar:
        for inputs, others in zip(batches.bound(original), batches.bound(program), strict=True):

            def watch(node: fx.Node, value: Tensor, result: object) -> None:
                if node in places:
                    number, form = places[node]
                    outputs[number].add({"": value}, {"": result(form)})  # type: ignore[operator]

            wanted = float_results(original, exact.results(inputs, watch=watch))
            references.append(wanted)
            whole.add(wanted, float_results(program, close.results(others)))
            rest.add(wanted, float_results(program, close.results(others, everything)))
            for run, given, changes, found in (
                (exact, inputs, [each.only for each in nodes], only),
                (close, others, [each.restored for each in nodes], restored),
            ):
                for number, results in run.each(given, changes):
                    found[number].add(wanted, float_results(run.program, results))
                    bar.update()
    made = [
        NodeBlame(
            name=each.row.name,
            kind=each.row.kind,
            format=each.row.format,
            input_format=each.row.input_format,
            bytes=each.row.bytes,
            weight_sqnr=math.inf if each.row.sqnr is None else each.row.sqnr,
            output_sqnr=outputs[i].sqnr,
            only_sqnr=only[i].sqnr,
            restored_sqnr=restored[i].sqnr,
            gain=_gain(whole.sqnr, restored[i].sqnr),
        )
        for i, each in enumerate(nodes)
    ]
    order = sorted(range(len(made)), key=lambda i: (-made[i].gain, made[i].only_sqnr))
    chosen = [(nodes[i], made[i]) for i in order[:advise]]
    advice = _advice(close, program, batches, references, chosen, whole.sqnr, progress)
    return BlameReport(tuple(made[i] for i in order), whole.sqnr, rest.sqnr, advice, len(batches))


def _nodes(original: Program, program: Program) -> list[_Node]:
    """Every weight that is compressed, or whose input is quantized."""
    rows = {row.name: row for row in weight_rows(program, original)}
    floats = {name: view for view in weights(original) for name in original.names_of(view.name)}
    found = []
    for view in weights(program):
        row = rows[view.name]
        if row.is_compressed or row.input_format:
            found.append(_Node(row, forms_of(view), forms_of(_same(view, floats))))
            if len(found[-1].compressed) != len(found[-1].original):
                counts = f"{len(found[-1].compressed)} places, in the original in {len(found[-1].original)}"
                raise BlameError(f"{view.name} is read in {counts}: this is another model")
    if not found:
        raise BlameError("no weight is compressed: there is nothing to blame")
    return found


def _same(view: WeightView, floats: Mapping[str, WeightView]) -> WeightView:
    found = next((floats[name] for name in view.program.names_of(view.name) if name in floats), None)
    if found is None:
        raise BlameError(f"{view.name} is not in the original: this is another model")
    return found


def _gain(before: float, after: float) -> float:
    return 0.0 if before == after else after - before


def _advice(
    run: Substitution,
    program: Program,
    batches: ExampleBatches,
    references: Sequence[dict[str, Tensor]],
    chosen: Sequence[tuple[_Node, NodeBlame]],
    whole: float,
    progress: bool,
) -> tuple[Advice, ...]:
    """What helps the chosen nodes, with what it gains; those that nothing helps are left out."""
    tried = [(node, found, format) for node, found in chosen if (format := _wider(node.row.format)) is not None]
    noise = [OutputNoise() for _ in tried]
    changes = [node.stored_in(format) for node, _, format in tried]
    bar = tqdm(total=len(tried) * len(batches), desc="trying advice", unit="run", disable=not progress or not tried)
    with torch.no_grad(), bar:
        for inputs, wanted in zip(batches.bound(program), references, strict=True):
            for number, results in run.each(inputs, changes):
                noise[number].add(wanted, float_results(program, results))
                bar.update()
    advice = {
        found.name: Advice(
            found.name, str(format), _gain(whole, each.sqnr), _bytes(format, *node.row.shape) - found.bytes
        )
        for (node, found, format), each in zip(tried, noise, strict=True)
    }
    for node, found in chosen:
        if found.name not in advice or advice[found.name].gain < ENOUGH * found.gain:
            more = node.row.float_bytes - found.bytes
            advice[found.name] = Advice(found.name, "float32", found.gain, more)
    return tuple(sorted((each for each in advice.values() if each.gain > 0), key=lambda each: -each.gain))


def _wider(text: str) -> WeightFormat | None:
    """The format of more bits to try in the place of one, of the same granularity; None if float is what is left."""
    if ":" not in text:
        return None
    format = WeightFormat.parse(text)
    if format.scheme is Scheme.AFFINE and format.bits >= ADVISED_BITS:
        return None
    return WeightFormat.affine(ADVISED_BITS, format.granularity, format.group_size, format.symmetric)


def _bytes(format: WeightFormat, rows: int, columns: int) -> int:
    """Bytes of a weight's codes, scales and zero points."""
    scales = math.prod(format.scale_shape(rows, columns)) * torch.float32.itemsize
    return math.prod(format.codes_shape(rows, columns)) + scales * (1 if format.symmetric else 2)
