"""Adapters: what tasks have of their own on one compressed base, as small files, and many of them on it at once."""

from .errors import AdapterError
from .file import Adapter, read_adapter, write_adapter
from .fingerprint import fingerprint
from .variant import adapter_of, variant

__all__ = ["Adapter", "AdapterError", "adapter_of", "fingerprint", "read_adapter", "variant", "write_adapter"]
