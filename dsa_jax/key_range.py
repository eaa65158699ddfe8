"""Which keys each query may reach: the only mask of the library."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyRange:
    """Query t of batch row b may reach the keys `start[b, t] <= s < stop[b, t]`; an empty range is legal.

    One interval a query covers causal attention, packed documents, padding, a cache offset and a context shard.
    `start` and `stop` are int32 [B, T]. No shape is checked here: under `vmap` and `eval_shape` leaves are anything.
    """

    start: Array
    stop: Array

    @classmethod
    def causal(cls, batch: int, length: int, *, offset: int | Int[Array, " B"] = 0) -> Self:
        """Query t reaches keys 0 … offset + t; `offset` is the number of keys that precede the first query."""
        offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batch,))
        stop = offset[:, None] + jnp.arange(1, length + 1, dtype=jnp.int32)
        return cls(jnp.zeros_like(stop), stop)

    @classmethod
    def packed(cls, segment_ids: Int[Array, "B T"]) -> Self:
        """Causal inside each run of equal `segment_ids`; a query of negative id is padding, it reaches nothing."""
        segment_ids = jnp.asarray(segment_ids)
        position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
        first = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
        start = jax.lax.cummax(jnp.where(first, position, 0), axis=1)
        return cls(start, jnp.where(segment_ids < 0, start, position + 1))

    @classmethod
    def lengths(cls, lengths: Int[Array, " B"], length: int) -> Self:
        """Causal over right-padded rows of `length` tokens, of which the first `lengths[b]` are real."""
        lengths = jnp.asarray(lengths, jnp.int32)
        causal = cls.causal(lengths.shape[0], length)
        return cls(causal.start, jnp.where(causal.stop > lengths[:, None], 0, causal.stop))

    def mask(self, size: int) -> Bool[Array, "*rows S"]:
        """The range as a boolean matrix over `size` keys: for blocks and tests, never for a whole long sequence."""
        return self.contains(jnp.arange(size, dtype=jnp.int32))

    def contains(self, keys: Int[Array, " S"]) -> Bool[Array, "*rows S"]:
        """Whether each query may reach each of the key positions `keys`."""
        return (self.start[..., None] <= keys) & (keys < self.stop[..., None])

    def nonempty(self) -> Bool[Array, "B T"]:
        """Whether a query reaches any key; the others are padding."""
        return self.start < self.stop

    def reached(self, size: int) -> Bool[Array, "B S"]:
        """Whether any query of the batch row reaches each of `size` keys; linear in T + S."""
        start, stop = (jnp.clip(edge, 0, size) for edge in (self.start, jnp.maximum(self.start, self.stop)))
        rows = jnp.arange(start.shape[0])[:, None]
        edges = jnp.zeros((start.shape[0], size + 1), jnp.int32).at[rows, start].add(1).at[rows, stop].add(-1)
        return jnp.cumsum(edges, axis=1)[:, :size] > 0
