"""Writes the section of docs/performance.md on the experts' grouped products."""

import textwrap
from collections.abc import Mapping
from typing import Any

TITLES = {
    "gate_up": "gate and up, activation",
    "gate_up, products kept": "the same, both products kept",
    "multiply": "down",
    "d_hidden": "gradients by both products",
    "d_rows": "gradient by rows",
    "d_weights": "gradient by a weight, float32",
    "forward": "layer forward",
    "backward": "layer backward",
}


def grouped_product(results: Mapping[str, Any]) -> str:
    """The section, in Markdown."""
    rows = {name: part["timings"] for name, part in results.items()}
    circumstances, peaks = results["kernels"]["circumstances"], results["kernels"]["peaks"]
    text = (
        f"One {circumstances['card']}, jax {circumstances['versions']['jax']}, {circumstances['date']}, `python -m "
        "benchmarks.grouped_product`: uneven groups of rows on 16 experts of 7168 × 2048, bfloat16. FLOPs are of the "
        "rows that there are, padding is in the time; the layer sorts, gathers and adds up too, and its backward "
        "computes gate and up again. In brackets: a long window, in which the card's power limit lowers its clock. A "
        f"plain product of {peaks['bf16_matmul_tflops']:.0f} ({peaks['bf16_matmul_tflops_sustained']:.0f}) TFLOP/s was "
        "measured in the same run."
    )
    counts = sorted({row["rows"] for row in rows["kernels"]})
    lines = [_wrapped(text), "", *_header("TFLOP/s", [f"{count} rows" for count in counts])]
    for name in dict.fromkeys(row["name"] for row in rows["kernels"]):
        found = [_find(rows["kernels"], name=name, rows=count) for count in counts]
        lines.append(_line(TITLES[name], map(_rate, found)))
    for implementation, named in (("pallas", ""), ("xla", ", XLA")):
        for name in ("forward", "backward"):
            found = [_find(rows["layer"], name=name, rows=count, implementation=implementation) for count in counts]
            lines.append(_line(TITLES[name] + named, map(_rate, found)))
    for name in dict.fromkeys(row["name"] for row in rows["peers"]):
        lines.append(_line(_peer(name), [_rate(_find(rows["peers"], name=name, rows=count)) for count in counts]))
    text = (
        "Few tokens on 256 experts, eight each: TB/s of the weights that they touch, beside a copy's "
        f"{results['decode']['peaks']['copy_tb_per_s']:.2f} (bytes read and written). FP8 weights are multiplied out "
        "in shared memory, which takes longer than reading them."
    )
    tokens = sorted({row["tokens"] for row in rows["decode"]})
    lines += [
        "",
        _wrapped(text),
        "",
        *_header("TB/s, and time", [f"{count} token{'s' * (count > 1)}" for count in tokens]),
    ]
    for title, where in (
        ("bfloat16", dict(weights="bfloat16", implementation="pallas")),
        ("FP8", dict(weights="e4m3", implementation="pallas")),
        ("bfloat16, XLA", dict(weights="bfloat16", implementation="xla")),
    ):
        found = [_find(rows["decode"], tokens=count, **where) for count in tokens]
        lines.append(_line(title, (f"{row['tb_per_s']:.2f}, {row['milliseconds']:.2f} ms" for row in found)))
    return "\n".join(lines)


def _find(timings, **where):
    return next(row for row in timings if all(row[name] == value for name, value in where.items()))


def _rate(row):
    return f"{row['tflops']:.0f} ({row['tflops_sustained']:.0f})"


def _peer(name):
    function, comma, settings = name.partition(",")
    return name if " " in function else f"`{function}`{comma}{settings}, one product"


def _wrapped(text):
    return textwrap.fill(text, 120, break_on_hyphens=False)


def _header(first, others):
    return [_line(first, others), f"|{'---|' * (1 + len(list(others)))}"]


def _line(first, others):
    return f"| {' | '.join([first, *others])} |"
