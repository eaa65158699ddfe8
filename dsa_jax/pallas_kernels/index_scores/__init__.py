"""Computes the lightning indexer's scores (Eq. 1) over a range of keys for each query, and their gradients.

`forward.py` computes the scores. `backward.py` plans the work of two kernels, `backward_queries.py` (gradients by
queries and weights) and `backward_keys.py` (by keys); `backward_pipeline.py` has what these two share.
"""

from dsa_jax.pallas_kernels.index_scores.backward import index_scores_backward
from dsa_jax.pallas_kernels.index_scores.backward import why_not as why_not_backward
from dsa_jax.pallas_kernels.index_scores.forward import index_scores, why_not

__all__ = [
    "index_scores",
    "index_scores_backward",
    "why_not",
    "why_not_backward",
]
