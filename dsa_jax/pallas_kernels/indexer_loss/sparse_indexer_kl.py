"""Computes the indexer's loss over selections on Hopper, for the queries of a chunk: its target, KL and gradients.

Two steps, so that head sums can be added up across devices between them:

  head_sums                    probabilities of the attention summed over heads, by `attention_target`
  indexer_kl, indexer_gradients   the KL of their normalised sums, and its gradients, by `selection_kl`; what each
                               query adds to the gradients of its keys is summed key by key in the order of queries
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dsa_jax.pallas_kernels.hopper.constants import BLOCK_HEADS, PAIR_KEYS
from dsa_jax.pallas_kernels.indexer_loss.attention_target import attention_target
from dsa_jax.pallas_kernels.indexer_loss.attention_target import why_not as why_not_target
from dsa_jax.pallas_kernels.indexer_loss.selection_kl import selection_kl
from dsa_jax.pallas_kernels.indexer_loss.selection_kl import why_not as why_not_selection
from dsa_jax.pallas_kernels.sum_rows import sort_by_key, sum_rows


def why_not_sums(q, kv, lse, indices) -> str | None:
    """Says in one sentence why `head_sums` cannot take these arguments, or None when it can."""
    if q.ndim != 4 or lse.ndim != 3 or indices.ndim != 3:
        return f"expected q [B, T, N, H], lse [B, T, N], indices [B, T, K], got {q.shape}, {lse.shape}, {indices.shape}"
    return why_not_target(*_of_sums(q, kv, lse, indices))


def head_sums(q, kv, lse, indices, *, scale: float, interpret: bool = False):
    """Sums probabilities over heads: Σ_n exp(scale · q[t,n] · kv[indices[t,k]] - lse[t,n]).

    Args:
      q: [B, T, N, H] bfloat16.
      kv: [B, S, H] bfloat16.
      lse: [B, T, N] float32.
      indices: [B, T, K] int32.
      scale: of the logits.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      [B, T, K] float32, 0 where there is no key.
    """
    missing_heads = max(0, BLOCK_HEADS - q.shape[2])
    arrays = (x.reshape(-1, *x.shape[2:]) for x in (q, lse, indices))
    q, lse, flat_indices = arrays
    q = jnp.pad(q, ((0, 0), (0, missing_heads), (0, 0)))
    # A head with an lse of -inf contributes nothing.
    lse = jnp.pad(lse, ((0, 0), (0, missing_heads)), constant_values=-jnp.inf)
    sums = attention_target(q, kv, lse, flat_indices, scale=scale, interpret=interpret)
    return sums.reshape(indices.shape)


def _of_sums(q, kv, lse, indices):
    """Gives the shapes of the arrays that `head_sums` hands to the kernel."""
    batch, length, heads, dim = q.shape
    heads = max(heads, BLOCK_HEADS)
    shape = jax.ShapeDtypeStruct
    return (
        shape((batch * length, heads, dim), q.dtype),
        kv,
        shape((batch * length, heads), lse.dtype),
        shape((batch * length, indices.shape[2]), indices.dtype),
    )


def why_not(sums, q_index, k_index, weights, indices, k_scale) -> str | None:
    """Says in one sentence why `indexer_kl` and `indexer_gradients` cannot take these arguments, or None."""
    if q_index.ndim != 4 or indices.ndim != 3:
        return f"expected q_index [B, T, J, E] and indices [B, T, K], got {q_index.shape} and {indices.shape}"
    queries, selected = indices.shape[0] * indices.shape[1], _padded(indices.shape[2])
    shape = jax.ShapeDtypeStruct
    return why_not_selection(
        shape((queries, selected), sums.dtype),
        shape((queries, *q_index.shape[2:]), q_index.dtype),
        k_index,
        shape((queries, *weights.shape[2:]), weights.dtype),
        shape((queries, selected), indices.dtype),
        k_scale,
        shape((queries,), jnp.float32),
    )


def indexer_kl(sums, q_index, k_index, weights, indices, k_scale, *, interpret: bool = False):
    """Computes KL(p ‖ softmax(I)) of each query over its selection; p is `sums` normalised (Eq. 4).

    Args:
      sums: [B, T, K] float32, as `head_sums` returns them.
      q_index: [B, T, J, E] bfloat16.
      k_index: [B, S, E] bfloat16.
      weights: [B, T, J] float32.
      indices: [B, T, K] int32.
      k_scale: [B, S] float32.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      [B, T] float32.
    """
    queries = _flat(sums, q_index, weights, indices)
    sums, q, w, at = queries
    kl: Any = selection_kl(sums, q, k_index, w, at, k_scale, interpret=interpret)
    return kl.reshape(indices.shape[:2])


def indexer_gradients(
    sums, q_index, k_index, weights, indices, k_scale, d_kl, d_k_index, *, interpret: bool = False
):  # fmt: skip
    """Computes the KL and its gradients for a cotangent `d_kl` [B, T]; the other arguments are those of `indexer_kl`.

    Returns:
      kl [B, T] float32, d_q_index [B, T, J, E] bfloat16, d_weights [B, T, J] float32, and `d_k_index` [B, S, E] float32
      with what these queries add to it.
    """
    batch, size = k_index.shape[:2]
    sums, q, w, at = _flat(sums, q_index, weights, indices)
    kl, d_q, d_w, rows = selection_kl(sums, q, k_index, w, at, k_scale, d_kl.reshape(-1), interpret=interpret)
    # Absent keys sort behind all others, and nothing is added for them.
    # Keys of all batch rows in one line, so that one sort serves.
    at = at.reshape(batch, -1)
    present = (at >= 0) & (at < size)
    at = jnp.where(present, at + size * jnp.arange(batch, dtype=at.dtype)[:, None], -1)
    total = d_k_index.reshape(batch * size, -1)
    total = sum_rows(rows, *sort_by_key(at, batch * size, interpret=interpret), total, interpret=interpret)
    return (
        kl.reshape(indices.shape[:2]),
        d_q.reshape(q_index.shape),
        d_w.reshape(weights.shape),
        total.reshape(d_k_index.shape),
    )


def _padded(selected):
    """Rounds K up to whole pairs of key blocks."""
    return math.ceil(selected / PAIR_KEYS) * PAIR_KEYS


def _flat(sums, q_index, weights, indices):
    """Puts the queries of all batch rows in one line, and pads their selections to whole pairs of key blocks."""
    # A padded place has index -1, no key, so its p counts for nothing.
    more = (0, _padded(indices.shape[2]) - indices.shape[2])
    sums = jnp.pad(sums, ((0, 0), (0, 0), more))
    indices = jnp.pad(indices, ((0, 0), (0, 0), more), constant_values=-1)
    return tuple(x.reshape(-1, *x.shape[2:]) for x in (sums, q_index, weights, indices))
