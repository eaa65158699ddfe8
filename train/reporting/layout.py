"""Says how a report looks: the names of what was measured, the colours, and what a caller adds to it."""

import dataclasses
import types
from collections.abc import Callable, Mapping

from matplotlib.figure import Figure

from train.evaluation.evaluate import Evaluation
from train.reporting.results import Results

SELECTIONS = {  # every selection measured: its name in the report, its colour
    "dense": ("dense, all keys", "#222222"),
    "oracle": ("oracle top-K of the attention", "#7f7f7f"),
    "indexer": ("trained indexer", "#1f5fa8"),
    "warmed": ("indexer after warm-up alone", "#7fb2e5"),
    "initial": ("indexer at the beginning", "#a5cbec"),
    "untrained": ("untrained indexer", "#c9def2"),
    "window": ("last K keys", "#e08214"),
    "random": ("K random keys", "#d9c9b0"),
}


@dataclasses.dataclass(frozen=True)
class Goal:
    """Compares a number that was asked for with the one that came."""

    text: str
    met: bool


@dataclasses.dataclass(frozen=True)
class LossFigure:
    """Describes a figure below the losses: the stem of its file, its title, and the function that draws it.

    `draw` may give None, where there is nothing to draw.
    """

    stem: str
    title: str
    draw: Callable[[Results], Figure | None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Holds what a caller says about a report beside its results.

    Args:
      part_names: the held-out parts as the report calls them; one that is missing goes by its own name.
      drawn_parts: those whose kept mass is drawn; without them the first.
      loss_notes: sentences of the section on losses, each for a part, and left out with it.
      summary_losses: parts whose loss by selection is in the short table, and how it is called there.
      figures: figures of its own.
      goals: computes what was asked for and what came; without it the report has no verdict.
    """

    part_names: Mapping[str, str] = types.MappingProxyType({})
    drawn_parts: tuple[str, ...] = ()
    loss_notes: Mapping[str, str] = types.MappingProxyType({})
    summary_losses: Mapping[str, str] = types.MappingProxyType({})
    figures: tuple[LossFigure, ...] = ()
    goals: Callable[[Results], list[Goal]] = lambda results: []

    def part_name(self, part: str) -> str:
        """Gives the name of a part as it is shown."""
        return self.part_names.get(part, part)


PLAIN = Layout()


def measured_selections(results: Results, measured: Callable[[Evaluation], Mapping[str, object]]) -> list[str]:
    """Lists the selections that every seed measured, in the report's order."""
    found = [measured(seed.evaluation) for seed in results.seeds]
    return [name for name in SELECTIONS if all(name in each for each in found)]
