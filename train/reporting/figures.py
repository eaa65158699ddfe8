"""The figures of a report: the losses over the steps, and the attention mass that selections keep."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from train.phases import CONTROLS
from train.reporting.layout import PLAIN, SELECTIONS, Layout, measured_selections
from train.reporting.results import Results

CURVES = {"lm_loss": "language-model loss (nats)", "kl": "KL of the indexer"}


def training_figure(results: Results, layout: Layout = PLAIN) -> Figure:
    """Draws loss and KL over the steps; a control stands beside the phase that it is compared with."""
    del layout
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(2, 1), CURVES.items(), strict=True):
        for number, seed in enumerate(results.seeds):
            for phase, curve in seed.curves.items():
                if metric in curve:
                    steps = np.array(curve["step"])
                    if any(phase == control.name for control in CONTROLS) and "SPARSE" in seed.curves:
                        steps += seed.curves["SPARSE"]["step"][0] - steps[0]
                    color = f"C{list(seed.curves).index(phase)}"
                    name = phase if number == 0 else None
                    axes.plot(steps, curve[metric], color=color, linewidth=1, alpha=0.8, label=name)
        axes.set_ylabel(label)
        if axes.lines:
            axes.legend(frameon=False)
        hide_frame(axes)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.set_xlabel("step")
    return figure


def kept_mass_figure(results: Results, layout: Layout = PLAIN) -> Figure | None:
    """Draws the mass that selections keep in each layer; None where none was measured."""
    mass = results.seeds[0].evaluation.kept.mass
    parts = [part for part in layout.drawn_parts or results.seeds[0].evaluation.parts[:1] if part in mass]
    if not parts:
        return None
    figure = Figure(figsize=(8.5, 3.2 * len(parts)), layout="constrained")
    for axes, part in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts, strict=True):
        _draw_kept_mass(axes, results, part)
        axes.set_ylabel(f"mass kept: {layout.part_name(part)}")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=3)
    return figure


def _draw_kept_mass(axes: Axes, results: Results, part: str) -> None:
    kepts = [seed.evaluation.kept for seed in results.seeds]
    names = measured_selections(results, lambda evaluation: evaluation.kept.mass.get(part, {}))
    layers = np.arange(len(kepts[0].mass[part]["window"]))
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        label, color = SELECTIONS[name]
        x = layers + (i - (len(names) - 1) / 2) * width
        masses = np.array([kept.mass[part][name] for kept in kepts])
        axes.bar(x, masses.mean(axis=0), width, color=color, label=label)
        if len(kepts) > 1:
            axes.plot(np.tile(x, len(kepts)), masses.ravel(), "k.", markersize=3)
    axes.set_xticks(layers, [f"layer {layer}" for layer in layers])
    axes.set_ylim(0, 1)
    hide_frame(axes)


def hide_frame(axes: Axes) -> None:
    """Hides the frame's upper and right side."""
    axes.spines[["top", "right"]].set_visible(False)
