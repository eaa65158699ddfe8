"""Batches of which each process reads its own rows and places alone."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsa_jax.parallel.sharding import shards, spec, zigzag_order
from train.data.batch import TOKEN_FIELDS, Batch

type Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """Says which part of a batch a shard holds: rows, and runs of places in the order in which it holds them."""

    rows: range
    places: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class BatchParts:
    """Holds the parts of one batch that this process's devices need."""

    parts: Mapping[Part, Batch]
    layout: "BatchLayout"

    def place(self) -> Batch:
        """Puts the parts onto their devices: the batch [B, T], sharded, its sequence in zigzag order."""

        def place(name: str) -> jax.Array:
            read = lambda index: getattr(self.parts[self.layout.part(index)], name)  # noqa: E731
            return jax.make_array_from_callback(self.layout.shape, self.layout.sharding, read)

        arrays: dict[str, Any] = {name: place(name) for name in TOKEN_FIELDS}
        return Batch(**arrays)


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """Says how a batch [B, T] lies on a mesh."""

    shape: tuple[int, int]
    sharding: NamedSharding
    order: np.ndarray  # [T], the natural places in the order of the shards

    @classmethod
    def of(cls, mesh: Mesh, *, batch_size: int, seq_len: int) -> "BatchLayout":
        """Takes the layout of `dsa_jax.parallel.sharding.place_batch`."""
        order = zigzag_order(seq_len, shards(mesh, "sequence"))
        return cls((batch_size, seq_len), NamedSharding(mesh, spec("batch", "sequence")), order)

    def own_parts(self) -> tuple[Part, ...]:
        """Lists the different parts that the devices of this process hold; replicas are one."""
        indices = self.sharding.addressable_devices_indices_map(self.shape).values()
        return tuple(dict.fromkeys(self.part(index) for index in indices if index is not None))

    def part(self, index: Index) -> Part:
        """Finds the rows and places of a device's part of the array."""
        rows, columns = (range(*each.indices(size)) for each, size in zip(index, self.shape, strict=True))
        return Part(rows, runs_of(self.order[columns.start : columns.stop]))


def runs_of(places: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Splits numbers into runs of consecutive ones, each from its first to behind its last.

    Examples:
      >>> runs_of(np.array([0, 1, 6, 7]))
      ((0, 2), (6, 8))
    """
    runs: Sequence[np.ndarray] = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return tuple((int(run[0]), int(run[-1]) + 1) for run in runs)
