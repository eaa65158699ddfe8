"""Joins paged index scores and their top-k on Hopper: the k best keys of each of a few queries a sequence.

Two kernels. Scores lie in a float32 buffer between them, of which only what queries reach is written and read.
"""

import jax
import jax.numpy as jnp

from dsa_jax.pallas_kernels.decode.paged_index_scores import PAGE, unfilled_scores
from dsa_jax.pallas_kernels.decode.paged_index_scores import why_not as why_not_scores
from dsa_jax.pallas_kernels.decode.select_few_rows import select_few_rows
from dsa_jax.pallas_kernels.decode.select_few_rows import why_not as why_not_select


def why_not(q_index, pages, weights, table, start, stop, *, k: int) -> str | None:
    """Says why the kernels cannot take these arguments, or None when they can."""
    reason = why_not_scores(q_index, pages, weights, table, start, stop)
    if reason is not None:
        return reason
    scores = jax.ShapeDtypeStruct((*start.shape, PAGE * table.shape[1]), jnp.float32)
    return why_not_select(scores, k, start=start, stop=stop, table=table)


def paged_select_keys(q_index, pages, weights, table, start, stop, *, k: int, slots: bool = False):
    """Selects the k best keys of each query: `select_topk` of `paged_index_scores`, bitwise.

    Args:
      q_index: [B, T, J, 128], float8_e4m3fn or bfloat16; T 1 to 4, J 64 or 32.
      pages: float8_e4m3fn [n, 66, 128], 64 keys and the bytes of their float32 scales, or bfloat16 [n, 64, 128].
      weights: float32 [B, T, J].
      table: int32 [B, P], the pages of each sequence. Entries of pages that no query reaches are not followed.
      start: int32 [B, T], the first key of each query.
      stop: int32 [B, T], the end of its keys; the range may be empty, reversed, or exceed 64 · P.
      k: how many; may exceed 64 · P.
      slots: whether keys come out as places in `pages`, page · 64 + position mod 64.

    Returns:
      int32 [B, T, k]: increasing positions in the sequence, or their slots; then -1.

    Raises:
      ValueError: if `why_not` has a reason.
    """
    reason = why_not(q_index, pages, weights, table, start, stop, k=k)
    if reason is not None:
        raise ValueError(f"paged_select_keys: {reason}")
    scores = unfilled_scores(q_index, pages, weights, table, start, stop)
    return select_few_rows(scores, k, start=start, stop=stop, table=table if slots else None)
