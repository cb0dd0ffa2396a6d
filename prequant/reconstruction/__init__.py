"""Reconstruction module by module (MREM, Bai et al., arXiv 2109.15082): the training that looks at a few unlabelled
texts and at one module of the model at a time.
"""

from .calibration import CalibrationSet, encode_texts
from .learner import Learner, ModuleFigures
from .modules import Module, ReconstructionError, joined, split
from .parallel import Schedule, reconstruct_interleaved
from .sequential import reconstruct_in_turn

__all__ = [
    "CalibrationSet",
    "Learner",
    "Module",
    "ModuleFigures",
    "ReconstructionError",
    "Schedule",
    "encode_texts",
    "joined",
    "reconstruct_in_turn",
    "reconstruct_interleaved",
    "split",
]
