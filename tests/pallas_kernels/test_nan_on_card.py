"""Tests on a Hopper GPU that NaN and +inf show wherever they are reached, in the kernels and in plain XLA."""

import functools

import jax
import jax.numpy as jnp
import nan_cases
import numpy as np
import pytest
from cases import index_inputs, normal, random_range
from nan_cases import SCALE, check_attention, check_kl, is_nan_alone_at, selected, spoil, spoil_index

from dsa_jax import (
    KeyRange,
    attention_target,
    dense_indexer_kl,
    index_scores,
    multihead_attention,
    quantize,
    select_topk,
    sparse_attention,
    sparse_indexer_kl,
)

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("implementation", ["pallas", "xla"])]
INDEX = ("q_index", "k_index", "weights")


@pytest.mark.parametrize("place", nan_cases.PLACES)
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_sparse_attention(implementation, heads, place):
    attend = functools.partial(sparse_attention, value_dim=512, scale=SCALE, implementation=implementation)
    inputs = nan_cases.sparse_inputs(0, 2, 9, 700, heads, 512, 64, 300, "bfloat16")
    results = nan_cases.sparse_results(nan_cases.with_gradients(attend, 2), place, inputs, 700)
    check_attention(*results, repeats=implementation == "pallas")


@pytest.mark.parametrize("place", nan_cases.PLACES)
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_target(implementation, heads, place):
    @jax.jit
    def call(q, kv, indices):
        options = dict(scale=SCALE, implementation=implementation)
        _, lse = sparse_attention(q, kv, indices, value_dim=512, **options)
        return attention_target(q, kv, lse, indices, **options)

    inputs = nan_cases.sparse_inputs(0, 2, 9, 700, heads, 512, 64, 300, "bfloat16")
    clean, spoilt, bad, _, _ = nan_cases.sparse_results(call, place, inputs, 700)
    indices, clean, spoilt = (np.asarray(x) for x in (inputs[2], clean, spoilt))
    present = (indices >= 0) & (indices < 700)
    # A probability of 0 may stay 0; what is above shows.
    assert np.isnan(spoilt[bad[..., None] & present & (clean > 0)]).all()
    np.testing.assert_array_equal(spoilt[~present], 0.0)
    assert spoilt[~bad].tobytes() == clean[~bad].tobytes()


@pytest.mark.parametrize("what", [*INDEX, *nan_cases.PLACES])
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_sparse_loss(implementation, heads, what):
    b, t, s, k = 2, 9, 700, 300
    q, kv, indices, empty = nan_cases.sparse_inputs(0, b, t, s, heads, 512, 64, k, "bfloat16")
    *index, _ = index_inputs(3, b, t, s, 64, 128, "bfloat16")
    index = (*index[:2], 0.1 * index[2])
    reached = selected(indices, s)
    spoilt_index, spoilt_q, spoilt_kv = index, q, kv
    if what in INDEX:
        spoilt_index, bad = spoil_index(what, index, reached)
    else:
        spoilt_q, spoilt_kv, bad = spoil(what, q, kv, reached)
    k_scale = jnp.exp2(jnp.round(normal(6, b, s)))
    loss = functools.partial(sparse_indexer_kl, scale=SCALE, k_scale=k_scale, implementation=implementation)
    run = nan_cases.kl_with_gradients(loss)

    def results_of(index, q, kv):
        _, lse = sparse_attention(q, kv, indices, value_dim=512, scale=SCALE, implementation=implementation)
        return run(index, q, kv, lse, indices)

    results = results_of(index, q, kv), results_of(spoilt_index, spoilt_q, spoilt_kv)
    check_kl(*results, bad, (reached & bad[..., None]).any(1), repeats=implementation == "pallas")
    for x in (results[1][0], results[1][1], results[1][3]):
        np.testing.assert_array_equal(np.asarray(x, np.float32)[empty], 0.0)


def reach(kind, b, t, s):
    if kind == "causal":
        keys = KeyRange.causal(b, t, offset=s - t)
    else:
        keys = random_range(3, b, t, s)
        keys = KeyRange(keys.start.at[0, 1].set(5), keys.stop.at[0, 1].set(5))
    return keys, np.asarray(keys.mask(s))


@pytest.mark.parametrize("place", nan_cases.PLACES)
@pytest.mark.parametrize("kind", ["causal", "random"])
def test_dense_attention(implementation, kind, place):
    """Of gradients other queries' stay finite where a query is spoilt; XLA computes them all, whoever went forward."""
    b, t, s, n = 2, 300, 300, 4
    keys, reached = reach(kind, b, t, s)
    q, k = (nan_cases.aligned(normal(i, b, x, n, 192, dtype="bfloat16")) for i, x in enumerate((t, s)))
    v, empty = normal(2, b, s, n, 128, dtype="bfloat16"), ~reached.any(-1)
    spoilt_q, spoilt_k, bad = spoil(place, q, k, reached)

    @functools.partial(jax.jit, static_argnames="asks_lse")
    def call(q, k, v, *, asks_lse):
        attend = functools.partial(multihead_attention, keys=keys, scale=SCALE, implementation=implementation)
        value, pull = jax.vjp(attend, q, k, v)
        d_out, d_lse = nan_cases.cotangents(value)
        return value, pull((d_out, d_lse if asks_lse else jnp.zeros_like(d_lse)))

    for asks_lse in (False, True):  # cuDNN takes causal ranges where nothing is asked of `lse`
        clean, _ = call(q, k, v, asks_lse=asks_lse)
        spoilt, (d_q, d_k, d_v) = call(spoilt_q, spoilt_k, v, asks_lse=asks_lse)
        check_attention(clean, spoilt, bad, empty, None)
        bad_keys = (reached & bad[..., None]).any(1)
        assert np.isnan(np.asarray(d_q, np.float32)[bad]).all()
        for gradient in (d_k, d_v):
            assert np.isnan(np.asarray(gradient, np.float32)[bad_keys]).all()
        if place.endswith("query"):
            assert np.isfinite(np.asarray(d_q, np.float32)[~bad]).all()


@pytest.mark.parametrize("what", [*INDEX, *nan_cases.PLACES])
@pytest.mark.parametrize("kind", ["causal", "random"])
def test_dense_loss(implementation, kind, what):
    b, t, s, n = 2, 70, 300, 4
    keys, reached = reach(kind, b, t, s)
    q, k = (nan_cases.aligned(normal(i, b, x, n, 192, dtype="bfloat16")) for i, x in enumerate((t, s)))
    *index, _ = index_inputs(3, b, t, s, 64, 128, "bfloat16")
    index = (*index[:2], 0.1 * index[2])
    spoilt_index, spoilt_q, spoilt_k = index, q, k
    if what in INDEX:
        spoilt_index, bad = spoil_index(what, index, reached)
    else:
        spoilt_q, spoilt_k, bad = spoil(what, q, k, reached)
    loss = functools.partial(dense_indexer_kl, scale=SCALE, implementation=implementation)

    def results_of(index, q, k):
        _, lse = multihead_attention(q, k, k[..., :128], keys, scale=SCALE, implementation=implementation)
        return nan_cases.kl_with_gradients(loss)(index, q, k, lse, keys)

    results = results_of(index, q, k), results_of(spoilt_index, spoilt_q, spoilt_k)
    bad_keys = (reached & bad[..., None]).any(1)
    if what == "k_index":  # in the products of all queries of the batch row
        is_nan_alone_at(results[1][0], results[0][0], bad, "KL")
        assert np.isnan(np.asarray(results[1][1], np.float32)).any((2, 3))[bad].all()
        assert np.isnan(np.asarray(results[1][2], np.float32)).any(-1)[bad_keys].all()
    else:
        check_kl(*results, bad, bad_keys, alone=what not in ("q_index", "weights"))
    np.testing.assert_array_equal(np.asarray(results[1][0])[~reached.any(-1)], 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_quantised_rows(implementation, value):
    """NaN in the element alone, as on a CPU, and a score of NaN, which is not selected."""
    x = normal(0, 300, 128, dtype="bfloat16").at[3, 0].set(-0.0)
    spoilt_x = x.at[7, 9].set(value)
    call = jax.jit(functools.partial(quantize, implementation=implementation))
    clean, spoilt = call(x), call(spoilt_x)
    values = np.asarray(spoilt[0].astype(jnp.float32))
    assert np.isnan(values[7, 9]) and np.isnan(values).sum() == 1
    others = np.arange(300) != 7
    for a, b in zip(spoilt, clean, strict=True):
        assert np.asarray(a)[others].tobytes() == np.asarray(b)[others].tobytes()
    if np.isinf(value):
        for a, b in zip(spoilt, quantize(spoilt_x, implementation="xla"), strict=True):
            a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
            np.testing.assert_array_equal(a, b)
    q, weights = quantize(normal(1, 1, 5, 64, 128, dtype="bfloat16"))[0], normal(2, 1, 5, 64)
    keys = KeyRange(jnp.zeros((1, 5), jnp.int32), jnp.full((1, 5), 300, jnp.int32))
    options = dict(implementation=implementation)
    scores = index_scores(q, spoilt[0][None], weights, keys, k_scale=spoilt[1][None], **options)
    np.testing.assert_array_equal(np.isnan(np.asarray(scores)), np.broadcast_to(~others, (1, 5, 300)))
    assert not np.any(np.asarray(select_topk(scores, 300, **options)) == 7)


@pytest.mark.parametrize("what", INDEX)
def test_scores(implementation, what):
    b, t, s = 2, 12, 300
    keys, reached = reach("random", b, t, s)
    *index, _ = index_inputs(3, b, t, s, 64, 128, "bfloat16")
    spoilt_index, bad = spoil_index(what, index, reached)
    clean, spoilt = (np.asarray(index_scores(*x, keys, implementation=implementation)) for x in (index, spoilt_index))
    np.testing.assert_array_equal(spoilt[~reached], -np.inf)
    assert not np.isfinite(spoilt[bad & reached.any(-1)]).all(-1).any()
    if what == "q_index":
        assert np.isnan(spoilt[bad[..., None] & reached]).all()
    assert spoilt[~bad].tobytes() == clean[~bad].tobytes()
