"""Tests on a Hopper GPU that operations take their kernels, gradients pass, and layers agree with plain XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FP8, array, error, index_inputs, integers, normal, random_range
from flax import nnx

import dsa_jax
from dsa_jax import Config, KeyRange, index_scores, select_keys, select_topk, sparse_attention
from dsa_jax.layers import SparseMLA
from dsa_jax.rope import rotation

pytestmark = pytest.mark.gpu


def kernels_of(fn, *arrays):
    """Counts the Pallas kernels that the compiled function calls."""
    return jax.jit(fn).lower(*arrays).compile().as_text().count('custom_call_target="mosaic_gpu')


def attention_inputs(heads=64, length=40, size=500, topk=100):
    q, kv = normal(0, 1, length, heads, 576, dtype="bfloat16"), normal(1, 1, size, 576, dtype="bfloat16")
    indices = np.random.default_rng(2).integers(-50, size, (1, length, topk)).astype(np.int32)
    return q, kv, array(indices)


def attend(implementation):
    return lambda q, kv, indices: sparse_attention(
        q, kv, indices, value_dim=512, scale=0.05, implementation=implementation
    )


def test_none_takes_the_kernels_where_they_apply():
    q, kv, indices = attention_inputs()
    assert kernels_of(attend(None), q, kv, indices) == 1
    assert kernels_of(attend("xla"), q, kv, indices) == 0
    assert kernels_of(attend(None), q.astype("float32"), kv.astype("float32"), indices) == 0
    assert kernels_of(attend(None), q[:, :, :3], kv, indices) == 0
    q, k, w, scale = index_inputs(0, 1, 9, 70, 64, 128, FP8)
    keys = KeyRange.causal(1, 9)
    assert kernels_of(lambda q: index_scores(q, k, w, keys, k_scale=scale), q) == 1
    assert kernels_of(lambda q: select_keys(q, k, w, keys, k=8, k_scale=scale), q) == 2
    assert kernels_of(lambda x: select_topk(x, 8), normal(0, 1, 9, 70)) == 1


@pytest.mark.parametrize("heads", [16, 64])
def test_attention_gradients_pass_through_the_kernel(heads):
    q, kv, indices = attention_inputs(heads)

    def loss(implementation):
        def loss(q, kv):
            out, lse = attend(implementation)(q, kv, indices)
            return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

        return loss

    ours, theirs = (jax.jit(jax.grad(loss(i), (0, 1)))(q, kv) for i in ("pallas", "xla"))
    for gradient, want in zip(ours, theirs, strict=True):
        assert error(gradient, want) < 5e-3


def test_score_gradients_pass_through_the_kernel():
    q, k, w, _ = index_inputs(0, 2, 30, 300, 16, 64, "bfloat16")
    keys = random_range(1, 2, 30, 300)

    def loss(implementation):
        def loss(q, k, w):
            scores = index_scores(q, k, w, keys, implementation=implementation)
            return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0) * 0.01)

        return loss

    ours, theirs = (jax.jit(jax.grad(loss(i), (0, 1, 2)))(q, k, w) for i in ("pallas", "xla"))
    for gradient, want in zip(ours, theirs, strict=True):
        assert error(gradient, want) < 1e-6


def test_vmapped_operations_take_the_kernels():
    q, kv, indices = attention_inputs()
    stacked = jnp.stack([q, -q]), jnp.stack([indices, indices[:, ::-1]])
    out, _ = jax.jit(jax.vmap(attend("pallas"), (0, None, 0)))(stacked[0], kv, stacked[1])
    for i in range(2):
        want, _ = jax.jit(attend("pallas"))(stacked[0][i], kv, stacked[1][i])
        np.testing.assert_array_equal(np.asarray(out[i], np.float32), np.asarray(want, np.float32))
    scores = normal(0, 3, 2, 50, 400)
    chosen = jax.vmap(lambda x: select_topk(x, 20, implementation="pallas"))(scores)
    np.testing.assert_array_equal(chosen, jax.vmap(lambda x: select_topk(x, 20, implementation="xla"))(scores))
    q, k, w, _ = (integers(i, 3, *shape) for i, shape in enumerate([(1, 9, 16, 64), (1, 70, 64), (1, 9, 16), (1,)]))
    keys = KeyRange.causal(1, 9, offset=61)

    def score(implementation):
        def score(q, k, w):
            return index_scores(q.astype(FP8), k.astype(FP8), w, keys, implementation=implementation)

        return jax.jit(jax.vmap(score))(q, k, w)

    np.testing.assert_array_equal(score("pallas"), score("xla"))


def test_a_layer_of_the_published_widths_agrees_with_xla():
    config = dataclasses.replace(
        Config.deepseek_v32(), hidden_size=512, param_dtype="bfloat16", index_fp8=True, index_topk=4096
    )
    layer = SparseMLA(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = normal(3, 1, 600, 512, dtype="bfloat16")

    def run(state, x):
        positions = jnp.arange(600, dtype=jnp.int32)[None]
        return nnx.merge(graph, state)(x, rotation(positions, config), KeyRange.causal(1, 600)).x

    assert kernels_of(run, state, x) == 7  # hadamard and quantize of q and of k, scores, top-k, attention
    ours = jax.jit(run)(state, x)
    with dsa_jax.implementation("xla"):
        assert error(ours, jax.jit(run)(state, x)) < 1e-2
