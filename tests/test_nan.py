"""Tests that NaN and +inf show wherever they are reached, and there alone: plain XLA, and the kernels interpreted."""

import functools

import jax
import jax.numpy as jnp
import nan_cases
import numpy as np
import pytest
from cases import (
    array,
    as_numpy,
    index_inputs,
    normal,
    poison,
    powers,
    pulled,
    random_range,
    the_first,
    variants_except,
)
from nan_cases import SCALE, check_attention, check_kl, is_nan_alone_at, selected, spoil, spoil_index

from dsa_jax import (
    KeyRange,
    attention_target,
    dense_indexer_kl,
    index_scores,
    latent_attention,
    multihead_attention,
    quantize,
    sparse_attention,
    sparse_indexer_kl,
)
from dsa_jax.pallas_kernels.dense_attention import multihead_attention as multihead_kernel
from dsa_jax.pallas_kernels.index_scores import index_scores_backward
from dsa_jax.pallas_kernels.indexer_loss import dense_target, head_sums, indexer_gradients
from dsa_jax.pallas_kernels.sparse_attention import sparse_attention as sparse_kernel
from dsa_jax.pallas_kernels.sparse_attention import sparse_attention_backward

pytestmark = [
    pytest.mark.usefixtures("in_a_hurry"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul"),  # of NumPy, which multiplies for wgmma
]
INDEX = ("q_index", "k_index", "weights")


def interpreted(q, kv, indices):
    """Runs the kernels of sparse attention, forward and backward, interpreted."""
    out, lse = sparse_kernel(q, kv, indices, value_dim=64, scale=SCALE, interpret=True)
    cotangents = nan_cases.cotangents((out, lse))
    options = dict(value_dim=64, scale=SCALE, interpret=True)
    return out, lse, *sparse_attention_backward(q, kv, indices, out, lse, *cotangents, **options)


@pytest.mark.parametrize("place", nan_cases.PLACES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sparse_attention(place, dtype):
    attend = functools.partial(sparse_attention, value_dim=8, scale=SCALE, implementation="xla")
    inputs = nan_cases.sparse_inputs(0, 2, 9, 40, 3, 8, 4, 6, dtype)
    check_attention(*nan_cases.sparse_results(nan_cases.with_gradients(attend, 2), place, inputs, 40))


@pytest.mark.variants
@pytest.mark.parametrize(("heads", "place"), the_first(2, [*zip((16, 64, 64, 16), nan_cases.PLACES, strict=True)]))
def test_sparse_attention_interpreted(place, heads):
    keys = 140 if heads == 64 else 70  # two pairs of key blocks, so that maxima meet; one
    inputs = nan_cases.sparse_inputs(0, 1, 3, 300, heads, 64, 64, keys, "bfloat16")
    check_attention(*nan_cases.sparse_results(interpreted, place, inputs, 300))


@pytest.mark.variants
def test_cotangents_of_rows_without_keys_are_not_looked_at():
    q, kv, indices, empty = nan_cases.sparse_inputs(0, 1, 3, 40, 16, 64, 0, 70, "bfloat16")
    out, lse = sparse_attention(q, kv, indices, value_dim=64, scale=SCALE, implementation="xla")
    d_out, d_lse = nan_cases.cotangents((out, lse))
    d_lse = jnp.where(empty[..., None], jnp.nan, d_lse)
    pull = jax.vjp(lambda q, kv: sparse_attention(q, kv, indices, value_dim=64, scale=SCALE), q, kv)[1]
    kernels = functools.partial(sparse_attention_backward, value_dim=64, scale=SCALE, interpret=True)
    for d_q, d_kv in (pull((d_out, d_lse)), kernels(q, kv, indices, out, lse, d_out, d_lse)):
        assert np.isfinite(np.asarray(d_q, np.float32)).all() and np.isfinite(np.asarray(d_kv, np.float32)).all()
        np.testing.assert_array_equal(np.asarray(d_q, np.float32)[empty], 0.0)


# Dense: products with what is out of reach are made, and masked: its values must be numbers where a query of the batch
# row reaches them, and gradients by keys show a spoilt query wherever it stood in a product.


def reach(b, t, s):
    start, stop = as_numpy(jax.tree.leaves(random_range(3, b, t, s)))
    start, stop = start.copy(), stop.copy()
    start[0, 1] = stop[0, 1] = 5
    place = np.arange(s)
    mask = (place >= start[..., None]) & (place < stop[..., None])
    return KeyRange(array(start, "int32"), array(stop, "int32")), mask


@pytest.mark.parametrize("place", nan_cases.PLACES)
@pytest.mark.parametrize("form", the_first(2, ["heads", "selection", "latent"]))
def test_dense_attention(place, form):
    b, t, s, n = 2, 12, 30, 3
    keys, reached = reach(b, t, s)
    q, v = nan_cases.aligned(normal(0, b, t, n, 12)), normal(2, b, s, n, 8)
    k = nan_cases.aligned(normal(1, b, s, 12) if form == "latent" else normal(1, b, s, n, 12))
    if form == "latent":
        attend = lambda q, k: latent_attention(q, k, keys, value_dim=8, scale=SCALE)
    elif form == "heads":
        attend = lambda q, k: multihead_attention(q, k, v, keys, scale=SCALE, implementation="xla")
    else:
        indices = array(np.random.default_rng(5).integers(-9, s, (b, t, 20)), jnp.int32)
        attend = lambda q, k: multihead_attention(q, k, v, keys, scale=SCALE, indices=indices)
        reached = reached & selected(indices, s)
    empty = ~reached.any(-1)
    spoilt_q, spoilt_k, bad = spoil(place, q, k, reached)
    spoilt_q = poison(spoilt_q, empty & place.endswith("key"))
    call = nan_cases.with_gradients(attend, 2)
    clean, spoilt = as_numpy((call(q, k), call(spoilt_q, spoilt_k)))
    check_attention(clean[:2], spoilt[:2], bad, empty, None)
    assert np.isnan(spoilt[2][bad]).all()
    assert np.isnan(spoilt[3][(reached & bad[..., None]).any(1)]).all()
    if place.endswith("query"):
        check_attention(clean[:3], spoilt[:3], bad, empty, None)


@pytest.mark.parametrize("place", nan_cases.PLACES)
def test_values_have_gradients_where_they_are_reached(place):
    """A spoilt query gives NaN to the values that it reaches, and nothing to the others."""
    b, t, s, n = 2, 12, 30, 3
    keys, reached = reach(b, t, s)
    q, k, v = (
        nan_cases.aligned(normal(0, b, t, n, 12)),
        nan_cases.aligned(normal(1, b, s, n, 12)),
        normal(2, b, s, n, 8),
    )
    spoilt_q, spoilt_k, bad = spoil(place, q, k, reached)
    attend = functools.partial(multihead_attention, keys=keys, scale=SCALE, implementation="xla")

    @jax.jit
    def by_values(q, k):
        return pulled(lambda v: attend(q, k, v), v, cotangent=nan_cases.cotangents)[1][0]

    clean, spoilt = by_values(q, k), by_values(spoilt_q, spoilt_k)
    is_nan_alone_at(spoilt, clean, (reached & bad[..., None]).any(1), "d_v")


@pytest.mark.parametrize("place", the_first(0, nan_cases.PLACES))
def test_dense_attention_interpreted(place):
    b, t, s, n = 1, 140, 200, 1
    keys, reached = reach(b, t, s)
    q, k = (nan_cases.aligned(normal(i, b, x, n, 64, dtype="bfloat16")) for i, x in enumerate((t, s)))
    v, empty = normal(2, b, s, n, 64, dtype="bfloat16"), ~reached.any(-1)
    spoilt_q, spoilt_k, bad = spoil(place, q, k, reached)
    spoilt_q = jnp.where(empty[..., None, None], jnp.nan, spoilt_q)
    call = functools.partial(multihead_kernel, scale=SCALE, blocks=1, interpret=True)
    clean, spoilt = (call(q, k, v, keys.start, keys.stop) for q, k in ((q, k), (spoilt_q, spoilt_k)))
    check_attention(clean, spoilt, bad, empty, None)


# The target and the losses.


def targets(implementation):
    def call(q, kv, indices):
        attend = functools.partial(sparse_attention, value_dim=64, scale=SCALE, implementation="xla")
        _, lse = attend(q, kv, indices)
        if implementation == "xla":
            return attention_target(q, kv, lse, indices, scale=SCALE, implementation="xla")
        return head_sums(q, kv, lse, indices, scale=SCALE, interpret=True)

    return jax.jit(call) if implementation == "xla" else call


TARGETS = [(way, place) for way in ("xla", "interpreted") for place in nan_cases.PLACES]


@pytest.mark.parametrize(
    ("implementation", "place"), variants_except(TARGETS, lambda way, place: way == "xla" or place == "nan key")
)
def test_target(place, implementation):
    inputs = nan_cases.sparse_inputs(0, 1, 3, 300, 16, 64, 64, 70, "bfloat16")
    clean, spoilt, bad, _, _ = nan_cases.sparse_results(targets(implementation), place, inputs, 300)
    indices = np.asarray(inputs[2])
    present = (indices >= 0) & (indices < 300)
    spoilt = np.asarray(spoilt)
    assert np.isnan(spoilt[bad[..., None] & present]).all()
    np.testing.assert_array_equal(spoilt[~present], 0.0)
    assert spoilt[~bad].tobytes() == np.asarray(clean)[~bad].tobytes()


def sparse_loss(implementation, k_scale):
    def loss(*arrays):
        return sparse_indexer_kl(*arrays, scale=SCALE, k_scale=k_scale, implementation="xla")

    def kernels(index, q, kv, lse, indices):
        q_index, k_index, weights = index
        sums = head_sums(q, kv, lse, indices, scale=SCALE, interpret=True)
        d_kl, d_k = jnp.ones(lse.shape[:2]), jnp.zeros(k_index.shape)
        arrays = sums, q_index, k_index, weights, indices, k_scale, d_kl, d_k
        kl, d_q, d_weights, d_k = indexer_gradients(*arrays, interpret=True)
        return kl, d_q, d_k, d_weights

    return nan_cases.kl_with_gradients(loss) if implementation == "xla" else kernels


LOSSES = [(way, what) for way in ("xla", "interpreted") for what in (*INDEX, *nan_cases.PLACES)]


@pytest.mark.parametrize(
    ("implementation", "what"), variants_except(LOSSES, lambda way, what: way == "xla" and what != "inf query")
)
def test_sparse_loss(what, implementation):
    b, t, s, k = 1, 3, 300, 70
    q, kv, indices, empty = nan_cases.sparse_inputs(0, b, t, s, 16, 64, 64, k, "bfloat16")
    *index, _ = index_inputs(3, b, t, s, 16, 64, "bfloat16")
    index = (*index[:2], array(0.1 * np.asarray(index[2])))
    reached = selected(indices, s)
    spoilt_index, spoilt_q, spoilt_kv = index, q, kv
    if what in INDEX:
        spoilt_index, bad = spoil_index(what, index, reached)
    else:
        spoilt_q, spoilt_kv, bad = spoil(what, q, kv, reached)
    run = sparse_loss(implementation, powers(6, b, s))

    def results_of(index, q, kv):
        _, lse = sparse_attention(q, kv, indices, value_dim=64, scale=SCALE, implementation="xla")
        return run(index, q, kv, lse, indices)

    results_of = jax.jit(results_of) if implementation == "xla" else results_of
    results = results_of(index, q, kv), results_of(spoilt_index, spoilt_q, spoilt_kv)
    check_kl(*results, bad, (reached & bad[..., None]).any(1))
    for x in (results[1][0], results[1][1], results[1][3]):
        np.testing.assert_array_equal(np.asarray(x, np.float32)[empty], 0.0)


@pytest.mark.parametrize("what", [*INDEX, *nan_cases.PLACES])
def test_dense_loss(what):
    b, t, s, n = 2, 12, 30, 3
    keys, reached = reach(b, t, s)
    q, k = (nan_cases.aligned(normal(i, b, x, n, 12)) for i, x in enumerate((t, s)))
    *index, _ = index_inputs(3, b, t, s, 16, 8)
    spoilt_index, spoilt_q, spoilt_k = index, q, k
    if what in INDEX:
        spoilt_index, bad = spoil_index(what, index, reached)
    else:
        spoilt_q, spoilt_k, bad = spoil(what, q, k, reached)
    loss = functools.partial(dense_indexer_kl, scale=SCALE, implementation="xla")

    @jax.jit
    def results_of(index, q, k):
        _, lse = multihead_attention(q, k, k[..., :8], keys, scale=SCALE, implementation="xla")
        return nan_cases.kl_with_gradients(loss)(tuple(index), q, k, lse, keys)

    results = as_numpy((results_of(tuple(index), q, k), results_of(spoilt_index, spoilt_q, spoilt_k)))
    bad_keys = (reached & bad[..., None]).any(1)
    if what == "k_index":  # in the products of all queries of the batch row
        is_nan_alone_at(results[1][0], results[0][0], bad, "KL")
        assert np.isnan(results[1][1]).any((2, 3))[bad].all() and np.isnan(results[1][2]).any(-1)[bad_keys].all()
    else:
        check_kl(*results, bad, bad_keys, alone=what not in ("q_index", "weights"))
    np.testing.assert_array_equal(np.asarray(results[1][0])[~reached.any(-1)], 0.0)


@pytest.mark.variants
def test_dense_target_interpreted():
    """A head's `lse` of NaN shows in every key that its query reaches."""
    b, t, s, n = 1, 67, 141, 2
    keys, reached = reach(b, t, s)
    q, k = (normal(i, b, x, n, 64, dtype="bfloat16") for i, x in enumerate((t, s)))
    _, lse = multihead_attention(q, k, k, keys, scale=SCALE, implementation="xla")
    bad = np.zeros((b, t), bool)
    bad[0, int(np.argmax(reached[0].sum(-1)))] = True
    call = functools.partial(dense_target, start=keys.start, stop=keys.stop, scale=SCALE, clusters=1, interpret=True)
    clean, spoilt = (np.asarray(call(q, k, x)) for x in (lse, lse.at[..., 0].set(jnp.where(bad, jnp.nan, lse[..., 0]))))
    assert np.isnan(spoilt[bad[..., None] & reached]).all()
    np.testing.assert_array_equal(spoilt[~reached], 0.0)
    assert spoilt[~bad].tobytes() == clean[~bad].tobytes()


# Scores and their gradients, quantisation.


@pytest.mark.parametrize("what", INDEX)
def test_scores(what):
    b, t, s = 2, 12, 30
    keys, reached = reach(b, t, s)
    *index, _ = index_inputs(3, b, t, s, 4, 8)
    spoilt_index, bad = spoil_index(what, index, reached)

    def score(*index):
        return index_scores(*index, keys, implementation="xla")

    def cotangent(scores):
        return jnp.where(scores == -jnp.inf, 0.0, normal(9, *scores.shape))

    run = jax.jit(lambda *index: pulled(score, *index, cotangent=cotangent))
    (clean, d_clean), (spoilt, d_spoilt) = (as_numpy(run(*x)) for x in (index, spoilt_index))
    np.testing.assert_array_equal(spoilt[~reached], -np.inf)
    assert not np.isfinite(spoilt[bad & reached.any(-1)]).all(-1).any()
    assert spoilt[~bad].tobytes() == clean[~bad].tobytes()
    if what != "k_index":
        is_nan_alone_at(d_spoilt[0][~bad], d_clean[0][~bad], np.zeros((~bad).sum(), bool), "d_q_index")
    if what == "q_index":
        assert np.isnan(d_spoilt[1]).any(-1)[(reached & bad[..., None]).any(1)].all()
        assert np.isnan(d_spoilt[2][bad]).all()


@pytest.mark.variants
@pytest.mark.parametrize("what", ["q_index", "d_scores"])
def test_gradients_of_scores_interpreted(what):
    """Scores of NaN have gradients of NaN: of a query's own, in all of its heads, and of the keys that it reaches."""
    b, t, s, j = 1, 20, 150, 16
    keys, reached = reach(b, t, s)
    q, k, weights, _ = index_inputs(3, b, t, s, j, 64, "bfloat16")
    d_scores = jnp.where(reached, normal(9, b, t, s), 0.0)
    bad = np.zeros((b, t), bool)
    bad[0, int(np.argmax(reached[0].sum(-1)))] = True
    spoilt_d_scores = jnp.where(bad[..., None] & reached, jnp.nan, d_scores)
    spoilt_q = jnp.where(bad[..., None, None], jnp.nan, q) if what == "q_index" else q
    call = functools.partial(index_scores_backward, start=keys.start, stop=keys.stop, interpret=True)
    clean, spoilt = call(q, k, weights, d_scores), call(spoilt_q, k, weights, spoilt_d_scores)
    is_nan_alone_at(spoilt[0], clean[0], bad, "d_q", every=what == "q_index")
    is_nan_alone_at(spoilt[2], clean[2], bad, "d_weights", every=what == "q_index")
    assert np.isnan(np.asarray(spoilt[1])).any(-1)[(reached & bad[..., None]).any(1)].all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_quantised_rows(value):
    x = normal(0, 5, 64)
    x_spoilt = np.array(x)
    x_spoilt[2, 7] = value
    run = jax.jit(functools.partial(quantize, implementation="xla"))
    clean, spoilt = run(x), run(x_spoilt)
    values = np.asarray(spoilt[0], np.float32)
    assert np.isnan(values[2, 7]) and np.isnan(values).sum() == 1
    others = np.arange(5) != 2
    for x, y in zip(spoilt, clean, strict=True):
        assert np.asarray(x)[others].tobytes() == np.asarray(y)[others].tobytes()
