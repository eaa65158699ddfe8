"""Computes sparse MLA attention backward on Hopper: gradients by queries and latents, a chunk of queries at a time.

The steps of a chunk, each a kernel that the next one waits for:

  sparse_backward_weights   P and dS of every query, head and selected key, recomputed from `lse`
  sparse_backward_queries   d_q = dS · K
  sparse_backward_keys      what each query adds to each of its keys, summed over all heads: dSᵀ · Q, and Pᵀ · dO
  sum_rows                  adds these up key by key, in the order of queries: the same bits every time

P and dS go through memory, 4 bytes a (query, head, key), because no multiprocessor can hold what all products of a
query need: Q, dO and the accumulators of d_q alone are 600 KB for 128 heads. What a query adds goes there in bfloat16
and is summed in float32. Adding it up with float32 atomics instead was measured at twice the time of the last two.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from dsa_jax.pallas_kernels.hopper.constants import BLOCK_HEADS, PAIR_KEYS
from dsa_jax.pallas_kernels.sparse_attention.backward_keys import sparse_backward_keys
from dsa_jax.pallas_kernels.sparse_attention.backward_queries import sparse_backward_queries
from dsa_jax.pallas_kernels.sparse_attention.backward_weights import sparse_backward_weights
from dsa_jax.pallas_kernels.sparse_attention.forward import why_not as why_not_forward
from dsa_jax.pallas_kernels.sum_rows import sort_by_key, sum_rows

HEADS = (16, 32, 64, 128)  # N that the kernels take; fewer than 64 are filled up with heads that count for nothing
CHUNK_BYTES = 26 << 26  # 1.63 GiB of arrays that live for a chunk; the sums in float32 add 0.28 GiB for 128K keys


def why_not(q, kv, indices, value_dim: int) -> str | None:
    """Says in one sentence why the kernels cannot take these arguments, or None when they can."""
    reason = why_not_forward(q, kv, indices, value_dim)
    if reason is None and q.shape[2] not in HEADS:
        reason = f"heads must be one of {HEADS}, got {q.shape[2]}"
    return reason


def queries_in_chunk(length: int, heads: int, dim: int, selected: int) -> int:
    """Counts the queries of a chunk: as few chunks as `CHUNK_BYTES` allows, of one size."""
    heads, selected = max(BLOCK_HEADS, heads), math.ceil(selected / PAIR_KEYS) * PAIR_KEYS
    # Bytes of a query: P and dS, contributions to its keys, q, d_out and d_q with their padding, the sort's arrays.
    each = 4 * heads * selected + 2 * selected * dim + 8 * heads * dim + 24 * selected
    chunks = math.ceil(length * each / CHUNK_BYTES)
    return math.ceil(length / chunks)


def sum_in_order(x):
    """Sums [..., C] over C by elementwise additions: XLA orders a reduction anew in every process that compiles it."""
    while (width := x.shape[-1]) > 1:
        parts = math.gcd(8, width)  # halves, quarters or eighths at a time; an odd width in one go
        x = functools.reduce(jnp.add, jnp.split(x, parts if parts > 1 else width, axis=-1))
        if x.shape[-1] > 8:
            x = lax.optimization_barrier(x)  # fused with the next sum, a thread would read whole rows
    return x[..., 0]


def sparse_attention_backward(
    q,
    kv,
    indices,
    out,
    lse,
    d_out,
    d_lse,
    *,
    value_dim: int,
    scale: float,
    interpret: bool = False,
):
    """Computes the gradients of `sparse_attention` by q and kv, with the same bits every time.

    Args:
      q: [B, T, N, H] bfloat16; N is 16, 32, 64 or 128.
      kv: [B, S, H] bfloat16.
      indices: [B, T, K] int32.
      out: [B, T, N, C] bfloat16, as the forward pass returned it.
      lse: [B, T, N] float32, as the forward pass returned it.
      d_out: [B, T, N, C] bfloat16.
      d_lse: [B, T, N] float32.
      value_dim: C.
      scale: of the logits.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      d_q [B, T, N, H] and d_kv [B, S, H], bfloat16.

    Raises:
      ValueError: if `why_not` has a reason.
    """
    reason = why_not(q, kv, indices, value_dim)
    if reason is not None:
        raise ValueError(f"sparse_attention has no backward kernels for this: {reason}")
    length, heads, dim = q.shape[1:]
    size, selected = kv.shape[1], indices.shape[2]
    chunk = queries_in_chunk(length, heads, dim, selected)

    def gradients(queries, kv, total, fresh):
        """Computes d_q of a chunk of one batch row, and adds to `total` [S, H] what the queries marked `fresh` give."""
        q, indices, out, lse, d_out, d_lse = queries
        # dS = P · (dP - delta): the softmax's own gradient, out · d_out, less what `lse` is asked for.
        delta = sum_in_order(out.astype(jnp.float32) * d_out.astype(jnp.float32)) - d_lse
        delta = jnp.where(lse == -jnp.inf, 0.0, delta)  # of a row without keys, whatever its cotangents hold
        indices = jnp.pad(indices, ((0, 0), (0, -selected % PAIR_KEYS)), constant_values=-1)
        spare = ((0, 0), (0, max(0, BLOCK_HEADS - heads)))
        q, d_out = (jnp.pad(x, (*spare, (0, 0))) for x in (q, d_out))
        # A head whose lse is -inf has P and dS of 0.
        lse, delta = jnp.pad(lse, spare, constant_values=-jnp.inf), jnp.pad(delta, spare)
        p, ds = sparse_backward_weights(q, d_out, kv[None], indices, lse, delta, scale=scale, interpret=interpret)
        d_q = sparse_backward_queries(ds, kv[None], indices, interpret=interpret)[:, :heads]
        rows = sparse_backward_keys(p, ds, q, d_out, interpret=interpret)
        order, offsets = sort_by_key(jnp.where(fresh[:, None], indices, -1), size, interpret=interpret)
        return d_q, sum_rows(rows, order, offsets, total, interpret=interpret)

    def row(arrays):
        """Computes the gradients of one batch row."""
        *queries, kv = arrays

        def step(i, carry):
            d_q, total = carry
            # The last chunk reaches back to have the size of the others; what it meets again it does not add again.
            first = jnp.minimum(i * chunk, length - chunk)
            queries_of_chunk = [lax.dynamic_slice_in_dim(x, first, chunk) for x in queries]
            chunk_d_q, total = gradients(queries_of_chunk, kv, total, first + jnp.arange(chunk) >= i * chunk)
            return lax.dynamic_update_slice_in_dim(d_q, chunk_d_q, first, 0), total

        total = jnp.zeros((size, dim), jnp.float32)
        if chunk == length:
            d_q, total = gradients(queries, kv, total, jnp.full(length, True))
        else:
            d_q, total = lax.fori_loop(0, math.ceil(length / chunk), step, (jnp.zeros_like(queries[0]), total))
        return d_q, total.astype(kv.dtype)

    arrays = q, indices, out, lse, d_out, d_lse, kv
    if q.shape[0] == 1:  # without a loop around a loop
        return jax.tree.map(lambda x: x[None], row(jax.tree.map(lambda x: x[0], arrays)))
    return lax.map(row, arrays)
