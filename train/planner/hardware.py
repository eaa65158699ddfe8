"""How fast an H200 does the operations of a step, by the benchmarks recorded under benchmarks/results, and its network.

Kernels run at the rates recorded at the published shapes, products at that of a large bfloat16 product, everything else
at the bandwidth of a copy. Exchanges within a host run at the rates recorded between two GPUs of one.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsa_jax.parallel.expert_parallel import HOST
from dsa_jax.parallel.sharding import AXES
from train.planner.costs import Collective, Done, flops_of_product, traffic
from train.planner.trace import CUDNN, KERNEL, Op, Program

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MEMORY = 143771 * 2**20  # bytes of an H200 ("141 GB") as nvidia-smi reports them
SHARE = 0.95  # of it that XLA may have; the rest is for the CUDA context, NCCL's buffers and the programs
FLOAT32_FLOPS = 50e12  # products of float32, in full, do not use the tensor cores: NVIDIA's peak is 67e12
NETWORK = 50e9  # bytes/s that a GPU sends to other hosts: one 400 Gbit/s adapter a GPU, as in NVIDIA's DGX H200
LONG = 131072
OTHER = "elementwise, sorting, copies"
NAMES = {
    "sparse_attention": "attention",
    "the backward of sparse_attention": "attention, backward",
    "multihead_attention": "attention",
    CUDNN: "attention, backward",
    "select_keys": "selection",
    "attention_target": "indexer's loss",
    "sparse_indexer_kl": "indexer's loss",
    "dense_indexer_kl": "indexer's loss",
}


def usable_memory() -> int:
    """The bytes of an H200 that a step may take."""
    return int(MEMORY * SHARE)


@functools.cache
def recorded(name: str) -> Any:
    """The benchmark results in `name`.json."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"the plan needs the rates recorded in {path}, a checkout's own: run it from one")
    return json.loads(path.read_text())


def _row(name: str, part: str, operation: str, **where: str) -> Mapping[str, Any]:
    rows = recorded(name)[part]["timings"]
    wanted = dict(implementation="pallas", operation=operation) | where
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


@dataclasses.dataclass(frozen=True)
class Rates:
    """Floating-point operations and bytes a second; those of sparse attention by the number of heads."""

    product: float
    copy: float
    sparse_forward: Mapping[int, float]
    sparse_backward: Mapping[int, float]
    sparse_loss: float  # at as many heads as sparse attention has at most
    select_fp8: float
    select: float
    dense_forward: float
    dense_loss: float
    cudnn: float


@functools.cache
def measured_rates() -> Rates:
    """The rates in benchmarks/results."""
    peaks = recorded("training")["backward"]["peaks"]
    fp8, narrow, wide = (
        _row("forward", "indexer", f"{name}", shape=f"T 4096 J 64 E 128 S {LONG}{more}")["tflops"] * 1e12
        for name, more in (
            ("select_keys e4m3", " K 2048, quantisation included"),
            ("index_scores e4m3", ""),
            ("index_scores bf16", ""),
        )
    )
    loss = _row("training", "sparse_loss", "sparse_indexer_kl, gradients", shape=f"T 4096 N 128 K 2048 J 64 S {LONG}")
    layer = _row("training", "warmup", "dense warm-up layer", shape=f"T = S = {LONG} N 128 P 128 R 64 V 128 J 64")
    dense = _row("training", "warmup", "multihead_attention forward", shape=layer["shape"])
    pairs = LONG * (LONG + 1) / 2
    return Rates(
        product=peaks["bf16_matmul_tflops_sustained"] * 1e12,
        copy=peaks["copy_tb_per_s"] * 1e12,
        sparse_forward=_by_heads("forward", "sparse_attention", "sparse_attention"),
        sparse_backward=_by_heads("training", "backward", "sparse_attention backward"),
        sparse_loss=(_products(4096 * 2048, 128, 576) + 3 * _products(4096 * 2048, 64, 128)) / loss["seconds"],
        select_fp8=fp8,
        select=wide * fp8 / narrow,
        dense_forward=dense["tflops"] * 1e12,
        dense_loss=(_products(pairs, 128, 192) + 4 * _products(pairs, 64, 128)) / (layer["seconds"] - dense["seconds"]),
        cudnn=_cudnn_backward_rate(pairs),
    )


def _cudnn_backward_rate(pairs: float) -> float:
    """From the step of BASE by cuDNN, four layers of it, less its two forward passes; the rest of it is little."""
    step = recorded("training")["dense_step"]["timings"][0]
    forward = _row("training", "warmup", "cuDNN, values padded")["tflops"] * 1e12
    left = step["seconds"] - 4 * 2 * 2 * pairs * 128 * (192 + 128) / forward
    return 4 * 2 * pairs * 128 * 5 * 192 / left


def _by_heads(name: str, part: str, operation: str) -> dict[int, float]:
    """The rate at each number of heads, at the longest context recorded."""
    rates: dict[int, tuple[int, float]] = {}
    for row in recorded(name)[part]["timings"]:
        if row["operation"] == operation and row["implementation"] == "pallas":
            sizes = dict(zip(row["shape"].split()[::2], map(int, row["shape"].split()[1::2]), strict=True))
            rates[sizes["N"]] = max(rates.get(sizes["N"], (0, 0.0)), (sizes["S"], row["tflops"] * 1e12))
    return {heads: rate for heads, (_, rate) in sorted(rates.items())}


def at_heads(rates: Mapping[int, float], heads: int) -> float:
    """The rate at a number of heads, in between where it was not measured."""
    below = max((n for n in rates if n <= heads), default=min(rates))
    above = min((n for n in rates if n >= heads), default=max(rates))
    share = (heads - below) / (above - below) if above > below else 0.0
    return rates[below] + share * (rates[above] - rates[below])


def _products(pairs: float, heads: int, width: int) -> float:
    return 2 * pairs * heads * width


# Floating-point operations of the kernels, from the shapes that they were traced with. Where a query reaches all keys
# before it, that is half of them on average: one document fills the context, which is the most work.


def kernel_flops(op: Op) -> tuple[float, float | None]:
    """Floating-point operations of a kernel and its rate; 0 and None where memory is what it waits for."""
    rates, operation = measured_rates(), op.params["operation"]
    if operation in _FLOPS:
        return _FLOPS[operation](op, rates)
    function = op.params["pallas"].function.__name__
    return _FLOPS[function](op, rates) if function in _FLOPS else (0.0, None)


def _selected(op: Op, indices: int) -> float:
    return math.prod(op.shapes[indices].shape)


def _reached(op: Op, queries: int, keys: int) -> float:
    batch, length = op.shapes[queries].shape[:2]
    return batch * length * (op.shapes[keys].shape[1] + 1) / 2


def _sparse_forward(op, rates):
    *_, heads, width = op.shapes[0].shape
    return 2 * _selected(op, 2) * heads * (width + op.results[0].shape[-1]), at_heads(rates.sparse_forward, heads)


def _sparse_backward(op, rates):
    *_, heads, width = op.shapes[0].shape
    values = op.shapes[3].shape[-1]
    return 2 * _selected(op, 2) * heads * (3 * width + 2 * values), at_heads(rates.sparse_backward, heads)


def _sparse_target(op, rates):
    *_, heads, width = op.shapes[0].shape
    slower = at_heads(rates.sparse_forward, heads) / max(rates.sparse_forward.values())
    return _products(_selected(op, 3), heads, width), rates.sparse_loss * slower


def _sparse_loss(op, rates):
    *_, heads, width = op.shapes[1].shape
    passes = 3 if op.params["pallas"].function.__name__ == "indexer_gradients" else 1
    return passes * _products(_selected(op, 4), heads, width), rates.sparse_loss


def _select(op, rates):
    *_, heads, width = op.shapes[0].shape
    rate = rates.select_fp8 if op.shapes[0].dtype.itemsize == 1 else rates.select
    return _products(_reached(op, 0, 1), heads, width), rate


def _dense_forward(op, rates):
    *_, heads, width = op.shapes[0].shape
    return 2 * _reached(op, 0, 1) * heads * (width + op.shapes[2].shape[-1]), rates.dense_forward


def _dense_target(op, rates):
    *_, heads, width = op.shapes[0].shape
    return _products(_reached(op, 0, 1), heads, width), rates.dense_loss


def _dense_scores(op, rates):
    *_, heads, width = op.shapes[0].shape
    passes = 1 if op.params["pallas"].function.__name__ == "index_scores" else 3
    return passes * _products(_reached(op, 0, 1), heads, width), rates.dense_loss


def _cudnn_backward(op, rates):
    *_, heads, width = op.shapes[0].shape
    return 2 * _reached(op, 0, 1) * heads * 5 * width, rates.cudnn


_FLOPS: dict[str, Callable[[Op, Rates], tuple[float, float]]] = {
    "sparse_attention": _sparse_forward,
    "the backward of sparse_attention": _sparse_backward,
    "attention_target": _sparse_target,
    "sparse_indexer_kl": _sparse_loss,
    "select_keys": _select,
    "multihead_attention": _dense_forward,
    "dense_target": _dense_target,
    "index_scores": _dense_scores,
    "_scores_backward_kernel": _dense_scores,
    CUDNN: _cudnn_backward,
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What an operation belongs to in a table, its floating-point operations, and seconds: by rate or by bytes."""

    name: str
    flops: float
    seconds: float


def work(program: Program, done: Done) -> Work:
    """What one execution of an operation costs."""
    rates, op = measured_rates(), done.op
    moved = traffic(program, done) / rates.copy
    if op.name == KERNEL:
        flops, rate = kernel_flops(op)
        return Work(NAMES.get(op.params["operation"], OTHER), flops, flops / rate if rate else moved)
    if op.name != "dot_general":
        return Work(OTHER, 0.0, moved)
    flops = flops_of_product(op)
    wide = all(shape.dtype.itemsize == 4 for shape in op.shapes)
    return Work("products", flops, max(flops / (FLOAT32_FLOPS if wide else rates.product), moved))


@functools.cache
def nvlink_rates() -> Mapping[str, float]:
    """Of each kind of collective, bytes/s that a GPU sends to the others of its host."""
    return {row["operation"]: 1e9 * row["gb_per_s"] for row in recorded("sharded")["exchanges"]["timings"]}


def network_seconds(shape: Mapping[str, int], collective: Collective) -> float:
    """Seconds of a collective with all links to itself: the slower of NVLink and the adapters.

    Devices stand in the mesh's order, its last axis innermost, eight to a host. The members of a group in one host
    share what enters it: each carries its part.
    """
    count, inside, extent = 1, 1, 1
    for axis in reversed(AXES):
        if axis in collective.axes:
            count *= shape[axis]
            inside *= math.gcd(shape[axis], max(1, HOST // extent))
        extent *= shape[axis]
    nvlink = collective.sent / nvlink_rates()[collective.kind] if inside > 1 else 0.0
    if inside == count:
        return nvlink
    leaving = collective.sent * (count - inside) / (count - 1)
    return max(nvlink, leaving / NETWORK / (1 if collective.kind.endswith("all-to-all") else inside))
