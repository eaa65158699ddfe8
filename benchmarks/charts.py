"""Draws the charts of docs/figures from benchmarks/results/*.json:  python -m benchmarks.charts"""

import io
import json
import pathlib
import re
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.chart_style import CARD, INK, OURS, PALETTE, PEER, QUIET, RECORDED, STYLE
from benchmarks.cost_chart import cost
from benchmarks.measure import RESULTS

FIGURES = pathlib.Path(__file__).resolve().parents[1] / "docs" / "figures"

BAR = 0.36  # the height of a bar, of which two stand on each other


def load(name: str) -> dict[str, Any]:
    """A file of recorded results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def recorded(*files: dict[str, Any], implementation: str = "pallas") -> dict[tuple[str, str], dict[str, Any]]:
    """The recorded timings of one implementation by operation and shape."""
    rows = [row for parts in files for part in parts.values() for row in part.get("timings", [])]
    return {(row["operation"], row["shape"]): row for row in rows if row.get("implementation") == implementation}


PANELS = {  # operation -> its title
    "sparse_attention": "sparse attention, forward",
    "sparse_attention backward": "sparse attention, backward",
    "index_scores e4m3": "index scores, FP8",
    "select_topk": "exact top-k of 2048",
}
DRAWN_HEADS = "N 128"  # of the attention's rows; the others stand in the table


def kernel_rows() -> list[dict[str, Any]]:
    """Collects the rows of the chart of kernels, one for each pair of bars, all in TFLOP/s or TB/s."""
    peers, timings = load("peers")["kernels"]["rows"], recorded(load("forward"), load("training"))
    rows = []
    for peer in peers:
        operation, shape = peer["operation"], peer["shape"]
        if " N " in shape and DRAWN_HEADS not in shape:
            continue
        ours, theirs, timed = peer["value"], peer["peer_value"], timings[operation, shape]
        if peer["unit"] == "milliseconds":
            read = timed["tb_per_s"] * timed["seconds"]  # TB
            ours, theirs = 1e3 * read / ours, 1e3 * read / theirs
        row = {"operation": operation, "label": _label(shape), "peer": peer["peer"], "ours": ours, "theirs": theirs}
        rows.append(row | {"recorded": timed["tb_per_s" if "tb_per_s" in timed else "tflops"]})
    return rows


def _label(shape: str) -> str:
    """How many keys a shape has, and rows where they are few."""
    size = re.search(r"S (\d+)|\[(\d+), (\d+)\]", shape)
    assert size is not None
    if size[1]:
        return f"{int(size[1]) // 1024}K keys"
    return f"{int(size[2]) // 1024}K rows of {int(size[3]) // 1024}K"


def number(value: float) -> str:
    """A figure as the charts show it."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def kernels() -> Figure:
    """Our kernels beside the best of the peers', one panel an operation."""
    rows, peaks = kernel_rows(), load("forward")["sparse_attention"]["peaks"]
    counts = [sum(row["operation"] == operation for row in rows) for operation in PANELS]
    figure = Figure(figsize=(10, 6.9), layout="constrained")
    axes = figure.subplots(len(PANELS), 1, gridspec_kw={"height_ratios": [count + 0.35 for count in counts]})
    for axis, (operation, title) in zip(axes, PANELS.items(), strict=True):
        peak, name = _peak(operation, peaks)
        unit = "TB/s of scores read" if operation == "select_topk" else "TFLOP/s"
        mine = [row for row in rows if row["operation"] == operation]
        for place, row in enumerate(mine):
            _pair(axis, place, row, peak)
        axis.axvline(peak, color=QUIET[0], linestyle=(0, (4, 3)), linewidth=1)
        axis.text(peak, -0.52, f" {name} {number(peak)}", color=QUIET[0], fontsize=9.5, va="bottom")
        axis.set_yticks(range(len(mine)), [row["label"] for row in mine])
        axis.set_ylim(len(mine) - 0.45, -0.55)
        axis.set_xlim(0, 1.24 * peak)
        axis.tick_params(length=0, labelsize=10)
        axis.set_title(f"{title}, {unit}", loc="left", fontsize=11, fontweight="bold", color=INK[0])
    handles = [Patch(color=color) for color in (OURS[0], RECORDED[0], PEER[0])]
    names = ["dsa_jax, timed beside the peer", "dsa_jax, in short windows with rests", "the best peer"]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return figure


def _peak(operation: str, peaks: dict[str, float]) -> tuple[float, str]:
    """Returns the card's measured peak at this kind of work, and its name."""
    if operation == "select_topk":
        return peaks["copy_tb_per_s"], "a copy:"
    fp8 = operation.endswith("e4m3")
    return peaks["fp8_matmul_tflops" if fp8 else "bf16_matmul_tflops"], "a matrix product:"


def _pair(axis: Any, place: int, row: dict[str, Any], peak: float) -> None:
    """Our bar with what it reaches in short windows behind it, and the peer's below."""
    ours, best = place - BAR / 2, max(row["ours"], row["recorded"])
    axis.barh(ours, row["recorded"], BAR, color=RECORDED[0])
    axis.barh(ours, row["ours"], BAR, color=OURS[0])
    axis.barh(place + BAR / 2, row["theirs"], BAR, color=PEER[0])
    gap = 0.006 * peak
    axis.text(row["ours"] - gap, ours, number(row["ours"]), color=CARD[0], ha="right", va="center", fontsize=10)
    axis.text(best + gap, ours, number(row["recorded"]), color=QUIET[0], va="center", fontsize=10)
    named = f"{number(row['theirs'])} {row['peer']}"
    axis.text(row["theirs"] + gap, place + BAR / 2, named, color=INK[0], va="center", fontsize=10)


STEPS = {  # part of training.json -> how its bars are named and coloured
    "sparse_step": ("{phase}, kernels", OURS),
    "warmup_step": ("{phase}, kernels", OURS),
    "dense_step": ("{phase}: dense attention, cuDNN", PEER),
    "xla_steps": ("{phase}, XLA", PEER),
}


def step_rows() -> list[dict[str, Any]]:
    """Collects the rows of the chart of steps, one a bar."""
    results, rows = load("training"), []
    for part, (label, color) in STEPS.items():
        for timed in results[part]["timings"]:
            phase, tokens = timed["operation"].removeprefix("training step "), int(timed["shape"].split(",")[0][2:])
            name = f"{label.format(phase=phase)}, {tokens // 1024}K tokens"
            rows.append({"label": name, "rate": timed["tokens_per_second"], "color": color[0]})
    return rows


def gain() -> float:
    """How many times as fast a sparse training step is as a dense one, with as many tokens."""
    results = load("training")
    (sparse,), (dense,) = (results[part]["timings"] for part in ("sparse_step", "dense_step"))
    assert sparse["shape"] == dense["shape"]
    return sparse["tokens_per_second"] / dense["tokens_per_second"]


def steps() -> Figure:
    """How many tokens a second a training step takes, in each phase and by each implementation."""
    rows = step_rows()
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        axis.barh(place, row["rate"], 0.66, color=row["color"])
        note = "" if place else f" ({gain():.1f} × dense)"
        axis.text(row["rate"] + 130, place, number(row["rate"]) + note, color=INK[0], va="center_baseline", fontsize=10)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axis.invert_yaxis()
    axis.tick_params(length=0, labelsize=10)
    axis.set_xlim(0, 1.2 * max(row["rate"] for row in rows))
    title = "one training step, tokens/s: 4 layers of the 671B shape, batch 1, one H200"
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK[0])
    return figure


CHARTS = {"kernels": kernels, "steps": steps, "cost": cost}


def svg(name: str) -> str:
    """A chart as SVG, the same bytes each time under one version of matplotlib."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        CHARTS[name]().savefig(buffer, format="svg", metadata={"Date": None})
    return _themed(buffer.getvalue())


def _themed(text: str) -> str:
    """With the reader's own font, and with the dark colours where the reader's screen is dark."""
    text = text.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif")
    rules = [
        f'[style*="{kind}: {light}"] {{ {kind}: {dark} !important }}'
        for light, dark in PALETTE
        for kind in ("fill", "stroke")
    ]
    style = "<style>@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}</style>"
    return re.sub(r"(<svg[^>]*>)", lambda match: f"{match[1]}\n{style}", text, count=1)


def main() -> None:
    """Writes every chart."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in CHARTS:
        (FIGURES / f"{name}.svg").write_text(svg(name), encoding="utf-8")


if __name__ == "__main__":
    main()
