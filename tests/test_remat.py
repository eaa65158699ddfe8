"""Tests what a layer keeps for its backward pass: no number depends on it, and each name spares what it says."""

import functools

import jax
import jax.numpy as jnp
import pytest
from cases import FAST
from flax import nnx
from model_cases import model_parts, small_config, small_model, tokens

from dsa_jax.remat import KEEPABLE, check_keep

CONFIG = small_config(first_k_dense_replace=1)
ALL = tuple(KEEPABLE)


def objective(state, ids, config, attention, keep):
    """A loss that every parameter has a say in: of the hidden states, their squares and the indexer's divergence."""
    out = nnx.merge(model_parts(config)[0], state)(ids, attention=attention, keep=keep)
    wave = jnp.sin(jnp.arange(out.hidden.size, dtype=jnp.float32)).reshape(out.hidden.shape)
    return jnp.sum(out.hidden.astype(jnp.float32) * (wave + out.hidden)) + jnp.sum(out.indexer_kl)


@functools.cache
def lowered(config, attention, keep):
    """The loss with its gradients, without what nothing depends on."""
    function = functools.partial(objective, config=config, attention=attention, keep=keep)
    return jax.jit(jax.value_and_grad(function)).lower(model_parts(config)[1], tokens(2, 24))


def flops(config, attention, keep):
    return lowered(config, attention, keep).cost_analysis()["flops"]


def assert_same_bits(config, attention, options):
    state, ids = model_parts(config)[1], tokens(2, 24)
    expected, found = (
        jax.tree_util.tree_leaves_with_path(lowered(config, attention, keep).compile(options)(state, ids))
        for keep in ((), ALL)
    )
    for (path, one), (_, other) in zip(expected, found, strict=True):
        assert (one == other).all() and jnp.isfinite(one).all(), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_what_is_kept_changes_no_bit_and_is_not_computed_again():
    config = small_config(num_hidden_layers=1, first_k_dense_replace=1)
    assert_same_bits(config, "sparse", FAST)
    assert flops(config, "sparse", ALL) < 0.85 * flops(config, "sparse", ())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_bits_are_the_same_as_xla_optimises_it(attention, dtype):
    assert_same_bits(small_config(first_k_dense_replace=1, dtype=dtype), attention, None)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "name"), [("sparse", name) for name in KEEPABLE] + [("dense", "attention")])
def test_every_name_spares_something(attention, name):
    assert flops(CONFIG, attention, ALL) < flops(CONFIG, attention, (name,)) < flops(CONFIG, attention, ())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (("latent",), "keep must name results among latents, queries, .*, each once, got 'latent'"),
        (("latents", "latents"), "each once, got 'latents'"),
        (["latents"], "keep must be a tuple of names"),
        ("latents", "keep must be a tuple of names, got 'latents'"),
        ((1,), "keep must be a tuple of names"),
    ],
)
def test_what_cannot_be_kept_is_named(keep, message):
    with pytest.raises(ValueError, match=message):
        check_keep(keep)
    with pytest.raises(ValueError, match=message):
        small_model(CONFIG)(tokens(1, 4), keep=keep)
