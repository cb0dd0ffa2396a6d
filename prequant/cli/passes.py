"""prequant passes: every pass with its options."""

from __future__ import annotations

import sys

from .app import command, complain, show


@command("passes", "List every pass with its options.")
def passes() -> None:
    """List every pass, its options with their defaults, and what it does; those of other packages, too."""
    from prequant.passes import broken_passes, describe, known_passes

    from .listing import listing

    descriptions = map(describe, known_passes().values())
    show(listing((found.name, found.summary, found.options) for found in descriptions))
    broken = broken_passes()
    for name, reason in broken.items():
        complain("passes", f"{name}: {reason}")
    if broken:
        sys.exit(1)
