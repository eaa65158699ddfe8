"""Times one attention layer of the 671B shape by position, sparse and dense, on one Hopper GPU.

  python -m benchmarks.cost_by_position      # writes benchmarks/results/cost_by_position.json

The layer is attention without a feed-forward: projections, indexer, top-k, attention, output. Prefill is a chunk of
4096 tokens that ends at the position (of fewer at 1K and 2K) over keys of the compute dtype; sparse in the multi-query
form, dense in the multi-head form by the kernel of `multihead_attention`, its keys expanded from latents. Decode is one
token a sequence over FP8 pages. No dense decode kernel runs here, so its figure is FlashMLA's, recorded in
benchmarks/results/peers.json: it stands in the record as such. The same projections count on both sides.
"""

import argparse
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import measure
from benchmarks.decode_step import fill, make_model, slice_of
from dsa_jax import Config, KeyRange, PagedCache
from dsa_jax.cache import LayerKeys, Pages
from dsa_jax.dense_attention import multihead_attention
from dsa_jax.quantization import quantize
from dsa_jax.rope import rotation

OUT = measure.RESULTS / "cost_by_position.json"
POSITIONS = [1024 << i for i in range(8)]
BATCHES = (1, 16, 32, 64, 128)
CHUNK = 4096
# FlashMLA's dense decode on an H200, bfloat16, N 128: see peers.json.
DENSE_TFLOPS, DENSE_SINGLE_TB_PER_S = 601.0, 131072 * 1152 / 84e-6 / 1e12


def dense_decode_us(batch: int, position: int) -> float:
    """Computes FlashMLA's dense decode from its two recorded figures, without what a launch costs.

    A batch is bound by products, a single row by what little of the card it fills.
    """
    products = 2 * batch * 128 * position * 1088 / (DENSE_TFLOPS * 1e6)
    return products if batch > 1 else max(products, position * 1152 / (DENSE_SINGLE_TB_PER_S * 1e6))


def attention_layer(config: Config):
    """Makes the first layer's attention, and the list of its parameters."""
    layer = next(make_model(config).layers()).self_attn
    return nnx.split(layer)


def prefill(graph, config: Config, length: int, dense: bool):
    """Makes the function of a chunk that ends at `stop` tokens: new tokens and the keys before them."""

    @jax.jit
    def run(state, x, kv, k_index, k_scale, stop):
        layer = nnx.merge(graph, state)
        positions = (stop - length + jnp.arange(length))[None]
        keys = KeyRange(jnp.zeros((1, length), jnp.int32), positions + 1)
        p = layer.project(x, rotation(positions, config))
        kv = jax.lax.dynamic_update_slice(kv, p.kv, (0, stop - length, 0))
        if dense:
            k, v = layer.expand(kv)
            out, _ = multihead_attention(p.q, k, v, keys, scale=config.softmax_scale)
        else:
            (q_index, q_scale), (k_new, scale) = quantize(p.q_index), quantize(p.k_index)
            k_index = jax.lax.dynamic_update_slice(k_index, k_new, (0, stop - length, 0))
            k_scale = jax.lax.dynamic_update_slice(k_scale, scale, (0, stop - length))
            store = LayerKeys(kv, k_index, k_scale)
            selected = store.select(q_index, p.weights * q_scale, keys, k=config.index_topk)
            out, _ = store.attend(
                layer.absorb(p.q), selected, value_dim=config.kv_lora_rank, scale=config.softmax_scale
            )
            out = layer.unabsorb(out)
        return jnp.einsum("btnv,nvd->btd", out, layer.o_proj[...])

    return run


def time_prefill(graph, state, config: Config, size: int) -> list[dict[str, Any]]:
    """Times chunks at every position up to `size`."""
    rows = []
    for position in [each for each in POSITIONS if each <= size]:
        length = min(CHUNK, position)
        x = jax.random.normal(jax.random.key(1), (1, length, config.hidden_size), jnp.bfloat16)
        kv = jax.random.normal(jax.random.key(2), (1, position, config.latent_dim), jnp.bfloat16)
        k_index, k_scale = quantize(jax.random.normal(jax.random.key(3), (1, position, config.index_head_dim)))
        row: dict[str, Any] = {"work": "prefill", "position": position, "tokens": length}
        for name, dense in (("sparse", False), ("dense", True)):
            run = prefill(graph, config, length, dense)
            arguments = state, x, kv, k_index, k_scale, jnp.int32(position)
            jax.block_until_ready(run(*arguments))
            once = measure.window(run, [arguments], 2)
            calls = max(2, min(20, int(0.08 / once)))
            row[f"{name}_us_per_token"] = 1e6 * measure.window(run, [arguments], calls) / length
        row["ratio"] = row["dense_us_per_token"] / row["sparse_us_per_token"]
        rows.append(row)
        print(row, flush=True)
    return rows


def decode(graph, config: Config, rows: int):
    """Makes the function of a chain of decode calls of one layer, each after the one before."""

    def step(state, x, latents, index_keys, table, stop, parts):
        layer = nnx.merge(graph, state)
        keys = KeyRange(jnp.zeros((rows, 1), jnp.int32), stop[:, None])
        if parts == "attention":
            store = Pages(latents, index_keys, table, stop[:, None], config.kv_lora_rank).layer(0)
            bits = x[:, :, : config.index_n_heads]
            q_index = jnp.broadcast_to(bits[..., None], (rows, 1, config.index_n_heads, config.index_head_dim))
            q_index, scale = quantize(q_index)
            selected = store.select(q_index, scale, keys, k=config.index_topk)
            q = jnp.broadcast_to(
                x[:, :, None, : config.latent_dim], (rows, 1, config.num_attention_heads, config.latent_dim)
            )
            out, _ = store.attend(q, selected, value_dim=config.kv_lora_rank, scale=config.softmax_scale)
            return out[:, :, 0, 0]
        p = layer.project(x, rotation(stop[:, None] - 1, config))
        q = layer.absorb(p.q)
        out = layer.unabsorb(q[..., : config.kv_lora_rank])
        return jnp.einsum("btnv,nvd->btd", out, layer.o_proj[...])[:, :, 0] + p.kv[:, :, 0] + p.k_index[:, :, 0]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def chain(parts, calls, state, x, latents, index_keys, table, stop):
        for _ in range(calls):
            x = x + 1e-3 * step(state, x, latents, index_keys, table, stop, parts)[..., None].astype(x.dtype)
        return x[:, 0, :8]

    return chain


def time_decode(graph, state, config: Config, size: int, batches) -> list[dict[str, Any]]:
    """Times decode at every position and batch: what attends, and the projections about it."""
    rows = []
    for batch in batches:
        pages = max(1, min(batch, 64) * size // 64)  # rows beyond 64 share pages: their bytes do not fit beside
        cache = PagedCache(config, pages, format="fp8")
        pools = fill(cache.latents, cache.index_keys)
        order = np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(-1, size // 64)
        table = jnp.asarray(order[np.arange(batch) % len(order)])
        x = jax.random.normal(jax.random.key(1), (batch, 1, config.hidden_size), jnp.bfloat16)
        chain = decode(graph, config, batch)
        for position in POSITIONS:
            if position > size:
                continue
            stop = jnp.full(batch, position, jnp.int32)
            row: dict[str, Any] = {"work": "decode", "position": position, "batch": batch}
            for parts in ("attention", "projections"):
                if parts == "projections" and position > POSITIONS[0]:
                    row["projections_us"] = rows[-1]["projections_us"] if rows[-1]["batch"] == batch else None
                    continue
                calls = 24 if batch == 1 else 12
                run = functools.partial(chain, parts, calls)
                arguments = state, x, *pools, table, stop
                jax.block_until_ready(run(*arguments))
                row[f"{parts}_us"] = 1e6 * min(measure.window(run, [arguments], 6) for _ in range(3)) / calls
            row["dense_us"] = dense_decode_us(batch, position)
            row["ratio"] = row["dense_us"] / row["attention_us"]
            rows.append(row)
            print(row, flush=True)
        del pools, cache
    return rows


def main() -> int:
    """Times prefill, then decode, and records each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--size", type=int, default=POSITIONS[-1])
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--tiny", action="store_true", help="a tiny layer, to try the program on a CPU")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    config = slice_of(1, 1)
    if arguments.tiny:
        config = Config.tiny(
            num_hidden_layers=1, first_k_dense_replace=1, index_fp8=True, kv_lora_rank=512, qk_rope_head_dim=64,
            index_head_dim=128, hidden_size=640, dtype="bfloat16",
        )  # fmt: skip
    graph, state = attention_layer(config)
    for part in arguments.only:
        if part == "prefill":
            rows = time_prefill(graph, state, config, arguments.size)
        else:
            rows = time_decode(graph, state, config, arguments.size, arguments.batch)
        note = "dense decode is FlashMLA's, published and recorded in peers.json, not measured in this run"
        measure.record(arguments.out, {part: {"timings": rows} | ({"dense": note} if part == "decode" else {})})
    return 0


if __name__ == "__main__":
    sys.exit(main())
