"""Mixture of experts: the group-limited router and the grouped product that runs every row on its own experts alone.

Rows are sorted by expert into blocks that belong to one expert each, so that the work is a batched product of
[rows, D] blocks with [D, F] weights. `jax.lax.ragged_dot` would run every expert on every row.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from dsa_jax.blocks import contract, scan
from dsa_jax.config import Config
from dsa_jax.indexer import new_weight
from dsa_jax.layers import MLP

FULL_BLOCK = 128  # rows: at 512 an expert a quarter of the work is padding, and a block still fills a matrix unit
SPARED_SHARE = 16  # of an expert's rows, the most that a block larger than that has: a sixteenth more is padding
CHUNK_BYTES = 1 << 30  # of float32 weights (or their gradients), gathered block by block, that exist at a time
SUMMED_BLOCKS = 32  # whose weight gradients are summed in one product, for a quarter of what computing them took


def route(
    x: Float[Array, "*B D"], weight: Float[Array, "D X"], bias: Float[Array, " X"], *, config: Config
) -> tuple[Int[Array, "*B k"], Float32[Array, "*B k"]]:
    """Chooses each token's experts and their gates, all in float32.

    Scores are sigmoid(x · weight). The biased scores choose: the `topk_group` groups whose two best experts sum
    highest, then the `num_experts_per_tok` best experts in them; ties go to the lowest index. The unbiased scores of
    the chosen are the gates, renormalised if `norm_topk_prob`, times `routed_scaling_factor`.
    """
    scores = jax.nn.sigmoid(contract("...d,dx->...x", x.astype(jnp.float32), weight.astype(jnp.float32)))
    biased = (scores + bias).reshape(*scores.shape[:-1], config.n_group, -1)
    group_scores = jax.lax.top_k(biased, 2)[0].sum(-1)
    groups = jax.lax.top_k(group_scores, config.topk_group)[1]
    eligible = (groups[..., None] == jnp.arange(config.n_group)).any(-2)
    biased = jnp.where(eligible[..., None], biased, -jnp.inf).reshape(scores.shape)
    experts = jax.lax.top_k(biased, config.num_experts_per_tok)[1]
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    if config.norm_topk_prob:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return experts, gates * config.routed_scaling_factor


def expert_load(experts: Int[Array, "*B k"], valid: Bool[Array, "*B"] | None, num_experts: int) -> Float32[Array, " X"]:
    """How many (token, slot) pairs each expert got, over the tokens that are `valid`."""
    if valid is not None:
        experts = jnp.where(valid[..., None], experts, num_experts)
    counts = jnp.zeros(num_experts, jnp.int32).at[experts.reshape(-1)].add(1, mode="drop")
    return counts.astype(jnp.float32)


def update_bias(bias: Float[Array, "*L X"], load: Float[Array, "*L X"], rate: float) -> Float[Array, "*L X"]:
    """Moves each expert's selection bias by `rate`: up where its load is under the mean, down where it is over."""
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


def expert_ffn(
    x: Float[Array, "M D"],
    experts: Int[Array, "M k"],
    gates: Float[Array, "M k"],
    gate_proj: Float[Array, "X D F"],
    up_proj: Float[Array, "X D F"],
    down_proj: Float[Array, "X F D"],
) -> Float[Array, "M D"]:
    """y = sum over a token's experts e of gate_e · down_e(silu(gate_proj_e x) · up_proj_e x); no token is dropped.

    Products are in the dtype of `x`, accumulated in float32; gradients by the weights accumulate in float32 over all
    rows, in a fixed order. A slot whose expert lies outside [0, X) contributes nothing, so a shard that holds some of
    the experts may pass the numbers of all. Memory grows with rows and weights, never with rows × weights.
    """
    _check_shapes(x, experts, gates, gate_proj, up_proj, down_proj)
    layout = _lay_out(experts, gate_proj.shape[0], chunk_blocks(*gate_proj.shape[1:]))
    return _grouped_ffn(x, gates.astype(jnp.float32), (gate_proj, up_proj, down_proj), layout)


def block_rows(slots: int, num_experts: int) -> int:
    """Rows of a block, a power of two: up to 128, but no more than an expert fills on average: decoding pads nothing.

    Every block reads its expert's weights and writes their gradients, so experts with many rows have larger blocks.
    """
    each = max(slots // num_experts, 1)
    return 1 << min(each, max(FULL_BLOCK, each // SPARED_SHARE)).bit_length() - 1


def chunk_blocks(model_dim: int, width: int) -> int:
    """How many blocks run at a time: as many as may have their own copy of an expert's three weights."""
    return max(1, CHUNK_BYTES // (3 * 4 * model_dim * width))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the M · k slots stand among the rows of the blocks, themselves [chunks, blocks, rows]."""

    slot: Array  # int32 [chunks, blocks, rows]: the slot in each row, M · k in padding
    expert: Array  # int32 [chunks, blocks]: whose weights a block multiplies, ascending
    row: Array  # int32 [M, k]: the row of each slot, past the end where the slot has no expert here


def _lay_out(experts: Array, num_experts: int, chunk: int) -> _Layout:
    slots = experts.size
    rows = block_rows(slots, num_experts)
    busy = min(num_experts, slots)
    blocks = (slots + busy * (rows - 1)) // rows  # every expert that is busy pads at most rows - 1
    chunks = math.ceil(blocks / chunk)
    blocks = chunks * math.ceil(blocks / chunks)

    flat = experts.reshape(-1).astype(jnp.int32)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = jnp.argsort(flat, stable=True)
    ranked = flat[order]
    first_slot = jnp.searchsorted(ranked, jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    last_block = jnp.cumsum(-(-jnp.diff(first_slot) // rows))
    first_row = jnp.append(0, last_block) * rows
    row = first_row[ranked] + jnp.arange(slots, dtype=jnp.int32) - first_slot[ranked]
    row = jnp.where(ranked < num_experts, row, blocks * rows)
    expert = jnp.searchsorted(last_block, jnp.arange(blocks, dtype=jnp.int32), side="right")
    return _Layout(
        slot=jnp.full(blocks * rows, slots)
        .at[row]
        .set(order, mode="drop", unique_indices=True)
        .reshape(chunks, -1, rows),
        expert=jnp.minimum(expert, num_experts - 1).astype(jnp.int32).reshape(chunks, -1),
        row=jnp.zeros(slots, jnp.int32).at[order].set(row, unique_indices=True).reshape(experts.shape),
    )


def _take(array: Array, indices: Array) -> Array:
    """Rows of `array`, zeros where an index is past its end."""
    return array.at[indices].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _grouped_ffn(x, gates, weights, layout):
    return _grouped_ffn_fwd(x, gates, weights, layout)[0]


def _grouped_ffn_fwd(x, gates, weights, layout):
    slots_per_token = gates.shape[1]

    def forward(_, chunk):
        slot, expert = chunk
        gate_proj, up_proj, down_proj = (w[expert].astype(x.dtype) for w in weights)
        rows = _take(x, slot // slots_per_token)
        gate = contract("nbd,ndf->nbf", rows, gate_proj).astype(x.dtype)
        up = contract("nbd,ndf->nbf", rows, up_proj).astype(x.dtype)
        hidden = _activation(gate, up) * _take(gates.reshape(-1), slot)[..., None]
        return None, (gate, up, contract("nbf,nfd->nbd", hidden.astype(x.dtype), down_proj).astype(x.dtype))

    _, (gate, up, out) = scan(forward, None, (layout.slot, layout.expert))
    return _sum_slots(out, layout, x), (x, gates, weights, layout, gate, up)


def _grouped_ffn_bwd(residuals, dy):
    x, gates, weights, layout, gate, up = residuals

    def backward(dweights, chunk):
        slot, expert, gate, up = chunk
        gate_proj, up_proj, down_proj = (w[expert].astype(x.dtype) for w in weights)
        rows, dout = (_take(array, slot // gates.shape[1]) for array in (x, dy))
        row_gate = _take(gates.reshape(-1), slot)[..., None]
        activation, pull = jax.vjp(_activation, gate, up)
        dhidden = contract("nbd,nfd->nbf", dout, down_proj)
        dgate, dup = pull(dhidden * row_gate)
        drows = contract("nbf,ndf->nbd", dgate, gate_proj) + contract("nbf,ndf->nbd", dup, up_proj)
        products = (
            contract("nbd,nbf->ndf", rows, dgate),
            contract("nbd,nbf->ndf", rows, dup),
            contract("nbf,nbd->nfd", (activation * row_gate).astype(x.dtype), dout),
        )
        dweights = _add_by_expert(dweights, products, expert)
        return dweights, (drows.astype(x.dtype), jnp.sum(dhidden * activation, -1))

    zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)
    dweights, (drows, dgates) = scan(backward, zeros, (layout.slot, layout.expert, gate, up))
    dweights = tuple(d.astype(w.dtype) for d, w in zip(dweights, weights, strict=True))
    return _sum_slots(drows, layout, x), _take(dgates.reshape(-1), layout.row), dweights, None


_grouped_ffn.defvjp(_grouped_ffn_fwd, _grouped_ffn_bwd)


def _activation(gate, up):
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return jax.nn.silu(gate) * up


def _sum_slots(rows, layout, like):
    """Adds up each token's slots, in float32; reading rows where scattering them would leave the order to chance."""
    return _take(rows.reshape(-1, like.shape[1]), layout.row).astype(jnp.float32).sum(1).astype(like.dtype)


def _add_by_expert(totals, products, expert):
    """Adds [blocks, …] gradients to the totals [X, …] of their experts, in an order that does not depend on scheduling.

    Blocks of one expert are neighbours. A product with zeros and ones sums them, then every expert is written once.
    """
    num_experts, blocks = totals[0].shape[0], expert.shape[0]

    def add(totals, group):
        expert, products = group
        size = expert.shape[0]
        opens = jnp.append(True, expert[1:] != expert[:-1])
        rank = jnp.cumsum(opens) - 1
        distinct = min(num_experts, size)
        owner = jnp.full(distinct, num_experts).at[rank].set(expert)
        member = (rank == jnp.arange(distinct)[:, None]).astype(jnp.float32)
        sums = (contract("rn,n...->r...", member, p) for p in products)
        return tuple(
            t.at[owner].add(s, mode="drop", unique_indices=True) for t, s in zip(totals, sums, strict=True)
        ), None

    if min(num_experts, blocks) <= SUMMED_BLOCKS:
        return add(totals, (expert, products))[0]
    pad = -blocks % SUMMED_BLOCKS
    expert = jnp.pad(expert, (0, pad), mode="edge")
    products = [jnp.pad(p, [(0, pad), (0, 0), (0, 0)]) for p in products]
    groups = jax.tree.map(lambda a: a.reshape(-1, SUMMED_BLOCKS, *a.shape[1:]), (expert, products))
    return jax.lax.scan(add, totals, groups)[0]


def _check_shapes(x, experts, gates, gate_proj, up_proj, down_proj):
    num_experts, model_dim, width = gate_proj.shape
    for name, shape, expected in (
        ("x", x.shape, (x.shape[0], model_dim)),
        ("experts", experts.shape, (x.shape[0], *experts.shape[1:2])),
        ("gates", gates.shape, experts.shape),
        ("up_proj", up_proj.shape, gate_proj.shape),
        ("down_proj", down_proj.shape, (num_experts, width, model_dim)),
    ):
        if shape != expected:
            raise ValueError(f"{name} must be of shape {expected}, got {shape}")


class Router(nnx.Module):
    """The router's weight, and the bias that evens the load: it has a say in the choice and no gradient."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.weight = new_weight(config, rngs, config.hidden_size, config.n_routed_experts)
        self.e_score_correction_bias = nnx.Param(jnp.zeros(config.n_routed_experts, jnp.float32))

    def __call__(self, x: Float[Array, "*B D"]) -> tuple[Int[Array, "*B k"], Float32[Array, "*B k"]]:
        """Chooses experts and gates for every token."""
        return route(x, self.weight[...], self.e_score_correction_bias[...], config=self.config)


class Experts(nnx.Module):
    """The routed experts' weights, stacked."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        experts, model_dim, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = new_weight(config, rngs, experts, model_dim, width)
        self.up_proj = new_weight(config, rngs, experts, model_dim, width)
        self.down_proj = new_weight(config, rngs, experts, width, model_dim)

    def __call__(
        self, x: Float[Array, "M D"], experts: Int[Array, "M k"], gates: Float[Array, "M k"]
    ) -> Float[Array, "M D"]:
        """Runs every token on its own experts."""
        return expert_ffn(x, experts, gates, self.gate_proj[...], self.up_proj[...], self.down_proj[...])


class MoE(nnx.Module):
    """The feed-forward of most layers: routed experts, and shared ones that every token passes through."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.gate = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        shared_width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config, shared_width, rngs=rngs) if config.n_shared_experts else None

    def __call__(
        self, x: Float[Array, "B T D"], *, valid: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float32[Array, " X"]]:
        """Returns y and how many (token, slot) pairs each expert got; tokens that are not `valid` do not count."""
        with jax.named_scope("route"):
            experts, gates = self.gate(x)
            load = expert_load(experts, valid, self.gate.config.n_routed_experts)
        with jax.named_scope("experts"):
            slots = experts.shape[-1]
            y = self.experts(x.reshape(-1, x.shape[-1]), experts.reshape(-1, slots), gates.reshape(-1, slots))
            y = y.reshape(x.shape)
        if self.shared_experts is not None:
            with jax.named_scope("shared_experts"):
                y = y + self.shared_experts(x)
        return y, load
