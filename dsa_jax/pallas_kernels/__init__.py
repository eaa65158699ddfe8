"""Pallas kernels (Mosaic GPU) for NVIDIA Hopper, sm_90: a folder an operation, and the choice between them and XLA.

`dispatch` chooses; `hopper` has what kernels share: words of PTX, code on registers, the split of work among blocks.
Each other folder speeds up the operation of its name. A kernel takes plain arrays, imports JAX alone, says in `why_not`
what it cannot take, and runs in Pallas' interpreter on a CPU. The definitions of the operations are in `dsa_jax`.
"""

from dsa_jax.pallas_kernels.dispatch import (
    CAPABILITY,
    Implementation,
    assume_gpu,
    check_implementation,
    choose_implementation,
    gpu_capability,
    implementation,
    is_gpu_assumed,
    resolve,
    stand_in,
)

__all__ = [
    "CAPABILITY",
    "Implementation",
    "assume_gpu",
    "check_implementation",
    "choose_implementation",
    "gpu_capability",
    "implementation",
    "is_gpu_assumed",
    "resolve",
    "stand_in",
]
