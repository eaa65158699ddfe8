"""The objective against its equations in float64 NumPy, and the properties that it must have."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharded_cases import mesh_of

from dsa_jax.parallel.collectives import sum_statistics
from dsa_jax.parallel.sharding import spec
from train.post.objective import equal_groups, group_advantages, grpo_terms, has_tokens, unbiased_kl

ROWS, LENGTH = 6, 9
SETTINGS = dict(epsilon=0.2, epsilon_high=0.3, beta=0.05, off_policy_mask_threshold=0.1)


def case(seed=0, spread=0.4):
    """Draws log-probabilities, advantages and a mask with ragged rows, one of them empty."""
    rng = np.random.default_rng(seed)
    new, old, ref = (-rng.exponential(1.0, (ROWS, LENGTH)) * s for s in (1, 1, 1))
    old = new + spread * rng.standard_normal((ROWS, LENGTH))
    ref = new + spread * rng.standard_normal((ROWS, LENGTH))
    advantages = rng.standard_normal(ROWS)
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (ROWS, 1))
    mask[:, 0], mask[-1] = False, False
    return [new, old, ref, advantages, mask]


@functools.partial(jax.jit, static_argnames=tuple(SETTINGS))
def terms_and_gradient(new, *rest, **settings):
    """The terms, and the gradient of the sum of their losses; compiled once for all settings that are the same."""

    def total(new):
        terms = grpo_terms(new, *rest, **settings)
        return jnp.sum(terms.losses), terms

    gradient, terms = jax.grad(total, has_aux=True)(new)
    return terms, gradient


def in_float64(new, old, ref, advantages, mask, *, epsilon, epsilon_high, beta, off_policy_mask_threshold):
    """The equation, one sequence and one token at a time."""
    losses, masked = [], []
    for i in range(len(new)):
        tokens = np.flatnonzero(mask[i])
        drift = np.mean([old[i, t] - new[i, t] for t in tokens]) if len(tokens) else 0.0
        is_masked = advantages[i] < 0 and off_policy_mask_threshold is not None and drift > off_policy_mask_threshold
        total = 0.0
        for t in tokens:
            r = np.exp(new[i, t] - old[i, t])
            rho = np.exp(ref[i, t] - new[i, t])
            clipped = min(max(r, 1 - epsilon), 1 + epsilon_high)
            policy = min(r * advantages[i], clipped * advantages[i])
            total += policy * (not is_masked) - beta * r * (rho - np.log(rho) - 1)
        losses.append(-total / max(len(tokens), 1))
        masked.append(float(is_masked))
    return np.array(losses), np.array(masked)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_terms_are_those_of_the_equation(seed, threshold):
    arguments, settings = case(seed), SETTINGS | {"off_policy_mask_threshold": threshold}
    losses, masked = in_float64(*arguments, **settings)
    found, _ = terms_and_gradient(*arguments, **settings)
    np.testing.assert_allclose(found.losses, losses, atol=2e-6)
    np.testing.assert_array_equal(found.masked, masked)
    if threshold == 0.0:
        assert 0 < masked.sum() < len(masked)  # else the case shows nothing


def test_gradients_are_those_of_differences():
    new, *rest = case(3)
    settings = SETTINGS | {"off_policy_mask_threshold": 0.0}
    gradient = np.asarray(terms_and_gradient(new, *rest, **settings)[1])
    step = 1e-6
    for i, t in [(0, 1), (1, 1), (2, 2), (3, 1), (5, 3), (0, 0)]:
        moved = new.copy()
        moved[i, t] += step
        difference = (in_float64(moved, *rest, **settings)[0] - in_float64(new, *rest, **settings)[0]).sum() / step
        assert float(gradient[i, t]) == pytest.approx(difference, abs=1e-5)
    assert not np.any(gradient[~rest[-1]])


def test_the_gradient_of_the_kl_where_the_policy_is_the_one_that_sampled():
    """At r = 1 it is (log π_θ - log π_ref) ∇ log π_θ."""
    rng = np.random.default_rng(0)
    logits, ref_logits = rng.standard_normal((2, 7))
    token = 3

    def log_prob(logits):
        return jax.nn.log_softmax(logits)[token]

    old, reference = log_prob(jnp.asarray(logits)), log_prob(jnp.asarray(ref_logits))
    found = jax.grad(lambda z: unbiased_kl(log_prob(z) - old, log_prob(z), reference))(jnp.asarray(logits))
    expected = (old - reference) * jax.grad(log_prob)(jnp.asarray(logits))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_kl_is_unbiased_for_samples_of_an_older_policy():
    rng = np.random.default_rng(1)
    new, old, ref = (jax.nn.log_softmax(jnp.asarray(x)) for x in rng.standard_normal((3, 8)))
    mean = jnp.sum(jnp.exp(old) * unbiased_kl(new - old, new, ref))
    assert float(mean) == pytest.approx(float(jnp.sum(jnp.exp(new) * (new - ref))), abs=1e-6)


def test_what_is_outside_the_mask_carries_nothing():
    new, old, ref, advantages, mask = case(4)
    outside = [np.where(mask, x, np.nan) for x in (new, old, ref)]
    terms, gradient = terms_and_gradient(*outside, advantages, mask, **SETTINGS)
    expected = in_float64(new, old, ref, advantages, mask, **SETTINGS)[0].sum()
    assert np.asarray(terms.losses).sum() == pytest.approx(expected, abs=2e-6)
    assert not np.any(np.asarray(gradient)[~mask])


def test_far_ratios_give_no_nan():
    new, old, mask = np.full((ROWS, LENGTH), -500.0), np.zeros((ROWS, LENGTH)), np.ones((ROWS, LENGTH), bool)
    for sign in (1.0, -1.0):
        for a, b in ((new, old), (old, new)):
            terms, gradient = terms_and_gradient(a, b, b, np.full(ROWS, sign), mask, **SETTINGS)
            assert np.isfinite(terms.losses).all() and np.isfinite(gradient).all()


def test_advantages_by_token():
    *arguments, advantages, mask = case(5)
    rows, _ = terms_and_gradient(*arguments, advantages, mask, **SETTINGS)
    by_token = np.broadcast_to(advantages[:, None], mask.shape)
    tokens, _ = terms_and_gradient(*arguments, by_token, mask, **SETTINGS)
    np.testing.assert_allclose(rows.losses, tokens.losses, atol=1e-7)


def test_a_reference_is_needed_where_beta_is_not_zero():
    new, old, _, advantages, mask = map(jnp.asarray, case())
    with pytest.raises(ValueError, match="beta 0.05 needs ref_log_probs"):
        grpo_terms(new, old, None, advantages, mask, **SETTINGS)


def test_advantages_are_rewards_less_the_mean_of_the_group():
    rewards = np.random.default_rng(0).standard_normal(12)
    groups = rewards.reshape(3, 4)
    np.testing.assert_allclose(
        group_advantages(rewards, 4), (groups - groups.mean(1, keepdims=True)).ravel(), atol=1e-6
    )
    scaled = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, 4, scale_rewards=True), scaled.ravel(), atol=1e-5)


def test_equal_rewards_give_exactly_nothing_and_are_counted():
    third = 0.1 + 0.2  # whose mean over three is another float
    rewards = [third, third, third, 1.0, 0.0, 1.0]
    assert not group_advantages(rewards, 3)[:3].any()
    assert not group_advantages(rewards, 3, scale_rewards=True)[:3].any()
    assert equal_groups(rewards, 3) == 1


def test_what_is_not_counted_is_in_no_mean():
    found = group_advantages([1.0, np.nan, 0.0, 5.0], 4, counted=[True, False, True, False])
    assert found.tolist() == [0.5, 0.0, -0.5, 0.0]
    assert equal_groups([1.0, 2.0], 2, counted=[True, False]) == 1


@pytest.mark.parametrize(
    ("rewards", "size", "message"),
    [
        ([1.0, 2.0, 3.0], 2, "a multiple of num_generations 2"),
        ([1.0, float("nan")], 2, "rewards must be finite, got nan"),
    ],
)
def test_rewards_that_cannot_be(rewards, size, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, size)


def test_shards_of_a_sequence_have_parts_of_it():
    """Two shards of the tokens; masks, means and counts are those of whole sequences, and so is the gradient."""
    arguments = [jnp.asarray(np.pad(x, [(0, 0), (0, 1)]) if x.ndim > 1 else x) for x in case(0)]
    settings = SETTINGS | {"off_policy_mask_threshold": 0.0}
    mesh, token = mesh_of("context=2"), spec("batch", "sequence")

    def parts(new, old, ref, advantages, mask):
        def total(new):
            terms = grpo_terms(new, old, ref, advantages, mask, **settings)
            return jnp.sum(terms.losses), terms

        gradient, terms = jax.grad(total, has_aux=True)(new)
        return sum_statistics((terms, has_tokens(mask)), "sequence"), gradient

    specs = (token, token, token, spec("batch"), token)
    spread = jax.shard_map(parts, mesh=mesh, in_specs=specs, out_specs=(spec("batch"), token), check_vma=False)
    alone = jax.jit(parts)(*arguments)
    chex.assert_trees_all_close(jax.jit(spread)(*arguments), alone, atol=1e-6)
    assert 0 < alone[0][0].masked.sum() < ROWS and alone[0][1].tolist() == [1.0] * (ROWS - 1) + [0.0]
