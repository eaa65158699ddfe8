"""The indexer's target as the maximum over heads against float64 NumPy: values, gradients, NaN, what has no kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import nan_cases
import numpy as np
import pytest
import reference
from cases import (
    array,
    as_numpy,
    close,
    hostile_indices,
    index_inputs,
    many_blocks,
    normal,
    pulled,
    random_range,
    same_bits,
    the_first,
    unchecked,
)
from model_cases import forward, small_config, small_model, tokens

import dsa_jax
from dsa_jax import (
    KeyRange,
    attention_target,
    dense_indexer_kl,
    multihead_attention,
    sparse_attention,
    sparse_indexer_kl,
)
from dsa_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("in_a_hurry")

SCALE, E, C, R = 0.3, 8, 8, 4
SHAPES = [(2, 9, 17, 3, 2, 6), (1, 70, 300, 4, 4, 40)]  # B, T, S, N, J, K; the second in many blocks of queries
FORMS = pytest.mark.parametrize("form", ["sparse", "dense"])
KLS = {"sparse": sparse_indexer_kl, "dense": dense_indexer_kl}


@functools.cache
def inputs_of(form, shape, dtype="float32"):
    """q_index, k_index, weights, q, keys, lse, and hostile indices or random ranges, some of them without keys."""
    b, t, s, n, j, k = shape
    q_index, k_index, weights, _ = index_inputs(0, b, t, s, j, E, dtype)
    q = normal(4, b, t, n, C + R, dtype=dtype)
    if form == "sparse":
        kv, which = normal(5, b, s, C + R, dtype=dtype), hostile_indices(6, b, t, k, s)
        lse = jax.jit(lambda q, kv: sparse_attention(q, kv, which, value_dim=C, scale=SCALE)[1])(q, kv)
    else:
        kv, which = normal(5, b, s, n, C + R, dtype=dtype), random_range(6, b, t, s)
        lse = jax.jit(lambda q, k: multihead_attention(q, k, k[..., :1], which, scale=SCALE)[1])(q, kv)
    assert np.any(np.isneginf(np.asarray(lse)))
    return q_index, k_index, array(np.asarray(weights) / 2), q, kv, lse, which


def wide(inputs):
    """The inputs of the reference: keys of each head, and the rows that queries attend to."""
    *index, q, k, lse, which = inputs
    size = k.shape[1]
    ranges = isinstance(which, KeyRange)
    rows = reference.reachable(which.start, which.stop, size) if ranges else reference.listed(which, size)
    k = k if k.ndim == 4 else np.repeat(reference.f64(k)[:, :, None], q.shape[2], 2)
    return *index, q, k, lse, rows, SCALE


def with_gradients(form, inputs, cotangent, target="max", **options):
    kl = functools.partial(KLS[form], scale=SCALE, target=target, **options)
    return as_numpy(pulled(lambda *index: kl(*index, *inputs[3:]), *inputs[:3], cotangent=lambda _: cotangent))


@FORMS
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(form, shape, monkeypatch):
    many_blocks(monkeypatch, shape)
    inputs, cotangent = inputs_of(form, shape), normal(9, *shape[:2])
    value, gradients = with_gradients(form, inputs, cotangent)
    expected = reference.indexer_kl(*wide(inputs), target="max")
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=5e-6)
    wanted = reference.indexer_kl_vjp(*wide(inputs), cotangent=cotangent, target="max")
    for actual, want in zip(gradients, wanted, strict=True):
        close(actual, want, 3e-5)
    assert np.abs(expected - reference.indexer_kl(*wide(inputs))).max() > 0.01, "sum and max are the same"


@FORMS
def test_with_one_head_it_is_the_sum(form):
    inputs = inputs_of(form, (2, 9, 17, 1, 2, 6))
    results = [with_gradients(form, inputs, np.ones((2, 9), np.float32), target) for target in ("sum", "max")]
    jax.tree.map(same_bits, *results)


@FORMS
def test_everything_but_the_indexer_is_constant(form):
    inputs = inputs_of(form, SHAPES[0])
    kl = functools.partial(KLS[form], scale=SCALE, target="max")
    for gradient in as_numpy(pulled(lambda *x: kl(*inputs[:3], *x, inputs[6]), *inputs[3:6])[1]):
        assert not np.any(gradient)  # nor NaN, though rows are empty


def test_target_values():
    b, t, s, n, _, k = SHAPES[0]
    *_, q, kv, lse, indices = inputs_of("sparse", SHAPES[0], "bfloat16")
    run = jax.jit(functools.partial(attention_target, scale=SCALE, target="max"))
    target = np.asarray(run(q, kv, lse, indices))
    assert target.shape == (b, t, k) and target.dtype == jnp.float32
    close(target, reference.attention_target(q, kv, lse, indices, SCALE, target="max"), 2e-5)
    present = (np.asarray(indices) >= 0) & (np.asarray(indices) < s)
    assert not np.any(target[~present])
    close(target.sum(-1), present.any(-1).astype(float), 1e-6)


@pytest.mark.parametrize(("form",), the_first(1, [(form,) for form in KLS]))
def test_float64(form):
    inputs = inputs_of(form, SHAPES[0])
    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda x: array(x, np.float64) if x.dtype.kind == "f" else x, inputs)
        value, gradients = with_gradients(form, inputs, np.ones((2, 9)))
    np.testing.assert_allclose(value, reference.indexer_kl(*wide(inputs), target="max"), rtol=1e-11, atol=1e-12)
    wanted = reference.indexer_kl_vjp(*wide(inputs), cotangent=np.ones((2, 9)), target="max")
    for actual, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(actual, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("place",), the_first(2, [(place,) for place in nan_cases.PLACES]))
def test_nan_shows_where_it_is_reached(place):
    """In the target, and in the divergence over a selection and its gradients."""
    inputs = nan_cases.sparse_inputs(0, 1, 5, 60, 3, 8, 4, 12, "float32")
    (*index, _), size = index_inputs(3, 1, 5, 60, 16, 8), 60

    @jax.jit
    def run(q, kv, indices):
        _, lse = sparse_attention(q, kv, indices, value_dim=8, scale=nan_cases.SCALE)
        options = dict(scale=nan_cases.SCALE, target="max")
        kl = nan_cases.kl_with_gradients(functools.partial(sparse_indexer_kl, **options))
        return attention_target(q, kv, lse, indices, **options), kl(index, q, kv, lse, indices)

    (clean, clean_kl), (spoilt, spoilt_kl), bad, empty, bad_keys = nan_cases.sparse_results(run, place, inputs, size)
    indices = np.asarray(inputs[2])
    present = (indices >= 0) & (indices < size)
    assert np.isnan(np.asarray(spoilt)[bad[..., None] & present]).all()
    np.testing.assert_array_equal(np.asarray(spoilt)[~present], 0.0)
    same_bits(np.asarray(spoilt)[~bad], np.asarray(clean)[~bad])
    nan_cases.check_kl(clean_kl, spoilt_kl, bad, bad_keys)
    np.testing.assert_array_equal(np.asarray(spoilt_kl[0])[empty], 0.0)


@FORMS
def test_one_head_of_nan_is_not_hidden_by_the_others(form):
    """A maximum that drops NaN would."""
    *inputs, lse, which = inputs_of(form, SHAPES[0])
    kl = jax.jit(functools.partial(KLS[form], scale=SCALE, target="max"))
    clean = np.asarray(kl(*inputs, lse, which))
    at = np.unravel_index(np.argmax(clean), clean.shape)
    spoilt = np.array(lse)
    spoilt[(*at, 1)] = np.nan
    value = np.array(kl(*inputs, spoilt, which))
    assert np.isnan(value[at])
    value[at] = clean[at]
    same_bits(value, clean)


@FORMS
def test_it_has_no_kernel_and_says_so(form):
    inputs = inputs_of(form, SHAPES[0])
    call = functools.partial(KLS[form], *inputs, scale=SCALE)
    with pytest.raises(ValueError, match="implementation='pallas': .* target='max' is computed by XLA alone"):
        call(target="max", implementation="pallas")
    with dsa_jax.implementation("pallas"), pytest.raises(ValueError, match="target='max' is computed by XLA alone"):
        call(target="max")
    with unchecked(), pytest.raises(ValueError, match="target must be 'sum' or 'max', got 'mean'"):
        call(target="mean")


@pytest.mark.slow
@pytest.mark.parametrize(("attention",), the_first(1, [("sparse",), ("dense",)]))
def test_the_config_chooses_and_heads_of_all_shards_count(attention):
    """Only the divergence changes; on a mesh that shards heads the maximum is over all of them."""
    config = small_config(num_hidden_layers=1, first_k_dense_replace=1, num_attention_heads=4, index_kl_target="max")
    ids = tokens(1, 16)
    out, logits = forward(config, ids, attention=attention)
    other, same = forward(dataclasses.replace(config, index_kl_target="sum"), ids, attention=attention)
    np.testing.assert_allclose(logits, same, rtol=1e-5, atol=1e-5)
    assert np.abs(out.indexer_kl - other.indexer_kl).max() > 0.01
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    options = dict(attention=attention, return_indexer_kl=True)
    sharded = dsa_jax.forward_on_mesh(small_model(config), mesh, ids, **options)
    np.testing.assert_allclose(sharded.indexer_kl, out.indexer_kl, rtol=1e-4, atol=1e-6)
