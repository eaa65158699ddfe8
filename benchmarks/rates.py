"""Gathers what the planner needs of the recorded benchmarks:  python -m benchmarks.rates

No GPU is needed. Writes train/planner/rates.json and serving_rates.json, which are shipped with the package, from
benchmarks/results.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import train.planner
from benchmarks import measure

PLANNER = pathlib.Path(train.planner.__file__).parent
LENGTH = 131072  # tokens of the context at which kernels are timed
QUERIES, TOPK = 4096, 2048
HEADS, LATENT_DIM, HEAD_DIM, VALUE_DIM = 128, 576, 192, 128
INDEX_HEADS, INDEX_DIM = 64, 128
DECODE = {  # of a decode step's kernels: the file of benchmarks/results, and the name of the rows that count
    "attention": ("decode_attention", "paged_sparse_attention"),
    "selection": ("decode_selection", "paged_select_keys"),
}
STEPS = {"SPARSE": "sparse_step", "WARMUP": "warmup_step"}  # the phases whose steps set the planner's estimate


@functools.cache
def recorded(name: str) -> Any:
    """Reads the results in `name`.json."""
    return json.loads((measure.RESULTS / f"{name}.json").read_text())


def find_row(name: str, part: str, operation: str, **where: str) -> Mapping[str, Any]:
    """Finds the row of an operation by Pallas kernels with these values."""
    rows = recorded(name)[part]["timings"]
    wanted = dict(implementation="pallas", operation=operation) | where
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


def kernel_rates() -> dict[str, Any]:
    """Computes floating-point operations and bytes a second, by the names of `train.planner.hardware.Rates`."""
    peaks = recorded("training")["backward"]["peaks"]
    fp8, narrow, wide = (
        find_row("forward", "indexer", name, shape=f"T 4096 J 64 E 128 S {LENGTH}{more}")["tflops"] * 1e12
        for name, more in (
            ("select_keys e4m3", " K 2048, quantisation included"),
            ("index_scores e4m3", ""),
            ("index_scores bf16", ""),
        )
    )
    loss = find_row(
        "training", "sparse_loss", "sparse_indexer_kl, gradients", shape=f"T 4096 N 128 K 2048 J 64 S {LENGTH}"
    )
    layer = find_row("training", "warmup", "dense warm-up layer", shape=f"T = S = {LENGTH} N 128 P 128 R 64 V 128 J 64")
    dense = find_row("training", "warmup", "multihead_attention forward", shape=layer["shape"])
    pairs, selected = LENGTH * (LENGTH + 1) / 2, QUERIES * TOPK
    dense_loss = products(pairs, HEADS, HEAD_DIM) + 4 * products(pairs, INDEX_HEADS, INDEX_DIM)
    sparse_loss = products(selected, HEADS, LATENT_DIM) + 3 * products(selected, INDEX_HEADS, INDEX_DIM)
    return dict(
        product=peaks["bf16_matmul_tflops_sustained"] * 1e12,
        copy=peaks["copy_tb_per_s"] * 1e12,
        sparse_forward=rates_by_heads("forward", "sparse_attention", "sparse_attention"),
        sparse_backward=rates_by_heads("training", "backward", "sparse_attention backward"),
        sparse_loss=sparse_loss / loss["seconds"],
        select_fp8=fp8,
        select=wide * fp8 / narrow,
        dense_forward=dense["tflops"] * 1e12,
        dense_loss=dense_loss / (layer["seconds"] - dense["seconds"]),
        cudnn=cudnn_backward_rate(pairs),
        experts_forward=rates_by_rows("forward"),
        experts_backward=rates_by_rows("backward"),
    )


def rates_by_rows(name: str) -> dict[int, float]:
    """Gives the rates of the experts' layer by its rows, sorting and gathering included."""
    rows = recorded("grouped_product")["layer"]["timings"]
    ours = [row for row in rows if (row["name"], row["implementation"]) == (name, "pallas")]
    return {row["rows"]: row["tflops_sustained"] * 1e12 for row in ours}


def cudnn_backward_rate(pairs: float) -> float:
    """Computes it from the step of BASE by cuDNN: four layers of it, less two forward passes, and little else."""
    step = recorded("training")["dense_step"]["timings"][0]
    forward = find_row("training", "warmup", "cuDNN, values padded")["tflops"] * 1e12
    left = step["seconds"] - 4 * 2 * 2 * pairs * HEADS * (HEAD_DIM + VALUE_DIM) / forward
    return 4 * 2 * pairs * HEADS * 5 * HEAD_DIM / left


def rates_by_heads(name: str, part: str, operation: str) -> dict[str, float]:
    """Gathers the rate at each number of heads, at the longest context recorded."""
    rates: dict[int, tuple[int, float]] = {}
    for row in recorded(name)[part]["timings"]:
        if row["operation"] == operation and row["implementation"] == "pallas":
            sizes = dict(zip(row["shape"].split()[::2], map(int, row["shape"].split()[1::2]), strict=True))
            rates[sizes["N"]] = max(rates.get(sizes["N"], (0, 0.0)), (sizes["S"], row["tflops"] * 1e12))
    return {str(heads): rate for heads, (_, rate) in sorted(rates.items())}


def products(pairs: float, heads: int, width: int) -> float:
    """Counts the floating-point operations of products of `width` numbers for every pair and head."""
    return 2 * pairs * heads * width


def step_figures(part: str) -> dict[str, Any]:
    """Gathers the length, the peak of memory and the seconds of a measured training step."""
    row = recorded("training")[part]["timings"][0]
    length = int(row["shape"].split(",")[0].removeprefix("T "))
    return {"seq_len": length, "peak_gib": row["peak_gib"], "seconds": row["seconds"]}


def gather() -> dict[str, Any]:
    """Gathers all that is shipped: the rates, the measured steps, and where they are from."""
    used = [recorded("forward")["indexer"], recorded("sharded")["exchanges"], *recorded("training").values()]
    dates = sorted({part["circumstances"]["date"] for part in used})
    (card,) = {part["circumstances"]["card"] for part in used}
    exchanges = recorded("sharded")["exchanges"]["timings"]
    return {
        "source": "benchmarks/results/{forward,training,sharded,grouped_product}.json by python -m benchmarks.rates",
        "card": card,
        "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "rates": kernel_rates(),
        "exchanges": {row["operation"]: 1e9 * row["gb_per_s"] for row in exchanges},
        "steps": {phase: step_figures(part) for phase, part in STEPS.items()},
    }


# Serving


def decode_rows(operation: str) -> list[dict[str, Any]]:
    """Gathers recorded times of a decode step's kernel by batch and heads.

    The file has parts of {"circumstances": …, "timings": […]}, and of the timings those rows count that have the
    operation's name of `DECODE`: one for each batch and number of heads, of one token a sequence over FP8 pages.

    Raises:
      ValueError: if the file has no such row, or several of one batch and number of heads.
    """
    file, name = DECODE[operation]
    timings = [(row, _source(file, part)) for part in recorded(file).values() for row in part.get("timings", [])]
    rows = [_decode_row(row, source) for row, source in timings if row["name"] == name]
    if not rows or len({(row["batch"], row["heads"]) for row in rows}) < len(rows):
        raise ValueError(f"{file}.json must have one row of {name} for each batch and number of heads, got {len(rows)}")
    return rows


def _decode_row(row: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Takes from a row what the planner reads; a selection without "keys" is of LENGTH of them."""
    note = f" ({row['note']})" if "note" in row else ""
    keys = {"keys": row.get("keys", LENGTH)} if row["name"] == DECODE["selection"][1] else {}
    figures = {name: row[name] for name in ("batch", "heads", "microseconds")}
    return figures | keys | {"source": source + note}


def verification_rows() -> list[dict[str, Any]]:
    """Gathers how much longer a layer's selection and attention take for a token and its drafts than for a token."""
    part = recorded("cost_by_position")["verification"]
    source = _source("cost_by_position", part)
    return [{"batch": row["batch"], "ratio": row["ratio"], "source": source} for row in part["timings"]]


def _source(file: str, part: Mapping[str, Any], what: str = "") -> str:
    """Names what was measured, the file of a recorded part, the card and the date."""
    circumstances = part["circumstances"]
    return f"{what}benchmarks/results/{file}.json, {circumstances['card']}, {circumstances['date']}"


def gather_serving() -> dict[str, Any]:
    """Gathers what the plan of serving needs, each figure with its source."""
    backward, exchanges = recorded("training")["backward"], recorded("sharded")["exchanges"]
    peaks = backward["peaks"]
    copy, product, exchange = (
        _source(file, part, what)
        for file, part, what in (
            ("training", backward, "a copy, bytes read plus written: "),
            ("training", backward, "a large bfloat16 product, sustained: "),
            ("sharded", exchanges, "bytes that each of two GPUs of a host sends: "),
        )
    )
    return {
        "source": "benchmarks/results by python -m benchmarks.rates",
        "rates": {
            "memory_bytes": {"value": peaks["copy_tb_per_s"] * 1e12, "source": copy},
            "product_flops": {"value": peaks["bf16_matmul_tflops_sustained"] * 1e12, "source": product},
        },
        "exchanges": {
            row["operation"]: {"value": 1e9 * row["gb_per_s"], "source": exchange} for row in exchanges["timings"]
        },
        "attention": decode_rows("attention"),
        "selection": decode_rows("selection"),
        "verification": verification_rows(),
    }


FILES = {"rates.json": gather, "serving_rates.json": gather_serving}  # of train/planner


def as_text(values: Mapping[str, Any]) -> str:
    """Makes the text of the file."""
    return json.dumps(values, indent=1) + "\n"


def main() -> None:
    for name, gathered in FILES.items():
        (PLANNER / name).write_text(as_text(gathered()))


if __name__ == "__main__":
    main()
