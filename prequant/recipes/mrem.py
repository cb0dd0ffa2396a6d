"""MREM (Bai et al., arXiv 2109.15082): a fine-tuned model quantized with a few unlabelled texts, module by module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from prequant.passes import (
    Freeze,
    Lower,
    Pass,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    Train,
    calibrate,
)
from prequant.passes.train import quantizes_activation
from prequant.runtime import Granularity, PrequantError
from prequant.training import TrainingSettings

from .base import Recipe, check_options, head_weights, speed_passes, weights_to_quantize

TERNARY = 2


def _budget() -> TrainingSettings:
    """The paper's 2,000 steps of a module, at the rate that is believed to be its."""
    return TrainingSettings(max_steps=2000, learning_rate=1e-4, warmup=0.1, dropout=False)


@dataclass(frozen=True)
class MREM(Recipe):
    """The model is cut into modules of several layers. Each learns to give what it gives in float, by its weights and
    the scales of weights and activations, on what the quantized modules before it give: one module after the other
    (MREM-S), or all at once (MREM-P), each in a process of its own where there are several.

    At 3 to 8 bits the scales of weights train, as those of activations do; at 2 bits weights are ternary and at 1 bit
    binary, and scales follow them. Quantized are linears and the table of words; in float stay positions, token types,
    norms, biases and the task head. ``training`` is that of each module. Raises :class:`PrequantError` for options that
    do not go together.
    """

    name: ClassVar[str] = "mrem"

    bits: int = 4
    """Bits per weight: 1 is binary, 2 ternary, 3 to 8 uniform levels."""
    embedding_bits: int = 0
    """Bits of the table of words; 0: those of the other weights."""
    activation_bits: int = 8
    """Bits of the inputs of linears, 2 to 8, with static scales; 0 leaves them in float."""
    attention: bool = False
    """Whether queries, keys, values and probabilities are quantized as well, as published. They are only simulated: no
    kernel gains by it, attention is no longer fused, and transformers' own modules can't express it."""
    granularity: Granularity = Granularity.TENSOR
    """What shares a scale in a linear, the whole matrix in the paper. Rows of the table of words have one each."""
    modules: int = 4
    """How many modules, at most one for each layer."""
    balance: Literal["parameters", "flops"] = "flops"
    """Of which each module has about as much."""
    boundaries: tuple[int, ...] = ()
    """Instead of modules and balance: how many layers are before each cut, such as those that were measured to take as
    long as each other."""
    objective: Literal["output", "layers"] = "output"
    """What is compared: the modules' outputs, or those of all layers."""
    padding: bool = False
    """Whether padded positions count in the comparison."""
    samples: int = 4096
    """How many texts of the calibration set are drawn."""
    parallel: bool = False
    """All modules at once, on queues of what the one before gave lately."""
    queue: int = 100
    """Batches that a queue has, and is filled with before the modules train."""
    forcing: float = 0.5
    """Share of the steps in which the teacher's share of what modules hand on falls to none; 0: the student's alone."""
    training: TrainingSettings = field(default_factory=_budget, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        right = {
            "bits": (self.bits, "1 to 8", 1 <= self.bits <= 8),
            "embedding_bits": (self.embedding_bits, "1 to 8, or 0", 0 <= self.embedding_bits <= 8),
            "modules": (self.modules, "1 or more", self.modules >= 1),
            "samples": (self.samples, "1 or more", self.samples >= 1),
            "queue": (self.queue, "1 or more", self.queue >= 1),
            "forcing": (self.forcing, "a share of the steps, from 0 to 1", 0 <= self.forcing <= 1),
        }
        for name, (value, expected, fits) in right.items():
            if not fits:
                raise PrequantError(f"{name}={value}: expected {expected}")
        check_options(self.name, self.granularity, self.activation_bits)
        if self.attention and not self.activation_bits:
            raise PrequantError(
                "attention=True quantizes values inside attention: activation_bits=0 leaves all in float"
            )
        if 0 < self.embedding_bits <= TERNARY < self.bits:
            raise PrequantError(
                f"embedding_bits={self.embedding_bits} goes with 1 or 2 bits of the other weights, not with {self.bits}"
            )
        if self.training.eval_steps:
            raise PrequantError("mrem looks at no labels, so no state is better than the last: leave eval_steps 0")

    @property
    def trains(self) -> bool:
        """Always."""
        return True

    @property
    def parts(self) -> int:
        """How many modules there are."""
        return len(self.boundaries) + 1 if self.boundaries else self.modules

    @property
    def scales_follow(self) -> bool:
        """Whether scales of weights are chosen anew after each step, and do not train."""
        return self.bits <= TERNARY

    def prepare(
        self, original: Program, head: tuple[str, ...], batches: Iterable[Mapping[str, Tensor]], progress: bool = True
    ) -> Program:
        """The quantized copy of a canonical Program that is to learn. Scales of activations begin with what the float
        model gives for ``batches``; ``head`` names the parameters of the task head.
        """
        linears, words = weights_to_quantize(original, head, everywhere=True)
        program = original
        if self.activation_bits:
            program = calibrate(
                Pipeline([self._activations(head_weights(original, head))])(program), batches, progress=progress
            )
        program = Pipeline(self._weights(linears, words))(program)
        compressed = {*linears, *words}
        rest = [name for name, _ in original.named_parameters() if name not in compressed]
        ours = {name for name, _ in program.named_parameters()}
        trained = Train(
            latents=True,
            scales=not self.scales_follow,
            input_scales=bool(self.activation_bits),
            zero_points=any(node.args[2] is not None for node in program.graph.nodes if quantizes_activation(node)),
            head=tuple(name for name in rest if name in ours),
        )
        return Pipeline([trained])(program)

    def finish(self) -> Pipeline:
        """Latent weights become codes, and calls go by a plan."""
        return Pipeline([Freeze(), Lower(), *speed_passes()])

    def _activations(self, kept: tuple[str, ...]) -> QuantizeActivations:
        return QuantizeActivations(
            bits=self.activation_bits,
            granularity=Granularity.TENSOR,
            dynamic=False,
            observer="lsq",
            operands="matmul" if self.attention else "linear",
            asymmetric_after=("softmax", "activation"),
            exclude=kept,
        )

    def _weights(self, linears: tuple[str, ...], words: tuple[str, ...]) -> list[Pass]:
        of_words = self.embedding_bits or self.bits
        return [
            QuantizeWeights(**self._latent(self.bits), granularity=self.granularity, include=linears),
            QuantizeWeights(**self._latent(of_words), include=words),
        ]

    def _latent(self, bits: int) -> dict[str, Any]:
        """Options of latent weights. Those whose scale trains have no gradient outside its range."""
        steps = bits > TERNARY and not self.scales_follow
        strategy = "lsq" if steps else "minmax"
        return {"bits": bits, "ternary": bits == TERNARY, "strategy": strategy, "latent": True, "clipped": steps}
