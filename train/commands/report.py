"""The command `python -m train report`: reports of finished runs, written again from their results."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from train.commands.command import parse
from train.reporting.layout import PLAIN, Layout
from train.reporting.report import summary, write_report
from train.reporting.results import Results


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes report.md and its figures again, from results.json alone."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs."""


def main(arguments: Sequence[str], *, layout: Layout = PLAIN, program: str = "python -m train report") -> None:
    """Runs the command.

    Args:
      arguments: of the command line.
      layout: what the reports have beside what every report has.
      program: how the command is called.

    Raises:
      ValueError, OSError: if there are no folders, or one has no readable `results.json`.
    """
    folders = parse(Arguments, arguments, program).folders
    if not folders:
        raise ValueError(f"{program} needs the folders of one or more runs, got none")
    for folder in folders:
        results = Results.load(folder)
        path = write_report(results, folder, layout)
        Console().print(summary(results, layout))
        print(path)
