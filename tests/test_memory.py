"""Nothing is quadratic in memory: compiled temporary memory at T = S = 131072, and one block run at that S.

The public functions are compiled alone, at the published widths; compiled, not run: a layer of that length takes
minutes on a CPU. A [T, S] float32 matrix would be 68.7 GB.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import array

from dsa_jax import (
    KeyRange,
    attention_target,
    dense_indexer_kl,
    latent_attention,
    multihead_attention,
    select_blocks,
    select_keys,
    sparse_attention,
    sparse_indexer_kl,
)

LONG, J, E, K, N, C, R, P, V = 131072, 64, 128, 2048, 16, 512, 64, 128, 128
GIB = 2**30
SCALE = (P + R) ** -0.5
QUERIES = 4  # of the block that runs


def shape(*dims, dtype="bfloat16") -> Any:
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


def arguments(t, s):
    """Returns the arguments of every operation by name, as shapes."""
    edge = shape(1, t, dtype="int32")
    return dict(
        q_index=shape(1, t, J, E),
        k_index=shape(1, s, E),
        weights=shape(1, t, J, dtype="float32"),
        q=shape(1, t, N, C + R),
        kv=shape(1, s, C + R),
        indices=shape(1, t, K, dtype="int32"),
        lse=shape(1, t, N, dtype="float32"),
        q_heads=shape(1, t, N, P + R),
        k_heads=shape(1, s, N, P + R),
        v_heads=shape(1, s, N, V),
        keys=KeyRange(edge, edge),
        q_fp8=shape(1, t, J, E, dtype="float8_e4m3fn"),
        k_fp8=shape(1, s, E, dtype="float8_e4m3fn"),
        k_scale=shape(1, s, dtype="float32"),
    )


def select(q_index, k_index, weights, keys):
    return select_keys(q_index, k_index, weights, keys, k=K)


def select_whole_blocks(q_index, k_index, weights, keys):
    return select_blocks(q_index, k_index, weights, keys, k=K, block_size=64)


def select_fp8(q_fp8, k_fp8, weights, keys, k_scale):
    return select_keys(q_fp8, k_fp8, weights, keys, k=K, k_scale=k_scale)


def attend(q, kv, indices):
    return sparse_attention(q, kv, indices, value_dim=C, scale=SCALE)


def attend_latent(q, kv, keys):
    return latent_attention(q, kv, keys, value_dim=C, scale=SCALE)


def attend_heads(q_heads, k_heads, v_heads, keys):
    return multihead_attention(q_heads, k_heads, v_heads, keys, scale=SCALE)


def attend_heads_selected(q_heads, k_heads, v_heads, keys, indices):
    return multihead_attention(q_heads, k_heads, v_heads, keys, scale=SCALE, indices=indices)


def target(q, kv, lse, indices):
    return attention_target(q, kv, lse, indices, scale=SCALE)


def dense_kl(q_index, k_index, weights, q_heads, k_heads, lse, keys):
    return dense_indexer_kl(q_index, k_index, weights, q_heads, k_heads, lse, keys, scale=SCALE)


def dense_kl_max(q_index, k_index, weights, q_heads, k_heads, lse, keys):
    return dense_indexer_kl(q_index, k_index, weights, q_heads, k_heads, lse, keys, scale=SCALE, target="max")


def sparse_kl(q_index, k_index, weights, q, kv, lse, indices):
    return sparse_indexer_kl(q_index, k_index, weights, q, kv, lse, indices, scale=SCALE)


def sparse_kl_max(q_index, k_index, weights, q, kv, lse, indices):
    return sparse_indexer_kl(q_index, k_index, weights, q, kv, lse, indices, scale=SCALE, target="max")


def inputs_of(function, given):
    return {name: given[name] for name in function.__code__.co_varnames[: function.__code__.co_argcount]}


def gradient_of(function, names):
    """(value, gradients by `names`) as a function of all inputs; every output gets a cotangent."""

    def run(inputs):
        def outputs(chosen):
            return function(**(inputs | chosen))

        value, pull = jax.vjp(outputs, {name: inputs[name] for name in names})
        return value, pull(jax.tree.map(jnp.ones_like, value))

    return run


INDEX = ("q_index", "k_index", "weights")
BOUNDS = [
    (select, (), 2),
    (select_whole_blocks, (), 2),
    (select_fp8, (), 3),  # CPU XLA widens all e4m3 queries to float16 first: 2 GiB; 2 is for bfloat16
    (attend, (), 3),
    (attend, ("q", "kv"), 3),
    (attend_latent, (), 3),
    (attend_heads, (), 3),
    (attend_heads_selected, (), 3),
    (attend_heads, ("q_heads", "k_heads", "v_heads"), 6),  # 2.5 of them float32 sums of the gradients by keys, values
    (target, (), 3),
    (dense_kl, (), 3),
    (dense_kl, INDEX, 3),
    (sparse_kl, INDEX, 3),
    (dense_kl_max, INDEX, 3),
    (sparse_kl_max, INDEX, 3),
]


@pytest.mark.parametrize(("function", "names", "gib"), BOUNDS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_compiled_temporaries_at_128k(function, names, gib):
    """Arguments and results, the gradients among them, are not temporaries."""
    inputs = inputs_of(function, arguments(LONG, LONG))
    run = gradient_of(function, names) if names else lambda inputs: function(**inputs)
    memory = jax.jit(run).lower(inputs).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < gib * GIB, f"{memory.temp_size_in_bytes / GIB:.2f} GiB"


@pytest.fixture(scope="module")
def block():
    """A few queries at the end of 131072 keys, narrow enough to be quick: the values of all inputs."""
    t, j, e, n, c, r = QUERIES, 4, 16, 2, 16, 8
    rng = np.random.default_rng(0)
    normal = lambda *dims: array(rng.normal(size=dims), "bfloat16")
    keys = KeyRange(jnp.zeros((1, t), jnp.int32), LONG - t + 1 + jnp.arange(t, dtype=jnp.int32)[None])
    return dict(
        q_index=normal(1, t, j, e),
        k_index=normal(1, LONG, e),
        weights=array(rng.normal(size=(1, t, j)), jnp.float32),
        q=normal(1, t, n, c + r),
        kv=normal(1, LONG, c + r),
        k_heads=normal(1, LONG, n, c + r),
        keys=keys,
    )


def test_one_block_selects_and_attends_at_128k(block):
    index, q, kv, keys = tuple(block[name] for name in INDEX), block["q"], block["kv"], block["keys"]

    @jax.jit
    def run(index, q, kv, keys):
        indices = select_keys(*index, keys=keys, k=K)
        attend = functools.partial(sparse_attention, indices=indices, value_dim=16, scale=0.1)
        (out, lse), pull = jax.vjp(attend, q, kv)
        kl = sparse_indexer_kl(*index, q=q, kv=kv, lse=lse, indices=indices, scale=0.1)
        return indices, out, lse, pull((jnp.ones_like(out), jnp.ones_like(lse))), kl

    indices, out, lse, gradients, kl = run(index, q, kv, keys)
    index, q, kv = jax.tree.map(reference.f64, (index, q, kv))
    scores = reference.index_scores(*index, rows=reference.reachable(keys.start, keys.stop, LONG))[0]
    for t, row in enumerate(np.asarray(indices[0])):
        assert np.all(np.diff(row) > 0) and row[0] >= 0 and row[-1] < LONG - QUERIES + t + 1
        threshold = np.partition(scores[t], -K)[-K]
        assert scores[t][row].min() >= threshold - 1e-4 * abs(threshold)
    rows = reference.listed(indices, LONG)
    expected = reference.latent_attention(q, kv, rows, 16, 0.1)
    np.testing.assert_allclose(reference.f64(out), expected[0], atol=1e-2)
    np.testing.assert_allclose(reference.f64(lse), expected[1], rtol=1e-5)
    d = (np.ones_like(expected[0]), np.ones_like(expected[1]))
    for actual, want in zip(gradients, reference.latent_attention_vjp(q, kv, rows, 16, 0.1, *d), strict=True):
        assert np.linalg.norm(reference.f64(actual) - want) < 1e-2 * np.linalg.norm(want)
    wide = np.repeat(kv[:, :, None], 2, 2)
    arguments = (*index, q, wide, lse, rows, 0.1)
    np.testing.assert_allclose(kl, reference.indexer_kl(*arguments), rtol=1e-3)


def test_one_block_of_the_dense_loss_at_128k(block):
    """The largest positions are reached: nothing overflows 32 bits or loses the tail."""
    index, q, k, keys = tuple(block[name] for name in INDEX), block["q"], block["k_heads"], block["keys"]

    @jax.jit
    def run(index, q, k, keys):
        out, lse = multihead_attention(q, k, k, keys, scale=0.1)
        kl, pull = jax.vjp(functools.partial(dense_indexer_kl, q=q, k=k, lse=lse, keys=keys, scale=0.1), *index)
        return out, lse, kl, pull(jnp.ones_like(kl))

    out, lse, kl, gradients = run(index, q, k, keys)
    index, q, k = jax.tree.map(reference.f64, (index, q, k))
    rows = reference.reachable(keys.start, keys.stop, LONG)
    expected = reference.attention(q, k, k, rows, 0.1)
    np.testing.assert_allclose(reference.f64(out), expected[0], atol=2e-3)
    np.testing.assert_allclose(reference.f64(lse), expected[1], rtol=1e-5)
    arguments = (*index, q, k, lse, rows, 0.1)
    np.testing.assert_allclose(kl, reference.indexer_kl(*arguments), rtol=1e-3)
    wanted = reference.indexer_kl_vjp(*arguments, cotangent=np.ones((1, QUERIES)))
    for actual, want in zip(gradients, wanted, strict=True):
        assert np.linalg.norm(reference.f64(actual) - want) < 1e-2 * np.linalg.norm(want)
