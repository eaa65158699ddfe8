"""Computes a mixture's feed-forward as a grouped product: every row runs on its own experts alone.

A slot is a pair of a token and one of its experts. Slots are sorted by expert into blocks of rows that belong to one
expert each, the last of an expert padded, so that the work is a batched product of [rows, D] blocks with [D, F]
weights. `jax.lax.ragged_dot` would run every expert on every row: 8, 64 and 258 times the ideal FLOPs were measured
with 8, 64 and 256 experts. Blocks run a chunk at a time, since each reads a copy of its expert's weights.

`expert_ffn` is the layer, with gradients; `rows_ffn` and `rows_gradients` are its two halves for rows that another
shard has sent (`dsa_jax.parallel.expert_parallel`). On Hopper's tensor cores grouped products in kernels do the same
(`dsa_jax.pallas_kernels.grouped_product`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from dsa_jax.blockwise import contract, even_block, join_queries, scan, split_queries
from dsa_jax.pallas_kernels import Implementation, choose_implementation
from dsa_jax.pallas_kernels import grouped_product as kernels
from dsa_jax.quantization import BlockScaled, block_counts, cast_weight

type Weights = tuple[Array | BlockScaled, Array | BlockScaled, Array | BlockScaled]  # gate_proj, up_proj, down_proj

# Operations, in messages and in plans: where all slots have an expert here, or some.
WHOLE, PARTIAL = "expert_ffn", "rows_ffn"

# Rows of a block that fills a matrix unit. Shapes are static, so every expert is allotted a block's worth of padding: a
# quarter more work at 512 rows an expert. Smaller blocks would pad less and read weights more often.
FULL_BLOCK_ROWS = 128

# Blocks of an expert with many rows, at least. Beyond 2048 rows an expert (16 of the above) blocks grow with the rows,
# so that weights are read no more often, and padding stays below a sixteenth of the work.
BLOCKS_PER_LARGE_EXPERT = 16

# Bytes of float32 weights (or of their gradients), gathered block by block, that exist at a time.
CHUNK_BYTES = 1 << 30

# Bytes of the rows that kernels sort by expert at a time, in bfloat16. Their backward pass holds about four times that;
# halving it would add up the weights' gradients twice as often.
ROW_BYTES = 1 << 30

# Blocks whose weight gradients one product sums. The sum then takes about a quarter of what computing them took.
BLOCKS_PER_SUM = 32

# Chunks into which a buffer is cut that may lack rows, at least about so many. Chunks without a row are skipped, and
# half a chunk, on average, is multiplied in vain.
CHUNKS_PER_PARTIAL_BUFFER = 8


def expert_ffn(
    x: Float[Array, "M D"],
    experts: Int[Array, "M k"],
    gates: Float[Array, "M k"],
    gate_proj: Float[Array, "X D F"] | BlockScaled,
    up_proj: Float[Array, "X D F"] | BlockScaled,
    down_proj: Float[Array, "X F D"] | BlockScaled,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M D"]:
    """Computes y_m = sum_k gates_mk · down_e(silu(gate_e x_m) · (up_e x_m)), e = experts_mk; no token is dropped.

    Products are in the dtype of `x`, accumulated in float32; gradients by the weights accumulate in float32 over all
    rows, in a fixed order, so bits repeat. The backward pass computes the products with gate and up again. Memory grows
    with rows and weights, never with rows × weights.

    Args:
      x: the tokens.
      experts: the experts of each token. A slot outside [0, X) contributes nothing, so a shard that holds a part of the
        experts may pass the numbers of all.
      gates: what each expert's result is multiplied by.
      gate_proj: the experts' weights, as are the next two; cast to the dtype of `x`, or multiplied out if in FP8, which
        has no gradients.
      up_proj: see `gate_proj`.
      down_proj: see `gate_proj`.
      implementation: "xla", "pallas", or None for XLA unless a block of code is told otherwise.

    Returns:
      y in the dtype of `x`, with gradients by everything but `experts`.

    Raises:
      ValueError: if an array's shape does not fit the others, or for "pallas" where kernels cannot take them.

    Examples:
      >>> x, weight = jnp.ones((3, 4)), jnp.ones((2, 4, 8))
      >>> experts, gates = jnp.array([[0], [1], [1]]), jnp.ones((3, 1))
      >>> expert_ffn(x, experts, gates, weight, weight, jnp.ones((2, 8, 4))).shape
      (3, 4)
    """
    check_shapes(x, experts, gates, gate_proj, up_proj, down_proj)
    return _expert_ffn(implementation, x, gates.astype(jnp.float32), (gate_proj, up_proj, down_proj), experts)


def rows_ffn(
    x: Float[Array, "R D"],
    experts: Int[Array, " R"],
    gates: Float32[Array, " R"],
    weights: Weights,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "R D"]:
    """Computes `expert_ffn` of rows with one expert each, for buffers that are seldom full; without a gradient.

    Args:
      x: the rows.
      experts: one expert a row. Rows outside [0, X) come out zero and, as far as they fill chunks of blocks, cost no
        product.
      gates: one gate a row.
      weights: gate_proj, up_proj [X, D, F] and down_proj [X, F, D], as `expert_ffn` takes them.
      implementation: as in `expert_ffn`.

    Returns:
      The rows' results in the dtype of `x`.
    """
    return _run(implementation, x, experts[:, None], gates[:, None], weights, partial=True)


def rows_gradients(
    dy: Float[Array, "R D"],
    x: Float[Array, "R D"],
    experts: Int[Array, " R"],
    gates: Float32[Array, " R"],
    weights: tuple[Array, Array, Array],
    dweights: tuple[Array, Array, Array],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "R D"], Float32[Array, " R"], tuple[Array, Array, Array]]:
    """Computes the gradients of `rows_ffn` by x, gates and weights, from its arguments alone.

    Args:
      dy: the gradient by the rows' results.
      x: the rows, as the next three given to `rows_ffn`.
      experts: see `x`.
      gates: see `x`.
      weights: see `x`.
      dweights: float32 sums of the weights' shapes, to which the weights' gradients are added.
      implementation: as in `expert_ffn`.

    Returns:
      Gradients by `x` (in its dtype) and by `gates`, and the new sums.
    """
    dx, dgates, dweights = _pull(
        implementation, dy, x, experts[:, None], gates[:, None], weights, dweights, partial=True
    )
    return dx, dgates[:, 0], dweights


def block_rows(slots: int, num_experts: int) -> int:
    """Computes the rows of a block, a power of two and no more than an expert fills on average: decoding pads nothing.

    Every block reads its expert's weights and writes their gradients, so experts with many rows have larger blocks.

    Examples:
      >>> [block_rows(slots, 256) for slots in (256, 1 << 16, 1 << 20)]  # 1, 256 and 4096 slots an expert
      [1, 128, 256]
    """
    rows_per_expert = max(slots // num_experts, 1)
    most = max(FULL_BLOCK_ROWS, rows_per_expert // BLOCKS_PER_LARGE_EXPERT)
    return 1 << min(rows_per_expert, most).bit_length() - 1


def chunk_blocks(model_dim: int, width: int) -> int:
    """Computes how many blocks run at a time, each with its own float32 copy of an expert's three weights."""
    return max(1, CHUNK_BYTES // (3 * 4 * model_dim * width))


def check_gradients(weights: Weights) -> None:
    """Raises ValueError unless the experts' weights may have gradients, which those in FP8 have not."""
    if any(isinstance(w, BlockScaled) for w in weights):
        raise ValueError("experts in FP8 have no gradients: to train, load the checkpoint with expert_dtype=None")


def _chunk_weights(weights: Weights, expert: Array, dtype) -> tuple[Array, ...]:
    """Takes the weights of a chunk's blocks, in the dtype of the products; of FP8 these alone are multiplied out."""
    return tuple(cast_weight(jax.tree.map(lambda a: a[expert], w), dtype) for w in weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Layout:
    """Holds where the M · k slots stand among the rows of blocks [chunks, blocks, rows]; empty blocks are last."""

    slot: Array  # int32 [chunks, blocks, rows]: the slot in each row, M · k in padding
    expert: Array  # int32 [chunks, blocks]: whose weights a block multiplies, ascending
    row: Array  # int32 [M, k]: the row of each slot, past the end where the slot's expert is outside [0, X)
    busy_chunks: Array | None  # int32: how many chunks, the first ones, hold a slot and run; None if all run


def _lay_out(experts: Array, num_experts: int, max_chunk_blocks: int, *, skip: bool = False) -> _Layout:
    """Sorts slots into blocks, and cuts these into chunks; with `skip`, chunks without a slot are not to run."""
    slots = experts.size
    rows = block_rows(slots, num_experts)
    used_experts = min(num_experts, slots)  # at most
    blocks = (slots + used_experts * (rows - 1)) // rows  # every expert that is used pads at most rows - 1
    if skip:
        max_chunk_blocks = min(max_chunk_blocks, math.ceil(blocks / CHUNKS_PER_PARTIAL_BUFFER))
    chunks = math.ceil(blocks / max_chunk_blocks)
    blocks = chunks * math.ceil(blocks / chunks)  # chunks of one size

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
        busy_chunks=-(-last_block[-1] // (blocks // chunks)) if skip else None,
    )


def _over_chunks(fn, carry, chunks, layout):
    """Scans `fn(carry, chunk) -> (carry, result)` over the chunks that are to run; the others' results are zeros.

    A loop of as many steps as run updates the carry in place; a condition in each step of all might copy it.
    """
    if layout.busy_chunks is None:
        return scan(fn, carry, chunks)

    def chunk_at(index):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), chunks)

    def write_at(index, results, result):
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0), results, result)

    def step(index, state):
        carry, results = state
        carry, result = fn(carry, chunk_at(index))
        return carry, write_at(index, results, result)

    shapes = jax.eval_shape(lambda: fn(carry, chunk_at(0))[1])
    results = jax.tree.map(lambda s: jnp.zeros((len(layout.slot), *s.shape), s.dtype), shapes)
    return jax.lax.fori_loop(0, layout.busy_chunks, step, (carry, results))


def take(array: Array, indices: Array) -> Array:
    """Takes rows of `array`, zeros where an index is past its end.

    Examples:
      >>> take(jnp.array([5, 6]), jnp.array([1, 2])).tolist()
      [6, 0]
    """
    return array.at[indices].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_ffn(implementation, x, gates, weights, experts):
    return _run(implementation, x, experts, gates, weights, partial=False)


def _expert_ffn_bwd(implementation, residuals, dy):
    x, gates, weights, experts = residuals
    check_gradients(weights)
    dx, dgates, dweights = _pull(implementation, dy, x, experts, gates, weights, (), partial=False)
    return dx, dgates, tuple(d.astype(w.dtype) for d, w in zip(dweights, weights, strict=True)), None


_expert_ffn.defvjp(lambda *args: (_expert_ffn(*args), args[1:]), _expert_ffn_bwd)


def _run(implementation, x, experts, gates, weights, *, partial: bool):
    """Computes the results; `partial` says that many slots may have no expert."""
    choose = functools.partial(choose_implementation, PARTIAL if partial else WHOLE, implementation)
    arrays = x, experts, gates, *_arrays(weights)
    xla = functools.partial(_blocks_ffn, partial=partial)
    return choose(kernels.why_not(*arrays), xla=xla, pallas=_kernels_ffn)(*arrays)


def _pull(implementation, dy, x, experts, gates, weights, dweights, *, partial: bool):
    """Computes the gradients by x, gates and the weights, added to `dweights` if any; they are not in FP8."""
    operation = f"the backward of {PARTIAL if partial else WHOLE}"
    choose = functools.partial(choose_implementation, operation, implementation)
    why_not = kernels.why_not(x, experts, gates, *weights)
    xla = functools.partial(_blocks_gradients, partial=partial)
    function = choose(why_not, xla=xla, pallas=_kernels_gradients)
    dx, dgates, *dweights = function(dy, x, experts, gates, *weights, *dweights)
    return dx, dgates, tuple(dweights)


def _arrays(weights: Weights) -> list[Array]:
    """Lists the arrays of the weights: the three, and behind them their scales if they are in FP8."""
    values = [w.values if isinstance(w, BlockScaled) else w for w in weights]
    return [*values, *(w.scale for w in weights if isinstance(w, BlockScaled))]


def _kernels_ffn(x, experts, gates, *arrays):
    """Computes the results by kernels, some tokens at a time; the arrays are those of `_arrays`."""
    blocks = _split_tokens(x, experts, gates)
    results = scan(lambda _, tokens: (None, kernels.expert_ffn(*tokens, *arrays)), None, blocks)[1]
    return join_queries(results, len(x))


def _kernels_gradients(dy, x, experts, gates, *arrays):
    """Computes the gradients by kernels, some tokens at a time; the arrays are those of `_blocks_gradients`."""
    weights, dweights = arrays[:3], arrays[3:]
    blocks = _split_tokens(x, experts, gates, dy)
    if len(blocks[0]) > 1:
        dweights = dweights or tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)

    def add(dweights, tokens):
        *tokens, dy = tokens
        dx, dgates, *dweights = kernels.expert_ffn_gradients(dy, *tokens, *weights, *dweights)
        return tuple(dweights), (dx, dgates)

    dweights, results = scan(add, dweights, blocks)
    return *join_queries(results, len(x)), *dweights


def _split_tokens(x, experts, *others):
    """Cuts the tokens into blocks whose sorted rows take ROW_BYTES at most; those that fill the last have no expert."""
    most = max(1, ROW_BYTES // max(1, 2 * experts.shape[1] * x.shape[1]))
    return split_queries((x, experts, *others), even_block(len(x), most))


def _blocks_ffn(x, experts, gates, *arrays, partial):
    """Computes the results block by block; the arrays are those of `_arrays`."""
    weights: Any = arrays if len(arrays) == 3 else tuple(map(BlockScaled, arrays[:3], arrays[3:]))
    layout = _lay_out(experts, weights[0].shape[0], chunk_blocks(*weights[0].shape[1:]), skip=partial)
    return sum_slots(_run_chunks(x, gates, weights, layout), layout.row).astype(x.dtype)


def _blocks_gradients(dy, x, experts, gates, *arrays, partial):
    """Computes the gradients block by block; the arrays are the weights, and sums to which theirs are added, if any."""
    weights = arrays[:3]
    dweights = arrays[3:] or tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)
    layout = _lay_out(experts, weights[0].shape[0], chunk_blocks(*weights[0].shape[1:]), skip=partial)
    dx, dgates, dweights = _pull_chunks(dy, x, gates, weights, layout, dweights)
    return dx, dgates, *dweights


def _run_chunks(x, gates, weights, layout):
    """Computes the results of all blocks' rows."""
    slots_per_token = gates.shape[1]

    def forward(_, chunk):
        slot, expert = chunk
        gate_proj, up_proj, down_proj = _chunk_weights(weights, expert, x.dtype)
        rows = take(x, slot // slots_per_token)
        gate, up = _project(rows, gate_proj, up_proj)
        hidden = _activation(gate, up) * take(gates.reshape(-1), slot)[..., None]
        return None, contract("nbf,nfd->nbd", hidden.astype(x.dtype), down_proj).astype(x.dtype)

    return _over_chunks(forward, None, (layout.slot, layout.expert), layout)[1]


def _pull_chunks(dy, x, gates, weights, layout, dweights):
    """Computes gradients by x and gates, and adds those by the weights to `dweights`."""

    def backward(dweights, chunk):
        slot, expert = chunk
        gate_proj, up_proj, down_proj = _chunk_weights(weights, expert, x.dtype)
        rows, dout = (take(array, slot // gates.shape[1]) for array in (x, dy))
        gate, up = _project(rows, gate_proj, up_proj)
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

    dweights, (drows, dgates) = _over_chunks(backward, dweights, (layout.slot, layout.expert), layout)
    dx = sum_slots(drows, layout.row).astype(x.dtype)
    return dx, take(dgates.reshape(-1), layout.row), dweights


def _project(rows, gate_proj, up_proj):
    return tuple(contract("nbd,ndf->nbf", rows, w).astype(rows.dtype) for w in (gate_proj, up_proj))


def _activation(gate, up):
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return jax.nn.silu(gate) * up


def sum_slots(rows: Array, row: Array) -> Array:
    """Adds up each token's slots in float32; a slot whose row is past the end counts nothing.

    It reads rows and adds a token's in their order: a scatter would add them in whatever order it runs.

    Args:
      rows: [blocks…, D] results.
      row: [M, k], the row of each slot.

    Returns:
      float32 [M, D].
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
        is_first = jnp.append(True, expert[1:] != expert[:-1])
        rank = jnp.cumsum(is_first) - 1  # which of the group's distinct experts a block belongs to
        distinct = min(num_experts, size)
        owner = jnp.full(distinct, num_experts).at[rank].set(expert)
        is_member = (rank == jnp.arange(distinct)[:, None]).astype(jnp.float32)
        sums = (contract("rn,n...->r...", is_member, p) for p in products)
        return tuple(
            t.at[owner].add(s, mode="drop", unique_indices=True) for t, s in zip(totals, sums, strict=True)
        ), None

    if min(num_experts, blocks) <= BLOCKS_PER_SUM:
        return add(totals, (expert, products))[0]
    pad = -blocks % BLOCKS_PER_SUM
    expert = jnp.pad(expert, (0, pad), mode="edge")
    products = [jnp.pad(p, [(0, pad), (0, 0), (0, 0)]) for p in products]
    groups = jax.tree.map(lambda a: a.reshape(-1, BLOCKS_PER_SUM, *a.shape[1:]), (expert, products))
    return jax.lax.scan(add, totals, groups)[0]


def check_shapes(x, experts, gates, gate_proj, up_proj, down_proj):
    """Checks the shapes of `expert_ffn`'s arguments.

    Raises:
      ValueError: naming the first array whose shape does not fit the others.
    """
    num_experts, model_dim, width = gate_proj.shape
    for name, shape, expected in (
        ("x", x.shape, (x.shape[0], model_dim)),
        ("experts", experts.shape, (x.shape[0], *experts.shape[1:2])),
        ("gates", gates.shape, experts.shape),
        ("up_proj", up_proj.shape, gate_proj.shape),
        ("down_proj", down_proj.shape, (num_experts, width, model_dim)),
        *(
            (f"the scale of {name}", w.scale.shape, (num_experts, *block_counts(*w.shape[1:])))
            for name, w in (("gate_proj", gate_proj), ("up_proj", up_proj), ("down_proj", down_proj))
            if isinstance(w, BlockScaled)
        ),
    ):
        if shape != expected:
            raise ValueError(f"{name} must be of shape {expected}, got {shape}")
