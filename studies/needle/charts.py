"""The figures of the study's report, beside the maps of the answers."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.needle.found import Found, gaps_by_position
from train.phases import CONTROLS
from train.reporting.figures import hide_frame
from train.reporting.layout import SELECTIONS

CURVES = {
    "lm_loss": "language-model loss, nats",
    "kl": "KL of the indexer, nats",
    "kl_layers": "KL of each layer, nats",
    "grad_norm_backbone": "gradient norm, backbone",
    "grad_norm_indexer": "gradient norm, indexer",
}


def draw_curves(founds: Sequence[Found]) -> Figure:
    """Draws the numbers of every phase by its steps; a control stands over the steps of SPARSE."""
    figure = Figure(figsize=(9, 2.2 * len(CURVES)), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(len(CURVES), 1), CURVES.items(), strict=True):
        for number, found in enumerate(founds):
            _draw_metric(axes, found, metric, labelled=number == 0)
        axes.set_ylabel(label, fontsize=8)
        if axes.lines:
            axes.set_yscale("linear" if metric == "lm_loss" else "log")
            axes.legend(frameon=False, fontsize=7)
        hide_frame(axes)
    axes.set_xlabel("step")
    return figure


def _draw_metric(axes: Axes, found: Found, metric: str, *, labelled: bool) -> None:
    for phase, curve in found.curves.items():
        if metric not in curve:
            continue
        steps = np.array(curve["step"])
        if any(phase == control.name for control in CONTROLS) and "SPARSE" in found.curves:
            steps = steps + found.curves["SPARSE"]["step"][0] - steps[0]
        color, values = f"C{list(found.curves).index(phase)}", np.array(curve[metric])
        for layer, line in enumerate(values.reshape(len(values), -1).T):
            shade = 1 - 0.6 * layer / max(1, values[0].size - 1) if values.ndim > 1 else 0.8
            name = phase if layer == 0 and labelled else None
            axes.plot(steps, line, color=color, linewidth=0.8, alpha=shade, label=name)


def draw_gaps(founds: Sequence[Found]) -> Figure:
    """Draws how far the losses lie above the dense model's, by position, each seed a line."""
    pairs = {
        "after WARMUP": ("WARMUP, sparse", "BASE, dense", "C1"),
        "after SPARSE": ("SPARSE, sparse", "DENSE_CONTROL, dense", "C0"),
    }
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, (ours, theirs, color) in pairs.items():
        for number, found in enumerate(founds):
            if ours not in found.losses or theirs not in found.losses:
                continue
            gaps = gaps_by_position(found, ours, theirs)
            axes.plot(
                range(len(gaps)),
                [100 * gap for gap in gaps.values()],
                "o-",
                color=color,
                linewidth=1,
                label=None if number else name,
            )
            axes.set_xticks(range(len(gaps)), [each.split()[-1] for each in gaps], fontsize=8)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xlabel("up to position")
    axes.set_ylabel("loss above the dense model's, %")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    hide_frame(axes)
    return figure


def draw_distances(founds: Sequence[Found]) -> Figure:
    """Draws by layer where the attention lies, and what selections keep there; of several seeds the means."""
    kinds = list(founds[0].inside)
    layers = len(founds[0].inside["text"].overlap)
    figure = Figure(figsize=(2.9 * layers, 2.6 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), layers, squeeze=False, sharey="row")
    for row, kind in enumerate(kinds):
        own = [found.inside[kind] for found in founds if kind in found.inside]
        ends = own[0].distances
        for layer in range(layers):
            axes = grid[row][layer]
            for name in ("all", "indexer", "oracle", "window"):
                mass = np.mean([each.mass[name][layer] for each in own], axis=0)
                label, color = ("all keys", "#222222") if name == "all" else SELECTIONS[name]
                axes.plot(range(len(ends)), mass, "o-", color=color, linewidth=1, markersize=3, label=label)
            axes.set_xticks(range(len(ends)), [_short(end) for end in ends], fontsize=6)
            axes.set_title(f"{'text' if kind == 'text' else 'answers'}, layer {layer}", fontsize=8)
            hide_frame(axes)
        grid[row][0].set_ylabel("attention mass", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
