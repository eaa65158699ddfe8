"""The collectives: values and gradients are those of the same computation where nothing is sharded."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAST, FP8, array, normal, same_bits
from sharded_cases import mesh_of, whole

from dsa_jax.parallel import sharding
from dsa_jax.parallel.collectives import (
    combine_attention,
    exchange_columns,
    gather_candidates,
    gather_head_weights,
    gather_parameters,
    gather_sequence,
    gather_tokens,
    heads_to_tokens,
    max_statistics,
    num_shards,
    shard_index,
    slice_tokens,
    sum_gradients,
    sum_shards,
    sum_statistics,
    tokens_to_heads,
)
from dsa_jax.parallel.sharding import shards, spec, zigzag_order

TOKENS = spec("batch", "sequence")
ALONE = "data=1"
DCT, CET, DET = "data=2,context=2,tensor=2", "context=2,expert=2,tensor=2", "data=2,expert=2,tensor=2"


def on_mesh(name, function, in_specs, out_specs):
    """Compiles a function of local arrays for a mesh, and gives one that runs it and compares copies of its results."""
    mesh = mesh_of(name)
    local = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def run(*arguments):
        program = jax.jit(local).lower(*arguments).compile(compiler_options=FAST)
        return jax.tree.map(whole, program(*jax.device_put(arguments, program.input_shardings[0])))

    return run


def close(actual, expected):
    chex.assert_trees_all_close(actual, jax.tree.map(np.asarray, expected), rtol=2e-5, atol=2e-5)


def to_zigzag(x, name, axis=1):
    return np.take(np.asarray(x), zigzag_order(x.shape[axis], shards(mesh_of(name), "sequence")), axis)


def from_zigzag(x, name, axis=1):
    return np.take(np.asarray(x), np.argsort(zigzag_order(x.shape[axis], shards(mesh_of(name), "sequence"))), axis)


def test_copies_that_differ_are_found():
    """With `check_vma=False` JAX takes it on trust that an output is on all devices alike; `whole` does not."""
    axes = sharding.RULES["heads"]
    with pytest.raises(AssertionError, match="differ"):
        on_mesh("tensor=2", lambda x: x + jax.lax.axis_index(axes), spec(), spec())(np.zeros(3, np.int32))


# Where nothing is split.


def identities(x, state):
    """Pairs the result of each function with its argument, where it is the identity."""
    named = (sum_statistics, sum_gradients, sum_shards, slice_tokens, gather_tokens, gather_candidates)
    pairs = [(f(x, name), x) for f in named for name in sharding.RULES]
    pairs += [(part, x) for name in sharding.RULES for part in combine_attention(x[..., None], x, name)[1:]]
    pairs += [(f(x), x) for f in (gather_sequence, heads_to_tokens, tokens_to_heads)]
    pairs += [(gather_head_weights(x), x)]
    options = [{}, {"dtype": jnp.bfloat16}, {"dtype": jnp.bfloat16, "wide": True}, {"whole": False}]
    pairs += [(leaf, state["lm_head"]) for o in options for leaf in jax.tree.leaves(gather_parameters(state, **o))]
    return [*pairs, (exchange_columns(lambda _: x, jnp.zeros(x.shape[:2], jnp.int32)), x)]


def test_outside_a_mesh_they_give_back_what_they_got():
    x, state = normal(0, 2, 8, 4), {"lm_head": normal(1, 4, 4)}
    for got, given in identities(x, state):
        assert got is given
    for name in sharding.RULES:
        assert num_shards(name) == 1 and shard_index(name) == 0
        same_bits(max_statistics(x, name), x)
    assert not jax.grad(lambda x: jnp.sum(max_statistics(x, "vocabulary")))(x).any()


@pytest.mark.parametrize("name", [ALONE, "context=8"])
def test_over_axes_of_one_device_they_do_nothing(name):
    def run(x, state):
        assert all(num_shards(other) == 1 for other in ("batch", "heads", "width", "vocabulary", "fsdp", "experts"))
        assert name != ALONE or all(got is given for got, given in identities(x, state))
        return jnp.ones(()) * shard_index("heads") + num_shards("sequence")

    x, state = normal(0, 1, 16, 4), {"lm_head": normal(1, 4, 4)}
    assert on_mesh(name, run, (TOKENS, spec()), spec())(x, state) == (1 if name == ALONE else 8)
    mesh = mesh_of(name)
    local = jax.shard_map(run, mesh=mesh, in_specs=(TOKENS, spec()), out_specs=spec(), check_vma=False)
    assert "psum" not in str(jax.make_jaxpr(local)(x, state))


# Sums.


@pytest.mark.parametrize("name", ["data=4,expert=2", CET])
def test_numbers_of_shards(name):
    def run(x):
        indices = [shard_index(rule) + jnp.zeros((), jnp.int32) for rule in sharding.RULES]
        counts = [sum_statistics(jnp.ones(()), rule) for rule in sharding.RULES]
        peaks = [max_statistics(i.astype(jnp.float32), rule) for i, rule in zip(indices, sharding.RULES, strict=True)]
        sizes = [array(num_shards(rule)) for rule in sharding.RULES]
        tokens = sum_statistics({"sum": jnp.sum(x)}, "tokens")["sum"]
        return counts, peaks, sizes, tokens, indices[list(sharding.RULES).index("sequence")][None]

    x = normal(0, 8, 16)
    everywhere = [spec()] * len(sharding.RULES)
    out = everywhere, everywhere, everywhere, spec(), spec("sequence")
    counts, peaks, sizes, tokens, places = on_mesh(name, run, TOKENS, out)(x)
    expected = [shards(mesh_of(name), rule) for rule in sharding.RULES]
    assert counts == expected and sizes == expected and peaks == [count - 1 for count in expected]
    np.testing.assert_allclose(tokens, np.sum(x), rtol=1e-5)
    np.testing.assert_array_equal(places, np.arange(shards(mesh_of(name), "sequence")))


@pytest.mark.parametrize("name", ["data=2,tensor=4"])
def test_a_split_feed_forward(name):
    """`sum_gradients` before a split width and `sum_shards` after it: value, and gradients by x and both weights."""

    def loss(x, up, down):
        y = sum_shards(jax.nn.silu(sum_gradients(x, "width") @ up) @ down, "width")
        return jnp.sum(jnp.sin(y)), y

    def run(x, up, down):
        gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, up, down)
        return y, gradients[0], *(jax.lax.psum(g, sharding.RULES["batch"]) for g in gradients[1:])

    x, up, down = normal(0, 8, 6), normal(1, 6, 16), normal(2, 16, 6)
    specs = spec("batch"), spec(None, "width"), spec("width")
    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, up, down)
    close(on_mesh(name, run, specs, (specs[0], *specs))(x, up, down), (y, *gradients))


def test_counts_have_no_gradient():
    def run(x):
        return jax.grad(lambda x: jnp.sum(x * sum_statistics(x, "tokens")) + jnp.sum(max_statistics(x, "tokens")))(x)

    x = normal(0, 8, 16)
    blocks = np.asarray(x).reshape(2, 4, 4, 4).sum((0, 2))  # rows and tokens of a shard, summed over shards
    close(on_mesh("data=2,context=4", run, TOKENS, TOKENS)(x), np.tile(blocks, (2, 4)))


# The sequence.


@pytest.mark.parametrize("name", ["context=8", "data=2,context=2,expert=2"])
def test_gathered_keys_are_in_order_and_get_every_shards_gradient(name):
    def loss(x, weights):
        keys = gather_sequence(x)
        return jnp.sum(weights * jnp.sin(jnp.einsum("btd,bsd->bts", x, keys))), keys

    x, weights = normal(0, 2, 32, 3), normal(1, 2, 32, 32)
    gradient, keys = jax.jit(jax.grad(loss, has_aux=True))(x, weights)
    run = on_mesh(name, jax.grad(loss, has_aux=True), (TOKENS, TOKENS), (TOKENS, spec("batch")))
    actual, gathered = run(to_zigzag(x, name), to_zigzag(weights, name))
    same_bits(gathered, keys)
    close(from_zigzag(actual, name), gradient)


def results_of(primitive, name, function, in_specs, *arguments):
    """Lists the dtypes of a primitive's results in the trace; compiled for CPUs, sums of bfloat16 would be widened."""
    local = jax.shard_map(function, mesh=mesh_of(name), in_specs=in_specs, out_specs=TOKENS, check_vma=False)
    return re.findall(rf":(\w+)\[[\d,]*\] = {primitive}\[", str(jax.make_jaxpr(local)(*arguments)))


def test_gradients_of_gathered_keys_are_summed_in_float32():
    """256 of one shard and 1 of each of seven more: in bfloat16, whose steps are 2 there, no order gives their sum."""

    def run(x, share_of_it):
        return jax.grad(lambda x: jnp.sum(gather_sequence(x) * share_of_it[:, :1]))(x)

    x, parts = np.zeros((1, 16), jnp.bfloat16), np.ones((1, 16), jnp.bfloat16)
    parts[0, :2] = 256
    assert functools.reduce(np.add, parts[0, ::2]) == 256
    gradient = on_mesh("context=8", run, (TOKENS, TOKENS), TOKENS)(x, parts)
    same_bits(gradient, np.full((1, 16), 264, jnp.bfloat16))  # of 262 and 264, between which 263 is, the even one
    assert results_of("reduce_scatter", "context=8", run, (TOKENS, TOKENS), x, parts) == ["f32"]
    assert results_of("all_gather", "context=8", run, (TOKENS, TOKENS), x, parts) == ["bf16"]


def test_fp8_travels_bit_for_bit():
    """All 256 patterns, NaN's among them; as bytes, since not all backends exchange FP8."""
    bits, name = np.arange(256, dtype=np.uint8)[None], "context=2,expert=2"
    x = array(to_zigzag(bits, name).view(FP8))
    gathered = on_mesh(name, gather_sequence, TOKENS, spec())(x)
    assert gathered.dtype == jnp.dtype(FP8)
    np.testing.assert_array_equal(gathered.view(np.uint8), bits)
    assert results_of("all_gather", name, gather_sequence, TOKENS, x) == ["u8"]


@pytest.mark.parametrize("dtype", ["float32", "int32", FP8])
def test_tokens_are_sliced_and_gathered_again(dtype):
    """Every n-th to each shard; what comes back has the bits that were there."""
    x = array(np.random.default_rng(0).integers(0, 99, (2, 24, 3)), dtype)

    def run(x):
        mine = slice_tokens(x, "heads")
        return mine[None], gather_tokens(mine, "heads")

    if dtype == FP8:  # the model slices FP8 and never gathers it so
        shared = on_mesh("tensor=4", lambda x: slice_tokens(x, "heads")[None], spec("batch"), spec("heads"))(x)
    else:
        shared, joined = on_mesh("data=2,tensor=4", run, spec("batch"), (spec("heads", "batch"), spec("batch")))(x)
        same_bits(joined, x)
    for shard in range(4):
        same_bits(shared[shard], np.asarray(x)[:, shard::4])


def test_gradients_of_sliced_tokens():
    """Every shard gets the gradients of all tokens, whatever each did with its own."""

    def loss(x, weights):
        y = gather_tokens(slice_tokens(weights, "heads") * jnp.sin(slice_tokens(x, "heads")), "heads")
        return jnp.sum(jnp.cos(x + y))

    x, weights = normal(0, 2, 24, 3), normal(1, 2, 24, 3)
    rows = spec("batch")
    run = on_mesh("data=2,tensor=4", jax.grad(loss, (0, 1)), (rows, rows), (rows, rows))
    close(run(x, weights), jax.jit(jax.grad(loss, (0, 1)))(x, weights))


@pytest.mark.parametrize("name", ["data=2,tensor=4", "tensor=2"])
def test_heads_are_exchanged_for_tokens_and_back(name):
    """In between, all heads of a token meet; weights come for all heads, and get the gradients of all tokens."""

    def loss(q, weight, out):
        rows = heads_to_tokens(q)
        met = jnp.einsum("btnh,cnh->btnc", rows, gather_head_weights(weight))
        heads = tokens_to_heads(met / jnp.sqrt(1 + jnp.sum(jnp.square(met), axis=2, keepdims=True)))
        y = sum_shards(jnp.einsum("btnc,ncd->btd", heads, out), "heads")
        return jnp.sum(jnp.sin(y)), (rows, tokens_to_heads(rows))

    def run(q, weight, out):
        (d_q, d_weight, d_out), moved = jax.grad(loss, (0, 1, 2), has_aux=True)(q, weight, out)
        batch = sharding.RULES["batch"]
        return (d_q, jax.lax.psum(d_weight, batch), jax.lax.psum(d_out, batch)), moved

    q, weight, out = normal(0, 2, 24, 8, 3), normal(1, 5, 8, 3), normal(2, 8, 5, 4)
    split = spec("batch", None, "heads"), spec(None, "heads"), spec("heads")
    gradients, (rows, heads) = on_mesh(name, run, split, (split, (spec("batch", "heads"), split[0])))(q, weight, out)
    same_bits(heads, q)
    order = np.arange(24).reshape(-1, shards(mesh_of(name), "heads")).T.ravel()  # every n-th to one shard
    same_bits(rows, np.asarray(q)[:, order])
    close(gradients, jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, weight, out)[0])


# Parameters.

STATE = {  # shapes by path
    "self_attn": {"q_a_proj": (8, 4), "o_proj": (8, 2, 8), "indexer": {"weights_proj": (8, 3)}},
    "norm": {"weight": (8,)},
    "mlp": {"gate": {"weight": (8, 8)}, "experts": {"down_proj": (8, 8, 16)}, "gate_proj": (8, 8)},
}


def state_of(seed):
    """Draws parameters of several kinds, as one layer has them."""
    seeds = iter(range(seed, seed + 100))
    return jax.tree.map(lambda dims: normal(next(seeds), *dims), STATE, is_leaf=lambda x: isinstance(x, tuple))


def gathered_loss(state, x, **options):
    """Computes a loss in whose gradient by each parameter every token counts, and gives the gathered parameters.

    Experts meet the tokens of all shards of experts, other parameters this shard's.
    """
    mine = {False: jnp.sum(x), True: sum_statistics(jnp.sum(x), "experts")}
    gathered = gather_parameters(state, **options)
    leaves = jax.tree_util.tree_flatten_with_path(gathered)[0]
    terms = [mine["experts" in str(path)] * jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for path, leaf in leaves]
    return sum(terms), gathered


def without_fsdp(state):
    """Gives the partitions of gathered parameters."""
    axes = jax.tree_util.tree_map_with_path(
        lambda path, x: sharding.parameter_axes(sharding.path_names(path), x.ndim), state
    )
    is_axes = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda names: spec(*(None if n == "fsdp" else n for n in names)), axes, is_leaf=is_axes)


@pytest.mark.parametrize("name", ["data=8", DCT, DET])
def test_parameters_come_whole_and_their_gradients_are_of_all_tokens(name):
    state, x = state_of(0), normal(9, 8, 16)
    specs = sharding.parameter_specs(state)
    run = on_mesh(name, jax.grad(gathered_loss, has_aux=True), (specs, TOKENS), (specs, without_fsdp(state)))
    gradients, gathered = run(state, x)
    jax.tree.map(same_bits, gathered, jax.tree.map(np.asarray, state))
    close(gradients, jax.jit(jax.grad(gathered_loss, has_aux=True))(state, x)[0])


@pytest.mark.parametrize("wide", [False, True])
def test_parameters_travel_narrow_but_for_those_used_in_float32(wide):
    state, x = state_of(0), normal(9, 8, 16)
    specs = sharding.parameter_specs(state)
    loss = functools.partial(gathered_loss, dtype=jnp.bfloat16, wide=wide)
    run = on_mesh("data=4,tensor=2", jax.grad(loss, has_aux=True), (specs, TOKENS), (specs, without_fsdp(state)))
    gradients, gathered = run(state, x)
    for (path, leaf), x in zip(jax.tree_util.tree_flatten_with_path(gathered)[0], jax.tree.leaves(state), strict=True):
        exact = "norm" in str(path) or "weights_proj" in str(path) or "'gate'" in str(path)
        assert leaf.dtype == (jnp.float32 if exact or wide else jnp.bfloat16), path
        same_bits(leaf, x if exact else np.asarray(x).astype(jnp.bfloat16).astype(leaf.dtype))
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", ["data=8", "context=8"])
def test_gradients_of_parameters_are_summed_in_float32(name):
    """As for the keys above; scattered over `data`, summed over `context`."""

    def run(x, parts):
        loss = lambda x: jnp.sum(gather_parameters({"q_a_proj": x}, dtype=jnp.bfloat16)["q_a_proj"] * parts[:1, :1])
        return jax.grad(loss)(x)

    parts = np.ones((8, 8), jnp.bfloat16)
    parts[0 if name == "data=8" else np.s_[:, 0]] = 256
    specs = sharding.parameter_specs({"q_a_proj": parts})["q_a_proj"]
    same_bits(on_mesh(name, run, (specs, TOKENS), specs)(normal(0, 8, 2), parts), np.full((8, 2), 263, np.float32))


@pytest.mark.parametrize("name", [DCT])
def test_columns_are_looked_up_where_they_are(name):
    def loss(table, tokens, weights):
        part = gather_parameters({"embed_tokens": table}, whole=False)["embed_tokens"]
        rows = exchange_columns(lambda tokens: part[tokens], tokens)
        return jnp.sum(weights * jnp.sin(rows)), rows

    table, tokens = normal(0, 12, 8), array(np.random.default_rng(0).integers(12, size=(8, 16)))
    weights = normal(1, 8, 16, 8)
    columns = spec(None, "fsdp")
    run = on_mesh(name, jax.grad(loss, has_aux=True), (columns, TOKENS, TOKENS), (columns, TOKENS))
    gradient, rows = run(table, tokens, weights)
    same_bits(rows, np.asarray(table)[np.asarray(tokens)])
    close(gradient, jax.jit(jax.grad(loss, has_aux=True))(table, tokens, weights)[0])


# Pages of one sequence.


def attention(logits, values):
    """Attends over the last dimension in float64: out [B, T, N, V] and lse, 0 and -inf where nothing is reached."""
    logits, values = np.asarray(logits, np.float64), np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = logits.max(-1, keepdims=True, initial=-np.inf)
        lse = np.log(np.exp(logits - np.where(np.isinf(top), 0, top)).sum(-1)) + np.where(np.isinf(top), 0, top)[..., 0]
        weights = np.where(np.isneginf(logits), 0, np.exp(logits - lse[..., None]))
    return np.einsum("btns,sv->btnv", weights, values), lse


@pytest.mark.parametrize("name", ["context=4", "data=2,context=4"])
def test_attention_over_all_shards_keys(name):
    """Shards without keys, queries without any, scores too far apart for exp, and a NaN, which stays with its head."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 3, 4, 6)) * 3  # [B, T, N, shards, keys]
    logits[0, 0, :, 1:] = -np.inf
    logits[0, 1] = -np.inf
    logits[0, 2, :, 2] += 300
    logits[0, 3, :, :2] -= 300
    logits[1, 0, 1, 2, 3] = np.nan
    values = rng.normal(size=(4, 6, 7))
    parts = [attention(logits[..., i, :], values[i]) for i in range(4)]
    out, lse = (np.stack(x).astype(np.float32) for x in zip(*parts, strict=True))
    run = on_mesh(name, lambda out, lse: combine_attention(out[0], lse[0], "pages"), spec("pages"), spec())
    actual, total = run(out, lse)
    expected = attention(logits.reshape(2, 5, 3, 24), values.reshape(24, 7))
    close((actual, total), expected)
    assert not actual[0, 1].any() and np.all(total[0, 1] == -np.inf)
    assert np.isnan(actual[1, 0, 1]).all() and np.isnan(total[1, 0, 1])
    assert np.isnan(actual).sum() == 7 and np.isnan(total).sum() == 1


def test_attention_is_joined_in_float32():
    """A shard's part is rounded once, with the sum: in the trace, for compiled for CPUs all sums are wide."""
    out, lse = np.ones((4, 1, 1, 2, 3), jnp.bfloat16), np.zeros((4, 1, 1, 2), np.float32)
    parts = lambda out, lse: combine_attention(out[0], lse[0], "pages")[0]
    assert results_of("psum", "context=4", parts, spec("pages"), out, lse) == ["f32"]
    assert on_mesh("context=4", parts, spec("pages"), spec())(out, lse).dtype == jnp.bfloat16


def test_candidates_of_all_shards_stand_by_shard():
    x = np.arange(2 * 3 * 8, dtype=np.int32).reshape(2, 3, 8)
    gathered = on_mesh("context=4", lambda x: gather_candidates(x, "pages"), spec(None, None, "pages"), spec())(x)
    same_bits(gathered, x)
