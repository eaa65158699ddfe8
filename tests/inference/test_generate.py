"""Generation against repeated full forward passes, and sampling against the distribution it draws from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import same_bits, the_first, unchecked
from model_cases import forward, small_config, small_model, tokens

from dsa_jax import KeyRange, PagedCache, Runner, generate, sample
from dsa_jax.inference import programs

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(first_k_dense_replace=2)  # no experts: half the compilation, and they know nothing of caches
PROMPTS, LENGTHS, NEW = tokens(2, 12), np.array([12, 7]), 6


@functools.cache
def greedy(attention="sparse", chunk=8, stop_token=None) -> np.ndarray:
    """The continuation of the ragged prompts by their likeliest tokens."""
    return np.asarray(
        generate(
            small_model(CONFIG),
            PROMPTS,
            max_new_tokens=NEW,
            lengths=LENGTHS,
            temperature=0,
            attention=attention,
            prefill_chunk=chunk,
            stop_token=stop_token,
        )
    )


def greedy_by_full_forwards(attention):
    """Every token from a forward pass over all tokens before it."""
    row = np.arange(2)
    ids = np.zeros((2, 18), np.int32)
    ids[:, :12] = PROMPTS
    for number in range(NEW):
        length = jnp.asarray(LENGTHS + number)
        _, logits = forward(CONFIG, jnp.asarray(ids), keys=KeyRange.lengths(length, 18), attention=attention)
        ids[row, LENGTHS + number] = np.argmax(np.asarray(logits)[row, LENGTHS + number - 1], -1)
    return ids[row[:, None], LENGTHS[:, None] + np.arange(NEW)]


@pytest.mark.parametrize("attention", the_first(1, ["sparse", "dense"]))
def test_greedy_is_the_argmax_of_full_forwards(attention):
    """Ragged prompts about K: prefill in chunks, then decode."""
    out = greedy(attention)
    assert out.shape == (2, NEW) and out.dtype == np.int32
    assert np.array_equal(out, greedy_by_full_forwards(attention))
    assert len(set(out.reshape(-1).tolist())) > 3, "a constant continuation shows nothing"


def test_chunked_prefill_equals_unchunked():
    """In one piece, in pieces that do not divide the prompt, and where a chunk is empty for the shorter row."""
    for chunk in (5, 4096):
        assert np.array_equal(greedy(chunk=chunk), greedy())


def test_a_row_continues_as_it_does_alone():
    alone = generate(small_model(CONFIG), PROMPTS[1:, :7], max_new_tokens=NEW, temperature=0)
    assert np.array_equal(alone[0], greedy()[1])


def test_a_row_repeats_the_stop_token_once_it_comes():
    free = greedy()
    stop = int(free[0, 2])
    expected = free.copy()
    for row in expected:
        if stop in row:
            row[row.tolist().index(stop) :] = stop
    assert np.array_equal(greedy(stop_token=stop), expected) and stop in free[0]


def test_a_row_stops_at_any_of_several_tokens():
    free = greedy()
    stops = int(free[0, 2]), int(free[1, 4])
    expected = free.copy()
    for row in expected:
        at = next((i for i, token in enumerate(row) if token in stops), None)
        if at is not None:
            row[at:] = row[at]
    assert not np.array_equal(expected, free)
    assert np.array_equal(greedy(stop_token=stops), expected)
    assert np.array_equal(greedy(stop_token=np.array(stops)[:1].tolist()[0]), greedy(stop_token=stops[:1]))


@pytest.mark.slow
def test_other_lengths_settings_and_stop_tokens_take_the_same_program():
    model, key = small_model(CONFIG), jax.random.key(0)
    runner = Runner(model, PagedCache(CONFIG, 1, format="float32"))
    sizes = lambda: [run._cache_size() for run in (programs.draw_first, *runner.programs, *runner.dense_programs)]
    for stop_token in (None, (3, 4)):  # one stop token or none take a bucket, two the next
        for settings in (dict(temperature=0), dict(temperature=0.7, top_p=0.9)):
            generate(model, PROMPTS, max_new_tokens=NEW, key=key, stop_token=stop_token, **settings)
    before = sizes()
    for width in (12, 9, 10):
        for options in (
            dict(temperature=0),
            dict(top_p=0.5),
            dict(top_k=3, stop_token=5),
            dict(top_p=0.7, stop_token=(1, 2)),
        ):
            generate(model, PROMPTS[:, :width], max_new_tokens=NEW - 1, **dict(key=key, temperature=1.3) | options)
    assert sizes() == before


def test_rows_that_have_all_stopped_end_the_loop():
    """The last token of a row is repeated to the end, whatever the number of steps that ran."""
    stop = tuple(range(CONFIG.vocab_size))  # whatever comes first
    assert np.array_equal(greedy(stop_token=stop), np.repeat(greedy()[:, :1], NEW, 1))


def test_a_key_draws_the_same_tokens_twice():
    draw = functools.partial(
        generate, small_model(CONFIG), PROMPTS, max_new_tokens=NEW, prefill_chunk=8, lengths=LENGTHS
    )
    first = draw(key=jax.random.key(1))
    same_bits(draw(key=jax.random.key(1)), first)
    other = draw(key=jax.random.key(2))
    assert np.any(other != first) and np.all((other >= 0) & (other < 64))


# Sampling

LOGITS = jnp.asarray(np.log([0.4, 0.05, 0.3, 0.05, 0.2]), jnp.float32)
DRAWS = 20_000


def frequencies(**options):
    draw = jax.jit(functools.partial(sample, **options))
    ids = draw(jnp.broadcast_to(LOGITS, (DRAWS, 5)), jax.random.key(0))
    assert ids.dtype == jnp.int32
    return np.bincount(ids, minlength=5) / DRAWS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), [0.4, 0.05, 0.3, 0.05, 0.2]),
        (dict(temperature=0.5), np.array([0.16, 0.0025, 0.09, 0.0025, 0.04]) / 0.295),
        (dict(temperature=1e-3), [1, 0, 0, 0, 0]),
        (dict(temperature=0), [1, 0, 0, 0, 0]),
        (dict(top_k=1), [1, 0, 0, 0, 0]),
        (dict(top_k=2), [4 / 7, 0, 3 / 7, 0, 0]),
        (dict(top_k=99), [0.4, 0.05, 0.3, 0.05, 0.2]),
        (dict(top_p=0.01), [1, 0, 0, 0, 0]),
        (dict(top_p=0.6), [4 / 7, 0, 3 / 7, 0, 0]),  # the fewest that reach 0.6
        (dict(top_p=0.85), [4 / 9, 0, 3 / 9, 0, 2 / 9]),
        (dict(top_p=0.85, top_k=2), [4 / 7, 0, 3 / 7, 0, 0]),
        (dict(temperature=0.5, top_p=0.6), [16 / 25, 0, 9 / 25, 0, 0]),  # of the sharpened distribution
    ],
    ids=str,
)
def test_sampling_follows_the_distribution(options, expected):
    expected = np.asarray(expected, float)
    actual = frequencies(**options)
    assert not np.any(actual[expected == 0])
    np.testing.assert_allclose(actual, expected, atol=5 * np.sqrt(0.25 / DRAWS))


def test_rows_draw_independently():
    logits = jnp.zeros((2, 64))
    keys = jax.random.split(jax.random.key(0), 50)
    draws = jax.jit(jax.vmap(lambda key: sample(logits, key)))(keys)
    assert np.mean(np.asarray(draws[:, 0] == draws[:, 1])) < 0.1


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(tokens=np.array([[1, 64]])), ["64"]),
        (dict(tokens=np.array([[-1, 3]])), ["-1", "64"]),
        (dict(tokens=np.array([1, 2])), ["[B, T]", "(2,)"]),
        (dict(tokens=np.ones((1, 2))), ["integers", "float64"]),
        (dict(tokens=np.zeros((1, 0), int)), ["at least one token", "(1, 0)"]),
        (dict(tokens=np.zeros((0, 3), int)), ["(0, 3)"]),
        (dict(lengths=np.array([0])), ["lengths", "1", "0"]),
        (dict(lengths=np.array([13])), ["lengths", "12", "13"]),
        (dict(lengths=np.array([3, 3])), ["lengths", "[1]"]),
        (dict(lengths=np.array([2.5])), ["lengths", "2.5"]),
        (dict(max_new_tokens=0), ["max_new_tokens", "0"]),
        (dict(max_new_tokens=85), ["96", "97"]),
        (dict(prefill_chunk=0), ["prefill_chunk", "0"]),
        (dict(temperature=-1), ["temperature", "-1"]),
        (dict(temperature=float("nan")), ["temperature", "nan"]),
        (dict(top_k=0), ["top_k", "0"]),
        (dict(top_p=0.0), ["top_p", "0.0"]),
        (dict(top_p=1.5), ["top_p", "1.5"]),
        (dict(attention="linear"), ["attention", "linear"]),
        (dict(stop_token=64), ["stop_token", "64"]),
        (dict(stop_token=(1, -1)), ["stop_token", "-1"]),
        (dict(stop_token=("a",)), ["stop_token", "'a'"]),
        (dict(temperature=1.0, key=None), ["key", "temperature=0"]),
    ],
    ids=str,
)
def test_bad_requests_are_refused_by_name(options, words):
    options = dict(tokens=np.zeros((1, 12), int), max_new_tokens=2, temperature=0.5, key=jax.random.key(0)) | options
    with unchecked(), pytest.raises(ValueError) as error:
        generate(small_model(CONFIG), options.pop("tokens"), **options)
    assert all(word in str(error.value) for word in words), error.value
