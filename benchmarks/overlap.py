"""Training steps compiled for two H200s: what is sent beside compute, and for how much of it a GPU waits.

  python -m benchmarks.overlap                    # all meshes; writes benchmarks/results/overlap.json
  python -m benchmarks.overlap --only expert=2    # one of them, merged into the file

It compiles for the first two GPUs of the machine, or else for two H200s that are described to XLA; that needs no GPU,
but the `cuda` extra. Nothing runs: the order of the compiled instructions is read, and their times are estimated.
"""

import contextlib
import dataclasses
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks import measure
from benchmarks.schedule import read_sent, totals
from benchmarks.sharded import LENGTH, WIDTH
from dsa_jax import Config, make_mesh
from dsa_jax.pallas_kernels import CAPABILITY, assume_gpu
from dsa_jax.parallel.sharding import parse_mesh, shards
from train.planner import measured_settings
from train.state import abstract_batch, abstract_params, abstract_state, placed
from train.step import build_step

OUT = measure.RESULTS / "overlap.json"
MESHES = ("data=2", "context=2", "expert=2")
PHASE = "SPARSE"
GPUS = 2
# An H200, as far as XLA asks: multiprocessors, registers, bytes of memories, and cuDNN's and CUDA's versions.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184 clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 } device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 }
"""
# Without a GPU nothing can be timed to choose a product's kernel: cuBLAS computes all of them.
UNTUNED: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def two_gpus() -> tuple[list[Any], bool]:
    """Gives two GPUs, and whether they are this machine's; else they can be compiled for, and nothing else."""
    if jax.default_backend() == "gpu" and jax.device_count() >= GPUS:
        return jax.devices()[:GPUS], True
    return topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{GPUS}").devices, False


def compile_step(text: str, *, config: Config = WIDTH, length: int = LENGTH) -> Any:
    """Compiles the step of a mesh, with one sequence of `length` tokens a shard of the batch.

    Args:
      text: the mesh, of two GPUs.
      config: the model's.
      length: tokens of a sequence.
    """
    devices, are_here = two_gpus()
    mesh, settings = make_mesh(parse_mesh(text), devices), measured_settings(PHASE, length)
    graphdef, _ = abstract_params(config)
    arguments = placed(abstract_state(config, settings), mesh), abstract_batch(shards(mesh, "batch"), length, mesh)
    with contextlib.nullcontext() if are_here else assume_gpu(CAPABILITY):
        lowered = build_step(graphdef, settings, mesh=mesh).lower(*arguments)
        return lowered.compile(compiler_options=None if are_here else UNTUNED)


def row(text: str) -> dict[str, Any]:
    """Compiles the step of a mesh, and adds up what its collectives send and how long a GPU waits for them."""
    compiled = compile_step(text)
    kinds = totals(read_sent(compiled.as_text(), GPUS))
    where = {"operation": f"training step {PHASE}", "mesh": text, "compiled_for": two_gpus()[0][0].device_kind}
    shape = f"T {LENGTH}, {WIDTH.num_hidden_layers} layers, dim {WIDTH.hidden_size}"
    whole = dataclasses.asdict(kinds.pop("all"))
    parts = {kind: dataclasses.asdict(part) for kind, part in sorted(kinds.items())}
    return {**where, "shape": shape, "peak_gib": measure.peak_gib(compiled), **whole, "kinds": parts}


def main() -> None:
    names, out = measure.command_line(__doc__, MESHES, OUT, on_gpu=False)
    for name in names:
        part = row(name)
        print(part, flush=True)
        measure.record(out, {name: part})


if __name__ == "__main__":
    main()
