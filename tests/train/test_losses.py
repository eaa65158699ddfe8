"""The losses against their definitions, in chunks of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from train.losses import cross_entropy, indexer_loss, token_losses


def inputs(batch=3, length=10, dim=6, vocab=11, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(batch, length, dim)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(dim, vocab)), jnp.float32)
    return hidden, weights, rng.integers(vocab, size=(batch, length)), rng.random((batch, length)) < 0.6


def reference(hidden, weights, targets):
    """-log softmax(z)[target] in float64."""
    z = np.asarray(hidden, np.float64) @ np.asarray(weights, np.float64)
    return np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 7, 9, 12, 1000])
def test_token_losses_equal_the_definition(chunk):
    hidden, weights, targets, _ = inputs()
    losses = token_losses(hidden, lambda h: h @ weights, jnp.asarray(targets), chunk=chunk)
    np.testing.assert_allclose(losses, reference(hidden, weights, targets), atol=2e-6)


def test_literal_value():
    hidden = jnp.asarray([[[1.0, 0.0]]])
    losses = token_losses(hidden, lambda h: h @ jnp.asarray([[2.0, 0.0], [0.0, 0.0]]), jnp.asarray([[0]]))
    np.testing.assert_allclose(losses, [[0.126928]], atol=1e-6)  # ln(e^2 + 1) - 2


def test_cross_entropy_sums_the_valid_targets_alone():
    hidden, weights, targets, valid = inputs()
    total = cross_entropy(hidden, lambda h: h @ weights, jnp.asarray(targets), jnp.asarray(valid), chunk=6)
    np.testing.assert_allclose(total, reference(hidden, weights, targets)[valid].sum(), rtol=1e-6)
    spoilt = jnp.where(jnp.asarray(valid)[..., None], hidden, jnp.nan)
    assert jnp.isfinite(cross_entropy(spoilt, lambda h: h @ weights, jnp.asarray(targets), jnp.asarray(valid)))
    assert cross_entropy(hidden, lambda h: h @ weights, jnp.asarray(targets), jnp.zeros_like(valid)) == 0


def test_gradients():
    hidden, weights, targets, valid = inputs(batch=2, length=5)
    loss = lambda h, w: cross_entropy(h, lambda x: x @ w, jnp.asarray(targets), jnp.asarray(valid), chunk=4)
    check_grads(loss, (hidden, weights), order=1, modes=("rev",), atol=1e-2, rtol=1e-2)


def test_no_logits_of_the_whole_sequence_exist():
    """At T 4096 and a vocabulary of 32768 the logits would take 512 MiB, forward as well as backward."""
    length, vocab = 4096, 32768

    def loss(hidden, weights, targets):
        return cross_entropy(hidden, lambda h: h @ weights, targets, targets >= 0, chunk=128)

    shapes = [((1, length, 8), jnp.float32), ((8, vocab), jnp.float32), ((1, length), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 128 * 2**20


def test_indexer_loss_skips_padding():
    kl = jnp.asarray([[[1.0, 2.0, jnp.nan]], [[4.0, 8.0, 16.0]]])
    assert indexer_loss(kl, jnp.asarray([[True, True, False]])) == 15.0


def test_mismatched_targets_are_named(unchecked):
    hidden, weights, targets, _ = inputs()
    with pytest.raises(ValueError, match=r"targets must have the shape"):
        token_losses(hidden, lambda h: h @ weights, jnp.asarray(targets[:, 1:]))
