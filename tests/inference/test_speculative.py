"""Drafts and their verification: where n-grams lead, what a verification takes, and an engine that proposes."""

import functools
from typing import Any

import engine_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import unchecked
from engine_cases import CONFIG, alone, compilations, prompt, run, tokens_of
from flax import nnx
from model_cases import small_model

from dsa_jax import LLM, Engine, NGram, PagedCache, Request, Runner, SamplingParams
from dsa_jax.inference import pages, pages_that_fit
from dsa_jax.inference.sampling import Settings
from dsa_jax.inference.speculative import INDEXED_TOKENS, Drafted, propose, verify_drafts

pytestmark = pytest.mark.usefixtures("in_a_hurry")

VOCAB = CONFIG.vocab_size


class Known:
    """A prompt, and tokens that follow it."""

    def __init__(self, prompt, tokens=()):
        self.prompt, self.tokens = np.asarray(prompt, np.int32), list(tokens)


# N-grams


def continuation(text, shortest, longest, most):
    """The definition: the latest place before the end where the longest run of last tokens stands, and what follows."""
    for length in range(min(longest, len(text)), shortest - 1, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[len(text) - length :]:
                copied = list(text)
                for _ in range(most):
                    copied.append(copied[end + len(copied) - len(text)])
                return copied[len(text) :]
    return []


@pytest.mark.parametrize(("shortest", "longest", "most"), [(2, 4, 3), (1, 1, 1), (3, 3, 2), (1, 4, 3)])
def test_proposals_are_those_of_the_definition(shortest, longest, most):
    """Sequences that grow by nothing to four tokens between calls, side by side."""
    rng = np.random.default_rng(0)
    drafter = NGram(longest, shortest, most)
    sequences = [Known(rng.integers(0, 3, length)) for length in (1, 2, 5, 30)]
    found = 0
    for _ in range(40):
        drafts, counts = drafter.propose(sequences)
        assert drafts.shape == (4, most) and drafts.dtype == counts.dtype == np.int32
        for sequence, row, count in zip(sequences, drafts.tolist(), counts.tolist(), strict=True):
            text = [*sequence.prompt.tolist(), *sequence.tokens]
            assert row[:count] == continuation(text, shortest, longest, most)
            found += count > 0
            sequence.tokens += rng.integers(0, 3, rng.integers(0, 5)).tolist()
    assert found > 50
    del sequence, sequences
    assert not drafter._indices, "what has ended is forgotten"


def test_a_long_prompt_is_indexed_in_several_steps():
    """In each as many tokens as a step may, of all sequences together."""
    long, short = Known(np.arange(2 * INDEXED_TOKENS + 10) % 1000), Known([1, 2, 3, 1, 2])
    drafter = NGram()
    assert [drafter.propose([long, short])[1].tolist() for _ in range(3)] == [[0, 0], [0, 0], [3, 3]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(shortest=0), "shortest must be from 1 to longest = 4, got 0"),
        (dict(shortest=5), "shortest must be from 1 to longest = 4, got 5"),
        (dict(most=0), "most must be from 1 to 3, got 0"),
        (dict(most=4), "most must be from 1 to 3, got 4"),
        (dict(most=True), "most must be from 1 to 3, got True"),
    ],
    ids=str,
)
def test_bad_n_grams_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        NGram(**options)


class Fixed:
    """Proposes what it is told."""

    most = 3

    def __init__(self, drafts, counts):
        self.drafts, self.counts = drafts, counts

    def propose(self, sequences):
        return self.drafts, self.counts


@pytest.mark.parametrize(
    ("drafts", "counts", "words"),
    [
        (np.zeros((2, 3)), np.zeros(2), r"propose \[1, 3\] tokens and \[1\] counts, got \[2, 3\] and \[2\]"),
        (np.full((1, 3), 64), np.zeros(1, int), "from 0 to 63 and its counts from 0 to 3, got 64 to 64 and 0 to 0"),
        (np.full((1, 3), -1), np.zeros(1), "got -1 to -1"),
        (np.zeros((1, 3)), np.full(1, 4), "4 to 4"),
    ],
)  # fmt: skip
def test_bad_proposals_are_refused(drafts, counts, words):
    with pytest.raises(ValueError, match=words):
        propose(Fixed(drafts, counts), [Known([1])], VOCAB)


# Verification


def settings_of(rows, temperature):
    seed = np.arange(rows, dtype=np.uint32)
    return Settings(np.full(rows, temperature, np.float32), np.full(rows, 8), np.ones(rows, np.float32), seed)


def test_drafts_are_taken_up_to_the_first_that_is_wrong():
    """Greedy, of logits that want 1, 2, 3, 4; drafts behind the count are none."""
    logits = np.tile(np.eye(8, dtype=np.float32)[1:5], (6, 1, 1))
    drafts = [[1, 2, 3], [1, 2, 0], [1, 0, 3], [0, 2, 3], [1, 2, 3], [0, 0, 0]]
    tokens, count = np.insert(drafts, 0, 7, axis=1), np.array([4, 4, 4, 4, 3, 0])
    zero = np.zeros(6, np.int32)
    out = verify_drafts(logits, Drafted(tokens, count, zero, zero), settings_of(6, 0.0), kind="greedy")
    assert out.taken.tolist() == [3, 2, 1, 0, 2, 0] and out.last.tolist() == [4, 3, 2, 1, 3, 1]
    assert out.drawn.token.tolist() == [1, 2, 3, 4] * 6


def test_what_is_taken_follows_the_distribution():
    """χ² of 20,000 seeds: the first token, and the second where the draft was right, by p whatever the draft is."""
    rows, rng = 20_000, np.random.default_rng(0)
    logits = np.broadcast_to(rng.normal(size=(2, 8)).astype(np.float32), (rows, 2, 8))
    tokens = np.stack([np.zeros(rows, int), np.arange(rows) % 3], axis=1)
    drafted = Drafted(tokens, np.full(rows, 2), np.zeros(rows, np.int32), np.full(rows, 5, np.int32))
    out = verify_drafts(logits, drafted, settings_of(rows, 1.0), kind="random")
    taken, drawn = np.asarray(out.taken), np.asarray(out.drawn.token).reshape(rows, 2)
    p = np.exp(logits[0]) / np.exp(logits[0]).sum(-1, keepdims=True)
    chi = lambda found, p: np.sum((np.bincount(found, minlength=8) - len(found) * p) ** 2 / (len(found) * p))
    for draft in range(3):
        own = np.arange(rows) % 3 == draft
        assert chi(drawn[own, 0], p[0]) < 24.3 and chi(drawn[own & (taken == 1), 1], p[1]) < 24.3  # 0.1 %, 7 degrees
        assert abs(taken[own].mean() - p[0, draft]) < 4 * np.sqrt(p[0, draft] / own.sum())
        np.testing.assert_array_equal(taken[own], drawn[own, 0] == draft)


# Engines


make = functools.partial(engine_cases.make, rows=2)


def sampled(**options):
    """Settings of the one kind of draw that most of these tests compile."""
    return SamplingParams(**dict(seed=1, top_k=20) | options)


class Oracle:
    """Proposes what is known to follow, with every third token wrong."""

    most = 3

    def __init__(self, answers):
        self.answers = answers  # of each prompt's bytes the tokens behind it

    def propose(self, sequences):
        drafts, counts = np.zeros((len(sequences), 3), np.int32), np.zeros(len(sequences), np.int32)
        for row, sequence in enumerate(sequences):
            at = len(sequence.tokens)
            right = self.answers[sequence.prompt.tobytes()][at : at + 3]
            wrong = (np.arange(at, at + len(right)) + sum(sequence.prompt)) % 5 == 4
            drafts[row, : len(right)] = np.where(wrong, (np.array(right, int) + 1) % VOCAB, right)
            counts[row] = len(right)
        return drafts, counts


def oracle(*requests):
    return Oracle({np.int32(request.prompt).tobytes(): tokens_of(alone(request)) for request in requests})


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, pytest.param(20, marks=pytest.mark.slow)])
def test_many_requests_and_cancels_get_the_tokens_that_they_get_alone(count):
    """On a fraction of their pages, with drafts that are right, wrong and cut short."""
    rng = np.random.default_rng(0)
    params = [sampled(temperature=1 + row % 2, seed=row, max_tokens=int(rng.integers(1, 100))) for row in range(count)]
    asked = [Request(prompt(int(rng.integers(1, 120)), row), each) for row, each in enumerate(params)]
    assert sum(-(-(len(each.prompt) + each.params.max_tokens - 1) // 64) for each in asked) > count
    drafter = oracle(*asked)
    engine = make(pages=4, drafter=drafter)
    found = run(engine, *asked, cancels=[(3, 2), (9, 5), (20, count // 2 + 1)])
    ends = [events[-1].finished for events in found]
    assert set(ends) == {"length", "cancelled"} and engine.scheduler.preemptions
    assert engine.stats().drafts_proposed > engine.stats().drafts_accepted > 10 * count
    for request, events in zip(asked, found, strict=True):
        expected = drafter.answers[np.int32(request.prompt).tobytes()]
        assert tokens_of(events) == expected[: len(tokens_of(events))]
        assert len(tokens_of(events)) == len(expected) or events[-1].finished == "cancelled"
    engine.prefix.clear()
    assert engine.cache.free_pages == 4 and not engine.cache.sequences


def test_sequences_that_give_pages_back_at_once_write_their_own():
    """Where a page ends each takes one for wrong drafts, gives it back, and gets the other's; twice."""
    asked = [Request(prompt(60, row), sampled(seed=row, max_tokens=76)) for row in (1, 2)]
    drafter = oracle(*asked)
    expected = list(drafter.answers.values())
    drafter.answers = {prompt: [(token + 1) % VOCAB for token in own] for prompt, own in drafter.answers.items()}
    engine = make(drafter=drafter, reuse_prefixes=False)
    assert [tokens_of(events) for events in run(engine, *asked)] == expected
    assert engine.stats().drafts_proposed > 400 and engine.stats().drafts_accepted == 0


def test_drafts_save_steps_and_change_no_log_probability():
    """All right but every fifth: a step takes up to four tokens."""
    request = Request(prompt(70), sampled(max_tokens=60))
    engine, steps = make(drafter=oracle(request)), []
    decode, verify = engine.runner.decode, engine.runner.verify
    engine.runner.decode = lambda *args, **options: (steps.append(1), decode(*args, **options))[1]
    engine.runner.verify = lambda *args, **options: (steps.append(4), verify(*args, **options))[1]
    [events] = run(engine, request)
    expected = alone(request)
    assert tokens_of(events) == tokens_of(expected) and 59 / 4 <= len(steps) <= 30
    log_probs = [np.float32([event.log_prob for event in each]) for each in (events, expected)]
    np.testing.assert_allclose(*log_probs, atol=1e-5)
    assert len(steps) + engine.stats().drafts_accepted == 59, "of each step one token and the drafts that were right"


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 6, 7])
def test_a_sequence_as_long_as_the_cache_and_the_tables_ends_there(most):
    """Wherever the last token falls in a verification."""
    request = Request(prompt(256 - most), sampled(max_tokens=most))
    engine = make(pages=4, drafter=oracle(request))
    [events] = run(engine, request)
    assert tokens_of(events) == tokens_of(alone(request)) and events[-1].finished == "length"


@pytest.mark.parametrize("at", [4, 5, 6, 7])
def test_what_stops_amid_drafts_stops_there(at):
    """By a token, and the least number of tokens holds as ever."""
    free = Request(prompt(70), sampled(max_tokens=12))
    tokens = tokens_of(alone(free))
    stop, least = tokens[at], tokens.index(tokens[at])
    engine = make(drafter=oracle(free))
    params = sampled(max_tokens=12, stop_token_ids=[stop])
    [events] = run(engine, Request(free.prompt, params))
    assert tokens_of(events) == tokens[: least + 1] and events[-1].finished == "stop"


def test_what_is_kept_as_a_prefix_is_what_was_taken():
    """Answers end just behind a page: what drafts wrote there, right or wrong, belongs to nobody else."""
    engine = None
    for length in (57, 58, 59, 60):
        first = Request(prompt(length, length), sampled(max_tokens=75))
        engine = make(drafter=oracle(first))
        [events] = run(engine, first)
        later = Request([*first.prompt, *tokens_of(events), 1, 2], sampled(max_tokens=4))
        engine.drafter = None
        [again] = run(engine, later)
        assert engine.prefix.hits == 2 and tokens_of(again) == tokens_of(alone(later))


def test_index_scores_of_drafts_have_their_room(monkeypatch):
    """Of 3 rows with 3 drafts each: 12 tokens, whose scores leave fewer pages."""
    monkeypatch.setattr(pages, "_free_memory", lambda: 190_000)
    for drafter, tokens in ((None, 3), (NGram(), 12)):
        llm = LLM(small_model(CONFIG), rows=3, cache_format="float32", drafter=drafter)
        sizes: dict[str, Any] = dict(format="float32", length=256, memory=190_000)
        assert llm.engine.cache.pages == pages_that_fit(CONFIG, batch=tokens, **sizes)
    assert pages_that_fit(CONFIG, batch=3, **sizes) > pages_that_fit(CONFIG, batch=12, **sizes)


@pytest.mark.slow
def test_settings_of_every_kind_hold_amid_drafts():
    """Penalties, for which no drafts are made though they would be right, beside biases and log-probabilities."""
    asked = [
        Request(prompt(20, 1), sampled(max_tokens=30, frequency_penalty=1.5, repetition_penalty=1.3)),
        Request(prompt(20, 2), sampled(max_tokens=30, logprobs=2, logit_bias={5: 3.0}, min_p=0.02)),
    ]
    engine = make(drafter=oracle(*asked))
    found, expected = run(engine, *asked), [alone(request) for request in asked]
    assert [tokens_of(events) for events in found] == [tokens_of(events) for events in expected]
    assert 5 < engine.stats().drafts_accepted < 29
    for event, plain in zip(found[1], expected[1], strict=True):
        assert event.model_log_prob == pytest.approx(plain.model_log_prob, abs=1e-5)
        assert [token for token, _ in event.top] == [token for token, _ in plain.top]


def broken_model():
    """A model that makes NaN of token 63."""
    graph, state = nnx.split(small_model(CONFIG))
    spoil = lambda path, x: x.at[63].set(jnp.nan) if "embed_tokens" in jax.tree_util.keystr(path) else x
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(spoil, state))


def test_nan_behind_a_draft_counts_if_the_draft_is_right():
    """Then the request ends as it does without drafts; of a wrong one nothing is left in the cache."""
    request = Request(prompt(62), sampled(temperature=3.0, seed=6, top_k=64, top_p=0.99, max_tokens=60))
    expected = run(make(broken_model()), request)[0]
    assert expected[-1].finished == "error" and len(expected) > 8 and expected[-2].token == 63
    right = np.int32(request.prompt).tobytes(), [*tokens_of(expected), 1, 1, 1]
    wrong = Fixed(np.full((1, 3), 63), np.full(1, 3))
    for drafter in (Oracle(dict([right])), wrong):
        engine = make(broken_model(), drafter=drafter)
        events = run(engine, request)[0]
        assert [event[:3] + event[5:] for event in events] == [event[:3] + event[5:] for event in expected]
        assert engine.stats().drafts_proposed > 8 and (engine.stats().drafts_accepted > 5) == (drafter is not wrong)


@pytest.mark.slow
def test_n_grams_are_right_about_what_repeats_itself():
    """Two that repeat themselves, and one of nothing that was there before: the same tokens, in fewer steps."""
    repeated = [Request(prompt(9, row) * 8, SamplingParams(temperature=0.0, max_tokens=80)) for row in (1, 2)]
    once = Request(list(range(64)), SamplingParams(temperature=0.0, max_tokens=20))
    engine = make(drafter=NGram())
    for request, events in zip([*repeated, once], run(engine, *repeated, once), strict=True):
        assert tokens_of(events) == tokens_of(alone(request))
    assert engine.stats().drafts_accepted > 20


@pytest.mark.slow
def test_no_program_is_compiled_after_warming_up():
    asked = [Request(prompt(30, row), SamplingParams(temperature=0.0, max_tokens=12)) for row in range(3)]
    engine = make(rows=2, drafter=oracle(*asked))
    engine.warm(kinds=["greedy"])
    with compilations() as names:
        run(engine, *asked)
    assert not names and engine.stats().drafts_accepted


def test_bad_engines_are_refused():
    runner = Runner(
        small_model(CONFIG), PagedCache(CONFIG, 2, format="float32"), max_length=256, batch_invariant=True
    )  # fmt: skip
    with pytest.raises(ValueError, match="drafter must be None with batch_invariant.*got NGram"):
        Engine(runner, drafter=NGram())
    for wrong in ("mtp", NGram):
        with unchecked(), pytest.raises(ValueError, match=r"drafter must be one such as NGram\(\) or MTP\(\), or None"):
            make(drafter=wrong)
    with unchecked(), pytest.raises(ValueError, match="budget must be more than the 8 tokens that 2 rows decode"):
        make(drafter=NGram(), budget=8)
