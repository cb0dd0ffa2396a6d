"""AlphaTuning (Kwon et al., arXiv 2210.03858): binary-code the pre-trained model once, then tune one scale a row for
each task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from prequant.passes import BinaryCode, Canonicalize, Freeze, Lower, Pipeline, Program, Train
from prequant.runtime import PrequantError
from prequant.training import TrainingSettings

from .base import TuningRecipe, has_biases, head_weights, speed_passes


@dataclass(frozen=True)
class AlphaTuning(TuningRecipe):
    """Each linear weight becomes a sum of planes of signs, each row (or group) of a plane with a scale, alpha. What
    trains is the alpha of the first plane, and the task head if there is one; planes and other alphas are frozen.

    Binary coding looks at no data. Embeddings stay in float, and with them a head that is tied to one: they grow with
    the width where linears grow with its square. The paper trains without dropout and divides gradients of alphas by
    the number of weights that share one, which an optimizer such as AdamW notices little of. Raises
    :class:`PrequantError` for options that do not go together.
    """

    name: ClassVar[str] = "alphatuning"

    bits: int = 3
    """Planes of a weight: q in the paper, which takes 1 to 4."""
    group_size: int = 0
    """Weights along a row that share an alpha: g in the paper; 0 for the whole row."""
    refine: int = 0
    """Rounds of alternating refinement of planes and alphas after the greedy solution, which the paper takes."""
    embeddings: bool = False
    """Whether embeddings are coded, too."""
    train: tuple[Literal["first-alphas", "alphas", "head", "layer-norms", "biases"], ...] = ("first-alphas", "head")
    """What trains; 'alphas' are those of all planes. Nothing stands for binary coding alone."""
    mean_gradients: bool = True
    """Divide gradients of alphas by the number of weights that share one."""
    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(
            epochs=5.0,
            batch_size=8,
            head_learning_rate=1e-3,
            scale_learning_rate=0.1,
            weight_decay=0.0,
            dropout=False,
        ),
        kw_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if {"first-alphas", "alphas"} <= set(self.train):
            raise PrequantError("train: 'alphas' are the first ones, too; choose one of alphas and first-alphas")
        # Whatever the passes have against the options, they say it now and not after an hour of training.
        self._binary_code(())

    @property
    def trains(self) -> bool:
        """Whether anything trains."""
        return bool(self.train)

    def prepare(self, program: Program, head: tuple[str, ...]) -> Pipeline:
        """Binary coding, lowered so that training runs on packed planes, and the choice of what trains."""
        passes = [Canonicalize(), self._binary_code(head_weights(program, head)), Lower()]
        return Pipeline([*passes, self.tune(program, head)] if self.trains else passes)

    def tune(self, program: Program, head: tuple[str, ...]) -> Train:
        """Alphas, and what else is to train."""
        alphas = not {"first-alphas", "alphas"}.isdisjoint(self.train)
        return Train(
            alphas="alphas" in self.train,
            first_alphas="first-alphas" in self.train,
            mean_alpha_gradients=alphas and self.mean_gradients,
            layer_norms="layer-norms" in self.train,
            biases="biases" in self.train and has_biases(program),
            head=head if "head" in self.train else (),
        )

    def finish(self) -> Pipeline:
        """Nothing trains any more, so what can be fused is, and calls go by a plan."""
        return Pipeline([Freeze(), *speed_passes()])

    def _binary_code(self, kept: tuple[str, ...]) -> BinaryCode:
        return BinaryCode(
            bits=self.bits,
            group_size=self.group_size,
            refine=self.refine,
            embeddings=self.embeddings,
            exclude=kept,
        )
