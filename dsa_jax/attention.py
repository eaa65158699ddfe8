"""Attention over selected keys (Eq. 2), and the distribution that the indexer learns to imitate.

Each operation returns `out` and `lse`, the natural log of the softmax's denominator, and takes gradients from both.
The backward recomputes the probabilities of one block of queries at a time from `lse`; gradients by keys, which many
queries share, add up in float32.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from dsa_jax.blockwise import accumulator, contract, map_queries, queries_per_block
from dsa_jax.pallas_kernels import Implementation, choose_implementation
from dsa_jax.pallas_kernels import indexer_loss as loss_kernels
from dsa_jax.pallas_kernels import sparse_attention as sparse_kernels

Target = Literal["sum", "max"]  # how the indexer's target joins the heads

NO_MAX_KERNEL = "target='max' is computed by XLA alone"


def sparse_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S H"],
    indices: Int[Array, "B T K"],
    *,
    value_dim: int,
    scale: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attends to the selected latents alone, in MLA's multi-query form: H = C + R, values are the first C columns.

    out[t,n] = Σ_k softmax_k(scale · q[t,n] · kv[indices[t,k]]) · kv[indices[t,k], :value_dim]

    An index outside [0, S) is no key, wherever it stands; a key listed twice counts twice; a query without keys gets
    `out` 0 and `lse` -inf. Latents that are not selected are never read into the result, so they may be NaN.

    Args:
      q: queries in latent form, float32, bfloat16 or, by XLA alone, float64.
      kv: latents, in the dtype of `q`.
      indices: the selection of each query, positions of `kv`.
      value_dim: C.
      scale: the softmax scale, a number and no traced value.
      implementation: None, "xla" or "pallas", of the forward and the backward.

    Returns:
      out [B, T, N, value_dim] in the dtype of `q`, lse [B, T, N] float32; softmax and sums in float32. For float64
      these are float64.

    Raises:
      ValueError: if shapes or dtypes do not fit together, or "pallas" has no kernel for them.

    References:
      DeepSeek-V3.2-Exp, section 1, Eq. 2; the multi-query form of MLA in its appendix A.
    """
    q, kv, indices = jnp.asarray(q), jnp.asarray(kv), jnp.asarray(indices)
    check_latents(q, kv, indices)
    check_value_dim(value_dim, kv)
    return _sparse_attention(value_dim, static_scale(scale), implementation, q, kv, indices)


def attention_target(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S H"],
    lse: Float[Array, "B T N"],
    indices: Int[Array, "B T K"],
    *,
    scale: float,
    target: Target = "sum",
    implementation: Implementation | None = None,
) -> Float[Array, "B T K"]:
    """Computes the indexer's target: attention probabilities summed over heads, L1-normalised over the selection.

    p[t,k] = Σ_n exp(scale · q[t,n] · kv[indices[t,k]] - lse[t,n]) / Σ_k (the same);  0 where there is no key.

    With the target "max", which is not the paper's, max_n stands in place of Σ_n: a key counts as much as it does for
    the head that attends to it most, so that one head's needle is not outweighed by what all heads attend to a little.

    Args:
      q, kv, indices, scale: as `sparse_attention` took them, with all heads of the layer.
      lse: as it returned them for these very arguments.
      target: "sum" or "max", over heads.
      implementation: None, "xla" or "pallas"; "max" has no kernel.

    Returns:
      float32 probabilities, a constant: no gradient flows through them.

    Raises:
      ValueError: if shapes or dtypes do not fit together, for another target, or "pallas" has no kernel for them.

    References:
      DeepSeek-V3.2-Exp, section 2.1, the target of Eqs. 3 and 4.
    """
    q, kv, lse, indices = jnp.asarray(q), jnp.asarray(kv), jnp.asarray(lse), jnp.asarray(indices)
    check_latents(q, kv, indices)
    check_lse(lse, q)
    check_target(target)
    constants = jax.lax.stop_gradient((q, kv, lse, indices))
    mass = attention_mass(*constants, scale=static_scale(scale), target=target, implementation=implementation)
    return normalise_target(mass)


def attention_mass(q, kv, lse, indices, *, scale, target="sum", implementation=None):
    """Joins the attention probabilities [B, T, K] of selected keys over heads; arguments are not checked."""
    join = choose_implementation(
        "attention_target",
        implementation,
        loss_kernels.why_not_sums(q, kv, lse, indices) if target == "sum" else NO_MAX_KERNEL,
        xla=partial(_gathered_mass, scale=scale, target=target),
        pallas=partial(loss_kernels.head_sums, scale=scale),
    )
    return join(q, kv, lse, indices)


def _gathered_mass(q, kv, lse, indices, *, scale, target):
    def block(queries, kv, sums):
        q, lse, indices = queries
        rows, present = gather_rows(kv, indices)
        return join_heads(q, rows, lse, present, scale=scale, dims="tsh", target=target), sums

    elements = indices.shape[2] * (kv.shape[2] + 2 * q.shape[2])
    return map_queries(block, (q, lse, indices), kv, block=queries_per_block(elements))[0]


def join_heads(q, k, lse, mask, *, scale, dims, target):
    """Joins the attention probabilities [t, s] of one block over its heads; `dims` names the axes of `k`."""
    logits = contract(f"tnh,{dims}->tns", q, k) * scale
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
    p = jnp.where(mask[:, None], jnp.exp(logits - lse), 0.0)
    if target == "sum":
        return jnp.sum(p, axis=1)
    # XLA's maximum on a CPU may drop NaN.
    return jnp.where(jnp.any(jnp.isnan(p), axis=1), jnp.nan, jnp.max(p, axis=1))


def normalise_target(total):
    """L1-normalises what `join_heads` gives over the last axis; what is 0 stays 0, in a row with NaN too."""
    norm = jnp.sum(total, axis=-1, keepdims=True)
    return jnp.where(total == 0, 0.0, total / jnp.where(norm == 0, 1.0, norm))


def gather_rows(x, indices):
    """Gathers rows of `x` [S, …] at `indices` [t, K], zero where there is no key, and the mask of those that are."""
    present = (indices >= 0) & (indices < x.shape[0])
    rows = x.at[jnp.where(present, indices, 0)].get(mode="promise_in_bounds")
    return jnp.where(present.reshape(present.shape + (1,) * (x.ndim - 1)), rows, 0), present


def scatter_rows(total, indices, rows):
    """Adds `rows` [t, K, …] to `total` [S, …] at `indices`; an index that is no key adds nothing."""
    present = (indices >= 0) & (indices < total.shape[0])
    return total.at[jnp.where(present, indices, total.shape[0])].add(rows, mode="drop")


def zero_unreached(x, keys):
    """Zeroes the keys [B, S, …] that no query of their row reaches, so that what they hold stays out of the sums."""
    reached = keys.reached(x.shape[1])
    return jnp.where(reached.reshape(reached.shape + (1,) * (x.ndim - 2)), x, 0)


# The softmax over one block. `dims` names the axes of the keys: "sh" latents shared by queries and heads, "snh" keys of
# each head, "tsh" rows gathered for each query. `bias` [t, s] is the log of how often a key counts: -inf for never, and
# then its logit is -inf even where the product is NaN. An empty row is one whose denominator is 0: the sum keeps NaN,
# which XLA's maximum on a CPU may drop, and a logit of +inf makes it NaN, since exp(inf - inf) is.


def attend(q, k, v, bias, *, scale, dims):
    """Computes `out` and `lse` of one block."""
    logits = _logits(q, k, bias, scale, dims)
    peak = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak)[..., None])
    total = jnp.sum(weights, axis=-1)
    empty = total == 0
    denominator = jnp.where(empty, 1.0, total)
    out = contract(f"tns,{_values(dims)}->tnv", weights.astype(v.dtype), v) / denominator[..., None]
    return out.astype(q.dtype), jnp.where(empty, -jnp.inf, peak + jnp.log(denominator))


def attend_backward(q, k, v, bias, lse, d_out, d_lse, *, scale, dims):
    """Computes the gradients of `attend` by q, k and v; the last two as they are summed."""
    logits, has_key = _logits(q, k, bias, scale, dims), bias[:, None] > -jnp.inf
    # Masked once more, as a row whose lse is NaN has no weight of 0.
    weights = jnp.where(has_key, jnp.exp(logits - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]), 0.0)
    d_weights = contract(f"tnv,{_values(dims)}->tns", d_out, v)
    # The mean of d_weights is d_out · out; summed from the weights, the backward need not keep `out`.
    mean = jnp.sum(weights * d_weights, axis=-1) - d_lse
    d_logits = jnp.where(has_key, weights * (d_weights - mean[..., None]) * scale, 0.0).astype(q.dtype)
    d_q = contract(f"tns,{dims}->tnh", d_logits, k).astype(q.dtype)
    d_k = contract(f"tns,tnh->{dims}", d_logits, q)
    d_v = contract(f"tns,tnv->{_values(dims)}", weights.astype(d_out.dtype), d_out)
    return d_q, d_k, d_v


def _logits(q, k, bias, scale, dims):
    bias = bias[:, None]
    return jnp.where(bias == -jnp.inf, -jnp.inf, contract(f"tnh,{dims}->tns", q, k) * scale + bias)


def _values(dims):
    return dims.replace("h", "v")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sparse_attention(value_dim, scale, implementation, q, kv, indices):
    forward = choose_implementation(
        "sparse_attention",
        implementation,
        sparse_kernels.why_not(q, kv, indices, value_dim),
        xla=partial(_gathered_attention, value_dim=value_dim, scale=scale),
        pallas=partial(sparse_kernels.sparse_attention, value_dim=value_dim, scale=scale),
    )
    return forward(q, kv, indices)


def _gathered_attention(q, kv, indices, *, value_dim, scale):
    def block(queries, kv, sums):
        q, indices = queries
        rows, present = gather_rows(kv, indices)
        bias = jnp.where(present, 0.0, -jnp.inf)
        return attend(q, rows, rows[..., :value_dim], bias, scale=scale, dims="tsh"), sums

    return map_queries(block, (q, indices), kv, block=_sparse_block(q, kv, indices))[0]


def _sparse_block(q, kv, indices):
    return queries_per_block(indices.shape[2] * (2 * kv.shape[2] + 3 * q.shape[2]))


def _sparse_forward(value_dim, scale, implementation, q, kv, indices):
    out, lse = checkpoint_name(_sparse_attention(value_dim, scale, implementation, q, kv, indices), "attention")
    return (out, lse), (q, kv, indices, out, lse)


def _sparse_backward(value_dim, scale, implementation, residuals, cotangents):
    options = dict(value_dim=value_dim, scale=scale, implementation=implementation)
    return *sparse_attention_backward(*residuals, *cotangents, **options), no_gradient(residuals[2])


def sparse_attention_backward(q, kv, indices, out, lse, d_out, d_lse, *, value_dim, scale, implementation=None):
    """Computes the gradients of `sparse_attention` by q and kv; its arguments and results are not checked."""
    backward = choose_implementation(
        "the backward of sparse_attention",
        implementation,
        sparse_kernels.why_not_backward(q, kv, indices, value_dim),
        xla=partial(_gathered_backward, value_dim=value_dim, scale=scale),
        pallas=partial(
            sparse_kernels.sparse_attention_backward,
            value_dim=value_dim,
            scale=scale,
        ),
    )
    return backward(q, kv, indices, out, lse, d_out, d_lse)


def _gathered_backward(q, kv, indices, out, lse, d_out, d_lse, *, value_dim, scale):
    del out  # 2 GiB at 128K, and cheap to do without

    def block(queries, kv, d_kv):
        q, indices, lse, d_out, d_lse = queries
        rows, present = gather_rows(kv, indices)
        bias = jnp.where(present, 0.0, -jnp.inf)
        values = rows[..., :value_dim]
        d_q, d_rows, d_values = attend_backward(q, rows, values, bias, lse, d_out, d_lse, scale=scale, dims="tsh")
        return d_q, scatter_rows(d_kv, indices, d_rows.at[..., :value_dim].add(d_values))

    queries = (q, indices, lse, d_out, d_lse)
    d_kv = jnp.zeros(kv.shape, accumulator(kv))
    d_q, d_kv = map_queries(block, queries, kv, d_kv, block=_sparse_block(q, kv, indices))
    return d_q, d_kv.astype(kv.dtype)


_sparse_attention.defvjp(_sparse_forward, _sparse_backward)


def no_gradient(x):
    """Makes the cotangent of a constant: zeros, of integers in `float0`, as JAX wants them."""
    return np.zeros(x.shape, jax.dtypes.float0) if jnp.issubdtype(x.dtype, jnp.integer) else jnp.zeros_like(x)


def check_latents(q, kv, indices=None):
    """Raises ValueError unless q [B, T, N, H], kv [B, S, H] and indices [B, T, K] fit together."""
    if q.ndim != 4:
        raise ValueError(f"q must be [B, T, N, C+R], got shape {q.shape}")
    batch, length, _, dim = q.shape
    if kv.ndim != 3 or kv.shape[0] != batch or kv.shape[2] != dim or kv.shape[1] < 1:
        raise ValueError(f"kv must be [{batch}, S, {dim}] like q {q.shape}, got shape {kv.shape}")
    check_one_dtype(q=q, kv=kv)
    if indices is not None:
        check_indices(indices, batch, length)


def static_scale(scale) -> float:
    """Returns the softmax scale as a number.

    Raises:
      ValueError: if it is traced, no number, or not finite.
    """
    if isinstance(scale, Tracer):
        raise ValueError("scale must be a number known when traced: close over it, or make it a static argument")
    try:
        number = float(scale)
    except (TypeError, ValueError):
        raise ValueError(f"scale must be a number, got {type(scale).__name__}") from None
    if not math.isfinite(number):
        raise ValueError(f"scale must be finite, got {number}")
    return number


def check_value_dim(value_dim, kv):
    """Raises ValueError unless the values are some of the first columns of kv."""
    if not 1 <= value_dim <= kv.shape[2]:
        raise ValueError(f"value_dim must be from 1 to the {kv.shape[2]} columns of kv, got {value_dim}")


def check_indices(indices, batch, length):
    """Raises ValueError unless indices is an integer array [batch, length, K]."""
    if indices.ndim != 3 or indices.shape[:2] != (batch, length) or indices.shape[2] < 1:
        raise ValueError(f"indices must be [{batch}, {length}, K] like q, got shape {indices.shape}")
    if not jnp.issubdtype(indices.dtype, jnp.signedinteger):
        raise ValueError(f"indices must be signed integers, got {indices.dtype}")


def check_lse(lse, q):
    """Raises ValueError unless lse has one entry for each query and head of q."""
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be {list(q.shape[:3])} like q, got shape {lse.shape}")


def check_target(target):
    """Raises ValueError unless `target` says how to join heads."""
    if target not in ("sum", "max"):
        raise ValueError(f"target must be 'sum' or 'max', got {target!r}")


def check_one_dtype(**arrays):
    """Raises ValueError unless all arrays have one dtype, float32, bfloat16 or float64."""
    dtypes = {name: str(x.dtype) for name, x in arrays.items()}
    if len(set(dtypes.values())) > 1 or next(iter(dtypes.values())) not in ("float32", "bfloat16", "float64"):
        raise ValueError(f"{' and '.join(dtypes)} must have one dtype, float32, bfloat16 or float64, got {dtypes}")
