"""Computes sparse MLA attention over selected latents: `out` and `lse`, and their gradients by q and kv.

`forward.py` checks the arguments and chooses by the number of heads between `forward_few_heads.py` (16 or 32) and
`forward_many_heads.py` (multiples of 64). `backward.py` goes through the queries in chunks, and for each of them calls
`backward_weights.py` (P and dS), `backward_queries.py` (d_q), `backward_keys.py` (each query's contributions to d_kv)
and the room `sum_rows`, which adds these up.
"""

from dsa_jax.pallas_kernels.sparse_attention.backward import sparse_attention_backward
from dsa_jax.pallas_kernels.sparse_attention.backward import why_not as why_not_backward
from dsa_jax.pallas_kernels.sparse_attention.forward import sparse_attention, why_not

__all__ = [
    "sparse_attention",
    "sparse_attention_backward",
    "why_not",
    "why_not_backward",
]
