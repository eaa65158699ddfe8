"""Computes a mixture's feed-forward and its gradients by grouped products on Hopper's tensor cores, bfloat16.

Slots, pairs of a token and one of its experts, are laid out by expert in blocks of 64 rows, the last of an expert
filled up with zeros. Six products do the work, each for all experts at once:

  forward    hidden = row_gate · silu(x · gate_e) · (x · up_e)     both products in one pass, with the activation
             hidden · down_e
  backward   the first pass again, which keeps both products
             dy · down_eᵀ, and from it the gradients by both products, in one pass
             d_gate · gate_eᵀ + d_up · up_eᵀ                       one sum
             x_eᵀ · d_gate, x_eᵀ · d_up and hidden_eᵀ · dy         float32, over all rows of an expert

Every sum is over one expert's rows or columns in their order, so bits repeat, whatever the other experts have.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsa_jax.pallas_kernels.grouped_product import rows as rows_kernels
from dsa_jax.pallas_kernels.grouped_product.pipeline import BLOCK_ROWS
from dsa_jax.pallas_kernels.grouped_product.tiles import make_tiles, padded_rows, running_sums
from dsa_jax.pallas_kernels.grouped_product.weights import d_weights

COLUMNS = 128  # whose multiples D and F must be
# Up to so many rows an expert on average, tiles have one block of rows: reading weights takes longer than multiplying.
FEW_ROWS = 32
COMPARED_SLOTS = 1024  # up to so many are laid out by comparing all pairs
MAX_ELEMENTS = 2**31 - 1  # of a row's number times the columns: coordinates are int32


def why_not(x, experts, gates, gate_proj, up_proj, down_proj, *scales) -> str | None:
    """Says why the kernels cannot take these arguments, or None when they can."""
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, got {x.dtype}"
    for name, weight in (("gate_proj", gate_proj), ("up_proj", up_proj), ("down_proj", down_proj)):
        wanted = (jnp.float8_e4m3fn,) if scales else (jnp.bfloat16, jnp.float32)
        if weight.dtype not in wanted:
            return f"{name} must be {' or '.join(jnp.dtype(each).name for each in wanted)}, got {weight.dtype}"
    num_experts, dim, width = gate_proj.shape
    if dim % COLUMNS or width % COLUMNS:
        return f"D and F must be multiples of {COLUMNS}, got {dim} and {width}"
    if not experts.size or not num_experts:
        return f"there must be a token and an expert, got experts {experts.shape} of {num_experts}"
    if padded_rows(experts.size, num_experts) > MAX_ELEMENTS:
        return f"rows must be fewer than 2^31, got {experts.size} slots of {num_experts} experts"
    return None


class Layout(NamedTuple):
    """Holds where the slots stand among the rows."""

    row: jax.Array  # int32 [M, k], past the end where the slot's expert is none of these
    slot: jax.Array  # int32 [P], M · k where no slot stands
    blocks: jax.Array  # int32 [X], of each expert


def lay_out(experts, num_experts: int) -> Layout:
    """Gives every slot a row: by expert, each beginning with a new block, and then by their number."""
    slots, shape = experts.size, experts.shape
    end = padded_rows(slots, num_experts)
    experts = experts.reshape(-1).astype(jnp.int32)
    there = (experts >= 0) & (experts < num_experts)
    experts = jnp.where(there, experts, num_experts)
    count = jnp.sum(experts[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    blocks = -(-count // BLOCK_ROWS)
    first_row = (running_sums(blocks) - blocks) * BLOCK_ROWS
    row = _take(first_row, experts) + _ranks(experts, count)
    row = jnp.where(there, row, end)
    return Layout(row=row.reshape(shape), slot=_slot_of_row(row, end), blocks=blocks)


def _slot_of_row(row, end: int):
    """Inverts `row` [slots]: the slot in each of `end` rows, or the number of slots where there is none."""
    slots = len(row)
    number = jnp.arange(slots, dtype=jnp.int32)
    if slots <= COMPARED_SLOTS:
        return jnp.min(jnp.where(row == jnp.arange(end)[:, None], number, slots), axis=1)
    return jnp.full(end, slots, jnp.int32).at[row].set(number, mode="drop")


def _ranks(experts, count):
    """Counts, for each slot, the slots ahead of it with the same expert, of which there are `count` slots each.

    Few slots are compared with each other: a sort takes several kernels, each longer than that.
    """
    slots = len(experts)
    number = jnp.arange(slots, dtype=jnp.int32)
    if slots <= COMPARED_SLOTS:
        ahead = (number < number[:, None]) & (experts == experts[:, None])
        return jnp.sum(ahead, axis=1, dtype=jnp.int32)
    order = jnp.argsort(experts, stable=True)
    place = jnp.zeros(slots, jnp.int32).at[order].set(number, unique_indices=True)
    return place - _take(running_sums(count) - count, experts)


def expert_ffn(x, experts, gates, gate_proj, up_proj, down_proj, *scales, interpret: bool = False):
    """Computes y_m = sum_k gates_mk · down_e(silu(gate_e x_m) · (up_e x_m)), e = experts_mk.

    Args:
      x: [M, D] bfloat16.
      experts: int [M, k]; a slot outside [0, X) contributes nothing.
      gates: float32 [M, k].
      gate_proj: [X, D, F], rounded to bfloat16 as are the next two; or all three e4m3.
      up_proj: see `gate_proj`.
      down_proj: [X, F, D].
      scales: of e4m3 weights, those of the three, float32, one for each block of 128 × 128.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      y [M, D] bfloat16, summed in float32 over a token's slots.

    Raises:
      ValueError: if `why_not` has a reason.
    """
    _check(x, experts, gates, gate_proj, up_proj, down_proj, *scales)
    num_experts, slots = gate_proj.shape[0], experts.size
    few = bool(scales) or slots <= FEW_ROWS * num_experts  # only tiles of few rows convert FP8
    layout = lay_out(experts, num_experts)
    tiles = make_tiles(layout.blocks, slots, rows_kernels.tile_blocks(few))
    if not scales:
        gate_proj, up_proj, down_proj = (w.astype(jnp.bfloat16) for w in (gate_proj, up_proj, down_proj))
    rows, row_gates = _rows(x, layout), _row_gates(gates, layout)
    of_first, of_second = scales[:2], scales[2:]
    (hidden,) = rows_kernels.gate_up(
        rows, gate_proj, up_proj, row_gates, tiles, scales=of_first, few=few, interpret=interpret
    )
    out = rows_kernels.multiply(hidden, down_proj, tiles, scales=of_second, few=few, interpret=interpret)
    return _sum_slots(out, layout)


def expert_ffn_gradients(dy, x, experts, gates, gate_proj, up_proj, down_proj, *sums, interpret: bool = False):
    """Computes the gradients of `expert_ffn` by x, gates and weights, from its arguments alone.

    Args:
      dy: [M, D] bfloat16, the gradient by y; the next six as in `expert_ffn`.
      sums: float32 arrays of the weights' shapes, to which their gradients are added, or none.

    Returns:
      Gradients by x, bfloat16, by gates, float32, and by the three weights, in their dtypes, or the new sums.

    Raises:
      ValueError: if `why_not` has a reason.
    """
    _check(x, experts, gates, gate_proj, up_proj, down_proj)
    slots = experts.size
    layout = lay_out(experts, gate_proj.shape[0])
    tiles = make_tiles(layout.blocks, slots, rows_kernels.tile_blocks(few=False))
    dtypes = [jnp.float32 if sums else w.dtype for w in (gate_proj, up_proj, down_proj)]
    gate_proj, up_proj, down_proj = (w.astype(jnp.bfloat16) for w in (gate_proj, up_proj, down_proj))
    rows, d_out, row_gates = _rows(x, layout), _rows(dy.astype(x.dtype), layout), _row_gates(gates, layout)
    _, gate, up = rows_kernels.gate_up(rows, gate_proj, up_proj, row_gates, tiles, keep=True, interpret=interpret)
    d_gate, d_up, hidden, d_row_gates = rows_kernels.d_hidden(
        d_out, down_proj, gate, up, row_gates, tiles, interpret=interpret
    )
    d_rows = rows_kernels.d_rows(d_gate, d_up, gate_proj, up_proj, tiles, interpret=interpret)
    operands = (rows, d_gate), (rows, d_up), (hidden, d_out)
    of_weights = [
        d_weights(*pair, layout.blocks, dtype=dtype, interpret=interpret)
        for pair, dtype in zip(operands, dtypes, strict=True)
    ]
    if sums:
        of_weights = [total + added for total, added in zip(sums, of_weights, strict=True)]
    return _sum_slots(d_rows, layout), _take(d_row_gates.sum(0), layout.row), *of_weights


def _check(*arguments):
    reason = why_not(*arguments)
    if reason is not None:
        raise ValueError(f"expert_ffn: {reason}")


def _take(array, indices):
    """Takes rows, zeros where an index is past the end."""
    return array.at[indices].get(mode="fill", fill_value=0)


def _rows(x, layout: Layout):
    return _take(x, layout.slot // layout.row.shape[1])


def _row_gates(gates, layout: Layout):
    return _take(gates.astype(jnp.float32).reshape(-1), layout.slot)


def _sum_slots(rows, layout: Layout):
    """Adds up each token's rows in float32, in the order of its slots."""
    return _take(rows, layout.row).astype(jnp.float32).sum(1).astype(rows.dtype)
