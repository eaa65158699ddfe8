"""Draws against definitions in float64 NumPy, and against their own distribution by counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import f64

from dsa_jax.inference.continuation import Continuation
from dsa_jax.inference.controls import SlotControls, counts_of, rules_of
from dsa_jax.inference.params import MAX_LOGPROBS, SamplingParams
from dsa_jax.inference.prefix import Chain
from dsa_jax.inference.programs import _score
from dsa_jax.inference.sampling import Controls, Settings, draw

VOCAB = 70  # no multiple of the 32 bits of a mask's word
draw = jax.jit(draw, static_argnames="kind")


def continuation(prompt, output, params, stops=()):
    return Continuation(
        np.asarray(prompt, np.int32), 100, Chain(), tokens=list(output), request=0, index=0, params=params, seed=0,
        stops=frozenset(stops), text=None,
    )  # fmt: skip


def defined(logits, prompt, output, params, *, stops=(), allowed=None) -> np.ndarray:
    """The distribution that a token is drawn from: float64 [vocab]."""
    x = f64(logits).copy()
    for token in {*prompt, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(output) < params.min_tokens:
        x[list(stops)] = -np.inf
    if allowed is not None:
        x[~allowed] = -np.inf
    if params.temperature == 0:
        return softmax(x)
    p = softmax(x / params.temperature)
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    kept = np.zeros(len(x), bool)
    kept[order[(before < params.top_p) | (params.top_p == 1)]] = True
    if params.top_k > 0:
        kept[order[params.top_k :]] = False
    kept &= p >= params.min_p * p.max()
    return np.where(kept, p, 0) / p[kept].sum()


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def pack(allowed):
    """The mask of a row as 32-bit words, the lowest bit first."""
    bits = np.zeros(-(-VOCAB // 32) * 32, bool)
    bits[: len(allowed)] = allowed
    return np.packbits(bits.reshape(-1, 8), axis=1, bitorder="little").reshape(-1).view(np.uint32)


def controls_of(owns, masks, slots):
    """The controls of rows whose sequences stand in these slots, among others that are in the way."""
    size = max(slots) + 2
    others = continuation([0, 1], [2], SamplingParams(repetition_penalty=9.0, logit_bias={3: 50.0}, min_p=0.5))
    at = {slot: own for slot, own in zip(slots, owns, strict=True)}
    stack = lambda *x: np.stack(x)
    rules = jax.tree.map(stack, *(rules_of(at.get(slot, others), VOCAB) for slot in range(size)))
    counts = jax.tree.map(
        stack, *(counts_of(own.prompt, own.tokens, VOCAB) for own in (at.get(slot, others) for slot in range(size)))
    )
    return Controls(rules, counts, np.array(slots, np.int32), np.stack([pack(mask) for mask in masks]))


CASES = [
    dict(),
    dict(temperature=0.7, repetition_penalty=1.3),
    dict(repetition_penalty=0.8, presence_penalty=-0.5),
    dict(frequency_penalty=0.4, presence_penalty=0.9),
    dict(logit_bias={0: 3.0, 69: -100.0, 33: 2.5}, temperature=1.5),
    dict(min_p=0.3),
    dict(min_p=0.05, top_k=9, top_p=0.8, temperature=1.2),
    dict(min_p=0.01, top_k=30, top_p=0.5, temperature=0.9, frequency_penalty=-0.3),
    dict(min_tokens=6, temperature=0.5),
    dict(min_tokens=5, temperature=0.5),
    dict(temperature=0.0, repetition_penalty=1.5, logit_bias={5: 1.0}, min_p=0.9, top_k=2),
    dict(
        temperature=0.8, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.1, presence_penalty=0.2,
        frequency_penalty=0.1, logit_bias={7: 1.5, 8: -2.0}, min_tokens=9,
    ),
]  # fmt: skip
STOPS = (4, 40, 66)
PROMPT, OUTPUT = [3, 5, 5, 64, 40], [8, 8, 3, 8, 69]


@pytest.fixture(scope="module")
def rows():
    """(logits, controls, settings, masks) of a batch that has every case with a mask and without."""
    every = [SamplingParams(**case) for case in CASES] * 2
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(len(every), VOCAB)) * 2, jnp.float32)
    masks = [np.ones(VOCAB, bool) if row < len(CASES) else rng.random(VOCAB) < 0.4 for row in range(len(every))]
    owns = [continuation(PROMPT, OUTPUT, params, STOPS) for params in every]
    slots = rng.permutation(len(every) + 3)[: len(every)].tolist()
    found = [own.settings(VOCAB) for own in owns]
    temperature, top_k, top_p, seed, _ = (np.array(x) for x in zip(*found, strict=True))
    settings = Settings(np.float32(temperature), np.int32(top_k), np.float32(top_p), np.uint32(seed))
    return every, logits, controls_of(owns, masks, slots), settings, masks


def test_distributions_are_those_of_the_definition(rows):
    """The tokens that could be drawn, exactly, and each one's probability; many draws show each token's."""
    every, logits, controls, settings, masks = rows
    number = np.full(len(every), len(OUTPUT), np.int32)
    found = [dict() for _ in every]
    for seed in range(40):
        drawn = draw(
            logits, dataclasses.replace(settings, seed=settings.seed + seed), number, kind="full", controls=controls
        )
        for row, (token, log_prob) in enumerate(zip(drawn.token.tolist(), drawn.log_prob.tolist(), strict=True)):
            found[row][token] = log_prob
    for row, params in enumerate(every):
        p = defined(logits[row], PROMPT, OUTPUT, params, stops=STOPS, allowed=masks[row])
        np.testing.assert_array_equal(np.asarray(drawn.kept[row]), p > 0, err_msg=str(params))
        for token, log_prob in found[row].items():
            np.testing.assert_allclose(log_prob, np.log(p[token]), atol=1e-5, err_msg=str(params))
        if params.temperature == 0:
            assert list(found[row]) == [p.argmax()]


def test_counts_of_draws_follow_the_distribution():
    """χ² of 20,000 draws of one row, by settings of every kind, under a limit that one in 10⁶ such tests exceeds."""
    params = SamplingParams(
        temperature=1.3, top_k=14, top_p=0.97, min_p=0.02, repetition_penalty=1.2, frequency_penalty=0.3,
        logit_bias={7: 1.0},
    )  # fmt: skip
    rows, batches = 1000, 20
    rng = np.random.default_rng(1)
    logits, allowed = jnp.asarray(rng.normal(size=VOCAB) * 1.5, jnp.float32), rng.random(VOCAB) < 0.7
    own = continuation(PROMPT, OUTPUT, params)
    one = controls_of([own], [allowed], [0])
    controls = dataclasses.replace(one, slots=np.zeros(rows, np.int32), mask=np.repeat(one.mask, rows, 0))
    settings = Settings(*(np.repeat(x, rows) for x in (np.float32(1.3), np.int32(14), np.float32(0.97))), np.uint32(0))
    counts = np.zeros(VOCAB)
    for batch in range(batches):
        seeds = np.arange(rows, dtype=np.uint32) + batch * rows
        drawn = draw(
            jnp.broadcast_to(logits, (rows, VOCAB)), dataclasses.replace(settings, seed=seeds),
            np.full(rows, len(OUTPUT), np.int32), kind="full", controls=controls,
        )  # fmt: skip
        counts += np.bincount(np.asarray(drawn.token), minlength=VOCAB)
    p = defined(logits, PROMPT, OUTPUT, params, allowed=allowed)
    assert not counts[p == 0].any() and 8 < np.sum(p > 0) <= 14
    expected = rows * batches * p[p > 0]
    freedom = len(expected) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty's
    assert np.sum((counts[p > 0] - expected) ** 2 / expected) < limit


def test_neutral_controls_change_no_bit():
    """Beside rows that need them, others draw as they would with Settings alone."""
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.normal(size=(3, VOCAB)), jnp.float32)
    settings = Settings(
        np.float32([0, 1, 0.7]), np.int32([VOCAB, VOCAB, 9]), np.float32([1, 1, 0.9]), np.uint32([1, 2, 3])
    )
    number = np.arange(3, dtype=np.int32)
    plain = draw(logits, settings, number, kind="truncated")
    full = draw(logits, settings, number, kind="full", controls=SlotControls(4, VOCAB).padding(3))
    assert full.token.tolist() == plain.token.tolist()
    np.testing.assert_array_equal(full.kept, plain.kept)
    np.testing.assert_allclose(full.log_prob, plain.log_prob, rtol=1e-6)
    np.testing.assert_allclose(
        full.likeliest.log_prob, jax.nn.log_softmax(logits)[np.arange(3), plain.token], rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["greedy", "random", "truncated", "full"])
def test_logits_that_are_not_finite_are_told_of(kind):
    """One NaN or +inf among the logits of a row, even where truncation would leave it out; and no token at all."""
    logits = jnp.zeros((4, VOCAB)).at[0, 50].set(jnp.nan).at[1, 50].set(jnp.inf).at[2, 3].set(9.0)
    settings = Settings(
        np.ones(4, np.float32), np.full(4, 5, np.int32), np.full(4, 0.9, np.float32), np.arange(4, dtype=np.uint32)
    )
    controls = None
    if kind == "full":
        controls = SlotControls(4, VOCAB).padding(4)
        controls = dataclasses.replace(controls, mask=controls.mask.at[3].set(0))
    log_prob = np.asarray(draw(logits, settings, np.zeros(4, np.int32), kind=kind, controls=controls).log_prob)
    assert np.isnan(log_prob[:2]).all() and np.isfinite(log_prob[2])
    assert np.isneginf(log_prob[3]) if kind == "full" else np.isfinite(log_prob[3])


def test_what_a_slot_held_before_is_forgotten():
    """A sequence that is new to a slot is counted from its own tokens; what it draws is counted from there on."""
    params = SamplingParams(frequency_penalty=1.0, repetition_penalty=1.5)
    store = SlotControls(2, VOCAB)
    works = [_Work(continuation([1, 2], [3, 3], params), 2), _Work(continuation([4], [], params), 0)]
    for slot, work in enumerate(works):
        work.sequence.slot, work.sequence.cached = slot, slot
    slots = np.int32([0, 1])
    store.of(works, slots)
    store.count(slots, np.int32([5, 6]))
    later = _Work(continuation([7], [8, 9], params), 2)
    later.sequence.slot, later.sequence.cached = 0, 2
    controls = store.of([later, works[1]], slots)
    expected = [counts_of(np.int32([7]), [8, 9], VOCAB), counts_of(np.int32([4]), [6], VOCAB)]
    for slot in range(2):
        np.testing.assert_array_equal(controls.counts.output[slot], expected[slot].output)
        np.testing.assert_array_equal(controls.counts.prompt[slot], expected[slot].prompt)


class _Work:
    """What a step does for a sequence, as far as controls look at it."""

    def __init__(self, sequence, number):
        self.sequence, self.number = sequence, number


def test_scores_come_in_blocks_and_are_those_of_all_logits_at_once():
    """More tokens than a block, and no multiple of one."""
    rng = np.random.default_rng(3)
    weight = jnp.asarray(rng.normal(size=(16, VOCAB)), jnp.float32)

    class Model(nnx.Module):
        def unembed(self, hidden):
            assert hidden.shape == (128, 16)
            return hidden @ weight

    hidden = jnp.asarray(rng.normal(size=(2, 75, 16)), jnp.float32)
    targets = rng.integers(0, VOCAB, (2, 75)).astype(np.int32)
    scores = jax.jit(lambda hidden, targets: _score(Model(), hidden, targets))(hidden, targets)
    log_probs = np.log(np.apply_along_axis(softmax, -1, f64(hidden) @ f64(weight)))
    np.testing.assert_allclose(
        scores.log_prob, np.take_along_axis(log_probs, targets[..., None], -1)[..., 0], atol=1e-5
    )
    order = np.argsort(-log_probs, axis=-1)[..., :MAX_LOGPROBS]
    np.testing.assert_array_equal(scores.ids, order)
    np.testing.assert_allclose(scores.log_probs, np.take_along_axis(log_probs, order, -1), atol=1e-5)
