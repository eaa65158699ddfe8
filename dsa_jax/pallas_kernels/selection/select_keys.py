"""Joins index scores and their top-k on Hopper, a block of queries at a time, so that scores stay a bounded buffer.

Measured on an H200 at T 4096, S 131072, J 64, E 128 in FP8: 7.9 ms, of which 7.05 are the scores and 0.1 the rounding
of queries and keys. The two kernels take turns every 1024 queries. They are joined, not fused: what limits the scoring
is its epilogue (without its stores it ran 2 % faster, without its sums 25 %), so holding every score against a
threshold there would cost about what the top-k saves by not reading them again, and prunes would stall the products.
That is an estimate from these figures; a fused kernel was not built.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dsa_jax.pallas_kernels.index_scores import index_scores
from dsa_jax.pallas_kernels.index_scores import why_not as why_not_scores
from dsa_jax.pallas_kernels.selection.select_topk import select_topk
from dsa_jax.pallas_kernels.selection.select_topk import why_not as why_not_topk


@dataclasses.dataclass(frozen=True)
class Config:
    """Bounds the scores that are alive at a time.

    Attributes:
      buffer_bytes: of scores; a single query's row may exceed it.
    """

    buffer_bytes: int = 512 << 20

    def __post_init__(self):
        if self.buffer_bytes < 1:
            raise ValueError(f"buffer_bytes must be positive, got {self.buffer_bytes}")

    def queries(self, batch: int, length: int, size: int) -> tuple[int, int]:
        """Chooses (batch rows, queries of each) whose scores over `size` keys are alive at a time."""
        rows = max(1, self.buffer_bytes // (4 * size))
        if rows >= batch * length:
            return batch, length
        if rows >= batch:
            return batch, rows // batch
        return 1, min(rows, length)


def why_not(q_index, k_index, weights, start, stop, k_scale=None, *, k: int) -> str | None:
    """Says why the kernels cannot take these arguments, or None when they can."""
    reason = why_not_scores(q_index, k_index, weights, start, stop, k_scale)
    if reason is not None:
        return reason
    batch, length, size = *q_index.shape[:2], k_index.shape[1]
    scores = jax.ShapeDtypeStruct((batch, length, size), jnp.float32)
    return why_not_topk(scores, k, start=start, stop=stop)


def select_keys(q_index, k_index, weights, start, stop, k_scale=None, *, k: int, config: Config | None = None):
    """Selects the k best keys of each query: `select_topk` of `index_scores`, bitwise.

    Args:
      q_index: [B, T, J, E], float8_e4m3fn or bfloat16.
      k_index: [B, S, E], the dtype of `q_index`.
      weights: float32 [B, T, J].
      start: int32 [B, T], the first key of each query.
      stop: int32 [B, T], the end of its keys.
      k_scale: float32 [B, S], or None for ones.
      k: how many.
      config: tuning.

    Returns:
      int32 [B, T, k]: increasing positions, then -1.

    Raises:
      ValueError: if `why_not` has a reason.
    """
    reason = why_not(q_index, k_index, weights, start, stop, k_scale, k=k)
    if reason is not None:
        raise ValueError(f"select_keys: {reason}")
    batch, length, size = *q_index.shape[:2], k_index.shape[1]
    rows, block = (config or Config()).queries(batch, length, size)

    def select(q_index, k_index, weights, start, stop, k_scale):
        """Selects for one block of queries. Scores out of reach stay unwritten: the selection does not read them."""
        scores = index_scores(q_index, k_index, weights, start, stop, k_scale=k_scale, fill=False)
        return select_topk(scores, k, start=start, stop=stop)

    if rows < batch:  # not even one query of every batch row fits: one batch row at a time

        def row(arrays):
            """Selects for one batch row."""
            return select_keys(*jax.tree.map(lambda x: x[None], arrays), k=k, config=config)[0]

        return lax.map(row, (q_index, k_index, weights, start, stop, k_scale))
    if block == length:
        return select(q_index, k_index, weights, start, stop, k_scale)

    def step(i, out):
        # The last block ends with the last query: what it shares with the block before is selected twice, alike, and
        # nothing is padded.
        first = jnp.minimum(i * block, length - block)
        q, w, low, high = (lax.dynamic_slice_in_dim(x, first, block, axis=1) for x in (q_index, weights, start, stop))
        selected = select(q, k_index, w, low, high, k_scale)
        return lax.dynamic_update_slice_in_dim(out, selected, first, axis=1)

    return lax.fori_loop(0, -(-length // block), step, jnp.zeros((batch, length, k), jnp.int32))
