"""The indexer's losses (Eqs. 3 and 4): KL(p ‖ softmax(I)) a query, streamed over blocks of queries.

p is the attention's own distribution, summed over heads and L1-normalised, and a constant. The gradient of a query's KL
by its scores is softmax(I) - p exactly; it is written so, and the backward recomputes both for a block at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax import attention
from dsa_jax.attention import gather_rows, normalise_target, scatter_rows, sum_heads, zero_unreached
from dsa_jax.blocks import contract, map_queries, queries_per_block
from dsa_jax.indexer import check_index_inputs
from dsa_jax.key_range import KeyRange
from dsa_jax.pallas_kernels import choose_implementation


def sparse_indexer_kl(
    q_index: Float[Array, "B T J E"],
    k_index: Float[Array, "B S E"],
    weights: Float[Array, "B T J"],
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S H"],
    lse: Float[Array, "B T N"],
    indices: Int[Array, "B T K"],
    *,
    scale: float,
    k_scale: Float[Array, "B S"] | None = None,
    head_axis: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T"]:
    """Returns KL(p[t,S_t] ‖ softmax(I[t,S_t])) over each query's selection S_t  (Eq. 4); 0 where it is empty.

    Args:
      q_index, k_index, weights, k_scale: as in `index_scores`; the first three alone have gradients. For gradients
        through FP8 pass `straight_through_quantize` of queries and keys: an e4m3 array cannot hold its own.
      q, kv, lse, indices: as `sparse_attention` took and returned them; constants here.
      scale: the softmax scale of the attention.
      head_axis: mesh axis that shards the heads of `q`, over which p is summed before it is normalised.
    """
    q, kv, lse, indices = jnp.asarray(q), jnp.asarray(kv), jnp.asarray(lse), jnp.asarray(indices)
    attention.check_latents(q, kv, indices)
    attention.check_lse(lse, q)
    everywhere = KeyRange(jnp.zeros(q.shape[:2], jnp.int32), jnp.full(q.shape[:2], kv.shape[1], jnp.int32))
    q_index, k_index, weights, k_scale = check_index_inputs(q_index, k_index, weights, everywhere, k_scale)
    _check_same_keys(k_index, kv, "kv")
    choose_implementation("sparse_indexer_kl", implementation)

    def rows(queries, keys):
        (q, lse, indices), (k_scale, kv) = queries, keys
        selected, present = gather_rows(kv, indices)
        target = sum_heads(q, selected, lse, present, scale=scale, dims="tsh")
        return normalise_target(target, head_axis), present, gather_rows(k_scale, indices)[0]

    elements = indices.shape[2] * (2 * kv.shape[2] + 2 * q.shape[2] + k_index.shape[2] + 4 * q_index.shape[2])
    constants = jax.lax.stop_gradient(((q, lse, indices), (k_scale, kv)))
    return _kl(rows, lambda queries: queries[2], queries_per_block(elements), q_index, k_index, weights, constants)


def dense_indexer_kl(
    q_index: Float[Array, "B T J E"],
    k_index: Float[Array, "B S E"],
    weights: Float[Array, "B T J"],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    lse: Float[Array, "B T N"],
    keys: KeyRange,
    *,
    scale: float,
    k_scale: Float[Array, "B S"] | None = None,
    head_axis: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T"]:
    """Returns KL(p[t,:] ‖ softmax(I[t,:])) over every key a query reaches  (Eq. 3); 0 where there is none.

    `q`, `k` and `lse` as `multihead_attention` took and returned them without a selection; the rest as in
    `sparse_indexer_kl`. Keys that no query of their row reaches may be NaN.
    """
    q, k, lse = jnp.asarray(q), jnp.asarray(k), jnp.asarray(lse)
    attention.check_heads(q, k)
    attention.check_lse(lse, q)
    q_index, k_index, weights, k_scale = check_index_inputs(q_index, k_index, weights, keys, k_scale)
    _check_same_keys(k_index, k, "k")
    choose_implementation("dense_indexer_kl", implementation)
    size = k.shape[1]

    def rows(queries, keys):
        (q, lse, start, stop), (k_scale, k) = queries, keys
        reach = KeyRange(start, stop).contains(jnp.arange(size))
        target = sum_heads(q, k, lse, reach, scale=scale, dims="snh")
        return normalise_target(target, head_axis), reach, k_scale

    elements = size * (2 * q.shape[2] + 3 * q_index.shape[2])
    k_index, k_scale, k = (zero_unreached(x, keys) for x in (k_index, k_scale, k))
    constants = jax.lax.stop_gradient(((q, lse, keys.start, keys.stop), (k_scale, k)))
    return _kl(rows, lambda queries: None, queries_per_block(elements), q_index, k_index, weights, constants)


def _check_same_keys(k_index, k, name):
    if k_index.shape[:2] != k.shape[:2]:
        raise ValueError(f"k_index and {name} must hold the same keys, got {k_index.shape} and {k.shape}")


def _scores(q_index, k_index, weights):
    """I without the key scale, with what its gradient needs: relu(q · k) [t, j, s]."""
    dims = "tje,se->tjs" if k_index.ndim == 2 else "tje,tse->tjs"
    active = jax.nn.relu(contract(dims, q_index, k_index))
    return jnp.sum(active * weights[..., None], axis=1), active


def _log_softmax(scores, mask):
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    total = jnp.sum(jnp.exp(scores - peak), axis=-1, keepdims=True)
    return jnp.where(mask, scores - peak - jnp.log(jnp.where(total == 0, 1.0, total)), -jnp.inf)


def _widen(x):
    return x.astype(jnp.float32) if x.dtype.itemsize == 1 else x


def _pick(k_index, indices):
    """The index keys of a block: all of them, or each query's own when there is a selection."""
    return k_index if indices is None else gather_rows(k_index, indices)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kl(rows, selection, block_size, q_index, k_index, weights, constants):
    """KL a query. `rows` gives target, mask and key scale of a block, `selection` its indices or None."""

    def block(queries, keys, sums):
        (q_index, weights, queries), (k_index, keys) = queries, keys
        target, mask, k_scale = rows(queries, keys)
        scores, _ = _scores(_widen(q_index), _widen(_pick(k_index, selection(queries))), weights)
        log_q = _log_softmax(scores * k_scale, mask)
        terms = target * (jnp.log(jnp.where(target > 0, target, 1.0)) - log_q)
        return jnp.sum(jnp.where(target > 0, terms, 0.0), axis=-1), sums

    queries, keys = constants
    return map_queries(block, (q_index, weights, queries), (k_index, keys), block=block_size)[0]


def _kl_forward(rows, selection, block_size, q_index, k_index, weights, constants):
    kl = _kl(rows, selection, block_size, q_index, k_index, weights, constants)
    return kl, (q_index, k_index, weights, constants)


def _kl_backward(rows, selection, block_size, residuals, d_kl):
    q_index, k_index, weights, constants = residuals

    def block(queries, keys, d_k):
        (q_index, weights, d_kl, queries), (k_index, keys) = queries, keys
        target, mask, k_scale = rows(queries, keys)
        indices = selection(queries)
        q_index, k_index = _widen(q_index), _widen(_pick(k_index, indices))
        scores, active = _scores(q_index, k_index, weights)
        softmax = jnp.exp(_log_softmax(scores * k_scale, mask))
        d_scores = jnp.where(mask, (softmax - target) * d_kl[:, None], 0.0) * k_scale
        d_weights = jnp.sum(active * d_scores[:, None], axis=-1)
        d_logits = jnp.where(active > 0, d_scores[:, None] * weights[..., None], 0.0).astype(q_index.dtype)
        if indices is None:
            d_q, d_rows = contract("tjs,se->tje", d_logits, k_index), contract("tjs,tje->se", d_logits, q_index)
            return (d_q, d_weights), d_k + d_rows
        d_q, d_rows = contract("tjs,tse->tje", d_logits, k_index), contract("tjs,tje->tse", d_logits, q_index)
        return (d_q, d_weights), scatter_rows(d_k, indices, d_rows)

    queries, keys = constants
    d_k = jnp.zeros(k_index.shape, jnp.float32)
    (d_q, d_weights), d_k = map_queries(
        block, (q_index, weights, d_kl, queries), (k_index, keys), d_k, block=block_size
    )
    return d_q.astype(q_index.dtype), d_k.astype(k_index.dtype), d_weights, jax.tree.map(_zero, constants)


def _zero(x):
    return attention._no_gradient(x) if jnp.issubdtype(x.dtype, jnp.integer) else jnp.zeros_like(x)


_kl.defvjp(_kl_forward, _kl_backward)
