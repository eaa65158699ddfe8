"""The parts of a decode step, each in a chain of calls in one program, of which every one waits for the one before."""

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import measure
from dsa_jax import KeyRange, Transformer
from dsa_jax.cache import Pages
from dsa_jax.quantization import E4M3
from dsa_jax.rope import rotation

CALLS = 8  # side by side in a program
ROUNDS = {1: 40, 16: 12, 32: 8}  # of these calls in a program by batch, 4 of others
WINDOWS = 5  # of which the median counts
ATTENDING = ("selection", "sparse_attention", "attention")
LAYER = (*ATTENDING, "projections", "feed_forward")
PARTS = (*LAYER, "unembedding")


class Rows(NamedTuple):
    """Holds a batch of sequences in pages: pools of one layer, tables, and where each token stands."""

    latents: jax.Array  # [1, n, 64, W]
    index_keys: jax.Array
    table: jax.Array  # int32 [B, P]
    stop: jax.Array  # int32 [B, T]


class Inputs(NamedTuple):
    """Holds what goes into the parts: hidden states, and queries."""

    x: jax.Array  # [B, T, D]
    q_index: jax.Array  # e4m3 [B, T, J, E]
    weights: jax.Array  # float32 [B, T, J]
    q: jax.Array  # [B, T, N, C + R]


def make_rows(pools, batch: int, tokens: int, position: int, size: int) -> Rows:
    """Makes tables of `size` positions, in any order of pages; sequences share pages where the pools have too few."""
    pages, width = pools[0].shape[1], -(-size // 64)
    order = np.random.default_rng(0).permutation(pages)[: pages // width * width].astype(np.int32).reshape(-1, width)
    table = order[np.arange(batch) % len(order)]
    stop = position - tokens + 1 + np.arange(tokens, dtype=np.int32)
    return Rows(*pools, jnp.asarray(table), jnp.broadcast_to(jnp.asarray(stop), (batch, tokens)))


def make_inputs(config, batch: int, tokens: int) -> Inputs:
    """Draws the parts' inputs."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (config.hidden_size,), (config.index_n_heads, config.index_head_dim), (config.index_n_heads,)
    shapes += ((config.num_attention_heads, config.latent_dim),)
    dtypes = config.dtype, E4M3, jnp.float32, config.dtype
    draw = lambda key, shape, dtype: jax.random.normal(key, (batch, tokens, *shape), jnp.float32).astype(dtype)  # noqa: E731
    return Inputs(*map(draw, keys, shapes, dtypes))


class Parts:
    """Times the parts of a model's first layer, and its unembedding.

    Args:
      model: its first layer is the one.
    """

    def __init__(self, model: Transformer):
        self.config = model.config
        layer = next(model.layers())
        self._attention, self._mlp = nnx.split(layer.self_attn), nnx.split(layer.mlp)
        self._last = nnx.split(model)  # the whole, for its unembedding

    def seconds(self, part: str, inputs: Inputs, rows: Rows) -> float:
        """Times a part: seconds of a call, the median of windows."""
        step, state = self._step(part)
        rounds = ROUNDS.get(len(inputs.x), 4)
        run = functools.partial(_chain, step, rounds)
        arguments = state, inputs, rows
        jax.block_until_ready(run(*arguments))
        return statistics.median(measure.window(run, [arguments], 2) for _ in range(WINDOWS)) / rounds / CALLS

    def all(self, inputs: Inputs, rows: Rows, parts=PARTS) -> dict[str, float]:
        """Times parts by name, in µs."""
        return {f"{part}_us": 1e6 * self.seconds(part, inputs, rows) for part in parts}

    @functools.cache  # noqa: B019
    def _step(self, part) -> tuple[Callable, Any]:
        graph, state = {"feed_forward": self._mlp, "unembedding": self._last}.get(part, self._attention)
        return functools.partial(_STEPS[part], self.config, graph), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _chain(step, rounds, state, inputs: Inputs, rows: Rows):
    """Runs a part again and again: what each call makes changes what the next begins with."""

    def run(_, carry):
        x, table = carry
        for _ in range(CALLS):
            x, table = step(state, inputs._replace(x=x), rows._replace(table=table))
        return x, table

    x, table = jax.lax.fori_loop(0, rounds, run, (inputs.x, rows.table))
    return x[:, 0, :8], table


# The steps of the chains: a part, and what makes the next wait for it without any work worth telling.


def _attending(config, graph, state, inputs, rows, *, selects: bool, attends: bool):
    store = Pages(rows.latents, rows.index_keys, rows.table, rows.stop, config.kv_lora_rank).layer(0)
    keys = KeyRange(jnp.zeros_like(rows.stop), rows.stop)
    spread = jnp.arange(config.index_topk) * jnp.maximum(1, rows.stop[..., None] // config.index_topk)
    selected = jnp.where(spread < rows.stop[..., None], spread, -1).astype(jnp.int32)
    if selects:
        selected = store.select(inputs.q_index, inputs.weights, keys, k=config.index_topk)
    found = selected[:, 0, :1] < -1
    if attends:
        out, _ = store.attend(inputs.q, selected, value_dim=config.kv_lora_rank, scale=config.softmax_scale)
        found = out[:, 0, 0, :1] > 1e30
    return inputs.x, rows.table + found


def _projections(config, graph, state, inputs, rows):
    layer = nnx.merge(graph, state)
    p = layer.project(inputs.x, rotation(rows.stop - 1, config))
    out = layer.unabsorb(layer.absorb(p.q)[..., : config.kv_lora_rank])
    out = jnp.einsum("btnv,nvd->btd", out, layer.o_proj[...])
    out += p.kv[..., :1] + p.k_index[..., :1] + p.q_index[:, :, 0, :1].astype(out.dtype) + p.weights[..., :1]
    return inputs.x + 1e-3 * out.astype(inputs.x.dtype), rows.table


def _feed_forward(config, graph, state, inputs, rows):
    out = nnx.merge(graph, state)(inputs.x)
    out = out if isinstance(out, jax.Array) else out[0]
    return inputs.x + 1e-3 * out, rows.table


def _unembedding(config, graph, state, inputs, rows):
    logits = nnx.merge(graph, state).unembed(inputs.x)
    best = jnp.max(logits, axis=-1, keepdims=True)
    return inputs.x + 1e-6 * best.astype(inputs.x.dtype), rows.table


_STEPS = {
    "selection": functools.partial(_attending, selects=True, attends=False),
    "sparse_attention": functools.partial(_attending, selects=False, attends=True),
    "attention": functools.partial(_attending, selects=True, attends=True),
    "projections": _projections,
    "feed_forward": _feed_forward,
    "unembedding": _unembedding,
}
