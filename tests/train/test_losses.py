"""The losses against their definitions, in chunks of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import unchecked
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


def kept_sets(targets, vocab=11, width=6):
    """Random kept sets that hold their targets, one of them without any."""
    rng = np.random.default_rng(1)
    kept = np.full((*targets.shape, width), -1, np.int32)
    for place in np.ndindex(targets.shape):
        others = rng.permutation(np.setdiff1d(np.arange(vocab), targets[place]))[: rng.integers(width)]
        kept[(*place, slice(0, len(others) + 1))] = np.sort(np.append(others, targets[place]))
    kept[0, 1] = -1
    return kept


@pytest.mark.parametrize("chunk", [4, 1000])
def test_kept_sets_and_temperature(chunk):
    """log softmax(z / 0.7) over the kept ids; where none are listed, over all."""
    hidden, weights, targets, _ = inputs()
    kept, options = kept_sets(targets), dict(temperature=0.7, chunk=chunk)
    losses = token_losses(hidden, lambda h: h @ weights, jnp.asarray(targets), kept=jnp.asarray(kept), **options)
    z = np.asarray(hidden, np.float64) @ np.asarray(weights, np.float64) / 0.7
    for place in np.ndindex(targets.shape):
        own = kept[place][kept[place] >= 0] if kept[place][0] >= 0 else np.arange(11)
        want = np.log(np.exp(z[place][own]).sum()) - z[place][targets[place]]
        np.testing.assert_allclose(losses[place], want, atol=2e-6)


def test_kept_sets_far_below_the_likeliest():
    """A kept set of another policy, of which nothing is near the peak: still a distribution."""
    z = jnp.asarray([[[300.0, 0.0, 1.0]]])
    losses = token_losses(z, lambda h: h, jnp.asarray([[1]]), kept=jnp.asarray([[[1, 2]]]))
    np.testing.assert_allclose(losses, [[np.log(1 + np.e)]], rtol=1e-6)


def test_gradients_over_kept_sets():
    hidden, weights, targets, valid = inputs(batch=2, length=5)
    kept = jnp.asarray(kept_sets(targets))
    losses = lambda h, w: token_losses(h, lambda x: x @ w, jnp.asarray(targets), kept=kept, chunk=4)
    check_grads(lambda *args: losses(*args).sum(), (hidden, weights), order=1, modes=("rev",), atol=1e-2, rtol=1e-2)


def test_kept_sets_of_another_shape_are_refused():
    hidden, weights, targets, _ = inputs()
    kept = jnp.zeros((3, 9, 2), jnp.int32)
    with unchecked(), pytest.raises(ValueError, match=r"kept must be \[3, 10, M\] as hidden's tokens, got \[3, 9, 2\]"):
        token_losses(hidden, lambda h: h @ weights, jnp.asarray(targets), kept=kept)
