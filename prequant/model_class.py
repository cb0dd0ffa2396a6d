"""The class of a model by its import path, which may come from a file."""

from __future__ import annotations

import importlib
import sys

from transformers import PreTrainedModel

from prequant.runtime import PrequantError


def find_model_class(path: str) -> type[PreTrainedModel]:
    """The class at an import path: one of transformers' own, or of a module that is imported already.

    Importing what a file says would run it. Raises :class:`PrequantError` for what is not there.
    """
    module, _, name = path.rpartition(".")
    if module.split(".")[0] == "transformers":
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise PrequantError(f"the model class {path!r}: {error}") from error
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise PrequantError(f"the model class {path!r} is not one of transformers, nor of an imported module")
    return found
