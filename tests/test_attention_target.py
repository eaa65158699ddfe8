"""The indexer's target against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from attention_cases import SCALE, SHAPES, inputs, sparse
from cases import (
    close,
    many_blocks,
    poison,
)

from dsa_jax import (
    KeyRange,
    attention_target,
    latent_attention,
)


@pytest.mark.parametrize("shape", SHAPES)
def test_target_values(shape, monkeypatch):
    many_blocks(monkeypatch, shape)
    b, t, s, n, c, r, k = shape
    q, kv, indices = inputs(shape)
    lse = jax.jit(sparse(c, indices))(q, kv)[1]
    target = jax.jit(functools.partial(attention_target, scale=SCALE))(q, kv, lse, indices)
    assert target.shape == indices.shape and target.dtype == jnp.float32
    close(target, reference.attention_target(q, kv, lse, indices, SCALE), 2e-5)
    present = (np.asarray(indices) >= 0) & (np.asarray(indices) < s)
    assert not np.any(np.asarray(target)[~present])
    close(target.sum(-1), present.any(-1).astype(float), 1e-6)


def test_target_sums_heads_by_the_lse_it_is_given():
    """With the lse of dense attention a head whose mass lies outside the selection weighs less."""
    q, kv, indices = inputs((1, 9, 17, 3, 8, 4, 6))
    lse = latent_attention(q, kv, KeyRange.causal(1, 9, offset=8), value_dim=8, scale=SCALE)[1]
    target = attention_target(q, kv, lse, indices, scale=SCALE)
    close(target, reference.attention_target(q, kv, lse, indices, SCALE), 2e-5)
    own = attention_target(q, kv, sparse(8, indices)(q, kv)[1], indices, scale=SCALE)
    assert np.abs(np.asarray(target - own)).max() > 0.01


def test_target_in_bfloat16_is_float32_and_ignores_nan_in_unselected_keys():
    q, kv, indices = inputs((1, 9, 40, 3, 8, 4, 6), "bfloat16")
    absent = ~np.isin(np.arange(40), np.asarray(indices))[None]
    lse = sparse(8, indices)(q, kv)[1]
    target = attention_target(q, poison(kv, absent), lse, indices, scale=SCALE)
    assert target.dtype == jnp.float32
    close(target, reference.attention_target(q, kv, lse, indices, SCALE), 2e-5)
