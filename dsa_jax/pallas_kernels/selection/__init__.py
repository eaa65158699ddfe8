"""Selects each query's k best keys, exactly.

`select_topk.py` selects from scores that are there. `select_keys.py` computes scores, by the room `index_scores`, and
selects from them, a bounded block of queries at a time.
"""

from dsa_jax.pallas_kernels.selection.select_keys import select_keys
from dsa_jax.pallas_kernels.selection.select_keys import why_not as why_not_keys
from dsa_jax.pallas_kernels.selection.select_topk import select_topk
from dsa_jax.pallas_kernels.selection.select_topk import why_not as why_not_topk

__all__ = [
    "select_keys",
    "select_topk",
    "why_not_keys",
    "why_not_topk",
]
