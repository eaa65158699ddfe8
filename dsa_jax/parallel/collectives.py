"""Communication between the shards of a model that runs inside `jax.shard_map`, with the gradients it needs.

Every function names a logical axis of `sharding.RULES` and is the identity where that is not split: outside a
`shard_map`, or over mesh axes of size 1. They are made for `check_vma=False` with `jax.grad` taken inside, of a loss
that counts this shard's tokens alone: then `jax.lax.psum` must not be differentiated, so what its transpose would be
is written here, for each use its own.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.parallel.sharding import RULES, parameter_axes, path_names

FLOAT32_USE = ("gate.weight", "indexer.weights_proj")  # products that are float32 whatever the compute dtype


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes, of those larger than 1, over which a logical axis is split here."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in RULES[name] if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def num_shards(name: str) -> int:
    """The number of shards of a logical axis."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in mesh_axes(name))


def shard_index(name: str) -> Int[Array, ""] | int:
    """Which shard of a logical axis this is."""
    axes = mesh_axes(name)
    return jax.lax.axis_index(axes) if axes else 0


def sum_statistics(x: Any, name: str) -> Any:
    """The sum of a tree over the shards, as a constant: counts and statistics."""
    axes = mesh_axes(name)
    return jax.lax.psum(jax.lax.stop_gradient(x), axes) if axes else x


def max_statistics(x: Array, name: str) -> Array:
    """The maximum over the shards, as a constant."""
    axes = mesh_axes(name)
    return jax.lax.pmax(jax.lax.stop_gradient(x), axes) if axes else jax.lax.stop_gradient(x)


def sum_gradients(x: Array, name: str) -> Array:
    """Brings what all shards hold alike to where their parameters differ; the gradient is the sum of theirs."""
    axes = mesh_axes(name)
    return _sum_gradients(axes, x) if axes else x


def sum_shards(x: Array, name: str) -> Array:
    """The sum of the shards' parts, which all shards then hold; the gradient passes as it is."""
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


def slice_tokens(x: Array, name: str) -> Array:
    """This shard's share of the rows [B, T, …] that all hold alike: every n-th, so that causal work is even.

    Their number must be a multiple of the shards. The gradient is that by all rows, again alike on all shards.
    """
    axes = mesh_axes(name)
    return _slice_tokens(axes, x) if axes else x


def gather_tokens(x: Array, name: str) -> Array:
    """All rows again from every shard's share of them: undoes `slice_tokens`. The gradient is the share of theirs."""
    axes = mesh_axes(name)
    return _gather_tokens(axes, x) if axes else x


def heads_to_tokens(x: Array) -> Array:
    """Exchanges this shard's heads of all tokens [B, T, N / n, …] for all heads of some [B, T / n, N, …]."""
    axes = mesh_axes("heads")
    if not axes:
        return x
    x = x.reshape(x.shape[0], -1, jax.lax.axis_size(axes), *x.shape[2:])
    return jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=3, tiled=True)[:, :, 0]


def tokens_to_heads(x: Array) -> Array:
    """Undoes `heads_to_tokens`."""
    axes = mesh_axes("heads")
    if not axes:
        return x
    x = jax.lax.all_to_all(x[:, :, None], axes, split_axis=3, concat_axis=2, tiled=True)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def gather_head_weights(weight: Float[Array, "C N H"]) -> Float[Array, "C N2 H"]:
    """A projection's weight for all heads; gradients, each of its shard's rows alone, are summed in float32."""
    axes = mesh_axes("heads")
    return _gather_parameter(1, axes, (), weight.dtype, weight.dtype, weight) if axes else weight


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slice_tokens(axes, x):
    rows = x.reshape(x.shape[0], -1, jax.lax.axis_size(axes), *x.shape[2:])
    return jax.lax.dynamic_index_in_dim(rows, jax.lax.axis_index(axes), axis=2, keepdims=False)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_tokens(axes, x):
    rows = jax.lax.all_gather(x, axes, axis=2)
    return rows.reshape(x.shape[0], -1, *x.shape[2:])


_slice_tokens.defvjp(lambda axes, x: (_slice_tokens(axes, x), None), lambda axes, _, d: (_gather_tokens(axes, d),))
_gather_tokens.defvjp(lambda axes, x: (_gather_tokens(axes, x), None), lambda axes, _, d: (_slice_tokens(axes, d),))


def gather_sequence(x: Array) -> Array:
    """What all sequence shards hold [B, T / n, …], in natural order [B, T, …].

    Gradients, to which every shard contributes for every key, are summed in float32 on their way back.
    """
    axes = mesh_axes("sequence")
    return _gather_sequence(axes, x) if axes else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_sequence(axes, x):
    count = jax.lax.axis_size(axes)
    x = _all_gather(x, axes, 1)
    halves = x.reshape(x.shape[0], count, 2, -1, *x.shape[2:])
    return jnp.concatenate([halves[:, :, 0], halves[:, ::-1, 1]], axis=1).reshape(x.shape)


def _gather_sequence_backward(axes, like, d):
    count = jax.lax.axis_size(axes)
    chunks = d.astype(jnp.float32).reshape(d.shape[0], 2 * count, -1, *d.shape[2:])
    halves = jnp.stack([chunks[:, :count], chunks[:, count:][:, ::-1]], axis=2).reshape(d.shape)
    return (jax.lax.psum_scatter(halves, axes, scatter_dimension=1, tiled=True).astype(like.dtype),)


_gather_sequence.defvjp(lambda axes, x: (_gather_sequence(axes, x), x[:0]), _gather_sequence_backward)


def gather_parameters(state: Any, *, dtype: Any = None, wide: bool = False, whole: bool = True) -> Any:
    """Parameters as a layer uses them: whole along the dimension that is fully sharded.

    Gradients are summed in float32 over all shards of tokens, and scattered to where the parameter is kept.

    Args:
      state: parameters at the end of their paths in the model's state.
      dtype: what float32 parameters travel in, but for those whose products are in float32; as they are if None.
      wide: whether they come out in their own dtype again, for gradients that are added up on this side.
      whole: False leaves a fully sharded parameter in parts, for one who brings all tokens to the part.
    """

    def gather(path, x):
        names = path_names(path)
        axes = parameter_axes(names, x.ndim)
        taken = {axis for name in axes if name for axis in RULES[name]}
        rest = tuple(axis for axis in mesh_axes("tokens") if axis not in taken)
        fsdp = mesh_axes("fsdp") if whole and "fsdp" in axes else ()
        if not fsdp and not rest:
            return x
        narrow = dtype is not None and fsdp and jnp.dtype(dtype).itemsize < x.dtype.itemsize
        travel = x.dtype if not narrow or ".".join(names).endswith(FLOAT32_USE) else jnp.dtype(dtype)
        dimension = axes.index("fsdp") if fsdp else 0
        return _gather_parameter(dimension, fsdp, rest, travel, x.dtype if wide else travel, x)

    return jax.tree_util.tree_map_with_path(gather, state)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _gather_parameter(dimension, fsdp, rest, travel, dtype, x):
    x = x.astype(travel)
    return (_all_gather(x, fsdp, dimension) if fsdp else x).astype(dtype)


def _gather_parameter_forward(dimension, fsdp, rest, travel, dtype, x):
    return _gather_parameter(dimension, fsdp, rest, travel, dtype, x), x.ravel()[:0]


def _gather_parameter_backward(dimension, fsdp, rest, travel, dtype, like, d):
    d = d.astype(jnp.float32)
    if fsdp:
        d = jax.lax.psum_scatter(d, fsdp, scatter_dimension=dimension, tiled=True)
    return ((jax.lax.psum(d, rest) if rest else d).astype(like.dtype),)


_gather_parameter.defvjp(_gather_parameter_forward, _gather_parameter_backward)


def exchange_columns(look_up: Callable[[Array], Array], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Looks up all columns of this shard's tokens where a table's columns are fully sharded.

    `look_up` gives this shard's columns for any tokens: it is asked for those of all shards, which are then exchanged.
    The table need not be gathered, nor its gradient be summed.
    """
    axes = mesh_axes("fsdp")
    if not axes:
        return look_up(tokens)
    rows = look_up(jax.lax.all_gather(tokens, axes, axis=0, tiled=True))
    return jax.lax.all_to_all(rows, axes, split_axis=0, concat_axis=2, tiled=True)


def _all_gather(x, axes, dimension):
    if x.dtype.itemsize == 1:  # FP8 travels as plain bytes
        bits = jax.lax.bitcast_convert_type(x, jnp.uint8)
        gathered = jax.lax.all_gather(bits, axes, axis=dimension, tiled=True)
        return jax.lax.bitcast_convert_type(gathered, x.dtype)
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
