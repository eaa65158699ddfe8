"""What the endpoints make of requests and of tokens, with an engine that says what the test has written."""

import asyncio
import json
import math

import pytest
from serving_cases import SPECIAL, ScriptedEngine, client_of, ids_of, make_service

from dsa_jax.inference.params import StructuredOutputs

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
THINKING = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}{% if thinking %}<think>{% else %}</think>{% endif %}"
)
V31 = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'


@pytest.fixture
def service(tmp_path):
    return make_service(ScriptedEngine(), tmp_path)


def thinking_service(folder, text):
    """A service whose template thinks and calls, in the manner of V3.1."""
    (folder / "chat_template.jinja").write_text(THINKING + "{# <｜tool▁calls▁begin｜> <think> </think> #}")
    return make_service(ScriptedEngine(text), folder)


def post(service, path, **body):
    async def sent():
        async with client_of(service) as client:
            return await client.post(path, json=body)

    return asyncio.run(sent())


def complete(service, **body):
    return post(service, "/v1/completions", **{"prompt": "he"} | body)


def chat(service, **body):
    return post(service, "/v1/chat/completions", **{"messages": HELLO} | body)


def answer(response):
    assert response.status_code == 200, response.text
    return response.json()


def refusal(response, status=400):
    assert response.status_code == status, response.text
    return response.json()["error"]


def events(response):
    """The events of a stream, which must end well."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


# Completions


def test_a_completion_has_openais_fields(service):
    data = answer(complete(service))
    assert data["object"] == "text_completion" and data["model"] == "tiny" and data["id"].startswith("cmpl-")
    assert data["choices"] == [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}]
    assert data["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert answer(complete(service, max_tokens=2))["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("he</s>", [ids_of("he") + [27, 14, 82, 29]]),
        (["he", "lo"], [[256], [257]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("é", [ids_of("é")]),
        ("\x00\x07\x1b", [ids_of("\x00\x07\x1b")]),
    ],
    ids=str,
)
def test_prompts_of_every_kind(service, prompt, expected):
    """The spelling of a special token is text; ids are what they say."""
    data = answer(complete(service, prompt=prompt, n=2))
    assert [request.prompt for request in service.engine.requests] == expected
    assert [choice["index"] for choice in data["choices"]] == list(range(2 * len(expected)))
    assert data["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_every_setting_reaches_the_engine(service):
    settings = dict(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={"5": 2.5, "6": -100},
        seed=-3,
        n=2,
        max_tokens=9,
        min_tokens=2,
        stop=["x"],
        stop_token_ids=[4],
        ignore_eos=True,
        logprobs=3,
    )
    answer(complete(service, **settings, structured_outputs={"regex": "a+"}, best_of=2))
    params = service.engine.requests[0].params
    for name, value in settings.items():
        expected = {"logit_bias": {5: 2.5, 6: -100}, "stop": ("x",), "stop_token_ids": (4,)}.get(name, value)
        assert getattr(params, name) == expected, name
    assert params.structured_outputs == StructuredOutputs(regex="a+")
    answer(complete(service, **dict.fromkeys(settings)))
    nulls = service.engine.requests[1].params
    answer(complete(service))
    assert nulls == service.engine.requests[2].params


def test_fields_without_effect_are_taken_and_others_refused(service):
    answer(complete(service, user="u", store=True, metadata={"a": 1}, service_tier="auto", foo=None))
    error = refusal(complete(service, foo=1, bar=2))
    assert error["param"] == "bar" and error["message"] == "these fields are not supported: bar, foo"


def test_echo_gives_the_prompt_and_its_scores(service):
    data = answer(complete(service, prompt=[[256, 75], [257]], echo=True, logprobs=1, max_tokens=1))
    first, second = data["choices"]
    assert first["text"] == "helhe" and second["text"] == "lohe"
    assert first["logprobs"] == {
        "tokens": ["he", "l", "he"],
        "token_logprobs": [None, -1.5, -2.0],
        "top_logprobs": [None, {"!": -0.5, "l": -1.5}, {"!": -0.25, "he": -2.0}],
        "text_offset": [0, 2, 3],
    }
    assert [request.params.prompt_logprobs for request in service.engine.requests] == [1, 1]
    answer(complete(service, echo=True))
    assert service.engine.requests[-1].params.prompt_logprobs is None


def test_no_tokens_at_all_are_scoring(service):
    service.engine.text = ""
    data = answer(complete(service, prompt="helo", echo=True, logprobs=0, max_tokens=0))
    assert data["choices"][0]["text"] == "helo"
    assert data["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.5]
    assert data["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}
    assert "max_tokens" in refusal(complete(service, max_tokens=0))["message"]


def test_streams_say_the_same(service):
    asked = dict(prompt=["he", "lo"], n=2, echo=True, logprobs=2)
    whole, parts = answer(complete(service, **asked)), events(complete(service, **asked, stream=True))
    for choice in whole["choices"]:
        own = [event["choices"][0] for event in parts if event["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + ["stop"]
        for name, values in choice["logprobs"].items():
            assert sum((each["logprobs"][name] for each in own), []) == values
    assert all("usage" not in event for event in parts)
    *others, last = events(complete(service, **asked, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in others) and len({event["id"] for event in [*others, last]}) == 1


def test_tokens_that_are_no_whole_characters_have_names_of_their_own(service):
    service.engine.text = "é"
    data = answer(complete(service, logprobs=0))
    assert data["choices"][0]["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_probabilities_of_zero_are_finite(service, monkeypatch):
    make = service.engine._token
    monkeypatch.setattr(
        service.engine,
        "_token",
        lambda *arguments: make(*arguments)._replace(model_log_prob=-math.inf, top=((0, -math.inf),)),
    )
    log_probs = answer(complete(service, logprobs=1))["choices"][0]["logprobs"]
    assert log_probs["token_logprobs"] == [-9999.0] * 3 and log_probs["top_logprobs"][0] == {
        "!": -9999.0,
        "he": -9999.0,
    }


# Conversations


def test_an_answer_has_openais_fields(service):
    data = answer(chat(service))
    assert data["object"] == "chat.completion"
    message = {"role": "assistant", "content": "hello"}
    assert data["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    request = service.engine.requests[0]
    assert request.prompt == ids_of("User: hello\nAssistant:") and request.params.stop == service.template.stop
    assert request.params.max_tokens == 512 - len(request.prompt)


def test_max_completion_tokens_comes_first(service):
    for more, expected in ((dict(max_tokens=5), 5), (dict(max_tokens=5, max_completion_tokens=7), 7)):
        answer(chat(service, **more))
        assert service.engine.requests[-1].params.max_tokens == expected


def test_log_probs_of_an_answer(service):
    data = answer(chat(service, logprobs=True, top_logprobs=2, stop="x"))
    content = data["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in content] == ["he", "l", "lo"]
    assert content[0] == {
        "token": "he",
        "logprob": -2.0,
        "bytes": [104, 101],
        "top_logprobs": [
            {"token": "!", "logprob": -0.25, "bytes": [33]},
            {"token": '"', "logprob": -1.25, "bytes": [34]},
        ],
    }
    assert service.engine.requests[0].params.stop == ("x", *service.template.stop)
    parts = events(chat(service, logprobs=True, top_logprobs=2, stream=True))
    found = [event["choices"][0]["logprobs"] for event in parts]
    assert sum((each["content"] for each in found if each), []) == content
    assert answer(chat(service, logprobs=True))["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_reasoning_and_calls_are_taken_apart(tmp_path):
    service = thinking_service(tmp_path, f"mm</think>ok{V31}")
    asked = dict(tools=[TOOL], chat_template_kwargs={"thinking": True}, max_tokens=350)
    choice = answer(chat(service, **asked))["choices"][0]
    [call] = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": "ok", "reasoning_content": "mm"}
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'} and choice["finish_reason"] == "tool_calls"
    parts = [event["choices"][0] for event in events(chat(service, **asked, stream=True))]
    deltas = [part["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": ""} and parts[-1]["finish_reason"] == "tool_calls"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "mm"
    assert "".join(delta.get("content", "") for delta in deltas) == "ok"
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"]["name"] == "add" and calls[0]["index"] == 0 and calls[0]["id"]
    assert "".join(each["function"]["arguments"] for each in calls) == '{"a": 1}'


@pytest.mark.parametrize(
    ("said", "thinks"),
    [
        ({}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"thinking": {"type": "enabled"}}, True),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
    ],
    ids=str,
)
def test_thinking_may_be_said_in_several_ways(tmp_path, said, thinks):
    service = thinking_service(tmp_path, "a")
    data = answer(chat(service, **said))
    assert service.engine.requests[0].prompt[-1] == 258 + SPECIAL.index("<think>" if thinks else "</think>")
    assert ("reasoning_content" in data["choices"][0]["message"]) == thinks


def test_tools_reach_the_template_unless_none_may_be_called(tmp_path):
    service = thinking_service(tmp_path, "a")
    for choice, told in ((None, True), ("auto", True), ("none", False)):
        answer(chat(service, tools=[TOOL], tool_choice=choice))
        prompt = service.engine.tokenizer.decode(service.engine.requests[-1].prompt)
        assert ("integer" in prompt) == told and service.engine.requests[-1].params.structured_outputs is None


def test_a_demanded_call_is_constrained_and_read(tmp_path):
    named = {"type": "function", "function": {"name": "add"}}
    service = thinking_service(tmp_path, '{"a": 1}')
    choice = answer(chat(service, tools=[TOOL], tool_choice=named))["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
    schema = TOOL["function"]["parameters"]
    assert service.engine.requests[0].params.structured_outputs == StructuredOutputs(json=schema)
    service.engine.text = '[{"name": "add", "arguments": {"a": 2}}, {"name": "add", "arguments": {}}]'
    choice = answer(chat(service, tools=[TOOL], tool_choice="required"))["choices"][0]
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"a": 2}', "{}"]
    items = service.engine.requests[1].params.structured_outputs.json["items"]["anyOf"]
    assert items[0]["properties"] == {"name": {"const": "add"}, "arguments": schema}
    short = answer(chat(service, tools=[TOOL], tool_choice="required", max_tokens=3))["choices"][0]
    assert short["finish_reason"] == "length" and short["message"] == {"role": "assistant", "content": '[{"'}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, StructuredOutputs(json_object=True)),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
            StructuredOutputs(json={"type": "object"}),
        ),
    ],
    ids=str,
)
def test_response_formats(service, said, expected):
    answer(chat(service, response_format=said))
    assert service.engine.requests[0].params.structured_outputs == expected


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (dict(messages=[]), "messages: List should have at least 1 item"),
        (dict(messages=[{"role": "robot", "content": "x"}]), "messages[0].role"),
        (dict(messages=[{"role": "user", "content": None}]), "messages[0]: content must be given"),
        (
            dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "messages[0].content: must",
        ),
        (dict(messages=[{"role": "user", "content": "x", "foo": 1}]), "messages[0]: these fields"),
        (dict(top_logprobs=2), "top_logprobs needs logprobs"),
        (dict(stream_options=dict(include_usage=True)), "stream_options needs stream"),
        (dict(logprobs=True, top_logprobs=21), "top_logprobs"),
        (dict(tool_choice="required"), "tool_choice needs tools"),
        (dict(tools=[TOOL, TOOL]), "names that differ"),
        (dict(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "x"}}), "must name one of tools"),
        (dict(parallel_tool_calls=False), "parallel_tool_calls"),
        (dict(functions=[]), "not supported: functions"),
        (dict(response_format={"type": "json_schema"}), "json_schema must be given"),
        (dict(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}), "exclude each other"),
        (dict(chat_template_kwargs={"thinking": True}), "thinking must be False"),
        (dict(chat_template_kwargs={"thinking": "yes"}), "thinking must be said once"),
        (dict(chat_template_kwargs={"thinking": True}, reasoning_effort="none"), "thinking must be said once"),
        (dict(chat_template_kwargs={"messages": []}), "must have other names"),
        (dict(structured_outputs={"regex": "a", "json_object": True}), "exactly one"),
        (dict(thinking={"type": "enabled"}, response_format={"type": "json_object"}), "thinking must be off"),
        (dict(max_tokens=512), "must fit 512 tokens"),
        (dict(n=129), "less than or equal to 128"),
    ],
    ids=str,
)
def test_bad_conversations_are_refused_in_one_line(service, body, words):
    error = refusal(chat(service, **body))
    assert words in error["message"] and "\n" not in error["message"] and not service.engine.requests


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        (dict(prompt=3), "prompt: must be a text, token ids", "prompt"),
        (dict(prompt=[]), "prompt: must be", "prompt"),
        (dict(prompt=[["x"]]), "prompt: must be", "prompt"),
        (dict(prompt=["x"] * 129), "1 to 128", "prompt"),
        (dict(prompt=[]), "prompt", "prompt"),
        (dict(prompt=[[1], []]), "at least one token", "prompt"),
        (dict(prompt=[320]), "below 320", "prompt"),
        (dict(prompt=[-1]), "prompt", "prompt"),
        (dict(prompt=""), "at least one token", "prompt"),
        (dict(prompt=[1] * 512), "must fit 512", None),
        (dict(stop=["x"] * 17), "up to 16", "stop"),
        (dict(stop=["x"] * 100_000), "up to 16", "stop"),
        (dict(stop="x" * 257), "1 to 256 characters", "stop"),
        (dict(stop=""), "stop", "stop"),
        (dict(logprobs=21), "logprobs", "logprobs"),
        (dict(temperature=2.1), "temperature", "temperature"),
        (dict(temperature="1"), "temperature", "temperature"),
        (dict(top_p=0), "top_p", "top_p"),
        (dict(n=True), "n: Input should be a valid integer", "n"),
        (dict(n=0), "n:", "n"),
        (dict(seed=2**63), "seed", "seed"),
        (dict(logit_bias={"1": 101}), "logit_bias", "logit_bias.1"),
        (dict(logit_bias={"x": 1}), "logit_bias", "logit_bias.x.[key]"),
        (dict(best_of=2), "best_of must equal n", "best_of"),
        (dict(suffix="x"), "not supported", "suffix"),
        (dict(min_tokens=17), "min_tokens", "min_tokens"),
        (dict(n=100, max_tokens=500, prompt=["x"] * 6), "at most 262,144, got 600 × 500", "max_tokens"),
        (dict(cache_salt=""), "cache_salt", "cache_salt"),
        (dict(stream_options={"foo": 1}), "foo", "foo"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_completions_are_refused_in_one_line(service, body, words, param):
    error = refusal(complete(service, **body))
    assert words in error["message"] and "\n" not in error["message"] and len(error["message"]) < 1000
    assert error["param"] == param and error["type"] == "invalid_request_error" and not service.engine.requests


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": ' + b"[" * 100_000 + b"1" + b"]" * 100_000 + b"}",
        b'{"prompt": "x", "metadata": ' + b'{"a":' * 5000,
        b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}",
        "{}".encode("utf-16"),
    ],
    ids=lambda data: repr(data[:30]),
)
def test_bodies_that_cannot_be_read_are_refused(service, data):
    async def sent():
        async with client_of(service) as client:
            return await client.post("/v1/completions", content=data, headers={"content-type": "application/json"})

    error = refusal(asyncio.run(sent()))
    assert len(error["message"]) < 1000 and not service.engine.requests


def test_another_model_is_not_found(service):
    for response in (complete(service, model="gpt"), chat(service, model="gpt")):
        assert refusal(response, 404)["code"] == "model_not_found"
    answer(complete(service, model="tiny"))


# Tokens


def test_tokens_of_texts_and_back(service):
    data = answer(post(service, "/tokenize", prompt="hello</s>", return_token_strs=True))
    assert data["tokens"] == [256, 75, 257, 27, 14, 82, 29] and data["count"] == 7 and data["max_model_len"] == 512
    assert data["token_strs"] == ["he", "l", "lo", "<", "/", "s", ">"]
    assert answer(post(service, "/detokenize", tokens=data["tokens"]))["prompt"] == "hello</s>"
    assert answer(post(service, "/tokenize", prompt="</s>", add_special_tokens=False))["tokens"] == [259]
    assert answer(post(service, "/detokenize", tokens=[259]))["prompt"] == "</s>"
    conversation = answer(post(service, "/tokenize", messages=HELLO))
    assert conversation["tokens"] == ids_of("User: hello\nAssistant:")
    assert answer(post(service, "/detokenize", tokens=[]))["prompt"] == ""
    assert "below 320" in refusal(post(service, "/detokenize", tokens=[320]))["message"]
    assert "either prompt or messages" in refusal(post(service, "/tokenize"))["message"]


def get(service, path):
    async def sent():
        async with client_of(service) as client:
            return await client.get(path)

    return asyncio.run(sent())


def test_what_clients_ask_before_they_begin(service):
    [model] = answer(get(service, "/v1/models"))["data"]
    assert model["id"] == "tiny" and model["max_model_len"] == 512
    assert answer(get(service, "/v1/models/tiny")) == model
    info = answer(get(service, "/tokenizer_info"))
    assert info["eos_token"] == "</s>" and info["bos_token"] == "<s>"


def test_the_description_names_every_bound(service):
    data = answer(get(service, "/openapi.json"))
    schema = data["components"]["schemas"]["CompletionRequest"]["properties"]["n"]
    assert schema["minimum"] == 1 and schema["maximum"] == 128
    body = data["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/CompletionRequest"}
    assert {"200", "400", "401", "413", "415", "429", "503"} <= data["paths"]["/tokenize"]["post"]["responses"].keys()


def test_metrics_count_and_time(service):
    answer(complete(service, n=2))
    refusal(complete(service, foo=1))
    lines = get(service, "/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values["dsa_jax_queued"] == "1.0" and values["dsa_jax_prefix_hit_rate"] == "0.25"
    assert values["dsa_jax_generated_tokens_total"] == "5.0"
    assert values["dsa_jax_time_to_first_token_seconds_count"] == "1.0"
    assert values["dsa_jax_time_between_tokens_seconds_count"] == "4.0"
    assert values['dsa_jax_requests_total{endpoint="/v1/completions",status="200"}'] == "1.0"
    assert values['dsa_jax_requests_total{endpoint="/v1/completions",status="400"}'] == "1.0"


# Failures


def test_a_failed_step_ends_its_requests_and_shows_in_health(service):
    service.engine.failure = RuntimeError("a step has failed")
    assert refusal(complete(service), 500)["code"] == "step"
    assert get(service, "/health").status_code == get(service, "/health/live").status_code == 503
    assert get(service, "/health").json()["failed"] == "RuntimeError"
    text = complete(service, stream=True).text
    assert '"type":"server_error"' in text and "[DONE]" not in text
    service.engine.failure = None
    answer(complete(service))
    assert get(service, "/health/ready").status_code == 200


def test_a_refusal_of_the_engine_has_a_status_in_streams_too(service):
    async def refuse(_):
        raise ValueError("logit_bias must have ids of the vocabulary")
        yield

    service.engine.stream = refuse
    for stream in (False, True):
        assert "of the vocabulary" in refusal(complete(service, stream=stream))["message"]
    assert get(service, "/health").status_code == 200 and service.sequences == 0


def test_a_slow_first_token_does_not_hold_the_headers(service, monkeypatch):
    """A comment keeps proxies patient; clients pass it over."""
    monkeypatch.setattr("dsa_jax.server.answering.HEADER_SECONDS", 0.01)
    monkeypatch.setattr("dsa_jax.server.answering.ALIVE_SECONDS", 0.01)
    service.engine.hold.clear()

    async def sent():
        async with client_of(service) as client:
            task = asyncio.create_task(client.post("/v1/completions", json={"prompt": "he", "stream": True}))
            await asyncio.sleep(0.2)
            service.engine.hold.set()
            return await task

    response = asyncio.run(sent())
    assert response.text.startswith(": waiting\n\n") and response.text.count(": waiting") > 2
    assert response.text.endswith("data: [DONE]\n\n")


def test_the_page_is_plain_files_and_forbids_all_else(service):
    page = get(service, "/")
    assert "default-src 'self'" in page.headers["content-security-policy"] and page.headers["content-type"].startswith(
        "text/html"
    )
    for name, kind in (("chat.js", "text/javascript"), ("chat.css", "text/css"), ("icon.svg", "image/svg+xml")):
        assert f"/page/{name}" in page.text
        assert get(service, f"/page/{name}").headers["content-type"].startswith(kind)
    script = get(service, "/page/chat.js").text
    assert not any(
        word in script for word in ("innerHTML", "insertAdjacent", "document.write", "eval(", "localStorage")
    )
    assert "http:" not in page.text + script and "style=" not in page.text and "<script>" not in page.text
