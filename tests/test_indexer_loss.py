"""The indexer's KL losses (Eqs. 3–4) against float64 NumPy: values, gradients, and what must be constant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import (
    INT_MAX,
    INT_MIN,
    array,
    as_numpy,
    causal_indices,
    causal_range,
    close,
    hostile_indices,
    index_inputs,
    many_blocks,
    normal,
    poison,
    powers,
    pulled,
    random_range,
    same_bits,
    the_first,
    unchecked,
)

from dsa_jax import (
    KeyRange,
    dense_attention_target,
    dense_indexer_kl,
    multihead_attention,
    sparse_attention,
    sparse_indexer_kl,
)

pytestmark = pytest.mark.usefixtures("in_a_hurry")

# B, T, S, N, J, K
SHAPES = [(2, 9, 17, 3, 2, 6), (2, 33, 130, 2, 16, 140), (1, 1, 1, 1, 1, 1), (1, 70, 300, 4, 4, 40)]
SCALE, E, C, R = 0.3, 8, 8, 4


@jax.jit
def lse_of_selection(q, kv, indices):
    return sparse_attention(q, kv, indices, value_dim=C, scale=SCALE)[1]


@jax.jit
def lse_of_range(q, k, keys):
    return multihead_attention(q, k, k[..., :1], keys, scale=SCALE)[1]


def sparse_inputs(shape, dtype="float32", index_dtype=None):
    """q_index, k_index, weights, q, kv, lse, indices; the indices hostile."""
    b, t, s, n, j, k = shape
    q_index, k_index, weights, _ = index_inputs(0, b, t, s, j, E, index_dtype or dtype)
    q, kv, indices = (
        normal(4, b, t, n, C + R, dtype=dtype),
        normal(5, b, s, C + R, dtype=dtype),
        hostile_indices(6, b, t, k, s),
    )
    lse = lse_of_selection(q, kv, indices)
    return q_index, k_index, array(np.asarray(weights) / 2), q, kv, lse, indices


def dense_inputs(shape, dtype="float32"):
    """q_index, k_index, weights, q, k, lse, keys; the ranges random."""
    b, t, s, n, j, _ = shape
    q_index, k_index, weights, _ = index_inputs(0, b, t, s, j, E, dtype)
    q, k, keys = (
        normal(4, b, t, n, C + R, dtype=dtype),
        normal(5, b, s, n, C + R, dtype=dtype),
        random_range(6, b, t, s),
    )
    lse = lse_of_range(q, k, keys)
    return q_index, k_index, array(np.asarray(weights) / 2), q, k, lse, keys


def definition(inputs, k_scale=None, cotangent=None):
    """The reference's KL, and its gradients where a cotangent is given, of either form's inputs."""
    *index, q, k, lse, which = inputs
    size = k.shape[1]
    rows = (
        reference.reachable(which.start, which.stop, size)
        if isinstance(which, KeyRange)
        else reference.listed(which, size)
    )
    k = k if k.ndim == 4 else np.repeat(reference.f64(k)[:, :, None], q.shape[2], 2)
    arguments = [*index, q, k, lse, rows, SCALE]
    if cotangent is None:
        return reference.indexer_kl(*arguments, k_scale=k_scale)
    return reference.indexer_kl_vjp(*arguments, cotangent=cotangent, k_scale=k_scale)


FORMS = pytest.mark.parametrize(
    ("kl", "make"),
    [
        (functools.partial(sparse_indexer_kl, scale=SCALE), sparse_inputs),
        (functools.partial(dense_indexer_kl, scale=SCALE), dense_inputs),
    ],
    ids=["sparse", "dense"],
)


def index_gradients(kl, inputs, cotangent, **options):
    """The KL and its gradients by q_index, k_index and weights."""
    rest = inputs[3:]
    return as_numpy(pulled(lambda *index: kl(*index, *rest, **options), *inputs[:3], cotangent=lambda _: cotangent))


@pytest.mark.parametrize("target", ["sum", "max"])
def test_the_target_over_all_keys_is_the_attention_of_norm_1(target):
    _, _, _, q, k, lse, keys = dense_inputs((2, 9, 33, 3, 2, 0))
    unreached = np.zeros((2, 33), bool)
    unreached[:, -1] = ~reached_last(keys, 33)
    k = poison(k, unreached)
    found = jax.jit(functools.partial(dense_attention_target, scale=SCALE, target=target))(q, k, lse, keys)
    logits = np.einsum("btnh,bsnh->btns", *(np.nan_to_num(np.asarray(x, np.float64)) for x in (q, k))) * SCALE
    mask = (np.arange(33) >= np.asarray(keys.start)[..., None]) & (np.arange(33) < np.asarray(keys.stop)[..., None])
    lse = np.where(np.isneginf(lse), 0, np.asarray(lse, np.float64))
    p = np.where(mask[:, :, None], np.exp(logits - lse[..., None]), 0)
    p = p.sum(2) if target == "sum" else p.max(2)
    norm = p.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, np.where(norm > 0, p / np.where(norm > 0, norm, 1), 0), atol=1e-6)
    assert found.dtype == jnp.float32 and (norm == 0).any() and (norm > 0).any()
    with pytest.raises(ValueError, match="target must be 'sum' or 'max', got 'mean'"):
        dense_attention_target(q, k, lse, keys, scale=SCALE, target="mean")


def reached_last(keys, size):
    """Whether any query of each row reaches the last key."""
    start, stop = np.asarray(keys.start), np.asarray(keys.stop)
    return ((start < stop) & (start < size) & (stop >= size)).any(1)


def test_gradients_of_the_reference_are_central_differences():
    inputs = sparse_inputs((1, 3, 5, 2, 2, 4))
    index, rest = [reference.f64(x) for x in inputs[:3]], inputs[3:]
    scale, cotangent = np.array([[1.0, 2.0, 0.5, 1.0, 4.0]]), reference.f64(normal(9, 1, 3))
    gradients = definition(inputs, scale, cotangent)
    for which in range(3):

        def total(x, which=which):
            return (cotangent * definition((*index[:which], x, *index[which + 1 :], *rest), scale)).sum()

        np.testing.assert_allclose(gradients[which], reference.central_difference(total, index[which]), atol=1e-7)


@FORMS
@pytest.mark.parametrize(("shape",), the_first(2, [(shape,) for shape in SHAPES]))
def test_values_and_gradients(kl, make, shape, monkeypatch):
    many_blocks(monkeypatch, shape)
    inputs = make(shape)
    cotangent = normal(9, *shape[:2])
    value, gradients = index_gradients(kl, inputs, cotangent)
    assert value.shape == shape[:2] and value.dtype == jnp.float32
    np.testing.assert_allclose(value, definition(inputs), rtol=2e-5, atol=5e-6)
    for actual, want in zip(gradients, definition(inputs, cotangent=cotangent), strict=True):
        close(actual, want, 3e-5)


@FORMS
def test_bfloat16_inputs_are_summed_in_float32(kl, make):
    inputs, cotangent = make((1, 70, 300, 4, 4, 40), "bfloat16"), normal(9, 1, 70)
    value, gradients = index_gradients(kl, inputs, cotangent)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, definition(inputs), rtol=1e-4, atol=2e-5)
    assert [x.dtype for x in gradients] == [x.dtype for x in inputs[:3]]
    for actual, want in zip(gradients, definition(inputs, cotangent=cotangent), strict=True):
        error = np.linalg.norm(reference.f64(actual) - want) / np.linalg.norm(want)
        assert error < 6e-3, error


def test_gradient_by_shared_keys_accumulates_in_float32(monkeypatch):
    """2000 queries, in many blocks, push one key the same way; a bfloat16 sum stalls at 256 of them."""
    t = 2000
    many_blocks(monkeypatch, (1, t), 2000)
    q_index, weights = array(np.ones((1, t, 1, 4)), "bfloat16"), array(np.ones((1, t, 1)))
    k_index = array([[[1.0] * 4, [0.5] * 4]], "bfloat16")
    q, kv, indices = (
        array(np.zeros((1, t, 1, 4)), "bfloat16"),
        array(np.zeros((1, 2, 4)), "bfloat16"),
        array(np.tile([0, 1], (1, t, 1)), "int32"),
    )
    lse = array(np.full((1, t, 1), np.log(2.0)))
    sparse = functools.partial(sparse_indexer_kl, kv=kv, indices=indices)
    keys = KeyRange(array(np.zeros((1, t)), "int32"), array(np.full((1, t), 2), "int32"))
    dense = functools.partial(dense_indexer_kl, k=array(np.asarray(kv)[:, :, None], "bfloat16"), keys=keys)
    expected = t * (1 / (1 + np.exp(-2.0)) - 0.5)
    for kl in (sparse, dense):
        _, (gradient,) = pulled(lambda k, kl=kl: kl(q_index, k, weights, q=q, lse=lse, scale=1.0), k_index)
        np.testing.assert_allclose(reference.f64(gradient)[0], [[expected] * 4, [-expected] * 4], rtol=5e-3)


@FORMS
def test_key_scale_enters_values_and_gradients(kl, make):
    shape = (2, 9, 17, 3, 2, 6)
    inputs = make(shape)
    k_scale = powers(8, 2, 17)
    cotangent = normal(9, 2, 9)
    value, gradients = index_gradients(kl, inputs, cotangent, k_scale=k_scale)
    np.testing.assert_allclose(value, definition(inputs, k_scale), rtol=2e-5, atol=5e-6)
    for actual, want in zip(gradients, definition(inputs, k_scale, cotangent), strict=True):
        close(actual, want, 3e-5)


@FORMS
def test_quantised_index_inputs(kl, make):
    """e4m3 queries and keys with their scales give the KL of what they stand for."""
    inputs = make((2, 9, 17, 3, 4, 6))
    q_index, k_index, weights, k_scale = index_inputs(0, 2, 9, 17, 4, E, "float8_e4m3fn")
    inputs = (q_index, k_index, array(np.asarray(weights) / 20), *inputs[3:])
    value = jax.jit(kl)(*inputs, k_scale=k_scale)
    np.testing.assert_allclose(value, definition(inputs, k_scale), rtol=2e-5, atol=5e-6)
    wide_k = np.asarray(k_index, np.float32) * np.asarray(k_scale)[..., None]
    wide = (array(q_index, "float32"), array(wide_k), *inputs[2:])
    np.testing.assert_allclose(value, jax.jit(kl)(*wide), rtol=1e-6, atol=1e-6)
    _, (by_weights,) = pulled(lambda w: kl(*inputs[:2], w, *inputs[3:], k_scale=k_scale), inputs[2])
    want = definition(inputs, k_scale, np.ones((2, 9)))[2]
    np.testing.assert_allclose(by_weights, want, atol=3e-6 * np.abs(want).max())


@FORMS
def test_gradient_by_the_scores_is_softmax_minus_target(kl, make):
    """With one head, unit query and non-negative keys, the weight's gradient is Σ_s (softmax(I) − p)·k."""
    inputs = list(make((1, 6, 9, 2, 1, 5)))
    inputs[0], inputs[1] = array(np.ones(inputs[0].shape)), array(np.abs(np.asarray(inputs[1])))
    _, (gradient,) = pulled(lambda w: kl(*inputs[:2], w, *inputs[3:]), inputs[2])
    gradient = np.asarray(gradient)[0, :, 0]
    k = reference.f64(inputs[1])[0].sum(-1)
    *_, q, keys, lse, which = inputs
    rows = (
        reference.reachable(which.start, which.stop, 9) if isinstance(which, KeyRange) else reference.listed(which, 9)
    )
    keys = reference.f64(keys) if keys.ndim == 4 else np.repeat(reference.f64(keys)[:, :, None], 2, 2)
    for t, row in enumerate(rows[0]):
        expected = 0.0
        if len(row):
            scores = reference.f64(inputs[2])[0, t, 0] * k[row]
            softmax = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            expected = (softmax - reference.row_target(q, keys, lse, 0, t, row, SCALE)) @ k[row]
        np.testing.assert_allclose(gradient[t], expected, atol=2e-5)


@FORMS
def test_kl_is_never_negative_and_zero_when_the_indexer_matches(kl, make):
    inputs = make((2, 33, 130, 2, 16, 140))
    assert np.min(np.asarray(jax.jit(kl)(*inputs))) >= -1e-6
    uniform = list(inputs)
    for at in (2, 3, 5):  # both sides uniform
        uniform[at] = array(np.zeros(inputs[at].shape))
    value, gradients = index_gradients(kl, uniform, np.ones((2, 33), np.float32))
    np.testing.assert_allclose(value, 0.0, atol=2e-6)
    assert all(np.abs(reference.f64(x)).max() < 1e-4 for x in gradients)


@FORMS
def test_everything_but_the_indexer_is_constant(kl, make):
    """Zero gradients, not NaN, by q, keys and lse, though rows are empty and their lse is −inf."""
    inputs = make((2, 9, 17, 3, 2, 6))
    assert np.any(np.isneginf(np.asarray(inputs[5])))
    for gradient in as_numpy(pulled(lambda *x: kl(*inputs[:3], *x, inputs[6]), *inputs[3:6])[1]):
        assert gradient.dtype == jnp.float32 and not np.any(gradient)


@FORMS
def test_gradients_are_not_lost(kl, make):
    inputs = make((2, 9, 17, 3, 2, 6))
    for gradient in index_gradients(kl, inputs, np.ones((2, 9), np.float32))[1]:
        assert np.abs(gradient).max() > 1e-3


@FORMS
def test_empty_rows_give_zero_and_zero_gradients(kl, make):
    *inputs, which = make((1, 3, 5, 2, 2, 2))
    if isinstance(which, KeyRange):
        which = KeyRange(jnp.array([[0, 4, 1]]), jnp.array([[0, 2, 4]]))
        inputs[5] = lse_of_range(inputs[3], inputs[4], which)
    else:
        which = jnp.array([[[-1, 5], [INT_MIN, INT_MAX], [3, 2]]])
        inputs[5] = lse_of_selection(inputs[3], inputs[4], which)
    value, (dq, dk, dw) = index_gradients(kl, (*inputs, which), np.ones((1, 3), np.float32))
    assert value[0, :2].tolist() == [0.0, 0.0] and value[0, 2] > 0
    assert not np.any(dq[0, :2]) and not np.any(dw[0, :2]) and np.any(dw[0, 2])
    assert all(np.all(np.isfinite(x)) for x in (dq, dk, dw))


@FORMS
def test_nan_in_keys_nobody_uses_changes_nothing(kl, make):
    q_index, k_index, weights, q, k, lse, which = make((1, 9, 60, 3, 2, 6))
    if isinstance(which, KeyRange):
        which = jax.tree.map(lambda edge: array(np.clip(edge, 5, 50), "int32"), which)
        mask = jax.jit(which.mask, static_argnums=0)(60)
        absent, lse = ~np.asarray(mask).any(1), lse_of_range(q, k, which)
    else:
        which = array(np.where(np.isin(which, [0, 59]), -1, which), "int32")
        absent, lse = ~np.isin(np.arange(60), np.asarray(which))[None], lse_of_selection(q, k, which)
    assert absent[0, 0] and absent[0, -1]

    @jax.jit
    def run(k_index, k):
        of_index = lambda *index: kl(*index, q, k, lse, which)
        return pulled(of_index, q_index, k_index, weights)

    jax.tree.map(same_bits, run(poison(k_index, absent), poison(k, absent)), run(k_index, k))


def test_sparse_kl_over_every_key_is_the_dense_kl():
    """K ≥ S, with multi-head keys that are one latent repeated: values and gradients."""
    b, t, s, n, k = 2, 21, 50, 3, 64
    q_index, k_index, weights, q, kv, _, _ = sparse_inputs((b, t, s, n, 4, k))
    keys = causal_range(b, t, s - t)
    wide = array(np.repeat(np.asarray(kv)[:, :, None], n, 2))
    lse = lse_of_range(q, wide, keys)
    cotangent = normal(9, b, t)
    results = []
    for call in (
        functools.partial(sparse_indexer_kl, q=q, kv=kv, lse=lse, indices=causal_indices(b, t, s, k), scale=SCALE),
        functools.partial(dense_indexer_kl, q=q, k=wide, lse=lse, keys=keys, scale=SCALE),
    ):
        results.append(pulled(call, q_index, k_index, weights, cotangent=lambda _: cotangent))
    jax.tree.map(lambda a, b: close(a, b, 3e-5), *results)


def test_absent_slots_change_nothing_and_duplicates_count_twice():
    *inputs, _ = sparse_inputs((1, 2, 17, 3, 2, 3))
    present = jnp.array([[[2, 5, 11], [4, 4, 9]]])
    hostile = jnp.array([[[INT_MAX, 2, 5, -1, 11, 17], [-17, 4, 4, INT_MIN, 9, -1]]])
    lse = lse_of_selection(inputs[3], inputs[4], present)
    kl = jax.jit(functools.partial(sparse_indexer_kl, scale=SCALE))
    short, long = (kl(*inputs[:5], lse, indices) for indices in (present, hostile))
    close(long, short, 1e-5)
    close(short, definition((*inputs[:5], lse, present)), 2e-5)


@FORMS
def test_padding_queries_and_keys_changes_nothing(kl, make):
    """Loss scale: each row's KL and gradient are the row's own, however long the batch."""
    inputs = make((2, 9, 17, 3, 2, 6))
    pad = lambda x, before, after, value=0: array(
        np.pad(x, ((0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)), constant_values=value), x.dtype
    )
    pad_t, pad_s = functools.partial(pad, before=4, after=60), functools.partial(pad, before=0, after=200)
    q_index, k_index, weights, q, k, lse, which = inputs
    if isinstance(which, KeyRange):
        padded_which = jax.tree.map(pad_t, which)
    else:
        absent = (np.asarray(which) < 0) | (np.asarray(which) >= 17)
        padded_which = pad_t(np.where(absent, np.int32(-1), which), value=-1)
    lse = pad_t(lse, value=-np.inf)
    padded = (pad_t(q_index), pad_s(k_index), pad_t(weights), pad_t(q), pad_s(k), lse, padded_which)
    value, gradients = index_gradients(kl, inputs, np.ones((2, 9), np.float32))
    padded_value, padded_gradients = index_gradients(kl, padded, np.ones((2, 73), np.float32))
    close(padded_value[:, 4:13], value, 1e-5)
    assert not np.any(padded_value[:, :4]) and not np.any(padded_value[:, 13:])
    dq, dk, dw = padded_gradients
    for a, b in zip((dq[:, 4:13], dk[:, :17], dw[:, 4:13]), gradients, strict=True):
        close(a, b, 1e-5)


@pytest.mark.slow
@FORMS
def test_jit_and_numpy_give_the_same(kl, make):
    inputs = make((2, 9, 17, 3, 2, 6))
    value = kl(*inputs)
    close(jax.jit(kl)(*inputs), value, 1e-6)
    with unchecked():
        same_bits(kl(*jax.tree.map(np.asarray, inputs)), value)


@FORMS
def test_mismatched_shapes_are_named(kl, make):
    inputs = make((2, 9, 17, 3, 2, 6))
    names = "q_index k_index weights q k lse".split()
    for at, name in enumerate(names):
        for cut in ((slice(0, 1),), (Ellipsis, slice(0, 1)), (0,)):
            wrong = [*inputs]
            wrong[at] = np.asarray(wrong[at])[cut]
            with unchecked(), pytest.raises(ValueError) as error:
                kl(*wrong)
            assert any(other in str(error.value) for other in (name, *names)), error.value
    with unchecked(), pytest.raises(ValueError, match="k_scale"):
        kl(*inputs, k_scale=np.ones((2, 16), np.float32))


@FORMS
def test_implementation_insists_or_says_why_it_cannot(kl, make):
    inputs = make((1, 2, 3, 1, 1, 1))
    same_bits(kl(*inputs, implementation="xla"), kl(*inputs))
    with pytest.raises(ValueError, match="(?i)cpu|gpu|hopper|sm_90|kernel"):
        kl(*inputs, implementation="pallas")
    with unchecked(), pytest.raises(ValueError, match="cuda_magic"):
        kl(*inputs, implementation="cuda_magic")
