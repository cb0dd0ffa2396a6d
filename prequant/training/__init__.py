"""Training through the Hugging Face Trainer: the same loop for an eager model and for a Program.

A training that is killed goes on from its last checkpoint, and ends with the weights of one that was not.
"""

from .checkpoints import Checkpoints
from .loop import finetune
from .settings import TrainingError, TrainingResult, TrainingSettings, combined, parameter_groups
from .unfinished import Unfinished

__all__ = [
    "Checkpoints",
    "TrainingError",
    "TrainingResult",
    "TrainingSettings",
    "Unfinished",
    "combined",
    "finetune",
    "parameter_groups",
]
