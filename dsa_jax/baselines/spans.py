"""Attention over spans: runs of neighbouring keys, which each query lists by where they begin, gathered whole."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsa_jax.attention import (
    attend,
    attend_backward,
    check_latents,
    check_value_dim,
    no_gradient,
    static_scale,
)
from dsa_jax.blockwise import accumulator, map_queries, queries_per_block
from dsa_jax.key_range import KeyRange, check_keys
from dsa_jax.pallas_kernels import Implementation, choose_implementation
from dsa_jax.pallas_kernels import sparse_attention as sparse_kernels


def span_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S H"],
    begins: Int[Array, "B T n"],
    keys: KeyRange,
    *,
    size: int,
    value_dim: int,
    scale: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attends to the latents in reach of spans of `size` keys, in MLA's multi-query form: H = C + R.

    The same as `sparse_attention` over the positions `begins[t,i] … begins[t,i] + size - 1` in reach of t. A span that
    begins outside [0, S) is none; what it has beyond the last key is no key; a key of two spans counts twice.

    XLA gathers spans as wholes, for as many queries at a time as `blockwise` allows, and reads each for all heads at
    once, in two batched products. A query's forward takes 2 · N · n · size · (H + V) operations, and writes and reads
    n · size · H numbers of gathered keys and 3 · N · n · size float32 ones of logits and weights; its backward takes
    2.5 times as many operations, and adds the n · size · H float32 gradients of its keys to the sums by whole spans. On
    Hopper `sparse_attention`'s kernels take the spans' positions, and gather into shared memory alone.

    Args:
      q: queries in latent form, float32, bfloat16 or, by XLA alone, float64.
      kv: latents, in the dtype of `q`. Those that no query attends to may be NaN.
      begins: where each query's spans begin.
      keys: the keys that each query may reach.
      size: keys of a span.
      value_dim: C, the first columns of `kv`, which are the values.
      scale: the softmax scale, a number and no traced value.
      implementation: None, "xla" or "pallas", of the forward and the backward.

    Returns:
      out and lse as in `sparse_attention`.

    Raises:
      ValueError: if shapes or dtypes do not fit together, or "pallas" has no kernel for them.

    Examples:
      >>> q, kv = jnp.zeros((1, 1, 1, 2)), jnp.arange(8.0).reshape(1, 4, 2)
      >>> keys = KeyRange.causal(1, 1, offset=2)
      >>> span_attention(q, kv, jnp.array([[[2]]]), keys, size=2, value_dim=1, scale=1.0)[0].item()
      4.0
    """
    q, kv, begins = jnp.asarray(q), jnp.asarray(kv), jnp.asarray(begins)
    check_latents(q, kv)
    check_value_dim(value_dim, kv)
    check_keys(keys, *q.shape[:2])
    if begins.ndim != 3 or begins.shape[:2] != q.shape[:2] or not jnp.issubdtype(begins.dtype, jnp.signedinteger):
        raise ValueError(
            f"begins must be signed integers {list(q.shape[:2])} + [n], got {begins.dtype} {list(begins.shape)}"
        )
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be an integer of at least 1, got {size!r}")
    return _span_attention(size, value_dim, static_scale(scale), implementation, q, kv, begins, keys)


def span_positions(begins: Int[Array, "B T n"], keys: KeyRange, *, size: int, count: int) -> Int[Array, "B T K"]:
    """Lists the positions in reach of each query's spans among `count` keys, -1 in place of the others."""
    positions = begins[..., None] + jnp.arange(size, dtype=begins.dtype)
    start, stop = (edge[..., None, None] for edge in (keys.start, jnp.minimum(keys.stop, count)))
    present = ((begins >= 0) & (begins < count))[..., None] & (positions >= start) & (positions < stop)
    return jnp.where(present, positions, -1).reshape(*begins.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _span_attention(size, value_dim, scale, implementation, q, kv, begins, keys):
    options = dict(size=size, value_dim=value_dim, scale=scale)
    forward = choose_implementation(
        "span_attention",
        implementation,
        sparse_kernels.why_not(q, kv, _listed(begins, size), value_dim),
        xla=partial(_gathered_spans, **options),
        pallas=partial(_listed_spans, **options),
    )
    return forward(q, kv, begins, keys.start, keys.stop)


def _listed(begins, size):
    """Describes the positions of spans."""
    return jax.ShapeDtypeStruct((*begins.shape[:2], begins.shape[2] * size), begins.dtype)


def _listed_spans(q, kv, begins, start, stop, *, size, value_dim, scale):
    positions = span_positions(begins, KeyRange(start, stop), size=size, count=kv.shape[1])
    return sparse_kernels.sparse_attention(q, kv, positions, value_dim=value_dim, scale=scale)


def _gathered_spans(q, kv, begins, start, stop, *, size, value_dim, scale):
    def block(queries, kv, sums):
        q, begins, start, stop = queries
        rows, bias, _ = _gather(kv, begins, start, stop, size)
        return attend(q, rows, rows[..., :value_dim], bias, scale=scale, dims="tsh"), sums

    block_size = _queries_in_block(q, kv, begins, size)
    return map_queries(block, (q, begins, start, stop), _room(kv, size), block=block_size)[0]


def _queries_in_block(q, kv, begins, size):
    return queries_per_block(begins.shape[2] * size * (2 * kv.shape[2] + 3 * q.shape[2]))


def _room(kv, size):
    """Adds rows at the end, so that a span that begins with the last key is whole."""
    return jnp.pad(kv, ((0, 0), (0, size - 1), (0, 0)))


def _gather(kv, begins, start, stop, size):
    """Gathers spans [t, n · size, H] of kv with `_room`, 0 out of reach; gives their bias and where they began."""
    count = kv.shape[0] - size + 1
    reach = KeyRange(start[None], stop[None])
    present = span_positions(begins[None], reach, size=size, count=count)[0] >= 0
    begins = jnp.clip(begins, 0, count - 1)
    rows = jax.vmap(jax.vmap(lambda begin: jax.lax.dynamic_slice_in_dim(kv, begin, size)))(begins)
    rows = rows.reshape(begins.shape[0], -1, kv.shape[1])
    return jnp.where(present[..., None], rows, 0), jnp.where(present, 0.0, -jnp.inf), begins


_ADD_SPANS = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
)


def _span_forward(size, value_dim, scale, implementation, q, kv, begins, keys):
    out, lse = _span_attention(size, value_dim, scale, implementation, q, kv, begins, keys)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return (out, lse), (q, kv, begins, keys, out, lse)


def _span_backward(size, value_dim, scale, implementation, residuals, cotangents):
    q, kv, begins, keys, out, lse = residuals
    options = dict(size=size, value_dim=value_dim, scale=scale)
    backward = choose_implementation(
        "the backward of span_attention",
        implementation,
        sparse_kernels.why_not_backward(q, kv, _listed(begins, size), value_dim),
        xla=partial(_gathered_backward, **options),
        pallas=partial(_listed_backward, **options),
    )
    d_q, d_kv = backward(q, kv, begins, keys.start, keys.stop, out, lse, *cotangents)
    return d_q, d_kv, *jax.tree.map(no_gradient, (begins, keys))


def _listed_backward(q, kv, begins, start, stop, out, lse, d_out, d_lse, *, size, value_dim, scale):
    positions = span_positions(begins, KeyRange(start, stop), size=size, count=kv.shape[1])
    arrays = q, kv, positions, out, lse, d_out, d_lse
    return sparse_kernels.sparse_attention_backward(*arrays, value_dim=value_dim, scale=scale)


def _gathered_backward(q, kv, begins, start, stop, out, lse, d_out, d_lse, *, size, value_dim, scale):
    del out  # summed from the weights instead

    def block(queries, kv, d_kv):
        q, begins, start, stop, *rest = queries
        rows, bias, begins = _gather(kv, begins, start, stop, size)
        values = rows[..., :value_dim]
        d_q, d_rows, d_values = attend_backward(q, rows, values, bias, *rest, scale=scale, dims="tsh")
        d_rows = d_rows.at[..., :value_dim].add(d_values).reshape(*begins.shape, size, -1)
        return d_q, jax.lax.scatter_add(d_kv, begins[..., None], d_rows, _ADD_SPANS, mode="promise_in_bounds")

    queries, room = (q, begins, start, stop, lse, d_out, d_lse), _room(kv, size)
    sums, block_size = jnp.zeros(room.shape, accumulator(kv)), _queries_in_block(q, kv, begins, size)
    d_q, d_kv = map_queries(block, queries, room, sums, block=block_size)
    return d_q, d_kv[:, : kv.shape[1]].astype(kv.dtype)


_span_attention.defvjp(_span_forward, _span_backward)
