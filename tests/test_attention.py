"""Attention (Eq. 2), sparse and dense, against float64 NumPy: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from attention_cases import SCALE, SHAPES, cotangents, heads_inputs, inputs, sparse
from cases import (
    INT_MAX,
    INT_MIN,
    array,
    as_numpy,
    causal_indices,
    causal_range,
    close,
    hostile_indices,
    many_blocks,
    noise,
    normal,
    poison,
    pulled,
    random_range,
    same_bits,
    topk_of,
    unchecked,
)

from dsa_jax import (
    KeyRange,
    attention_target,
    latent_attention,
    multihead_attention,
    sparse_attention,
)

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def test_gradients_of_the_reference_are_central_differences():
    q, kv = (reference.f64(x) for x in inputs((1, 2, 4, 2, 2, 1, 3))[:2])
    rows = [[np.array([0, 2, 2]), np.array([3])]]
    d_out, d_lse = reference.f64(normal(3, 1, 2, 2, 2)), reference.f64(normal(4, 1, 2, 2))

    def total(q, kv):
        out, lse = reference.latent_attention(q, kv, rows, 2, SCALE)
        return (d_out * out).sum() + (d_lse * lse).sum()

    dq, dkv = reference.latent_attention_vjp(q, kv, rows, 2, SCALE, d_out, d_lse)
    np.testing.assert_allclose(dq, reference.central_difference(lambda x: total(x, kv), q), atol=1e-8)
    np.testing.assert_allclose(dkv, reference.central_difference(lambda x: total(q, x), kv), atol=1e-8)


# Sparse attention


@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_values_and_gradients(shape, monkeypatch):
    """Hostile indices: unsorted, duplicates, absent slots of every sort anywhere, a row of nothing."""
    many_blocks(monkeypatch, shape)
    b, t, s, n, c, r, k = shape
    q, kv, indices = inputs(shape)
    rows = reference.listed(indices, s)
    (out, lse), (dq, dkv) = as_numpy(pulled(sparse(c, indices), q, kv, cotangent=cotangents))
    assert out.shape == (b, t, n, c) and lse.shape == (b, t, n) and out.dtype == lse.dtype == jnp.float32
    expected_out, expected_lse = reference.latent_attention(q, kv, rows, c, SCALE)
    close(out, expected_out, 2e-5)
    close(lse, expected_lse, 2e-5)
    expected = reference.latent_attention_vjp(q, kv, rows, c, SCALE, *cotangents((out, lse)))
    close(dq, expected[0], 3e-5)
    close(dkv, expected[1], 3e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_each_cotangent_is_honoured_alone(which):
    shape = (1, 9, 17, 3, 8, 4, 6)
    q, kv, indices = inputs(shape)

    def one(value):
        d = list(cotangents(value))
        d[1 - which] = np.zeros(d[1 - which].shape, d[1 - which].dtype)
        return tuple(d)

    value, gradients = as_numpy(pulled(sparse(8, indices), q, kv, cotangent=one))
    d = one(value)
    expected = reference.latent_attention_vjp(q, kv, reference.listed(indices, 17), 8, SCALE, *d)
    assert np.abs(expected[0]).max() > 0.01
    for actual, want in zip(gradients, expected, strict=True):
        close(actual, want, 3e-5)


def test_bfloat16_accumulates_in_float32():
    """Logits of bfloat16 inputs are exact products summed in float32: lse is as good as in float32; out and gradients
    carry the roundings of bfloat16 (2^-9 for the probabilities and for the result)."""
    q, kv, indices = inputs((1, 70, 300, 4, 64, 16, 40), "bfloat16")
    rows = reference.listed(indices, 300)
    (out, lse), (dq, dkv) = as_numpy(pulled(sparse(64, indices, 0.1), q, kv, cotangent=cotangents))
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    expected_out, expected_lse = reference.latent_attention(q, kv, rows, 64, 0.1)
    close(lse, expected_lse, 2e-5)
    close(out, expected_out, 8e-3)
    assert dq.dtype == dkv.dtype == jnp.bfloat16
    expected = reference.latent_attention_vjp(q, kv, rows, 64, 0.1, *cotangents((out, lse)))
    for actual, want in zip((dq, dkv), expected, strict=True):
        error = np.linalg.norm(reference.f64(actual) - want) / np.linalg.norm(want)
        assert error < 6e-3, error


def ones(value):
    return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), value)


@pytest.mark.parametrize("spread", ["one row", "many rows", "many blocks"])
def test_two_thousand_duplicates_of_one_key_accumulate_in_float32(spread, monkeypatch):
    """A bfloat16 scatter of 2000 equal addends stalls at 256 of them; here the sum is right to one rounding."""
    t, k = (1, 2048) if spread == "one row" else (512, 4)
    if spread == "many blocks":
        many_blocks(monkeypatch, (1, t), 2000)
    q, kv = array(np.ones((1, t, 1, 8)), "bfloat16"), normal(1, 1, 6, 8, dtype="bfloat16")
    indices = array(np.full((1, t, k), 3), "int32")
    (out, lse), (_, dkv) = as_numpy(pulled(sparse(8, indices), q, kv, cotangent=ones))
    close(lse[0, :, 0], np.full(t, SCALE * reference.f64(kv)[0, 3].sum() + np.log(k)), 2e-5)
    expected = reference.latent_attention_vjp(q, kv, reference.listed(indices, 6), 8, SCALE, *ones((out, lse)))[1]
    np.testing.assert_allclose(reference.f64(dkv), expected, rtol=6e-3, atol=1e-6)


def test_absent_is_absent_wherever_it_stands():
    """No slot outside [0, S) is clamped to key 0 or wrapped to the last, forward or backward."""
    q, kv, _ = inputs((1, 2, 17, 2, 8, 4, 6))
    present = np.array([[[2, 5, 11], [4, 4, 9]]], np.int32)

    @jax.jit
    def attend(indices):
        return pulled(sparse(8, indices), q, kv, cotangent=cotangents)

    expected = as_numpy(attend(present))
    for absent in (-1, -2, -17, 17, 18, INT_MIN, INT_MAX):
        with_absent = np.full((1, 2, 6), absent, np.int32)
        with_absent[..., [1, 2, 4]] = present
        actual = as_numpy(attend(with_absent))
        jax.tree.map(lambda a, b: close(a, b, 1e-6), actual, expected)
        assert not np.any(actual[1][1][0, [0, 1, 3, 16]])


def test_a_key_listed_twice_counts_twice():
    q, kv, _ = inputs((1, 1, 5, 2, 8, 4, 1))
    copied_kv = np.concatenate([kv, np.asarray(kv)[:, 1:2]], 1)
    attend = jax.jit(lambda q, kv, indices: sparse(8, indices)(q, kv))
    out, lse = attend(q, kv, np.array([[[1, 3, 1]]], np.int32))
    copied, copied_lse = attend(q, copied_kv, np.array([[[1, 3, 5]]], np.int32))
    close(out, copied, 1e-6)
    close(lse, copied_lse, 1e-6)


def test_nan_in_unselected_keys_changes_nothing():
    """The first and the last key, where clamped and wrapped indices would land, among them."""
    shape = (2, 9, 40, 3, 8, 4, 6)
    q, kv, _ = inputs(shape)
    indices = np.array(hostile_indices(3, 2, 9, 6, 40))
    indices[(indices == 0) | (indices == 39) | (indices % 5 == 0)] = -1
    absent = np.stack([~np.isin(np.arange(40), row) for row in indices])
    attend = jax.jit(lambda kv: pulled(sparse(8, array(indices, "int32")), q, kv, cotangent=cotangents))
    results = []
    for keys in (poison(kv, absent, 0.0), poison(kv, absent)):
        results.append(as_numpy(attend(keys)))
    jax.tree.map(same_bits, *results)
    assert not np.any(np.where(absent[..., None], results[1][1][1], 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_empty_rows_give_zero_minus_infinity_and_zero_gradients(dtype):
    q, kv, _ = inputs((1, 3, 5, 2, 8, 4, 1), dtype)
    indices = jnp.array([[[-1, 5], [INT_MIN, INT_MAX], [-1, 2]]])
    run = jax.jit(
        lambda d: pulled(sparse(8, indices), q, kv, cotangent=lambda v: (jnp.ones_like(v[0]), jnp.full_like(v[1], d)))
    )
    for d_lse in (0.0, 1.0):
        (out, lse), (dq, dkv) = as_numpy(run(d_lse))
        assert not np.any(out[0, :2]) and np.all(lse[0, :2] == -np.inf) and np.all(np.isfinite(lse[0, 2]))
        assert not np.any(dq[0, :2]) and np.all(np.isfinite(dq)) and np.all(np.isfinite(dkv))
        assert np.any(dkv[0, 2]) and not np.any(dkv[0, [0, 1, 3, 4]])


def test_all_rows_empty():
    q, kv, _ = inputs((1, 2, 3, 2, 4, 2, 1))
    nothing = array(np.full((1, 2, 3), -1), "int32")
    (out, lse), gradients = as_numpy(pulled(sparse(4, nothing), q, kv, cotangent=ones))
    assert not np.any(out) and np.all(lse == -np.inf) and not any(np.any(x) for x in gradients)


def test_large_logits_do_not_overflow():
    q, kv, indices = inputs((1, 9, 17, 3, 8, 4, 6))
    q, kv = array(300 * np.asarray(q)), array(300 * np.asarray(kv))
    rows = reference.listed(indices, 17)
    (out, lse), gradients = as_numpy(pulled(sparse(8, indices), q, kv, cotangent=cotangents))
    expected = reference.latent_attention(q, kv, rows, 8, SCALE)
    close(lse, expected[1], 1e-5)
    assert np.all(np.isfinite(out)) and all(np.all(np.isfinite(x)) for x in gradients)


def test_order_of_the_selection_is_free():
    q, kv, indices = inputs((2, 9, 17, 3, 8, 4, 6))
    attend = jax.jit(lambda indices: sparse(8, indices)(q, kv)[0])
    close(attend(indices), attend(np.asarray(indices)[..., ::-1]), 1e-6)


# Dense forms


@pytest.mark.parametrize("shape", SHAPES)
def test_latent_values_and_gradients(shape, monkeypatch):
    many_blocks(monkeypatch, shape, 10_000)
    b, t, s, n, c, r, _ = shape
    q, kv, _ = inputs(shape)
    keys = random_range(5, b, t, s)
    rows = reference.reachable(keys.start, keys.stop, s)
    attend = functools.partial(latent_attention, keys=keys, value_dim=c, scale=SCALE)
    (out, lse), gradients = as_numpy(pulled(attend, q, kv, cotangent=cotangents))
    expected = reference.latent_attention(q, kv, rows, c, SCALE)
    close(out, expected[0], 2e-5)
    close(lse, expected[1], 2e-5)
    expected = reference.latent_attention_vjp(q, kv, rows, c, SCALE, *cotangents((out, lse)))
    for actual, want in zip(gradients, expected, strict=True):
        close(actual, want, 3e-5)


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (2, 9, 17, 3, 8, 4, 6), (1, 70, 300, 4, 16, 8, 24)])
def test_multihead_values_and_gradients(shape, selected, monkeypatch):
    """A selection masks the range: only keys in both are attended to, and one listed twice counts twice."""
    many_blocks(monkeypatch, shape, 10_000)
    b, t, s, n, p, r, v = shape
    q, k, value = heads_inputs(*shape)
    keys = random_range(5, b, t, s)
    rows = reference.reachable(keys.start, keys.stop, s)
    indices = None
    if selected:
        indices = hostile_indices(6, b, t, 1 + s // 2, s)
        rows = reference.intersect(reference.listed(indices, s), rows)

    def attend(q, k, v):
        return multihead_attention(q, k, v, keys, scale=SCALE, indices=indices)

    (out, lse), gradients = as_numpy(pulled(attend, q, k, value, cotangent=cotangents))
    assert out.shape == (b, t, n, v) and out.dtype == lse.dtype == jnp.float32
    expected = reference.attention(q, k, value, rows, SCALE)
    close(out, expected[0], 2e-5)
    close(lse, expected[1], 2e-5)
    expected = reference.attention_vjp(q, k, value, rows, SCALE, *cotangents((out, lse)))
    for actual, want in zip(gradients, expected, strict=True):
        close(actual, want, 3e-5)


@pytest.mark.parametrize("form", ["latent", "multihead"])
def test_dense_bfloat16_accumulates_in_float32(form, monkeypatch):
    """2048 queries, in many blocks, share one key, whose gradient a bfloat16 sum would leave far short."""
    t = 2048
    many_blocks(monkeypatch, (1, t), 24)
    keys = KeyRange(array(np.zeros((1, t)), "int32"), array(np.full((1, t), 2), "int32"))
    q = array(np.ones((1, t, 1, 8)), "bfloat16")
    if form == "latent":
        kv = normal(1, 1, 2, 8, dtype="bfloat16")
        attend = functools.partial(latent_attention, keys=keys, value_dim=8, scale=SCALE)
        (out, lse), gradients = as_numpy(pulled(attend, q, kv, cotangent=ones))
        k = v = np.asarray(kv)[:, :, None]
    else:
        k, v = normal(1, 1, 2, 1, 8, dtype="bfloat16"), normal(2, 1, 2, 1, 8, dtype="bfloat16")
        attend = functools.partial(multihead_attention, keys=keys, scale=SCALE)
        (out, lse), gradients = as_numpy(pulled(attend, q, k, v, cotangent=ones))
    rows = reference.reachable(keys.start, keys.stop, 2)
    assert out.dtype == jnp.bfloat16
    close(lse, reference.attention(q, k, v, rows, SCALE)[1], 2e-5)
    _, dk, dv = reference.attention_vjp(q, k, v, rows, SCALE, *ones((out, lse)))
    assert all(x.dtype == jnp.bfloat16 for x in gradients)
    for actual, want in zip(gradients[1:], [dk[:, :, 0] + dv[:, :, 0]] if form == "latent" else [dk, dv], strict=True):
        np.testing.assert_allclose(reference.f64(actual), want, rtol=1e-2, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("form", ["latent", "multihead", "selected"])
def test_nan_in_unreached_keys_changes_nothing(form):
    keys = KeyRange(jnp.array([[3, 5, 0, 7], [20] * 4]), jnp.array([[6, 9, 0, 30], [22, 20, 21, 22]]))
    absent = ~np.asarray(jax.jit(keys.mask, static_argnums=0)(40)).any(1)
    q, k, v = heads_inputs(2, 4, 40, 3, 8, 4, 6)
    indices = topk_of(normal(3, 2, 4, 40), 9, keys) if form == "selected" else None

    @jax.jit
    def attend(k, v):
        if form == "latent":
            call = functools.partial(latent_attention, keys=keys, value_dim=6, scale=SCALE)
            return pulled(call, q, k[:, :, 0], cotangent=cotangents)
        call = functools.partial(multihead_attention, keys=keys, scale=SCALE, indices=indices)
        return pulled(call, q, k, v, cotangent=cotangents)

    results = [as_numpy(attend(*(poison(x, absent, fill) for x in (k, v)))) for fill in (0.0, np.nan)]
    jax.tree.map(same_bits, *results)
    out, lse = results[1][0]
    assert not np.any(out[0, 2]) and np.all(lse[0, 2] == -np.inf) and not np.any(results[1][1][0][0, 2])


def test_all_ranges_empty():
    keys = KeyRange(array(np.zeros((1, 3)), "int32"), array(np.zeros((1, 3)), "int32"))
    q, k, v = heads_inputs(1, 3, 5, 2, 4, 2, 4)
    attend = functools.partial(multihead_attention, keys=keys, scale=SCALE)
    (out, lse), gradients = as_numpy(pulled(attend, q, k, v, cotangent=ones))
    assert not np.any(out) and np.all(lse == -np.inf) and not any(np.any(x) for x in gradients)


# Identities


def test_a_selection_of_everything_is_dense_attention():
    """K ≥ S: canonical selections of all reachable keys, values and gradients."""
    b, t, s, n, c, r, k = 2, 21, 50, 3, 8, 4, 64
    q, kv, _ = inputs((b, t, s, n, c, r, k))
    keys = causal_range(b, t, s - t)
    indices = topk_of(normal(4, b, t, s), k, keys)
    assert np.array_equal(indices, causal_indices(b, t, s, k))
    dense = functools.partial(latent_attention, keys=keys, value_dim=c, scale=SCALE)
    both = [pulled(attend, q, kv, cotangent=cotangents) for attend in (sparse(c, indices), dense)]
    jax.tree.map(lambda a, b: close(a, b, 3e-5), *both)


@pytest.mark.parametrize("selected", [False, True])
def test_multihead_and_multiquery_forms_agree(selected):
    """Keys c·W_uk and values c·W_uv expanded, against queries q·W_uk over the latent and outputs times W_uv."""
    b, t, s, n, c, p, r, v = 2, 11, 33, 3, 8, 6, 4, 5
    q, kv, w_uk, w_uv = (
        normal(0, b, t, n, p + r),
        normal(1, b, s, c + r),
        noise(2, c, n, p) / 3,
        noise(3, c, n, v) / 3,
    )
    keys = causal_range(b, t, s - t)
    indices = topk_of(normal(4, b, t, s), 7, keys) if selected else None

    def multihead(q, kv, w_uk, w_uv):
        k_rope = jnp.broadcast_to(kv[:, :, None, c:], (b, s, n, r))
        k = jnp.concatenate([jnp.einsum("bsc,cnp->bsnp", kv[..., :c], w_uk), k_rope], -1)
        return multihead_attention(
            q, k, jnp.einsum("bsc,cnv->bsnv", kv[..., :c], w_uv), keys, scale=SCALE, indices=indices
        )

    def multiquery(q, kv, w_uk, w_uv):
        q = jnp.concatenate([jnp.einsum("btnp,cnp->btnc", q[..., :p], w_uk), q[..., p:]], -1)
        if indices is not None:
            out, lse = sparse_attention(q, kv, indices, value_dim=c, scale=SCALE)
        else:
            out, lse = latent_attention(q, kv, keys, value_dim=c, scale=SCALE)
        return jnp.einsum("btnc,cnv->btnv", out, w_uv), lse

    both = [pulled(form, q, kv, w_uk, w_uv, cotangent=cotangents) for form in (multihead, multiquery)]
    jax.tree.map(lambda a, b: close(a, b, 5e-5), *both)


@pytest.mark.parametrize("form", ["latent", "multihead"])
def test_packed_sequences_do_not_leak(form):
    q, k, v = heads_inputs(1, 20, 20, 2, 4, 2, 3)
    packed = KeyRange.packed(jnp.array([[0] * 8 + [1] * 12]))

    def attend(q, k, v, keys):
        if form == "latent":
            return latent_attention(q, k[:, :, 0], keys, value_dim=3, scale=SCALE)
        return multihead_attention(q, k, v, keys, scale=SCALE)

    attend = jax.jit(attend)
    q, k, v = as_numpy((q, k, v))
    whole = as_numpy(attend(q, k, v, packed))
    for part in (slice(0, 8), slice(8, 20)):
        apart = attend(q[:, part], k[:, part], v[:, part], causal_range(1, part.stop - part.start))
        jax.tree.map(lambda a, b, part=part: close(a[:, part], b, 2e-6), whole, apart)


# Boundaries


def eager_inputs():
    """q, k, v, kv, indices and keys, of one shape for all tests that run an operation outside of a program."""
    q, k, v = heads_inputs(1, 5, 9, 2, 4, 2, 3)
    return q, k, v, array(np.asarray(k)[:, :, 0]), hostile_indices(2, 1, 5, 3, 9), causal_range(1, 5, 4)


def test_jit_gives_the_same():
    q, _, _, kv, indices, _ = eager_inputs()
    eager, jitted = sparse(4, indices)(q, kv), jax.jit(lambda q, kv, i: sparse(4, i)(q, kv))(q, kv, indices)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), eager, jitted)


def test_numpy_arrays_are_accepted():
    q, k, v, kv, indices, keys = eager_inputs()
    lse = sparse(4, indices)(q, kv)[1]

    def everything(q, k, v, kv, lse, indices, keys):
        return (
            sparse_attention(q, kv, indices, value_dim=4, scale=SCALE),
            latent_attention(q, kv, keys, value_dim=4, scale=SCALE),
            multihead_attention(q, k, v, keys, scale=SCALE, indices=indices),
            attention_target(q, kv, lse, indices, scale=SCALE),
        )

    arrays = (q, k, v, kv, lse, indices, keys)
    with unchecked():
        jax.tree.map(same_bits, everything(*as_numpy(arrays)), everything(*arrays))


def refused(call, *words):
    with unchecked(), pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


def test_mismatched_shapes_and_dtypes_are_named():
    q, kv, indices, keys = (
        np.ones((2, 5, 3, 12), np.float32),
        np.ones((2, 9, 12), np.float32),
        np.zeros((2, 5, 4), np.int32),
        causal_range(2, 5),
    )
    attend = functools.partial(sparse_attention, value_dim=8, scale=1.0)
    refused(lambda: attend(q, kv[..., :11], indices), "kv", "11", "12")
    refused(lambda: attend(q, kv[:1], indices), "kv", "1", "2")
    refused(lambda: attend(q[0], kv, indices), "q")
    refused(lambda: attend(q, kv, indices[:, :4]), "indices", "4", "5")
    refused(lambda: attend(q, kv, indices.astype(np.float32)), "indices", "float32")
    refused(lambda: attend(q, kv.astype(jnp.bfloat16), indices), "float32", "bfloat16")
    refused(lambda: sparse_attention(q, kv, indices, value_dim=13, scale=1.0), "value_dim", "13")
    refused(lambda: sparse_attention(q, kv, indices, value_dim=0, scale=1.0), "value_dim", "0")
    refused(lambda: latent_attention(q, kv, causal_range(2, 6), value_dim=8, scale=1.0), "keys", "6")
    refused(lambda: latent_attention(q, kv[..., :11], keys, value_dim=8, scale=1.0), "kv", "11", "12")
    k, v = np.ones((2, 9, 3, 12), np.float32), np.ones((2, 9, 3, 7), np.float32)
    multihead = functools.partial(multihead_attention, scale=1.0)
    refused(lambda: multihead(q, k[:, :, :2], v, keys), "k", "2", "3")
    refused(lambda: multihead(q, k, v[:, :8], keys), "v", "8", "9")
    refused(lambda: multihead(q, k, v, causal_range(1, 5)), "keys")
    refused(lambda: multihead(q, k, v, keys, indices=indices[:1]), "indices")
    refused(lambda: multihead(q, k, v.astype(jnp.bfloat16), keys), "float32", "bfloat16")
    lse = np.zeros((2, 5, 3), np.float32)
    refused(lambda: attention_target(q, kv, lse[..., :2], indices, scale=1.0), "lse", "2", "3")
    refused(lambda: attention_target(q, kv, lse, indices[:, :2], scale=1.0), "indices", "2", "5")


@pytest.mark.parametrize("op", ["sparse", "latent", "multihead", "target"])
def test_implementation_insists_or_says_why_it_cannot(op):
    q, k, v, kv, indices, keys = eager_inputs()
    lse = array(np.zeros((1, 5, 2)))
    call = dict(
        sparse=functools.partial(sparse_attention, q, kv, indices, value_dim=4, scale=1.0),
        latent=functools.partial(latent_attention, q, kv, keys, value_dim=4, scale=1.0),
        multihead=functools.partial(multihead_attention, q, k, v, keys, scale=1.0),
        target=functools.partial(attention_target, q, kv, lse, indices, scale=1.0),
    )[op]
    jax.tree.map(same_bits, call(implementation="xla"), call())
    with pytest.raises(ValueError, match="(?i)cpu|gpu|hopper|sm_90|kernel"):
        call(implementation="pallas")
    refused(lambda: call(implementation="cuda_magic"), "cuda_magic")
