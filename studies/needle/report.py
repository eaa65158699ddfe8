"""The report of the study: the general one, with losses at the answers, and the maps of the answers below it."""

from pathlib import Path

from studies.needle.maps import Maps, draw_maps, table_of
from train.files import replace_text
from train.reporting.layout import Layout
from train.reporting.report import DPI

LAYOUT = Layout(
    part_names={"text": "held-out text", "needles": "text with needles", "answers": "digits of answers"},
    drawn_parts=("text", "answers"),
    summary_losses={"answers": "loss at the digits of answers"},
)


def add_maps(maps: Maps, folder: Path) -> None:
    """Draws the maps and adds them and their table to the report of a folder."""
    draw_maps(maps).savefig(folder / "answers.png", dpi=DPI)
    lines = [
        "",
        "## Answers",
        "",
        "What share of the questions for needles is answered right, all digits of it, over all depths, and in brackets "
        "the 95 % interval. Where a row has eight needles, all are asked for, one after the other.",
        "",
        *table_of(maps),
        "",
        "![Answers by length and depth](answers.png)",
    ]
    path = folder / "report.md"
    replace_text(path, path.read_text() + "\n".join(lines) + "\n")
