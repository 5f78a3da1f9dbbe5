"""`afnext tasks`: the tasks that the model was trained for, and the checkpoints for each."""

from dataclasses import asdict

from .options import JsonOption
from .output import write_json, write_table


def tasks(as_json: JsonOption = False) -> None:
    """List the tasks that --task takes, and their checkpoints."""
    from rich.table import Table

    from ..prompts import TASKS

    if as_json:
        write_json([asdict(task) for task in TASKS.values()])
        return
    rows = Table(box=None, pad_edge=False)
    for column in ("task", "gives", "checkpoints, best first", "prompt"):
        rows.add_column(column)
    for task in TASKS.values():
        prompt = task.prompt or f"your own question, such as: {task.example}"
        rows.add_row(task.name, task.description, ", ".join(task.variants), " ".join(prompt.split()))
    write_table(rows)
