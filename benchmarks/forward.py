"""Measures the forward path on one Hopper GPU: our kernels beside plain XLA, times, errors against float64.

  python -m benchmarks.forward                    # everything, a few minutes; writes benchmarks/results/forward.json
  python -m benchmarks.forward --only layer       # a part alone, merged into the file

FLOPs: attention 2 · T · N · K · (2C + R), indexer 2 · J · E · reachable pairs. Selections are random and complete.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsa_jax
from benchmarks import measure
from dsa_jax import Config, KeyRange, index_scores, quantize, select_keys, select_topk, sparse_attention
from dsa_jax.layers import SparseMLA
from dsa_jax.quantization import hadamard
from dsa_jax.rope import rotation

OUT = measure.RESULTS / "forward.json"

# The published shapes, and the sizes (N, S), S and (rows, S) that the tables show.
IMPLEMENTATIONS = ("pallas", "xla")
QUERIES, TOPK, LATENT, ROPE, INDEX_HEADS, INDEX_DIM = 4096, 2048, 512, 64, 64, 128
SCALE = 576**-0.5  # the published one belongs to trained queries; with this one random logits spread as theirs do
CHECKED_QUERIES = 48  # held against float64
ATTENTION = [(128, 8192), (128, 131072), (64, 8192), (64, 131072), (32, 8192), (16, 8192), (16, 131072)]
INDEXER = [32768, 131072]
TOPK_ROWS = [(1024, 131072), (4096, 32768)]
XLA_TIMED = [(128, 8192), (128, 131072), (16, 8192)]  # of ATTENTION: each takes a while, the others tell no more


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape: the call, its inputs, and the work that a call does."""

    operation: str
    shape: str
    fn: Callable[..., Any]
    inputs: list[tuple]
    flops: float | None = None  # of a call
    peak: str | None = None  # which of `measure.peaks` bounds it
    implementations: tuple[str, ...] | None = None  # None for all
    bytes: float | None = None  # that a call must read and write

    def run(self, peaks) -> list[dict[str, Any]]:
        """Times every implementation; gives and prints a row for each."""
        rows = []
        for implementation in self.implementations or IMPLEMENTATIONS:
            fn = jax.jit(functools.partial(self.fn, implementation=implementation))
            row = {"operation": self.operation, "shape": self.shape, "implementation": implementation}
            row |= measure.seconds_per_call(fn, self.inputs)
            if self.flops and self.peak:
                row["tflops"] = self.flops / row["seconds"] / 1e12
                if "sustained" in row:
                    row["tflops_sustained"] = self.flops / row["sustained"] / 1e12
                row["share_of_peak"] = row["tflops"] / peaks[self.peak]
            if self.bytes:
                row["tb_per_s"] = self.bytes / row["seconds"] / 1e12
            rows.append(row)
            print(describe(row), flush=True)
        return rows


def describe(row):
    """Writes a row in one line."""
    rate = ""
    if "tflops" in row:
        rate = (
            f"{row['tflops']:8.1f} TFLOP/s {row['share_of_peak']:6.1%}, sustained {row.get('tflops_sustained', 0):.1f}"
        )
    rate += f"{row['tb_per_s']:8.2f} TB/s" if "tb_per_s" in row else ""
    name = f"{row['operation']:18} {row['shape']:34} {row['implementation']:7}"
    return f"{name} {1e3 * row['seconds']:10.3f} ms {rate}   first call {row['first_call']:.1f} s"


def seeds(count=measure.INPUT_SETS):
    """Makes a key for each set of inputs."""
    return [jax.random.key(seed) for seed in range(count)]


# Sparse attention


@functools.partial(jax.jit, static_argnums=(1, 2))
def attention_inputs(key, heads, size):
    """Draws q, kv and indices of sparse attention over `size` keys, all of which are selected alike."""
    parts = jax.random.split(key, 3)
    q = jax.random.normal(parts[0], (1, QUERIES, heads, LATENT + ROPE), jnp.bfloat16)
    kv = jax.random.normal(parts[1], (1, size, LATENT + ROPE), jnp.bfloat16)
    return q, kv, jax.random.randint(parts[2], (1, QUERIES, TOPK), 0, size, jnp.int32)


def attend(q, kv, indices, implementation):
    """Calls sparse attention at the published value width."""
    return sparse_attention(q, kv, indices, value_dim=LATENT, scale=SCALE, implementation=implementation)


def attention_cases():
    """Yields sparse attention at the heads and keys of ATTENTION."""
    for heads, size in ATTENTION:
        timed = None if (heads, size) in XLA_TIMED else ("pallas",)
        yield Case(
            "sparse_attention",
            f"T {QUERIES} N {heads} K {TOPK} S {size}",
            attend,
            [attention_inputs(key, heads, size) for key in seeds()],
            flops=2 * QUERIES * heads * TOPK * (2 * LATENT + ROPE),
            peak="bf16_matmul_tflops",
            implementations=timed,
        )


def attention_errors():
    """Yields the relative error norm of `out` and the largest error of `lse`, on rows with absent keys among them."""
    for heads in dict.fromkeys(heads for heads, _ in ATTENTION):
        size = ATTENTION[0][1]
        q, kv, indices = attention_inputs(jax.random.key(9), heads, size)
        q, indices = q[:, :CHECKED_QUERIES], indices[:, :CHECKED_QUERIES]
        indices = jnp.where(jax.random.uniform(jax.random.key(10), indices.shape) < 0.2, -1, indices)
        want_out, want_lse = float64_attention(q[0], kv[0], indices[0], SCALE)
        for implementation in IMPLEMENTATIONS:
            out, lse = jax.jit(functools.partial(attend, implementation=implementation))(q, kv, indices)
            yield {
                "operation": "sparse_attention",
                "shape": f"N {heads} S {size}",
                "implementation": implementation,
                "out_relative_norm": relative_norm(out[0], want_out),
                "lse_largest": float(np.max(np.abs(np.asarray(lse[0]) - want_lse))),
            }


def float64_attention(q, kv, indices, scale):
    """Computes sparse attention of one sequence in float64: out [T, N, C] and lse [T, N]."""
    with jax.enable_x64(True):

        @jax.jit
        def row(arguments):
            q, indices = arguments
            keys = kv[jnp.maximum(indices, 0)].astype(jnp.float64)
            logits = jnp.where(indices >= 0, q.astype(jnp.float64) @ keys.T * scale, -jnp.inf)
            return jax.nn.softmax(logits) @ keys[:, :LATENT], jax.nn.logsumexp(logits, axis=-1)

        return jax.tree.map(np.asarray, jax.lax.map(row, (q, indices)))


def relative_norm(actual, want):
    """Computes |actual − want| / |want|."""
    return float(np.linalg.norm(np.asarray(actual, np.float64) - want) / np.linalg.norm(want))


# The indexer


@functools.partial(jax.jit, static_argnums=(1, 2))
def raw_indexer(key, queries, size):
    """Draws what the indexer's projections give: bfloat16 queries and keys before the Hadamard transform, weights."""
    parts = jax.random.split(key, 3)
    q = jax.random.normal(parts[0], (1, queries, INDEX_HEADS, INDEX_DIM), jnp.bfloat16)
    k = jax.random.normal(parts[1], (1, size, INDEX_DIM), jnp.bfloat16)
    return q, k, jax.random.normal(parts[2], (1, queries, INDEX_HEADS)) * (INDEX_HEADS * INDEX_DIM) ** -0.5


@functools.partial(jax.jit, static_argnames="implementation")
def to_e4m3(q, k, weights, implementation=None):
    """Takes the indexer's inputs to FP8: Hadamard transform, rounding, and a query's scale moved to its weights."""
    (q, q_scale), (k, k_scale) = (
        quantize(hadamard(x, implementation=implementation), implementation=implementation) for x in (q, k)
    )
    return q, k, weights * q_scale, k_scale


def tail(queries, size):
    """Gives the causal reach of the last `queries` of `size` tokens."""
    return KeyRange.causal(1, queries, offset=size - queries)


def pairs(queries, size):
    """Counts the (query, key) pairs in `tail`'s reach."""
    return queries * (size - queries) + queries * (queries + 1) // 2


def score(q, k, weights, k_scale, keys, implementation):
    """Calls `index_scores`."""
    return index_scores(q, k, weights, keys, k_scale=k_scale, implementation=implementation)


def select(q, k, weights, keys, implementation):
    """Calls `select_keys` in FP8, the quantisation included."""
    q, k, weights, k_scale = to_e4m3(q, k, weights, implementation)
    return select_keys(q, k, weights, keys, k=TOPK, k_scale=k_scale, implementation=implementation)


def indexer_cases():
    """Yields scores, selection and quantisation at the keys of INDEXER."""
    for size in INDEXER:
        timed = None if size == INDEXER[0] else ("pallas",)
        keys = tail(QUERIES, size)
        flops = 2 * INDEX_HEADS * INDEX_DIM * pairs(QUERIES, size)
        raw = [raw_indexer(key, QUERIES, size) for key in seeds()]
        shape = f"T {QUERIES} J {INDEX_HEADS} E {INDEX_DIM} S {size}"
        rounded = [(*to_e4m3(*arrays), keys) for arrays in raw]
        yield Case("index_scores e4m3", shape, score, rounded, flops, "fp8_matmul_tflops", timed)
        wide = [(q, k, w, None, keys) for q, k, w in raw]
        yield Case(
            "index_scores bf16", shape, score, wide, flops=flops, peak="bf16_matmul_tflops", implementations=("pallas",)
        )
        yield Case(
            "select_keys e4m3",
            f"{shape} K {TOPK}, quantisation included",
            select,
            [(*arrays, keys) for arrays in raw],
            flops,
            "fp8_matmul_tflops",
            timed,
        )
    q, k, w = raw_indexer(jax.random.key(0), QUERIES, 131072)
    yield Case(
        "hadamard, quantize",
        f"q [{QUERIES}, {INDEX_HEADS}, {INDEX_DIM}], k [131072, {INDEX_DIM}]",
        to_e4m3,
        [(q, k, w)],
        bytes=(q.size + k.size) * 3,
    )


def topk_cases():
    """Yields `select_topk` at the shapes of TOPK_ROWS."""
    for rows, size in TOPK_ROWS:
        inputs = [(jax.random.normal(key, (1, rows, size)),) for key in seeds(2)]
        yield Case(
            "select_topk",
            f"[{rows}, {size}] K {TOPK}",
            lambda scores, implementation: select_topk(scores, TOPK, implementation=implementation),
            inputs,
            bytes=4 * rows * size,
        )


def score_errors():
    """Yields max |Δ| / Σ_j |w_j| relu_j, and how often sets differ from the exact ones, by queries of a causal tail."""
    size = 32768
    raw = raw_indexer(jax.random.key(9), CHECKED_QUERIES, size)
    keys = tail(CHECKED_QUERIES, size)
    for dtype, arguments in (("e4m3", to_e4m3(*raw)), ("bf16", (*raw, None))):
        want, magnitude = float64_scores(*arguments)
        mask = np.asarray(keys.mask(size))[0]
        exact = np.asarray(select_topk(jnp.asarray(want, jnp.float32)[None], TOPK, keys=keys, implementation="xla"))[0]
        for implementation in IMPLEMENTATIONS:
            scores = np.asarray(jax.jit(functools.partial(score, implementation=implementation))(*arguments, keys))[0]
            error = float(np.max(np.abs(np.where(mask, scores - want, 0)) / magnitude))
            chosen = np.asarray(select_topk(jnp.asarray(scores)[None], TOPK, implementation=implementation))[0]
            yield {
                "operation": f"index_scores {dtype}",
                "shape": f"T {CHECKED_QUERIES} S {size}",
                "implementation": implementation,
                "largest_relative_error": error,
                "rows_whose_set_differs": float(np.mean(np.any(chosen != exact, axis=1))),
                "keys_that_differ": float(
                    np.mean([np.setdiff1d(a, b).size for a, b in zip(chosen, exact, strict=True)])
                )
                / TOPK,
                "largest_distance_from_the_last": worst_distance(want, magnitude, chosen, exact),
            }


def float64_scores(q, k, weights, k_scale):
    """Computes one sequence's scores in float64, and the sums of their terms' magnitudes: both [T, S]."""
    with jax.enable_x64(True):
        q, k, weights = (x[0].astype(jnp.float64) for x in (q, k, weights))
        scale = 1.0 if k_scale is None else k_scale[0].astype(jnp.float64)

        @jax.jit
        def row(arguments):
            q, weights = arguments
            relu = jnp.maximum(q @ k.T, 0)
            return weights @ relu * scale, jnp.maximum(jnp.abs(weights) @ relu * scale, 1e-30)

        return jax.tree.map(np.asarray, jax.lax.map(row, (q, weights)))


def worst_distance(scores, magnitude, chosen, exact):
    """Computes how far from the k-th score, in units of `magnitude`, a key lies that only one of two sets has."""
    worst = 0.0
    for row, (mine, theirs) in enumerate(zip(chosen, exact, strict=True)):
        last = scores[row, theirs].min()
        other = np.setxor1d(mine, theirs)
        worst = max(worst, np.max(np.abs(scores[row, other] - last) / magnitude[row, other], initial=0.0))
    return float(worst)


# The whole attention layer


def layer_case(size: int, implementation: str) -> dict[str, Any]:
    """Times projections, indexer, selection, attention and output of the published shape over `size` tokens."""
    config = dataclasses.replace(Config.deepseek_v32(), param_dtype="bfloat16", index_fp8=True)
    graph, state = jax.jit(lambda key: nnx.split(SparseMLA(config, rngs=nnx.Rngs(key))))(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, size, config.hidden_size), jnp.bfloat16)

    @jax.jit
    def layer(state, x):
        positions = jnp.arange(size, dtype=jnp.int32)[None]
        return nnx.merge(graph, state)(x, rotation(positions, config), KeyRange.causal(1, size)).x

    with dsa_jax.implementation("xla" if implementation == "xla" else None):  # None: kernels where there are any
        began = time.perf_counter()
        compiled = layer.lower(state, x).compile()
        first = time.perf_counter() - began
    began = time.perf_counter()
    jax.block_until_ready(compiled(state, x))
    once = time.perf_counter() - began
    timed = {"seconds": once} if once > 10 else measure.seconds_per_call(compiled, [(state, x)])
    timed["first_call"] = first
    row = {"operation": "DSA layer 671B", "shape": f"T = S = {size}", "implementation": implementation, **timed}
    row["peak_gib"] = measure.peak_gib(compiled)
    print(describe(row), f"{row['peak_gib']:.1f} GiB", flush=True)
    return row


def layer_rows():
    """Times our kernels at 128K tokens, then both at a length where XLA takes seconds."""
    return [layer_case(131072, "pallas"), layer_case(32768, "pallas"), layer_case(32768, "xla")]


def longest_rows():
    """Times plain XLA at 128K tokens: it fits, and takes a while."""
    return [layer_case(131072, "xla")]


# The parts that can be run alone, functions of the card's peaks.
PARTS: dict[str, Callable[[dict], dict[str, list]]] = {
    "sparse_attention": lambda peaks: {
        "timings": timings(attention_cases(), peaks),
        "errors": list(attention_errors()),
    },
    "indexer": lambda peaks: {"timings": timings(indexer_cases(), peaks), "errors": list(score_errors())},
    "select_topk": lambda peaks: {"timings": timings(topk_cases(), peaks)},
    "layer": lambda peaks: {"timings": layer_rows()},
    "layer_longest": lambda peaks: {"timings": longest_rows()},
}


def timings(cases, peaks):
    """Runs cases one after the other, and gives all their rows."""
    return [row for case in cases for row in case.run(peaks)]


def main() -> None:
    """Runs the parts that the command line names, and records each when it is done."""
    names, out = measure.command_line(__doc__, PARTS, OUT)
    peaks = measure.peaks()
    print(json.dumps({name: round(value, 1) for name, value in peaks.items()}), flush=True)
    for name in names:
        part = PARTS[name](peaks)
        for error in part.get("errors", []):
            print(error)
        measure.record(out, {name: {"peaks": peaks} | part})


if __name__ == "__main__":
    main()
