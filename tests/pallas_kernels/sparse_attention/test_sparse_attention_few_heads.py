"""Tests the kernel for 16 and 32 heads: plan and errors, small shapes interpreted, on the card in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import INT_MAX, INT_MIN, array, same_bits, the_first
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import f64
from sparse_kernel_cases import abstract, check, inputs, kernel

from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES, WARPGROUP_THREADS
from dsa_jax.pallas_kernels.sparse_attention.forward_few_heads import Config, Plan, default_config

ABSENT = np.array([-1, -2, INT_MIN, INT_MAX], np.int32)


# Anywhere.

# The interpreter counts phases by barrier and thread, so a slot of the ring must always meet the same stream.
INTERPRETED = [
    ((2, 3, 90, 32, 128, 0, 70), Config(streams=2, slot_tiles=2, slots=2, blocks=2)),
    ((1, 2, 150, 16, 64, 64, 130), Config(streams=1, slot_tiles=1, slots=2, blocks=2)),
    ((2, 3, 150, 16, 64, 64, 130), Config(streams=2, slot_tiles=1, slots=4, blocks=1)),
    ((1, 3, 100, 16, 192, 64, 1), Config(streams=1, slot_tiles=3, blocks=1)),
    ((1, 2, 300, 16, 512, 64, 100), Config(streams=1, blocks=1)),
]


@pytest.mark.parametrize(("shape", "config"), the_first(2, INTERPRETED))
def test_interpreted_equals_the_definition(shape, config):
    check(*inputs(1, *shape), shape[4], 0.07, config=config, interpret=True)


@pytest.mark.parametrize("scale", [-0.07, 0.0])
def test_interpreted_with_any_scale(scale):
    check(*inputs(2, 1, 2, 90, 16, 64, 0, 70), 64, scale, config=Config(streams=1, blocks=1), interpret=True)


def test_a_key_listed_twice_counts_twice():
    q, kv, _ = inputs(3, 1, 1, 3, 16, 64, 0, 70)
    kv = np.array(kv)
    kv[np.isnan(kv)] = 0
    indices = array([[[2, -1, 2, 0]]], jnp.int32)
    check(q, array(kv), indices, 64, 0.1, config=Config(streams=1, blocks=1), interpret=True)


@pytest.mark.parametrize("heads", [16, 32])
@pytest.mark.parametrize("rotary", [0, 64])
@pytest.mark.parametrize("value_dim", [192, 512])
def test_lowers_for_cuda(heads, rotary, value_dim):
    arguments = abstract(2, 70_000, 100, heads, value_dim, rotary, 100)
    text = kernel(value_dim).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@settings(max_examples=100)
@given(
    heads=st.sampled_from([16, 32]),
    values=st.integers(1, 8),
    rotary=st.integers(0, 1),
    streams=st.integers(1, 2),
    slot_tiles=st.integers(1, 9),
)
def test_plan_fits_the_chip(heads, values, rotary, streams, slot_tiles):
    dim = 64 * (values + rotary)
    try:
        plan = Plan(heads, dim, 64 * values, Config(streams=streams, slot_tiles=slot_tiles))
    except ValueError:
        assert slot_tiles > 3  # smaller slots always fit
        return
    tiles = [tile for cut, _ in plan.slot_columns for tile in cut]
    assert tiles == list(range(dim // 64))
    assert sum(count for _, count in plan.slot_columns) == values
    assert plan.ring_slots >= len(plan.slot_columns)
    assert plan.smem_bytes <= SMEM_BYTES
    compute, gather = plan.registers or (255, 255)
    assert (streams * compute + gather) * WARPGROUP_THREADS <= 65536
    assert compute >= values * 64 * heads // 128 + heads + 24  # O, S, the sums, and room for addresses


def test_default_plan_of_the_published_shape():
    plan = Plan(16, 576, 512, Config())
    assert [(list(cut), values) for cut, values in plan.slot_columns] == [
        ([0, 1, 2], 3),
        ([3, 4, 5], 3),
        ([6, 7, 8], 2),
    ]
    assert plan.slot_bytes == 64 * 3 * 64 * 2
    assert plan.q_bytes == 2 * 16 * 576 * 2
    assert plan.ring_slots == 7


def test_default_config():
    assert default_config(16, 4096).streams == 2
    assert default_config(16, 132).streams == 1  # a query for each multiprocessor, none for a second stream
    assert default_config(32, 4096).streams == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": 3}, "streams must be 1 or 2, got 3"),
        ({"slot_tiles": 0}, "slot_tiles must be from 1 to 9, got 0"),
        ({"slots": 1}, "slots must be None or at least 2, got 1"),
        ({"blocks": 0}, "blocks must be None or at least 1, got 0"),
    ],
)
def test_config_checks_itself(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_plan_checks_itself():
    with pytest.raises(ValueError, match="a ring of 2 slots cannot hold the 3 slots"):
        Plan(16, 576, 512, Config(slots=2))
    with pytest.raises(ValueError, match="bytes of shared memory, there are 232448"):
        Plan(16, 576, 512, Config(slots=9))


# On the card.


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed):
    rng = np.random.default_rng(seed)
    b, t, s = rng.integers(1, 4), rng.integers(1, 200), rng.integers(1, 2000)
    n, c, r = rng.choice([16, 32]), 64 * rng.integers(1, 9), rng.choice([0, 64])
    k = rng.integers(1, 700)
    scale = rng.choice([-1.0, 1.0]) * rng.uniform(0.5, 2.0) * (c + r) ** -0.5
    check(*inputs(seed, *map(int, (b, t, s, n, c, r, k))), int(c), float(scale))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 32])
@pytest.mark.parametrize("config", [Config(streams=s, slot_tiles=n) for s in (1, 2) for n in (1, 2, 3)])
def test_every_config(heads, config):
    check(*inputs(5, 1, 300, 1000, heads, 512, 64, 333), 512, 576**-0.5, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1, 1, 16, 64, 0, 1), (1, 1, 1, 32, 512, 64, 64), (2, 1, 5, 16, 512, 64, 65)])
@pytest.mark.parametrize("scale", [0.05, 0.0, -0.05, 3.0])
def test_smallest_shapes(shape, scale):
    check(*inputs(6, *shape), shape[4], scale)


@pytest.mark.gpu
@pytest.mark.parametrize("absent", [*ABSENT, 77])
def test_nothing_selected_at_all(absent):
    q, kv, _ = inputs(7, 1, 9, 77, 16, 512, 64, 200)
    out, lse = kernel(512)(q, jnp.full_like(kv, jnp.nan), jnp.full((1, 9, 200), absent, jnp.int32))
    np.testing.assert_array_equal(f64(out), 0.0)
    np.testing.assert_array_equal(f64(lse), -np.inf)


@pytest.mark.gpu
def test_more_queries_than_a_grid_dimension_holds():
    check(*inputs(8, 3, 30_000, 500, 16, 64, 0, 70), 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "size"), [(16, 8192), (32, 8192), (16, 131_072)])
def test_real_size(heads, size):
    q_key, kv_key, index_key = jax.random.split(jax.random.key(9), 3)
    q = jax.random.normal(q_key, (1, 4096, heads, 576)).astype(jnp.bfloat16)
    kv = jax.random.normal(kv_key, (1, size, 576)).astype(jnp.bfloat16)
    indices = jax.random.randint(index_key, (1, 4096, 2048), 0, size, jnp.int32)
    check(q, kv, indices, 512, 576**-0.5)


@pytest.mark.gpu
def test_same_bits_every_time_and_in_any_company():
    shape = (1, 600, 5000, 16, 512, 64, 1000)
    q, kv, indices = inputs(10, *shape)

    def run(q, kv, indices, config=None):
        return jax.device_get(kernel(512, 0.04, config)(q, kv, indices))

    first = run(q, kv, indices)
    for _ in range(20):
        jax.tree.map(same_bits, run(q, kv, indices), first)
    part = jax.tree.map(lambda x: x[:, 100:137], first)
    jax.tree.map(same_bits, run(q[:, 100:137], kv, indices[:, 100:137]), part)
    for config in (Config(blocks=7), Config(streams=1), Config(slot_tiles=1)):
        jax.tree.map(same_bits, run(q, kv, indices, config), first)
    twice = [jnp.concatenate([x[:, :300], x[:, 300:]]) for x in (q, indices)]
    batched = run(twice[0], jnp.concatenate([kv, kv]), twice[1])
    jax.tree.map(lambda x, y: same_bits(x.reshape(y.shape), y), batched, first)
