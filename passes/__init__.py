"""The graph: Programs, weight sites, scopes, and one file per pass. Knows nothing of transformers, training or
files.
"""

from .allocate_bits import AllocateBits
from .base import Pass, PassError, Report, WeightPass
from .binary_code import BinaryCode
from .calibrate import CalibrationError, calibrate
from .canonicalize import Canonicalize
from .compose_ops import ComposeOps
from .config import ConfigError
from .drop_layers import DropLayers
from .example_batches import BatchError, ExampleBatches
from .expose_outputs import ExposeOutputs
from .freeze import Freeze
from .fuse_epilogue import FuseEpilogue
from .fuse_parallel_linears import FuseParallelLinears
from .hide_outputs import HideOutputs
from .lower import Lower, lower
from .networkx_graph import to_networkx
from .observers import Damage, Dump, Observer, Step, Timing, Verify
from .options import Option, OptionError
from .partition import Cut, Partitioned, partition
from .pipeline import Pipeline
from .plan import Plan
from .printing import readable
from .program import Input, Program, ProgramInfo, Signature
from .properties import define_property
from .quantize_activations import QuantizeActivations
from .quantize_weights import QuantizeWeights
from .registry import PassDescription, RegistryError, broken_passes, describe, find_pass, known_passes
from .scope import Scope, ScopeError
from .shapes import propagate_shapes
from .sites import WeightSite, weight_sites
from .split_outliers import SplitOutliers
from .text import PassTextError, parse_pass
from .train import Train
from .weights import WeightView, weights

__all__ = [
    "AllocateBits",
    "BatchError",
    "BinaryCode",
    "CalibrationError",
    "Canonicalize",
    "ComposeOps",
    "ConfigError",
    "Cut",
    "Damage",
    "DropLayers",
    "Dump",
    "ExampleBatches",
    "ExposeOutputs",
    "Freeze",
    "FuseEpilogue",
    "FuseParallelLinears",
    "HideOutputs",
    "Input",
    "Lower",
    "Observer",
    "Option",
    "OptionError",
    "Partitioned",
    "Pass",
    "PassDescription",
    "PassError",
    "PassTextError",
    "Pipeline",
    "Plan",
    "Program",
    "ProgramInfo",
    "QuantizeActivations",
    "QuantizeWeights",
    "RegistryError",
    "Report",
    "Scope",
    "ScopeError",
    "Signature",
    "SplitOutliers",
    "Step",
    "Timing",
    "Train",
    "Verify",
    "WeightPass",
    "WeightSite",
    "WeightView",
    "broken_passes",
    "calibrate",
    "define_property",
    "describe",
    "find_pass",
    "known_passes",
    "lower",
    "parse_pass",
    "partition",
    "propagate_shapes",
    "readable",
    "to_networkx",
    "weight_sites",
    "weights",
]
