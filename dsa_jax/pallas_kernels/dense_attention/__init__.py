"""Computes dense multi-head attention over a range of keys for each query, forward: `multihead_attention.py`."""

from dsa_jax.pallas_kernels.dense_attention.multihead_attention import multihead_attention, why_not

__all__ = [
    "multihead_attention",
    "why_not",
]
