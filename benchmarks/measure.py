"""Timing and recording for the benchmarks: medians of back-to-back calls, the peaks of the card, one JSON file."""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsa_jax.pallas_kernels import dispatch as pallas_kernels

RESULTS = pathlib.Path(__file__).parent / "results"
INPUT_SETS = 3  # rotated, so that no call finds its own inputs in the cache
REPEATS = 7
WINDOW, PAUSE = 0.04, 0.15  # seconds of back-to-back calls, and of rest after them
LONG_WINDOW = 0.8


def seconds_per_call(fn: Callable, inputs: Sequence[tuple]) -> dict[str, float]:
    """Times calls made back to back over rotating inputs, in seconds.

    `seconds` is the median of REPEATS windows with rests between them: how published kernels are measured, before the
    card's power limit lowers its clock. `sustained` is one long window without a rest, left out for what takes longer
    than that in one call. Compiling and the first call
    come before, and are timed as `first_call`.
    """
    began = time.perf_counter()
    jax.block_until_ready(fn(*inputs[0]))
    first = time.perf_counter() - began
    once = _window(fn, inputs, 1)
    if once > LONG_WINDOW:  # a window each, which is as long as the long one
        times = [once, _window(fn, inputs, 1)]
        return {"seconds": statistics.median(times), "least": min(times), "most": max(times), "first_call": first}
    calls = math.ceil(WINDOW / once)
    times = []
    for _ in range(REPEATS if calls > 1 else 3):
        time.sleep(PAUSE)
        times.append(_window(fn, inputs, calls))
    out = {"seconds": statistics.median(times), "least": min(times), "most": max(times), "first_call": first}
    return out | {"sustained": _window(fn, inputs, math.ceil(LONG_WINDOW / once))}


def _window(fn, inputs, calls):
    """Seconds a call of so many back-to-back calls."""
    began = time.perf_counter()
    for call in range(calls):
        out = fn(*inputs[call % len(inputs)])
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / calls


def peak_gib(compiled: Any) -> float:
    """GiB of a compiled program: what goes in and out, what is donated once, and what it needs between."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (held + memory.temp_size_in_bytes) / 2**30


@contextlib.contextmanager
def kernels_only_if(wanted: bool):
    """Has everything that leaves the choice compiled in plain XLA unless `wanted`; layers have no option for it."""
    capability = pallas_kernels.gpu_capability
    pallas_kernels.gpu_capability = capability if wanted else lambda: None
    try:
        yield
    finally:
        pallas_kernels.gpu_capability = capability


def peaks() -> dict[str, float]:
    """What the card reaches in this run: matrix products in TFLOP/s, a copy in TB/s (bytes read plus written)."""
    size = 8192
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    flops = 2 * size**3

    @jax.jit
    def product(a, b):
        return jnp.einsum("mk,nk->mn", a, b, preferred_element_type=jnp.bfloat16)

    e4m3 = tuple(x.astype(jnp.float8_e4m3fn) for x in (a, b))
    big = jnp.zeros(1 << 29, jnp.float32)
    bf16, fp8 = seconds_per_call(product, [(a, b)]), seconds_per_call(product, [e4m3])
    return {
        "bf16_matmul_tflops": flops / bf16["seconds"] / 1e12,
        "bf16_matmul_tflops_sustained": flops / bf16["sustained"] / 1e12,
        "fp8_matmul_tflops": flops / fp8["seconds"] / 1e12,
        "fp8_matmul_tflops_sustained": flops / fp8["sustained"] / 1e12,
        "copy_tb_per_s": 2 * big.nbytes / seconds_per_call(jax.jit(lambda x: x + 1), [(big,)])["seconds"] / 1e12,
    }


def circumstances() -> dict[str, Any]:
    """Date, card, versions, commit and command: what a figure needs beside it to be believed."""
    device, spec = jax.devices()[0], sys.modules["__main__"].__spec__
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin")
    return {
        "date": datetime.date.today().isoformat(),
        "card": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "driver": _output("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {name: version for name in names if (version := _version(name))},
        "command": " ".join(["python", *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]]),
    }


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line(
    doc: str | None, parts: Iterable[str], out: pathlib.Path, *, on_gpu: bool = True
) -> tuple[list[str], pathlib.Path]:
    """Which parts of a benchmark to run and the file to record them in; ends the program where a GPU is missing."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts), metavar="PART")
    parser.add_argument("--out", type=pathlib.Path, default=out, help="the JSON file to write")
    arguments = parser.parse_args()
    if on_gpu and jax.default_backend() != "gpu":
        parser.error(f"needs an NVIDIA Hopper GPU, got {jax.default_backend()}")
    return arguments.only, arguments.out


def record(path: pathlib.Path, parts: dict[str, dict[str, Any]]) -> None:
    """Writes the parts, each beside its circumstances, whole or not at all; other parts that the file holds stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else {}
    new = {name: {"circumstances": circumstances()} | part for name, part in parts.items()}
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(old | new, indent=1) + "\n")
    os.replace(unfinished, path)
