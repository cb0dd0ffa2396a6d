"""A process without prequant that makes calls of its operators in C++, as a process without Python would.

Usage: python torch_ops_process.py LIBRARY CALLS RESULTS. CALLS is a list of (operator, arguments, options); of each,
RESULTS gets what it returned, or the text of the error that it raised. Operators of torch are ``aten.mul_``.
"""

import sys
from typing import Any

import torch


def main(library: str, calls: str, results: str) -> None:
    """Make the calls, and see to it that all of them are C++."""
    torch.set_num_threads(1)
    torch.ops.load_library(library)
    torch.save([made(*call) for call in torch.load(calls)], results)
    assert not any(name.split(".")[0] == "prequant" for name in sys.modules)


def made(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The result of a call, or its error's text."""
    if name.startswith("aten."):
        return getattr(torch.ops.aten, name.removeprefix("aten."))(*arguments, **options)
    op = getattr(torch.ops.prequant, name).default
    if not arguments and not options:
        return str(op._schema)
    try:
        return op(*arguments, **options)
    except (RuntimeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(*sys.argv[1:])
