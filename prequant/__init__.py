"""prequant: a graph compiler that makes pre-trained language models small and fast, and measures what it costs.

Trace a model, run passes over the graph, lower it to packed operators, save and load it::

    program = prequant.trace(model, example_inputs)
    program = prequant.Pipeline([passes.Canonicalize(), passes.QuantizeWeights(bits=4)])(program)
    packed = prequant.lower(program)
    packed.save_pretrained("out")
    packed = prequant.load("out")

Importing prequant lets transformers load saved folders, too. Where transformers is not installed, ``prequant.runtime``
alone can be used, which is what exported files run on.
"""

from importlib.util import find_spec

if find_spec("transformers") is not None:
    from prequant import transformers_quantizer as _transformers_quantizer  # noqa: F401  (lets it load saved folders)
    from prequant.checkpoint import CheckpointError, load, save
    from prequant.passes import Pipeline, Program, calibrate, lower
    from prequant.runtime import PrequantError
    from prequant.trace import TraceError, trace

    if find_spec("transformers.exporters") is not None:  # not every transformers 5 has them
        from prequant import transformers_exporter as _transformers_exporter  # noqa: F401  (registers its format)

__all__ = [
    "CheckpointError",
    "Pipeline",
    "PrequantError",
    "Program",
    "TraceError",
    "calibrate",
    "load",
    "lower",
    "save",
    "trace",
]
