"""The backend of ``torch.compile`` that compresses a model on the way: found by its name, ``"prequant"``."""

from .backend import Options, backend

__all__ = ["Options", "backend"]
