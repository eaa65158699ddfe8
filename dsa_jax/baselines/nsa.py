"""Native Sparse Attention over MLA's latents: compressed keys, selected blocks and a sliding window, joined by gates.

The paper has grouped-query keys and each branch's keys and values of its own. Here all heads are one group, since they
share one latent a token, and each branch expands the latents by a matrix of its own: a cache holds them once.

References:
  Yuan et al., Native Sparse Attention, arXiv:2502.11089, section 3, whose equations are cited.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsa_jax.attention import check_latents, check_value_dim, join_heads, static_scale, zero_unreached
from dsa_jax.baselines.blocks import keys_of_blocks
from dsa_jax.baselines.spans import span_attention
from dsa_jax.baselines.window import window_selection
from dsa_jax.blockwise import accumulator, map_queries, queries_per_block
from dsa_jax.cache import AnyCache, KeyStore
from dsa_jax.config import Config
from dsa_jax.dense_attention import latent_attention
from dsa_jax.key_range import KeyRange, check_keys
from dsa_jax.layers import Attention, AttentionMaps, LayerOutput, Rotation, SharedIndex, SparseMLA
from dsa_jax.nn import new_weight, project, show_arguments
from dsa_jax.nsa_sizes import NSASizes
from dsa_jax.paged import FEW_QUERIES
from dsa_jax.pallas_kernels import Implementation
from dsa_jax.selection import select_topk

BRANCHES = ("compressed", "selected", "window")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branches:
    """Holds what each branch attends to, [B, T, N, C] in latent form, and the selected blocks int32 [B, T, n]."""

    compressed: Array
    selected: Array
    window: Array
    blocks: Array


def compress_keys(
    kv: Float[Array, "B S H"],
    position: Float[Array, "l C"],
    up: Float[Array, "C U"],
    down: Float[Array, "U C"],
    *,
    sizes: NSASizes,
) -> Float[Array, "B M H"]:
    """Compresses the `compression` keys from every `stride`-th position on into one entry  (Eq. 7).

    entry[i] = mean_p x[p] + mean_p silu((c[p] + position[p]) · up) · down,   x[p] = kv[i · stride + p] = [c[p] | r[p]]

    The paper says of its map that it is an MLP with a position encoding inside the block. This one sees key by key, so
    its size does not grow with the block, and adds to the mean, which it begins as where `down` is 0. Rotary columns
    r are averaged alone: so entries, like keys, know relative positions only. Entries lie at multiples of `stride` of
    the positions of `kv`, whatever documents lie there. Work: 2 · S · C · U operations, and S · U · compression /
    stride numbers in memory.

    Returns:
      the M = (S - compression) // stride + 1 entries, at least one: of too few keys one that nobody reaches.

    Raises:
      ValueError: if shapes do not fit together.
    """
    length, dim, width = sizes.compression, kv.shape[-1], position.shape[-1]
    if len(position) != length or width > dim or up.shape[0] != width or down.shape != up.shape[::-1]:
        raise ValueError(
            f"position, up and down must be [{length}, C], [C, U] and [U, C], C at most {dim}, "
            f"got {position.shape}, {up.shape} and {down.shape}"
        )
    kv = jnp.pad(kv, ((0, 0), (0, max(length - kv.shape[1], 0)), (0, 0)))
    parts, count = length // sizes.stride, (kv.shape[1] - length) // sizes.stride + 1
    strides = kv[:, : (count + parts - 1) * sizes.stride].reshape(kv.shape[0], -1, sizes.stride, dim)
    hidden = project("bmpc,cu->bmpu", strides[..., :width], up)
    offsets = project("pc,cu->pu", position.astype(kv.dtype), up).reshape(parts, sizes.stride, -1)
    sums = jnp.sum(strides, axis=2, dtype=accumulator(kv))
    seen = jnp.zeros((kv.shape[0], count, up.shape[1]), accumulator(kv))
    mean = jnp.zeros((kv.shape[0], count, dim), accumulator(kv))
    for part in range(parts):
        here = jax.nn.silu(hidden[:, part : part + count] + offsets[part])
        seen += jnp.sum(here, axis=2, dtype=seen.dtype) / length
        mean += sums[:, part : part + count] / length
    learnt = project("bmu,uc->bmc", seen.astype(kv.dtype), down)
    return mean.astype(kv.dtype) + jnp.pad(learnt, ((0, 0), (0, 0), (0, dim - width)))


def compressed_range(keys: KeyRange, size: int, *, sizes: NSASizes) -> KeyRange:
    """Gives the range of entries that are compressed of keys in reach alone, of `size` keys.

    Examples:
      >>> reach = compressed_range(KeyRange.causal(1, 3, offset=46), 100, sizes=NSASizes())
      >>> reach.stop.tolist()
      [[1, 2, 2]]
    """
    start, stop = _clipped(keys, size)
    return KeyRange(-(-start // sizes.stride), (stop - sizes.compression) // sizes.stride + 1)


def select_by_entries(
    q: Float[Array, "B T N H"],
    entries: Float[Array, "B M H"],
    lse: Float[Array, "B T N"],
    keys: KeyRange,
    *,
    size: int,
    sizes: NSASizes,
    scale: float,
) -> Int[Array, "B T n"]:
    """Selects each query's blocks: the first one in reach, its own and the one before, and those of the best scores.

    score[t,j] = Σ_n Σ_m Σ_o p[t, n, (block / stride) · j + m - o],   m < block / stride,  o < compression / stride

    with p the attention of head n to the entries (Eqs. 8 to 11): an entry counts once for each stride that it shares
    with the block. This is the paper's Eq. 9 with blocks and entries counted from 1, as there; with them counted from 0
    its indices would name the entries before the block. Ties go to the lowest block. Work: that of the products of the
    compressed branch once more, for as many queries at a time as `blockwise` allows, and T · S / block scores.

    Args:
      q: queries of the compressed branch, in latent form.
      entries: as `compress_keys` gives them.
      lse: of the attention of `q` to `entries`.
      keys: the keys, not entries, that each query may reach.
      size: S.
      sizes: of entries and blocks.
      scale: the softmax scale.

    Returns:
      int32 numbers of blocks, canonical as in `select_topk`. No gradient flows through them.
    """
    reach = compressed_range(keys, size, sizes=sizes)
    start, stop = _clipped(keys, size)
    first, last = start // sizes.block, (stop - 1) // sizes.block
    ranges = reach.start, reach.stop, first, jnp.where(start < stop, last, first - 1)
    count = -(-size // sizes.block)

    def block(queries, entries, sums):
        q, lse, begin, end, first, last = queries
        mask = KeyRange(begin, end).contains(jnp.arange(entries.shape[0]))
        p = join_heads(q, entries, lse, mask, scale=scale, dims="sh", target="sum")
        scores, number = _block_scores(p, count, sizes), jnp.arange(count)
        first, last = first[:, None], last[:, None]
        fixed = (number == first) | (number >= last - 1) & (number <= last)
        scores = jnp.where(fixed, jnp.inf, scores)
        blocks = KeyRange(first[None, :, 0], last[None, :, 0] + 1)
        return select_topk(scores[None], sizes.blocks, keys=blocks, implementation="xla")[0], sums

    arrays = jax.lax.stop_gradient(((q, lse, *ranges), entries))
    return map_queries(block, *arrays, block=queries_per_block(3 * entries.shape[1] * q.shape[2]))[0]


def _block_scores(p: Float[Array, "t M"], count: int, sizes: NSASizes) -> Float[Array, "t blocks"]:
    """Adds up for each block the mass of the entries that share strides with it."""
    strides, before = count * (sizes.block // sizes.stride), sizes.compression // sizes.stride - 1
    p = jnp.pad(p, ((0, 0), (before, max(strides - p.shape[1], 0))))
    by_stride = functools.reduce(jnp.add, (p[:, offset : offset + strides] for offset in range(before + 1)))
    return jnp.sum(by_stride.reshape(p.shape[0], count, -1), axis=-1)


def native_sparse_attention(
    queries: Sequence[Float[Array, "B T N H"]],
    kv: Float[Array, "B S H"],
    entries: Float[Array, "B M H"],
    keys: KeyRange,
    *,
    sizes: NSASizes,
    value_dim: int,
    scale: float,
    implementation: Implementation | None = None,
) -> Branches:
    """Attends by each of the three branches, which the caller joins by gates (Eq. 5, section 3.3).

    `latent_attention` to the entries all of whose keys are in reach; `span_attention` to the blocks that
    `select_by_entries` selects; `span_attention` to the last `window` keys. A branch without keys gives 0. For
    grouped-query keys, fold the groups into the batch.

    Nothing is T × S. A query takes 4 · N · M operations a column in the compressed branch and half of that again for
    the scores, M = S / stride: alone this grows with S; the other two take 2 · N · (blocks · block + window) · (H + V).

    Args:
      queries: in latent form, of each branch in the order of `BRANCHES`.
      kv: latents. Those that no query of their row reaches may be NaN.
      entries: as `compress_keys` gives them of `kv`, where NaN that nobody reaches is 0.
      keys: the keys that each query may reach.
      sizes: of the branches.
      value_dim: C, the first columns of `kv`, which are the values.
      scale: the softmax scale, a number and no traced value.
      implementation: None, "xla" or "pallas", of `span_attention`.

    Raises:
      ValueError: if shapes or dtypes do not fit together, or "pallas" has no kernel for them.
    """
    if len(queries) != len(BRANCHES):
        raise ValueError(f"queries must be one of each branch, {', '.join(BRANCHES)}, got {len(queries)}")
    for q in queries:
        check_latents(q, kv)
    check_keys(keys, *queries[0].shape[:2])
    check_value_dim(value_dim, kv)
    size = kv.shape[1]
    expected = kv.shape[0], max((size - sizes.compression) // sizes.stride + 1, 1), kv.shape[2]
    if entries.shape != expected:
        raise ValueError(f"entries must be {list(expected)}, as compress_keys gives them, got {list(entries.shape)}")
    options: dict[str, Any] = dict(value_dim=value_dim, scale=static_scale(scale))
    compressed, blocks = _attend_and_select(queries[0], entries, keys, size=size, sizes=sizes, **options)
    with jax.named_scope("selected"):
        begins = jnp.where(blocks < 0, -1, blocks * sizes.block)
        spans = dict(size=sizes.block, implementation=implementation)
        selected, _ = span_attention(queries[1], kv, begins, keys, **spans, **options)
    with jax.named_scope("window"):
        start, stop = _clipped(keys, size)
        first = jnp.maximum(stop - sizes.window, 0)
        spans = dict(size=sizes.window, implementation=implementation)
        last = KeyRange(jnp.maximum(start, first), stop)
        window, _ = span_attention(queries[2], kv, first[..., None], last, **spans, **options)
    return Branches(compressed, selected, window, blocks)


def _attend_and_select(q, entries, keys, *, size, sizes, value_dim, scale):
    """Attends to the entries, the one branch that reads all of them, and selects blocks by what it attends to."""
    reach = compressed_range(keys, size, sizes=sizes)
    with jax.named_scope("compressed"):
        compressed, lse = latent_attention(q, entries, reach, value_dim=value_dim, scale=scale)
    with jax.named_scope("select"):
        blocks = select_by_entries(q, entries, lse, keys, size=size, sizes=sizes, scale=scale)
        return compressed, checkpoint_name(blocks, "indices")


def attend_to_store(
    queries: Sequence[Float[Array, "B T N H"]],
    store: KeyStore,
    keys: KeyRange,
    *,
    sizes: NSASizes,
    value_dim: int,
    scale: float,
) -> Branches:
    """Attends as `native_sparse_attention` does to what a cache holds: all entries, and the latents of two branches.

    Those of the selected blocks and of the window are gathered by position. No gradient is meant.

    Args:
      queries: in latent form, of each branch in the order of `BRANCHES`.
      store: of one layer, with every entry that is complete.
      keys, sizes, value_dim, scale: as in `native_sparse_attention`.
    """
    size, before = store.size, sizes.compression // sizes.stride - 1  # strides that complete no entry
    start, stop = _clipped(keys, size)
    options: dict[str, Any] = dict(value_dim=value_dim, scale=scale)
    entries = store.compressed(queries[0].dtype)[:, before:]
    # A row may hold several sequences, and a weight of 0 times NaN is NaN: only who reaches what is not finite gets it.
    finite = jnp.all(jnp.isfinite(entries), axis=-1)
    entries = jnp.where(finite[..., None], entries, 0)
    compressed, blocks = _attend_and_select(queries[0], entries, keys, size=size, sizes=sizes, **options)
    lost = _reaches_any(~finite, compressed_range(keys, size, sizes=sizes))
    compressed = jnp.where(lost[..., None, None], jnp.nan, compressed)
    with jax.named_scope("selected"):
        selected, _ = store.attend(queries[1], _keys_of(blocks, keys, size, sizes), **options)
    with jax.named_scope("window"):
        last = window_selection(KeyRange(start, stop), min(sizes.window, size))
        window, _ = store.attend(queries[2], last, **options)
    return Branches(compressed, selected, window, blocks)


def completed_strides(positions: Int[Array, "B T"], *, sizes: NSASizes) -> Int[Array, "B T"]:
    """Lists the strides of keys whose last one stands at one of `positions` and completes an entry, the last first.

    Entry i is complete with the last key of stride i + compression / stride - 1. Behind them stands -1.

    Examples:
      >>> completed_strides(jnp.array([[30, 31, 32, 47, -1]]), sizes=NSASizes()).tolist()
      [[2, 1, -1, -1, -1]]
    """
    behind = positions + 1
    completes = (behind % sizes.stride == 0) & (behind >= sizes.compression)
    return -jnp.sort(jnp.where(completes, 1 - behind // sizes.stride, 1), axis=1)


class Compression(nnx.Module):
    """Holds the map of keys to entries, and the matrix that expands these to each head's keys and values."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        dim = config.kv_lora_rank
        self.position = new_weight(config, rngs, config.nsa.compression, dim)
        self.up_proj = new_weight(config, rngs, dim, dim)
        self.down_proj = nnx.Param(jnp.zeros((dim, dim), config.param_dtype))  # it begins as the mean
        self.kv_b_proj = _expansion(config, rngs)

    def __call__(self, kv: Float[Array, "B S H"], sizes: NSASizes) -> Float[Array, "B M H"]:
        """Compresses keys as `compress_keys` does."""
        return compress_keys(kv, self.position[...], self.up_proj[...], self.down_proj[...], sizes=sizes)

    def complete(
        self, store: KeyStore, strides: Int[Array, "B M"], dtype: DTypeLike, sizes: NSASizes
    ) -> Float[Array, "B M H"]:
        """Computes the entries that `completed_strides` lists, of keys that a cache holds; where that has -1, any.

        Of many tokens as many at a time as one sequence completes by them, and no more often than is needed: mostly
        once, and again where a row holds more sequences.
        """
        batch, count = strides.shape
        some = max(-(-count // sizes.stride), min(count, FEW_QUERIES))

        def compute(strides):
            first = (strides + 1) * sizes.stride - sizes.compression
            places = first[..., None] + jnp.arange(sizes.compression, dtype=first.dtype)
            kv = store.gather(places.reshape(batch, -1), dtype)
            return self(kv.reshape(-1, sizes.compression, kv.shape[-1]), sizes).reshape(batch, -1, kv.shape[-1])

        if some == count:
            return compute(strides)

        def step(turn, entries):
            own = jax.lax.dynamic_slice_in_dim(strides, turn * some, some, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(entries, compute(own), turn * some, axis=1)

        strides = jnp.pad(strides, ((0, 0), (0, -count % some)), constant_values=-1)
        turns = -(-jnp.max(jnp.sum(strides >= 0, axis=1)) // some)
        entries = jax.eval_shape(compute, strides)
        return jax.lax.fori_loop(0, turns, step, jnp.zeros(entries.shape, entries.dtype))[:, :count]


class Window(nnx.Module):
    """Holds the matrix that expands latents to each head's keys and values in the sliding window."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.kv_b_proj = _expansion(config, rngs)


def _expansion(config: Config, rngs: nnx.Rngs):
    heads, dims = config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim
    return new_weight(config, rngs, config.kv_lora_rank, heads, dims)


@show_arguments
class NativeSparseMLA(SparseMLA):
    """Native Sparse Attention over the latents of multi-head latent attention, with `SparseMLA`'s interface.

    Chosen by `Config.baseline = "nsa"`, of the sizes `Config.nsa`. It has no indexer, and so neither a divergence nor
    dense attention; `kv_b_proj` is that of the selected blocks, the other branches have one of their own. The gates are
    a sigmoid of the hidden state for each head and branch. It runs on one device.

    A cache holds the latents and, in the place of index keys, the entries: with its last key an entry is computed and
    kept. A step reads the entries, S / stride of them, the selected blocks and the window.
    """

    def __init__(self, config: Config, *, indexer: bool = True, rngs: nnx.Rngs):
        del indexer  # a layer that selects does so by its entries
        super().__init__(config, indexer=False, rngs=rngs)
        self.compression = Compression(config, rngs=rngs)
        self.window = Window(config, rngs=rngs)
        self.branch_gate = new_weight(config, rngs, config.hidden_size, config.num_attention_heads, len(BRANCHES))
        self.branch_bias = nnx.Param(jnp.zeros((config.num_attention_heads, len(BRANCHES)), config.param_dtype))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        keys: KeyRange,
        *,
        attention: Attention = "sparse",
        selected: Int[Array, "B T K"] | None = None,
        shared: SharedIndex | None = None,
        cache: AnyCache | None = None,
        layer: Any = 0,
        indexer: Any = None,
        return_selected: bool = False,
        return_indexer_kl: bool = True,
    ) -> LayerOutput:
        """Attends with the T tokens of `x`; arguments as in `SparseMLA`, and what is selected are the blocks' keys.

        Raises:
          ValueError: if attention is dense, or a selection is given.
        """
        del indexer, return_selected, return_indexer_kl  # the selection is there, the divergence is not
        if attention != "sparse" or selected is not None or shared is not None:
            got = "attention='dense'" if attention != "sparse" else "a selection"
            raise ValueError(f"baseline 'nsa' attends by its own three branches alone, got {got}")
        p, config = self.project(x, rotation), self.config
        weights = [each[...] for each in (self.compression.kv_b_proj, self.kv_b_proj, self.window.kv_b_proj)]
        queries = [self._latent_queries(p.q, weight) for weight in weights]
        options: dict[str, Any] = dict(sizes=config.nsa, value_dim=config.kv_lora_rank, scale=config.softmax_scale)
        shard = self._to_shard(p, keys, None, cache, (layer, None))
        cache, store = shard.cache, shard.store
        if cache is None:
            kv = zero_unreached(store.read(p.q.dtype)[0], keys)
            with jax.named_scope("compress"):
                entries = self.compression(kv, config.nsa)
            found = native_sparse_attention(queries, kv, entries, keys, **options)
        else:
            cache = self._write_completed(cache, store, layer, keys, p.q.dtype)
            store = cache.layer(layer)
            found = attend_to_store(queries, store, keys, **options)
        outs = found.compressed, found.selected, found.window
        gates, out = self._gates(x), jnp.zeros((), accumulator(x))
        for branch, (each, weight) in enumerate(zip(outs, weights, strict=True)):
            values = project("btnc,cnv->btnv", each, weight[..., config.qk_nope_head_dim :])
            out = out + gates[..., branch, None] * values.astype(gates.dtype)
        chosen = _keys_of(found.blocks, keys, store.size, config.nsa)
        return self._from_shard(p, out.astype(x.dtype), None, chosen, cache)

    def _write_completed(self, cache: AnyCache, store: KeyStore, layer, keys: KeyRange, dtype) -> AnyCache:
        """Writes the entries that the tokens of this call complete, which the cache holds already."""
        sizes = self.config.nsa
        with jax.named_scope("compress"):
            strides = completed_strides(cache.positions(keys), sizes=sizes)
            entries = self.compression.complete(store, strides, dtype, sizes)
            return cache.write_compressed(layer, strides, entries)

    def _latent_queries(self, q, weight):
        """Takes queries to latent form by one branch's matrix."""
        q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        weight = weight[..., : self.config.qk_nope_head_dim]
        return jnp.concatenate([project("btnp,cnp->btnc", q_nope, weight), q_rope], axis=-1)

    def _gates(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N 3"]:
        """Computes the gates in float32, each between 0 and 1."""
        gate = project("btd,dng->btng", x, self.branch_gate[...])
        wide = accumulator(gate)
        return jax.nn.sigmoid(gate.astype(wide) + self.branch_bias[...].astype(wide))

    def attention_maps(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        keys: KeyRange,
        *,
        attention: Attention = "sparse",
        shared: SharedIndex | None = None,
    ) -> AttentionMaps:
        """Refuses: three branches have no one map.

        Raises:
          ValueError: always.
        """
        raise ValueError("baseline 'nsa' has three attentions and no index scores, and so no attention maps")


def _keys_of(blocks, keys: KeyRange, size: int, sizes: NSASizes):
    """Lists the keys in reach of the blocks as canonical positions, no wider than there are keys."""
    return keys_of_blocks(blocks, *_clipped(keys, size), sizes.block)[..., :size]


def _reaches_any(marked: Array, keys: KeyRange) -> Array:
    """Tells for each query whether it reaches one of the keys that are marked, bool [B, S]."""
    counts = jnp.pad(jnp.cumsum(marked, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    below = [jnp.take_along_axis(counts, edge, axis=1, mode="clip") for edge in (keys.start, keys.stop)]
    return (below[1] > below[0]) & keys.nonempty()


def _clipped(keys: KeyRange, size: int) -> tuple[Array, Array]:
    """Gives the edges of a range within `size` keys."""
    return jnp.clip(keys.start, 0, size), jnp.clip(keys.stop, 0, size)
