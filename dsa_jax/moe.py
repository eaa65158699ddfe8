"""Mixture of experts: the group-limited router, and the feed-forward whose tokens run on their own experts alone.

`route` and `update_bias` are the router's functions, `MoE` the layer. The products are in `dsa_jax.grouped_ffn`, the
exchange between shards of experts in `dsa_jax.parallel.expert_parallel`.

References:
  DeepSeek-V3, arXiv:2412.19437, section 2.1.2 (the router, and balance without an auxiliary loss).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int

from dsa_jax.blockwise import contract
from dsa_jax.config import Config
from dsa_jax.grouped_ffn import expert_ffn
from dsa_jax.layers import MLP
from dsa_jax.nn import new_weight, show_arguments
from dsa_jax.parallel.collectives import mesh_axes, sum_gradients, sum_shards, sum_statistics
from dsa_jax.parallel.expert_parallel import expert_parallel_ffn, has_ragged_exchange
from dsa_jax.quantization import BlockScaled, quantize_blocks


def route(
    x: Float[Array, "*B D"],
    weight: Float[Array, "D X"],
    bias: Float[Array, " X"],
    *,
    config: Config,
    experts: Int[Array, "*B k"] | None = None,
) -> tuple[Int[Array, "*B k"], Float32[Array, "*B k"]]:
    """Chooses each token's experts and gates: s = sigmoid(x · weight), g_i = f · s_i / sum_j s_j over the chosen.

    The biased scores s + bias choose: the `topk_group` groups whose two best experts sum highest, then the
    `num_experts_per_tok` best experts in these; ties go to the lowest index. The unbiased scores of the chosen are the
    gates, divided by their sum if `norm_topk_prob`, times f = `routed_scaling_factor`. All in float32.

    Args:
      x: the tokens, in any dtype.
      weight: the router's.
      bias: the router's, which chooses and has no gradient.
      config: for its groups, counts and factors.
      experts: the choice, if it is made already; the gates are still computed. -1 leaves it to the scores.

    Returns:
      The experts of every token, and their gates.

    References:
      DeepSeek-V3, arXiv:2412.19437, Eqs. 12–16.

    Examples:
      >>> config = Config.tiny()
      >>> experts, gates = route(jnp.zeros(4), jnp.zeros((4, 8)), jnp.arange(8.0), config=config)
      >>> experts.tolist(), gates.tolist()
      ([7, 6], [1.25, 1.25])
    """
    logits = contract("...d,dx->...x", x.astype(jnp.float32), weight.astype(jnp.float32))
    scores = jax.nn.sigmoid(checkpoint_name(logits, "router"))
    chosen = _choose(scores + bias, config)
    experts = chosen if experts is None else jnp.where(experts < 0, chosen, experts)
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    if config.norm_topk_prob:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return experts, gates * config.routed_scaling_factor


def _choose(biased, config):
    """Chooses the experts of every token by their biased scores [*B, X]."""
    grouped = biased.reshape(*biased.shape[:-1], config.n_group, -1)
    group_scores = jax.lax.top_k(grouped, 2)[0].sum(-1)
    groups = jax.lax.top_k(group_scores, config.topk_group)[1]
    eligible = (groups[..., None] == jnp.arange(config.n_group)).any(-2)
    eligible_scores = jnp.where(eligible[..., None], grouped, -jnp.inf).reshape(biased.shape)
    return jax.lax.top_k(eligible_scores, config.num_experts_per_tok)[1]


def expert_load(experts: Int[Array, "*B k"], valid: Bool[Array, "*B"] | None, num_experts: int) -> Float32[Array, " X"]:
    """Counts the (token, slot) pairs that each expert got, over the tokens that are `valid`, or all if None.

    Examples:
      >>> expert_load(jnp.array([[0, 1], [1, 3]]), jnp.array([True, True]), 4).tolist()
      [1.0, 2.0, 0.0, 1.0]
    """
    if valid is not None:
        experts = jnp.where(valid[..., None], experts, num_experts)
    counts = jnp.zeros(num_experts, jnp.int32).at[experts.reshape(-1)].add(1, mode="drop")
    return counts.astype(jnp.float32)


def update_bias(bias: Float[Array, "*L X"], load: Float[Array, "*L X"], rate: float) -> Float[Array, "*L X"]:
    """Moves each expert's selection bias by `rate`: up where its load is under the mean, down where it is over.

    References:
      Wang et al., arXiv:2408.15664; DeepSeek-V3, section 2.1.2.

    Examples:
      >>> update_bias(jnp.zeros(3), jnp.array([4.0, 0.0, 2.0]), 0.5).tolist()
      [-0.5, 0.5, 0.0]
    """
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


@show_arguments
class Router(nnx.Module):
    """The router: its weight, and the bias that evens the load, which has a say in the choice and no gradient."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.weight = new_weight(config, rngs, config.hidden_size, config.n_routed_experts)
        self.e_score_correction_bias = nnx.Param(jnp.zeros(config.n_routed_experts, jnp.float32))

    def __call__(
        self, x: Float[Array, "*B D"], experts: Int[Array, "*B k"] | None = None
    ) -> tuple[Int[Array, "*B k"], Float32[Array, "*B k"]]:
        """Chooses every token's experts, unless they are given, and computes their gates: see `route`."""
        return route(x, self.weight[...], self.e_score_correction_bias[...], config=self.config, experts=experts)


@show_arguments
class Experts(nnx.Module):
    """The routed experts: their weights, stacked; on a mesh, this shard's experts and its part of their width.

    With `expert_dtype="fp8"` the weights are e4m3, and each has float32 scales of its blocks of 128 × 128 beside it, in
    the order of its dimensions: `gate_proj` [X, D, F] has `gate_proj_scale` [X, D / 128, F / 128]. Values and scales
    are parameters of their own, so that they are stacked, scanned, sharded, saved and counted as all others are.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        experts, model_dim, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj, self.gate_proj_scale = _new_expert_weight(config, rngs, experts, model_dim, width)
        self.up_proj, self.up_proj_scale = _new_expert_weight(config, rngs, experts, model_dim, width)
        self.down_proj, self.down_proj_scale = _new_expert_weight(config, rngs, experts, width, model_dim)

    def __call__(
        self, x: Float[Array, "M D"], experts: Int[Array, "M k"], gates: Float[Array, "M k"]
    ) -> Float[Array, "M D"]:
        """Runs every token on its own experts, which may be on other devices."""
        weights = (
            _as_held(self.gate_proj, self.gate_proj_scale),
            _as_held(self.up_proj, self.up_proj_scale),
            _as_held(self.down_proj, self.down_proj_scale),
        )
        x, gates, axis = sum_gradients(x, "width"), sum_gradients(gates, "width"), mesh_axes("experts")
        if axis:
            y = expert_parallel_ffn(x, experts, gates, *weights, axis=axis[0], ragged=has_ragged_exchange())
        else:
            y = expert_ffn(x, experts, gates, *weights)
        return sum_shards(y, "width")


def _new_expert_weight(config: Config, rngs: nnx.Rngs, *shape: int) -> tuple[nnx.Param[Array], nnx.Param[Array] | None]:
    """Draws a weight as `new_weight` does, in FP8 with its scale if the config says so."""
    weight = new_weight(config, rngs, *shape)
    if config.expert_dtype is None:
        return weight, None
    rounded = quantize_blocks(weight[...])
    return nnx.Param(rounded.values), nnx.Param(rounded.scale)


def _as_held(weight: nnx.Param[Array], scale: nnx.Param[Array] | None) -> Array | BlockScaled:
    """Joins a weight in FP8 and its scale."""
    return weight[...] if scale is None else BlockScaled(weight[...], scale[...])


@show_arguments
class MoE(nnx.Module):
    """The feed-forward of most layers: routed experts, and shared ones that every token passes through.

    Examples:
      >>> config = Config.tiny()
      >>> moe = MoE(config, rngs=nnx.Rngs(0))
      >>> y, load, experts = moe(jnp.ones((1, 3, config.hidden_size)))
      >>> y.shape, load.sum().item(), experts.shape
      ((1, 3, 128), 6.0, (1, 3, 2))
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.gate = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        shared_width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config, shared_width, rngs=rngs) if config.n_shared_experts else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        valid: Bool[Array, "B T"] | None = None,
        routed: Int[Array, "B T k"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float32[Array, " X"], Int[Array, "B T k"]]:
        """Runs every token through its experts and the shared ones.

        Args:
          x: the tokens.
          valid: which tokens count in the load, all if None; padding should not.
          routed: the experts that tokens go to, the router's choice if None or -1.

        Returns:
          The result, the (token, slot) pairs that each expert got on all shards, and every token's experts.
        """
        with jax.named_scope("route"):
            experts, gates = self.gate(x, routed)
            load = sum_statistics(expert_load(experts, valid, self.gate.config.n_routed_experts), "tokens")
        with jax.named_scope("experts"):
            slots = experts.shape[-1]
            y = self.experts(x.reshape(-1, x.shape[-1]), experts.reshape(-1, slots), gates.reshape(-1, slots))
            y = y.reshape(x.shape)
        if self.shared_experts is not None:
            with jax.named_scope("shared_experts"):
                y = y + self.shared_experts(x)
        return y, load, experts
