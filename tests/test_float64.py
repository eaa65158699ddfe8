"""Float64 where JAX has it switched on: the definitions at its precision, and models that go on as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import hostile_indices, pulled, random_range
from model_cases import small_config, small_model

from dsa_jax import (
    attention_target,
    dense_indexer_kl,
    index_scores,
    latent_attention,
    multihead_attention,
    select_keys,
    select_topk,
    sparse_attention,
    sparse_indexer_kl,
)

B, T, S, N, J, E, C, R, K, SCALE = 2, 9, 17, 3, 2, 8, 8, 4, 6, 0.3
TOLERANCE = dict(rtol=1e-11, atol=1e-13)


pytestmark = pytest.mark.usefixtures("in_a_hurry")


@pytest.fixture(autouse=True)
def _with_float64():
    with jax.enable_x64(True):
        yield


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def index_arrays():
    return draw(0, B, T, J, E), draw(1, B, S, E), draw(2, B, T, J)


def test_selection():
    q_index, k_index, weights = index_arrays()
    keys = random_range(3, B, T, S)
    rows = reference.reachable(keys.start, keys.stop, S)
    scores, gradients = pulled(
        lambda *arrays: jnp.where(jnp.isfinite(x := index_scores(*arrays, keys)), x, 0.0), q_index, k_index, weights
    )
    assert scores.dtype == np.float64
    expected = reference.index_scores(q_index, k_index, weights, rows)
    np.testing.assert_allclose(scores, np.where(np.isfinite(expected), expected, 0), **TOLERANCE)
    for actual, wanted in zip(
        gradients, reference.index_scores_vjp(q_index, k_index, weights, rows, np.ones(scores.shape)), strict=True
    ):
        np.testing.assert_allclose(actual, wanted, **TOLERANCE)
    selected = select_keys(q_index, k_index, weights, keys, k=K)
    np.testing.assert_array_equal(selected, reference.select_topk(expected, K, rows))


def test_ties_that_float32_would_make():
    scores = jnp.asarray([[[1.0, 1.0 + 2**-40, -0.0, 0.0, np.nan]]])
    assert select_topk(scores, 1).tolist() == [[[1]]]
    assert select_topk(scores, 3).tolist() == [[[0, 1, 2]]]


def test_sparse_attention_and_its_target():
    q, kv, indices = draw(4, B, T, N, C + R), draw(5, B, S, C + R), hostile_indices(6, B, T, K, S)
    rows = reference.listed(indices, S)
    attend = lambda q, kv: sparse_attention(q, kv, indices, value_dim=C, scale=SCALE)
    cotangents = lambda results: (results[0] + 1, jnp.where(jnp.isfinite(results[1]), 0.5, 0.0))
    (out, lse), gradients = pulled(attend, q, kv, cotangent=cotangents)
    expected = reference.latent_attention(q, kv, rows, C, SCALE)
    wanted = reference.latent_attention_vjp(q, kv, rows, C, SCALE, *jax.tree.map(np.asarray, cotangents((out, lse))))
    for actual, right in zip((out, lse, *gradients), (*expected, *wanted), strict=True):
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, right, **TOLERANCE)
    target = attention_target(q, kv, lse, indices, scale=SCALE)
    np.testing.assert_allclose(target, reference.attention_target(q, kv, lse, indices, SCALE), **TOLERANCE)

    q_index, k_index, weights = index_arrays()
    kl, gradients = pulled(
        lambda *index: sparse_indexer_kl(*index, q, kv, lse, indices, scale=SCALE), q_index, k_index, weights
    )
    k = np.repeat(np.asarray(kv)[:, :, None], N, 2)
    arrays = q_index, k_index, weights, q, k, lse, rows, SCALE
    np.testing.assert_allclose(kl, reference.indexer_kl(*arrays), **TOLERANCE)
    for actual, wanted in zip(gradients, reference.indexer_kl_vjp(*arrays, np.ones(kl.shape)), strict=True):
        np.testing.assert_allclose(actual, wanted, **TOLERANCE)


def test_dense_attention_and_its_divergence():
    q, k, v = draw(4, B, T, N, C + R), draw(5, B, S, N, C + R), draw(6, B, S, N, C)
    keys = random_range(7, B, T, S)
    rows = reference.reachable(keys.start, keys.stop, S)
    cotangents = lambda results: (results[0] + 1, jnp.where(jnp.isfinite(results[1]), 0.5, 0.0))
    (out, lse), gradients = pulled(
        lambda *arrays: multihead_attention(*arrays, keys, scale=SCALE), q, k, v, cotangent=cotangents
    )
    wanted = reference.attention_vjp(q, k, v, rows, SCALE, *jax.tree.map(np.asarray, cotangents((out, lse))))
    for actual, right in zip(
        (out, lse, *gradients), (*reference.attention(q, k, v, rows, SCALE), *wanted), strict=True
    ):
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, right, **TOLERANCE)
    latents = k[:, :, 0]
    actual = latent_attention(q, latents, keys, value_dim=C, scale=SCALE)
    for one, right in zip(actual, reference.latent_attention(q, latents, rows, C, SCALE), strict=True):
        np.testing.assert_allclose(one, right, **TOLERANCE)
    index = index_arrays()
    kl, gradients = pulled(lambda *index: dense_indexer_kl(*index, q, k, lse, keys, scale=SCALE), *index)
    arrays = *index, q, k, lse, rows, SCALE
    np.testing.assert_allclose(kl, reference.indexer_kl(*arrays), **TOLERANCE)
    for actual, wanted in zip(gradients, reference.indexer_kl_vjp(*arrays, np.ones(kl.shape)), strict=True):
        np.testing.assert_allclose(actual, wanted, **TOLERANCE)


def test_float32_index_beside_float64_attention():
    index = [x.astype(jnp.float32) for x in index_arrays()]
    q, kv, indices = draw(4, B, T, N, C + R), draw(5, B, S, C + R), hostile_indices(6, B, T, K, S)
    lse = sparse_attention(q, kv, indices, value_dim=C, scale=SCALE)[1]
    kl, gradients = pulled(lambda *index: sparse_indexer_kl(*index, q, kv, lse, indices, scale=SCALE), *index)
    assert {x.dtype for x in (kl, *gradients)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("index_fp8", [False, True])
def test_a_model_keeps_its_own_dtypes(index_fp8):
    model = small_model(small_config(first_k_dense_replace=2, index_fp8=index_fp8))
    tokens = np.random.default_rng(0).integers(0, 64, (1, 40))
    output = model(tokens)
    with jax.enable_x64(False):
        expected = model(tokens)
    assert output.hidden.dtype == output.indexer_kl.dtype == jnp.float32
    np.testing.assert_allclose(output.hidden, expected.hidden, atol=1e-5)
