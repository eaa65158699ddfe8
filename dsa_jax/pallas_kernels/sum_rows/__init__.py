"""Sums gathered rows in a given order, and sorts them into it: `sum_rows.py`.

A deterministic scatter-add, the last step of the gradients by keys in the rooms `sparse_attention` and `indexer_loss`.
"""

from dsa_jax.pallas_kernels.sum_rows.sum_rows import sort_by_key, sum_rows

__all__ = [
    "sort_by_key",
    "sum_rows",
]
