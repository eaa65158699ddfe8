"""Joins the parts of attention that split keys leave: softmax over parts, weighted by the sums of exponentials."""

import jax
import jax.numpy as jnp
from jax import lax

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import LOG2E


def combine(parts, lses, interpret: bool = False):
    """Joins `out` and `lse` of attention to disjoint sets of keys: out = Σ e^{lse_s} out_s / Σ e^{lse_s}.

    A thread block of one warpgroup a head, four columns a thread; the parts are added in their order. A kernel of its
    own costs 1.2 µs of launch, less than blocks that wait for each other.

    Args:
      parts: [splits, queries, N, C], float32 or bfloat16.
      lses: [splits, queries, N] float32; -inf for a part without keys.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      out [queries, N, C] bfloat16 and lse [queries, N] float32; 0 and -inf without keys.
    """
    splits, queries, heads, dim = parts.shape

    def body(parts_gmem, lses_gmem, out_gmem, lse_gmem):
        i = lax.axis_index("block")
        query, head = lax.div(i, heads), lax.rem(i, heads)
        logs = [lses_gmem[s, query, head] for s in range(splits)]
        outs = [parts_gmem[s, query, head].astype(jnp.float32) for s in range(splits)]
        top = logs[0]
        for x in logs[1:]:
            top = jnp.maximum(top, x)
        base = jnp.where(top == -jnp.inf, 0.0, top)  # -inf - -inf would be NaN
        weights = [jnp.exp2((x - base) * LOG2E) for x in logs]
        total = sum(weights[1:], weights[0])
        inverse = jnp.where(total == 0, 0.0, 1 / total)
        out = outs[0] * (weights[0] * inverse)
        for x, weight in zip(outs[1:], weights[1:], strict=True):
            out = out + x * (weight * inverse)
        out_gmem[query, head] = out.astype(jnp.bfloat16)
        lse_gmem[query, head] = base + jnp.log(total)

    kernel = ptx.persistent_kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((queries, heads, dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((queries, heads), jnp.float32),
        ),
        scratch_types=(),
        blocks=queries * heads,
        interpret=interpret,
        warpgroups=1,
        approx_math=True,
    )
    return kernel(parts, lses)
