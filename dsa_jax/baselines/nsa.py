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
from jaxtyping import Array, Float, Int

from dsa_jax.attention import check_latents, check_value_dim, join_heads, static_scale, zero_unreached
from dsa_jax.baselines.blocks import keys_of_blocks
from dsa_jax.baselines.spans import span_attention
from dsa_jax.blockwise import accumulator, map_queries, queries_per_block
from dsa_jax.cache import AnyCache
from dsa_jax.config import Config
from dsa_jax.dense_attention import latent_attention
from dsa_jax.key_range import KeyRange, check_keys
from dsa_jax.layers import Attention, AttentionMaps, LayerOutput, Rotation, SharedIndex, SparseMLA
from dsa_jax.nn import new_weight, project, show_arguments
from dsa_jax.nsa_sizes import NSASizes
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
    reach = compressed_range(keys, size, sizes=sizes)
    with jax.named_scope("compressed"):
        compressed, lse = latent_attention(queries[0], entries, reach, **options)
    with jax.named_scope("select"):
        blocks = select_by_entries(queries[0], entries, lse, keys, size=size, sizes=sizes, scale=scale)
        blocks = checkpoint_name(blocks, "indices")
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


class Compression(nnx.Module):
    """Holds the map of keys to entries, and the matrix that expands these to each head's keys and values."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        dim = config.kv_lora_rank
        self.position = new_weight(config, rngs, config.nsa.compression, dim)
        self.up_proj = new_weight(config, rngs, dim, dim)
        self.down_proj = nnx.Param(jnp.zeros((dim, dim), config.param_dtype))  # it begins as the mean
        self.kv_b_proj = _expansion(config, rngs)


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

    A cache holds latents alone. Each step reads all of them and compresses them anew, which takes time in proportion to
    S where the paper's decoding keeps the entries.
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
        p = self.project(x, rotation)
        shard = self._to_shard(p, keys, None, cache, (layer, None))
        config, kv = self.config, zero_unreached(shard.store.read(p.q.dtype)[0], keys)
        weights = [each[...] for each in (self.compression.kv_b_proj, self.kv_b_proj, self.window.kv_b_proj)]
        with jax.named_scope("compress"):
            own = self.compression
            entries = compress_keys(kv, own.position[...], own.up_proj[...], own.down_proj[...], sizes=config.nsa)
        queries = [self._latent_queries(p.q, weight) for weight in weights]
        options: dict[str, Any] = dict(value_dim=config.kv_lora_rank, scale=config.softmax_scale)
        found = native_sparse_attention(queries, kv, entries, keys, sizes=config.nsa, **options)
        outs = found.compressed, found.selected, found.window
        gates, out = self._gates(x), jnp.zeros((), accumulator(x))
        for branch, (each, weight) in enumerate(zip(outs, weights, strict=True)):
            values = project("btnc,cnv->btnv", each, weight[..., config.qk_nope_head_dim :])
            out = out + gates[..., branch, None] * values.astype(gates.dtype)
        chosen = keys_of_blocks(found.blocks, *_clipped(keys, kv.shape[1]), config.nsa.block)[..., : kv.shape[1]]
        return self._from_shard(p, out.astype(x.dtype), None, chosen, shard.cache)

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


def _clipped(keys: KeyRange, size: int) -> tuple[Array, Array]:
    """Gives the edges of a range within `size` keys."""
    return jnp.clip(keys.start, 0, size), jnp.clip(keys.stop, 0, size)
