"""Computes the indexer's Hadamard transform and its rounding to e4m3: `quantize.py`."""

from dsa_jax.pallas_kernels.quantization.quantize import SMALLEST_AMAX, hadamard, quantize, why_not

__all__ = [
    "SMALLEST_AMAX",
    "hadamard",
    "quantize",
    "why_not",
]
