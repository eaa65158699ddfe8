"""Tests the kernels of training joined as the operations use them: gradients of attention, the losses, dense attention.

Chunks, padding and sums over keys run on a CPU with the kernels interpreted; the public functions run on the card and
are held against float64 and, where that is out of reach, against the definition's own gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import close, error, hostile_indices, index_inputs, normal, random_range, same_bits
from sparse_kernel_cases import inputs

from dsa_jax import (
    KeyRange,
    attention_target,
    dense_indexer_kl,
    multihead_attention,
    sparse_attention,
    sparse_indexer_kl,
)
from dsa_jax.pallas_kernels import CAPABILITY, assume_gpu
from dsa_jax.pallas_kernels import indexer_loss as kl_kernels
from dsa_jax.pallas_kernels.sparse_attention import backward as backward_kernels

pytestmark = pytest.mark.usefixtures("in_a_hurry")

SCALE = 0.1
BOUND = 5e-3  # relative error norm of results in bfloat16


def backward_inputs(seed, b, t, s, n, c, r, k):
    """Makes q, kv, indices, out, lse, d_out, d_lse; kv is NaN where nobody looks, and one query has no key."""
    q, kv, indices = inputs(seed, b, t, s, n, c, r, k)
    out, lse = jax.jit(functools.partial(sparse_attention, value_dim=c, scale=SCALE, implementation="xla"))(
        q, kv, indices
    )
    return q, kv, indices, out, lse, normal(seed + 3, *out.shape, dtype="bfloat16"), normal(seed + 4, *lse.shape)


def float64_backward(q, kv, indices, out, lse, d_out, d_lse):
    rows, kv = reference.listed(indices, kv.shape[1]), np.nan_to_num(reference.f64(kv))
    return reference.latent_attention_vjp(q, kv, rows, out.shape[3], SCALE, d_out, d_lse)


@pytest.mark.slow
def test_backward_in_chunks(monkeypatch):
    """Heads and keys filled up, a last chunk that reaches back, two batch rows."""
    arrays = backward_inputs(0, 2, 5, 40, 16, 64, 0, 70)
    monkeypatch.setattr(backward_kernels, "queries_in_chunk", lambda *_: 3)
    got = backward_kernels.sparse_attention_backward(*arrays, value_dim=64, scale=SCALE, interpret=True)
    for actual, want in zip(got, float64_backward(*arrays), strict=True):
        assert actual.dtype == jnp.bfloat16 and error(actual, want) < BOUND


@pytest.mark.parametrize(("length", "heads"), [(1, 128), (4096, 128), (4097, 16), (131072, 128), (131072, 64)])
def test_chunks_cover_all_queries_within_the_bound(length, heads):
    chunk = backward_kernels.queries_in_chunk(length, heads, 576, 2048)
    assert 1 <= chunk <= length
    each = 2 * 2 * max(64, heads) * 2048 + 2 * 2048 * 576  # P, dS and what is added to keys, in bfloat16
    assert chunk * each < 2**31 - 4 * 131072 * 576
    assert length <= 256 or chunk > 256  # no smaller than it must be


def test_backward_says_why_not():
    q, kv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 4, 192, 576), (1, 9, 576)))
    indices = jax.ShapeDtypeStruct((1, 4, 64), jnp.int32)
    assert "192" in (backward_kernels.why_not(q, kv, indices, 512) or "")
    assert "float32" in (backward_kernels.why_not(q.update(dtype=jnp.float32), kv, indices, 512) or "")
    assert backward_kernels.why_not(q.update(shape=(1, 4, 128, 576)), kv, indices, 512) is None


def loss_inputs(seed, b, t, s, n, k, j=64, dim=128):
    """Makes index inputs in bfloat16, then q, kv, lse, indices of an attention over hostile selections."""
    q_index, k_index, weights, k_scale = index_inputs(seed, b, t, s, j, dim, "bfloat16")
    q, kv, indices = (
        normal(seed + 4, b, t, n, 128, dtype="bfloat16"),
        normal(seed + 5, b, s, 128, dtype="bfloat16"),
        hostile_indices(seed + 6, b, t, k, s),
    )
    attend = functools.partial(sparse_attention, value_dim=64, scale=SCALE, implementation="xla")
    _, lse = jax.jit(attend)(q, kv, indices)
    return (q_index, k_index, weights * 0.1), (q, kv, lse, indices), jnp.exp2(jnp.round(normal(seed + 7, b, s)))


@pytest.mark.slow
def test_loss_of_the_kernels_joined():
    """Too few heads filled up, K filled up, two batch rows in one sum over keys."""
    index, (q, kv, lse, indices), k_scale = loss_inputs(0, 2, 3, 40, 16, 70, j=16, dim=64)
    sums = kl_kernels.head_sums(q, kv, lse, indices, scale=SCALE, interpret=True)
    d_kl, total = normal(9, 2, 3), normal(10, 2, 40, 64)
    arrays = sums, *index[:2], index[2], indices, k_scale
    kl, d_q, d_weights, d_k = kl_kernels.indexer_gradients(*arrays, d_kl, total, interpret=True)
    rows = reference.listed(indices, 40)
    wide = np.repeat(reference.f64(kv)[:, :, None], 16, 2)
    arguments = [*index, q, wide, lse, rows, SCALE]
    np.testing.assert_allclose(kl, reference.indexer_kl(*arguments, k_scale=k_scale), rtol=1e-4, atol=1e-5)
    want = reference.indexer_kl_vjp(*arguments, cotangent=d_kl, k_scale=k_scale)
    for actual, wanted in zip((d_q, d_k - total, d_weights), want, strict=True):
        assert error(actual, wanted) < BOUND


def test_every_training_operation_lowers_to_kernels():
    """On a Hopper GPU nothing of either stage is left to plain XLA, at the published shape."""
    shape, half, keys = jax.ShapeDtypeStruct, jnp.bfloat16, KeyRange.causal(1, 512)
    index = shape((1, 512, 64, 128), half), shape((1, 512, 128), half), shape((1, 512, 64), jnp.float32)
    q, kv, lse = shape((1, 512, 128, 576), half), shape((1, 512, 576), half), shape((1, 512, 128), jnp.float32)
    indices = shape((1, 512, 2048), jnp.int32)

    def sparse(index, q, kv, lse, indices):
        loss = lambda *index: sparse_indexer_kl(*index, q, kv, lse, indices, scale=SCALE).mean()
        attend = lambda q, kv: sparse_attention(q, kv, indices, value_dim=512, scale=SCALE)[0].sum()
        return jax.grad(loss, (0, 1, 2))(*index), jax.grad(attend, (0, 1))(q, kv)

    def warmup(index, q, k, v):
        out, lse = multihead_attention(q, k, v, keys, scale=SCALE)
        loss = lambda *index: dense_indexer_kl(*index, q, k, lse, keys, scale=SCALE).mean()
        return out, jax.grad(loss, (0, 1, 2))(*index)

    heads = shape((1, 512, 128, 192), half), shape((1, 512, 128, 192), half), shape((1, 512, 128, 128), half)
    for function, arguments, kernels in (
        (sparse, (index, q, kv, lse, indices), 7),  # forward, 3 of its backward, target, loss, sums by key
        (warmup, (index, *heads), 5),  # forward, target, scores, their 2 gradients
    ):
        with assume_gpu(CAPABILITY):
            text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu") >= kernels
        assert "dot_general" not in text


# On the card


@functools.partial(jax.jit, static_argnames=("function", "count"))
def gradients_of(function, arrays, cotangents, count):
    """Computes a function and its gradients by the first `count` of its arrays; none of them is a constant."""
    value, pull = jax.vjp(lambda *first: function(*first, *arrays[count:]), *arrays[:count])
    return value, pull(cotangents)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        (1, 9, 300, 128, 512, 64, 256), (2, 12, 500, 64, 512, 64, 384), (1, 40, 90, 32, 512, 64, 100),
        (3, 3, 1000, 16, 512, 64, 1024), (1, 5, 60, 128, 128, 0, 130), (1, 9, 300, 64, 512, 0, 256),
        (2, 3, 2, 64, 64, 64, 2),
    ],
)  # fmt: skip
def test_gradients_of_sparse_attention_on_the_card(shape):
    c = shape[4]
    q, kv, indices, out, lse, d_out, d_lse = backward_inputs(1, *shape)
    attend = functools.partial(sparse_attention, value_dim=c, scale=SCALE, implementation="pallas")
    call = functools.partial(gradients_of, attend, (q, kv, indices), (d_out, d_lse), 2)
    got = call()
    for actual, want in zip(got[1], float64_backward(q, kv, indices, out, lse, d_out, d_lse), strict=True):
        assert error(actual, want) < BOUND
    for _ in range(5):
        jax.tree.map(same_bits, call(), got)


@pytest.mark.gpu
def test_gradients_do_not_depend_on_chunks(monkeypatch):
    """Sums over keys go on where the chunk before ended: the same bits, even where the last chunk reaches back."""
    arrays = backward_inputs(2, 1, 300, 700, 64, 512, 64, 256)
    call = functools.partial(backward_kernels.sparse_attention_backward, value_dim=512, scale=SCALE)
    whole = jax.jit(call)(*arrays)
    monkeypatch.setattr(backward_kernels, "queries_in_chunk", lambda *_: 128)
    jax.tree.map(same_bits, jax.jit(functools.partial(call))(*arrays), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8192, 131072])
def test_gradients_at_the_published_shape_on_the_card(size):
    """128 heads, 2048 keys of which some are absent, more queries than a chunk has; against the definition."""
    t, c = 600, 512
    parts = jax.random.split(jax.random.key(3), 4)
    q = jax.random.normal(parts[0], (1, t, 128, 576), jnp.bfloat16)
    kv = jax.random.normal(parts[1], (1, size, 576), jnp.bfloat16)
    indices = jax.random.randint(parts[2], (1, t, 2048), -size // 8, size, jnp.int32)
    scale = 576**-0.5
    d_out = jax.random.normal(parts[3], (1, t, 128, c), jnp.bfloat16)
    results = []
    for implementation in ("pallas", "xla"):
        attend = functools.partial(sparse_attention, value_dim=c, scale=scale, implementation=implementation)
        results.append(gradients_of(attend, (q, kv, indices), (d_out, jnp.ones((1, t, 128))), 2)[1])
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs) < BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 20, 300, 128, 256), (2, 33, 500, 64, 130), (1, 9, 40, 16, 2048)])
@pytest.mark.parametrize("shared", [True, False], ids=["one cotangent", "many cotangents"])
def test_sparse_loss_on_the_card(shape, shared):
    b, t, s, n, k = shape
    index, (q, kv, lse, indices), k_scale = loss_inputs(4, b, t, s, n, k)
    cotangent = jnp.full((b, t), 0.37) if shared else normal(9, b, t)
    arrays = *index, q, kv, lse, indices, k_scale
    value, gradients = gradients_of(scaled_loss, arrays, cotangent, 3)
    wide = np.repeat(reference.f64(kv)[:, :, None], n, 2)
    arguments = [*index, q, wide, lse, reference.listed(indices, s), SCALE]
    want = reference.indexer_kl(*arguments, k_scale=k_scale)
    np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    wanted = reference.indexer_kl_vjp(*arguments, cotangent=cotangent, k_scale=k_scale)
    for actual, want in zip(gradients, wanted, strict=True):
        assert error(actual, want) < BOUND
    ours, theirs = (
        jax.jit(functools.partial(attention_target, scale=SCALE, implementation=implementation))(q, kv, lse, indices)
        for implementation in ("pallas", "xla")
    )
    close(ours, theirs, 1e-4)


def scaled_loss(*arrays):
    *arrays, k_scale = arrays
    return sparse_indexer_kl(*arrays, scale=SCALE, k_scale=k_scale, implementation="pallas")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 300, 300, 4), (2, 70, 513, 5)])
@pytest.mark.parametrize("causal", [True, False])
def test_dense_stage_on_the_card(shape, causal):
    b, t, s, n = shape
    index = index_inputs(5, b, t, s, 64, 128, "bfloat16")[:3]
    index = (*index[:2], index[2] * 0.1)
    q, k, v = (normal(6, b, length, n, dim, dtype="bfloat16") for length, dim in ((t, 192), (s, 192), (s, 128)))
    keys = KeyRange.causal(b, t, offset=s - t) if causal else random_range(7, b, t, s)
    rows = reference.reachable(keys.start, keys.stop, s)
    attend = functools.partial(multihead_attention, scale=SCALE, implementation="pallas")
    out, lse = jax.jit(attend)(q, k, v, keys)
    want_out, want_lse = reference.attention(q, k, v, rows, SCALE)
    has_keys = ~np.isneginf(want_lse)
    assert error(out, want_out) < BOUND
    np.testing.assert_allclose(np.where(has_keys, lse, 0), np.where(has_keys, want_lse, 0), atol=1e-4)
    assert np.all(np.isneginf(np.asarray(lse)) == ~has_keys)
    cotangent = normal(9, b, t)
    loss = functools.partial(dense_indexer_kl, scale=SCALE, implementation="pallas")
    value, gradients = gradients_of(loss, (*index, q, k, lse, keys), cotangent, 3)
    arguments = [*index, q, k, lse, rows, SCALE]
    want = reference.indexer_kl(*arguments)
    np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    for actual, want in zip(gradients, reference.indexer_kl_vjp(*arguments, cotangent=cotangent), strict=True):
        assert error(actual, want) < BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_dense_attention_on_the_card(causal):
    """cuDNN where ranges are causal and nothing is asked of `lse`, the definition elsewhere."""
    b, t, n = 2, 150, 3
    q, k, v = (normal(seed, b, t, n, dim, dtype="bfloat16") for seed, dim in ((6, 192), (7, 192), (8, 128)))
    keys = KeyRange.causal(b, t) if causal else random_range(9, b, t, t)
    d_out = normal(10, b, t, n, 128, dtype="bfloat16")
    attend = functools.partial(multihead_attention, scale=SCALE)
    for d_lse in (jnp.zeros((b, t, n)), normal(11, b, t, n)):
        got = gradients_of(attend, (q, k, v, keys), (d_out, d_lse), 3)[1]
        rows = reference.reachable(keys.start, keys.stop, t)
        for actual, want in zip(got, reference.attention_vjp(q, k, v, rows, SCALE, d_out, d_lse), strict=True):
            assert error(actual, want) < 6e-3  # P and dS in bfloat16, by cuDNN too
