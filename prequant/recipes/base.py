"""What a recipe is: one paper's method as data, the passes it runs and the training it asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from prequant.distillation import LayerMap
from prequant.passes import (
    ComposeOps,
    FuseEpilogue,
    FuseParallelLinears,
    OptionError,
    Pass,
    Pipeline,
    Plan,
    Program,
    Train,
    WeightSite,
    weight_sites,
)
from prequant.passes.blocks import find_stacks
from prequant.passes.options import fit, options_of
from prequant.passes.packed import packed_uses
from prequant.runtime import Granularity, PrequantError
from prequant.training import TrainingSettings


@dataclass(frozen=True)
class Stage:
    """One training of a recipe: the passes that come before it, and how it goes.

    ``layers``: what the passes make is a student, which exposes what is compared, and learns from the original model,
    its teacher, instead of from labels. ``scales_follow``: scales of latent weights are chosen anew after each step.
    """

    passes: Pipeline
    training: TrainingSettings
    layers: LayerMap | None = None
    scales_follow: bool = False


@dataclass(frozen=True)
class Recipe(ABC):
    """A method. Fields are the paper's hyper-parameters; ``name`` is what the command line calls it.

    As with passes, values are checked against the fields' types and brought into them (``"row"`` into its enum); a
    recipe that checks more calls ``super().__post_init__()`` first.
    """

    name: ClassVar[str] = ""

    training: TrainingSettings = field(default_factory=TrainingSettings, kw_only=True)

    def __post_init__(self) -> None:
        """Raises :class:`OptionError` for a value of another type."""
        for option in options_of(type(self)):
            try:
                value = fit(getattr(self, option.name), option.type)
            except OptionError as error:
                raise OptionError(f"option {option.name!r} of recipe {self.name!r}: {error}") from error
            object.__setattr__(self, option.name, value)

    @abstractmethod
    def finish(self) -> Pipeline:
        """Passes that run after the last training."""

    @property
    @abstractmethod
    def trains(self) -> bool:
        """Whether there is anything to train."""

    @property
    def nominal_bits(self) -> int | None:
        """Bits of a parameter where the paper counts a model's size as if every one took so many."""
        return None

    @property
    def distils(self) -> bool:
        """Whether the model is a teacher, which has to be fine-tuned for the task."""
        return False

    def settings(self) -> dict[str, Any]:
        """Name and every field."""
        return {"recipe": self.name, **asdict(self)}


@dataclass(frozen=True)
class StagedRecipe(Recipe):
    """A method that trains the whole model at once on a task's data, one time or several."""

    @abstractmethod
    def stage(self, number: int, program: Program, original: Program, head: tuple[str, ...]) -> Stage:
        """A training, counted from 0, of what the one before left of the program, at first the original, which is
        canonical; ``head`` names the parameters of the task head.
        """

    @property
    def stages(self) -> int:
        """How many trainings there are."""
        return 1


@dataclass(frozen=True)
class TuningRecipe(StagedRecipe):
    """A method that compresses first, and then trains a small part, for one task after another on the same codes."""

    @abstractmethod
    def prepare(self, program: Program, head: tuple[str, ...]) -> Pipeline:
        """Passes to run on ``program`` before the training."""

    @abstractmethod
    def tune(self, program: Program, head: tuple[str, ...]) -> Train:
        """The choice of what trains in a program whose weights are compressed."""

    def stage(self, number: int, program: Program, original: Program, head: tuple[str, ...]) -> Stage:
        """The one that there is."""
        return Stage(self.prepare(program, head), self.training)


def head_weights(program: Program, head: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the weights among the parameters of the task head, by which passes leave them alone."""
    return tuple(site.name for site in weight_sites(program) if not set(head).isdisjoint(site.names))


def check_options(recipe: str, granularity: Granularity, activation_bits: int) -> None:
    """Raise :class:`PrequantError` for options of a recipe that has no groups, and whose activations are of 2 to 8
    bits, or float.
    """
    if granularity is Granularity.GROUP:
        raise PrequantError(f"granularity='group': expected 'tensor' or 'row'; {recipe} has no groups")
    if activation_bits and not 2 <= activation_bits <= 8:
        raise PrequantError(f"activation_bits={activation_bits}: expected 2 to 8, or 0")


def weights_to_quantize(
    program: Program, head: tuple[str, ...], everywhere: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the linears of the layers (``everywhere``: those outside of them as well, such as a pooler's, but for
    the task head's), and of the table of words: the embedding with most rows.

    Raises :class:`PrequantError` for a model without one of them.
    """
    inside = {node for stack in find_stacks(program) for body in stack.bodies for node in body}
    sites = [site for site in weight_sites(program) if set(head).isdisjoint(site.names)]
    chosen = [site for site in sites if everywhere or inside.issuperset(site.consumers)]
    linears = tuple(site.name for site in chosen if site.kind == "linear")
    tables: list[WeightSite] = [site for site in sites if "embedding" in site.kind]
    if not linears or not tables:
        raise PrequantError("the model has no layers with linears, or no embedding, to quantize")
    return linears, (max(tables, key=lambda site: site.shape[0]).name,)


def has_biases(program: Program) -> bool:
    """Whether any linear of a canonical Program, lowered or not, has a bias: T5's have none."""
    linears = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    biases = [node.args[2] for node in linears if len(node.args) > 2]
    biases += [use.operands["bias"] for use in packed_uses(program.graph) if use.kind == "linear"]
    return any(bias is not None for bias in biases)


def speed_passes() -> tuple[Pass, ...]:
    """What makes a lowered Program fast that trains no more.

    Not before: a fused activation is computed again in every backward.
    """
    return (ComposeOps(), FuseEpilogue(), FuseParallelLinears(), Plan())
