"""A sliding window: the last K keys in reach in place of the K best ones."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.cache import KeyStore
from dsa_jax.key_range import KeyRange
from dsa_jax.layers import SparseMLA
from dsa_jax.nn import show_arguments


def window_selection(keys: KeyRange, k: int) -> Int[Array, "B T K"]:
    """Selects the last `k` keys in reach of each query, canonically: increasing positions, then -1.

    Raises:
      ValueError: if `k` is below 1.

    Examples:
      >>> window_selection(KeyRange.causal(1, 3), 2).tolist()
      [[[0, -1], [0, 1], [1, 2]]]
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    first = jnp.maximum(keys.start, keys.stop - k)[..., None]
    index = first + jnp.arange(k, dtype=jnp.int32)
    return jnp.where(index < keys.stop[..., None], index, -1)


@show_arguments
class WindowMLA(SparseMLA):
    """Multi-head latent attention over the last `index_topk` keys in reach; else as `SparseMLA`.

    Chosen by `Config.baseline = "window"`. The indexer selects nothing: without a loss of its own it is not computed.
    """

    def select(
        self, store: KeyStore, q_index: Float[Array, "B T J E"], weights: Float[Array, "B T J"], keys: KeyRange
    ) -> Int[Array, "B T K"]:
        """Selects as `window_selection` does, no wider than there are keys."""
        return window_selection(keys, min(self.config.index_topk, store.size))
