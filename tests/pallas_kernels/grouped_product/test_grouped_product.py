"""Tests the kernels of grouped products: plans on NumPy, products interpreted and lowered on a CPU, all on the card."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array, as_numpy, noise, normal, same_bits, the_first
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import f64

from dsa_jax import grouped_ffn
from dsa_jax.grouped_ffn import expert_ffn
from dsa_jax.pallas_kernels import grouped_product
from dsa_jax.pallas_kernels.grouped_product import rows, tiles, weights
from dsa_jax.pallas_kernels.grouped_product.expert_ffn import FEW_ROWS, lay_out
from dsa_jax.pallas_kernels.grouped_product.pipeline import (
    BLOCK_ROWS,
    COMPUTE_REGISTERS,
    COMPUTE_WARPGROUPS,
    COPY_REGISTERS,
    DEPTH,
)
from dsa_jax.pallas_kernels.hopper.constants import (
    REGISTERS_PER_MULTIPROCESSOR,
    SMEM_BYTES,
    SWIZZLE_BYTES,
    WARPGROUP_THREADS,
)
from dsa_jax.quantization import quantize_blocks

pytestmark = pytest.mark.usefixtures("in_a_hurry")

# Plans.

make_tiles = jax.jit(tiles.make_tiles, static_argnums=(1, 2))
items_at = jax.jit(jax.vmap(tiles.item_at, (0, None, None, None)))
slots_laid_out = jax.jit(lay_out, static_argnums=1)


@given(st.lists(st.integers(0, 30), min_size=6, max_size=6), st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_tiles_cover_every_block_once(blocks, tile_blocks):
    slots = 6 * 30 * BLOCK_ROWS
    plan = np.asarray(make_tiles(array(blocks, jnp.int32), slots, tile_blocks))
    count = plan[-1, 0]
    assert count <= len(plan) - 1
    assert count == sum(-(-b // tile_blocks) for b in blocks)
    owner = np.repeat(np.arange(len(blocks)), blocks)
    covered = [(expert, first + i) for expert, first, size in plan[:count] for i in range(size)]
    assert covered == [(expert, block) for block, expert in enumerate(owner)]
    assert all(1 <= size <= tile_blocks for size in plan[:count, 2])


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_items_are_all_tiles(row_tiles, columns, band):
    every = np.arange(30 * 9, dtype=np.int32)  # of the largest plan, so that all have one program
    row, column = as_numpy(items_at(every, *np.array([row_tiles, columns, band], np.int32)))
    found = set(zip(*(x[: row_tiles * columns].tolist() for x in (row, column)), strict=True))
    assert found == {(row, column) for row in range(row_tiles) for column in range(columns)}


@given(st.integers(0, 2**31), st.sampled_from([1, 300]), st.sampled_from([1, 4]), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_every_slot_has_a_row_of_its_expert(seed, tokens, num_experts, most):
    """Of experts from -1 to `most`, of which a shard may have fewer, or some that nothing goes to."""
    experts = np.random.default_rng(seed).integers(-1, most, (tokens, 2))
    layout = as_numpy(slots_laid_out(array(experts), num_experts))
    there = (experts >= 0) & (experts < num_experts)
    owner = np.repeat(np.arange(num_experts), layout.blocks)
    np.testing.assert_array_equal(owner[layout.row[there] // BLOCK_ROWS], experts[there])
    np.testing.assert_array_equal(layout.slot[layout.row[there]], np.flatnonzero(there))
    assert (layout.row[~there] == len(layout.slot)).all()
    assert (layout.slot < experts.size).sum() == there.sum()
    assert layout.blocks.sum() * BLOCK_ROWS <= tiles.padded_rows(experts.size, num_experts)


# Products, interpreted, against float64.


def laid_out(sizes):
    """Gives blocks of each expert, and the expert of each row, -1 for none."""
    blocks = -(-np.asarray(sizes) // BLOCK_ROWS)
    expert = np.full(tiles.padded_rows(sum(sizes), len(sizes)), -1)
    for e, (first, size) in enumerate(zip(np.cumsum(blocks) - blocks, sizes, strict=True)):
        expert[first * BLOCK_ROWS : first * BLOCK_ROWS + size] = e
    return array(blocks, jnp.int32), expert


def per_expert(x, weight, expert):
    """Multiplies each row by its expert's weight in float64, zeros where it has none."""
    x, weight = f64(x), f64(weight)
    out = np.zeros((len(x), weight.shape[2]))
    for e in range(len(weight)):
        out[expert == e] = x[expert == e] @ weight[e]
    return out


def close(found, expected, there, tolerance=2**-8):
    """Compares rows that there are; the tolerance is bfloat16's rounding, of the largest value."""
    found, expected = f64(found)[there], expected[there]
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=tolerance)


SIZES = [(70, 0, 300), (1, 129)]
DIM, WIDTH = 128, 256


def make(sizes, dim=DIM, width=WIDTH):
    """Makes rows, gradients by their results, row gates and weights."""
    blocks, expert = laid_out(sizes)
    there = expert >= 0
    x, dy = (array(np.where(there[:, None], noise(i, len(expert), dim), 0), jnp.bfloat16) for i in (0, 1))
    gates = array(np.where(there, np.random.default_rng(2).uniform(0.1, 1, len(expert)), 0), jnp.float32)
    shapes = ((len(sizes), dim, width),) * 2 + ((len(sizes), width, dim),)
    gate, up, down = (array(np.float32(0.1) * noise(3 + i, *shape), jnp.bfloat16) for i, shape in enumerate(shapes))
    return blocks, expert, there, x, dy, gates, gate, up, down


@pytest.mark.parametrize(("sizes", "few"), [(SIZES[0], False), (SIZES[1], True)])
def test_forward_products_equal_the_definition(sizes, few):
    blocks, expert, there, x, _, gates, gate, up, down = make(sizes)
    plan = make_tiles(blocks, sum(sizes), rows.tile_blocks(few))
    options: dict[str, Any] = dict(few=few, interpret=True)
    hidden, *kept = rows.gate_up(x, gate, up, gates, plan, keep=True, **options)
    products = [per_expert(x, w, expert) for w in (gate, up)]
    for found, want in zip(kept, products, strict=True):
        close(found, want, there)
    g, u = (f64(each) for each in kept)
    with np.errstate(over="ignore", invalid="ignore"):  # of rows that are not there
        close(hidden, g / (1 + np.exp(-g)) * u * f64(gates)[:, None], there)
    close(rows.multiply(hidden, down, plan, **options), per_expert(hidden, down, expert), there)


def test_backward_products_equal_the_definition():
    blocks, expert, there, x, dy, gates, gate, up, down = make(SIZES[0])
    plan = make_tiles(blocks, sum(SIZES[0]), rows.tile_blocks(few=False))
    g, u = (array(per_expert(x, w, expert), jnp.bfloat16) for w in (gate, up))
    d_gate, d_up, hidden, d_gates = rows.d_hidden(dy, down, g, u, gates, plan, interpret=True)
    d_weighted = per_expert(dy, np.swapaxes(f64(down), 1, 2), expert)
    sigmoid, over = 1 / (1 + np.exp(-f64(g))), f64(gates)[:, None]
    silu = f64(g) * sigmoid
    close(d_gate, d_weighted * over * f64(u) * sigmoid * (1 + f64(g) * (1 - sigmoid)), there)
    close(d_up, d_weighted * over * silu, there)
    close(hidden, silu * f64(u) * over, there)
    close(f64(d_gates).sum(0), (d_weighted * silu * f64(u)).sum(1), there, 1e-4)
    d_rows = rows.d_rows(d_gate, d_up, gate, up, plan, interpret=True)
    transposed = [np.swapaxes(f64(w), 1, 2) for w in (gate, up)]
    close(d_rows, sum(per_expert(d, w, expert) for d, w in zip((d_gate, d_up), transposed, strict=True)), there)


@pytest.mark.parametrize(("width", "dtype"), [(128, "bfloat16"), (256, "float32")])
def test_gradients_by_weights_are_sums_over_an_experts_rows(width, dtype):
    blocks, expert, _, x, _, _, *_ = make(SIZES[0])
    d = array(np.where((expert >= 0)[:, None], noise(9, len(expert), width), 0), jnp.bfloat16)
    found = weights.d_weights(x, d, blocks, dtype=dtype, interpret=True)
    want = np.stack([f64(x)[expert == e].T @ f64(d)[expert == e] for e in range(len(blocks))])
    rounding = 1e-5 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(f64(found), want, atol=1e-5 * np.abs(want).max(), rtol=rounding)
    assert not np.asarray(found[1]).any()  # of the expert without rows


def problem(seed, tokens, slots, num_experts, dim, width, dtype=jnp.float32):
    """Draws arguments of `expert_ffn`, of which some slots have no expert here, and a gradient by the result."""
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.gumbel(size=(tokens, num_experts + 1)))[:, :slots]  # the last is none of these
    shapes = ((num_experts, dim, width),) * 2 + ((num_experts, width, dim),)
    of_weights = [array(np.float32(0.1) * noise(seed + i, *shape), dtype) for i, shape in enumerate(shapes)]
    x, dy = (normal(seed + i, tokens, dim, dtype="bfloat16") for i in (4, 5))
    gates = array(rng.uniform(0.1, 1, experts.shape), jnp.float32)
    return dy, x, array(experts, jnp.int32), gates, *of_weights


@pytest.mark.slow
def test_the_layer_and_its_gradients_equal_those_of_xla():
    dy, x, experts, gates, *of_weights = problem(0, 90, 1, 2, 128, 128)
    assert experts.size > FEW_ROWS * 2
    found = grouped_product.expert_ffn(x, experts, gates, *of_weights, interpret=True)
    rounded = [w.astype(jnp.bfloat16).astype(jnp.float32) for w in of_weights]
    want, pull = jax.vjp(lambda x, gates, *w: expert_ffn(x, experts, gates, *w), x, gates, *rounded)
    np.testing.assert_allclose(f64(found), f64(want), atol=2**-8 * np.abs(f64(want)).max())
    sums = [jnp.ones_like(w) for w in of_weights]
    gradients = grouped_product.expert_ffn_gradients(dy, x, experts, gates, *of_weights, *sums, interpret=True)
    dx, d_gates, *d_weights = pull(dy)
    for ours, theirs in zip(gradients, (dx, d_gates, *(1 + d for d in d_weights)), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_allclose(f64(ours), f64(theirs), atol=2**-8 * np.abs(f64(theirs)).max())


@pytest.mark.parametrize("fp8", [False, True])
def test_few_tokens_equal_those_of_xla(fp8):
    _, x, experts, gates, *of_weights = problem(1, 5, 2, 3, 128, 128, jnp.bfloat16)
    held: Any = [quantize_blocks(w) for w in of_weights] if fp8 else of_weights
    arrays = [*(w.values for w in held), *(w.scale for w in held)] if fp8 else held
    found = jax.jit(functools.partial(grouped_product.expert_ffn, interpret=True))(x, experts, gates, *arrays)
    want = f64(jax.jit(expert_ffn)(x, experts, gates, *held))
    np.testing.assert_allclose(f64(found), want, atol=2**-8 * np.abs(want).max())


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(12, 3), pytest.param(4, 1, marks=pytest.mark.slow), *the_first(0, [(11, 3)])]
)
def test_many_rows_go_to_the_kernels_in_blocks_of_tokens(monkeypatch, tokens, blocks):
    """The kernels' place is taken by functions that mean the same, and say how many tokens they are given."""
    dy, x, experts, gates, *of_weights = problem(3, tokens, 2, 3, 16, 8)
    dy, x = array(dy, "float32"), array(x, "float32")
    arguments = x, experts, gates, *of_weights
    given = []

    def forward(x, *others):
        given.append(len(x))
        return grouped_ffn._blocks_ffn(x, *others, partial=False)

    def gradients(*arguments):
        given.append(len(arguments[0]))
        return grouped_ffn._blocks_gradients(*arguments, partial=False)

    monkeypatch.setattr(grouped_product, "expert_ffn", forward)
    monkeypatch.setattr(grouped_product, "expert_ffn_gradients", gradients)
    monkeypatch.setattr(grouped_ffn, "ROW_BYTES", 4 * 2 * 2 * 16)  # four tokens of two slots
    found = jax.jit(grouped_ffn._kernels_ffn)(*arguments)
    want = jax.jit(functools.partial(grouped_ffn._blocks_ffn, partial=False))(*arguments)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    for sums in ([], [array(np.ones(w.shape), w.dtype) for w in of_weights]):
        found = jax.jit(grouped_ffn._kernels_gradients)(dy, *arguments, *sums)
        want = jax.jit(functools.partial(grouped_ffn._blocks_gradients, partial=False))(dy, *arguments, *sums)
        for ours, theirs in zip(found, want, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert set(given) == {-(-tokens // blocks)}


# What fits, and what is refused.


def test_registers_and_shared_memory_fit():
    assert (2 * COMPUTE_REGISTERS + COPY_REGISTERS) * WARPGROUP_THREADS <= REGISTERS_PER_MULTIPROCESSOR
    warpgroups, barriers = COMPUTE_WARPGROUPS, 1024
    written = warpgroups * rows.SLOTS * BLOCK_ROWS * rows.WRITTEN_COLUMNS * 2
    assert rows.STAGE_BYTES + written <= SMEM_BYTES - barriers
    stages = weights.STAGES * DEPTH * (weights.TILE_ROWS + weights.WIDE) * 2
    assert stages + warpgroups * weights.SLOTS * BLOCK_ROWS * SWIZZLE_BYTES <= SMEM_BYTES - barriers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.float32}, "x must be bfloat16, got float32"),
        ({"width": 192}, "multiples of 128, got 128 and 192"),
        ({"weights": jnp.float16}, "gate_proj must be bfloat16 or float32, got float16"),
        ({"tokens": 0}, "there must be a token and an expert"),
    ],
)
def test_refuses(change, message):
    width, tokens = change.get("width", 128), change.get("tokens", 5)
    _, x, experts, gates, *of_weights = problem(0, tokens, 2, 3, 128, width, change.get("weights", jnp.float32))
    x = array(x, change.get("x", jnp.bfloat16))
    assert message in str(grouped_product.why_not(x, experts, gates, *of_weights))
    with pytest.raises(ValueError, match=message):
        grouped_product.expert_ffn(x, experts, gates, *of_weights)


@pytest.mark.parametrize("tokens", [4, 4096])
def test_lowers_for_cuda(tokens):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in problem(0, tokens, 2, 4, 256, 128, jnp.bfloat16)]
    forward = jax.jit(grouped_product.expert_ffn).trace(*shapes[1:]).lower(lowering_platforms=("cuda",))
    assert forward.as_text().count("mosaic_gpu_v2") == 2
    backward = jax.jit(grouped_product.expert_ffn_gradients).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert backward.as_text().count("mosaic_gpu_v2") == 6


# On the card.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "num_experts", "dim", "width"), [(3000, 5, 1024, 384), (1, 8, 512, 256), (700, 256, 256, 128)]
)
def test_card_equals_float64(tokens, num_experts, dim, width):
    dy, x, experts, gates, *of_weights = problem(1, tokens, 3, num_experts, dim, width, jnp.bfloat16)

    def ours(x, gates, *of_weights):
        return expert_ffn(x, experts, gates, *of_weights, implementation="pallas")

    def definition(x, gates, *of_weights):
        """Adds up the experts, each over all tokens, with the gates of those that chose it."""

        def add(y, expert):
            number, gate_proj, up_proj, down_proj = expert
            gate = jnp.sum(jnp.where(experts == number, gates, 0), axis=1, keepdims=True)
            return y + gate * ((jax.nn.silu(x @ gate_proj) * (x @ up_proj)) @ down_proj), None

        return jax.lax.scan(add, jnp.zeros_like(x), (jnp.arange(num_experts), *of_weights))[0]

    def run(function, dy, *arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, *pull(dy)

    found = jax.jit(run, static_argnums=0)(ours, dy, x, gates, *of_weights)
    with jax.enable_x64(True):
        wide = (array(f64(a)) for a in (dy, x, gates, *of_weights))
        want = jax.jit(run, static_argnums=0)(definition, *wide)
    for each, exact in zip(found, want, strict=True):
        assert exact.dtype == jnp.float64
        scale = np.sqrt(np.mean(f64(exact) ** 2))
        np.testing.assert_allclose(f64(each), f64(exact), atol=0.06 * scale, rtol=0.03)


@pytest.mark.gpu
def test_card_repeats_its_bits_and_keeps_nan_to_its_token_and_expert():
    dy, x, experts, gates, *of_weights = problem(2, 900, 2, 6, 512, 256, jnp.bfloat16)
    experts = experts.at[7].set(array([0, 1]))
    forward, backward = jax.jit(grouped_product.expert_ffn), jax.jit(grouped_product.expert_ffn_gradients)
    y, gradients = forward(x, experts, gates, *of_weights), backward(dy, x, experts, gates, *of_weights)
    same_bits(forward(x, experts, gates, *of_weights), y)
    for again, first in zip(backward(dy, x, experts, gates, *of_weights), gradients, strict=True):
        same_bits(again, first)
    bad = forward(x.at[7, 3].set(jnp.nan), experts, gates, *of_weights)
    others = np.arange(900) != 7
    assert np.isnan(f64(bad[7])).all()
    same_bits(bad[others], y[others])
    d_gate = backward(dy, x.at[7, 3].set(jnp.nan), experts, gates, *of_weights)[2]
    assert np.isnan(f64(d_gate[:2])).any()
    same_bits(d_gate[2:], gradients[2][2:])
