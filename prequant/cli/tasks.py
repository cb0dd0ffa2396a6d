"""prequant tasks: every task with what its data and its scores are."""

from __future__ import annotations

from .app import command, show


@command("tasks", "List every task with its data and scores.")
def tasks() -> None:
    """List every task: its kind of model, its data set on the hub, and its scores; the first one compares models."""
    from prequant.tasks import TASKS

    from .listing import listing

    def summary(name: str) -> str:
        task = TASKS[name]
        scores = ", ".join(metric.name for metric in task.metrics) + (
            " (lower is better)" if task.lower_is_better else ""
        )
        return f"{task.kind} on {'/'.join(task.hub)}, by {scores}"

    show(listing((name, summary(name), ()) for name in TASKS))
