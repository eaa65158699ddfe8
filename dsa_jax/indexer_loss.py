"""The indexer's losses (Eqs. 3 and 4): KL(p ‖ softmax(I)) a query, for a chunk of queries at a time.

p is the attention's own distribution, summed over heads (or their maximum) and L1-normalised, and a constant. The
gradient of a query's KL by its scores is softmax(I) - p exactly, and is written so.

Value and gradients come in one pass, since p costs far more than all the rest: the forward keeps the gradients for a
cotangent of one, and the backward multiplies them by the cotangent that all queries share, as they do when the loss is
a mean over queries. Cotangents that differ are right too, and take a second pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsa_jax import attention
from dsa_jax.attention import (
    NO_MAX_KERNEL,
    Target,
    attention_mass,
    gather_rows,
    join_heads,
    no_gradient,
    normalise_target,
    scatter_rows,
    zero_unreached,
)
from dsa_jax.blockwise import accumulator, contract, join_queries, map_queries, queries_per_block, split_queries
from dsa_jax.dense_attention import check_heads
from dsa_jax.indexer import check_index_inputs, head_sum, relu, widen
from dsa_jax.key_range import KeyRange, check_keys
from dsa_jax.pallas_kernels import Implementation, choose_implementation
from dsa_jax.pallas_kernels import index_scores as scores_kernels
from dsa_jax.pallas_kernels import indexer_loss as loss_kernels

KEY_TILE = 2048  # keys at a time where all are scored
SELECTED_CHUNK = 2048  # queries at a time over their selections
REACHED_CHUNK = 1 << 26  # queries × keys at a time where all keys are reached: 256 MiB for each of the arrays


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
    target: Target = "sum",
    implementation: Implementation | None = None,
) -> Float[Array, "B T"]:
    """Computes KL(p[t,S_t] ‖ softmax(I[t,S_t])) over each query's selection S_t  (Eq. 4); 0 where it is empty.

    Args:
      q_index, k_index, weights, k_scale: as in `index_scores`; the first three alone have gradients, which flow on into
        what they were made from, so detach what the indexer reads of the model. For gradients through FP8 pass
        `straight_through_quantize` of queries and keys: an e4m3 array cannot hold its own.
      q, kv, indices: as `sparse_attention` took them, with all heads of the layer; constants here.
      lse: as it returned them for these very arguments; a constant here.
      scale: the softmax scale of the attention.
      target: "sum" over heads or, which is not the paper's, their "max", as in `attention_target`.
      implementation: None, "xla" or "pallas"; "max" has no kernel.

    Returns:
      float32 divergences, float64 for float64 index queries, for the caller to average over valid queries and to sum
      over layers.

    Raises:
      ValueError: if shapes or dtypes do not fit together, for another target, or "pallas" has no kernel for them.

    References:
      DeepSeek-V3.2-Exp, section 2.1, Eq. 4.
    """
    q, kv, lse, indices = jnp.asarray(q), jnp.asarray(kv), jnp.asarray(lse), jnp.asarray(indices)
    attention.check_latents(q, kv, indices)
    attention.check_lse(lse, q)
    attention.check_target(target)
    everywhere = KeyRange(jnp.zeros(q.shape[:2], jnp.int32), jnp.full(q.shape[:2], kv.shape[1], jnp.int32))
    q_index, k_index, weights, k_scale = check_index_inputs(q_index, k_index, weights, everywhere, k_scale)
    _check_same_keys(k_index, kv, "kv")
    constants = jax.lax.stop_gradient((q, kv, lse, indices, k_scale))
    static = attention.static_scale(scale), target, implementation
    return _kl(_sparse_kl, static, (q_index, k_index, weights), constants)


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
    target: Target = "sum",
    implementation: Implementation | None = None,
) -> Float[Array, "B T"]:
    """Computes KL(p[t,:] ‖ softmax(I[t,:])) over every key that a query reaches  (Eq. 3); 0 where there is none.

    Args:
      q_index, k_index, weights, k_scale: as in `sparse_indexer_kl`.
      q, k: as `multihead_attention` took them without a selection, with all heads of the layer; constants here. Keys
        that no query of their row reaches may be NaN.
      lse: as it returned them for these very arguments; a constant here.
      keys: the keys that each query may reach.
      scale: the softmax scale of the attention.
      target: "sum" over heads or, which is not the paper's, their "max", as in `attention_target`.
      implementation: None, "xla" or "pallas"; "max" has no kernel.

    Returns:
      float32 divergences, as `sparse_indexer_kl`.

    Raises:
      ValueError: if shapes or dtypes do not fit together, for another target, or "pallas" has no kernel for them.

    References:
      DeepSeek-V3.2-Exp, section 2.1, Eq. 3.
    """
    q, k, lse = jnp.asarray(q), jnp.asarray(k), jnp.asarray(lse)
    check_heads(q, k)
    attention.check_lse(lse, q)
    attention.check_target(target)
    q_index, k_index, weights, k_scale = check_index_inputs(q_index, k_index, weights, keys, k_scale)
    _check_same_keys(k_index, k, "k")
    k_index, k_scale, k = (zero_unreached(x, keys) for x in (k_index, k_scale, k))
    constants = jax.lax.stop_gradient((q, k, lse, keys, k_scale))
    static = attention.static_scale(scale), target, implementation
    return _kl(_dense_kl, static, (q_index, k_index, weights), constants)


def dense_attention_target(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    lse: Float[Array, "B T N"],
    keys: KeyRange,
    *,
    scale: float,
    target: Target = "sum",
    implementation: Implementation | None = None,
) -> Float[Array, "B T S"]:
    """Computes the indexer's target over all keys: attention probabilities summed over heads, L1-normalised.

    p[t,s] = Σ_n exp(scale · q[t,n] · k[s,n] - lse[t,n]) / Σ_s (the same);  0 where a key is not reached.

    The result is T × S: of long rows give a part of the queries at a time. `dense_indexer_kl` keeps no more of it.

    Args:
      q, k, keys, scale: as `multihead_attention` took them without a selection, with all heads of the layer.
      lse: as it returned them for these very arguments.
      target: "sum" or "max", over heads, as in `attention_target`.
      implementation: None, "xla" or "pallas"; "max" has no kernel.

    Returns:
      float32 probabilities, a constant: no gradient flows through them.

    Raises:
      ValueError: if shapes or dtypes do not fit together, for another target, or "pallas" has no kernel for them.

    References:
      DeepSeek-V3.2-Exp, section 2.1, the target of Eq. 3.
    """
    q, k, lse = jnp.asarray(q), jnp.asarray(k), jnp.asarray(lse)
    check_heads(q, k)
    attention.check_lse(lse, q)
    attention.check_target(target)
    check_keys(keys, *q.shape[:2])
    arrays = jax.lax.stop_gradient((q, zero_unreached(k, keys), lse, keys.start, keys.stop))
    static = attention.static_scale(scale), target, implementation
    return normalise_target(_reached_probabilities("dense_attention_target", static, *arrays))


def _reached_probabilities(operation, static, q, k, lse, start, stop):
    """Joins the attention probabilities [B, T, S] of reached keys over heads; arguments are not checked."""
    scale, target, implementation = static
    join = choose_implementation(
        operation,
        implementation,
        loss_kernels.why_not_dense_target(q, k, lse, start, stop) if target == "sum" else NO_MAX_KERNEL,
        xla=partial(_reached_mass, scale=scale, target=target),
        pallas=partial(loss_kernels.dense_target, scale=scale),
    )
    return join(q, k, lse, start, stop)


def _check_same_keys(k_index, k, name):
    if k_index.shape[:2] != k.shape[:2]:
        raise ValueError(f"k_index and {name} must hold the same keys, got {k_index.shape} and {k.shape}")


# The loss with its gradients. `evaluate(static, index, constants, d_kl)` gives the KL [B, T] and, for a cotangent d_kl,
# gradients by index = (q_index, k_index, weights); for None neither computes nor gives any.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kl(evaluate, static, index, constants):
    return evaluate(static, index, constants, None)[0]


def _kl_forward(evaluate, static, index, constants):
    q_index = index[0]
    kl, gradients = evaluate(static, index, constants, jnp.ones(q_index.shape[:2], accumulator(q_index)))
    return kl, (index, constants, checkpoint_name(gradients, "indexer_kl"))


def _kl_backward(evaluate, static, residuals, d_kl):
    index, constants, gradients = residuals
    *_, keys_or_indices, k_scale = constants
    has_keys = _has_keys(keys_or_indices, k_scale.shape[1])
    shared = d_kl.ravel()[jnp.argmax(has_keys)]  # the cotangent of the first query that has keys
    gradients = jax.lax.cond(
        jnp.all((d_kl == shared) | ~has_keys),
        lambda: jax.tree.map(lambda x: (x * shared).astype(x.dtype), gradients),
        lambda: evaluate(static, index, constants, d_kl)[1],
    )
    gradients = tuple(gradient.astype(x.dtype) for gradient, x in zip(gradients, index, strict=True))
    return gradients, jax.tree.map(no_gradient, constants)


_kl.defvjp(_kl_forward, _kl_backward)


def _has_keys(keys_or_indices, size):
    """Tells which queries [B, T] have a key at all: the others have no gradient, whatever their cotangent."""
    if isinstance(keys_or_indices, KeyRange):
        return jnp.maximum(keys_or_indices.start, 0) < jnp.minimum(keys_or_indices.stop, size)
    return jnp.any((keys_or_indices >= 0) & (keys_or_indices < size), axis=-1)


def _sparse_kl(static, index, constants, d_kl):
    scale, target, implementation = static
    (q_index, k_index, weights), (q, kv, lse, indices, k_scale) = index, constants

    def chunk(queries, keys, d_k):
        q_index, weights, q, lse, indices, d_kl = jax.tree.map(lambda x: x[None], queries)
        k_index, kv, k_scale = jax.tree.map(lambda x: x[None], keys)
        mass = attention_mass(q, kv, lse, indices, scale=scale, target=target, implementation=implementation)
        mass = mass.astype(accumulator(q_index))
        arrays = mass, q_index, k_index, weights, indices, k_scale
        choose = partial(choose_implementation, "sparse_indexer_kl", implementation, loss_kernels.why_not_kl(*arrays))
        if d_kl is None:
            return choose(xla=_selected_kl, pallas=loss_kernels.indexer_kl)(*arrays)[0], d_k
        evaluate = choose(xla=_selected_gradients, pallas=loss_kernels.indexer_gradients)
        kl, d_q, d_weights, d_k = evaluate(*arrays, d_kl, d_k[None])
        return (kl[0], d_q[0], d_weights[0]), d_k[0]

    queries, keys = (q_index, weights, q, lse, indices, d_kl), (k_index, kv, k_scale)
    return _in_chunks(chunk, queries, keys, d_kl, SELECTED_CHUNK)


def _dense_kl(static, index, constants, d_kl):
    implementation = static[-1]
    (q_index, k_index, weights), (q, k, lse, reach, k_scale) = index, constants
    size = k.shape[1]

    def chunk(queries, keys, d_k):
        q_index, weights, q, lse, start, stop, d_kl = jax.tree.map(lambda x: x[None], queries)
        k_index, k, k_scale = jax.tree.map(lambda x: x[None], keys)
        choose = partial(choose_implementation, "dense_indexer_kl", implementation)
        mass = _reached_probabilities("dense_indexer_kl", static, q, k, lse, start, stop)
        p = normalise_target(mass[0]).astype(accumulator(q_index))
        arrays = q_index, k_index, weights, start, stop, k_scale
        scores = choose(
            scores_kernels.why_not(*arrays),
            xla=_reached_scores,
            pallas=partial(scores_kernels.index_scores, fill=False),
        )(*arrays)[0]
        mask = KeyRange(start[0], stop[0]).contains(jnp.arange(size))
        kl = _kl_terms(p, scores, mask)
        if d_kl is None:
            return kl, d_k
        d_scores = _score_gradient(p, scores, mask, d_kl[0])[None]
        arrays = q_index, k_index, weights, d_scores, start, stop, k_scale, d_k[None]
        backward = choose(
            scores_kernels.why_not_backward(*arrays),
            xla=_scores_backward,
            pallas=_scores_backward_kernel,
        )
        d_q, d_k, d_weights = backward(*arrays)
        return (kl, d_q[0], d_weights[0]), d_k[0]

    queries, keys = (q_index, weights, q, lse, reach.start, reach.stop, d_kl), (k_index, k, k_scale)
    return _in_chunks(chunk, queries, keys, d_kl, max(1, REACHED_CHUNK // size))


def _in_chunks(chunk, queries, keys, d_kl, block):
    """Maps `chunk` over queries: the KL and None, or the KL and its gradients, all but one by query."""
    if d_kl is None:
        return map_queries(chunk, queries, keys, block=block)[0], None
    d_k = jnp.zeros(keys[0].shape, accumulator(keys[0]))
    (kl, d_q, d_weights), d_k = map_queries(chunk, queries, keys, d_k, block=block)
    return kl, (d_q, d_k, d_weights)


# A row of `target`, `scores` and `mask` [t, s] is a query, over its selection or over all keys.


def _kl_terms(target, scores, mask):
    nothing = target == 0  # false for NaN, which shall show
    terms = target * (jnp.log(jnp.where(nothing, 1.0, target)) - _log_softmax(scores, mask))
    return jnp.sum(jnp.where(nothing, 0.0, terms), axis=-1)


def _score_gradient(target, scores, mask, d_kl):
    return jnp.where(mask, jnp.exp(_log_softmax(scores, mask)) - target, 0.0) * d_kl[:, None]


def _log_softmax(scores, mask):
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    total = jnp.sum(jnp.exp(scores - peak), axis=-1, keepdims=True)
    return jnp.where(mask, scores - peak - jnp.log(jnp.where(total == 0, 1.0, total)), -jnp.inf)


def _head_sum_gradient(q_index, k_index, weights, d_scores):
    """Computes the gradients of `head_sum` by its inputs; by the logits it is dI · w where relu passes."""
    q_index, k_index = widen(q_index), widen(k_index)
    keys = "se" if k_index.ndim == 2 else "tse"
    active = relu(contract(f"tje,{keys}->tjs", q_index, k_index))
    d_weights = jnp.sum(active * d_scores[:, None], axis=-1)
    # NaN passes relu, and so does its gradient.
    d_logits = jnp.where(active == 0, 0.0, d_scores[:, None] * weights[..., None]).astype(q_index.dtype)
    return contract(f"tjs,{keys}->tje", d_logits, k_index), contract(f"tjs,tje->{keys}", d_logits, q_index), d_weights


# The parts over a selection in plain XLA.


def _selected_rows(mass, q_index, k_index, weights, indices, k_scale):
    """Gathers a block of queries' targets, scores and mask, with their index keys and the scales of these."""
    rows, present = gather_rows(k_index, indices)
    row_scale = gather_rows(k_scale, indices)[0]
    return normalise_target(mass), head_sum(q_index, rows, weights) * row_scale, present, rows, row_scale


def _selected_block(q_index, k_index, indices):
    return queries_per_block(indices.shape[2] * (k_index.shape[2] + 4 * q_index.shape[2]))


def _selected_kl(mass, q_index, k_index, weights, indices, k_scale):
    def block(queries, keys, _):
        (mass, q_index, weights, indices), (k_index, k_scale) = queries, keys
        return _kl_terms(*_selected_rows(mass, q_index, k_index, weights, indices, k_scale)[:3]), _

    queries, keys = (mass, q_index, weights, indices), (k_index, k_scale)
    return map_queries(block, queries, keys, block=_selected_block(q_index, k_index, indices))[0]


def _selected_gradients(mass, q_index, k_index, weights, indices, k_scale, d_kl, d_k):
    def block(queries, keys, d_k):
        (mass, q_index, weights, indices, d_kl), (k_index, k_scale) = queries, keys
        target, scores, mask, rows, row_scale = _selected_rows(mass, q_index, k_index, weights, indices, k_scale)
        d_scores = _score_gradient(target, scores, mask, d_kl) * row_scale
        d_q, d_rows, d_weights = _head_sum_gradient(q_index, rows, weights, d_scores)
        kl = _kl_terms(target, scores, mask)
        return (kl, _rounded(d_q, q_index), d_weights), scatter_rows(d_k, indices, d_rows)

    queries, keys = (mass, q_index, weights, indices, d_kl), (k_index, k_scale)
    block_size = _selected_block(q_index, k_index, indices)
    (kl, d_q, d_weights), d_k = map_queries(block, queries, keys, d_k, block=block_size)
    return kl, d_q, d_weights, d_k


def _rounded(gradient, x):
    """Rounds to the dtype of `x`, though not to FP8, which a factor would still take out of range."""
    return gradient.astype(jnp.bfloat16 if x.dtype.itemsize == 1 else x.dtype)


# The parts over all reached keys in plain XLA, a tile of keys at a time.


def _reached_block(k, heads):
    return queries_per_block(6 * k.shape[1] + min(KEY_TILE, k.shape[1]) * 2 * heads)


def _reached_mass(q, k, lse, start, stop, *, scale, target):
    size = k.shape[1]

    def block(queries, k, _):
        q, lse, start, stop = queries

        def tile(keys):
            k, position = keys
            mask = KeyRange(start, stop).contains(position)
            return join_heads(q, k, lse, mask, scale=scale, dims="snh", target=target)

        return _join_tiles(jax.lax.map(tile, _key_tiles(k, jnp.arange(size)))), _

    return map_queries(block, (q, lse, start, stop), k, block=_reached_block(k, q.shape[2]))[0][..., :size]


def _reached_scores(q_index, k_index, weights, start, stop, k_scale):
    size = k_index.shape[1]

    def block(queries, keys, _):
        q_index, weights = queries
        tile = lambda keys: head_sum(q_index, keys[0], weights) * keys[1]  # noqa: E731
        return _join_tiles(jax.lax.map(tile, _key_tiles(*keys))), _

    block_size = _reached_block(k_index, 2 * q_index.shape[2])
    return map_queries(block, (q_index, weights), (k_index, k_scale), block=block_size)[0][..., :size]


def _scores_backward(q_index, k_index, weights, d_scores, start, stop, k_scale, d_k):
    def block(queries, keys, d_k):
        (q_index, weights, d_scores), (k_index, k_scale) = queries, keys

        def tile(total, keys):
            k_index, d_scores = keys
            d_q, d_rows, d_weights = _head_sum_gradient(q_index, k_index, weights, d_scores.T)
            return (total[0] + d_q, total[1] + d_weights), d_rows

        zero = jnp.zeros(q_index.shape, weights.dtype), jnp.zeros(weights.shape, weights.dtype)
        tiles = _key_tiles(k_index, (d_scores * k_scale).T)
        (d_q, d_weights), d_rows = jax.lax.scan(tile, zero, tiles)
        return (_rounded(d_q, q_index), d_weights), d_k + join_queries(d_rows, k_index.shape[0])

    queries, keys = (q_index, weights, d_scores), (k_index, k_scale)
    block_size = _reached_block(k_index, 2 * q_index.shape[2])
    (d_q, d_weights), d_k = map_queries(block, queries, keys, d_k, block=block_size)
    return d_q, d_k, d_weights


def _scores_backward_kernel(*arrays):
    *arrays, total = arrays
    return scores_kernels.index_scores_backward(*arrays, total=total)


def _key_tiles(*keys):
    return split_queries(keys, min(KEY_TILE, keys[0].shape[0]))


def _join_tiles(tiles):
    """Joins tiles of keys [tiles, t, s] to [t, tiles · s]."""
    return jnp.moveaxis(tiles, 0, 1).reshape(tiles.shape[1], -1)
