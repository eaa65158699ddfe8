"""Computes sparse MLA attention forward on Hopper: rows of the latent by index, online softmax, `out` and `lse`.

One of two kernels runs, by the number of heads. A wgmma has 64 rows: `sparse_attention_many_heads` has heads for rows,
`sparse_attention_few_heads` keys, so that 16 or 32 heads need no padding.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from dsa_jax.pallas_kernels.hopper.constants import BLOCK_HEADS, BLOCK_KEYS, PAIR_KEYS
from dsa_jax.pallas_kernels.sparse_attention.forward_few_heads import HEADS as FEW_HEADS
from dsa_jax.pallas_kernels.sparse_attention.forward_few_heads import Config as FewHeadsConfig
from dsa_jax.pallas_kernels.sparse_attention.forward_few_heads import sparse_attention_few_heads
from dsa_jax.pallas_kernels.sparse_attention.forward_many_heads import Config as ManyHeadsConfig
from dsa_jax.pallas_kernels.sparse_attention.forward_many_heads import sparse_attention_many_heads

VALUE_DIMS = range(64, 513, 64)  # C: whole tiles of columns, as many as the accumulators have registers for
ROTARY_DIMS = (0, 64)  # R: none, or one tile of columns


def why_not(q, kv, indices, value_dim: int) -> str | None:
    """Says in one sentence why no kernel can take these arguments, or None when one can."""
    dtypes = [str(x.dtype) for x in (q, kv, indices)]
    if dtypes != ["bfloat16", "bfloat16", "int32"]:
        return f"q and kv must be bfloat16 and indices int32, got {', '.join(dtypes)}"
    if q.ndim != 4 or kv.ndim != 3 or indices.ndim != 3:
        return f"expected q [B, T, N, H], kv [B, S, H], indices [B, T, K], got {q.shape}, {kv.shape}, {indices.shape}"
    batch, length, heads, dim = q.shape
    if kv.shape[0] != batch or kv.shape[2] != dim or indices.shape[:2] != (batch, length):
        return f"q {q.shape}, kv {kv.shape} and indices {indices.shape} do not fit together"
    if 0 in q.shape or 0 in kv.shape or 0 in indices.shape:
        return f"no dimension may be 0, got q {q.shape}, kv {kv.shape} and indices {indices.shape}"
    if heads not in FEW_HEADS and heads % BLOCK_HEADS:
        return f"heads must be 16, 32 or a multiple of {BLOCK_HEADS}, got {heads}"
    if value_dim not in VALUE_DIMS:
        return f"value_dim must be a multiple of 64 from 64 to 512, got {value_dim}"
    if dim - value_dim not in ROTARY_DIMS:
        return f"the rotary columns must be 0 or 64, got {dim} - {value_dim} = {dim - value_dim}"
    # The kernels count key blocks, and up to nine pieces of each, in int32.
    if batch * length * math.ceil(heads / 64) * math.ceil(indices.shape[2] / 64) >= 2**27:
        return f"B · T · ⌈N / 64⌉ · ⌈K / 64⌉ must be below 2²⁷, got q {q.shape} and indices {indices.shape}"
    return None


def sparse_attention(
    q,
    kv,
    indices,
    *,
    value_dim: int,
    scale: float,
    config: FewHeadsConfig | ManyHeadsConfig | None = None,
    interpret: bool = False,
):
    """Attends to the selected latents alone: `dsa_jax.sparse_attention` in bfloat16.

    Args:
      q: [B, T, N, H] bfloat16; N is 16, 32 or a multiple of 64, H is C = `value_dim`, a multiple of 64 up to 512, plus
        0 or 64 rotary columns.
      kv: [B, S, H] bfloat16, whose first C columns are the values.
      indices: [B, T, K] int32; what lies outside [0, S) is no key.
      value_dim: C.
      scale: of the logits.
      config: tuning of the kernel for this number of heads.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      out [B, T, N, C] bfloat16 and lse [B, T, N] float32; 0 and -inf for a query without keys.

    Raises:
      ValueError: if `why_not` has a reason, the scale is not finite, or the config is the other kernel's.
    """
    reason = why_not(q, kv, indices, value_dim)
    if reason is not None:
        raise ValueError(f"sparse_attention has no kernel for this: {reason}")
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    batch, length, heads, dim = q.shape
    attend: Callable[..., Any]
    if heads in FEW_HEADS:
        attend, tuning, key_step = sparse_attention_few_heads, FewHeadsConfig, BLOCK_KEYS
    else:
        attend, tuning, key_step = sparse_attention_many_heads, ManyHeadsConfig, PAIR_KEYS
    if not isinstance(config, tuning | None):
        raise ValueError(f"config must be a {tuning.__module__}.Config for {heads} heads, got {config}")
    ragged = -indices.shape[2] % key_step  # filled up with -1, which is no key
    if ragged:
        indices = jnp.pad(indices, ((0, 0), (0, 0), (0, ragged)), constant_values=-1)
    out, lse = attend(
        q.reshape(-1, heads, dim), kv, indices.reshape(batch * length, -1),
        value_dim=value_dim, scale=scale, config=config, interpret=interpret,
    )  # fmt: skip
    return out.reshape(batch, length, heads, value_dim), lse.reshape(batch, length, heads)
