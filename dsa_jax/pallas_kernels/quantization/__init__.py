"""Computes the indexer's Hadamard transform and its rounding to e4m3, `quantize.py`; of rows in registers `rows.py`."""

from dsa_jax.pallas_kernels.quantization.quantize import hadamard, quantize, why_not
from dsa_jax.pallas_kernels.quantization.rows import SMALLEST_AMAX

__all__ = [
    "SMALLEST_AMAX",
    "hadamard",
    "quantize",
    "why_not",
]
