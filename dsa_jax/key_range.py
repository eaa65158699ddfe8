"""The range of keys that each query may reach: the only mask of the library."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyRange:
    """The keys s that query t of batch row b may reach: `start[b, t] <= s < stop[b, t]`; an empty range is legal.

    One interval a query covers causal attention, packed documents, padding, a cache offset and a context shard.

    Attributes:
      start: int32 [B, T]. No shape is checked here: under `vmap` and `eval_shape` leaves are anything.
      stop: int32 [B, T].

    Examples:
      >>> KeyRange.causal(1, 3).mask(3).astype(int)[0].tolist()
      [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    start: Array
    stop: Array

    @classmethod
    def causal(cls, batch: int, length: int, *, offset: int | Int[Array, " B"] = 0) -> Self:
        """Makes the causal range: query t reaches the keys 0 … offset + t.

        Args:
          batch: B.
          length: T.
          offset: the number of keys that precede the first query, of all rows or of each, as a cache holds them.

        Raises:
          ValueError: if length or a number as offset is negative.
        """
        if length < 0 or isinstance(offset, int) and offset < 0:
            raise ValueError(f"length and offset must be at least 0, got {length} and {offset}")
        offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batch,))
        stop = offset[:, None] + jnp.arange(1, length + 1, dtype=jnp.int32)
        return cls(jnp.zeros_like(stop), stop)

    @classmethod
    def packed(cls, segment_ids: Int[Array, "B T"]) -> Self:
        """Makes the range of packed documents: causal inside each run of equal `segment_ids`.

        A query of negative id is padding and reaches nothing; 0 is the id of a document like any other.

        Examples:
          >>> KeyRange.packed(jnp.array([[7, 7, 8, -1]])).start.tolist()
          [[0, 0, 2, 3]]
        """
        segment_ids = jnp.asarray(segment_ids)
        if segment_ids.ndim != 2 or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(f"segment_ids must be integers [B, T], got {segment_ids.dtype} {list(segment_ids.shape)}")
        position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
        first = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
        start = jax.lax.cummax(jnp.where(first, position, 0), axis=1)
        return cls(start, jnp.where(segment_ids < 0, start, position + 1))

    @classmethod
    def lengths(cls, lengths: Int[Array, " B"], length: int) -> Self:
        """Makes the range of right-padded rows of `length` tokens: causal over the first `lengths[b]`."""
        lengths = jnp.asarray(lengths)
        if lengths.ndim != 1 or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"lengths must be integers [B], got {lengths.dtype} {list(lengths.shape)}")
        causal = cls.causal(lengths.shape[0], length)
        return cls(causal.start, jnp.where(causal.stop > lengths[:, None], 0, causal.stop))

    def mask(self, size: int) -> Bool[Array, "*rows S"]:
        """Returns the range as a boolean matrix over `size` keys: for blocks and tests, never for a long sequence."""
        return self.contains(jnp.arange(size, dtype=jnp.int32))

    def contains(self, keys: Int[Array, " S"]) -> Bool[Array, "*rows S"]:
        """Tells for each query whether it may reach each of the key positions `keys`."""
        return (self.start[..., None] <= keys) & (keys < self.stop[..., None])

    def nonempty(self) -> Bool[Array, "*rows T"]:
        """Tells for each query whether it reaches any key; the others are padding."""
        return self.start < self.stop

    def reached(self, size: int) -> Bool[Array, "B S"]:
        """Tells for each of `size` keys whether any query of its batch row reaches it; linear in T + S."""
        start, stop = (jnp.clip(edge, 0, size) for edge in (self.start, jnp.maximum(self.start, self.stop)))
        rows = jnp.arange(start.shape[0])[:, None]
        edges = jnp.zeros((start.shape[0], size + 1), jnp.int32).at[rows, start].add(1).at[rows, stop].add(-1)
        return jnp.cumsum(edges, axis=1)[:, :size] > 0


def check_keys(keys: KeyRange, batch: int, length: int) -> None:
    """Raises ValueError unless `keys` is a key range of one interval for each of `batch` × `length` queries."""
    if not isinstance(keys, KeyRange):
        shape = f" of shape {list(keys.shape)}" if hasattr(keys, "shape") else ""
        raise ValueError(
            f"keys must be a KeyRange, made by KeyRange.causal, packed or lengths, got {type(keys).__name__}{shape}"
        )
    if keys.start.shape != (batch, length) or keys.stop.shape != (batch, length):
        raise ValueError(
            f"keys must hold start and stop of shape [{batch}, {length}], one for each query, "
            f"got {keys.start.shape} and {keys.stop.shape}"
        )
    if not all(jnp.issubdtype(edge.dtype, jnp.integer) for edge in (keys.start, keys.stop)):
        raise ValueError(f"keys must hold integers, got {keys.start.dtype} and {keys.stop.dtype}")
