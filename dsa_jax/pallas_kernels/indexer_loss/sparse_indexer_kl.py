"""The indexer's loss over selections on Hopper, for the queries of a chunk: what it imitates, then KL and gradients.

Two steps, so that head sums can be added up across devices between them:

  head_sums                    probabilities of the attention summed over heads, by `attention_target`
  indexer_kl, indexer_gradients   the KL of their normalised sums, and its gradients, by `selection_kl`; what each
                               query adds to the gradients of its keys is summed key by key in the order of queries
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dsa_jax.pallas_kernels.indexer_loss import attention_target, selection_kl
from dsa_jax.pallas_kernels.sum_rows.sum_rows import sort_by_key, sum_rows

KEY_STEP = 128  # the kernels take selections in multiples of it
LEAST_HEADS = 64


def why_not_sums(q, kv, lse, indices) -> str | None:
    """Says in one sentence why `head_sums` cannot take these arguments, or None when it can."""
    if q.ndim != 4 or lse.ndim != 3 or indices.ndim != 3:
        return f"expected q [B, T, N, H], lse [B, T, N], indices [B, T, K], got {q.shape}, {lse.shape}, {indices.shape}"
    return attention_target.why_not(*_of_sums(q, kv, lse, indices))


def head_sums(q, kv, lse, indices, *, scale: float, interpret: bool = False):
    """Σ_n exp(scale · q[t,n] · kv[indices[t,k]] - lse[t,n]): [B, T, K] float32, 0 where there is no key.

    Args:
      q: [B, T, N, H] bfloat16.
      kv: [B, S, H] bfloat16.
      lse: [B, T, N] float32.
      indices: [B, T, K] int32.
      scale: of the logits.
      interpret: run in Pallas' interpreter, on a CPU.
    """
    few = max(0, LEAST_HEADS - q.shape[2])
    arrays = (x.reshape(-1, *x.shape[2:]) for x in (q, lse, indices))
    q, lse, flat_indices = arrays
    q = jnp.pad(q, ((0, 0), (0, few), (0, 0)))
    lse = jnp.pad(lse, ((0, 0), (0, few)), constant_values=-jnp.inf)
    sums = attention_target.attention_target(q, kv, lse, flat_indices, scale=scale, interpret=interpret)
    return sums.reshape(indices.shape)


def _of_sums(q, kv, lse, indices):
    """As shapes, what the kernel is given."""
    batch, length, heads, dim = q.shape
    heads = max(heads, LEAST_HEADS)
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
    return selection_kl.why_not(
        shape((queries, selected), sums.dtype),
        shape((queries, *q_index.shape[2:]), q_index.dtype),
        k_index,
        shape((queries, *weights.shape[2:]), weights.dtype),
        shape((queries, selected), indices.dtype),
        k_scale,
        shape((queries,), jnp.float32),
    )


def indexer_kl(sums, q_index, k_index, weights, indices, k_scale, *, interpret: bool = False):
    """KL(p ‖ softmax(I)) of each query over its selection, [B, T] float32; p is `sums` normalised.

    Args:
      sums: [B, T, K] float32, as `head_sums` returns them.
      q_index: [B, T, J, E] bfloat16.
      k_index: [B, S, E] bfloat16.
      weights: [B, T, J] float32.
      indices: [B, T, K] int32.
      k_scale: [B, S] float32.
      interpret: run in Pallas' interpreter, on a CPU.
    """
    queries = _flat(sums, q_index, weights, indices)
    sums, q, w, at = queries
    kl: Any = selection_kl.selection_kl(sums, q, k_index, w, at, k_scale, interpret=interpret)
    return kl.reshape(indices.shape[:2])


def indexer_gradients(
    sums, q_index, k_index, weights, indices, k_scale, d_kl, d_k_index, *, interpret: bool = False
):  # fmt: skip
    """The KL and its gradients for a cotangent `d_kl` [B, T].

    Returns:
      kl [B, T] float32, d_q_index [B, T, J, E] bfloat16, d_weights [B, T, J] float32, and `d_k_index` [B, S, E] float32
      with what these queries add to it.
    """
    batch, size = k_index.shape[:2]
    sums, q, w, at = _flat(sums, q_index, weights, indices)
    kl, d_q, d_w, rows = selection_kl.selection_kl(
        sums, q, k_index, w, at, k_scale, d_kl.reshape(-1), interpret=interpret
    )
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
    return math.ceil(selected / KEY_STEP) * KEY_STEP


def _flat(sums, q_index, weights, indices):
    """Queries of all batch rows in one line, selections padded to whole steps."""
    more = (0, _padded(indices.shape[2]) - indices.shape[2])
    sums = jnp.pad(sums, ((0, 0), (0, 0), more))
    indices = jnp.pad(indices, ((0, 0), (0, 0), more), constant_values=-1)
    return tuple(x.reshape(-1, *x.shape[2:]) for x in (sums, q_index, weights, indices))
