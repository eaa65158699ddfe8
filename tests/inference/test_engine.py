"""The engine against one request at a time: batches, pages that run out, ends of every kind, streams."""

import asyncio
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import the_first, unchecked
from engine_cases import (
    CHUNK,
    CONFIG,
    GREEDY,
    PAGES,
    alone,
    character_tokenizer,
    compilations,
    log_probs_of,
    make,
    prompt,
    run,
    tokens_of,
)
from flax import nnx
from model_cases import small_model
from tokenizers import Tokenizer, models, pre_tokenizers

from dsa_jax import OutOfPages, PagedCache, Runner, complete, save_hf
from dsa_jax.inference.engine import Engine
from dsa_jax.inference.llm import LLM, read_end_tokens
from dsa_jax.inference.params import Request, SamplingParams, StructuredOutputs

pytestmark = pytest.mark.usefixtures("in_a_hurry")

# What comes out


def test_outputs_are_those_of_complete():
    """Three at once, each by settings of its own, against `complete` of each alone."""
    settings = [
        dict(temperature=0.0), dict(temperature=1.0, seed=3, top_k=20), dict(temperature=0.8, seed=4, top_p=0.9),
    ]  # fmt: skip
    asked = [
        Request(prompt(66 + 4 * row, row), SamplingParams(max_tokens=6, **each)) for row, each in enumerate(settings)
    ]
    for request, own, events in zip(asked, settings, run(make(), *asked), strict=True):
        expected = complete(
            small_model(CONFIG), [request.prompt], max_new_tokens=6, prefill_chunk=CHUNK, dense_below=0, **own
        )
        assert tokens_of(events) == expected.tokens[0].tolist() and events[-1].finished == "length"
        np.testing.assert_allclose(log_probs_of(events), expected.log_probs[0], atol=1e-5)


@pytest.mark.slow
def test_continuations_of_one_prompt_draw_with_seeds_of_their_own():
    """The prompt's full pages are computed once."""
    engine = make()
    params = SamplingParams(seed=2**32 - 1, n=3, max_tokens=6)
    [events] = run(engine, Request(prompt(130), params))
    for index, seed in enumerate((2**32 - 1, 0, 1)):
        assert tokens_of(events, index) == tokens_of(
            alone(Request(prompt(130), SamplingParams(seed=seed, max_tokens=6)))
        )
    assert len({tuple(tokens_of(events, index)) for index in range(3)}) == 3
    assert (engine.prefix.hits, engine.prefix.asked) == (4, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "rows"), the_first(1, [(40, 8), (20, 4)]))
def test_many_requests_and_cancels_with_pages_for_few(count, rows):
    """Of random lengths, a few at a time, on a fraction of their pages: as alone, or cut short by their cancels."""
    rng = np.random.default_rng(0)
    pages = PAGES * rows // 8
    engine = make(rows=rows, pages=pages)
    params = [SamplingParams(seed=row, top_k=20, max_tokens=int(rng.integers(1, 100))) for row in range(count)]
    asked = [Request(prompt(int(rng.integers(1, 120)), row % 9), each) for row, each in enumerate(params)]
    needed = sum(-(-(len(each.prompt) + each.params.max_tokens - 1) // 64) for each in asked)
    assert needed > 4 * pages
    last = 300 * count // 40
    cancels = [(int(rng.integers(0, last)), place) for place in rng.choice(count, count // 3, replace=False).tolist()]
    found = run(engine, *asked, cancels=cancels)
    ends = [events[-1].finished for events in found]
    assert set(ends) == {"length", "cancelled"} and engine.scheduler.preemptions and engine.prefix.hits
    for request, events in zip(asked, found, strict=True):
        expected = tokens_of(alone(request))
        tokens = tokens_of(events)
        assert tokens == expected[: len(tokens)]
        assert len(tokens) == len(expected) or events[-1].finished == "cancelled"
    engine.prefix.clear()
    assert engine.cache.free_pages == pages and not engine.cache.sequences


@pytest.mark.slow
@pytest.mark.parametrize("invariant", the_first(1, [True, False]))
def test_preemption_loses_and_repeats_nothing(invariant):
    """Four that outgrow the pages together; under `batch_invariant` to the last bit."""
    engine = make(pages=6, invariant=invariant, tokenizer=character_tokenizer())
    settings = [
        dict(top_k=20),
        dict(temperature=0.0, logprobs=2),
        dict(top_k=20, repetition_penalty=1.2, frequency_penalty=0.1),
        dict(top_p=0.9, structured_outputs=StructuredOutputs(regex="[a-z0-9]{500}")),
    ]  # kinds of draw differ
    asked = [Request(prompt(50, row), SamplingParams(seed=row, max_tokens=80, **settings[row])) for row in range(4)]
    found = run(engine, *asked)
    assert engine.scheduler.preemptions
    for request, events in zip(asked[1:], found[1:], strict=True):
        expected = alone(request, invariant)
        assert tokens_of(events) == tokens_of(expected) and len(tokens_of(events)) == 80
        if invariant:
            assert log_probs_of(events).tobytes() == log_probs_of(expected).tobytes()


# Steps


def watch(engine, monkeypatch):
    """Lists what the engine does: tokens of prompts that a step takes, rows that it decodes, and what it reads."""
    log: list[tuple[str, int]] = []
    prefill, decode, read = engine.runner.prefill, engine.runner.decode_slots, engine._read

    def logged_prefill(sequences, chunks, **options):
        log.append(("prefill", sum(map(len, chunks))))
        return prefill(sequences, chunks, **options)

    def logged_decode(last, packed, *arguments, **options):
        log.append(("decode", int(np.sum(packed[3]))))  # rows that live
        return decode(last, packed, *arguments, **options)

    def logged_read(ran):
        log.append(("read", sum(work is not None for work in ran.rows)))
        return read(ran)

    monkeypatch.setattr(engine.runner, "prefill", logged_prefill)
    monkeypatch.setattr(engine.runner, "decode_slots", logged_decode)
    monkeypatch.setattr(engine, "_read", logged_read)
    return log


def test_a_long_prompt_delays_others_by_a_chunk_at_most(monkeypatch):
    """What decodes does so in every step, though 200 tokens of a prompt come beside it."""
    engine = make()
    engine.add(Request(prompt(20), SamplingParams(temperature=0.0, max_tokens=20)))
    for _ in range(3):
        engine.step()
    log = watch(engine, monkeypatch)
    engine.add(Request(prompt(200, 1), GREEDY))
    seen = [engine.step() for _ in range(8)]
    assert all(any(token.request == 0 for token in tokens) for tokens in seen)
    work = [each for each in log if each[0] != "read"]
    assert work[:12] == [("prefill", 32), ("decode", 1)] * 6 and work[12:] == [
        ("prefill", 8),
        ("decode", 1),
        ("decode", 2),
    ]


def test_a_step_is_dispatched_before_the_last_one_is_read(monkeypatch):
    engine = make()
    log = watch(engine, monkeypatch)
    run(engine, Request(prompt(20), SamplingParams(temperature=0.0, max_tokens=4)))
    kinds = [kind for kind, _ in log]
    assert kinds == ["prefill", "decode", "read", "decode", "read", "decode", "read", "read"]


def test_no_program_is_compiled_after_warming_up():
    """However many prompts are in a step, and however many of them end there."""
    engine = make(rows=4)
    engine.warm(kinds=["greedy", "random"])
    asked = [Request(prompt(length, length), GREEDY) for length in (1, 40, 100, 33, 7, 5, 4, 3)]
    with compilations() as names:
        run(engine, *asked)
        run(engine, *(dataclasses.replace(each, params=SamplingParams(seed=1, max_tokens=5)) for each in asked[:3]))
    assert not names


# Prefixes


def test_prefixes_are_reused_within_a_salt_and_forgotten_when_pages_are_wanted():
    engine = make()
    first = prompt(140)
    [events] = run(engine, Request(first, SamplingParams(temperature=0.0, max_tokens=60), salt="a"))
    assert (engine.prefix.hits, engine.prefix.asked) == (0, 2)
    later = Request([*first, *tokens_of(events), 1], GREEDY, salt="a")  # a conversation: the answer's pages count too
    [again] = run(engine, later)
    assert (engine.prefix.hits, engine.prefix.asked) == (3, 5)
    assert tokens_of(again) == tokens_of(alone(later))
    run(engine, Request(later.prompt, GREEDY, salt="b"), Request(later.prompt, GREEDY))
    assert engine.prefix.hits == 3
    assert not engine.prefix.evicted
    run(engine, *(Request(prompt(200, row), GREEDY) for row in range(1, 4)))
    assert engine.prefix.evicted
    run(engine, later)
    assert engine.prefix.hits == 3, "the longest unused are gone"


@pytest.mark.slow
def test_under_batch_invariant_a_prefix_changes_no_bit():
    """Pages of prompts alone are reused: what decode steps have written may differ in the last bits."""
    engine = make(invariant=True)
    params = SamplingParams(seed=1, top_k=20, max_tokens=40)
    first = Request(prompt(100), params)
    [events] = run(engine, first)
    later = Request([*first.prompt, *tokens_of(events), 1], params)
    [again] = run(engine, later)
    assert engine.prefix.hits == 1
    assert log_probs_of(again).tobytes() == log_probs_of(alone(later, invariant=True)).tobytes()


# Ends and errors


def test_stop_tokens_end_and_count_among_the_tokens():
    free = tokens_of(alone(Request(prompt(70), GREEDY)))
    stop = free[2]
    at = free.index(stop)
    params = SamplingParams(temperature=0.0, max_tokens=6, stop_token_ids=[stop])
    engine = make(end_tokens=[free[3]])
    [stopped] = run(engine, Request(prompt(70), params))
    assert tokens_of(stopped) == free[: at + 1] and stopped[-1].finished == "stop"
    [ended] = run(engine, Request(prompt(70), GREEDY))
    assert tokens_of(ended) == free[: free.index(free[3]) + 1]
    go_on = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    assert tokens_of(run(engine, Request(prompt(70), go_on))[0]) == free


def test_before_min_tokens_no_stop_token_is_drawn():
    """All but four tokens are stops, some of them the engine's own."""
    engine = make(end_tokens=range(30))
    for temperature in (0.0, 1.0):
        params = SamplingParams(
            temperature=temperature, seed=1, max_tokens=40, stop_token_ids=range(30, 60), min_tokens=4
        )
        [events] = run(engine, Request(prompt(70), params))
        *others, last = tokens_of(events)
        assert len(others) >= 4 and min(others) >= 60 and last < 60 and events[-1].finished == "stop"
    [events] = run(engine, Request(prompt(70), dataclasses.replace(params, ignore_eos=True)))
    assert min(tokens_of(events)[:4]) < 30, "whose end tokens are ignored may draw them"


class Letters:
    """Has a token for each letter, and encodes none."""

    def decode(self, ids):
        return "".join(chr(ord("A") + token) for token in ids)


def test_stop_strings_end_across_tokens_and_are_left_out():
    engine = make(tokenizer=Letters())
    [events] = run(engine, Request(prompt(70), GREEDY))
    text = "".join(event.text for event in events)
    assert text == Letters().decode(tokens_of(events))
    held = SamplingParams(temperature=0.0, max_tokens=6, stop=text[-1] + "?")
    assert "".join(event.text for event in run(engine, Request(prompt(70), held))[0]) == text
    params = SamplingParams(temperature=0.0, max_tokens=6, stop=text[2:4])
    [stopped] = run(engine, Request(prompt(70), params))
    at = text.index(text[2:4])
    assert "".join(event.text for event in stopped) == text[:at]
    assert len(tokens_of(stopped)) == at + 2 and stopped[-1].finished == "stop"


def broken_model():
    """A model that makes NaN of token 63."""
    graph, state = nnx.split(small_model(CONFIG))
    spoil = lambda path, x: x.at[63].set(jnp.nan) if "embed_tokens" in jax.tree_util.keystr(path) else x
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(spoil, state))


def test_a_request_of_nan_ends_and_the_others_go_on():
    """Nothing of it is kept for others."""
    engine = make(broken_model())
    clean = [Request([token % 63 for token in prompt(70, row)], GREEDY) for row in range(2)]
    found = run(engine, clean[0], Request([*clean[0].prompt[:66], 63], GREEDY), clean[1])
    assert found[1][-1].finished == "error" and "request 1" in found[1][-1].error and "NaN" in found[1][-1].error
    assert tokens_of(found[1]) == []
    for request, events in zip(clean, (found[0], found[2]), strict=True):
        assert tokens_of(events) == tokens_of(alone(request))
    before = len(engine.prefix)
    [events] = run(engine, Request([63] * 130, GREEDY))
    assert events[-1].finished == "error" and len(engine.prefix) == before


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request(prompt(200), SamplingParams(max_tokens=57)), ValueError, ["request 0", "256", "200 + 57"]),
        (Request(prompt(256), SamplingParams(max_tokens=None)), ValueError, ["request 0", "256"]),
        (Request([]), ValueError, ["at least one"]),
        (Request([64]), ValueError, ["64"]),
        (Request("text"), ValueError, ["request 0", "tokenizer"]),
        (Request([1], SamplingParams(stop="x")), ValueError, ["request 0", "tokenizer"]),
    ],
    ids=str,
)
def test_bad_requests_are_refused_when_added(request_, error, words):
    engine = make()
    with unchecked(), pytest.raises(error) as caught:
        engine.add(request_)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not engine.busy


def test_a_request_that_can_never_fit_is_refused():
    runner = Runner(small_model(CONFIG), PagedCache(CONFIG, 2, format="float32"), max_length=256)
    engine = Engine(runner)
    engine.add(Request(prompt(100), SamplingParams(max_tokens=29)))
    with pytest.raises(OutOfPages, match="request 1 needs 3 pages, got 2 in the cache"):
        engine.add(Request(prompt(100), SamplingParams(max_tokens=30)))
    assert engine._check(0, Request(prompt(100), SamplingParams(max_tokens=None)))[1] == 29


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=-2), dict(top_p=0), dict(top_p=1.1), dict(n=0),
        dict(max_tokens=0), dict(min_tokens=-1), dict(min_tokens=17), dict(stop=["a", ""]), dict(stop=[3]),
        dict(temperature="0"), dict(seed=1.5), dict(n=True), dict(max_tokens=2.0), dict(stop_token_ids=(1.5,)),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be .*, got "):
        SamplingParams(**options)


def test_bad_engines_are_refused():
    runner = Runner(small_model(CONFIG), PagedCache(CONFIG, 2, format="float32"))
    with pytest.raises(ValueError, match="max_length"):
        Engine(runner)
    with pytest.raises(ValueError, match="rows must be at most 64 a shard with batch_invariant, got 65"):
        make(invariant=True, rows=65)


def test_the_check_finds_a_page_that_nobody_should_have():
    engine = make()
    engine.cache.extend(engine.cache.new(), 1)
    engine.add(Request([1], SamplingParams(temperature=0.0, max_tokens=1)))
    with pytest.raises(AssertionError):
        while engine.busy:
            engine.step()


# Streams


def test_streams_yield_tokens_as_they_come_and_who_leaves_frees_its_pages():
    engine = make(reuse_prefixes=False)

    async def read(request, most=None):
        found = []
        stream = engine.stream(request)
        async for token in stream:
            found.append(token)
            if len(found) == most:
                break
        await stream.aclose()
        return found

    async def both():
        long = Request(prompt(70, 1), SamplingParams(temperature=0.0, max_tokens=100))
        return await asyncio.gather(read(Request(prompt(70), GREEDY)), read(long, most=2))

    whole, part = asyncio.run(both())
    assert tokens_of(whole) == tokens_of(alone(Request(prompt(70), GREEDY)))
    assert len(part) == 2 and all(token.finished is None for token in part)
    for _ in range(2):
        engine.step()
    assert not engine.busy and engine.cache.free_pages == PAGES and not engine._queues
    again = asyncio.run(read(Request(prompt(70), GREEDY)))
    assert tokens_of(again) == tokens_of(whole), "another event loop takes it up"


def test_a_step_that_fails_ends_the_streams(monkeypatch):
    engine = make()

    def fail(*_, **__):
        raise OSError("the device is gone")

    monkeypatch.setattr(engine.runner, "prefill", fail)

    async def read():
        async for _ in engine.stream(Request([1], GREEDY)):
            pass

    with pytest.raises(RuntimeError, match="request 0 has ended: a step has failed: the device is gone"):
        asyncio.run(asyncio.wait_for(read(), 60))


# LLM


def test_a_folder_continues_texts(tmp_path):
    words = {f"w{number}": number for number in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save_hf(small_model(CONFIG), tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    expected = tokens_of(alone(Request(prompt(20), GREEDY)))
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {expected[4]}}}')
    assert read_end_tokens(tmp_path) == [expected[4]]
    expected = expected[: expected.index(expected[4]) + 1]
    llm = LLM(tmp_path, pages=PAGES, rows=4, prefill_chunk=CHUNK, max_length=256)
    text = " ".join(f"w{token}" for token in prompt(20))
    [result] = llm.generate(text, GREEDY)
    [output] = result.outputs
    assert output.tokens == expected and output.finished == "stop" and len(output.log_probs) == len(expected)
    assert output.text == tokenizer.decode(expected[:-1])
    two = llm.generate([prompt(20), text], [GREEDY, SamplingParams(temperature=0.0, max_tokens=2, n=2)])
    assert [[each.tokens for each in one.outputs] for one in two] == [[expected], [expected[:2]] * 2]


def test_prompts_run_together_or_not_at_all():
    llm = LLM(small_model(CONFIG), pages=PAGES, rows=4, prefill_chunk=CHUNK)
    with unchecked(), pytest.raises(ValueError, match="99"):
        llm.generate([[1, 2], [99]], GREEDY)
    with pytest.raises(ValueError, match="each of the 2 prompts, got 1"):
        llm.generate([[1], [2]], [GREEDY])
    while llm.engine.busy:
        assert all(token.finished == "cancelled" for token in llm.engine.step())
