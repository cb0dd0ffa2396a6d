"""PreQuant (Gong et al., arXiv 2306.00014): quantize the pre-trained model without data, then tune a few outliers per
task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from prequant.passes import (
    Canonicalize,
    Freeze,
    Lower,
    Pass,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    Train,
)
from prequant.runtime import Granularity, PrequantError
from prequant.runtime.quantizer import Quantizer
from prequant.training import TrainingSettings

from .base import TuningRecipe, has_biases, head_weights, speed_passes


@dataclass(frozen=True)
class PreQuant(TuningRecipe):
    """Stage 1 quantizes every linear weight and embedding, task head aside, and looks at no data. Stage 2 trains, on
    the task's loss alone, the parts named in ``train``; the codes stay frozen and packed.

    The paper is known to quantize all weights first, to choose the trained subset by its being outliers, and to train
    about 0.5 % of the model; its code is not public. What it leaves open are options. Weight decay never acts on
    outliers. Raises :class:`PrequantError` for options that do not go together.
    """

    name: ClassVar[str] = "prequant"

    bits: int = 4
    """Bits per weight: 2 to 8, or 1 for binary."""
    granularity: Granularity = Granularity.ROW
    """What shares a scale. The paper's is believed to be the whole matrix (tensor)."""
    group_size: int = 0
    """Weights that share a scale, with granularity 'group'."""
    symmetric: bool = True
    """Whether 0 lies in the middle of the levels."""
    strategy: str = "mse"
    """How scales are chosen; 'sigma' is the paper's rule, which looks at the deviation alone."""
    outlier_ratio: float = 0.01
    """Share of each matrix that is kept as outliers; 0 keeps none."""
    outlier_choice: Literal["largest", "random"] = "largest"
    """Which weights are called outliers; 'random' draws as many from the training's seed, to compare with."""
    outlier_mode: Literal["delta", "replace"] = "delta"
    """Whether an outlier adds to the quantized weight or stands in its place."""
    outlier_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """How outliers are stored in the end."""
    reset_outliers: bool = False
    """Start the outliers that train at the quantized weight (a delta of 0) instead of at the original."""
    train: tuple[Literal["outliers", "head", "layer-norms", "scales", "biases"], ...] = (
        "outliers",
        "head",
        "layer-norms",
        "scales",
        "biases",
    )
    """What stage 2 trains, biases where there are some; nothing stands for stage 1 alone."""
    train_embedding_outliers: bool = False
    """Whether the outliers of embeddings are among those that train. A batch reaches only the rows that it looks up."""
    activation_bits: int = 0
    """Bits of the inputs of linears, dynamically per token; 0 leaves them in float."""
    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(
            learning_rate=1.5e-3, head_learning_rate=1e-3, weight_decay=0.0, dropout=False
        ),
        kw_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.outlier_ratio < 1:
            raise PrequantError(
                f"outlier_ratio={self.outlier_ratio}: expected a share of the weights, from 0 to below 1"
            )
        if "outliers" in self.train and not self.outlier_ratio:
            raise PrequantError(
                "outlier_ratio=0 leaves no outliers to train: raise it, or leave 'outliers' out of train"
            )
        if self.reset_outliers and "outliers" not in self.train:
            raise PrequantError(
                "reset_outliers=true goes with 'outliers' in train: reset ones that do not train are lost"
            )
        # Whatever the passes have against the options, they say it now and not after an hour of training.
        Quantizer(self._quantize_weights(()).format(), self.strategy)
        self._split_outliers(())
        self._quantize_activations(())

    @property
    def trains(self) -> bool:
        """Whether stage 2 has anything to train."""
        return bool(self.train)

    def prepare(self, program: Program, head: tuple[str, ...]) -> Pipeline:
        """Stage 1, lowered so that stage 2 runs on packed codes, and the choice of what trains."""
        kept = head_weights(program, head)
        passes: list[Pass] = [
            *self._split_outliers(kept),
            self._quantize_weights(kept),
            *self._quantize_activations(kept),
            Lower(),
        ]
        if self.trains:
            passes.append(self.tune(program, head))
        return Pipeline([Canonicalize(), *passes])

    def tune(self, program: Program, head: tuple[str, ...]) -> Train:
        """Stage 2: the outliers, and what else is to train."""
        return Train(
            outliers="outliers" in self.train,
            scales="scales" in self.train,
            layer_norms="layer-norms" in self.train,
            biases="biases" in self.train and has_biases(program),
            head=head if "head" in self.train else (),
            embedding_outliers=self.train_embedding_outliers,
            reset_outliers=self.reset_outliers,
        )

    def finish(self) -> Pipeline:
        """Outlier values take their storage type; nothing trains any more, so what can be fused is, and calls go by a
        plan.
        """
        return Pipeline([Freeze(outlier_dtype=self.outlier_dtype), *speed_passes()])

    def _split_outliers(self, kept: tuple[str, ...]) -> list[Pass]:
        if not self.outlier_ratio:
            return []
        return [
            SplitOutliers(
                ratio=self.outlier_ratio,
                mode=self.outlier_mode,
                choice=self.outlier_choice,
                seed=self.training.seed if self.outlier_choice == "random" else 0,
                exclude=kept,
            )
        ]

    def _quantize_weights(self, kept: tuple[str, ...]) -> QuantizeWeights:
        return QuantizeWeights(
            bits=self.bits,
            granularity=self.granularity,
            group_size=self.group_size,
            symmetric=self.symmetric,
            strategy=self.strategy,
            exclude=kept,
        )

    def _quantize_activations(self, kept: tuple[str, ...]) -> list[Pass]:
        return [QuantizeActivations(bits=self.activation_bits, exclude=kept)] if self.activation_bits else []
