"""Training steps at 128K on one GPU and on all GPUs of a host: what a mesh gains, and that it changes no number.

  python -m benchmarks.sharded                 # everything; writes benchmarks/results/sharded.json
  python -m benchmarks.sharded --only SPARSE   # a part alone, merged into the file

Efficiency is the speed over that of one GPU, divided by the GPUs. Where `data` is an axis, each of its shards has a
sequence of its own, the same document in all, so that losses are those of one GPU. A step is traced after those that
are timed: the seconds of its collectives, and those in which a GPU did nothing else.
"""

import functools
import gc
import math
import os
import statistics
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from benchmarks import measure, traces
from benchmarks.training import prepare, take_steps
from dsa_jax import Config, KeyRange, make_mesh, select_keys
from dsa_jax.parallel.collectives import gather_tokens, slice_tokens
from dsa_jax.parallel.expert_parallel import CAPACITY_FACTOR, ragged_slices
from dsa_jax.parallel.sharding import parse_mesh, spec

OUT = measure.RESULTS / "sharded.json"
LENGTH = 131072
AXES_IN_TURN = ("context", "expert", "data", "tensor")  # the first are measured first
MIXED = {8: ("data=2,context=2,expert=2", "context=2,expert=2,tensor=2")}  # by GPUs
STEPS = 4  # the first of which is not timed
INDEX_HEADS, INDEX_DIM, TOPK = 64, 128, 2048  # of the selection, at the published width
WIDTH = Config(
    vocab_size=32768,
    hidden_size=2048,
    num_hidden_layers=4,
    first_k_dense_replace=0,
    num_attention_heads=32,
    q_lora_rank=768,
    index_n_heads=16,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=1024,
    n_group=1,
    topk_group=1,
    index_fp8=True,
)


def meshes(gpus: int) -> list[str]:
    """Lists the meshes of so many GPUs that are measured, one GPU first.

    Examples:
      >>> meshes(2)
      ['', 'context=2', 'expert=2', 'data=2', 'tensor=2']
    """
    return ["", *(f"{axis}={gpus}" for axis in AXES_IN_TURN if gpus > 1), *MIXED.get(gpus, ())]


def mesh_of(text: str) -> Mesh | None:
    """Makes the mesh over the first GPUs; None for one GPU without a mesh."""
    sizes = parse_mesh(text)
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]) if text else None


def step_row(phase: str, text: str) -> dict[str, Any]:
    """Measures seconds, losses, memory and collectives of optimizer steps on one long sequence a shard of the batch."""
    mesh = mesh_of(text)
    row, state, batch, compiled = prepare(WIDTH, phase, LENGTH, steps=STEPS, mesh=mesh)
    times, metrics, state = take_steps(compiled, state, batch, STEPS)
    seconds, sequences = statistics.median(times[1:]), len(batch.tokens)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(state, batch))
        collectives = traces.collective_seconds(traces.read_launches(folder))
    return row | {
        "shape": f"T {LENGTH}, {WIDTH.num_hidden_layers} layers, dim {WIDTH.hidden_size}",
        "mesh": text or "one GPU",
        "gpus": 1 if mesh is None else mesh.size,
        "sequences": sequences,
        "seconds": seconds,
        "tokens_per_second": sequences * LENGTH / seconds,
        **(collectives if mesh else {}),
        "metrics": metrics,
    }


def beside_one(row: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """Adds to a row its efficiency, and how far its first losses are from those of one GPU."""
    differences = {
        name: abs(row["metrics"][0][name] / one["metrics"][0][name] - 1)
        for name in ("loss", "kl", "lm_loss")
        if name in row["metrics"][0]
    }
    efficiency = row["tokens_per_second"] / one["tokens_per_second"] / row["gpus"]
    return row | {"efficiency": efficiency, "relative_difference": differences}


def step_rows(phase: str):
    one = None
    for text in meshes(jax.device_count()):
        try:
            row = step_row(phase, text)
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # the others are still worth their time
            row = {"operation": f"training step {phase}", "mesh": text, "failed": str(error)[:400]}
            print(row, flush=True)
        gc.collect()
        one = one or row
        yield row if "failed" in row or "failed" in one else beside_one(row, one)


def exchange_rows(size: int = 1 << 29):
    """Measures the rates at which a GPU sends, with `size` bfloat16 numbers in each exchange."""
    mesh, axis = mesh_of("context=2"), "context"
    split, whole = spec("sequence"), spec()

    def ragged(x):
        """Exchanges rows like those of experts, in a buffer of which even routing fills a part."""
        rows = x.reshape(-1, 2048)
        quota = len(rows) // 2
        sent = jnp.full(2, int(quota / CAPACITY_FACTOR), jnp.int32)
        slices = ragged_slices(sent, sent, index=0, shard=jax.lax.axis_index(axis), quota=quota)
        return jax.lax.ragged_all_to_all(rows, jax.lax.empty(rows.shape, rows.dtype), *slices, axis_name=axis)

    kinds = {  # the exchange, what it is given and gives, and which part of the numbers a GPU sends
        "all-gather": (lambda x: jax.lax.all_gather(x, axis, tiled=True), split, whole, 1),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, axis, tiled=True), whole, split, 1 / 2),
        "all-reduce": (lambda x: jax.lax.psum(x, axis), whole, whole, 1),
        "all-to-all": (lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True), split, split, 1 / 2),
        "ragged all-to-all": (ragged, split, split, 1 / 2 / CAPACITY_FACTOR),
    }
    for kind, (exchange, given, made, part) in kinds.items():
        numbers = size * (mesh.size if given == split else 1)
        x = jax.device_put(jnp.ones(numbers, jnp.bfloat16), NamedSharding(mesh, given))
        run = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=given, out_specs=made, check_vma=False))
        row = {"operation": kind, "shape": f"{2 * size / 1e9:.2f} GB a GPU", "mesh": "context=2"}
        row |= measure.seconds_per_call(run, [(x,)])
        row["gb_per_s"] = 2 * size * part / row["seconds"] / 1e9
        print(row, flush=True)
        yield row


def selection_rows(length: int = LENGTH, queries: int = LENGTH):
    """Measures selecting for all queries on every shard of the heads, and for a share each with the indices joined."""
    mesh = mesh_of("tensor=2")
    keys = jax.random.split(jax.random.key(0), 3)
    whole = jax.sharding.NamedSharding(mesh, spec())
    q = jax.random.normal(keys[0], (1, queries, INDEX_HEADS, INDEX_DIM), jnp.bfloat16).astype(jnp.float8_e4m3fn)
    k = jax.random.normal(keys[1], (1, length, INDEX_DIM), jnp.bfloat16).astype(jnp.float8_e4m3fn)
    weights = jax.random.normal(keys[2], (1, queries, INDEX_HEADS)) / 100
    reach = KeyRange.causal(1, queries, offset=length - queries)
    arrays = jax.device_put((q, k, weights, reach), whole)

    def replicated(q, k, weights, reach):
        return select_keys(q, k, weights, reach, k=TOPK)

    def divided(q, k, weights, reach):
        q, weights, reach = jax.tree.map(lambda x: slice_tokens(x, "heads"), (q, weights, reach))
        return gather_tokens(select_keys(q, k, weights, reach, k=TOPK), "heads")

    results = {}
    for name, select in (("on every shard", replicated), ("queries divided, indices joined", divided)):
        run = jax.jit(jax.shard_map(select, mesh=mesh, in_specs=spec(), out_specs=spec(), check_vma=False))
        row = {
            "operation": f"select_keys, {name}",
            "shape": f"T {queries} S {length} J {INDEX_HEADS} K {TOPK}",
            "mesh": "tensor=2",
        }
        row |= measure.seconds_per_call(run, [arrays])
        results[name] = run(*arrays)
        print(row, flush=True)
        yield row
    first, second = results.values()
    same = bool(jnp.array_equal(first, second))
    shards = [jax.device_get(shard.data) for shard in second.addressable_shards]
    yield {"operation": "select_keys", "same_bits": same, "same_on_shards": all((x == shards[0]).all() for x in shards)}


PARTS = {
    "exchanges": exchange_rows,
    "selection": selection_rows,
    "SPARSE": functools.partial(step_rows, "SPARSE"),
    "WARMUP": functools.partial(step_rows, "WARMUP"),
}


def main() -> None:
    """Measures the parts that the command line names, and records each row at once."""
    # A graph of kernels is one event in a trace: launched one by one, each shows.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    names, out = measure.command_line(__doc__, PARTS, OUT)
    for name in names:
        rows = []
        for row in PARTS[name]():
            rows.append(row)
            measure.record(
                out, {name: {"gpus": jax.device_count(), "timings": rows}}
            )  # none is lost with those after it


if __name__ == "__main__":
    main()
