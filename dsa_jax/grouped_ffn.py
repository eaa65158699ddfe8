"""The grouped product: every row runs on its own experts alone.

Rows are sorted by expert into blocks that belong to one expert each, so that the work is a batched product of
[rows, D] blocks with [D, F] weights. `jax.lax.ragged_dot` would run every expert on every row.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from dsa_jax.blockwise import contract, scan

FULL_BLOCK = 128  # rows: at 512 an expert a quarter of the work is padding, and a block still fills a matrix unit
SPARED_SHARE = 16  # of an expert's rows, the most that a block larger than that has: a sixteenth more is padding
CHUNK_BYTES = 1 << 30  # of float32 weights (or their gradients), gathered block by block, that exist at a time
SUMMED_BLOCKS = 32  # whose weight gradients are summed in one product, for a quarter of what computing them took
SPARED_CHUNKS = 8  # about, where rows may be missing: half a chunk, on average, is then multiplied in vain


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
    check_shapes(x, experts, gates, gate_proj, up_proj, down_proj)
    layout = _lay_out(experts, gate_proj.shape[0], chunk_blocks(*gate_proj.shape[1:]))
    return _grouped_ffn(x, gates.astype(jnp.float32), (gate_proj, up_proj, down_proj), layout)


def rows_ffn(
    x: Float[Array, "R D"], experts: Int[Array, " R"], gates: Float32[Array, " R"], weights: tuple[Array, Array, Array]
) -> Float[Array, "R D"]:
    """`expert_ffn` of rows with one expert each, for buffers that are seldom full; without a gradient.

    Rows whose expert lies outside [0, X) are zeros and, as far as they fill chunks of blocks, cost no product.
    """
    layout = _lay_out_rows(experts, weights)
    out, _ = _run_chunks(x, gates[:, None], weights, layout, keep=False)
    return sum_slots(out, layout.row).astype(x.dtype)


def rows_gradients(
    dy: Float[Array, "R D"],
    x: Float[Array, "R D"],
    experts: Int[Array, " R"],
    gates: Float32[Array, " R"],
    weights: tuple[Array, Array, Array],
    dweights: tuple[Array, Array, Array],
) -> tuple[Float[Array, "R D"], Float32[Array, " R"], tuple[Array, Array, Array]]:
    """The gradients of `rows_ffn` by x, gates and weights, from its arguments alone.

    Those by the weights are added to `dweights`, float32 sums of the weights' shapes.
    """
    layout = _lay_out_rows(experts, weights)
    dx, dgates, dweights = _pull_chunks(dy, x, gates[:, None], weights, layout, None, dweights)
    return dx, dgates[:, 0], dweights


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
    """Where the M · k slots stand among the rows of the blocks, themselves [chunks, blocks, rows], empty ones last."""

    slot: Array  # int32 [chunks, blocks, rows]: the slot in each row, M · k in padding
    expert: Array  # int32 [chunks, blocks]: whose weights a block multiplies, ascending
    row: Array  # int32 [M, k]: the row of each slot, past the end where the slot has no expert here
    busy: Array | None  # int32: how many chunks, the first ones, are to run; None for all


def _lay_out_rows(experts: Array, weights: tuple[Array, Array, Array]) -> _Layout:
    num_experts, *dims = weights[0].shape
    return _lay_out(experts[:, None], num_experts, chunk_blocks(*dims), skip=True)


def _lay_out(experts: Array, num_experts: int, chunk: int, *, skip: bool = False) -> _Layout:
    slots = experts.size
    rows = block_rows(slots, num_experts)
    busy = min(num_experts, slots)
    blocks = (slots + busy * (rows - 1)) // rows  # every expert that is busy pads at most rows - 1
    chunks = math.ceil(blocks / min(chunk, math.ceil(blocks / SPARED_CHUNKS)) if skip else blocks / chunk)
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
        busy=-(-last_block[-1] // (blocks // chunks)) if skip else None,
    )


def _over_chunks(fn, carry, chunks, layout):
    """`scan`, of the busy chunks alone where the layout counts them: in the results of the others are zeros.

    A loop of that many steps updates the carry in place; a condition in each step may copy it.
    """
    if layout.busy is None:
        return scan(fn, carry, chunks)

    def at(index):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), chunks)

    def put(index, results, result):
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0), results, result)

    def step(index, state):
        carry, results = state
        carry, result = fn(carry, at(index))
        return carry, put(index, results, result)

    shapes = jax.eval_shape(lambda: fn(carry, at(0))[1])
    results = jax.tree.map(lambda s: jnp.zeros((len(layout.slot), *s.shape), s.dtype), shapes)
    return jax.lax.fori_loop(0, layout.busy, step, (carry, results))


def take(array: Array, indices: Array) -> Array:
    """Rows of `array`, zeros where an index is past its end."""
    return array.at[indices].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _grouped_ffn(x, gates, weights, layout):
    return _grouped_ffn_fwd(x, gates, weights, layout)[0]


def _grouped_ffn_fwd(x, gates, weights, layout):
    out, hidden = _run_chunks(x, gates, weights, layout, keep=True)
    return sum_slots(out, layout.row).astype(x.dtype), (x, gates, weights, layout, hidden)


def _grouped_ffn_bwd(residuals, dy):
    x, gates, weights, layout, hidden = residuals
    zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)
    dx, dgates, dweights = _pull_chunks(dy, x, gates, weights, layout, hidden, zeros)
    return dx, dgates, tuple(d.astype(w.dtype) for d, w in zip(dweights, weights, strict=True)), None


_grouped_ffn.defvjp(_grouped_ffn_fwd, _grouped_ffn_bwd)


def _run_chunks(x, gates, weights, layout, *, keep):
    """The rows of all blocks and, to `keep` for the gradients, their products with gate_proj and up_proj."""
    slots_per_token = gates.shape[1]

    def forward(_, chunk):
        slot, expert = chunk
        gate_proj, up_proj, down_proj = (w[expert].astype(x.dtype) for w in weights)
        rows = take(x, slot // slots_per_token)
        gate, up = _project(rows, gate_proj, up_proj)
        hidden = _activation(gate, up) * take(gates.reshape(-1), slot)[..., None]
        out = contract("nbf,nfd->nbd", hidden.astype(x.dtype), down_proj).astype(x.dtype)
        return None, (out, (gate, up) if keep else None)

    return _over_chunks(forward, None, (layout.slot, layout.expert), layout)[1]


def _pull_chunks(dy, x, gates, weights, layout, hidden, dweights):
    """Gradients by x and gates, and those by the weights added to `dweights`; what was not kept is computed again."""

    def backward(dweights, chunk):
        slot, expert, hidden = chunk
        gate_proj, up_proj, down_proj = (w[expert].astype(x.dtype) for w in weights)
        rows, dout = (take(array, slot // gates.shape[1]) for array in (x, dy))
        gate, up = _project(rows, gate_proj, up_proj) if hidden is None else hidden
        row_gate = take(gates.reshape(-1), slot)[..., None]
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

    chunks = (layout.slot, layout.expert, hidden)
    dweights, (drows, dgates) = _over_chunks(backward, dweights, chunks, layout)
    dx = sum_slots(drows, layout.row).astype(x.dtype)
    return dx, take(dgates.reshape(-1), layout.row), dweights


def _project(rows, gate_proj, up_proj):
    return tuple(contract("nbd,ndf->nbf", rows, w).astype(rows.dtype) for w in (gate_proj, up_proj))


def _activation(gate, up):
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return jax.nn.silu(gate) * up


def sum_slots(rows: Array, row: Array) -> Array:
    """Adds up each token's slots [M, k] of rows [blocks…, D] in float32, absent ones past the end.

    It reads rows: scattering them would leave the order to chance.
    """
    return take(rows.reshape(-1, rows.shape[-1]), row).astype(jnp.float32).sum(1)


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


def check_shapes(x, experts, gates, gate_proj, up_proj, down_proj):
    """Raises a ValueError that names the first array whose shape does not fit the others."""
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
