"""Traces a training step on one Hopper GPU, and holds every kernel of it against its floor:

  python -m benchmarks.step_trace                # writes benchmarks/results/step_trace.json
  python -m benchmarks.step_trace --only sparse  # a part alone, merged into the file

A kernel's floor is the time of the bytes that its instruction must read and write at the speed of a copy, or of a
product's FLOPs at that of a large one. The kernels of this package wait for tensor cores, so by their bytes alone they
have no floor worth telling: `benchmarks.forward` and its neighbours hold them against peers.
"""

import dataclasses
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from benchmarks import hlo, measure, traces, training
from dsa_jax import Config
from train.planner import SLICE

OUT = measure.RESULTS / "step_trace.json"
LEAST_SHARE = 0.005  # of the step, of a kernel that is listed
OVER_FLOOR = 2.0  # times its floor, from which a kernel is to be looked at

# Layers with experts as a shard of the 671B plan sees them: 16 of full width, 8 rows a token.
SHARD = dataclasses.replace(
    SLICE, num_hidden_layers=1, n_routed_experts=16, num_experts_per_tok=8, moe_intermediate_size=2048
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Holds the launches of an instruction, or of a kernel whose instruction is not known, and their seconds."""

    name: str
    count: int
    seconds: float


def kernels_of(folder: str) -> list[Kernel]:
    """Adds up the kernels of a trace by the instruction that launched them."""
    found = traces.seconds_by_instruction(traces.read_launches(folder))
    return [Kernel(name, len(times), sum(times)) for name, times in found.items()]


def table(kernels: Iterable[Kernel], text: str, peaks: Mapping[str, float]) -> list[dict[str, Any]]:
    """Lists the kernels that take their share of all, the longest first, each beside its floor.

    Args:
      kernels: of a trace.
      text: of the compiled program.
      peaks: as `measure.peaks` gives them.
    """
    kernels = sorted(kernels, key=lambda kernel: -kernel.seconds)
    total = sum(kernel.seconds for kernel in kernels)
    instructions = {}
    for each, count in hlo.traffic(hlo.parse(text)):
        instructions[each.name] = instructions[_as_symbol(each.name)] = each, count
    rows = []
    for kernel in kernels:
        if kernel.seconds < LEAST_SHARE * total:
            break
        row: dict[str, Any] = {"kernel": kernel.name, "count": kernel.count, "milliseconds": 1e3 * kernel.seconds}
        row["share"] = kernel.seconds / total
        if kernel.name in instructions:
            each, count = instructions[kernel.name]
            row |= {"op_name": each.op_name, "opcode": each.opcode} | floor(each, count, kernel, peaks)
        rows.append(row)
    return rows


def _as_symbol(name: str) -> str:
    return re.sub(r"[.\-]", "_", name)


def floor(each: hlo.Instruction, count: float, kernel: Kernel, peaks: Mapping[str, float]) -> dict[str, Any]:
    """Computes what an instruction must move, what it takes at least, and how many times that it took."""
    seconds, bound = count / (peaks["copy_tb_per_s"] * 1e12), "bytes"
    if each.flops:
        by_flops = each.flops / (peaks["bf16_matmul_tflops"] * 1e12)
        seconds, bound = max((seconds, "bytes"), (by_flops, "FLOPs"))
    if "mosaic" in each.target:
        return {"megabytes": count / 1e6}
    least = seconds * kernel.count
    return {
        "megabytes": count / 1e6,
        "bound": bound,
        "floor_milliseconds": 1e3 * least,
        "times_floor": kernel.seconds / least if least else math.inf,
    }


def trace_step(config: Config, phase: str, length: int, peaks: Mapping[str, float]) -> dict[str, Any]:
    """Traces the second step of a phase, and lists its kernels."""
    compiling, state, batch, compiled = training.prepare(config, phase, length)
    state, _ = jax.block_until_ready(compiled(state, batch))
    began = time.perf_counter()
    state, _ = jax.block_until_ready(compiled(state, batch))
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(state, batch))
        kernels = kernels_of(folder)
    rows = table(kernels, compiled.as_text(), peaks)
    for row in rows:
        print(describe(row), flush=True)
    busy = sum(kernel.seconds for kernel in kernels)
    figures = {"shape": f"T {length}, {config.num_hidden_layers} layers", "seconds": seconds, "kernel_seconds": busy}
    print(figures, flush=True)
    return {"compiling": compiling, "peaks": dict(peaks)} | figures | {"kernels": rows}


def describe(row: Mapping[str, Any]) -> str:
    """Writes a row in one line."""
    over = row.get("times_floor")
    beside = f"{over:6.1f} × its floor" if over else " " * 18
    flag = " <" if over and over > OVER_FLOOR else "  "
    place = re.sub(r"jit\([^)]*\)/|while/body/|closed_call/|checkpoint/", "", row.get("op_name", ""))
    times = f"{row['milliseconds']:9.2f} ms {row['share']:6.1%} {row['count']:5d} ×"
    return f"{times}{beside}{flag} {row['kernel']}  {place[-90:]}"


PARTS: dict[str, Callable[[Mapping[str, float]], dict[str, Any]]] = {
    "sparse": lambda peaks: trace_step(SLICE, "SPARSE", training.LONG, peaks),
    "warmup": lambda peaks: trace_step(SLICE, "WARMUP", training.LONG, peaks),
    "shard": lambda peaks: trace_step(SHARD, "SPARSE", training.LONG, peaks),
}


def main() -> None:
    """Traces the steps that the command line names, and records them."""
    # A graph of kernels is one event in a trace: launched one by one, each shows.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    names, out = measure.command_line(__doc__, PARTS, OUT)
    peaks = measure.peaks()
    for name in names:
        measure.record(out, {name: PARTS[name](peaks)}, keep=PARTS.__contains__)


if __name__ == "__main__":
    main()
