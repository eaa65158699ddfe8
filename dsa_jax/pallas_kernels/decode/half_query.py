"""Converts queries to half precision, the type of latents on their way to the tensor cores."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.decode.gather_rows import GROUP_BYTES, VALUE_DIM
from dsa_jax.pallas_kernels.hopper import ptx, simt, simt_copies
from dsa_jax.pallas_kernels.hopper.constants import WARPGROUP_THREADS

GROUP_HEADS = 8  # rows of a tile


def pack_query(q):
    """Converts the latent columns of q [..., 576] to half precision, their bits taken for bfloat16.

    What is beyond the range of half precision, ±65504, becomes NaN, as it does where a kernel converts q.
    """
    latent = q[..., :VALUE_DIM].astype(jnp.float16)
    latent = jnp.where(jnp.isinf(latent), jnp.float16(jnp.nan), latent)
    return jnp.concatenate([lax.bitcast_convert_type(latent, jnp.bfloat16), q[..., VALUE_DIM:]], axis=-1)


def convert_query(q_smem, first_head: int, heads: int) -> None:
    """Converts the latent columns of some heads of q [N, 576] to half precision, where they are in shared memory.

    A warpgroup calls it together, and lets wgmma read them afterwards (`commit_smem`).
    """

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(ptx.swizzled(jnp.bfloat16)),))
    def convert(ctx, q):
        thread = simt.thread_id() & (WARPGROUP_THREADS - 1)
        # Whatever the swizzle: the latent columns of eight heads are 8 KiB in a row, and then come the rotary ones.
        start = simt.smem_address(q) + (thread << 4)
        for group in range(first_head // GROUP_HEADS, (first_head + heads) // GROUP_HEADS):
            for at in range(0, GROUP_HEADS * 2 * VALUE_DIM, 16 * WARPGROUP_THREADS):
                words = simt.load4(start, group * GROUP_BYTES + at)
                simt.store4(start, [simt_copies.bfloat16_to_half(x) for x in words], group * GROUP_BYTES + at)

    convert(q_smem)
