"""The demo's report: the general one with recall answers, their figure, and goals.

`python -m studies.tiny.report runs/tiny` writes report and figures again from `results.json` alone.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from studies.tiny.goals import find_goals
from studies.tiny.recall import FAR_BYTES, VALUES
from train.commands import report
from train.commands.command import run_command
from train.reporting.figures import hide_frame
from train.reporting.layout import SELECTIONS, Layout, LossFigure, measured_selections
from train.reporting.results import Results

CHANCE_NATS = math.log(VALUES)  # at an answer of a recall episode


def answers_figure(results: Results) -> Figure | None:
    """Draws the loss at recall answers by selection, beside chance; None without answers."""
    names = measured_selections(results, lambda evaluation: evaluation.selections)
    losses = {n: [seed.evaluation.selections[n].get("answers") for seed in results.seeds] for n in names}
    losses = {name: [value for value in values if value is not None] for name, values in losses.items()}
    losses = {name: values for name, values in losses.items() if values}
    if not losses:
        return None
    figure = Figure(figsize=(8.5, 0.7 + 0.45 * len(losses)), layout="constrained")
    axes = figure.subplots()
    for row, (name, values) in enumerate(losses.items()):
        label, color = SELECTIONS[name]
        axes.barh(label, float(np.mean(values)), color=color)
        if len(values) > 1:
            axes.plot(values, [row] * len(values), "k.", markersize=4)
    axes.axvline(CHANCE_NATS, color="black", linestyle=":", linewidth=1)
    axes.text(CHANCE_NATS, -0.6, " chance", va="bottom", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss at recall answers (nats), final weights")
    hide_frame(axes)
    return figure


LAYOUT = Layout(
    part_names={
        "all": "training's mixture",
        "text": "text",
        "recall": "recall episodes",
        "answers": "recall answers",
    },
    drawn_parts=("all", "answers"),
    loss_notes={
        "answers": f"Recall answers: values stated more than {FAR_BYTES} bytes back; chance is ln {VALUES} = "
        f"{CHANCE_NATS:.2f}."
    },
    summary_losses={"answers": "loss at recall answers"},
    figures=(LossFigure("answers", "Loss at recall answers", answers_figure),),
    goals=find_goals,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command: writes the reports of the given runs' folders again."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(lambda: report.main(given, layout=LAYOUT, program="python -m studies.tiny.report"))


if __name__ == "__main__":
    sys.exit(main())
