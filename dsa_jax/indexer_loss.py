"""The indexer's losses (Eqs. 3 and 4): KL(p ‖ softmax(I)) a query, streamed over blocks of queries.

p is the attention's own distribution, summed over heads and L1-normalised, and a constant. The gradient of a query's KL
by its scores is softmax(I) - p exactly; it is written so, and the backward recomputes both for a block at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax import attention
from dsa_jax.attention import gather_rows, no_gradient, normalise_target, scatter_rows, sum_heads, zero_unreached
from dsa_jax.blocks import contract, join_queries, map_queries, queries_per_block, split_queries
from dsa_jax.indexer import check_index_inputs, head_sum, relu, widen
from dsa_jax.key_range import KeyRange
from dsa_jax.pallas_kernels import check_implementation

KEY_TILE = 2048  # keys at a time where all are scored


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
    check_implementation("sparse_indexer_kl", implementation)

    elements = indices.shape[2] * (2 * kv.shape[2] + 2 * q.shape[2] + k_index.shape[2] + 4 * q_index.shape[2])
    static = scale, head_axis, queries_per_block(elements)
    constants = jax.lax.stop_gradient((q, kv, lse, indices, k_scale))
    return _sparse_kl(static, q_index, k_index, weights, constants)


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
    check_implementation("dense_indexer_kl", implementation)

    elements = 6 * k.shape[1] + min(KEY_TILE, k.shape[1]) * (2 * q.shape[2] + 4 * q_index.shape[2])
    static = scale, head_axis, queries_per_block(elements)
    k_index, k_scale, k = (zero_unreached(x, keys) for x in (k_index, k_scale, k))
    constants = jax.lax.stop_gradient((q, k, lse, keys, k_scale))
    return _dense_kl(static, q_index, k_index, weights, constants)


def _check_same_keys(k_index, k, name):
    if k_index.shape[:2] != k.shape[:2]:
        raise ValueError(f"k_index and {name} must hold the same keys, got {k_index.shape} and {k.shape}")


# One block. Below, `target`, `scores` and `mask` are [t, s] over the same keys: a selection, or all.


def _kl_terms(target, scores, mask):
    terms = target * (jnp.log(jnp.where(target > 0, target, 1.0)) - _log_softmax(scores, mask))
    return jnp.sum(jnp.where(target > 0, terms, 0.0), axis=-1)


def _score_gradient(target, scores, mask, d_kl):
    return jnp.where(mask, jnp.exp(_log_softmax(scores, mask)) - target, 0.0) * d_kl[:, None]


def _log_softmax(scores, mask):
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    total = jnp.sum(jnp.exp(scores - peak), axis=-1, keepdims=True)
    return jnp.where(mask, scores - peak - jnp.log(jnp.where(total == 0, 1.0, total)), -jnp.inf)


def _head_sum_gradient(q_index, k_index, weights, d_scores):
    """Gradients of `head_sum` by q_index, k_index and weights; by logits it is dI · w where relu passes."""
    q_index, k_index = widen(q_index), widen(k_index)
    keys = "se" if k_index.ndim == 2 else "tse"
    active = relu(contract(f"tje,{keys}->tjs", q_index, k_index))
    d_weights = jnp.sum(active * d_scores[:, None], axis=-1)
    d_logits = jnp.where(active > 0, d_scores[:, None] * weights[..., None], 0.0).astype(q_index.dtype)
    return contract(f"tjs,{keys}->tje", d_logits, k_index), contract(f"tjs,tje->{keys}", d_logits, q_index), d_weights


def _sparse_rows(static, queries, keys):
    """Target, scores and mask of a block over its selection, with the gathered index keys and their scale."""
    scale, head_axis, _ = static
    (q_index, weights, q, lse, indices), (k_index, kv, k_scale) = queries, keys
    rows, present = gather_rows(kv, indices)
    target = normalise_target(sum_heads(q, rows, lse, present, scale=scale, dims="tsh"), head_axis)
    k_index, k_scale = gather_rows(k_index, indices)[0], gather_rows(k_scale, indices)[0]
    return target, head_sum(q_index, k_index, weights) * k_scale, present, k_index, k_scale


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sparse_kl(static, q_index, k_index, weights, constants):
    q, kv, lse, indices, k_scale = constants

    def block(queries, keys, sums):
        return _kl_terms(*_sparse_rows(static, queries, keys)[:3]), sums

    return map_queries(block, (q_index, weights, q, lse, indices), (k_index, kv, k_scale), block=static[2])[0]


def _sparse_kl_forward(static, *arguments):
    return _sparse_kl(static, *arguments), arguments


def _sparse_kl_backward(static, arguments, d_kl):
    q_index, k_index, weights, constants = arguments
    q, kv, lse, indices, k_scale = constants

    def block(queries, keys, d_k):
        d_kl, *queries = queries
        target, scores, mask, rows, row_scale = _sparse_rows(static, queries, keys)
        d_scores = _score_gradient(target, scores, mask, d_kl) * row_scale
        q_index, weights, *_, indices = queries
        d_q, d_rows, d_weights = _head_sum_gradient(q_index, rows, weights, d_scores)
        return (d_q.astype(q_index.dtype), d_weights), scatter_rows(d_k, indices, d_rows)

    queries, keys = (d_kl, q_index, weights, q, lse, indices), (k_index, kv, k_scale)
    (d_q, d_weights), d_k = map_queries(block, queries, keys, jnp.zeros(k_index.shape, jnp.float32), block=static[2])
    return d_q, d_k.astype(k_index.dtype), d_weights, jax.tree.map(no_gradient, constants)


_sparse_kl.defvjp(_sparse_kl_forward, _sparse_kl_backward)


def _dense_rows(static, queries, keys):
    """Target, scores and mask of a block over all keys, a tile of keys at a time."""
    scale, head_axis, _ = static
    (q_index, weights, q, lse, start, stop), (k_index, k, k_scale) = queries, keys
    size = k.shape[0]

    def tile(keys):
        k_index, k, k_scale, position = keys
        heads = sum_heads(q, k, lse, KeyRange(start, stop).contains(position), scale=scale, dims="snh")
        return heads, head_sum(q_index, k_index, weights) * k_scale

    tiles = jax.lax.map(tile, split_queries((k_index, k, k_scale, jnp.arange(size)), min(KEY_TILE, size)))
    heads, scores = (jnp.moveaxis(x, 0, 1).reshape(q.shape[0], -1)[:, :size] for x in tiles)
    return normalise_target(heads, head_axis), scores, KeyRange(start, stop).contains(jnp.arange(size))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense_kl(static, q_index, k_index, weights, constants):
    q, k, lse, keys, k_scale = constants

    def block(queries, keys, sums):
        return _kl_terms(*_dense_rows(static, queries, keys)), sums

    queries = (q_index, weights, q, lse, keys.start, keys.stop)
    return map_queries(block, queries, (k_index, k, k_scale), block=static[2])[0]


def _dense_kl_forward(static, *arguments):
    return _dense_kl(static, *arguments), arguments


def _dense_kl_backward(static, arguments, d_kl):
    q_index, k_index, weights, constants = arguments
    q, k, lse, keys, k_scale = constants

    def block(queries, keys, d_k):
        (d_kl, *queries), (k_index, _, k_scale) = queries, keys
        q_index, weights = queries[:2]
        d_scores = _score_gradient(*_dense_rows(static, queries, keys), d_kl) * k_scale

        def tile(total, keys):
            k_index, d_scores = keys
            d_q, d_rows, d_weights = _head_sum_gradient(q_index, k_index, weights, d_scores.T)
            return (total[0] + d_q, total[1] + d_weights), d_rows

        zero = jnp.zeros(q_index.shape, jnp.float32), jnp.zeros(weights.shape, jnp.float32)
        tiles = split_queries((k_index, d_scores.T), min(KEY_TILE, k_index.shape[0]))
        (d_q, d_weights), d_rows = jax.lax.scan(tile, zero, tiles)
        return (d_q.astype(q_index.dtype), d_weights), d_k + join_queries(d_rows, k_index.shape[0])

    queries = (d_kl, q_index, weights, q, lse, keys.start, keys.stop)
    d_k = jnp.zeros(k_index.shape, jnp.float32)
    (d_q, d_weights), d_k = map_queries(block, queries, (k_index, k, k_scale), d_k, block=static[2])
    return d_q, d_k.astype(k_index.dtype), d_weights, jax.tree.map(no_gradient, constants)


_dense_kl.defvjp(_dense_kl_forward, _dense_kl_backward)
