"""Stacked parameters on one device or on a mesh, filled in place and read back one tensor at a time.

Each device is served by itself, one after the other, by programs of its own: only what it holds of a tensor goes there,
nothing is gathered, and a process serves its own devices alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Sharding

type Part = tuple[slice, ...]


class Piece(NamedTuple):
    """A part of a tensor as a file has it; FP8 comes with float32 scales [A, B] and the block of each row and column.

    The dimensions of `values` are those of the parameter, the inputs of a matrix last instead of first.
    """

    values: Any
    scale: Any = None
    row_blocks: Any = None
    column_blocks: Any = None


class Stack:
    """A parameter that is filled in place, a tensor at a time, zero at first."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: Sharding | None = None):
        """Makes room on the devices of this process among the sharding's, or on the default device."""
        self.shape, self.sharding = shape, sharding
        whole = (slice(None),) * len(shape)
        held = {None: whole} if sharding is None else sharding.addressable_devices_indices_map(shape)
        self._held = {device: _bounded(index or (), shape) for device, index in held.items()}
        sizes = {device: [part.stop - part.start for part in index] for device, index in self._held.items()}
        self._arrays = {device: jnp.zeros(size, dtype, device=device) for device, size in sizes.items()}

    def place(self, index: tuple[int, ...], read: Callable[[Part], Piece], *, inputs: int = 0) -> None:
        """Writes the tensor at `index` of the leading dimensions, on the devices that hold it.

        Beside the parameter one piece is in memory, and its copy on one device.

        Args:
          index: where the tensor stands.
          read: gives a part of the tensor, by slices of the parameter's other dimensions. Called once a part.
          inputs: how many of these dimensions are inputs of a matrix, which pieces have last.
        """
        holders: dict[Part, list[tuple[Any, tuple[int, ...]]]] = {}
        for device, held in self._held.items():
            found = _find(held, index)
            if found is not None:
                holders.setdefault(found[1], []).append((device, found[0]))
        for part, places in holders.items():
            self._write(read(part), places, inputs)

    def _write(self, piece, places, inputs):
        for device, index in places:
            x = _place(self._arrays[device], jax.device_put(piece, device), index, inputs=inputs)
            self._arrays[device] = x
            x.block_until_ready()  # copies run ahead otherwise, and fill the memory with pieces that wait

    def array(self) -> jax.Array:
        """The parameter; nothing may be placed after this."""
        arrays = list(self._arrays.values())
        if self.sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def is_sharded(x: Any) -> bool:
    """Whether this is an array on several devices; what a trace holds is none."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and len(x.sharding.device_set) > 1


def tensor_at(x: Any, index: tuple[int, ...]) -> Any:
    """The tensor at `index` of a stacked parameter; of a sharded one it is put together on the host.

    Every shard must be in this process. Each device slices what it holds before that is copied; nothing is gathered.
    """
    if not is_sharded(x):
        return x[index]
    tensor = np.empty(x.shape[len(index) :], x.dtype)
    for shard in x.addressable_shards:
        found = _find(_bounded(shard.index, x.shape), index)
        if found is not None and shard.replica_id == 0:
            local, part = found
            tensor[part] = _take(shard.data, local) if local else shard.data
    return tensor


def _bounded(index: tuple[slice, ...], shape: tuple[int, ...]) -> Part:
    """Slices with both their bounds."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _find(held: Part, index: tuple[int, ...]) -> tuple[tuple[int, ...], Part] | None:
    """Where a shard that holds these slices has the tensor at `index`, and which part of it; None if not at all."""
    leading, part = held[: len(index)], held[len(index) :]
    if not all(each.start <= i < each.stop for i, each in zip(index, leading, strict=True)):
        return None
    return tuple(i - each.start for i, each in zip(index, leading, strict=True)), part


@functools.partial(jax.jit, donate_argnums=0, static_argnames="inputs")
def _place(x, piece, index, *, inputs):
    """Writes a piece at `index` of a device's part of a parameter, in place: the argument is donated."""
    values = piece.values
    if piece.scale is not None:
        wide = values.reshape(len(piece.row_blocks), -1).astype(jnp.float32)
        wide = wide * piece.scale[piece.row_blocks[:, None], piece.column_blocks]
        # A mere cast to bfloat16 may be left out where float32 is wanted in the end.
        wide = jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
        values = wide.astype(jnp.bfloat16).reshape(values.shape)
    outputs = values.ndim - inputs
    values = values.transpose(*range(outputs, values.ndim), *range(outputs))
    block = values.reshape((1,) * len(index) + values.shape).astype(x.dtype)
    return jax.lax.dynamic_update_slice(x, block, (*index, *(0 for _ in values.shape)))


@jax.jit
def _take(x, index):
    return x[index]
