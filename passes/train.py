"""Train: which parameters train; everything else is frozen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from prequant.runtime import Outliers, Scheme, WeightFormat, ops

from .base import PassError, Report, WeightPass
from .options import near_misses
from .packed import operands_of, scoped, uses_of
from .program import Program
from .scope import Scope, ScopeError
from .sites import OUTLIER_PREFIX, WeightSite
from .trained_alphas import expose_alphas, join_alphas
from .weights import WeightView, weights

aten = torch.ops.aten

HEAD = "head"
VALUES = OUTLIER_PREFIX + "values"
PART_KINDS = {"scale": "scales", "alphas": "alphas", VALUES: "outliers", "latent": "latents"}
"""Which option trains a part of a weight expression."""
PACKED_KINDS = {"bias": "biases", "input_scale": "input_scales", "input_zero_point": "zero_points"}
"""Which option trains an operand of a packed linear that is no part of its weight."""
MISSING = {
    "scales": "no weight has scales: quantize-weights comes first",
    "zero_points": "nothing has a zero point: they come with symmetric=False",
    "alphas": "no weight has alphas: binary-code comes first",
    "outliers": "no weight has outliers: split-outliers comes first",
    "latents": "no weight is latent: quantize-weights{latent=true} comes first",
    "input_scales": "no activation has a static scale: quantize-activations{dynamic=false} and calibrate come first",
    "biases": "no linear has a bias",
    "layer_norms": "there is no normalisation layer with parameters",
}
"""The options that train a kind of parameters, and what to say where a Program has none."""
NORM_OPS = (aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default, aten.group_norm.default)
NORM_TYPES = "*Norm"
"""Class names of normalisation layers that are written out in the graph, such as T5LayerNorm and LlamaRMSNorm."""


@dataclass(frozen=True)
class Train(WeightPass):
    """Say which parameters train: the kinds that are switched on, and the task head; all others are frozen.

    What trains is cloned, so that training changes neither the Program that this one was made from nor others that
    share its tensors; outlier values that are stored in 16 bits become float32. ``include`` and ``exclude`` choose
    among the parameters of the kinds by weight or module; the head is chosen by its own patterns, which are names.
    The report counts parameters by kind, with their share of the model, which is counted as it was before compression.
    Lowered Programs train as well: the packed ops compute on the same parameters.
    """

    name: ClassVar[str] = "train"
    ensures: ClassVar[tuple[str, ...]] = ("valid-formats",)

    scales: bool = False
    """Scales of quantized and latent weights."""
    zero_points: bool = False
    """Zero points of asymmetric weights, and of asymmetric static activations."""
    alphas: bool = False
    """All alphas of binary-coded weights."""
    first_alphas: bool = False
    """The alphas of the first plane alone; the others stay as they are. Until ``freeze`` puts them together again, the
    Program can't be saved."""
    mean_alpha_gradients: bool = False
    """Divide gradients of alphas by the number of weights that share one."""
    outliers: bool = False
    """Values of split outliers."""
    latents: bool = False
    """Float weights that are quantized in every forward pass."""
    input_scales: bool = False
    """Static scales of activations."""
    biases: bool = False
    """Biases of linears."""
    layer_norms: bool = False
    """Weights and biases of layer norms and their kin."""
    embedding_outliers: bool = True
    """Whether the outliers of weights that only embeddings read are among those that train."""
    head: tuple[str, ...] = ()
    """Names of further parameters, as patterns: the task head, such as ``classifier*``."""
    reset_outliers: bool = False
    """Start the outliers that train at what lies under them, the quantized value, instead of at the original weight."""

    def __post_init__(self) -> None:
        """Raises :class:`PassError` where nothing is to train, or outliers are reset that do not train."""
        super().__post_init__()
        if not self._wanted() and not self.head:
            raise PassError(f"nothing is to train: switch on one of {', '.join(MISSING)}, or name a head")
        if self.reset_outliers and not self.outliers:
            raise PassError("reset_outliers goes with outliers=True")
        if self.alphas and self.first_alphas:
            raise PassError("alphas=True trains the first ones, too: choose one of alphas and first_alphas")
        if self.mean_alpha_gradients and not (self.alphas or self.first_alphas):
            raise PassError("mean_alpha_gradients goes with alphas or first_alphas")

    def run(self, program: Program) -> Report:
        """Clone and unfreeze what trains, freeze the rest."""
        report = self.report()
        join_alphas(program, {view.name for view in weights(program)})
        views = weights(program)
        found = _candidates(program, views)
        model = _model_elements(program, views, found)
        kinds = self._chosen(found, report) | dict.fromkeys(self._head(program, views, report), HEAD)
        sharing = {view.tensors["alphas"]: _sharing(view) for view in views if "alphas" in view.tensors}
        sparse = [view for view in views if VALUES in view.tensors]
        starts = {view.tensors[VALUES]: _under(view) for view in sparse if self.reset_outliers}
        for name, value in list(program.named_parameters(remove_duplicate=False)):
            if kinds.get(name) == "alphas":
                gradient = 1 / sharing[name] if self.mean_alpha_gradients else 1.0
                trained = expose_alphas(program, name, self.first_alphas, gradient)
                report.rewrite(trained, "alphas", parameters=program.tensor(trained).numel())
            elif name in kinds:
                # Outliers stored in 16 bits would swallow the steps of an optimizer.
                master = value.detach().float() if ("outliers", name) in found else value.detach()
                program.set_tensor(name, starts.get(name, master).clone(), trainable=True)
                report.rewrite(name, kinds[name], parameters=value.numel())
            elif value.requires_grad:
                program.set_tensor(name, value, trainable=False)
        counts = Counter[str]()
        for change in report.changes:
            counts[change.how] += change.figures["parameters"]
        trainable = counts.total()
        report.totals.update(trainable=trainable, share=trainable / model, model=model)
        for kind, count in counts.items():
            report.totals.update({kind: count, f"{kind} share": count / model})
        return report

    # ---- choosing

    def _wanted(self) -> list[str]:
        return [kind for kind in MISSING if getattr(self, kind) or (kind == "alphas" and self.first_alphas)]

    def _chosen(self, found: dict[tuple[str, str], WeightSite], report: Report) -> dict[str, str]:
        """Kinds of the parameters that train, by name, without the head."""
        wanted = {key: site for key, site in found.items() if key[0] in self._wanted()}
        inside = set(map(id, Scope(self.include, self.exclude).split(wanted.values())[0]))
        chosen = {name: kind for (kind, name), site in wanted.items() if id(site) in inside}
        if not self.embedding_outliers:
            tables = {name for (kind, name), site in wanted.items() if kind == "outliers" and _is_looked_up(site)}
            chosen = {name: kind for name, kind in chosen.items() if name not in tables}
        for name in [name for _, name in wanted if name not in chosen]:
            report.keep(name, "out of scope")
        for kind in self._wanted():
            if kind not in chosen.values():
                some = any(key[0] == kind for key in wanted)
                raise PassError(f"{kind}=True, but " + ("none is in scope" if some else MISSING[kind]))
        return chosen

    def _head(self, program: Program, views: list[WeightView], report: Report) -> list[str]:
        """Names of the parameters that the head's patterns match."""
        names = [name for name, _ in program.named_parameters(remove_duplicate=False)]
        chosen = []
        for pattern in self.head:
            matched = [name for name in names if any(fnmatchcase(n, pattern) for n in program.names_of(name))]
            if not matched:
                raise ScopeError(f"the head {pattern!r} matches no parameter{near_misses(pattern, names)}")
            chosen += matched
        for view in views:
            stored = {"codes", "planes"} & view.tensors.keys()
            names = list(program.names_of(view.name))
            if stored and any(fnmatchcase(name, pattern) for name in names for pattern in self.head):
                report.keep(view.name, f"its {stored.pop()} do not train: exclude the head from quantization")
        return chosen


def _sharing(view: WeightView) -> int:
    """How many weights share an alpha."""
    return WeightFormat.parse(view.format).group_size or view.shape[1]


def _under(view: WeightView) -> Tensor:
    """Outlier values at which a weight is what it is without them."""
    tensors = {part: view.program.tensor(name) for part, name in view.tensors.items()}
    values, columns, offsets = (tensors[OUTLIER_PREFIX + part] for part in ("values", "columns", "row_offsets"))
    if not view.outliers_replace:
        return torch.zeros_like(values, dtype=torch.float32)
    dense = {part: name for part, name in view.tensors.items() if not part.startswith(OUTLIER_PREFIX)}
    positions = Outliers(values, columns, offsets, view.outliers_replace).positions()
    return replace(view, tensors=dense).value()[positions].float()


# ---- what there is


def _candidates(program: Program, views: list[WeightView]) -> dict[tuple[str, str], WeightSite]:
    """Parameters that options can train, by kind and name, each with what a scope sees of it."""
    found: dict[tuple[str, str], WeightSite] = {}
    for view in views:
        site = scoped(program, view.name, view.consumers)
        for part, name in view.tensors.items():
            if part in PART_KINDS:
                found[PART_KINDS[part], name] = site
            elif part == "zero_point" and WeightFormat.parse(view.format).scheme is Scheme.AFFINE:
                found["zero_points", name] = site
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if isinstance(program.tensor(name), torch.nn.Parameter):
            found |= {(kind, name): scoped(program, name, consumers) for kind, consumers in _uses(node).items()}
    return found


def _uses(node: fx.Node) -> dict[str, tuple[fx.Node, ...]]:
    """Kinds of a parameter that is no weight, with the products or norms that it serves."""
    uses: dict[str, tuple[fx.Node, ...]] = {}
    for user in node.users:
        operands = operands_of(user) if isinstance(user.target, torch._ops.OpOverload) else {}
        if user.target is aten.linear.default and operands.get("bias") is node:
            uses["biases"] = (*uses.get("biases", ()), user)
        for kind, operand in (("input_scales", "scale"), ("zero_points", "zero_point")):
            if quantizes_activation(user) and operands.get(operand) is node:
                uses[kind] = (*uses.get(kind, ()), *user.users)
    for use, operand in uses_of(node):
        if operand in PACKED_KINDS:
            kind = PACKED_KINDS[operand]
            uses[kind] = (*uses.get(kind, ()), use.consumer)
    if node.users and all(map(_is_norm, node.users)):
        uses["layer_norms"] = tuple(node.users)
    return uses


def quantizes_activation(node: fx.Node) -> bool:
    """Whether a node is the ``fake_quantize`` of a computed value, not of a latent weight."""
    if node.target is not ops.fake_quantize:
        return False
    return isinstance(node.args[0], fx.Node) and node.args[0].op != "get_attr"


def _is_looked_up(site: WeightSite) -> bool:
    return all(node.target in (aten.embedding.default, ops.packed_embedding) for node in site.consumers)


def _is_norm(node: fx.Node) -> bool:
    stack: Any = node.meta.get("module_stack", ())
    return node.target in NORM_OPS or (bool(stack) and fnmatchcase(stack[-1][1], NORM_TYPES))


def _model_elements(program: Program, views: list[WeightView], found: dict[tuple[str, str], WeightSite]) -> int:
    """Parameters of the model before compression: each weight's elements, and what belongs to no quantizer."""
    added = {name for view in views for name in view.tensors.values()}
    added |= {name for kind, name in found if kind in ("input_scales", "zero_points")}
    others = (value.numel() for name, value in program.named_parameters(remove_duplicate=False) if name not in added)
    return sum(view.shape[0] * view.shape[1] for view in views) + sum(others)
