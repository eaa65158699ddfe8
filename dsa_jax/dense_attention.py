"""Dense attention over every key that a query reaches: in latent form, and in each head's own keys and values.

Results and gradients as in `dsa_jax.attention`, whose softmax over a block is used here.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsa_jax.attention import (
    attend,
    attend_backward,
    check_indices,
    check_latents,
    check_one_dtype,
    check_value_dim,
    no_gradient,
    scatter_rows,
    static_scale,
    zero_unreached,
)
from dsa_jax.blockwise import accumulator, map_queries, queries_per_block
from dsa_jax.key_range import KeyRange, check_keys
from dsa_jax.pallas_kernels import (
    CAPABILITY,
    Implementation,
    check_implementation,
    choose_implementation,
    gpu_capability,
    is_gpu_assumed,
    resolve,
    stand_in,
)
from dsa_jax.pallas_kernels import dense_attention as dense_kernels

CUDNN_BACKWARD = "cuDNN attention"  # what a trace calls it


def latent_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S H"],
    keys: KeyRange,
    *,
    value_dim: int,
    scale: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attends to every reachable latent in MLA's multi-query form, H = C + R.

    Args:
      q: queries in latent form, float32, bfloat16 or float64.
      kv: latents, in the dtype of `q`. Those that no query of their row reaches may be NaN.
      keys: the keys that each query may reach.
      value_dim: C, the first columns of `kv`, which are the values.
      scale: the softmax scale, a number and no traced value.
      implementation: None or "xla": there is no kernel.

    Returns:
      out and lse as in `sparse_attention`.

    Raises:
      ValueError: if shapes or dtypes do not fit together, or for "pallas".
    """
    q, kv = jnp.asarray(q), jnp.asarray(kv)
    check_latents(q, kv)
    check_keys(keys, *q.shape[:2])
    check_value_dim(value_dim, kv)
    check_implementation("latent_attention", implementation)
    kv = zero_unreached(kv, keys)
    return _dense_attention(static_scale(scale), "sh", "xla", q, kv, kv[..., :value_dim], keys, None)


def multihead_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    keys: KeyRange,
    *,
    scale: float,
    indices: Int[Array, "B T K"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attends with keys and values of each head's own (H = P + R): 3.4 times fewer FLOPs a pair than the latent form.

    Args:
      q: queries, float32, bfloat16 or, by XLA alone, float64.
      k: keys, in the dtype of `q`. Those that no query of their row reaches may be NaN.
      v: values, likewise.
      keys: the keys that each query may reach.
      scale: the softmax scale, a number and no traced value.
      indices: a selection, under `sparse_attention`'s rules: then only the reachable keys among them are attended to.
      implementation: None, "xla" or "pallas"; a selection has no kernel.

    Returns:
      out and lse as in `sparse_attention`.

    Raises:
      ValueError: if shapes or dtypes do not fit together, or "pallas" has no kernel for them.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    check_heads(q, k)
    if v.shape[:3] != k.shape[:3] or v.ndim != 4:
        raise ValueError(f"v must be [B, S, N, V] like k {k.shape}, got shape {v.shape}")
    check_one_dtype(q=q, k=k, v=v)
    check_keys(keys, *q.shape[:2])
    if indices is not None:
        indices = jnp.asarray(indices)
        check_indices(indices, *q.shape[:2])
        check_implementation("multihead_attention over a selection", implementation)
    k, v = zero_unreached(k, keys), zero_unreached(v, keys)
    return _dense_attention(static_scale(scale), "snh", implementation, q, k, v, keys, indices)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dense_attention(scale, dims, implementation, q, k, v, keys, indices):
    forward = partial(_reached_attention, scale=scale, dims=dims)
    if indices is not None or dims != "snh":
        return forward(q, k, v, keys.start, keys.stop, indices)
    forward = choose_implementation(
        "multihead_attention",
        implementation,
        dense_kernels.why_not(q, k, v, keys.start, keys.stop),
        xla=forward,
        pallas=partial(dense_kernels.multihead_attention, scale=scale),
    )
    return forward(q, k, v, keys.start, keys.stop)


def _reached_attention(q, k, v, start, stop, indices=None, *, scale, dims):
    def block(queries, keys, sums):
        (q, start, stop, indices), (k, v) = queries, keys
        return attend(q, k, v, _reach(start, stop, indices, k), scale=scale, dims=dims), sums

    return map_queries(block, (q, start, stop, indices), (k, v), block=_dense_block(q, k))[0]


def _dense_block(q, k):
    return queries_per_block(3 * k.shape[1] * q.shape[2])


def _reach(start, stop, indices, k):
    """Computes the bias of `attend` over all keys: the log of their multiplicity in a selection, -inf out of reach."""
    reach = KeyRange(start, stop).contains(jnp.arange(k.shape[0]))
    if indices is None:
        return jnp.where(reach, 0.0, -jnp.inf)
    ones = jnp.ones(indices.shape, accumulator(k))
    counts = jax.vmap(scatter_rows)(jnp.zeros(reach.shape, ones.dtype), indices, ones)
    return jnp.where(reach, jnp.log(counts), -jnp.inf)


def _dense_forward(scale, dims, implementation, q, k, v, keys, indices):
    out, lse = checkpoint_name(_dense_attention(scale, dims, implementation, q, k, v, keys, indices), "attention")
    return (out, lse), (q, k, v, keys, indices, lse)


def _dense_backward(scale, dims, implementation, residuals, cotangents):
    (q, k, v, keys, indices, lse), (d_out, d_lse) = residuals, cotangents
    arrays = q, k, v, keys.start, keys.stop, lse, d_out, d_lse
    backward = partial(_reached_backward, scale=scale, dims=dims)
    if indices is None and dims == "snh" and resolve(implementation) != "xla" and _cudnn_takes(q, k, v):
        # Not `choose_implementation`: JAX must see beforehand that cuDNN's part wants to know the devices.
        cudnn = _cudnn_stand_in if is_gpu_assumed() else _cudnn_backward
        gradients = jax.lax.platform_dependent(*arrays, cuda=partial(cudnn, scale=scale), default=backward)
    else:
        gradients = backward(*arrays, indices)
    return *gradients, *jax.tree.map(no_gradient, (keys, indices))


def _reached_backward(q, k, v, start, stop, lse, d_out, d_lse, indices=None, *, scale, dims):
    def block(queries, keys, sums):
        (q, start, stop, indices, *rest), (k, v) = queries, keys
        bias = _reach(start, stop, indices, k)
        d_q, d_k, d_v = attend_backward(q, k, v, bias, *rest, scale=scale, dims=dims)
        return d_q, (sums[0] + d_k, sums[1] + d_v)

    queries = (q, start, stop, indices, lse, d_out, d_lse)
    sums = jnp.zeros(k.shape, accumulator(k)), jnp.zeros(v.shape, accumulator(v))
    d_q, (d_k, d_v) = map_queries(block, queries, (k, v), sums, block=_dense_block(q, k))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)


def _cudnn_takes(q, k, v) -> bool:
    """Tells whether this process's GPUs are Hopper's and cuDNN's attention takes such arrays, values padded."""
    dim, fits = q.shape[3], q.dtype == jnp.bfloat16 and q.shape[:2] == k.shape[:2]
    hopper = gpu_capability() == CAPABILITY
    return hopper and fits and dim % 8 == 0 and v.shape[3] <= dim <= 256


def cudnn_attention(q, k, v, *, scale):
    """Attends causally by cuDNN through JAX's public function, which wants values as wide as keys; `out` alone."""
    v_padded = jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[3] - v.shape[3])])
    out = jax.nn.dot_product_attention(q, k, v_padded, scale=scale, is_causal=True, implementation="cudnn")
    return out[..., : v.shape[3]]


def _cudnn_backward(q, k, v, start, stop, lse, d_out, d_lse, *, scale):
    """Runs cuDNN's backward where the ranges are causal, as in training on unpacked documents, else XLA's.

    XLA's too where `lse` is NaN: nobody says what cuDNN makes of it.
    """
    causal = KeyRange.causal(*q.shape[:2])
    return jax.lax.cond(
        jnp.all((start <= 0) & (stop == causal.stop)) & jnp.all((d_lse == 0) & ~jnp.isnan(lse)),
        lambda: jax.vjp(partial(cudnn_attention, scale=scale), q, k, v)[1](d_out),
        lambda: _reached_backward(q, k, v, start, stop, lse, d_out, d_lse, scale=scale, dims="snh"),
    )


def _cudnn_stand_in(q, k, v, start, stop, lse, d_out, d_lse, *, scale):
    """Stands for cuDNN's backward in a trace on a machine without it, with the arrays that it reads and makes."""
    del start, stop, d_lse, scale, lse
    padded = [jnp.pad(x, [(0, 0)] * 3 + [(0, q.shape[3] - v.shape[3])]) for x in (v, d_out)]
    d_q, d_k, d_v = stand_in(CUDNN_BACKWARD, _cudnn_arrays)(q, k, *padded)
    return d_q, d_k, d_v[..., : v.shape[3]]


def _cudnn_arrays(q, k, v, d_out):
    """Makes the gradients' arrays, and beside them the float32 sums of the queries' gradients that cuDNN needs."""
    sums = jnp.sort(q.astype(jnp.float32))
    return jnp.sort(sums).astype(q.dtype), jnp.sort(k), jnp.sort(v + d_out)


_dense_attention.defvjp(_dense_forward, _dense_backward)


def check_heads(q, k):
    """Raises ValueError unless q [B, T, N, H] and k [B, S, N, H] fit together."""
    if q.ndim != 4:
        raise ValueError(f"q must be [B, T, N, P+R], got shape {q.shape}")
    batch, _, heads, dim = q.shape
    if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (batch, heads, dim) or k.shape[1] < 1:
        raise ValueError(f"k must be [{batch}, S, {heads}, {dim}] like q {q.shape}, got shape {k.shape}")
    check_one_dtype(q=q, k=k)
