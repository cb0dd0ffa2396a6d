"""prequant tasks: every task with what its data and its scores are."""

from __future__ import annotations

from .app import command, show


@command("tasks", "List every task with its data and scores.")
def tasks() -> None:
    """List every task: its kind of model, its data set on the hub, and its scores; the first one compares models."""
    from rich.table import Table

    from prequant.tasks import TASKS

    table = Table()
    for heading in ("task", "kind of model", "data set", "scores"):
        table.add_column(heading, overflow="fold")
    for name, task in TASKS.items():
        table.add_row(name, task.kind, "/".join(task.hub), ", ".join(metric.name for metric in task.metrics))
    show(table)
