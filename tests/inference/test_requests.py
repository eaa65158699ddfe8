"""What requests may ask for beside tokens: changed logits, scores, grammars, records; and exchanged weights."""

import asyncio
import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import unchecked
from engine_cases import (
    CHUNK,
    CONFIG,
    END,
    GREEDY,
    PAGES,
    alone,
    character_tokenizer,
    log_probs_by_model,
    log_probs_of,
    make,
    prompt,
    run,
    tokens_of,
)
from flax import nnx
from model_cases import small_model

from dsa_jax import LLM, Request, SamplingParams, StructuredOutputs, complete
from dsa_jax.inference import structured

pytestmark = pytest.mark.usefixtures("in_a_hurry")

PLAIN = dict(temperature=0.0, max_tokens=12)


# Changed logits


def greedy_by_definition(ids, params, stops=()):
    """Continues a prompt by the model's own log-probabilities and NumPy."""
    output = []
    while len(output) < params.max_tokens:
        x = log_probs_by_model([*ids, *output])[-1]
        for token in {*ids, *output}:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        for token in set(output):
            x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
        for token, bias in params.logit_bias.items():
            x[token] += bias
        if len(output) < params.min_tokens:
            x[list(stops)] = -np.inf
        output.append(int(x.argmax()))
    return output


@pytest.mark.slow
def test_changed_logits_are_counted_from_step_to_step():
    """Beside a plain request; those that sum log-probabilities do not depend on the logits' level, so no repetition."""
    params = [
        SamplingParams(**PLAIN, frequency_penalty=1.5, presence_penalty=0.5),
        SamplingParams(**PLAIN, logit_bias={token: 4.0 for token in range(5)}, frequency_penalty=0.7),
        SamplingParams(**PLAIN, min_p=0.5),
    ]
    ids = prompt(40)
    found = run(make(), *(Request(ids, each) for each in params))
    plain = tokens_of(alone(Request(ids, SamplingParams(**PLAIN))))
    assert tokens_of(found[2]) == plain
    for each, events in zip(params[:2], found[:2], strict=True):
        assert tokens_of(events) == greedy_by_definition(ids, each) != plain


def test_repeated_tokens_are_penalised_in_prompt_and_continuation():
    ids = prompt(40)
    params = SamplingParams(**PLAIN, repetition_penalty=1e6)
    [events] = run(make(), Request(ids, params))
    found = tokens_of(events)
    assert len({*found}) == len(found) and not {*found} & {*ids}, "no token comes while others are positive"


@pytest.mark.slow
def test_under_batch_invariant_controls_keep_their_bits():
    """Beside plain rows and those of another kind."""
    own = SamplingParams(seed=1, max_tokens=8, frequency_penalty=0.5, min_p=0.01, logprobs=3)
    others = [SamplingParams(seed=2, max_tokens=5, top_k=4), SamplingParams(**PLAIN)]
    asked = [Request(prompt(40, row), each) for row, each in enumerate([own, *others])]
    for request, events in zip(asked, run(make(invariant=True), *asked), strict=True):
        expected = alone(request, invariant=True)
        for event, own in zip(events, expected, strict=True):
            assert event._replace(request=0, text="") == own._replace(request=0, text="")


# Scores


def check_top(top, log_probs, count):
    """The likeliest ids and their log-probabilities."""
    assert [token for token, _ in top] == np.argsort(-log_probs, kind="stable")[:count].tolist()
    np.testing.assert_allclose([value for _, value in top], np.sort(log_probs)[::-1][:count], atol=1e-4)


def test_log_probabilities_are_the_model_s_own():
    """Whatever the draw's are."""
    params = SamplingParams(seed=1, temperature=0.5, top_k=3, frequency_penalty=1.0, max_tokens=6, logprobs=4)
    few, none = dataclasses.replace(params, logprobs=0), dataclasses.replace(params, logprobs=None)
    found = run(make(), *(Request(prompt(40), each) for each in (params, few, none)))
    tokens = tokens_of(found[0])
    log_probs = log_probs_by_model([*prompt(40), *tokens])[39:]
    for place, (whole, short, bare) in enumerate(zip(*found, strict=True)):
        np.testing.assert_allclose(whole.model_log_prob, log_probs[place, tokens[place]], atol=1e-4)
        check_top(whole.top, log_probs[place], 4)
        np.testing.assert_allclose(short.model_log_prob, whole.model_log_prob, atol=1e-5)  # rows of a batch: last bits
        assert (short.token, short.top) == (whole.token, ())
        assert (bare.token, bare.model_log_prob, bare.top) == (whole.token, None, None)
    assert abs(found[0][1].log_prob - found[0][1].model_log_prob) > 1e-3


def test_prompts_are_scored_in_chunks_beside_other_requests():
    """Over 70 tokens in chunks of 32; with the first token of the request, and without a known prefix."""
    engine = make()
    ids = prompt(70)
    run(engine, Request(ids, GREEDY))
    asked = engine.prefix.asked
    score = SamplingParams(max_tokens=0, prompt_logprobs=3)
    both = SamplingParams(**PLAIN, prompt_logprobs=0, n=2)
    others = Request(prompt(40, 1), GREEDY), Request(ids[:50], both), Request([5], score)
    found = run(engine, Request(ids, score), *others)
    assert engine.prefix.asked == asked, "the pages of 70 and of 50 tokens are computed anew"
    assert [(event.token, event.finished, event.text) for event in found[0]] == [(None, "length", "")]
    log_probs = log_probs_by_model(ids)
    for events, count, length in ((found[0], 3, 70), (found[2], 0, 50)):
        first, *others = events
        assert first.index == 0 and len(first.prompt) == length and not any(event.prompt for event in others)
        assert first.prompt[0] == (ids[0], None, None)
        for place, (token, log_prob, top) in enumerate(first.prompt[1:]):
            assert token == ids[place + 1]
            np.testing.assert_allclose(log_prob, log_probs[place, token], atol=1e-4)
            check_top(top, log_probs[place], count)
    assert tokens_of(found[2]) == tokens_of(found[2], 1) == tokens_of(alone(Request(ids[:50], SamplingParams(**PLAIN))))
    assert found[3][0].prompt == ((5, None, None),)
    assert not any(event.prompt for event in found[1])


def test_a_cancelled_request_tells_of_no_prompt():
    engine = make()
    [events] = run(engine, Request(prompt(100), SamplingParams(max_tokens=0, prompt_logprobs=1)), cancels=[(2, 0)])
    assert [(event.finished, event.prompt) for event in events] == [("cancelled", None)]


# Grammars

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["deep", "sparse"]}, "layers": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "layers"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def structured_params(wanted=None, **options):
    outputs = StructuredOutputs(**({"json": SCHEMA} if wanted is None else wanted))
    return SamplingParams(**(dict(seed=3, max_tokens=60, structured_outputs=outputs) | options))


def text_of(events):
    return "".join(event.text for event in events)


def test_texts_are_of_their_grammar_and_others_go_on_every_step():
    engine = make(tokenizer=character_tokenizer(), end_tokens=[END])
    free = Request(prompt(40), SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    names = [engine.add(free), engine.add(Request(prompt(40, 1), structured_params()))]
    found, steps = {name: [] for name in names}, []
    while engine.busy:
        tokens = engine.step()
        steps.append([token.request for token in tokens])
        for token in tokens:
            found[token.request].append(token)
    answer = json.loads(text_of(found[1]))
    assert answer["name"] in SCHEMA["properties"]["name"]["enum"] and 0 <= answer["layers"] <= 99
    assert found[1][-1].finished == "stop" and 15 < len(found[1]) < 40
    assert [event.token for event in found[0]] == tokens_of(alone(free))
    of_free = [number for number, step in enumerate(steps) if 0 in step]
    assert len(of_free) == 40 and of_free[-1] - of_free[0] == 39, "the free one has a token at every step"
    of_structured = [number for number, step in enumerate(steps) if 1 in step]
    assert {b - a for a, b in zip(of_structured, of_structured[1:], strict=False)} == {2}


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (dict(regex="[a-c]{3}-[0-9]{2}"), lambda text: len(text) == 6 and text[3] == "-"),
        (dict(grammar='start: "ab" | "cd" start'), lambda text: text.replace("cd", "") == "ab"),
        (dict(regex="x{2,}"), lambda text: set(text) == {"x"} and len(text) >= 2),
        (dict(json='{"const": "a-1"}'), lambda text: json.loads(text) == "a-1"),
    ],
    ids=["regex", "Lark", "repetition", "JSON"],
)
def test_every_kind_of_grammar(wanted, fits):
    """Greedy too: the likeliest token of those that may come."""
    engine = make(tokenizer=character_tokenizer(), end_tokens=[END])
    asked = [Request(prompt(40), structured_params(wanted, temperature=each)) for each in (0.0, 1.0)]
    for events in run(engine, *asked):
        assert fits(text_of(events)) and events[-1].finished == "stop", text_of(events)
        assert np.isfinite(log_probs_of(events)).all()


def test_a_json_object_begins_and_what_is_cut_short_says_so():
    engine = make(tokenizer=character_tokenizer(), end_tokens=[END])
    [events] = run(engine, Request(prompt(40), structured_params(dict(json_object=True), max_tokens=5)))
    assert text_of(events)[0] == "{" and events[-1].finished == "length" and len(events) == 5


def test_where_no_token_may_come_the_request_ends_and_says_why():
    """A grammar that wants what `min_tokens` forbids."""
    engine = make(tokenizer=character_tokenizer())
    stop = character_tokenizer().token_to_id("b")
    params = structured_params(dict(regex="ab"), min_tokens=5, stop_token_ids=[stop])
    [events, others] = run(engine, Request(prompt(40), params), Request(prompt(40), GREEDY))
    assert events[-1].error == "request 0 has ended: no token may be drawn at token 1"
    assert others[-1].finished == "length"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (dict(regex="[a"), ["regex", "unclosed character class"]),
        (dict(json={"type": "nonsense"}), ["json", "nonsense"]),
        (dict(json='{"type": '), ["json"]),
        (dict(json={"a": {1}}), ["json", "serializable"]),
        (dict(grammar="start: b"), ["grammar", "unknown name"]),
        (dict(regex="a" * 70000), ["regex", "65536", "70000"]),
        (dict(regex="\ud800"), ["regex", "surrogate"]),
        (dict(json={"$ref": "https://example.com/schema.json"}), ["json", "retrieving it failed"]),
        (dict(grammar="start: " + "(" * 20000), ["grammar"]),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_grammars_are_refused_in_one_line(wanted, words):
    engine = make(tokenizer=character_tokenizer())
    with unchecked(), pytest.raises(ValueError) as caught:
        engine.add(Request([1], structured_params(wanted)))
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message and len(message) < 1000, message
    assert not engine.busy


def test_a_slow_grammar_delays_nobody_and_is_given_up(monkeypatch):
    """Its compilation ends when the other request has."""
    engine = make(tokenizer=character_tokenizer())
    release = threading.Event()
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 60.0)
    compile = structured.Grammars._compile
    monkeypatch.setattr(structured.Grammars, "_compile", lambda *each: release.wait(60) and compile(*each))

    async def read(request):
        return [token async for token in engine.stream(request)]

    async def both():
        slow = asyncio.create_task(read(Request(prompt(40), structured_params(dict(regex="abc")))))
        found = await read(Request(prompt(40), GREEDY))
        assert not slow.done()
        release.set()
        return found, await slow

    found, slow = asyncio.run(both())
    assert len(found) == 6 and text_of(slow) == "abc"
    release.clear()
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 0.01)
    with pytest.raises(ValueError, match="regex must compile within 0.01 seconds"):
        engine.add(Request([1], structured_params(dict(regex="abcd"))))
    release.set()


def test_without_a_tokenizer_or_with_several_grammars_it_is_refused():
    with pytest.raises(ValueError, match=r"structured_outputs need a tokenizers\.Tokenizer, got NoneType"):
        make().add(Request([1], structured_params()))
    with pytest.raises(ValueError, match=r"must be one of json, regex, grammar, json_object, got \['json', 'regex'\]"):
        StructuredOutputs(json={}, regex="a")
    with pytest.raises(ValueError, match=r"must be one of json, regex, grammar, json_object, got \[\]"):
        StructuredOutputs()


# Records


@pytest.mark.slow
def test_records_are_those_of_complete_and_replay_gives_the_same_distribution():
    """Four that outgrow the pages: what is computed anew keeps the records that led to its tokens."""
    model = small_model(dataclasses.replace(CONFIG, first_k_dense_replace=1))
    engine = make(model, traced=True)
    options = dict(top_k=20, return_selected=True, return_routed=True, return_kept=True)
    asked = [Request(prompt(100, row), SamplingParams(seed=row, max_tokens=100, **options)) for row in range(4)]
    found = run(engine, *asked, Request(prompt(100), GREEDY))
    assert engine.scheduler.preemptions
    expected = complete(
        model, [asked[0].prompt], max_new_tokens=100, prefill_chunk=CHUNK, dense_below=0, seed=[0], **options
    )
    record = found[0][-1].record
    assert not any(event.record for event in found[0][:-1]) and found[4][-1].record is None
    assert tokens_of(found[0]) == expected.tokens[0].tolist()
    np.testing.assert_array_equal(record.selected, expected.selected[0])
    np.testing.assert_array_equal(record.routed, expected.routed[0])
    assert [each.tolist() for each in record.kept] == [each.tolist() for each in expected.kept[0]]
    tokens = jnp.asarray([[*asked[3].prompt, *tokens_of(found[3])[:-1]]])
    record = found[3][-1].record
    out = model(tokens, selected=jnp.asarray(record.selected)[:, None], routed=jnp.asarray(record.routed)[:, None])
    logits = np.asarray(model.unembed(out.hidden)[0, 99:], np.float64)
    for place, (event, kept) in enumerate(zip(found[3], record.kept, strict=True)):
        log_prob = logits[place, event.token] - np.log(np.exp(logits[place, kept]).sum())
        np.testing.assert_allclose(event.log_prob, log_prob, atol=1e-4)


def test_records_that_the_runner_does_not_make_are_refused():
    with pytest.raises(ValueError, match="return_routed needs layers with experts"):
        make(traced=True)
    with pytest.raises(ValueError, match="request 0 wants return_routed: .* got False"):
        make().add(Request([1], SamplingParams(return_routed=True)))


# Weights, pauses, counts


def other_model(scale=0.5):
    """The model with another unembedding."""
    graph, state = nnx.split(small_model(CONFIG))
    change = lambda path, x: x[::-1] * scale if "embed" in jax.tree_util.keystr(path) else x
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(change, state))


def test_exchanged_weights_continue_what_runs():
    engine, model = make(), other_model()
    ids = prompt(70)
    events = []
    engine.add(Request(ids, SamplingParams(temperature=0.0, max_tokens=20)))
    while len(events) < 5:
        events += engine.step()
    assert len(engine.prefix) == 1
    engine.update_weights(model)
    assert not len(engine.prefix) and engine.stats().weights_version == 1
    while engine.busy:
        events += engine.step()
    tokens = [event.token for event in events]
    before = tokens_of(alone(Request(ids, SamplingParams(temperature=0.0, max_tokens=20))))
    change = next(place for place in range(20) if tokens[place] != before[place])
    assert 5 <= change <= 8, "what was read, and the steps under way"
    log_probs = log_probs_by_model([*ids, *tokens], model)[69:]
    assert tokens[change:] == log_probs[change:20].argmax(-1).tolist()
    [again] = run(engine, Request(ids, GREEDY))
    assert tokens_of(again) == tokens_of(run(make(model), Request(ids, GREEDY))[0])
    engine.update_weights(nnx.split(small_model(CONFIG))[1])
    assert tokens_of(run(engine, Request(ids, GREEDY))[0]) == tokens_of(alone(Request(ids, GREEDY)))


def test_weights_of_other_shapes_are_refused_by_name():
    engine = make()
    _, state = nnx.split(small_model(CONFIG))
    short = jax.tree_util.tree_map_with_path(
        lambda path, x: x[..., :3] if "lm_head" in jax.tree_util.keystr(path) else x, state
    )
    with pytest.raises(ValueError, match=r"lm_head.* must be float32 \(32, 64\), got float32 \(32, 3\)"):
        engine.update_weights(short)
    invariant = make(invariant=True)
    invariant.add(Request(prompt(40), GREEDY))
    for preempt in (lambda: None, invariant.scheduler.preempt_all):
        for _ in range(3):
            invariant.step()
        preempt()
        with pytest.raises(ValueError, match="batch_invariant needs that nothing runs, got 1"):
            invariant.update_weights(state)


def test_a_pause_begins_no_step_and_loses_nothing(monkeypatch):
    engine = make()
    engine.add(Request(prompt(40), GREEDY))
    gone = engine.add(Request(prompt(40, 1), GREEDY))
    events = [token for _ in range(4) for token in engine.step()]
    engine.pause()
    events += engine.step()  # reads what was begun
    ran = []
    run_plan = engine._batch.run
    monkeypatch.setattr(engine._batch, "run", lambda plan: ran.append(plan) or run_plan(plan))
    engine.cancel(gone)
    during = [token for _ in range(2) for token in engine.step()]
    assert [token.finished for token in during] == ["cancelled"] and engine.busy
    assert not any(plan.decode or plan.prefill for plan in ran)
    engine.resume()
    while engine.busy:
        events += engine.step()
    assert [token.token for token in events if token.request == 0] == tokens_of(alone(Request(prompt(40), GREEDY)))


def test_stats_count_what_was_done():
    engine = make()
    before = engine.stats()
    assert (before.queued, before.running, before.pages, before.pages_used) == (0, 0, PAGES, 0)
    engine.add(Request(prompt(70), SamplingParams(temperature=0.0, max_tokens=5, n=2)))
    assert engine.stats().queued == 2
    engine.step()
    during = engine.stats()
    assert (during.queued, during.running, during.pages_used, during.prompt_tokens) == (1, 1, 1, 70)
    while engine.busy:
        engine.step()
    after = engine.stats()
    assert (after.queued, after.running, after.pages_used, after.pages_kept) == (0, 0, 1, 1)
    assert (after.generated_tokens, after.prefix_hits, after.prefix_asked, after.preemptions) == (10, 1, 2, 0)


# Settings


@pytest.mark.parametrize(
    "options",
    [
        dict(min_p=-0.1), dict(min_p=1.1), dict(repetition_penalty=0), dict(repetition_penalty=float("inf")),
        dict(presence_penalty=2.1), dict(frequency_penalty=float("nan")), dict(logit_bias={1: 101.0}),
        dict(logit_bias={token: 1.0 for token in range(513)}), dict(logprobs=-1), dict(logprobs=21),
        dict(prompt_logprobs=21), dict(max_tokens=-1, prompt_logprobs=1),
    ],
    ids=lambda options: str(options)[:40],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be .*, got "):
        SamplingParams(**options)


def test_tokens_outside_the_vocabulary_are_refused():
    engine = make()
    for options in (dict(logit_bias={64: 1.0}), dict(stop_token_ids=[-1])):
        with pytest.raises(ValueError, match=rf"^{next(iter(options))} must be tokens in \[0, 64\), got (64|-1)$"):
            engine.add(Request([1], SamplingParams(**options)))
    with pytest.raises(ValueError, match="at most 512 tokens, got 513"):
        biases = {token: 1.0 for token in range(512)}
        wide = make()
        wide.runner.config = dataclasses.replace(CONFIG, vocab_size=1024)
        wide.add(Request([1], SamplingParams(logit_bias=biases, stop_token_ids=[1], min_tokens=1)))


def test_llm_hands_all_of_it_on():
    llm = LLM(
        small_model(CONFIG), pages=PAGES, rows=4, prefill_chunk=CHUNK, max_length=256,
        tokenizer=character_tokenizer(),
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2, prompt_logprobs=1, return_kept=True)
    [result] = llm.generate([prompt(40)], params)
    [output] = result.outputs
    assert len(output.tokens) == len(output.top) == len(output.model_log_probs) == 4 and output.finished == "length"
    assert [token.token for token in result.prompt_tokens] == prompt(40)
    assert output.record[:2] == (None, None) and [len(kept) for kept in output.record.kept] == [64] * 4
    assert [top[0][0] for top in output.top] == output.tokens
    text = llm.generate("ab<end>", GREEDY)[0]
    assert text.prompt == "ab<end>" and len(text.outputs[0].tokens) == 6
