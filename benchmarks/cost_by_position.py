"""Times one attention layer of the 671B shape by position, sparse and dense, on one Hopper GPU.

  python -m benchmarks.cost_by_position      # writes benchmarks/results/cost_by_position.json

The layer is attention without a feed-forward: projections, indexer, top-k, attention, output. Prefill is a chunk of
4096 tokens that ends at the position (of fewer at 1K and 2K) over keys of the compute dtype; sparse in the multi-query
form, dense in the multi-head form by the kernel of `multihead_attention`, its keys expanded from latents. Decode is one
token a sequence over FP8 pages, by the parts of benchmarks/decode_parts.py; verification is four tokens beside one. No
dense decode kernel runs here, so its figure is computed from two of FlashMLA's on an H200: it stands in the record as
such. The same projections count on both sides.
"""

import argparse
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import measure
from benchmarks.decode_parts import ATTENDING, Parts, make_inputs, make_rows
from benchmarks.decode_step import fill, make_model, slice_of
from dsa_jax import Config, KeyRange, PagedCache
from dsa_jax.cache import LayerKeys
from dsa_jax.dense_attention import multihead_attention
from dsa_jax.quantization import quantize
from dsa_jax.rope import rotation

OUT = measure.RESULTS / "cost_by_position.json"
POSITIONS = [1024 << i for i in range(8)]
BATCHES = (1, 16, 32, 64, 128)
PARTS = ("prefill", "decode", "verification")
CHUNK = 4096
# FlashMLA's dense decode on an H200, bfloat16, N 128: a batch of 128 at 32768 keys; one sequence of 131072 in 84 µs.
DENSE_TFLOPS, DENSE_SINGLE_TB_PER_S = 601.0, 131072 * 1152 / 84e-6 / 1e12


def dense_decode_us(batch: int, position: int) -> float:
    """Computes FlashMLA's dense decode from its two figures, without what a launch costs.

    A batch is bound by products, a single row by what little of the card it fills.
    """
    products = 2 * batch * 128 * position * 1088 / (DENSE_TFLOPS * 1e6)
    return products if batch > 1 else max(products, position * 1152 / (DENSE_SINGLE_TB_PER_S * 1e6))


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


def time_decode(parts: Parts, config: Config, size: int, batches) -> list[dict[str, Any]]:
    """Times decode at every position and batch: what attends by its parts, and the layer's projections."""
    rows = []
    for batch in batches:
        # Rows beyond 64 share pages: their bytes do not fit beside.
        pools, inputs = _pools(config, min(batch, 64) * size // 64), make_inputs(config, batch, 1)
        for position in (each for each in POSITIONS if each <= size):
            at = make_rows(pools, batch, 1, position, size)
            row: dict[str, Any] = {"work": "decode", "position": position, "batch": batch}
            row |= parts.all(inputs, at, ATTENDING)
            row |= {"projections_us": rows[-1]["projections_us"]} if position > POSITIONS[0] else {}
            row |= {} if "projections_us" in row else parts.all(inputs, at, ["projections"])
            row["dense_us"] = dense_decode_us(batch, position)
            row["ratio"] = row["dense_us"] / row["attention_us"]
            rows.append(row)
            print(row, flush=True)
    return rows


def time_verify(parts: Parts, config: Config, size: int, batches) -> list[dict[str, Any]]:
    """Times what attends of four tokens a sequence at the last position, beside that of one."""
    rows = []
    for batch in batches:
        pools = _pools(config, min(batch, 64) * size // 64)
        row: dict[str, Any] = {"work": "verification", "position": size, "batch": batch}
        for tokens in (1, 4):
            found = parts.all(
                make_inputs(config, batch, tokens), make_rows(pools, batch, tokens, size, size), ["attention"]
            )
            row[f"attention_of_{tokens}_us"] = found["attention_us"]
        row["ratio"] = row["attention_of_4_us"] / row["attention_of_1_us"]
        rows.append(row)
        print(row, flush=True)
    return rows


def _pools(config, pages):
    cache = PagedCache(config, pages, format="fp8")
    fill(cache)
    return cache.latents, cache.index_keys


def main() -> int:
    """Times prefill, then decode, and records each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
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
    model = make_model(config)
    for part in arguments.only:
        if part == "prefill":
            rows = time_prefill(*nnx.split(next(model.layers()).self_attn), config, arguments.size)
        elif part == "decode":
            rows = time_decode(Parts(model), config, arguments.size, arguments.batch)
        else:
            rows = time_verify(
                Parts(model), config, arguments.size, [each for each in (1, 16, 128) if each <= max(arguments.batch)]
            )
        note = "dense decode is computed from two figures of FlashMLA's kernel on an H200, not measured in this run"
        measure.record(arguments.out, {part: {"timings": rows} | ({"dense": note} if part == "decode" else {})})
    return 0


if __name__ == "__main__":
    sys.exit(main())
