"""Communicates between the shards of a model inside `jax.shard_map`, each function with the gradient that it needs.

Every function names a logical axis of `sharding.RULES`, and is the identity where that axis is not split: outside a
`shard_map`, or over mesh axes of size 1. So the layers are written once, for one device and for any mesh.

| function              | forward                                  | backward                                         |
|-----------------------|------------------------------------------|--------------------------------------------------|
| `sum_statistics`      | sum over shards (all-reduce)             | none: a constant                                 |
| `max_statistics`      | maximum over shards (all-reduce)         | none: a constant                                 |
| `sum_gradients`       | identity ("f" in Megatron-LM)            | sum over shards (all-reduce)                     |
| `sum_shards`          | sum over shards (all-reduce; "g")        | identity                                         |
| `slice_tokens`        | tokens i, i + n, i + 2n, … of shard i    | all tokens of all shards (all-gather)            |
| `gather_tokens`       | all tokens of all shards (all-gather)    | tokens i, i + n, i + 2n, … of shard i            |
| `heads_to_tokens`     | heads for tokens (all-to-all)            | tokens for heads (all-to-all)                    |
| `tokens_to_heads`     | tokens for heads (all-to-all)            | heads for tokens (all-to-all)                    |
| `gather_head_weights` | all heads (all-gather)                   | sum, own heads kept (reduce-scatter, float32)    |
| `gather_sequence`     | all tokens, natural order (all-gather)   | sum, own tokens kept (reduce-scatter, float32)   |
| `take_sequence`       | own tokens of the whole sequence         | none                                             |
| `gather_parameters`   | whole parameters (all-gather)            | sum, own part kept (reduce-scatter, float32)     |
| `exchange_columns`    | all columns of own tokens (all-to-all)   | own columns of all tokens (all-to-all)           |
| `gather_candidates`   | all shards' candidates (all-gather)      | none                                             |
| `combine_attention`   | attention over all shards' keys          | none                                             |

They are made for `check_vma=False` with `jax.grad` taken inside, of a loss that counts this shard's tokens alone. Then
`jax.lax.psum` must not be differentiated: its transpose would be a second sum, and which transpose is right depends on
what the shards hold. A value that all shards hold alike and that enters work which differs between them (heads, width)
needs `sum_gradients`; the parts that come out of such work need `sum_shards`.

References:
  Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3: the operators f and g.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.parallel.sharding import RULES, parameter_axes, path_names

# Parameters whose products are float32 whatever the compute dtype, by the end of their path: they travel unrounded.
FLOAT32_PRODUCTS = ("gate.weight", "indexer.weights_proj", "_proj_scale")


# Who and how many.


_has_copies = contextvars.ContextVar("_has_copies", default=False)


@contextlib.contextmanager
def copied_parameters() -> Iterator[None]:
    """Has parameters in this block taken as `parameter_specs(copies=True)` places them: nothing is to be gathered."""
    token = _has_copies.set(True)
    try:
        yield
    finally:
        _has_copies.reset(token)


def mesh_axes(name: str) -> tuple[str, ...]:
    """Lists the mesh axes over which a logical axis is split in this `shard_map`: those larger than 1."""
    if name == "fsdp" and _has_copies.get():
        return ()
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in RULES[name] if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def num_shards(name: str) -> int:
    """Counts the shards of a logical axis in this `shard_map`, 1 outside of one.

    Examples:
      >>> num_shards("heads")
      1
    """
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in mesh_axes(name))


def shard_index(name: str) -> Int[Array, ""] | int:
    """Gives this shard's number among those of a logical axis: 0 where it is not split, else an int32 scalar."""
    axes = mesh_axes(name)
    return jax.lax.axis_index(axes) if axes else 0


# Statistics: no gradient.


def sum_statistics(x: Any, name: str) -> Any:
    """Sums counts and other statistics over the shards.

    Args:
      x: a tree of arrays of any shapes, one value a shard.
      name: the logical axis whose shards are summed.

    Returns:
      The sums, the same on all shards, in the same shapes. They are constants to the gradient; where nothing is split
      `x` itself comes back, gradient and all.
    """
    axes = mesh_axes(name)
    return jax.lax.psum(jax.lax.stop_gradient(x), axes) if axes else x


def max_statistics(x: Array, name: str) -> Array:
    """Takes the elementwise maximum over the shards of a logical axis, a constant to the gradient on any mesh."""
    axes = mesh_axes(name)
    return jax.lax.pmax(jax.lax.stop_gradient(x), axes) if axes else jax.lax.stop_gradient(x)


# Heads, width and vocabulary: what all shards hold alike, and the parts that they make of it.


def sum_gradients(x: Array, name: str) -> Array:
    """Passes `x` on as it is, and sums its gradient over the shards of a logical axis.

    Put it where a value that all shards hold alike enters work that is split among them, such as their heads: each
    shard then has a part of the gradient, and the sum is the whole of it, again alike on all.
    """
    axes = mesh_axes(name)
    return _sum_gradients(axes, x) if axes else x


def sum_shards(x: Array, name: str) -> Array:
    """Sums the shards' parts of a logical axis, and passes the gradient on as it is.

    Put it where split work ends: every shard then holds the sum and, what follows being the same everywhere, the whole
    gradient by it, which is also the gradient by its own part.
    """
    axes = mesh_axes(name)
    return _sum_shards(axes, x) if axes else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_gradients(axes, x):
    return x


_sum_gradients.defvjp(lambda axes, x: (x, None), lambda axes, _, d: (jax.lax.psum(d, axes),))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_shards(axes, x):
    return jax.lax.psum(x, axes)


_sum_shards.defvjp(lambda axes, x: (jax.lax.psum(x, axes), None), lambda axes, _, d: (d,))


# Tokens that shards of heads divide among themselves.


def slice_tokens(x: Array, name: str) -> Array:
    """Takes this shard's tokens out of those that all shards of a logical axis hold alike: every n-th.

    Every n-th, and not a block, so that causal work is even. The gradient gathers: all tokens' gradients, each from the
    shard that took the token, again alike on all shards.

    Args:
      x: [B, T, …], the same on all n shards; T must be a multiple of n.
      name: the logical axis.

    Returns:
      [B, T / n, …]: tokens i, i + n, i + 2n, … of shard i.
    """
    axes = mesh_axes(name)
    return _slice_tokens(axes, x) if axes else x


def gather_tokens(x: Array, name: str) -> Array:
    """Gathers all tokens from the shards that hold every n-th of them: the inverse of `slice_tokens`.

    The gradient slices: what follows is the same on all shards, so each keeps the gradient by its own tokens.

    Args:
      x: [B, T / n, …], as `slice_tokens` gives it.
      name: the logical axis.

    Returns:
      [B, T, …] in their former order, the same on all shards.
    """
    axes = mesh_axes(name)
    return _gather_tokens(axes, x) if axes else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slice_tokens(axes, x):
    by_shard = x.reshape(x.shape[0], -1, jax.lax.axis_size(axes), *x.shape[2:])
    return jax.lax.dynamic_index_in_dim(by_shard, jax.lax.axis_index(axes), axis=2, keepdims=False)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_tokens(axes, x):
    by_shard = jax.lax.all_gather(x, axes, axis=2)
    return by_shard.reshape(x.shape[0], -1, *x.shape[2:])


_slice_tokens.defvjp(lambda axes, x: (_slice_tokens(axes, x), None), lambda axes, _, d: (_gather_tokens(axes, d),))
_gather_tokens.defvjp(lambda axes, x: (_gather_tokens(axes, x), None), lambda axes, _, d: (_slice_tokens(axes, d),))


def heads_to_tokens(x: Array) -> Array:
    """Exchanges this shard's heads of all tokens for all heads of its share of the tokens, `slice_tokens`' share.

    The gradient is exchanged the other way, as by `tokens_to_heads`.

    Args:
      x: [B, T, N / n, …] on each of n shards of heads; T must be a multiple of n.

    Returns:
      [B, T / n, N, …]: tokens i, i + n, i + 2n, … of shard i.
    """
    axes = mesh_axes("heads")
    if not axes:
        return x
    x = x.reshape(x.shape[0], -1, jax.lax.axis_size(axes), *x.shape[2:])
    return jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=3, tiled=True)[:, :, 0]


def tokens_to_heads(x: Array) -> Array:
    """Exchanges all heads of this shard's tokens for its heads of all tokens: the inverse of `heads_to_tokens`.

    The gradient is exchanged the other way, as by `heads_to_tokens`.

    Args:
      x: [B, T / n, N, …] on each of n shards of heads.

    Returns:
      [B, T, N / n, …].
    """
    axes = mesh_axes("heads")
    if not axes:
        return x
    x = jax.lax.all_to_all(x[:, :, None], axes, split_axis=3, concat_axis=2, tiled=True)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def gather_head_weights(weight: Float[Array, "C N H"]) -> Float[Array, "C N2 H"]:
    """Gathers a projection's weight for all heads from the shards of heads.

    For use by a shard that has all heads of some tokens. Each shard's gradient counts its own tokens alone; they are
    summed in float32, and every shard keeps the part by its own heads.

    Args:
      weight: this shard's heads, N of the N2 = n · N.
    """
    axes = mesh_axes("heads")
    return _gather_parameter(1, axes, (), weight.dtype, weight.dtype, weight) if axes else weight


# The sequence.


def gather_sequence(x: Array) -> Array:
    """Gathers the whole sequence, in natural order, from the shards that hold it in zigzag order.

    Every shard's queries reach all keys, so every shard contributes to every key's gradient. These are summed in
    float32 on their way back (bfloat16 would lose them), and each shard keeps those by its own tokens.

    Args:
      x: [B, T / n, …] on each of n sequence shards: two chunks, as `sharding.zigzag_order` deals them out. Latents,
        index keys or their scales; FP8 travels as bytes.

    Returns:
      [B, T, …] in the dtype of `x`, the same on all sequence shards.
    """
    axes = mesh_axes("sequence")
    return _gather_sequence(axes, x) if axes else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_sequence(axes, x):
    shards = jax.lax.axis_size(axes)
    x = _all_gather(x, axes, 1)
    # Shard i holds chunks i and 2n - 1 - i: first halves ascend over the shards, second halves descend.
    halves = x.reshape(x.shape[0], shards, 2, -1, *x.shape[2:])
    return jnp.concatenate([halves[:, :, 0], halves[:, ::-1, 1]], axis=1).reshape(x.shape)


def _gather_sequence_backward(axes, like, d):
    shards = jax.lax.axis_size(axes)
    chunks = d.astype(jnp.float32).reshape(d.shape[0], 2 * shards, -1, *d.shape[2:])
    halves = jnp.stack([chunks[:, :shards], chunks[:, shards:][:, ::-1]], axis=2).reshape(d.shape)
    return (jax.lax.psum_scatter(halves, axes, scatter_dimension=1, tiled=True).astype(like.dtype),)


# The residual is empty: it only carries the dtype of `x`.
_gather_sequence.defvjp(lambda axes, x: (_gather_sequence(axes, x), x[:0]), _gather_sequence_backward)


def take_sequence(x: Array) -> Array:
    """Takes this shard's tokens, in zigzag order, out of the whole sequence: the inverse of `gather_sequence`.

    Args:
      x: [B, T, …] in natural order, the same on all n sequence shards; no gradient is meant.

    Returns:
      [B, T / n, …].
    """
    axes = mesh_axes("sequence")
    if not axes:
        return x
    count, own = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    chunks = x.reshape(x.shape[0], 2 * count, -1, *x.shape[2:])
    mine = [jax.lax.dynamic_index_in_dim(chunks, i, axis=1, keepdims=False) for i in (own, 2 * count - 1 - own)]
    return jnp.concatenate(mine, axis=1)


# Pages of sequences that are served, spread over shards. No gradient is meant.


def gather_candidates(x: Array, name: str) -> Array:
    """Gathers [B, T, k] of each of n shards of a logical axis to [B, T, n · k], the first shard's first."""
    axes = mesh_axes(name)
    return jax.lax.all_gather(x, axes, axis=2, tiled=True) if axes else x


def combine_attention(
    out: Float[Array, "B T N V"], lse: Float[Array, "B T N"], name: str
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Joins attention over the keys of each shard to attention over all of them: softmax's sums, added in float32."""
    axes = mesh_axes(name)
    if not axes:
        return out, lse
    all_lse = jax.lax.all_gather(lse, axes)
    total = jax.nn.logsumexp(all_lse, axis=0)
    weight = jnp.where(total == -jnp.inf, 0.0, jnp.exp(lse - jnp.where(total == -jnp.inf, 0.0, total)))
    return jax.lax.psum(out.astype(jnp.float32) * weight[..., None], axes).astype(out.dtype), total


# Fully sharded parameters.


def gather_parameters(state: Any, *, dtype: Any = None, wide: bool = False, whole: bool = True) -> Any:
    """Gathers parameters as a layer uses them: whole along the dimension that is fully sharded.

    Gradients, each of one shard's tokens, are summed in float32 over all shards of tokens and scattered to where the
    parameter is kept. So a loss over a shard's own tokens gives the gradient of the loss over all tokens.

    Args:
      state: a tree of parameters at the end of their paths in the model's state.
      dtype: the dtype in which wider parameters travel, but for those of `FLOAT32_PRODUCTS`; their own if None.
      wide: whether they come out in their own dtype again, so that gradients which add up over several uses on this
        shard do so unrounded.
      whole: False leaves a fully sharded parameter in parts, for a caller that brings all tokens to the part
        (`exchange_columns`); its gradient is still summed over shards that hold other tokens and the same part.

    Returns:
      The tree of gathered parameters; the very arrays where nothing is split.
    """

    def gather(path, x):
        names = path_names(path)
        axes = parameter_axes(names, x.ndim)
        split_axes = {axis for name in axes if name for axis in RULES[name]}
        summed = tuple(axis for axis in mesh_axes("tokens") if axis not in split_axes)
        fsdp = mesh_axes("fsdp") if whole and "fsdp" in axes else ()
        if not fsdp and not summed:
            return x
        narrow = dtype is not None and fsdp and jnp.dtype(dtype).itemsize < x.dtype.itemsize
        travel = x.dtype if not narrow or ".".join(names).endswith(FLOAT32_PRODUCTS) else jnp.dtype(dtype)
        dimension = axes.index("fsdp") if fsdp else 0
        return _gather_parameter(dimension, fsdp, summed, travel, x.dtype if wide else travel, x)

    return jax.tree_util.tree_map_with_path(gather, state)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _gather_parameter(dimension, fsdp, summed, travel, dtype, x):
    """Gathers over the axes `fsdp` along a dimension; the gradient is scattered over `fsdp`, summed over `summed`."""
    x = x.astype(travel)
    return (_all_gather(x, fsdp, dimension) if fsdp else x).astype(dtype)


def _gather_parameter_forward(dimension, fsdp, summed, travel, dtype, x):
    # The residual is empty: it only carries the dtype of `x`.
    return _gather_parameter(dimension, fsdp, summed, travel, dtype, x), x.ravel()[:0]


def _gather_parameter_backward(dimension, fsdp, summed, travel, dtype, like, d):
    d = d.astype(jnp.float32)
    if fsdp:
        d = jax.lax.psum_scatter(d, fsdp, scatter_dimension=dimension, tiled=True)
    return ((jax.lax.psum(d, summed) if summed else d).astype(like.dtype),)


_gather_parameter.defvjp(_gather_parameter_forward, _gather_parameter_backward)


def exchange_columns(look_up: Callable[[Array], Array], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Looks up this shard's tokens in a table whose columns are fully sharded, and so need not be gathered.

    The tokens of all n shards come here (all-gather), `look_up` gives this shard's D / n columns of them, and columns
    are exchanged for tokens (all-to-all). The gradient is exchanged back: `look_up` gets that by its columns of all
    tokens, so the table's gradient needs no sum over the shards that were exchanged with.

    Args:
      look_up: gives this shard's columns [B', T, D / n] of any tokens [B', T].
      tokens: this shard's.

    Returns:
      All columns of this shard's tokens.
    """
    axes = mesh_axes("fsdp")
    if not axes:
        return look_up(tokens)
    columns = look_up(jax.lax.all_gather(tokens, axes, axis=0, tiled=True))
    return jax.lax.all_to_all(columns, axes, split_axis=0, concat_axis=2, tiled=True)


def _all_gather(x, axes, dimension):
    """Gathers along a dimension; FP8 goes as plain bytes, which not all backends exchange otherwise."""
    if x.dtype.itemsize == 1:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint8)
        gathered = jax.lax.all_gather(bits, axes, axis=dimension, tiled=True)
        return jax.lax.bitcast_convert_type(gathered, x.dtype)
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
