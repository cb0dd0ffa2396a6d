"""XTC (Li et al., arXiv 2206.01859): fewer layers, then one or two bits, each distilled from the fine-tuned model in
one stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from prequant.distillation import COMPARED, layer_map
from prequant.passes import (
    DropLayers,
    Freeze,
    HideOutputs,
    Lower,
    Pass,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    Train,
)
from prequant.passes.blocks import find_stacks
from prequant.runtime import Granularity, PrequantError
from prequant.training import TrainingSettings

from .base import Stage, StagedRecipe, check_options, speed_passes, weights_to_quantize

FLOAT, TERNARY = 32, 2


def _budget() -> TrainingSettings:
    """That of the paper's scripts: 18 epochs, of which the first warms up, and the best of the states that are scored
    every 1,000 steps.
    """
    return TrainingSettings(epochs=18.0, warmup=1 / 18, eval_steps=1000)


@dataclass(frozen=True)
class XTC(StagedRecipe):
    """The student is made of the teacher's layers named by ``keep`` (or ``count``), and learns the teacher's logits,
    attention scores and hidden states on the task's data. Then its weights become binary or ternary: latent ones that
    train with an identity gradient, under scales that follow them. Inputs of linears get 8 bits for each token, and the
    student learns the same again, for long: that such models are trained too little is the paper's main finding.

    Quantized are the linears of the layers and the table of words; in float stay positions, token types, norms, biases,
    pooler and head. Raises :class:`PrequantError` for options that do not go together.
    """

    name: ClassVar[str] = "xtc"

    bits: int = 1
    """Bits per weight: 1 is binary, 2 ternary, 3 to 8 uniform levels; 32 leaves weights and activations in float."""
    keep: tuple[int, ...] = ()
    """Numbers of the teacher's layers that the student is made of; all, if neither this nor ``count`` is given."""
    count: int = 0
    """Instead of ``keep``: so many, evenly spaced."""
    granularity: Granularity = Granularity.TENSOR
    """What shares a scale in a linear, the whole matrix in the paper. Rows of the table of words have one each."""
    activation_bits: int = 8
    """Bits of the inputs of linears, dynamically per token; 0 leaves them in float."""
    layers: Literal["plain", "published"] = "plain"
    """Which of the teacher's states goes with the one that enters the student: what entered the same layer, or, as in
    the paper's code, the one before."""
    distil: bool = True
    """Whether the student learns from the teacher; else from the labels, to compare with."""
    reduction: TrainingSettings | None = field(default=None, kw_only=True)
    """The training after layers are dropped; the same as that under quantization, if not given."""
    training: TrainingSettings = field(default_factory=_budget, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != FLOAT and not 1 <= self.bits <= 8:
            raise PrequantError(f"bits={self.bits}: expected 1 to 8, or 32 for float weights")
        if self.bits == FLOAT and not self._drops:
            raise PrequantError("bits=32 and neither keep nor count: there is nothing to compress")
        check_options(self.name, self.granularity, self.activation_bits)
        # Whatever the passes have against the options, they say it now and not after an hour of training.
        if self._drops:
            self._drop()
        if self.bits != FLOAT:
            self._quantize(("*",), ("*",))

    @property
    def trains(self) -> bool:
        """Always."""
        return True

    @property
    def nominal_bits(self) -> int | None:
        """Those of the weights, so that 12 layers at one bit are 32 times smaller."""
        return self.bits

    @property
    def distils(self) -> bool:
        """Unless it is told to learn from labels."""
        return self.distil

    @property
    def stages(self) -> int:
        """One after layers are dropped, one under quantization."""
        return int(self._drops) + int(self.bits != FLOAT)

    def stage(self, number: int, program: Program, original: Program, head: tuple[str, ...]) -> Stage:
        """The training of fewer layers, or of fewer bits."""
        layers = layer_map(self._kept(original), self.layers == "published") if self.distil else None
        expose: list[Pass] = [COMPARED] if self.distil else []
        if self._drops and number == 0:
            # All of it trains, and is a copy: the teacher shares the tensors otherwise.
            passes = [self._drop(), Train(head=("*",)), *expose]
            return Stage(Pipeline(passes), self.reduction or self.training, layers)
        linears, words = weights_to_quantize(program, head)
        rest = tuple(name for name, _ in program.named_parameters() if name not in (*linears, *words))
        passes = [*self._quantize(linears, words), Train(latents=True, head=rest), *expose]
        return Stage(Pipeline(passes), self.training, layers, scales_follow=True)

    def finish(self) -> Pipeline:
        """What was only compared is no result any more, latent weights become codes, and calls go by a plan."""
        return Pipeline([HideOutputs(), Freeze(), Lower(), *speed_passes()])

    @property
    def _drops(self) -> bool:
        return bool(self.keep or self.count)

    def _drop(self) -> DropLayers:
        return DropLayers(keep=self.keep, count=self.count)

    def _kept(self, original: Program) -> Sequence[int]:
        stacks = find_stacks(original)
        if len(stacks) != 1:
            raise PrequantError(f"xtc is for models with one stack of layers; this one has {len(stacks)}")
        return self._drop().kept(stacks[0]) if self._drops else range(len(stacks[0]))

    def _quantize(self, linears: tuple[str, ...], words: tuple[str, ...]) -> list[Pass]:
        common: dict[str, Any] = {"bits": self.bits, "ternary": self.bits == TERNARY, "strategy": "minmax"}
        latent: dict[str, Any] = {**common, "latent": True, "clipped": False}
        passes: list[Pass] = [
            QuantizeWeights(**latent, granularity=self.granularity, include=linears),
            QuantizeWeights(**latent, include=words),
        ]
        if self.activation_bits:
            passes.append(QuantizeActivations(bits=self.activation_bits, include=linears))
        return passes
