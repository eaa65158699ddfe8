"""The top-k of Eq. 2: each query keeps the k keys with the highest index scores."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsa_jax.blockwise import map_queries, queries_per_block
from dsa_jax.indexer import check_index_inputs, map_score_tiles
from dsa_jax.key_range import KeyRange, check_keys
from dsa_jax.pallas_kernels import Implementation, choose_implementation
from dsa_jax.pallas_kernels import selection as selection_kernels


def select_topk(
    scores: Float[Array, "B T S"], k: int, *, keys: KeyRange | None = None, implementation: Implementation | None = None
) -> Int[Array, "B T K"]:
    """Selects the positions of the k highest scores of each query, exactly.

    Selections are canonical: strictly increasing positions, then -1. Of equal scores the lowest position wins, and -0.0
    equals +0.0. -inf, NaN and keys out of reach are never selected, +inf may be.

    Args:
      scores: float32 scores, or float64 ones, which have no kernel.
      k: how many keys each query keeps; may exceed S.
      keys: the keys that each query may reach, all if None.
      implementation: None, "xla" or "pallas".

    Returns:
      int32 positions. No gradient flows through them.

    Raises:
      ValueError: if shapes, dtypes or k are wrong, or "pallas" has no kernel for them.

    Examples:
      >>> select_topk(jnp.array([[[0.5, 2.0, 0.5, -jnp.inf]]]), 3).tolist()
      [[[0, 1, 2]]]
    """
    scores = jnp.asarray(scores)
    if scores.ndim != 3:
        raise ValueError(f"scores must be [B, T, S], got shape {scores.shape}")
    if scores.dtype not in (jnp.float32, np.float64):
        raise ValueError(f"scores must be float32 or float64, got {scores.dtype}")
    check_k(k)
    batch, length, size = scores.shape
    if keys is None:
        keys = KeyRange(jnp.zeros((batch, length), jnp.int32), jnp.full((batch, length), size, jnp.int32))
    check_keys(keys, batch, length)
    select = choose_implementation(
        "select_topk",
        implementation,
        selection_kernels.why_not_topk(scores, k, start=keys.start, stop=keys.stop),
        xla=partial(_sorted_topk, k=k),
        pallas=partial(_kernel_topk, k=k),
    )
    return select(*jax.lax.stop_gradient((scores, keys.start, keys.stop)))


def _sorted_topk(scores, start, stop, *, k):
    def block(queries, _, sums):
        scores, start, stop = queries
        reach = KeyRange(start, stop).contains(jnp.arange(scores.shape[-1]))
        return _top_positions(jnp.where(reach, scores, -jnp.inf), k), sums

    return map_queries(block, (scores, start, stop), (), block=queries_per_block(scores.shape[-1]))[0]


def _kernel_topk(scores, start, stop, *, k):
    return selection_kernels.select_topk(scores, k, start=start, stop=stop)


def select_keys(
    q_index: Float[Array, "B T J E"],
    k_index: Float[Array, "B S E"],
    weights: Float[Array, "B T J"],
    keys: KeyRange,
    *,
    k: int,
    k_scale: Float[Array, "B S"] | None = None,
    implementation: Implementation | None = None,
) -> Int[Array, "B T K"]:
    """Scores the reachable keys (Eq. 1) and selects the k best of each query: `select_topk(index_scores(…))`, bitwise.

    No more than a block of queries' scores is alive at a time. No gradient flows through a selection: the indexer
    learns from `sparse_indexer_kl` and `dense_indexer_kl`.

    Args:
      q_index, k_index, weights, keys, k_scale, implementation: as in `index_scores`.
      k: how many keys each query keeps; may exceed S.

    Returns:
      int32 positions, canonical as in `select_topk`.

    References:
      DeepSeek-V3.2-Exp, section 1, Eqs. 1 and 2.
    """
    q_index, k_index, weights, k_scale = check_index_inputs(q_index, k_index, weights, keys, k_scale)
    check_k(k)
    arrays = q_index, k_index, weights, keys.start, keys.stop, k_scale
    select = choose_implementation(
        "select_keys",
        implementation,
        selection_kernels.why_not_keys(*arrays, k=k),
        xla=partial(_tiled_keys, k=k),
        pallas=partial(selection_kernels.select_keys, k=k),
    )
    return select(*jax.lax.stop_gradient(arrays))


def _tiled_keys(q_index, k_index, weights, start, stop, k_scale, *, k):
    keys = KeyRange(start, stop)
    return map_score_tiles(lambda scores: _top_positions(scores, k), q_index, k_index, weights, keys, k_scale)


def check_k(k):
    """Raises ValueError unless k is a positive integer that is known when traced."""
    if not isinstance(k, int | np.integer) or isinstance(k, bool):
        raise ValueError(f"k must be an int that is known when traced, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _top_positions(scores, k):
    """Selects the top k of [t, S] scores that hold -inf where a key is out of reach."""
    size = scores.shape[-1]
    # lax.top_k ranks NaN highest and -0.0 below +0.0; of equal values it keeps the lowest position. -0.0 is told by its
    # bits, since a comparison with zero may flush subnormal scores.
    word = jnp.int32 if scores.dtype.itemsize == 4 else np.int64
    minus_zero = jax.lax.bitcast_convert_type(scores, word) == jnp.iinfo(word).min
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, jnp.where(minus_zero, 0.0, scores))
    values, positions = jax.lax.top_k(scores, min(k, size))
    positions = jnp.sort(jnp.where(values > -jnp.inf, positions, size), axis=-1).astype(jnp.int32)
    positions = jnp.where(positions < size, positions, -1)
    return jnp.pad(positions, ((0, 0), (0, k - positions.shape[-1])), constant_values=-1)
