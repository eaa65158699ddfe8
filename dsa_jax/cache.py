"""What layers write their keys to and read them from: the contiguous cache, and the pages of many sequences.

A cache takes the new tokens' entries (`write`) and gives one layer's keys (`layer`), which select and attend. Layers
know no more of it than that. Without a cache they make the keys of their own tokens, a `LayerKeys` too.
"""

import dataclasses
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsa_jax import paged
from dsa_jax.attention import sparse_attention
from dsa_jax.cache_shapes import cached_layers
from dsa_jax.config import Config
from dsa_jax.indexer import index_scores
from dsa_jax.key_range import KeyRange
from dsa_jax.parallel.collectives import combine_attention, gather_candidates, num_shards, shard_index
from dsa_jax.quantization import quantize
from dsa_jax.selection import select_keys, select_topk

Layer = Array | int  # the number of a layer; of its indexer among all indexers, where layers share selections


@runtime_checkable
class KeyStore(Protocol):
    """Holds the keys of one layer: scores them, selects of them, attends to them, and gives them whole."""

    @property
    def size(self) -> int:
        """The number of positions of a row."""
        ...

    def score(self, q_index: Array, weights: Array, keys: KeyRange) -> Array:
        """Scores as `index_scores` does."""
        ...

    def select(self, q_index: Array, weights: Array, keys: KeyRange, *, k: int) -> Array:
        """Selects as `select_keys` does."""
        ...

    def attend(self, q: Array, indices: Array, *, value_dim: int, scale: float) -> tuple[Array, Array]:
        """Attends as `sparse_attention` does."""
        ...

    def read(self, dtype: DTypeLike) -> tuple[Array, Any, Any]:
        """Gives the latents in `dtype`, the index keys and their scales, by position; None where there are none."""
        ...

    def gather(self, positions: Array, dtype: DTypeLike) -> Array:
        """Gives the latents [B, M, C + R] at positions [B, M] in `dtype`; of what is no position, any."""
        ...

    def compressed(self, dtype: DTypeLike) -> Array:
        """Gives the compressed entries in `dtype`, by the stride whose last key completes each."""
        ...


@runtime_checkable
class AnyCache(Protocol):
    """Takes the entries of new tokens and gives the keys of a layer; never mutated, so a write returns another."""

    @property
    def size(self) -> int:
        """The number of tokens that a row can hold."""
        ...

    @property
    def lengths(self) -> Array | None:
        """The tokens that each row holds, int32 [B], if the cache counts them."""
        ...

    def write(self, layer: Layer, kv: Array, k_index: Array | None, indexer: Layer | None = None) -> Self:
        """Writes the entries of T new tokens of one layer, whose indexer has the number `indexer`, `layer` if None.

        A layer without an indexer has no index keys: None.
        """
        ...

    def positions(self, keys: KeyRange) -> Array:
        """Gives the positions [B, T] of the tokens that are written next, of these ranges; -1 for none."""
        ...

    def write_compressed(self, layer: Layer, strides: Array, entries: Array) -> Self:
        """Writes compressed entries [B, M, C + R] of one layer at the strides [B, M] that complete them; -1 is none."""
        ...

    def layer(self, layer: Layer, indexer: Layer | None = None) -> KeyStore:
        """Gives the keys of one layer, with the index keys of the indexer that selects for it."""
        ...

    def advance(self, tokens: Array) -> Self:
        """Counts the new tokens of each row, once all layers have written them."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKeys:
    """Holds one layer's keys side by side: latents [B, S, C + R], index keys [B, S, E] and their scales [B, S].

    A layer that reuses a selection may lack the latter two; it can then attend, but not select. One that selects by
    compressed entries has these in place of index keys, [B, S / stride, C + R].
    """

    kv: Array
    k_index: Any
    k_scale: Any

    @property
    def size(self) -> int:
        """The number of positions of a row."""
        return self.kv.shape[1]

    def score(self, q_index, weights, keys):
        """Scores as `index_scores` does."""
        return index_scores(q_index, self.k_index, weights, keys, k_scale=self.k_scale)

    def select(self, q_index, weights, keys, *, k):
        """Selects as `select_keys` does."""
        return select_keys(q_index, self.k_index, weights, keys, k=k, k_scale=self.k_scale)

    def attend(self, q, indices, *, value_dim, scale):
        """Attends as `sparse_attention` does."""
        return sparse_attention(q, self.kv, indices, value_dim=value_dim, scale=scale)

    def read(self, dtype):
        """Gives the latents, the index keys and their scales."""
        return self.kv.astype(dtype), self.k_index, self.k_scale

    def gather(self, positions, dtype):
        """Gives the latents at positions."""
        return jnp.take_along_axis(self.kv, positions[..., None], axis=1, mode="clip").astype(dtype)

    def compressed(self, dtype):
        """Gives the compressed entries."""
        return self.k_index.astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Holds latents, index keys and lengths of a batch of sequences; never mutated: the model returns a new one.

    Attributes:
      kv: latents [layers, B, S, C + R], of which row b holds the first `lengths[b]` tokens. Those of prediction layers
        may stand behind the model's own.
      k_index: index keys [indexers, B, S, E], of the layers that have an indexer; e4m3 under `index_fp8`. Under
        baseline "nsa" compressed entries [layers, B, S / stride, C + R].
      k_scale: float32 [indexers, B, S], the scale of each index key; 1 without `index_fp8`. Entries have none.
      lengths: int32 [B], the tokens that each row holds.

    Examples:
      >>> cache = Cache.empty(model.config, batch=1, size=64)
      >>> cache = model(tokens, cache=cache).cache
    """

    kv: Array
    k_index: Array
    k_scale: Array
    lengths: Array

    @classmethod
    def empty(cls, config: Config, batch: int, size: int, *, predicting: bool = False) -> Self:
        """Makes an empty cache for `batch` sequences of at most `size` tokens.

        Args:
          config: the model's.
          batch: B.
          size: S.
          predicting: whether there is room for the entries of prediction layers, for `Transformer.predict`.

        Raises:
          ValueError: if a size is below 1, or `size` exceeds the model's positions.
        """
        if batch < 1 or size < 1:
            raise ValueError(f"a cache needs at least one row and one token, got batch {batch} and size {size}")
        if size > config.max_position_embeddings:
            raise ValueError(
                f"a cache holds at most max_position_embeddings = {config.max_position_embeddings} tokens, got {size}"
            )
        layers, indexers = cached_layers(config, predicting)
        index = batch, size, config.index_head_dim
        index_dtype = jnp.float8_e4m3fn if config.index_fp8 else config.dtype
        if config.baseline == "nsa":  # at least one entry, if one that nobody reaches
            strides = max(size, config.nsa.compression) // config.nsa.stride
            index, index_dtype = (batch, strides, config.latent_dim), config.dtype
        return cls(
            kv=jnp.zeros((layers, batch, size, config.latent_dim), config.dtype),
            k_index=jnp.zeros((indexers, *index), index_dtype),
            k_scale=jnp.ones((config.num_index_layers and indexers, batch, size), jnp.float32),
            lengths=jnp.zeros(batch, jnp.int32),
        )

    @property
    def size(self) -> int:
        """The number of tokens that a row can hold."""
        return self.kv.shape[2]

    def write(
        self,
        layer: Layer,
        kv: Float[Array, "B T H"],
        k_index: Float[Array, "B T E"] | None,
        indexer: Layer | None = None,
    ) -> Self:
        """Writes the entries of T new tokens behind the `lengths` of one layer; what does not fit is dropped.

        Index keys are rounded by `quantize` where the cache is FP8.
        """
        rows = jnp.arange(kv.shape[0])[:, None]
        at = self.lengths[:, None] + jnp.arange(kv.shape[1])
        written = dataclasses.replace(self, kv=self.kv.at[layer, rows, at].set(kv, mode="drop"))
        if k_index is None:
            return written
        indexer = layer if indexer is None else indexer
        k_scale = jnp.ones(k_index.shape[:2], jnp.float32)
        if self.k_index.dtype.itemsize == 1:
            k_index, k_scale = quantize(k_index)
        return dataclasses.replace(
            written,
            k_index=self.k_index.at[indexer, rows, at].set(k_index, mode="drop"),
            k_scale=self.k_scale.at[indexer, rows, at].set(k_scale, mode="drop"),
        )

    def layer(self, layer: Layer, indexer: Layer | None = None) -> LayerKeys:
        """Gives the keys of one layer."""
        if not self.k_index.shape[0]:
            return LayerKeys(self.kv[layer], None, None)
        indexer = layer if indexer is None else indexer
        k_scale = self.k_scale[indexer] if self.k_scale.shape[0] else None
        return LayerKeys(self.kv[layer], self.k_index[indexer], k_scale)

    def positions(self, keys: KeyRange) -> Int[Array, "B T"]:
        """Gives the positions of the T tokens that are written next: behind the `lengths`, padding too."""
        return self.lengths[:, None] + jnp.arange(keys.stop.shape[1], dtype=jnp.int32)

    def write_compressed(self, layer: Layer, strides: Int[Array, "B M"], entries: Float[Array, "B M H"]) -> Self:
        """Writes compressed entries of one layer at the strides that complete them; what does not fit is dropped."""
        rows, size = jnp.arange(entries.shape[0])[:, None], self.k_index.shape[2]
        at = jnp.where(strides < 0, size, strides)
        return dataclasses.replace(self, k_index=self.k_index.at[layer, rows, at].set(entries, mode="drop"))

    def advance(self, tokens: Int[Array, " B"]) -> Self:
        """Counts the new tokens of each row, once all layers have written them."""
        return dataclasses.replace(self, lengths=self.lengths + tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Holds pages of latents and index keys, the rows' tables, and the slots of the tokens that come next.

    The formats are those of `dsa_jax.paged`. A row may be one sequence, or several one after the other, each in pages
    of its own: the key range says which positions of the row a query reaches.

    On a mesh that shards pages, a row's pages are dealt out in turn: shard i of n has the pages i, i + n, …, and its
    table lists them. Selections are positions of the row all the same: each shard selects of its own keys, the best of
    all are found among these, and the shards' attention is summed.

    Attributes:
      latents: [layers, n, 64, C + R], or uint8 [layers, n, 64, bytes].
      index_keys: [indexers, n, 64, E], or e4m3 [indexers, n, 64 + 256 / E, E]: of the layers that have an indexer.
        Under baseline "nsa" compressed entries in the format of latents, [layers, n, 64 / stride, …]: each in the page
        of its last key, so that a page holds nothing of the tokens behind it.
      table: int32 [B, P], the pages of each row.
      slots: int32 [B, T], where the T tokens of the next call are written; -1 writes nothing.
      value_dim: C.
    """

    latents: Array
    index_keys: Array
    table: Array
    slots: Array
    value_dim: int = dataclasses.field(metadata=dict(static=True))

    lengths = None  # nobody counts here: the next slots come from outside

    @property
    def size(self) -> int:
        """The number of tokens that a row can hold."""
        return self.table.shape[1] * paged.PAGE * num_shards("pages")

    @classmethod
    def at(cls, latents: Array, index_keys: Array, table: Int[Array, "B P"], keys: KeyRange, *, value_dim: int) -> Self:
        """Makes pages whose next tokens are written where each stands: at the last position that it reaches.

        A token with an empty range is padding and is not written.
        """
        positions = _last_in_reach(keys)
        if num_shards("pages") > 1:
            positions = _own_positions(positions)
        return cls(latents, index_keys, table, paged.to_slots(positions, table), value_dim)

    def positions(self, keys: KeyRange) -> Int[Array, "B T"]:
        """Gives the positions of the T tokens that are written next, as `at` does; -1 for padding."""
        return _last_in_reach(keys)

    def write(
        self,
        layer: Layer,
        kv: Float[Array, "B T H"],
        k_index: Float[Array, "B T E"] | None,
        indexer: Layer | None = None,
    ) -> Self:
        """Writes the entries of T new tokens of one layer to their slots."""
        kv, value_dim = kv.reshape(-1, kv.shape[-1]), self.value_dim
        flat = lambda pool: pool.reshape(-1, *pool.shape[2:])  # noqa: E731
        pools = flat(self.latents), flat(self.index_keys)
        if k_index is None:
            latents, index_keys = (
                paged.write_latents(pools[0], self._slots_of(layer), kv, value_dim=value_dim),
                pools[1],
            )
        elif indexer is None:
            k_index = k_index.reshape(-1, k_index.shape[-1])
            latents, index_keys = paged.write_entries(*pools, self._slots_of(layer), kv, k_index, value_dim=value_dim)
        else:  # of other numbers, and so at other slots
            latents = paged.write_latents(pools[0], self._slots_of(layer), kv, value_dim=value_dim)
            k_index = k_index.reshape(-1, k_index.shape[-1])
            index_keys = paged.write_index_keys(pools[1], self._slots_of(indexer), k_index)
        return dataclasses.replace(
            self,
            latents=latents.reshape(self.latents.shape),
            index_keys=index_keys.reshape(self.index_keys.shape),
        )

    def write_compressed(self, layer: Layer, strides: Int[Array, "B M"], entries: Float[Array, "B M H"]) -> Self:
        """Writes compressed entries of one layer at the strides that complete them, in the pages of these."""
        rows, pool = self.index_keys.shape[2], self.index_keys.reshape(-1, *self.index_keys.shape[2:])
        slots = self._in_layer(layer, paged.to_slots(strides, self.table, rows=rows), rows)
        flat = entries.reshape(-1, entries.shape[-1])
        pool = paged.write_latents(pool, slots, flat, value_dim=self.value_dim)
        return dataclasses.replace(self, index_keys=pool.reshape(self.index_keys.shape))

    def _slots_of(self, layer: Layer) -> Int[Array, " M"]:
        """Gives the slots of the next tokens in the pages of all layers side by side; -1 stays."""
        return self._in_layer(layer, self.slots, paged.PAGE)

    def _in_layer(self, layer: Layer, slots: Int[Array, "B M"], rows: int) -> Int[Array, " M2"]:
        """Turns slots of pages of so many rows into those in the pages of all layers side by side; -1 stays."""
        size, slots = self.latents.shape[1] * rows, slots.reshape(-1)
        return jnp.where((slots >= 0) & (slots < size), slots + layer * size, -1)

    def layer(self, layer: Layer, indexer: Layer | None = None) -> "LayerPages":
        """Gives the keys of one layer: the pages of all layers side by side, and a table into these."""
        pages = self.latents.shape[1]
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        own = jnp.clip(self.table, 0, pages - 1)
        table = own + layer * pages
        index_table = None if indexer is None else own + indexer * pages
        return LayerPages(flat(self.latents), flat(self.index_keys), table, self.value_dim, index_table)

    def advance(self, tokens: Any) -> Self:
        """Returns the same pages: whoever holds the tables counts."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerPages:
    """Holds one layer's keys in pages: pools [n, 64, W] and [n, rows, E], and the table [B, P] of each row's pages.

    Where not every layer has index keys these have a table of their own, `index_table`.
    """

    latents: Array
    index_keys: Array
    table: Array
    value_dim: int = dataclasses.field(metadata=dict(static=True))
    index_table: Array | None = None

    @property
    def _index_table(self) -> Array:
        return self.table if self.index_table is None else self.index_table

    @property
    def size(self) -> int:
        """The number of positions of a row."""
        return self.table.shape[1] * paged.PAGE * num_shards("pages")

    def score(self, q_index, weights, keys):
        """Scores as `index_scores` does, where one shard has all keys."""
        if num_shards("pages") > 1:
            raise ValueError("where pages are sharded, no shard has all scores: baseline must be 'none'")
        return paged.paged_index_scores(q_index, self.index_keys, weights, self._index_table, keys)

    def select(self, q_index, weights, keys, *, k):
        """Selects as `select_keys` does, of all shards' keys."""
        if num_shards("pages") == 1:
            return paged.paged_select_keys(q_index, self.index_keys, weights, self._index_table, keys, k=k)
        own = KeyRange(_own_below(keys.start), _own_below(keys.stop))
        scores = paged.paged_index_scores(q_index, self.index_keys, weights, self._index_table, own)
        best = select_topk(scores, min(k, scores.shape[-1]), keys=own)
        scores = jnp.take_along_axis(scores, jnp.maximum(best, 0), axis=-1)
        return _best_of_all(jnp.where(best < 0, -jnp.inf, scores), _row_positions(best), k)

    def attend(self, q, indices, *, value_dim, scale):
        """Attends as `sparse_attention` does, to all shards' keys."""
        if num_shards("pages") > 1:
            indices = _own_positions(indices)
        attended = paged.paged_sparse_attention(q, self.latents, self.table, indices, value_dim=value_dim, scale=scale)
        return combine_attention(*attended, "pages")

    def read(self, dtype):
        """Gathers the latents, the index keys and their scales, where one shard has them all."""
        if num_shards("pages") > 1:
            raise ValueError("where pages are sharded, keys are never gathered: attention must be 'sparse', and no KL")
        latents = paged.read_latents(self.latents, self.table, value_dim=self.value_dim, dtype=dtype)
        if not self.index_keys.shape[0]:
            return latents, None, None
        return latents, *paged.read_index_keys(self.index_keys, self._index_table)

    def gather(self, positions, dtype):
        """Gathers the latents at positions, where one shard has them all."""
        return paged.gather_latents(self.latents, self.table, positions, value_dim=self.value_dim, dtype=dtype)

    def compressed(self, dtype):
        """Gathers the compressed entries, where one shard has them all."""
        return paged.read_latents(self.index_keys, self._index_table, value_dim=self.value_dim, dtype=dtype)


def _last_in_reach(keys):
    """Gives the last position that each query reaches, where it stands itself; -1 for none."""
    return jnp.where(keys.nonempty(), keys.stop - 1, -1)


# Positions of a row whose pages are dealt out, and those of one shard's pages side by side.


def _own_below(position):
    """Counts this shard's positions below a position of the row."""
    page, within = jnp.divmod(jnp.maximum(position, 0), paged.PAGE)
    turn, rest = jnp.divmod(page, num_shards("pages"))
    partial = jnp.where(rest == shard_index("pages"), within, 0)
    return paged.PAGE * (turn + (rest > shard_index("pages"))) + partial


def _row_positions(own):
    """Turns this shard's positions into positions of the row; -1 stays."""
    page, within = jnp.divmod(own, paged.PAGE)
    return jnp.where(own < 0, -1, (page * num_shards("pages") + shard_index("pages")) * paged.PAGE + within)


def _own_positions(positions):
    """Turns positions of the row into this shard's, -1 for those that it does not have."""
    page, within = jnp.divmod(positions, paged.PAGE)
    turn, rest = jnp.divmod(page, num_shards("pages"))
    mine = (positions >= 0) & (rest == shard_index("pages"))
    return jnp.where(mine, turn * paged.PAGE + within, -1)


def _best_of_all(scores, positions, k):
    """Selects the best of all shards' candidates, canonically: sorted by position, the lowest wins a tie."""
    scores, positions = gather_candidates(scores, "pages"), gather_candidates(positions, "pages")
    order = jnp.argsort(jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions), axis=-1)
    scores, positions = (jnp.take_along_axis(x, order, axis=-1) for x in (scores, positions))
    best = select_topk(scores, k)
    return jnp.where(best < 0, -1, jnp.take_along_axis(positions, jnp.maximum(best, 0), axis=-1))
