"""Times and records what the benchmarks call: medians of back-to-back calls, the peaks of the card, one JSON file."""

import argparse
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

RESULTS = pathlib.Path(__file__).parent / "results"
INPUT_SETS = 3  # sets of inputs that calls rotate over, so that none finds its own in the cache
REPEATS = 7  # windows, of which the median counts
WINDOW_SECONDS = 0.04  # of back-to-back calls
PAUSE_SECONDS = 0.15  # of rest before each window, in which the card cools
LONG_WINDOW_SECONDS = 0.8  # of back-to-back calls, in which the card's power limit lowers its clock
CHAIN_WINDOWS = 5  # of chained calls, of which the median counts
CHAIN_SECONDS = 0.02  # of such a window at least: its first calls and its end cost the host some 0.1 ms


def seconds_per_call(fn: Callable, inputs: Sequence[tuple]) -> dict[str, float]:
    """Times calls made back to back over rotating inputs.

    Args:
      fn: the function, compiled or jitted.
      inputs: sets of its arguments.

    Returns:
      Seconds a call, by name. `seconds` is the median of REPEATS windows with rests between them, `least` and `most`
      are their extremes: how published kernels are measured, before the card's power limit lowers its clock.
      `sustained` is one long window without a rest, left out for what takes longer than that in one call. `first_call`
      comes before them all, and compiles too.
    """
    began = time.perf_counter()
    jax.block_until_ready(fn(*inputs[0]))
    first = time.perf_counter() - began
    once = window(fn, inputs, 1)
    if once > LONG_WINDOW_SECONDS:  # a call is a window, as long as the long one
        times = [once, window(fn, inputs, 1)]
        return {"seconds": statistics.median(times), "least": min(times), "most": max(times), "first_call": first}
    calls = math.ceil(WINDOW_SECONDS / once)
    times = []
    for _ in range(REPEATS if calls > 1 else 3):
        time.sleep(PAUSE_SECONDS)
        times.append(window(fn, inputs, calls))
    out = {"seconds": statistics.median(times), "least": min(times), "most": max(times), "first_call": first}
    return out | {"sustained": window(fn, inputs, math.ceil(LONG_WINDOW_SECONDS / once))}


def window(fn, inputs, calls):
    """Times a window of `calls` back-to-back calls, in seconds a call."""
    began = time.perf_counter()
    for call in range(calls):
        out = fn(*inputs[call % len(inputs)])
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / calls


def timed_chain(call: Callable, sets: Sequence[tuple], shared: tuple = (), calls: int = 72) -> float:
    """Times a short call in a chain of many in one program, each of which waits for the one before.

    Between programs the device idles for some 40 µs, more than many a kernel takes.

    Args:
      call: makes one array of `(*arrays, *shared, after)`, when `after`, what the call before has made, is there.
      sets: the arrays of each call, in turn; so many that the L2 cache does not hold them all.
      shared: arrays of all calls.
      calls: of a chain, about.

    Returns:
      Seconds of a call, the median of CHAIN_WINDOWS windows.
    """
    call = jax.jit(call)  # traced and lowered once
    rounds = max(1, round(calls / len(sets)))

    @jax.jit
    def chain(sets, shared, after):
        for arrays in sets * rounds:
            after = call(*arrays, *shared, after)
        return after

    sets, repeats = list(sets), 1
    result = jax.eval_shape(call, *sets[0], *shared, jnp.zeros(8))
    after = jnp.zeros(result.shape, result.dtype)
    jax.block_until_ready(chain(sets, shared, after))
    times: list[float] = []
    while len(times) < CHAIN_WINDOWS:
        seconds = window(chain, [(sets, shared, after)], repeats)
        if seconds * repeats < CHAIN_SECONDS:
            repeats, times = 2 * repeats, []
        else:
            times.append(seconds / len(sets) / rounds)
    return statistics.median(times)


def run_case(name: str, case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a case and prints its row; an error becomes the row, so that the next case runs all the same."""
    began = time.perf_counter()
    try:
        row = case()
    except Exception as error:
        row = {"right": False, "error": f"{type(error).__name__}: {str(error)[:400]}"}
    shown = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if value is not None
    )
    print(f"{name:50s} {', '.join(shown)}  ({time.perf_counter() - began:.1f} s)", flush=True)
    return {"case": name} | row


def run_timings(cases: Iterable[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]) -> dict[str, Any]:
    """Runs cases, each with what its row begins with, "name" among it; returns "timings", and what has "failed"."""
    rows = []
    for labels, case in cases:
        name = ", ".join(str(x) if key == "name" else f"{key} {x}" for key, x in labels.items())
        rows.append(labels | {key: x for key, x in run_case(name, case).items() if key != "case"})
    failed = [row for row in rows if "error" in row]
    return {"timings": [row for row in rows if "error" not in row]} | ({"failed": failed} if failed else {})


def peak_gib(compiled: Any) -> float:
    """Computes the GiB that a compiled program needs: what goes in and out, donated arrays once, and temporaries."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (held + memory.temp_size_in_bytes) / 2**30


def peaks() -> dict[str, float]:
    """Measures what the card reaches: matrix products in TFLOP/s, a copy in TB/s (bytes read plus written)."""
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
    """Collects date, card, versions and command: what a figure needs beside it to be believed."""
    device, spec = jax.devices()[0], sys.modules["__main__"].__spec__
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin")
    return {
        "date": datetime.date.today().isoformat(),
        "card": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "driver": _output("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {name: version for name in names if (version := _version(name))},
        "command": " ".join(["python", *(["-m", spec.name] if spec else sys.argv[:1]), *_without_out(sys.argv[1:])]),
    }


def _without_out(arguments):
    """Leaves out where the results go, which is no part of what was measured."""
    places = {i for i, each in enumerate(arguments) if each == "--out"}
    return [each for i, each in enumerate(arguments) if i not in places and i - 1 not in places]


def _version(name):
    """Looks up the version of an installed distribution, None without one."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command):
    """Runs a command and returns what it prints, None if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line(
    doc: str | None, parts: Iterable[str], out: pathlib.Path, *, on_gpu: bool = True
) -> tuple[list[str], pathlib.Path]:
    """Reads a benchmark's command line; ends the program where a GPU is missing.

    Args:
      doc: the benchmark's docstring, for `--help`.
      parts: the names of its parts.
      out: the file to record them in, unless the command line names another.
      on_gpu: whether the benchmark needs a Hopper GPU.

    Returns:
      The parts to run, and the file to record them in.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts), metavar="PART")
    parser.add_argument("--out", type=pathlib.Path, default=out, help="the JSON file to write")
    arguments = parser.parse_args()
    if on_gpu and jax.default_backend() != "gpu":
        parser.error(f"needs an NVIDIA Hopper GPU, got {jax.default_backend()}")
    return arguments.only, arguments.out


def record(
    path: pathlib.Path, parts: dict[str, dict[str, Any]], *, keep: Callable[[str], bool] = lambda name: True
) -> None:
    """Writes the parts of a benchmark, each beside its circumstances; the file is replaced whole or not at all.

    Args:
      path: the JSON file, which may exist.
      parts: the new parts by name.
      keep: which of the file's other parts stay, by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else {}
    old = {name: part for name, part in old.items() if keep(name)}
    new = {name: {"circumstances": circumstances()} | part for name, part in parts.items()}
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(old | new, indent=1) + "\n")
    os.replace(unfinished, path)
