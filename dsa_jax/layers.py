"""The transformer's layers: sparse multi-head latent attention first, then norms and feed-forward."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsa_jax.attention import sparse_attention
from dsa_jax.blockwise import project
from dsa_jax.cache import Cache
from dsa_jax.config import Config
from dsa_jax.dense_attention import latent_attention, multihead_attention
from dsa_jax.indexer import LightningIndexer, new_weight
from dsa_jax.indexer_loss import dense_indexer_kl, sparse_indexer_kl
from dsa_jax.key_range import KeyRange
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
from dsa_jax.quantization import dequantize, quantize, straight_through_quantize
from dsa_jax.rope import rotate_interleaved
from dsa_jax.selection import select_keys

LATENT_NORM_EPS = 1e-6  # of the norms inside the attention, whatever the config says of the others

Rotation = tuple[Array, Array]  # cosines and sines, float32 [B, T, R / 2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projections:
    """What one layer's attention is made of: q [B, T, N, P + R], latents kv [B, T, C + R], and the indexer's three."""

    q: Array
    kv: Array
    q_index: Array
    k_index: Array
    weights: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """x [B, T, D], indexer_kl [B, T], selected [B, T, K] or None, the cache or None; of MoE layers load and routing."""

    x: Array
    indexer_kl: Array
    selected: Array | None
    cache: Cache | None
    expert_load: Array | None = None  # [X]
    routed: Array | None = None  # int32 [B, T, k]


class SparseMLA(nnx.Module):
    """Multi-head latent attention over the keys that the lightning indexer selects (Figure 1 of the paper).

    Sparse attention runs in the multi-query form, where all heads share one latent a token; dense attention without a
    cache runs in the multi-head form. Both have the same parameters and, over the same keys, the same result.

    Where heads are sharded, projections and dense attention are by head. All else is by query: a shard has all heads
    of a share of the queries, so it selects for these alone, its kernels have no fewer heads than on one device, and
    the sum over heads that the indexer imitates is its own.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        heads, q_head_dim = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
        self.config = config
        self.q_a_proj = new_weight(config, rngs, config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, config.param_dtype)
        self.q_b_proj = new_weight(config, rngs, config.q_lora_rank, heads, q_head_dim)
        self.kv_a_proj_with_mqa = new_weight(config, rngs, config.hidden_size, config.latent_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS, config.param_dtype)
        self.kv_b_proj = new_weight(
            config, rngs, config.kv_lora_rank, heads, config.qk_nope_head_dim + config.v_head_dim
        )
        self.o_proj = new_weight(config, rngs, heads, config.v_head_dim, config.hidden_size)
        self.indexer = LightningIndexer(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        keys: KeyRange,
        *,
        attention: str = "sparse",
        selected: Int[Array, "B T K"] | None = None,
        cache: Cache | None = None,
        layer: Any = 0,
    ) -> LayerOutput:
        """Attends with the T tokens of `x`; with a cache, after writing them to its layer number `layer`."""
        projections = self.project(x, rotation)
        if attention == "dense":
            return self._dense(projections, keys, cache, layer)
        return self._sparse(projections, keys, selected, cache, layer)

    def project(self, x: Float[Array, "B T D"], rotation: Rotation) -> Projections:
        """Projects to queries, latents and the indexer's inputs; the indexer sees `x` and the query latent detached."""
        with jax.named_scope("project"):
            q_latent = self.q_a_layernorm(project("btd,dq->btq", x, self.q_a_proj[...]))
            q = project("btq,qnh->btnh", sum_gradients(q_latent, "heads"), self.q_b_proj[...])
            q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
            q = jnp.concatenate([q_nope, rotate_interleaved(q_rope, *rotation)], axis=-1)
            kv = project("btd,dh->bth", x, self.kv_a_proj_with_mqa[...])
            c_kv, k_rope = jnp.split(kv, [self.config.kv_lora_rank], axis=-1)
            kv = jnp.concatenate([self.kv_a_layernorm(c_kv), rotate_interleaved(k_rope, *rotation)], axis=-1)
        q_index, k_index, weights = self.indexer(jax.lax.stop_gradient(x), jax.lax.stop_gradient(q_latent), rotation)
        return Projections(q, kv, q_index, k_index, weights)

    def expand(
        self, kv: Float[Array, "B S H"], weight: Float[Array, "C N H3"] | None = None
    ) -> tuple[Float[Array, "B S N H2"], Float[Array, "B S N V"]]:
        """Expands latents to each head's keys [B, S, N, P + R] and values [B, S, N, V], by `kv_b_proj` if None."""
        weight = self.kv_b_proj[...] if weight is None else weight
        c_kv, k_rope = jnp.split(kv, [self.config.kv_lora_rank], axis=-1)
        k_nope, v = jnp.split(project("bsc,cnh->bsnh", c_kv, weight), [self.config.qk_nope_head_dim], axis=-1)
        k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
        return jnp.concatenate([k_nope, k_rope], axis=-1), v

    def absorb(self, q: Float[Array, "B T N H"]) -> Float[Array, "B T N H2"]:
        """Takes queries to latent form [B, T, N, C + R], where every head shares the keys."""
        q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return jnp.concatenate([project("btnp,cnp->btnc", q_nope, self._key_weight()), q_rope], axis=-1)

    def unabsorb(self, out: Float[Array, "B T N C"]) -> Float[Array, "B T N V"]:
        """Takes the attention's output from latents to each head's values."""
        return project("btnc,cnv->btnv", out, gather_head_weights(self.kv_b_proj[..., self.config.qk_nope_head_dim :]))

    def _key_weight(self):
        """What takes latents to the keys of all heads."""
        return gather_head_weights(self.kv_b_proj[..., : self.config.qk_nope_head_dim])

    def _sparse(self, p, keys, selected, cache, layer):
        p, keys = _share_queries(p, keys)
        q_select, k_select, weights, kv, k_scale, cache = self._index_keys(p, cache, layer)
        if selected is None:
            with jax.named_scope("select"):
                top = self.config.index_topk
                selected = select_keys(q_select, k_select, weights, keys, k=top, k_scale=k_scale)
        else:
            selected = slice_tokens(selected, "heads")
        selected = checkpoint_name(selected, "indices")
        q, scale = self.absorb(p.q), self.config.softmax_scale
        with jax.named_scope("sparse_attention"):
            out, lse = sparse_attention(q, kv, selected, value_dim=self.config.kv_lora_rank, scale=scale)
        lse = checkpoint_name(lse, "lse")
        with jax.named_scope("sparse_indexer_kl"):
            q_index, k_index = self._trainable_index(p, k_select, k_scale, cache)
            kl = sparse_indexer_kl(q_index, k_index, p.weights, q, kv, lse, selected, scale=scale)
        out = tokens_to_heads(self.unabsorb(out))
        return LayerOutput(self._output(out), gather_tokens(kl, "heads"), gather_tokens(selected, "heads"), cache)

    def _dense(self, p, keys, cache, layer):
        own, own_keys = _share_queries(p, keys)
        _, k_select, _, kv, k_scale, new_cache = self._index_keys(own, cache, layer)
        scale = self.config.softmax_scale
        k, v = self.expand(kv)
        with jax.named_scope("dense_attention"):
            if cache is None:
                out, lse = multihead_attention(p.q, k, v, keys, scale=scale)
            else:  # few queries: the latents are read once for all heads, and never expanded
                out, lse = latent_attention(
                    self.absorb(own.q), kv, own_keys, value_dim=self.config.kv_lora_rank, scale=scale
                )
                out, lse = tokens_to_heads(self.unabsorb(out)), tokens_to_heads(lse)
        lse = checkpoint_name(lse, "lse")
        with jax.named_scope("dense_indexer_kl"):
            q_index, k_index = self._trainable_index(own, k_select, k_scale, cache)
            if num_shards("heads") > 1:
                k, _ = self.expand(*jax.lax.stop_gradient((kv, self._key_weight())))
            q, k, lse = jax.lax.stop_gradient((own.q, k, heads_to_tokens(lse)))
            kl = dense_indexer_kl(q_index, k_index, own.weights, q, k, lse, own_keys, scale=scale)
        return LayerOutput(self._output(out), gather_tokens(kl, "heads"), None, new_cache)

    def _index_keys(self, p, cache, layer):
        """What selects and what is attended to: index queries, keys, weights, then latents, key scales, the cache."""
        q_index, k_index, weights = p.q_index, p.k_index, p.weights
        k_scale = jnp.ones(k_index.shape[:2], jnp.float32)
        if self.config.index_fp8:
            (q_index, q_scale), (k_index, k_scale) = quantize(q_index), quantize(k_index)
            weights = weights * q_scale
        kv = sum_gradients(p.kv, "heads")
        if cache is None:
            kv, k_index, k_scale = (gather_sequence(x) for x in (kv, k_index, k_scale))
            return q_index, k_index, weights, kv, k_scale, None
        cache = cache.write(layer, kv, k_index, k_scale)
        kv, k_index, k_scale = cache.read(layer)
        return q_index, k_index, weights, kv, k_scale, cache

    def _trainable_index(self, p, k_select, k_scale, cache):
        """Index queries and keys as the loss sees them: with FP8 their rounded values, with gradients straight through.

        Scales are powers of two, so these make the very scores that the e4m3 numbers and their scales make.
        """
        k_index = sum_gradients(p.k_index, "heads")
        if not self.config.index_fp8:
            return p.q_index, gather_sequence(k_index) if cache is None else k_select
        q_index = straight_through_quantize(p.q_index)
        if cache is None:
            return q_index, gather_sequence(straight_through_quantize(k_index))
        return q_index, dequantize(k_select, k_scale, q_index.dtype)

    def _output(self, out):
        return sum_shards(project("btnv,nvd->btd", out, self.o_proj[...]), "heads")


def _share_queries(p: Projections, keys: KeyRange) -> tuple[Projections, KeyRange]:
    """This shard's share of the queries, with all their heads, and what they reach."""
    q_index, weights, keys = jax.tree.map(lambda x: slice_tokens(x, "heads"), (p.q_index, p.weights, keys))
    return dataclasses.replace(p, q=heads_to_tokens(p.q), q_index=q_index, weights=weights), keys


class RMSNorm(nnx.Module):
    """x / rms(x) · weight, computed in float32."""

    def __init__(self, dim: int, eps: float, dtype: str):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(dim, dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normal * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """The gated feed-forward: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: Config, width: int, *, rngs: nnx.Rngs):
        self.gate_proj = new_weight(config, rngs, config.hidden_size, width)
        self.up_proj = new_weight(config, rngs, config.hidden_size, width)
        self.down_proj = new_weight(config, rngs, width, config.hidden_size)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Applies the block to every token."""
        x = sum_gradients(x, "width")
        gate, up = (project("...d,df->...f", x, weight[...]) for weight in (self.gate_proj, self.up_proj))
        return sum_shards(project("...f,fd->...d", jax.nn.silu(gate) * up, self.down_proj[...]), "width")
