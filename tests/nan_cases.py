"""Inputs with one NaN or infinite number among them, and what may come of it: for any platform, and for the card."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import array, close, hostile_indices, normal, poison, poison_unselected, pulled

PLACES = ("nan key", "inf key", "nan query", "inf query")
SCALE = 0.3


def aligned(x):
    """Makes the last column positive, so that where one is infinite every logit is +inf."""
    x = np.array(x)
    x[..., -1] = np.abs(x[..., -1]) + x.dtype.type(0.5)
    return array(x, x.dtype)


def selected(indices, size):
    """Tells which keys [B, T, S] each query has selected."""
    indices = np.asarray(indices)
    return (indices[..., None] == np.arange(size)).any(2)


def spoil(place, q, keys, reached):
    """Puts NaN or inf into one reached key or one query, in the last column, which is no value.

    Returns:
      q and keys, spoilt; which queries [B, T] meet it.
    """
    value, q, keys = float(place.split()[0]), np.array(q), np.array(keys)
    t = int(np.argmax(reached[0].sum(-1)))  # a query with many keys
    bad = np.zeros(q.shape[:2], bool)
    if place.endswith("query"):
        q[0, t, ..., -1] = value
        bad[0, t] = True
    else:
        s = int(np.argmax(reached[0, t] & (reached[0].sum(0) < reached[0].any(-1).sum())))  # which others have not
        keys[0, s, ..., -1] = value
        bad[0] = reached[0, :, s]
    assert bad.any() and not bad.all()
    return array(q, q.dtype), array(keys, keys.dtype), bad


def sparse_inputs(seed, b, t, s, n, c, r, k, dtype):
    """Makes q, kv, hostile indices; returns besides which query [B, T] has no key."""
    q, kv = (
        aligned(normal(seed + i, *shape, dtype=dtype)) for i, shape in enumerate([(b, t, n, c + r), (b, s, c + r)])
    )
    indices = hostile_indices(seed + 2, b, t, k, s)
    empty = ~selected(indices, s).any(-1)
    assert empty.any()
    return q, kv, indices, empty


def sparse_results(call, place, inputs, size):
    """Runs `call(q, kv, indices)` on clean and on spoilt inputs; the spoilt have NaN too where nobody looks.

    Returns:
      both results, the queries [B, T] that meet the spoilt number, those without keys, and the keys [B, S] of the bad.
    """
    q, kv, indices, empty = inputs
    reached = selected(indices, size)
    spoilt_q, spoilt_kv, bad = spoil(place, q, kv, reached)
    spoilt_q = poison(spoilt_q, empty)  # asks for nothing
    spoilt_kv = poison_unselected(spoilt_kv, indices)
    clean, spoilt = call(q, kv, indices), call(spoilt_q, spoilt_kv, indices)
    return clean, spoilt, bad, empty, (reached & bad[..., None]).any(1)


def is_nan_alone_at(spoilt, clean, bad, name, every=True, repeats=True):
    """Asserts NaN in the rows that are bad, everywhere in them or anywhere, and the same bits in all others.

    Sums that do not repeat, as XLA's over keys on a GPU, which adds in any order, are close in all others.
    """
    spoilt, clean = np.asarray(spoilt), np.asarray(clean)
    nan = np.isnan(spoilt.astype(np.float32)).reshape(*bad.shape, -1)
    assert not np.isnan(clean.astype(np.float32)).any(), name
    assert (nan.all(-1) if every else nan.any(-1))[bad].all(), name
    if repeats:
        assert spoilt[~bad].tobytes() == clean[~bad].tobytes(), f"{name}: others have changed"
    else:
        close(spoilt[~bad].astype(np.float32), clean[~bad].astype(np.float32), 2**-6)


def check_attention(clean, spoilt, bad, empty, keys, repeats=True):
    """Holds (out, lse, d_q, d_kv) against the contract; `repeats`: whether sums over keys have the same bits again."""
    for (name, where), x, y in zip(
        (("out", bad), ("lse", bad), ("d_q", bad), ("d_kv", keys)), spoilt, clean, strict=False
    ):
        is_nan_alone_at(x, y, where, name, repeats=repeats or name != "d_kv")
    out, lse, *gradients = spoilt
    np.testing.assert_array_equal(np.asarray(out, np.float32)[empty], 0.0)
    np.testing.assert_array_equal(np.asarray(lse)[empty], -np.inf)
    for d_q in gradients[:1]:
        np.testing.assert_array_equal(np.asarray(d_q, np.float32)[empty], 0.0)


def cotangents(value):
    """Makes cotangents of out and lse."""
    out, lse = value
    return normal(7, *out.shape, dtype=out.dtype), normal(8, *lse.shape)


def with_gradients(attend, count):
    """Makes a function that returns out, lse and the gradients by the first `count` arrays."""

    def call(*arrays):
        value, gradients = pulled(lambda *first: attend(*first, *arrays[count:]), *arrays[:count], cotangent=cotangents)
        return *value, *gradients

    return jax.jit(call)


def kl_with_gradients(loss):
    """Makes a function of index arrays (q_index, k_index, weights), and others, that returns KL and gradients."""

    def call(index, *others):
        value, gradients = pulled(lambda *index: loss(*index, *others), *index, cotangent=jnp.ones_like)
        return value, *gradients

    return call


def spoil_index(what, index, reached):
    """Spoils one of (q_index, k_index, weights), NaN or, of the weights, +inf; returns the queries that meet it."""
    q_index, k_index, weights = (np.array(x) for x in index)
    t = int(np.argmax(reached[0].sum(-1)))
    bad = np.zeros(weights.shape[:2], bool)
    if what == "k_index":
        s = int(np.argmax(reached[0, t] & (reached[0].sum(0) < reached[0].any(-1).sum())))
        k_index[0, s] = np.nan
        bad[0] = reached[0, :, s]
    else:
        bad[0, t] = True
    if what == "q_index":
        q_index[0, t] = np.nan
    if what == "weights":
        weights[0, t, 0] = np.inf
    assert bad.any() and not bad.all()
    return tuple(array(x, x.dtype) for x in (q_index, k_index, weights)), bad


def check_kl(clean, spoilt, bad, keys, *, alone=True, repeats=True):
    """Holds (KL, d_q_index, d_k_index, d_weights) against the contract; `alone`: whether keys show it there alone."""
    is_nan_alone_at(spoilt[0], clean[0], bad, "KL")
    is_nan_alone_at(spoilt[1], clean[1], bad, "d_q_index", every=False)
    is_nan_alone_at(spoilt[3], clean[3], bad, "d_weights", every=False)
    d_k = np.asarray(spoilt[2], np.float32)
    assert np.isnan(d_k).any(-1)[keys].all()
    if alone:
        is_nan_alone_at(spoilt[2], clean[2], keys, "d_k_index", every=False, repeats=repeats)
