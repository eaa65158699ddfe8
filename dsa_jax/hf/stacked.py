"""Fills stacked parameters in place, on one device or on a mesh, and reads them back one tensor at a time.

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

from dsa_jax.quantization import round_to_bfloat16

type Part = tuple[slice, ...]  # of an array, a slice a dimension


class Piece(NamedTuple):
    """A part of a tensor as a file has it; FP8 comes with its blocks' scales."""

    values: Any  # the parameter's dimensions, the inputs of a matrix last instead of first
    scale: Any = None  # float32 [A, B], one a block, for FP8 alone
    row_blocks: Any = None  # int32: the block, in [0, A), of each row of `values` as a matrix
    column_blocks: Any = None  # int32: the block, in [0, B), of each column


class Stack:
    """A parameter that is filled in place, a tensor at a time, zero at first."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: Sharding | None = None):
        """Makes room on those devices of the sharding that are this process's; on the default device if None."""
        self.shape, self.sharding = shape, sharding
        whole = (slice(None),) * len(shape)
        parts = {None: whole} if sharding is None else sharding.addressable_devices_indices_map(shape)
        self._parts = {device: _bounded(part or (), shape) for device, part in parts.items()}
        sizes = {device: [index.stop - index.start for index in part] for device, part in self._parts.items()}
        self._arrays = {device: jnp.zeros(size, dtype, device=device) for device, size in sizes.items()}

    def place(self, index: tuple[int, ...], read: Callable[[Part], Piece], *, inputs: int = 0) -> None:
        """Writes the tensor at `index` of the leading dimensions, on the devices that hold it.

        Beside the parameter one piece is in memory, and its copy on one device.

        Args:
          index: the tensor's numbers in the leading dimensions: its layer, its expert.
          read: gives a part of the tensor, by slices of the parameter's other dimensions. Called once a part.
          inputs: how many of these dimensions are inputs of a matrix, which pieces have last.
        """
        holders: dict[Part, list[tuple[Any, tuple[int, ...]]]] = {}
        for device, device_part in self._parts.items():
            found = _find(device_part, index)
            if found is not None:
                holders.setdefault(found[1], []).append((device, found[0]))
        for part, places in holders.items():
            self._write(read(part), places, inputs)

    def _write(self, piece, places, inputs):
        """Writes a piece at (device, index) places, one device after the other."""
        for device, index in places:
            x = _place(self._arrays[device], jax.device_put(piece, device), index, inputs=inputs)
            self._arrays[device] = x
            x.block_until_ready()  # copies run ahead otherwise, and fill the memory with pieces that wait

    def array(self) -> jax.Array:
        """Gives the parameter; nothing may be placed after this."""
        arrays = list(self._arrays.values())
        if self.sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def is_sharded(x: Any) -> bool:
    """Tells whether this is an array on several devices; what a trace holds is none."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and len(x.sharding.device_set) > 1


def tensor_at(x: Any, index: tuple[int, ...]) -> Any:
    """Takes the tensor at `index` out of a stacked parameter; of a sharded one it is put together on the host.

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


def _bounded(part: tuple[slice, ...], shape: tuple[int, ...]) -> Part:
    """Gives slices both their bounds."""
    return tuple(slice(*index.indices(size)[:2]) for index, size in zip(part, shape, strict=True))


def _find(device_part: Part, index: tuple[int, ...]) -> tuple[tuple[int, ...], Part] | None:
    """Finds where a device that holds this part of a parameter has the tensor at `index`, and which part of it.

    None if it has nothing of it.
    """
    leading, part = device_part[: len(index)], device_part[len(index) :]
    if not all(layers.start <= i < layers.stop for i, layers in zip(index, leading, strict=True)):
        return None
    return tuple(i - layers.start for i, layers in zip(index, leading, strict=True)), part


@functools.partial(jax.jit, donate_argnums=0, static_argnames="inputs")
def _place(x, piece, index, *, inputs):
    """Writes a piece at `index` of a device's part of a parameter, in place: the argument is donated."""
    values = piece.values
    if piece.scale is not None:
        wide = values.reshape(len(piece.row_blocks), -1).astype(jnp.float32)
        wide = wide * piece.scale[piece.row_blocks[:, None], piece.column_blocks]
        values = round_to_bfloat16(wide).astype(jnp.bfloat16).reshape(values.shape)
    outputs = values.ndim - inputs
    values = values.transpose(*range(outputs, values.ndim), *range(outputs))
    block = values.reshape((1,) * len(index) + values.shape).astype(x.dtype)
    return jax.lax.dynamic_update_slice(x, block, (*index, *(0 for _ in values.shape)))


@jax.jit
def _take(x, index):
    return x[index]
