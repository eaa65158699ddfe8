"""The transformer's layers: sparse multi-head latent attention first, then the gated feed-forward."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsa_jax.blockwise import contract
from dsa_jax.cache import AnyCache, KeyStore, LayerKeys
from dsa_jax.config import Config
from dsa_jax.dense_attention import latent_attention, multihead_attention
from dsa_jax.indexer import LightningIndexer
from dsa_jax.indexer_loss import dense_indexer_kl, sparse_indexer_kl
from dsa_jax.key_range import KeyRange
from dsa_jax.nn import RMSNorm, new_weight, project, show_arguments
from dsa_jax.paged import FEW_QUERIES
from dsa_jax.parallel.collectives import (
    gather_head_weights,
    gather_sequence,
    gather_tokens,
    heads_to_tokens,
    num_shards,
    slice_tokens,
    sum_gradients,
    sum_shards,
    tokens_to_heads,
)
from dsa_jax.quantization import dequantize, quantize, straight_through_dequantize
from dsa_jax.rope import rotate_interleaved

Attention = Literal["sparse", "dense"]  # over the indexer's selection, or over all keys in reach
Rotation = tuple[Array, Array]  # cosines and sines, float32 [B, T, R / 2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projections:
    """Holds one layer's projections: q [B, T, N, P + R], latents kv [B, T, C + R], and the indexer's three arrays.

    These are the layer's own, or those of the layer whose selection it reuses; then they may be missing.
    """

    q: Array
    kv: Array
    q_index: Any
    k_index: Any
    weights: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedIndex:
    """Holds what a layer with an indexer hands on to the layers that reuse its selection.

    selected [B, T, K], unless it was not made; of its indexer q_index, k_index and weights, for the divergence from
    the attention of those layers, unless that is not wanted.
    """

    selected: Array | None
    index: tuple[Array, Array, Array] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """Holds a layer's results.

    x [B, T, D]; indexer_kl [B, T] and selected [B, T, K] if they were asked for; the new cache if there was one; of MoE
    layers the load of each expert and the experts of each token; what layers that reuse the selection take.
    """

    x: Array
    indexer_kl: Array | None
    selected: Array | None
    cache: AnyCache | None
    expert_load: Array | None = None  # float32 [X]
    routed: Array | None = None  # int32 [B, T, k]
    shared: SharedIndex | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Holds what one layer attends to, whole and for every pair of tokens: to look at, not to train on.

    Attributes:
      weights: float32 [B, N, T, S], each head's attention: a row sums to 1, or is 0 where a query has no key.
      index_scores: float32 [B, T, S], the indexer's scores, -inf out of reach.
      selected: int32 [B, T, K], the keys that the indexer selects.
    """

    weights: Array
    index_scores: Array
    selected: Array


class _Shard(NamedTuple):
    """The queries of one shard, every key that they may reach, and the cache written to.

    Without a cache they are all heads of a share of the queries; with one, the shard's own heads of all queries.
    """

    q: Array  # [B, T, N, P + R]
    keys: KeyRange
    store: KeyStore  # what selects and is attended to
    index: tuple[Array, Array] | None  # q_index and weights, as the selection scores them
    trained_index: tuple[Array, Array, Array] | None  # q_index, k_index, weights of the loss, the same with gradients
    selected: Array | None  # a selection imposed from outside
    cache: AnyCache | None


@show_arguments
class SparseMLA(nnx.Module):
    """Multi-head latent attention over the keys that the lightning indexer selects (Figure 1 of the paper).

    Sparse attention runs in the multi-query form, where all heads share one latent a token; dense attention without a
    cache runs in the multi-head form. Both have the same parameters and, over the same keys, the same result.

    On a mesh that shards heads, projections and dense attention run by head and all else runs by query: a shard takes
    all heads of a share of the queries. So it selects for these alone, its kernels have as many heads as on one device,
    and the sum over heads that the indexer imitates is its own. `_to_shard` goes there, `_from_shard` comes back.

    Without an indexer of its own (`indexer=False`) a layer attends to the selection of an earlier one, a `SharedIndex`.
    """

    def __init__(self, config: Config, *, indexer: bool = True, rngs: nnx.Rngs):
        heads, q_head_dim = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
        eps = config.rms_norm_eps if config.latent_norm_eps is None else config.latent_norm_eps
        self.config = config
        self.q_a_proj = new_weight(config, rngs, config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps, config.param_dtype)
        self.q_b_proj = new_weight(config, rngs, config.q_lora_rank, heads, q_head_dim)
        self.kv_a_proj_with_mqa = new_weight(config, rngs, config.hidden_size, config.latent_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps, config.param_dtype)
        self.kv_b_proj = new_weight(
            config, rngs, config.kv_lora_rank, heads, config.qk_nope_head_dim + config.v_head_dim
        )
        self.o_proj = new_weight(config, rngs, heads, config.v_head_dim, config.hidden_size)
        self.indexer = LightningIndexer(config, rngs=rngs) if indexer else None

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
        """Attends with the T tokens of `x`.

        Args:
          x: normalised hidden states.
          rotation: cosines and sines of the tokens' positions, from `rope.rotation`.
          keys: the keys that each token may reach; positions of the cache when there is one.
          attention: "sparse" or "dense".
          selected: a selection to attend to instead of the indexer's own.
          shared: what the layer hands on whose selection this one reuses, if it has no indexer.
          cache: earlier tokens; the new ones are written to its layer number `layer` before they attend.
          layer: this layer's number.
          indexer: the number among all indexers of the one that selects for it; `layer` if None.
          return_selected: whether the selection is wanted of dense attention too; sparse attention always returns it.
          return_indexer_kl: whether the indexer's divergence from the attention is wanted.

        Returns:
          a `LayerOutput`, `x` before the residual sum.
        """
        p = self._take_shared(self.project(x, rotation), shared)
        if shared is not None:
            selected = shared.selected if selected is None else selected
            return_indexer_kl &= shared.index is not None
        where = layer, indexer
        if attention == "dense":
            return self._dense(p, keys, selected, cache, where, return_selected, return_indexer_kl)
        return self._sparse(p, keys, selected, cache, where, return_indexer_kl)

    def _take_shared(self, p: Projections, shared: SharedIndex | None) -> Projections:
        """Takes the index queries, keys and weights that a layer without an indexer was handed, if it was."""
        if (self.indexer is None) != (shared is not None):
            got = "one" if shared is not None else "none"
            raise ValueError(f"shared must be given to a layer without an indexer and to no other, got {got}")
        if shared is None or shared.index is None:
            return p
        return Projections(p.q, p.kv, *shared.index)

    def _sparse(self, p: Projections, keys, selected, cache, where, wants_kl) -> LayerOutput:
        shard = self._to_shard(p, keys, selected, cache, where)
        scale, value_dim = self.config.softmax_scale, self.config.kv_lora_rank
        selected, kl = self._select(shard) if shard.selected is None else shard.selected, None
        if self.indexer is not None:  # what is shared is kept once, by the layer that made it
            selected = checkpoint_name(selected, "indices")
        q = self.absorb(shard.q, own_heads=cache is not None)
        with jax.named_scope("sparse_attention"):
            out, lse = shard.store.attend(q, selected, value_dim=value_dim, scale=scale)
        lse = checkpoint_name(lse, "lse")
        if wants_kl:
            with jax.named_scope("sparse_indexer_kl"):
                kv, index = shard.store.read(q.dtype)[0], self._trained_index(shard)
                kl = sparse_indexer_kl(*index, q, kv, lse, selected, scale=scale, target=self.config.index_kl_target)
        return self._from_shard(p, self._head_values(out, shard), kl, selected, shard.cache)

    def _dense(self, p: Projections, keys, selected, cache, where, wants_selected, wants_kl) -> LayerOutput:
        shard = self._to_shard(p, keys, selected, cache, where)
        scale, value_dim = self.config.softmax_scale, self.config.kv_lora_rank
        kv = shard.store.read(p.q.dtype)[0]
        k, v = self.expand(kv)
        if cache is not None:
            # A row may hold several sequences, and a weight of 0 times NaN is NaN. What is not finite stays in the
            # keys, where it makes NaN of the queries that reach it and of no others.
            finite = jnp.all(jnp.isfinite(kv), axis=-1)[..., None, None]
            k, v = jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0.0)
        with jax.named_scope("dense_attention"):
            if cache is None or p.q.shape[1] > FEW_QUERIES:
                out, lse = multihead_attention(p.q, k, v, keys, scale=scale)
            else:  # few queries: the latents are read once for all heads, and never expanded
                q = self.absorb(shard.q, own_heads=True)
                out, lse = latent_attention(q, kv, shard.keys, value_dim=value_dim, scale=scale)
                out = self._head_values(out, shard)
        lse, kl = checkpoint_name(lse, "lse"), None
        selected = shard.selected
        if wants_selected and selected is None:
            selected = self._select(shard)
        if wants_kl:
            with jax.named_scope("dense_indexer_kl"):
                lse = lse if cache is not None else heads_to_tokens(lse)
                constants = jax.lax.stop_gradient((shard.q, self._keys_of_all_heads(kv, k), lse))
                options: dict[str, Any] = dict(scale=scale, target=self.config.index_kl_target)
                kl = dense_indexer_kl(*self._trained_index(shard), *constants, shard.keys, **options)
        return self._from_shard(p, out, kl, selected if wants_selected else None, shard.cache)

    def select(
        self, store: KeyStore, q_index: Float[Array, "B T J E"], weights: Float[Array, "B T J"], keys: KeyRange
    ) -> Int[Array, "B T K"]:
        """Selects as many keys as the config says, or all that there are if these are fewer; baselines replace it."""
        return store.select(q_index, weights, keys, k=min(self.config.index_topk, store.size))

    def _select(self, shard: _Shard) -> Int[Array, "B T K"]:
        if shard.index is None:
            raise ValueError("a layer without an indexer needs a selection, got none")
        with jax.named_scope("select"):
            return self.select(shard.store, *shard.index, shard.keys)

    def _trained_index(self, shard: _Shard) -> tuple[Array, Array, Array]:
        """Gives what the indexer's loss scores; keys of a cache are as they were rounded."""
        if shard.trained_index is not None:
            return shard.trained_index
        if num_shards("heads") > 1:
            raise ValueError("where heads are sharded, the indexer's divergence is not computed with a cache")
        assert shard.index is not None  # or the divergence is not wanted
        q_index, weights = shard.index
        _, k_index, k_scale = shard.store.read(shard.q.dtype)
        if self.config.index_fp8:  # the weights carry the scales of the queries
            q_index, k_index = q_index.astype(shard.q.dtype), dequantize(k_index, k_scale, shard.q.dtype)
        return q_index, k_index, weights

    def attention_maps(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        keys: KeyRange,
        *,
        attention: Attention = "sparse",
        shared: SharedIndex | None = None,
    ) -> AttentionMaps:
        """Computes the attention of every head and the index scores of all pairs, on one device.

        Args:
          x, rotation, keys, attention, shared: as in a call; memory is N · T · S numbers. The scores are those of the
            indexer that selects for this layer.
        """
        p = self._take_shared(self.project(x, rotation), shared)
        shard = self._to_shard(p, keys, None, None)
        assert shard.index is not None
        selected, size = self._select(shard), p.kv.shape[1]
        mask = keys.mask(size)
        if attention == "sparse":
            rows = jnp.arange(selected.shape[0])[:, None, None], jnp.arange(selected.shape[1])[:, None]
            chosen = jnp.zeros((*mask.shape[:2], size + 1), bool).at[(*rows, jnp.where(selected < 0, size, selected))]
            mask &= chosen.set(True)[..., :size]
        logits = contract("btnh,bsnh->bnts", p.q, self.expand(p.kv)[0]) * self.config.softmax_scale
        logits = jnp.where(mask[:, None], logits, -jnp.inf)
        weights = jnp.where(mask.any(-1)[:, None, :, None], jax.nn.softmax(logits), 0.0)
        return AttentionMaps(weights, shard.store.score(*shard.index, keys), selected)

    def project(self, x: Float[Array, "B T D"], rotation: Rotation) -> Projections:
        """Projects to queries, latents and the indexer's inputs; the indexer sees `x` and the query latent detached."""
        with jax.named_scope("project"):
            # Named before the norms, whose gradients need what they normalise.
            q_latent = self.q_a_layernorm(checkpoint_name(project("btd,dq->btq", x, self.q_a_proj[...]), "latents"))
            q = project("btq,qnh->btnh", sum_gradients(q_latent, "heads"), self.q_b_proj[...])
            q = checkpoint_name(q, "queries")
            q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
            q = jnp.concatenate([q_nope, rotate_interleaved(q_rope, *rotation)], axis=-1)
            kv = checkpoint_name(project("btd,dh->bth", x, self.kv_a_proj_with_mqa[...]), "latents")
            c_kv, k_rope = jnp.split(kv, [self.config.kv_lora_rank], axis=-1)
            kv = jnp.concatenate([self.kv_a_layernorm(c_kv), rotate_interleaved(k_rope, *rotation)], axis=-1)
        if self.indexer is None:
            return Projections(q, kv, None, None, None)
        index = self.indexer(jax.lax.stop_gradient(x), jax.lax.stop_gradient(q_latent), rotation)
        return Projections(q, kv, *index)

    def expand(
        self, kv: Float[Array, "B S H"], weight: Float[Array, "C N H3"] | None = None
    ) -> tuple[Float[Array, "B S N H2"], Float[Array, "B S N V"]]:
        """Expands latents to each head's keys [B, S, N, P + R] and values [B, S, N, V], by `kv_b_proj` if None."""
        weight = self.kv_b_proj[...] if weight is None else weight
        c_kv, k_rope = jnp.split(kv, [self.config.kv_lora_rank], axis=-1)
        k_nope, v = jnp.split(project("bsc,cnh->bsnh", c_kv, weight), [self.config.qk_nope_head_dim], axis=-1)
        k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
        return jnp.concatenate([k_nope, k_rope], axis=-1), v

    def absorb(self, q: Float[Array, "B T N H"], *, own_heads: bool = False) -> Float[Array, "B T N H2"]:
        """Takes queries to latent form [B, T, N, C + R], where every head shares the keys.

        The heads are all heads or, on a mesh that shards them, this shard's own.
        """
        q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        weight = self._head_weight(own_heads)[..., : self.config.qk_nope_head_dim]
        return jnp.concatenate([project("btnp,cnp->btnc", q_nope, weight), q_rope], axis=-1)

    def unabsorb(self, out: Float[Array, "B T N C"], *, own_heads: bool = False) -> Float[Array, "B T N V"]:
        """Takes the attention's output from latents to each head's values; heads as in `absorb`."""
        return project("btnc,cnv->btnv", out, self._head_weight(own_heads)[..., self.config.qk_nope_head_dim :])

    def _head_weight(self, own):
        """Returns the weight that takes latents to keys and values, of all heads or this shard's own."""
        return self.kv_b_proj[...] if own else gather_head_weights(self.kv_b_proj[...])

    def queries_and_keys(
        self, p: Projections, keys: KeyRange
    ) -> tuple[Float[Array, "B T2 N2 H"], Float[Array, "B S N2 H"], KeyRange]:
        """Gives the queries, the keys and their ranges from which dense attention can be computed anew, to measure it.

        On a mesh that shards heads they are all heads of the share of the queries that `slice_tokens` gives this shard,
        and of all keys; where the sequence is sharded, the keys are those of the whole of it.
        """
        shard = self._to_shard(p, keys, None, None)
        kv = shard.store.read(p.q.dtype)[0]
        return shard.q, self._keys_of_all_heads(kv, self.expand(kv)[0]), shard.keys

    # The way into a shard and out of it. Where no axis is sharded, every collective is the identity, and what is left
    # is the FP8 of the index and the cache.

    def _to_cache(self, p: Projections, keys: KeyRange, selected, cache, where) -> _Shard:
        """Writes the tokens' entries, and takes this shard's heads of all queries to the keys that the cache holds."""
        layer, indexer = where
        cache = cache.write(layer, p.kv, None if self.indexer is None else p.k_index, indexer)
        index = None
        if p.q_index is not None:
            q_index, weights = p.q_index, p.weights
            if self.config.index_fp8:
                q_index, q_scale = quantize(q_index)
                weights = weights * q_scale
            index = q_index, weights
        return _Shard(p.q, keys, cache.layer(layer, indexer), index, None, selected, cache)

    def _to_shard(self, p: Projections, keys: KeyRange, selected, cache, where=(0, None)) -> _Shard:
        """Takes this shard's share of the queries, and gathers every key that they may reach, or reads the cache's."""
        if cache is not None:
            return self._to_cache(p, keys, selected, cache, where)
        mine = lambda x: jax.tree.map(lambda leaf: slice_tokens(leaf, "heads"), x)  # noqa: E731
        q, kv = heads_to_tokens(p.q), gather_sequence(sum_gradients(p.kv, "heads"))
        keys, selected = mine((keys, selected))
        if p.q_index is None:
            return _Shard(q, keys, LayerKeys(kv, None, None), None, None, selected, None)
        q_index, weights = mine((p.q_index, p.weights))
        k_index = sum_gradients(p.k_index, "heads")
        q_scored, k_scored, scored_weights = q_index, p.k_index, weights
        k_scale = jnp.ones(k_index.shape[:2], jnp.float32)
        if self.config.index_fp8:
            (q_scored, q_scale), (k_scored, k_scale) = quantize(q_index), quantize(p.k_index)
            scored_weights = weights * q_scale
            # The loss sees the rounded values with gradients straight through. Scales are powers of two, so these make
            # the very scores that the e4m3 numbers and their scales make.
            q_index = straight_through_dequantize(q_index, q_scored, q_scale)
            k_index = straight_through_dequantize(k_index, k_scored, k_scale)
        k_scored, k_scale, k_index = (gather_sequence(x) for x in (k_scored, k_scale, k_index))
        store = LayerKeys(kv, k_scored, k_scale)
        return _Shard(q, keys, store, (q_scored, scored_weights), (q_index, k_index, weights), selected, None)

    def _from_shard(self, p: Projections, out, kl, selected, cache) -> LayerOutput:
        """Projects this shard's heads to the output, summed over shards, and joins what it found for its queries."""
        with jax.named_scope("project_output"):
            x = sum_shards(project("btnv,nvd->btd", out, self.o_proj[...]), "heads")
            x = checkpoint_name(x, "attention_output")
        if cache is None:
            kl, selected = jax.tree.map(lambda x: gather_tokens(x, "heads"), (kl, selected))
        index = None
        if p.q_index is not None:
            index = p.q_index, p.k_index, p.weights
        return LayerOutput(x, kl, selected, cache, shared=SharedIndex(selected, index))

    def _head_values(self, out: Float[Array, "B T N C"], shard: _Shard) -> Float[Array, "B T2 N2 V"]:
        """Takes the latents found for the shard's queries to values, of this shard's heads for all queries."""
        if shard.cache is not None:
            return self.unabsorb(out, own_heads=True)
        return tokens_to_heads(self.unabsorb(out))

    def _keys_of_all_heads(self, kv, k):
        """Expands the keys of all heads, which the sum over heads needs, where `k` has those of this shard alone."""
        if num_shards("heads") == 1:
            return k
        return self.expand(*jax.lax.stop_gradient((kv, self._head_weight(own=False))))[0]


@show_arguments
class MLP(nnx.Module):
    """The gated feed-forward: down(silu(gate(x)) · up(x))  (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: Config, width: int, *, rngs: nnx.Rngs):
        self.gate_proj = new_weight(config, rngs, config.hidden_size, width)
        self.up_proj = new_weight(config, rngs, config.hidden_size, width)
        self.down_proj = new_weight(config, rngs, width, config.hidden_size)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Applies the block to every token."""
        x = sum_gradients(x, "width")
        products = (project("...d,df->...f", x, weight[...]) for weight in (self.gate_proj, self.up_proj))
        gate, up = (checkpoint_name(product, "feed_forward") for product in products)
        return sum_shards(project("...f,fd->...d", jax.nn.silu(gate) * up, self.down_proj[...]), "width")
