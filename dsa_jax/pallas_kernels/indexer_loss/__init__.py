"""Computes the indexer's loss: the attention's probabilities that it imitates, then the KL and its gradients.

Over selections (Eq. 4) `sparse_indexer_kl.py` is the face of two kernels: `attention_target.py` sums probabilities over
heads, `selection_kl.py` computes the KL and its gradients. For the dense warm-up (Eq. 3) `dense_target.py` sums
probabilities over heads for every query and key of a range; the scores and their gradients are those of the room
`index_scores`.
"""

from dsa_jax.pallas_kernels.indexer_loss.dense_target import dense_target
from dsa_jax.pallas_kernels.indexer_loss.dense_target import why_not as why_not_dense_target
from dsa_jax.pallas_kernels.indexer_loss.sparse_indexer_kl import head_sums, indexer_gradients, indexer_kl, why_not_sums
from dsa_jax.pallas_kernels.indexer_loss.sparse_indexer_kl import why_not as why_not_kl

__all__ = [
    "dense_target",
    "head_sums",
    "indexer_gradients",
    "indexer_kl",
    "why_not_dense_target",
    "why_not_kl",
    "why_not_sums",
]
