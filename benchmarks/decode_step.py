"""Times whole decode steps over FP8 pages on one Hopper GPU:  python -m benchmarks.decode_step

A slice of the 671B shape, four layers by default, each row at the end of its own sequence. A step's time is that of a
run of steps that the host dispatches without reading what they draw, and with reading it one step behind, as
`dsa_jax.stream` does. Beside it stands the sum of its parts, each in a long chain of its own. A trace tells the time of
every kernel, and that in which the device did nothing.
"""

import argparse
import functools
import itertools
import math
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks import measure, traces
from benchmarks.decode_parts import LAYER, Parts, make_inputs, make_rows
from dsa_jax import Config, PagedCache, Runner, Transformer, make_mesh
from dsa_jax.inference.programs import Carry
from dsa_jax.inference.sampling import Kind, Settings
from dsa_jax.parallel.sharding import parameter_shardings, parse_mesh, shards

OUT = measure.RESULTS / "decode_step.json"
STEPS, WINDOWS = 24, 5  # of a window, and windows


def slice_of(layers: int, dense: int, **overrides: Any) -> Config:
    """Gives the config of some layers of the 671B model, the first `dense` of them without experts."""
    return Config.deepseek_v32(
        num_hidden_layers=layers, first_k_dense_replace=dense, index_fp8=True, param_dtype="bfloat16", **overrides
    )


def make_model(config: Config, mesh: Mesh | None = None) -> Transformer:
    """Makes a model whose weights are random, but repeat: to draw 90 GB of numbers takes memory and time."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    places = None if mesh is None else parameter_shardings(abstract, mesh, copies=True)

    @functools.partial(jax.jit, out_shardings=places)
    def make():

        def leaf(number, x):
            if x.ndim < 2:
                return jnp.ones(x.shape, x.dtype)
            tile = jax.random.normal(jax.random.key(number), x.shape[-2:], jnp.bfloat16) * config.initializer_range
            return jnp.broadcast_to(tile.astype(x.dtype), x.shape)

        leaves, tree = jax.tree.flatten(abstract)
        return jax.tree.unflatten(tree, [leaf(number, x) for number, x in enumerate(leaves)])

    return nnx.merge(graph, make())


def fill(cache: PagedCache) -> None:
    """Fills a cache of FP8 pages."""
    pools = cache.latents, cache.index_keys
    places = None if cache.mesh is None else tuple(pool.sharding for pool in pools)
    cache.update(*jax.jit(_fill, donate_argnums=(0, 1), out_shardings=places)(*pools))


def _fill(latents, index_keys):
    """Fills FP8 pools with numbers about 1: random e4m3 bytes that are no NaN, and scales of 2^-4."""
    numbers = lambda key, shape: jax.random.bits(key, shape, jnp.uint8) & jnp.uint8(0xBF)  # noqa: E731

    def layer(key):
        a, b = jax.random.split(key)
        rows, keys = numbers(a, latents.shape[1:]), numbers(b, index_keys.shape[1:])
        scale = jax.lax.bitcast_convert_type(jnp.float32(2.0**-4), jnp.uint8)
        rows = rows.at[..., 512:528].set(jnp.tile(scale, 4))
        keys = keys.at[:, 64:].set(jnp.tile(scale, keys.shape[2] // 4))
        return rows, jax.lax.bitcast_convert_type(keys, index_keys.dtype)

    return jax.lax.map(layer, jax.random.split(jax.random.key(0), latents.shape[0]))


class Case:
    """Holds a batch of sequences of one length, ready to decode."""

    def __init__(self, runner: Runner, batch: int, length: int):
        config, cache = runner.config, runner.cache
        self.runner, self.batch = runner, batch
        for sequence in cache.sequences:
            cache.free(sequence)
        random = np.random.default_rng(0)
        for free in itertools.chain(*cache._free):  # in any order, as in service
            random.shuffle(free._free)
        self.sequences = [cache.new(i % cache.row_shards) for i in range(batch)]
        for sequence in self.sequences:
            cache.extend(sequence, length)
        rows = runner.place(self.sequences)
        self.table = jnp.asarray(runner.table(rows))
        self.settings = jax.tree.map(
            jnp.asarray,
            Settings(
                np.zeros(len(rows), np.float32),
                np.full(len(rows), config.vocab_size, np.int32),
                np.ones(len(rows), np.float32),
                np.arange(len(rows), dtype=np.uint32),
            ),
        )
        self.stops = jnp.full(1, -1, jnp.int32)
        live = jnp.asarray([row is not None for row in rows])
        count = jnp.full(len(rows), length - 2 * STEPS, jnp.int32)
        zero = jnp.zeros(len(rows), jnp.int32)
        self.carry = Carry(zero, jnp.where(live, count, 0), zero, live)

    def steps(self, count: int, *, read: bool, kind: Kind = "greedy") -> float:
        """Runs steps from the same place, and returns the seconds of one."""
        carry, before = self.carry, None
        jax.block_until_ready(carry.token)
        began = time.perf_counter()
        for _ in range(count):
            carry, drawn, _ = self.runner.decode(carry, self.table, self.settings, self.stops, kind=kind)
            if read and before is not None:
                np.asarray(before.token)
            before = drawn
        jax.block_until_ready(carry.token)
        return (time.perf_counter() - began) / count


def time_case(case: Case) -> dict[str, Any]:
    """Times steps, and takes a trace of some."""
    case.steps(2, read=False)
    found: dict[str, Any] = {}
    for name, read in (("seconds", False), ("seconds_read", True)):
        found[name] = statistics.median(case.steps(STEPS, read=read) for _ in range(WINDOWS))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            case.steps(STEPS, read=True)
        found |= traces.kernels_of_step(traces.read_launches(folder), STEPS)
    return found


def time_parts(parts: Parts, runner: Runner, batch: int, length: int) -> dict[str, Any]:
    """Times the parts of a step alone, and sums them up; a layer with experts has parts that are not timed here."""
    config, cache = runner.config, runner.cache
    inputs = make_inputs(config, batch, 1)
    pools = cache.latents[:1], cache.index_keys[:1]
    found = parts.all(inputs, make_rows(pools, batch, 1, length, length), (*LAYER[2:], "unembedding"))
    layer = found["attention_us"] + found["projections_us"] + found["feed_forward_us"]
    return {"parts": found, "sum_seconds": 1e-6 * (config.num_hidden_layers * layer + found["unembedding_us"])}


def main() -> int:
    """Times every batch and records each at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dense", type=int, default=4, help="how many of them have no experts")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--length", type=int, nargs="+", default=[131072])
    parser.add_argument("--mesh", default="", help="of the first GPUs, such as expert=2; one GPU by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program on a CPU")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.tiny:
        config = Config.tiny(
            num_hidden_layers=2, index_fp8=True, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128
        )
    else:
        config = slice_of(arguments.layers, arguments.dense)
    sizes = parse_mesh(arguments.mesh)
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]) if arguments.mesh else None
    row_shards, page_shards = shards(mesh, "rows"), shards(mesh, "pages")
    pages = -(-max(arguments.batch) // row_shards) * -(-max(arguments.length) // (64 * page_shards))
    cache = PagedCache(config, pages, format="fp8", mesh=mesh)
    fill(cache)
    model = make_model(config, mesh)
    runner = Runner(model, cache)
    parts = None if config.num_moe_layers or mesh else Parts(model)
    where = f", on {arguments.mesh}" if mesh else ""
    name = f"{config.num_hidden_layers} layers, {config.num_moe_layers} with experts{where}"
    rows = []
    for length in arguments.length:
        for batch in arguments.batch:
            row: dict[str, Any] = {"batch": batch, "length": length}
            try:
                row |= time_case(Case(runner, batch, length))
                if parts is not None:
                    row |= time_parts(parts, runner, batch, length)
                    row["ratio"] = row["seconds"] / row["sum_seconds"]
            except Exception as error:  # the next case runs all the same
                row["error"] = f"{type(error).__name__}: {str(error)[:400]}"
            rows.append(row)
            print(row, flush=True)
            memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
            part = {"weights": config.param_dtype, "cache": "fp8", "peak_gib": memory, "timings": rows}
            measure.record(arguments.out, {name: part})
    return 0


if __name__ == "__main__":
    sys.exit(main())
