"""Tasks from a user's file."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.checks import shown
from train.post.environment import Task

MODULE = "dsa_post_tasks_{}"  # under which a task file is imported, by its stem


def load_tasks(path: Path) -> dict[str, Task]:
    """Imports a Python file and takes the tasks that it defines, as `TASK` or `TASKS`, by their names.

    Raises:
      ValueError: if it cannot be imported, or defines none, with the reason.
    """
    if not path.is_file():
        raise ValueError(f"task must be a Python file, got {path}")
    name = MODULE.format(path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"task must be a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        raise ValueError(f"{path} could not be imported: {type(error).__name__}: {str(error)[:300]}") from error
    return named_tasks(getattr(module, "TASKS", None) or getattr(module, "TASK", None), str(path))


def named_tasks(found: Any, where: str) -> dict[str, Task]:
    """Orders tasks by their names.

    Args:
      found: a task, or several.
      where: where they were found, for messages.

    Raises:
      ValueError: if they are no tasks, or two have one name.
    """
    tasks = list(found.values()) if isinstance(found, Mapping) else [found] if isinstance(found, Task) else found
    if not isinstance(tasks, list | tuple) or not tasks or not all(isinstance(task, Task) for task in tasks):
        raise ValueError(
            f"{where} must define TASK, a train.post.environment.Task, or TASKS of them, got {shown(found)}"
        )
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"{where} must define tasks of different names, got {', '.join(names)}")
    silent = [task.name for task in tasks if not task.rewards]
    if silent:
        raise ValueError(f"task {silent[0]} in {where} must have rewards")
    return {task.name: task for task in tasks}
