"""The paper's data sets, one declarative entry each: source, fields, prompt, choices and metric.

    task = dph.tasks.load("glue/sst2")              # no download yet
    for doc in dph.data.dataset.task_documents(task, "validation"):
        task.choices(doc), task.gold(doc)           # conversations, and the index of the right one

A new data set is one more ``Task`` in a family's list; those of the user are files (``dph.tasks.own``).
"""

import difflib
from pathlib import Path

from dph.errors import UserError
from dph.tasks import glue, instruct, multiple_choice, own, reading, squad
from dph.tasks.base import Task

__all__ = ["Task", "load", "names"]

_TASKS = {task.name: task for family in (glue, multiple_choice, reading, squad, instruct) for task in family.TASKS}


def names() -> list[str]:
    """The names of all tasks."""
    return list(_TASKS)


def load(name: str) -> Task:
    """Return the task called ``name``, or that of a file, folder or hub:NAME; no data is read or downloaded.

    Raises UserError for an unknown name.
    """
    if name not in _TASKS:
        if name.startswith("hub:"):
            return own.from_hub(name.removeprefix("hub:"))
        if Path(name).exists():
            return own.from_file(Path(name))
        nearest = difflib.get_close_matches(name, _TASKS, n=1)
        hint = f"the nearest is {nearest[0]!r}" if nearest else "dph tasks lists the names"
        raise UserError(f"task: expected a known name, a file, a folder or hub:NAME, got {name!r}; {hint}")
    return _TASKS[name]
