"""Uses every part of the server by OpenAI's own client: python openai_client.py ADDRESS KEY."""

import json
import sys

import openai

address, key = sys.argv[1:]
client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)
messages = [{"role": "user", "content": "Say something."}]
[model] = [each.id for each in client.models.list()]
assert client.models.retrieve(model).id == model

# Completions, whole and as a stream.
settings = dict(model=model, prompt="One, two", max_tokens=8, temperature=0, logprobs=2, seed=1)
whole = client.completions.create(**settings)
assert whole.usage.completion_tokens == 8 and whole.choices[0].finish_reason == "length"
assert len(whole.choices[0].logprobs.tokens) == 8
stream = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
assert "".join(each.choices[0].text for each in stream[:-1]) == whole.choices[0].text
assert stream[-1].usage == whole.usage
scored = client.completions.create(model=model, prompt=["ab", "cd"], max_tokens=0, echo=True, logprobs=0)
assert [each.text for each in scored.choices] == ["ab", "cd"] and scored.choices[0].logprobs.token_logprobs[0] is None

# Conversations.
settings = dict(
    model=model, messages=messages, max_completion_tokens=8, n=2, seed=3, temperature=0.7, top_p=0.9, logprobs=True,
    top_logprobs=3, frequency_penalty=0.5, presence_penalty=0.5, logit_bias={"5": -100}, stop=["\x00"], user="me",
    extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
)  # fmt: skip
answer = client.chat.completions.create(**settings)
assert [choice.index for choice in answer.choices] == [0, 1] and answer.usage.completion_tokens == 16
assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
texts = ["", ""]
for event in client.chat.completions.create(**settings, stream=True):
    texts[event.choices[0].index] += event.choices[0].delta.content or ""
assert texts == [choice.message.content for choice in answer.choices], (texts, answer)

# Output that is constrained.
schema = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
form = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema, "strict": True}}
made = client.chat.completions.create(model=model, messages=messages, response_format=form, max_tokens=100, seed=1)
if made.choices[0].finish_reason == "stop":  # white space may take all tokens
    assert isinstance(json.loads(made.choices[0].message.content)["ok"], bool)

# Errors.
for wrong, error in (
    (dict(temperature=3), openai.BadRequestError), (dict(model="gpt-4o"), openai.NotFoundError),
    (dict(max_tokens=10**6), openai.BadRequestError), (dict(extra_body={"foo": 1}), openai.BadRequestError),
):  # fmt: skip
    try:
        client.completions.create(**dict(model=model, prompt="x") | wrong)
    except error as caught:
        assert caught.body["message"] and caught.body["type"]
    else:
        raise AssertionError(f"{wrong} must be refused")
try:
    openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
except openai.AuthenticationError as caught:
    assert caught.code == "invalid_api_key"
else:
    raise AssertionError("a wrong key must be refused")
print("all right")
