"""The training path on one Hopper GPU: backward, losses and whole steps, our kernels beside plain XLA and cuDNN.

  python -m benchmarks.training                   # everything; writes benchmarks/results/training.json
  python -m benchmarks.training --only backward   # a part alone, merged into the file

FLOPs: backward 2 · T · N · K · (3 (C + R) + 2C), dense attention 2 · N · (P + R + V) · reachable pairs.
"""

import functools
import gc
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import dsa_jax
from benchmarks import measure
from benchmarks.forward import (
    INDEX_HEADS,
    LATENT,
    QUERIES,
    ROPE,
    SCALE,
    TOPK,
    Case,
    attend,
    attention_inputs,
    raw_indexer,
    relative_norm,
    seeds,
)
from dsa_jax import (
    Config,
    KeyRange,
    Transformer,
    dense_indexer_kl,
    layers,
    multihead_attention,
    sparse_indexer_kl,
)
from dsa_jax.attention import sparse_attention_backward
from dsa_jax.dense_attention import cudnn_attention
from dsa_jax.parallel.sharding import parameter_shardings, place_batch, shards
from train.data import Batch
from train.phases import split_groups
from train.planner import SLICE, measured_settings
from train.state import init_state
from train.step import make_step

OUT = measure.RESULTS / "training.json"
BACKWARD = [(128, 8192), (128, 131072), (64, 8192), (64, 131072), (16, 8192)]
LOSSES = [(128, 8192), (128, 131072)]
NOPE, VALUE, HEADS = 128, 128, 128
DENSE_LENGTHS = (32768, 131072)
DENSE_SCALE = (NOPE + ROPE) ** -0.5
CHECKED = 64  # queries held against float64
LONG = 131072
XLA_LENGTHS = (32768, 16384, 8192)  # of a training step: the first that fits is taken
STEPS = 2
SLOW = 60.0  # seconds: a step that took longer is not repeated


# Sparse attention backward


@functools.partial(jax.jit, static_argnums=(1, 2))
def backward_inputs(key, heads, size):
    """Makes the backward's arguments, `out` and `lse` of the forward among them."""
    parts = jax.random.split(key, 3)
    q, kv, indices = attention_inputs(parts[0], heads, size)
    out, lse = attend(q, kv, indices, None)
    d_out = jax.random.normal(parts[1], out.shape, jnp.bfloat16)
    return q, kv, indices, out, lse, d_out, jax.random.normal(parts[2], lse.shape)


def backward(*arrays, implementation):
    return sparse_attention_backward(*arrays, value_dim=LATENT, scale=SCALE, implementation=implementation)


def backward_cases():
    for heads, size in BACKWARD:
        inputs = [backward_inputs(key, heads, size) for key in seeds(2)]
        shape = f"T {QUERIES} N {heads} K {TOPK} S {size}"
        flops = 2 * QUERIES * heads * TOPK * (3 * (LATENT + ROPE) + 2 * LATENT)
        timed = None if (heads, size) == BACKWARD[0] else ("pallas",)
        yield Case("sparse_attention backward", shape, backward, inputs, flops, "bf16_matmul_tflops", timed)


def backward_memory():
    """Bytes that the backward takes beyond what goes in and out, and whether its bits repeat."""
    for heads, size, length in ((128, 8192, QUERIES), (128, LONG, QUERIES), (128, LONG, LONG)):
        shapes = jax.eval_shape(lambda key: backward_inputs(key, heads, size), jax.random.key(0))  # noqa: B023
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, length if x.shape[1] == QUERIES else size, *x.shape[2:]), x.dtype),  # noqa: B023
            shapes,
        )
        fn = jax.jit(functools.partial(backward, implementation="pallas"))
        row = {
            "operation": "sparse_attention backward",
            "shape": f"T {length} N {heads} K {TOPK} S {size}",
            "temporary_gib": temporary_gib(fn, *shapes),
        }
        if length == QUERIES:
            arrays = backward_inputs(jax.random.key(5), heads, size)
            first, *others = (jax.tree.map(np.asarray, fn(*arrays)) for _ in range(4))
            row["same_bits"] = all(
                np.array_equal(a.view(np.uint16), b.view(np.uint16))
                for other in others
                for a, b in zip(first, other, strict=True)
            )
        yield row


def temporary_gib(fn, *shapes):
    memory: Any = fn.lower(*shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes / 2**30


def backward_errors():
    """Relative error norms of both gradients against float64, one key in five absent, 64 queries of 512 keys."""
    for heads in (128, 16):
        q, kv, indices, _, _, d_out, d_lse = backward_inputs(jax.random.key(9), heads, 512)
        q, indices, d_out, d_lse = (x[:, :CHECKED] for x in (q, indices, d_out, d_lse))
        indices = jnp.where(jax.random.uniform(jax.random.key(10), indices.shape) < 0.2, -1, indices)
        out, lse = attend(q, kv, indices, None)
        want = float64_backward(q[0], kv[0], indices[0], d_out[0], d_lse[0])
        for implementation in ("pallas", "xla"):
            got = jax.jit(functools.partial(backward, implementation=implementation))(
                q, kv, indices, out, lse, d_out, d_lse
            )
            row: dict[str, Any] = {
                "operation": "sparse_attention backward",
                "shape": f"N {heads}",
                "implementation": implementation,
            }
            for name, actual, exact in zip(("d_q", "d_kv"), got, want, strict=True):
                row[f"{name}_relative_norm"] = relative_norm(actual[0], exact)
            yield row


def float64_backward(q, kv, indices, d_out, d_lse):
    with jax.enable_x64(True):
        q, kv, d_out, d_lse = (x.astype(jnp.float64) for x in (q, kv, d_out, d_lse))

        @jax.jit
        def step(d_kv, arguments):
            q, indices, d_out, d_lse = arguments
            present = indices >= 0

            def attend(q, rows):
                logits = jnp.where(present, q @ rows.T * SCALE, -jnp.inf)
                return jax.nn.softmax(logits) @ rows[:, :LATENT], jax.nn.logsumexp(logits, axis=-1)

            rows = kv[jnp.maximum(indices, 0)]
            d_q, d_rows = jax.vjp(attend, q, rows)[1]((d_out, d_lse))
            return d_kv.at[jnp.where(present, indices, kv.shape[0])].add(d_rows, mode="drop"), d_q

        d_kv, d_q = jax.lax.scan(step, jnp.zeros_like(kv), (q, indices, d_out, d_lse))
        return np.asarray(d_q), np.asarray(d_kv)


# The sparse stage's loss


@functools.partial(jax.jit, static_argnums=(1, 2))
def loss_inputs(key, heads, size):
    parts = jax.random.split(key, 2)
    q, kv, indices, _, lse, *_ = backward_inputs(parts[0], heads, size)
    return *raw_indexer(parts[1], QUERIES, size), q, kv, lse, jnp.sort(indices, axis=-1)


def sparse_loss(*arrays, implementation):
    """The mean KL and its gradients by index queries, keys and weights."""

    def loss(*index):
        return jnp.mean(sparse_indexer_kl(*index, *arrays[3:], scale=SCALE, implementation=implementation))

    return jax.value_and_grad(loss, (0, 1, 2))(*arrays[:3])


def loss_cases():
    for heads, size in LOSSES:
        shape = f"T {QUERIES} N {heads} K {TOPK} J {INDEX_HEADS} S {size}"
        inputs = [loss_inputs(key, heads, size) for key in seeds(2)]
        timed = None if (heads, size) == LOSSES[0] else ("pallas",)
        yield Case("sparse_indexer_kl, gradients", shape, sparse_loss, inputs, implementations=timed)
        alone = [(q, kv, indices) for *_, q, kv, _, indices in inputs]
        flops = 2 * QUERIES * heads * TOPK * (2 * LATENT + ROPE)
        yield Case(
            "sparse_attention forward", shape, attend, alone, flops, "bf16_matmul_tflops", implementations=("pallas",)
        )


# One layer of the dense warm-up


@functools.partial(jax.jit, static_argnums=1)
def dense_inputs(key, length):
    """q_index, k_index, weights, q, k, v of the published shape."""
    parts = jax.random.split(key, 4)
    q, k = (jax.random.normal(part, (1, length, HEADS, NOPE + ROPE), jnp.bfloat16) for part in parts[:2])
    v = jax.random.normal(parts[2], (1, length, HEADS, VALUE), jnp.bfloat16)
    return *raw_indexer(parts[3], length, length), q, k, v


def dense_forward(q, k, v, implementation):
    keys = KeyRange.causal(*q.shape[:2])
    return multihead_attention(q, k, v, keys, scale=DENSE_SCALE, implementation=implementation)


def cudnn_forward(q, k, v, implementation):
    del implementation
    return cudnn_attention(q, k, v, scale=DENSE_SCALE)


def warmup_layer(q_index, k_index, weights, q, k, v, implementation):
    """Attention, its `lse`, the mean KL and the indexer's gradients."""
    out, lse = dense_forward(q, k, v, implementation)
    keys = KeyRange.causal(*q.shape[:2])

    def loss(*index):
        return jnp.mean(dense_indexer_kl(*index, q, k, lse, keys, scale=DENSE_SCALE, implementation=implementation))

    return out, jax.value_and_grad(loss, (0, 1, 2))(q_index, k_index, weights)


def warmup_cases():
    for length in DENSE_LENGTHS:
        inputs: list[Any] = [dense_inputs(key, length) for key in seeds(1)]
        shape = f"T = S = {length} N {HEADS} P {NOPE} R {ROPE} V {VALUE} J {INDEX_HEADS}"
        flops = 2 * HEADS * (NOPE + ROPE + VALUE) * length * (length + 1) / 2
        attention, ours = [arrays[3:] for arrays in inputs], ("pallas",)
        yield Case("multihead_attention forward", shape, dense_forward, attention, flops, "bf16_matmul_tflops", ours)
        if length == DENSE_LENGTHS[0]:
            yield Case("cuDNN, values padded", shape, cudnn_forward, attention, flops, "bf16_matmul_tflops", ours)
        yield Case("dense warm-up layer", shape, warmup_layer, inputs, implementations=ours)


def warmup_memory():
    for length in DENSE_LENGTHS:
        shapes = jax.eval_shape(lambda key: dense_inputs(key, length), jax.random.key(0))  # noqa: B023
        yield {
            "operation": "dense warm-up layer",
            "shape": f"T = S = {length}",
            "temporary_gib": temporary_gib(jax.jit(functools.partial(warmup_layer, implementation="pallas")), *shapes),
        }


# Whole training steps


def step_row(phase: str, length: int, implementation: str) -> dict[str, Any]:
    """Measures seconds and peak memory of one optimizer step of `phase` on one sequence of `length` tokens.

    `implementation` is "pallas", "xla", or "cudnn": XLA, with cuDNN for the dense attention and its gradients.
    """
    attention = layers.multihead_attention
    try:
        if implementation == "cudnn":
            layers.multihead_attention = attend_by_cudnn
        with dsa_jax.implementation(None if implementation == "pallas" else "xla"):
            row, times, metrics = run_steps(SLICE, phase, length, steps=STEPS)
    finally:
        layers.multihead_attention = attention
        gc.collect()
    row |= {
        "shape": f"T {length}, {SLICE.num_hidden_layers} layers of the 671B shape",
        "implementation": implementation,
        "seconds": min(times),
        "tokens_per_second": length / min(times),
    }
    return row | {"metrics": metrics[-1]}


def run_steps(config: Config, phase: str, length: int, *, steps: int, mesh: Mesh | None = None) -> Any:
    """Takes optimizer steps on one sequence of `length` tokens; returns figures of compiling, seconds and metrics."""
    row, state, batch, compiled = prepare(config, phase, length, steps=steps, mesh=mesh)
    print(row, flush=True)
    times, metrics, _ = take_steps(compiled, state, batch, steps)
    return row, times, metrics


def take_steps(compiled: Any, state: Any, batch: Any, steps: int) -> Any:
    """Takes steps, one only if it is slow; returns the seconds and metrics of each, and the last state."""
    times, metrics = [], []
    while len(times) < steps and not (times and times[-1] > SLOW):
        began = time.perf_counter()
        state, numbers = compiled(state, batch)
        metrics.append({name: float(value) for name, value in numbers.items() if value.ndim == 0})
        times.append(time.perf_counter() - began)
        print(f"{times[-1]:.3f} s", metrics[-1], flush=True)
    return times, metrics, state


def prepare(config: Config, phase: str, length: int, *, steps: int = 1, mesh: Mesh | None = None) -> Any:
    """Compiles an optimizer step on one sequence a shard of the batch.

    Returns:
      Figures of compiling, the state, a batch and the step.
    """
    sequences = shards(mesh, "batch")
    settings = measured_settings(phase, length, steps=steps, sequences=sequences)
    graphdef, shapes = split_groups(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    begin = functools.partial(initial_state, config, settings)
    places = None if mesh is None else parameter_shardings(jax.eval_shape(begin, jax.random.key(0)), mesh)
    state = jax.jit(begin, out_shardings=places)(jax.random.key(0))
    batch = one_document(length, config.vocab_size, sequences)
    batch = batch if mesh is None else place_batch(batch, mesh)
    make_step.cache_clear()
    began = time.perf_counter()
    compiled: Any = make_step(graphdef, settings, mesh=mesh).lower(state, batch).compile()
    row: dict[str, Any] = {
        "operation": f"training step {phase}",
        "parameters": sum(x.size for x in jax.tree.leaves(shapes)),
        "first_call": time.perf_counter() - began,
        "peak_gib": measure.peak_gib(compiled),
    }
    return row, state, batch, compiled


def initial_state(config, settings, key):
    params = split_groups(Transformer(config, rngs=nnx.Rngs(key)))[1]
    return init_state(params, settings, jax.random.key_data(key))


def one_document(length: int, vocabulary: int, sequences: int = 1) -> Batch:
    """Draws a batch of sequences, each the same document."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (1, length + 1)).astype(np.int32)
    tokens = np.repeat(tokens, sequences, axis=0)
    positions = np.repeat(np.arange(length, dtype=np.int32)[None], sequences, axis=0)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        valid=np.ones(positions.shape, bool),
        start=np.zeros(positions.shape, np.int32),
        stop=positions + 1,
        positions=positions,
    )


def attend_by_cudnn(q, k, v, keys, *, scale):
    """`multihead_attention` by cuDNN, its gradients too, without the `lse` that no loss of BASE asks for."""
    del keys
    return cudnn_attention(q, k, v, scale=scale), jnp.zeros(q.shape[:3], jnp.float32)


def xla_step_rows():
    """Plain XLA at the longest of some lengths that it can hold."""
    for phase in ("SPARSE", "WARMUP"):
        for length in XLA_LENGTHS:
            try:
                yield "timings", step_row(phase, length, "xla")
                break
            except jax.errors.JaxRuntimeError as error:
                print(phase, length, "does not fit", str(error)[:200], flush=True)


def timed(cases, peaks):
    for case in cases:
        for row in case.run(peaks):
            yield "timings", row


def backward_part(peaks):
    yield from timed(backward_cases(), peaks)
    yield from (("errors", row) for row in backward_errors())
    yield from (("memory", row) for row in backward_memory())


def warmup_part(peaks):
    yield from timed(warmup_cases(), peaks)
    yield from (("memory", row) for row in warmup_memory())


# Of each part its rows as they come, with the list that they belong to.
PARTS: dict[str, Callable[[dict], Iterable[tuple[str, dict]]]] = {
    "backward": backward_part,
    "sparse_loss": lambda peaks: timed(loss_cases(), peaks),
    "warmup": warmup_part,
    "sparse_step": lambda peaks: [("timings", step_row("SPARSE", LONG, "pallas"))],
    "warmup_step": lambda peaks: [("timings", step_row("WARMUP", LONG, "pallas"))],
    "dense_step": lambda peaks: [("timings", step_row("BASE", LONG, "cudnn"))],
    "base_step": lambda peaks: [("timings", step_row("BASE", LONG, "pallas"))],
    "xla_steps": lambda peaks: xla_step_rows(),
}


def main() -> None:
    names, out = measure.command_line(__doc__, PARTS, OUT)
    peaks = measure.peaks()
    print(json.dumps({name: round(value, 1) for name, value in peaks.items()}), flush=True)
    for name in names:
        part: dict[str, Any] = {"peaks": peaks}
        for kind, row in PARTS[name](peaks):
            part.setdefault(kind, []).append(row)
            if kind != "timings":
                print(row, flush=True)
            measure.record(out, {name: part})  # a row is not lost with those after it


if __name__ == "__main__":
    main()
