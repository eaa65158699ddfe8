"""Times the operations of a step on an H200 and its network, by the recorded rates in `rates.json`.

Kernels run at the rates recorded at the published shapes, products at that of a large bfloat16 product, everything else
at the bandwidth of a copy. Exchanges within a host run at the rates recorded between two GPUs of one.
"""

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from dsa_jax.dense_attention import CUDNN_BACKWARD
from dsa_jax.grouped_ffn import PARTIAL, WHOLE
from dsa_jax.parallel.expert_parallel import CAPACITY_FACTOR, GPUS_PER_HOST
from dsa_jax.parallel.sharding import AXES
from train.planner.costs import Collective, Done, flops_of_product, traffic
from train.planner.trace import KERNEL, Op, Program

MEMORY_BYTES = 143771 * 2**20  # of an H200 ("141 GB") as nvidia-smi reports them
USABLE_FRACTION = 0.95  # of it; the rest is for the CUDA context, NCCL's buffers and the programs
FLOAT32_FLOPS = 50e12  # products of float32, in full, do not use the tensor cores: NVIDIA's peak is 67e12
NETWORK_BYTES_PER_SECOND = 50e9  # that a GPU sends to other hosts: a 400 Gbit/s adapter a GPU, as in a DGX H200
OTHER = "elementwise, sorting, copies"
NAMES = {
    "sparse_attention": "attention",
    "the backward of sparse_attention": "attention, backward",
    "multihead_attention": "attention",
    CUDNN_BACKWARD: "attention, backward",
    "select_keys": "selection",
    "index_scores": "selection",
    "select_topk": "selection",
    "attention_target": "indexer's loss",
    "sparse_indexer_kl": "indexer's loss",
    "dense_indexer_kl": "indexer's loss",
    WHOLE: "experts",
    PARTIAL: "experts",
    f"the backward of {WHOLE}": "experts",
    f"the backward of {PARTIAL}": "experts",
}


def usable_memory() -> int:
    """Gives the bytes of an H200 that a step may take."""
    return int(MEMORY_BYTES * USABLE_FRACTION)


@functools.cache
def recorded_rates() -> Mapping[str, Any]:
    """Reads `rates.json`, which `python -m benchmarks.rates` writes."""
    return json.loads((importlib.resources.files("train.planner") / "rates.json").read_text())


@dataclasses.dataclass(frozen=True)
class Rates:
    """Holds floating-point operations and bytes a second; of sparse attention by heads, of experts by rows."""

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
    experts_forward: Mapping[int, float]
    experts_backward: Mapping[int, float]


@functools.cache
def measured_rates() -> Rates:
    """Gives the recorded rates of an H200."""
    rates = recorded_rates()["rates"]
    by_number = (name for name, value in rates.items() if isinstance(value, dict))
    return Rates(**rates | {name: {int(n): rate for n, rate in rates[name].items()} for name in by_number})


@dataclasses.dataclass(frozen=True)
class MeasuredStep:
    """Says what a training step on one sequence took of one H200."""

    seq_len: int
    peak_gib: float
    seconds: float


def measured_step(phase: str) -> MeasuredStep:
    """Gives the recorded step of SPARSE or WARMUP, of `estimate.SLICE`."""
    return MeasuredStep(**recorded_rates()["steps"][phase])


@functools.cache
def nvlink_rates() -> Mapping[str, float]:
    """Gives bytes/s that a GPU sends to the others of its host, by kind of collective."""
    return recorded_rates()["exchanges"]


def at_number(rates: Mapping[int, float], number: float) -> float:
    """Interpolates the rate at a number, of heads or of rows, where it was not measured.

    Examples:
      >>> at_number({16: 1.0, 64: 4.0}, 32)
      2.0
    """
    below = max((n for n in rates if n <= number), default=min(rates))
    above = min((n for n in rates if n >= number), default=max(rates))
    share = (number - below) / (above - below) if above > below else 0.0
    return rates[below] + share * (rates[above] - rates[below])


def _products(pairs: float, heads: int, width: int) -> float:
    return 2 * pairs * heads * width


# Floating-point operations of the kernels, from the shapes that they were traced with. Where a query reaches all keys
# before it, that is half of them on average: one document fills the context, which is the most work.


def kernel_flops(op: Op) -> tuple[float, float | None]:
    """Counts floating-point operations of a kernel and gives its rate; 0 and None where it waits for memory."""
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
    return 2 * _selected(op, 2) * heads * (width + op.results[0].shape[-1]), at_number(rates.sparse_forward, heads)


def _sparse_backward(op, rates):
    *_, heads, width = op.shapes[0].shape
    values = op.shapes[3].shape[-1]
    return 2 * _selected(op, 2) * heads * (3 * width + 2 * values), at_number(rates.sparse_backward, heads)


def _sparse_target(op, rates):
    *_, heads, width = op.shapes[0].shape
    slower = at_number(rates.sparse_forward, heads) / max(rates.sparse_forward.values())
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


def _experts(op, rates, *, experts: int, products: int, backward: bool = False, filled: float = 1.0):
    """Counts the products of the slots that have an expert here, `filled` of all; `experts` is their argument."""
    slots = filled * math.prod(op.shapes[experts].shape)
    _, dim, width = op.shapes[experts + 2].shape
    by_rows = rates.experts_backward if backward else rates.experts_forward
    return products * _products(slots, dim, width), at_number(by_rows, slots)


# Gate, up and down; in the backward pass gate and up again, three by rows and three by weights.
_experts_forward = functools.partial(_experts, experts=1, products=3)
_experts_backward = functools.partial(_experts, experts=2, products=8, backward=True)

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
    CUDNN_BACKWARD: _cudnn_backward,
    WHOLE: _experts_forward,
    f"the backward of {WHOLE}": _experts_backward,
    PARTIAL: functools.partial(_experts_forward, filled=1 / CAPACITY_FACTOR),
    f"the backward of {PARTIAL}": functools.partial(_experts_backward, filled=1 / CAPACITY_FACTOR),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """Holds an operation's name in a table, its floating-point operations, and its seconds, by rate or by bytes."""

    name: str
    flops: float
    seconds: float


def work(program: Program, done: Done) -> Work:
    """Computes what one execution of an operation costs."""
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


def network_seconds(
    shape: Mapping[str, int], collective: Collective, nvlink: Mapping[str, float] | None = None
) -> float:
    """Computes the seconds of a collective with all links to itself: the slower of NVLink and the adapters.

    Devices stand in the mesh's order, its last axis innermost, eight to a host. The members of a group in one host
    share what enters it: each carries its part. `nvlink` are rates by kind, `nvlink_rates` if None.
    """
    nvlink = nvlink_rates() if nvlink is None else nvlink
    count, inside, extent = 1, 1, 1
    for axis in reversed(AXES):
        if axis in collective.axes:
            count *= shape[axis]
            inside *= math.gcd(shape[axis], max(1, GPUS_PER_HOST // extent))
        extent *= shape[axis]
    within = collective.sent / nvlink[collective.kind] if inside > 1 else 0.0
    if inside == count:
        return within
    leaving = collective.sent * (count - inside) / (count - 1)
    return max(within, leaving / NETWORK_BYTES_PER_SECOND / (1 if collective.kind.endswith("all-to-all") else inside))
