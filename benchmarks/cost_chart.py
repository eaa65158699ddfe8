"""The chart of what attention costs by position, in the manner of Figure 3 of the paper on DeepSeek-V3.2."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.chart_style import CARD, INK, LINE, OURS, PEER, QUIET
from benchmarks.measure import RESULTS
from benchmarks.serving import GPU_DOLLARS
from benchmarks.serving_tables import DECODE, LAYERS, PREFILL, Rows, crossover, million_tokens, timings, token_position

BATCH = 32  # of decode
PANELS = {  # part -> title, its two costs, and how the dense one is named
    "decode": (f"decode, batch {BATCH}", DECODE, "dense, computed from FlashMLA's figures"),
    "prefill": ("prefill, chunks of 4096", PREFILL, "dense, multihead_attention"),
}


def cost() -> Figure:
    """Draws the cost of a million tokens in the attention layers, one panel a part that is recorded."""
    return draw(json.loads((RESULTS / "cost_by_position.json").read_text()))


def draw(results: Mapping[str, Any]) -> Figure:
    """Draws the chart of these results."""
    panels = [name for name in PANELS if name in results]
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axis, name, part_rows(results, name))
    figure.supylabel(f"dollars a million tokens, {LAYERS} attention layers", fontsize=10, color=QUIET[0])
    return figure


def part_rows(results: Mapping[str, Any], name: str) -> Rows:
    """The rows of a panel, by rising position."""
    rows = [row for row in timings([results[name]]) if row.get("batch", BATCH) == BATCH]
    return sorted(rows, key=lambda row: row["position"])


def _panel(axis: Any, name: str, rows: Rows) -> None:
    """Draws both lines of a part, and marks where they cross."""
    title, sides, dense_name = PANELS[name]
    at = [token_position(row) for row in rows]
    lines = [[million_tokens(side(row)) for row in rows] for side in sides]
    styles = ((OURS, "-", "sparse"), (PEER, (0, (5, 2)) if name == "decode" else "-", dense_name))
    for values, (color, dashes, label) in zip(lines, styles, strict=True):
        axis.plot(at, values, color=color[0], linestyle=dashes, linewidth=2, label=label)
        axis.plot(at, values, "o", color=color[0], markersize=3.5)
        axis.annotate(
            f"{values[-1]:.2f}", (at[-1], values[-1]), (5, 0), textcoords="offset points", va="center", fontsize=10
        )
    if (place := crossover(rows, *sides)) is not None:
        height = float(np.interp(place, at, lines[0]))
        axis.plot([place], [height], "o", color=INK[0], markersize=6)
        note = f"dense costs more from {place:,.0f} on"
        axis.annotate(note, (place, height), (6, -18), textcoords="offset points", color=INK[0], fontsize=10)
    axis.set_title(
        f"{title}, one H200 at ${GPU_DOLLARS:g} an hour", loc="left", fontsize=11, fontweight="bold", color=INK[0]
    )
    axis.set_xlabel("position of the token", fontsize=10)
    axis.set_xticks([32768 * step for step in range(5)], ["0", "32K", "64K", "96K", "128K"])
    axis.set_xlim(0, 1.08 * at[-1])
    axis.set_ylim(0, 1.25 * max(map(max, lines)))  # room for the legend
    axis.grid(axis="y", color=LINE[0], linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=10)
    axis.legend(loc="upper left", facecolor=CARD[0], edgecolor=CARD[0], framealpha=1, fontsize=10)
