"""Experts spread over shards against all of them on one device: values, gradients, rounds, and the exchanges."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAST, INT_MAX, INT_MIN, array, as_numpy, equations, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from moe_cases import problem

from dsa_jax import grouped_ffn
from dsa_jax.grouped_ffn import expert_ffn, rows_ffn
from dsa_jax.parallel import expert_parallel
from dsa_jax.parallel.expert_parallel import expert_parallel_ffn, pair_quota, ragged_slices, round_pieces

TOKENS, SLOTS, EXPERTS = 96, 3, 16
BY_TOKEN, BY_EXPERT = PartitionSpec(("data", "expert")), PartitionSpec("expert")


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Emulates `jax.lax.ragged_all_to_all` by its documentation; NaN where it leaves the result open."""
    shard, count, rows = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name), jnp.arange(len(output))
    slices = [a.reshape(count, -1) for a in (input_offsets, send_sizes, output_offsets, recv_sizes)]
    operands, *sent = jax.lax.all_gather((operand, *slices[:3]), axis_name)
    for source, piece in np.ndindex(count, slices[0].shape[1]):
        start, size, put = (a[source, shard, piece] for a in sent)
        written = ((rows >= put) & (rows < put + size))[:, None]
        received = operands[source].at[start + rows - put].get(mode="fill", fill_value=np.nan)
        defined = (size == slices[3][source, piece]) & (put + size <= len(output))
        output = jnp.where(defined, jnp.where(written, received, output), jnp.nan)
    return output


def unset(shape, dtype):
    """Stands in for `jax.lax.empty`: of all that it may give, NaN shows most."""
    return jnp.full(shape, jnp.nan, dtype)


def over_shards(shards, function, arrays, out_specs):
    """Maps a function over `shards` of experts; the tokens are cut further over the devices that are left."""
    others = jax.device_count() // shards if shards > 1 else 1
    mesh = jax.make_mesh(
        (others, shards), ("data", "expert"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: others * shards]
    )
    specs = tuple(BY_EXPERT if a.ndim == 3 else BY_TOKEN for a in arrays)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False))


def value_and_gradients(layer, dy, x, experts, gates, *weights):
    y, pull = jax.vjp(lambda x, gates, *w: layer(x, experts, gates, *w), x, gates, *weights)
    return y, *pull(dy)


def on_shards(ragged, *arrays):
    layer = functools.partial(expert_parallel_ffn, axis="expert", ragged=ragged)
    y, dx, dgates, *dweights = value_and_gradients(layer, *arrays)
    return y, dx, dgates, *(jax.lax.psum(d, "data") for d in dweights)


def sharded(shards, arrays, *, ragged=False):
    specs = (BY_TOKEN,) * 3 + (BY_EXPERT,) * 3
    return over_shards(shards, functools.partial(on_shards, ragged), arrays, specs)


@functools.cache
def one_device(dtype=jnp.float32):
    """Compiles `expert_ffn` and its gradients."""
    program = jax.jit(functools.partial(value_and_gradients, expert_ffn))
    return program.lower(*routed("even", dtype)).compile(compiler_options=FAST)


@functools.cache
def compiled(shards, ragged=False, dtype=jnp.float32, pieces=1):
    """Compiles the layer over `shards` of experts, with small quotas, which make the rounds many."""
    arrays = routed("even", dtype)
    with (
        mock.patch.multiple(expert_parallel, MIN_ROWS_PER_PIECE=1, PIECES_PER_ROUND=pieces),
        mock.patch.object(expert_parallel, "MIN_SLOTS_PER_PAIR", 1),
        mock.patch.object(expert_parallel, "MAX_SLICES_PER_PAIR", 3),
        mock.patch.object(jax.lax, "ragged_all_to_all", emulated),
        mock.patch.object(jax.lax, "empty", unset),
    ):
        return sharded(shards, arrays, ragged=ragged).lower(*arrays).compile(compiler_options=FAST)


def routed(routing, dtype=jnp.float32, seed=0):
    """Draws dy and the arrays of a layer, with experts as `routing` says; the weights are float32."""
    arrays = problem(seed, TOKENS, SLOTS, EXPERTS, skew=0.5 if routing == "skewed" else 0.0)
    x, experts, gates, *weights = as_numpy(arrays)
    rng = np.random.default_rng(seed + 1)
    if routing == "one_shard":
        experts = experts % 2
    elif routing == "one_expert":
        experts = np.full_like(experts, 13)
    elif routing == "idle_shards":
        experts = experts % 8
    elif routing == "nobody":
        experts = np.full_like(experts, EXPERTS)
    elif routing == "out_of_range":
        absent = rng.choice([-1, -EXPERTS, EXPERTS, EXPERTS + 1, INT_MIN, INT_MAX], experts.shape)
        experts = np.where(rng.random(experts.shape) < 0.4, absent.astype(np.int32), experts)
    elif routing == "uneven":  # half of the tokens go to one expert; the others may be those of other shards
        experts = np.where(np.arange(TOKENS)[:, None] < TOKENS // 2, np.int32(1), experts)
    return [rng.standard_normal(x.shape).astype(dtype), x.astype(dtype), experts, gates, *weights]


def error(actual, expected):
    """Computes the largest error over the largest value."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)


ROUTINGS = ["even", "skewed", "one_shard", "one_expert", "idle_shards", "nobody", "out_of_range", "uneven"]


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_shards_equal_one_device(shards):
    one, many = one_device(), compiled(shards)
    for seed, routing in enumerate(ROUTINGS):
        arrays = routed(routing, seed=seed)
        for actual, expected in zip(many(*arrays), one(*arrays), strict=True):
            assert error(actual, expected) < 1e-6, routing


def test_a_round_in_pieces_equals_one_device():
    """Pieces that no shard fills, and pieces after those of the first round, are among them."""
    one, many = one_device(), compiled(4, pieces=3)
    for seed, routing in enumerate(ROUTINGS):
        arrays = routed(routing, seed=seed)
        for actual, expected in zip(many(*arrays), one(*arrays), strict=True):
            assert error(actual, expected) < 1e-6, routing
    jax.tree.map(same_bits, many(*arrays), many(*arrays))


def test_bfloat16_is_rounded_where_one_device_rounds():
    """Sums over slots and rounds are float32: their order shows in a rounded result once in a hundred at most."""
    one, many = one_device(jnp.bfloat16), compiled(8, dtype=jnp.bfloat16)
    for routing in ("even", "one_expert"):
        arrays = routed(routing, jnp.bfloat16)
        actual, expected = many(*arrays), one(*arrays)
        for a, b in zip(as_numpy(actual[:2]), as_numpy(expected[:2]), strict=True):
            assert a.dtype == b.dtype == jnp.bfloat16 and (a != b).mean() < 1e-2
        for a, b in zip(actual[2:], expected[2:], strict=True):
            assert a.dtype == b.dtype == jnp.float32 and error(a, b) < 1e-6


def test_bits_repeat():
    many = compiled(8)
    arrays = routed("skewed")
    jax.tree.map(same_bits, many(*arrays), many(*arrays))


@pytest.mark.slow
def test_ragged_exchange_has_the_same_bits():
    """An emulation stands in on CPUs, with NaN where the sizes sent and received differ or nothing arrives."""
    dense, ragged = compiled(8), compiled(8, ragged=True)
    for routing in ("skewed", "one_expert", "out_of_range"):
        arrays = routed(routing)
        jax.tree.map(same_bits, ragged(*arrays), dense(*arrays))


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [1.5, 0.2])
def test_two_gpus_exchange_the_same_bits(capacity):
    """In one round and in several."""
    if jax.device_count() != 2:
        pytest.skip("needs two GPUs")
    for routing in ("even", "skewed", "one_expert", "out_of_range"):
        arrays = routed(routing, jnp.bfloat16)
        with mock.patch.multiple(expert_parallel, MIN_SLOTS_PER_PAIR=1, CAPACITY_FACTOR=capacity):
            ragged, dense = (sharded(2, arrays, ragged=ragged)(*arrays) for ragged in (True, False))
        jax.tree.map(same_bits, ragged, dense)
        y, expected = (np.asarray(x[0], np.float32) for x in (dense, one_device(jnp.bfloat16)(*arrays)))
        np.testing.assert_allclose(y, expected, atol=0.02 * np.abs(expected).max(initial=1e-6))


def test_the_emulation_gives_the_documented_example():
    inputs = ([1, 2, 2, 3, 4, 0], [0, 1] * 2, [1, 2, 1, 1], [0, 0, 1, 2], [1, 1, 2, 1])
    operand, *slices = (array(a, jnp.float32 if i == 0 else jnp.int32) for i, a in enumerate(inputs))
    run = lambda operand, *slices: emulated(operand, jnp.zeros((4, 1)), *slices, axis_name="expert")
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=BY_EXPERT, out_specs=BY_EXPERT, check_vma=False))
    np.testing.assert_array_equal(run(operand[:, None], *slices)[:, 0], [1, 3, 0, 0, 2, 2, 4, 0])


@given(
    seed=st.integers(0, 1000),
    shards=st.sampled_from([1, 2, 5]),
    quota=st.sampled_from([1, 4, 9]),
    pieces=st.sampled_from([1, 2, 4, 1024]),
)
@settings(max_examples=20)
def test_every_slot_is_sent_once_to_a_place_of_its_own(seed, shards, quota, pieces):
    slots = np.random.default_rng(seed).integers(0, 12, (shards, shards)).astype(np.int32)  # [source, destination]
    lists = lambda i: (array(slots[i]), array(slots[:, i]))
    total = np.zeros_like(slots)
    for index in range(-(-slots.max() // quota)):
        with mock.patch.object(expert_parallel, "MAX_SLICES_PER_PAIR", pieces):
            sides = [ragged_slices(*lists(i), index=index, shard=i, quota=quota) for i in range(shards)]
        start, sent, put, received = (
            np.stack(side).reshape(shards, shards, -1) for side in zip(*sides, strict=True)
        )  # [source, destination, piece]
        np.testing.assert_array_equal(sent, received.swapaxes(0, 1))
        assert sent.shape[2] <= pieces
        total += sent.sum(-1)
        places = np.zeros((shards, shards * quota), int)
        for source, destination, piece in np.ndindex(sent.shape):
            size, first = sent[source, destination, piece], put[source, destination, piece]
            assert first - start[source, destination, piece] == (source - destination) * quota
            assert source * quota <= first and first + size <= (source + 1) * quota
            places[destination, first : first + size] += 1
        assert places.max() <= 1
    np.testing.assert_array_equal(total, slots)


def test_rounds_are_those_of_the_fullest_pair():
    def rounds(experts, weight):
        return expert_parallel._make_plan(experts, weight.shape[0], "expert").pieces[None]

    weight = np.zeros((EXPERTS, 1, 1), np.float32)
    even = np.tile(np.arange(EXPERTS, dtype=np.int32), 256).reshape(-1, 2)  # 64 slots of each pair of 8 shards
    count = over_shards(8, rounds, (even, weight), BY_EXPERT)
    np.testing.assert_array_equal(count(even, weight), [1] * 8)
    np.testing.assert_array_equal(count(np.zeros_like(even), weight), [6] * 8)  # 512 slots of a pair, 96 a round
    np.testing.assert_array_equal(count(even - EXPERTS, weight), [0] * 8)
    even[:97] = 3  # 194 slots of one pair
    np.testing.assert_array_equal(count(even, weight), [3] * 8)


def test_quotas_stay_between_even_routing_and_all_that_a_pair_can_have():
    assert pair_quota(4096, 8, 32, 8) == 6144
    assert pair_quota(4096, 8, 2, 64) == 768
    assert pair_quota(4, 8, 32, 8) == 32  # all of them, in one round
    assert pair_quota(1, 8, 2, 64) == 2


def test_large_rounds_are_cut():
    assert [round_pieces(quota, shards=8) for quota in (1, 1024, 2048, 6144, 1 << 20)] == [1, 1, 2, 6, 6]


def test_rows_that_did_not_come_cost_no_product(monkeypatch):
    """33 blocks of 128 rows, which two experts can fill and leave unfilled, are multiplied 5 at a time."""
    steps, activation = [], grouped_ffn._activation

    def counted(gate, up):
        jax.debug.callback(lambda: steps.append(1))
        return activation(gate, up)

    monkeypatch.setattr(grouped_ffn, "_activation", counted)
    x, all_experts, gates, gate_proj, up_proj, down_proj = as_numpy(problem(0, 4096, 1, 2))
    weights = gate_proj, up_proj, down_proj
    run = jax.jit(lambda *arrays: rows_ffn(*arrays))
    for rows in (0, 1, 700, 4096):
        experts = np.where(np.arange(4096) < rows, all_experts[:, 0], 2)
        blocks = sum(-(-int((experts == expert).sum()) // 128) for expert in range(2))
        steps.clear()
        y = np.asarray(run(x, experts.astype(np.int32), gates[:, 0], weights))
        jax.effects_barrier()
        assert len(steps) == -(-blocks // 5) and y[rows - 1].any() == (rows > 0) and not y[rows:].any()


def abstract(tokens, slots, num_experts, dim, width):
    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    experts = jax.ShapeDtypeStruct((tokens, slots), jnp.int32)
    weights = shape(num_experts, dim, width), shape(num_experts, dim, width), shape(num_experts, width, dim)
    return shape(tokens, dim), shape(tokens, dim), experts, shape(tokens, slots), *weights


def test_no_buffer_is_of_the_worst_case():
    tokens, slots, dim = 2048, 8, 64
    arrays = abstract(8 * tokens, slots, 32, dim, 32)
    jaxpr = jax.make_jaxpr(sharded(8, arrays))(*arrays).jaxpr
    body = next(e for e in equations(jaxpr) if e.primitive.name == "shard_map").params["jaxpr"]
    sizes = [np.prod(variable.aval.shape) for equation in equations(body) for variable in equation.outvars]
    assert tokens * slots * dim <= max(sizes) < 2 * tokens * slots * dim  # the worst case is 8 times the slots


def test_rows_travel_during_the_products_of_another_piece():
    """Checks that an exchange beside a piece's products waits for those before it, and for them alone."""
    arrays, pieces = abstract(8 * 64, 2, 16, 64, 32), 4
    with mock.patch.multiple(expert_parallel, MIN_ROWS_PER_PIECE=1, PIECES_PER_ROUND=pieces):
        jaxpr = jax.make_jaxpr(sharded(8, arrays))(*arrays).jaxpr
    body = next(e for e in equations(jaxpr) if e.primitive.name == "shard_map").params["jaxpr"]
    expected = [0, 0, 0]  # loops of products before the exchanges: of counts and, there and in the backward, of gates
    # Of these loops each waits for the last but one, which sent for its rows; in the backward for all, which add to the
    # same sums of gradients by weights.
    expected += [0] + [(piece + 1) // 2 for piece in range(pieces)] + [pieces // 2]
    expected += [0] + list(range(pieces)) + [pieces]
    expected += [pieces]  # the gradients by gates
    assert sorted(products_before(body, "all_to_all")) == sorted(expected)


def products_before(jaxpr, name):
    """Counts the loops of products that each equation of a name waits for, those outside of any loop alone."""
    before, found = {}, []
    for equation in jaxpr.eqns:
        waits = frozenset().union(*(before.get(v, frozenset()) for v in equation.invars if not hasattr(v, "val")))
        if equation.primitive.name == name:
            found.append(len(waits))
        if equation.primitive.name == "while" and "dot_general" in str(equation.params["body_jaxpr"]):
            waits |= {id(equation)}
        before.update(dict.fromkeys(equation.outvars, waits))
    return found


@pytest.mark.parametrize("ragged", [False, True])
def test_gpus_get_the_exchange_that_was_asked_for(ragged):
    arrays = abstract(64, 2, 8, 16, 8)
    text = sharded(4, arrays, ragged=ragged).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    # Rows go there and back, in the backward pass with dy beside them; counts once, gates twice and theirs once more.
    assert text.count("@ragged_all_to_all") == (5 if ragged else 0)
    assert text.count('"stablehlo.all_to_all"') == (4 if ragged else 9)
    assert "stablehlo.while" in text


def test_pieces_are_sent_by_the_exchange_that_xla_overlaps():
    arrays = abstract(64, 2, 8, 16, 8)
    with mock.patch.multiple(expert_parallel, MIN_ROWS_PER_PIECE=1, PIECES_PER_ROUND=3):
        text = sharded(4, arrays, ragged=True).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "@ragged_all_to_all" not in text


@pytest.mark.parametrize(
    ("processes", "capability", "count", "has"),
    [
        (1, "9.0", 8, True),
        (1, None, 8, False),
        (2, "9.0", 8, False),
        (1, "9.0", 16, False),
    ],
)
def test_where_the_ragged_exchange_is(monkeypatch, processes, capability, count, has):
    """Elsewhere XLA refuses to compile it."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(expert_parallel.pallas_kernels, "gpu_capability", lambda: capability)
    with jax.sharding.use_abstract_mesh(AbstractMesh((count,), ("expert",), axis_types=(AxisType.Auto,))):
        assert expert_parallel.has_ragged_exchange() == has


def test_wrong_shapes_are_named(unchecked):
    x, experts, gates, *weights = problem(0, 6, 2, 4)
    run = lambda *arrays: expert_parallel_ffn(*arrays, axis="expert", ragged=False)
    with pytest.raises(ValueError, match=r"gates must be of shape \(6, 2\), got \(6, 1\)"):
        run(x, experts, gates[:, :1], *weights)
    with pytest.raises(ValueError, match=r"x must be of shape \(6, 8\), got \(6, 7\)"):
        run(x[:, :7], experts, gates, *weights)
    with pytest.raises(ValueError, match=r"down_proj must be of shape \(4, 6, 8\), got \(4, 8, 6\)"):
        run(x, experts, gates, *weights[:2], weights[0])
