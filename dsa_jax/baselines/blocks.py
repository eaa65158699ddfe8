"""Block selection: whole blocks of keys in place of the K best keys, with the same indexer and as many keys.

The granularity of the selection is all that differs from DSA. So a query's own block is a block like any other, and
competes for its place by its scores. NSA and MoBA always select it, NSA the block before it and the first one too. What
a block is worth is here the score of its best key; NSA and MoBA score a compressed or mean key of the block.

References:
  Yuan et al., Native Sparse Attention, arXiv:2502.11089, section 3.3.2; Lu et al., MoBA, arXiv:2502.13189, section 2.2.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsa_jax.cache import KeyStore, LayerPages
from dsa_jax.indexer import check_index_inputs, index_scores
from dsa_jax.key_range import KeyRange
from dsa_jax.layers import SparseMLA
from dsa_jax.nn import show_arguments
from dsa_jax.paged import PAGE
from dsa_jax.pallas_kernels import Implementation
from dsa_jax.selection import check_k, select_topk

SCORES = 1 << 26  # alive at a time: 256 MiB, and as much again where they are padded to whole blocks


def select_blocks(
    q_index: Float[Array, "B T J E"],
    k_index: Float[Array, "B S E"],
    weights: Float[Array, "B T J"],
    keys: KeyRange,
    *,
    k: int,
    block_size: int,
    k_scale: Float[Array, "B S"] | None = None,
    implementation: Implementation | None = None,
) -> Int[Array, "B T K"]:
    """Selects the keys in reach of the k / block_size best blocks, a block's score being the best of its keys in reach.

    score[t,b] = max { I[t,s] : s // block_size = b, s in reach of t },  I by Eq. 1

    Blocks are aligned to the positions of `k_index`, whatever documents lie there. Of equal blocks the lowest wins, and
    -0.0 equals +0.0. Of a selected block every key in reach is selected, whatever its own score; a NaN or -inf counts
    for nothing in a block's score, and a block of these alone is not selected. The work is that of `index_scores` and
    `select_topk`, for as many queries at a time as have 2^26 scores together. No gradient flows through a selection.

    Args:
      q_index, k_index, weights, keys, k_scale: as in `index_scores`.
      k: how many keys each query keeps at most; may exceed S.
      block_size: keys of a block, a divisor of `k`; at 1 this is `select_keys`.
      implementation: None, "xla" or "pallas", of both operations.

    Returns:
      int32 positions, canonical as in `select_topk`. They are fewer than `k` where blocks are cut off by the reach, as
      the query's own is.

    Raises:
      ValueError: if shapes, dtypes, `k` or `block_size` do not fit together, or "pallas" has no kernel for them.

    Examples:
      >>> q_index, weights = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1, 1))
      >>> k_index = jnp.array([[[1.0], [5.0], [2.0], [3.0], [4.0]]])
      >>> keys = KeyRange.causal(1, 1, offset=4)
      >>> select_blocks(q_index, k_index, weights, keys, k=4, block_size=2).tolist()
      [[[0, 1, 4, -1]]]
    """
    q_index, k_index, weights, k_scale = check_index_inputs(q_index, k_index, weights, keys, k_scale)
    _check_block_size(k, block_size)
    q_index, k_index, weights, keys, k_scale = jax.lax.stop_gradient((q_index, k_index, weights, keys, k_scale))

    def score(q_index, weights, keys):
        return index_scores(q_index, k_index, weights, keys, k_scale=k_scale, implementation=implementation)

    options: dict[str, Any] = dict(size=k_index.shape[1], k=k, block_size=block_size, implementation=implementation)
    return _select(score, q_index, weights, keys, **options)


@show_arguments
class BlockMLA(SparseMLA):
    """Multi-head latent attention over the blocks of keys that the lightning indexer selects; else as `SparseMLA`.

    Chosen by `Config.baseline = "blocks"`: `index_topk` keys in blocks of `block_size`. Over caches blocks are those of
    a sequence's positions. The indexer learns from the scores of the selected keys, as in `SparseMLA`.
    """

    def select(
        self, store: KeyStore, q_index: Float[Array, "B T J E"], weights: Float[Array, "B T J"], keys: KeyRange
    ) -> Int[Array, "B T K"]:
        """Selects as `select_blocks` does, no wider than there are keys.

        Raises:
          ValueError: over pages that are sharded, or of other than a multiple of `block_size` tokens: where sequences
            share a row, each begins with a page, and so must begin with a block.
        """
        k, block_size = self.config.index_topk, self.config.block_size
        if isinstance(store, LayerPages) and PAGE % block_size:
            raise ValueError(f"over pages, block_size must divide the {PAGE} tokens of a page, got {block_size}")
        q_index, weights, store = jax.lax.stop_gradient((q_index, weights, store))
        selected = _select(store.score, q_index, weights, keys, size=store.size, k=k, block_size=block_size)
        return selected[..., : min(k, store.size)]


def _check_block_size(k, block_size):
    check_k(k)
    if not isinstance(block_size, int | np.integer) or isinstance(block_size, bool) or block_size < 1:
        raise ValueError(f"block_size must be an integer of at least 1 that is known when traced, got {block_size!r}")
    if k % block_size:
        raise ValueError(f"block_size must divide k = {k}, got {block_size}")


def _select(score: Callable, q_index, weights, keys, *, size, k, block_size, implementation=None):
    """Selects of `size` keys by the scores [B, t, size] that `score` gives for t queries at a time."""

    def some(q_index, weights, start, stop):
        scores = score(q_index, weights, KeyRange(start, stop))
        start, stop = jnp.clip(start, 0, size), jnp.clip(stop, 0, size)
        blocks = KeyRange(start // block_size, (stop + block_size - 1) // block_size)
        best = _best_of_blocks(scores, block_size)
        chosen = select_topk(best, k // block_size, keys=blocks, implementation=implementation)
        return keys_of_blocks(chosen, start, stop, block_size)

    batch, length = keys.start.shape
    queries, count = (q_index, weights, keys.start, keys.stop), max(1, SCORES // (batch * size))
    if length <= count:
        return some(*queries)

    def step(selected, first):
        part = (jax.lax.dynamic_slice_in_dim(x, first, count, axis=1) for x in queries)
        return jax.lax.dynamic_update_slice_in_dim(selected, some(*part), first, axis=1), None

    # The last queries begin early enough to be as many as the others: some are selected for twice, and none is padding.
    first = np.minimum(np.arange(0, length, count), length - count)
    return jax.lax.scan(step, jnp.zeros((batch, length, k), jnp.int32), first)[0]


def _best_of_blocks(scores, block_size):
    """Takes the best score of each block [B, t, S / block_size], -inf where there is none."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    padding = ((0, 0), (0, 0), (0, -scores.shape[-1] % block_size))
    scores = jnp.pad(scores, padding, constant_values=-jnp.inf)
    return jnp.max(scores.reshape(*scores.shape[:2], -1, block_size), axis=-1)


def keys_of_blocks(blocks, start, stop, block_size):
    """Lists the keys in reach of canonical blocks [B, t, K / block_size] as canonical positions [B, t, K].

    A reach is an interval, so the keys that it lacks stand at the front of the first block and at the end of the last.
    """
    lacking = jnp.clip(start[..., None] - blocks[..., :1] * block_size, 0, block_size)
    count = blocks.shape[-1]
    block, within = jnp.divmod(lacking + jnp.arange(count * block_size, dtype=jnp.int32), block_size)
    chosen = jnp.take_along_axis(blocks, jnp.minimum(block, count - 1), axis=-1)
    positions = chosen * block_size + within
    return jnp.where((block < count) & (chosen >= 0) & (positions < stop[..., None]), positions, -1)
