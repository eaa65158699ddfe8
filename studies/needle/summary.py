"""The study's results in a page: verdicts, losses by position, answers. The documentation quotes it."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from studies.needle.found import Found
from studies.needle.maps import NEEDLES
from studies.needle.questions import Cell
from studies.needle.report import SPARSE, change_rows, check_alike, gap_table, ran_on, verdicts, whole
from train.reporting.report import markdown_table

RESULTS = Path(__file__).parent / "results"  # what was recorded


def recorded() -> list[Found]:
    """Reads the seeds that were recorded, in their order."""
    return [Found.load(path) for path in sorted(RESULTS.glob("seed*.json"))]


def summary(founds: Sequence[Found]) -> str:
    """Tells in Markdown what was found, and on what.

    Raises:
      ValueError: if there is no seed, one comes twice, or setup or corpus differ.
    """
    check_alike(founds)
    count = "One seed" if len(founds) == 1 else f"{len(founds)} seeds"
    begun = (
        f"{count} recorded so far, on {ran_on(founds)}: {_minutes(founds)} minutes a seed, of which "
        f"{_minutes(founds, 'measuring')} measure. Held out are {founds[0].corpus['tokens']['held_out']:,} tokens of "
        "whole packages. All of it stands in `studies/needle/results/report.md`."
    )
    goals = [f"- **{'Met' if goal.met else 'Missed'}**: {goal.text}." for goal in verdicts(founds)]
    lines = [
        textwrap.fill(begun, 120),
        "",
        *goals,
        "",
        "How far the loss on held-out text lies above the dense model's:",
    ]
    return "\n".join([*lines, "", *gap_table(founds), "", *_answers(founds), "", *change_rows(RESULTS, founds)])


def _minutes(founds: Sequence[Found], part: str | None = None) -> str:
    """The minutes of a seed, or of a part of it, the longest of all."""
    return f"{max(found.seconds[part] if part else sum(found.seconds.values()) for found in founds) / 60:.0f}"


def _answers(founds: Sequence[Found]) -> list[str]:
    """The table of the right answers at the longest rows, for every subject."""
    length = max(founds[0].answers.cells[SPARSE][1])
    header = f"right answers at {length:,} tokens", *(f"{n} needle{'s' * (n > 1)} a row" for n in NEEDLES)
    rows = []
    for name in founds[0].answers.cells:
        cells = [Cell.sum([whole(found, name, n) for found in founds]) for n in NEEDLES]
        rows.append((name, *(f"{cell.share:.1%} of {cell.asked}" for cell in cells)))
    return markdown_table(header, rows)
