"""`/v1/chat/completions`: answers to conversations, with reasoning and tool calls."""

import json
import secrets
from collections.abc import Sequence
from typing import Any

from dsa_jax.chat import Event, StreamParser
from dsa_jax.inference.params import StructuredOutputs, Token
from dsa_jax.server.errors import ApiError
from dsa_jax.server.jobs import Usage, check_model, finish_reason, finite, head, make_requests, ranked
from dsa_jax.server.protocol import ChatRequest, Message, NamedTool, Tool
from dsa_jax.server.service import Service

CALLED = {"stop": "tool_calls", "length": "length"}


class ForcedCalls:
    """Reads the calls of an answer that had to be JSON, in the place of a parser.

    Args:
      name: of the function whose arguments the answer is; None where it is a list of calls.
    """

    def __init__(self, name: str | None):
        self._name, self._text = name, ""

    def push(self, text: str) -> list[Event]:
        """Takes a piece in, and tells nothing: calls come whole."""
        self._text += text
        return []

    def finish(self) -> list[Event]:
        """Returns the calls; an answer that was cut short is content."""
        try:
            found = json.loads(self._text)
        except ValueError:
            return [Event("content", self._text)]
        calls = [{"name": self._name, "arguments": found}] if self._name is not None else found
        return [event for place, call in enumerate(calls) for event in _call_events(place, call)]


def _call_events(place: int, call: dict[str, Any]) -> list[Event]:
    name = f"call_{secrets.token_hex(12)}"
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return [Event("call", call["name"], place, name), Event("arguments", arguments, place, name)]


class Choice:
    """Gathers one answer.

    Args:
      parser: takes its text apart.
    """

    def __init__(self, parser: StreamParser | ForcedCalls):
        self._parser = parser
        self.content, self.reasoning, self.calls = "", "", []
        self.log_probs: list[dict[str, Any]] = []
        self.reason: str | None = None
        self.begun = False

    def take(self, token: Token) -> list[dict[str, Any]]:
        """Takes a token in; returns what its text makes certain, as the deltas of a stream."""
        events = self._parser.push(token.text)
        if token.finished is not None:
            events = [*events, *self._parser.finish()]
        deltas = [self._see(event) for event in events if event.text or event.kind in ("call", "arguments")]
        if token.finished is not None:
            self.reason = finish_reason(token, CALLED) if self.calls else finish_reason(token)
        return deltas

    def _see(self, event: Event) -> dict[str, Any]:
        if event.kind == "content":
            self.content += event.text
            return {"content": event.text}
        if event.kind == "reasoning":
            self.reasoning += event.text
            return {"reasoning_content": event.text}
        if event.kind == "call":
            function = {"name": event.text, "arguments": ""}
            self.calls.append({"id": event.id, "type": "function", "function": function})
            return {
                "tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": {**function}}]
            }
        self.calls[event.index]["function"]["arguments"] += event.text
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}

    def message(self) -> dict[str, Any]:
        """Returns the whole message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.calls else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message


class ChatJob:
    """Answers one request of `/v1/chat/completions`.

    Args:
      body: what the client has sent.
      service: that runs it.
      prompt: the conversation's token ids.
      structured: what the answer must be, if a format or a tool is demanded.
      code: of the client's key.
    """

    def __init__(
        self, body: ChatRequest, service: Service, prompt: list[int], structured: StructuredOutputs | None, code: str
    ):
        self._body, self._spelling = body, service.vocabulary
        most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        more: dict[str, Any] = {} if structured is None else {"structured_outputs": structured}
        more |= {
            "stop": (*stop, *service.template.stop),
            "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        }
        self.requests = make_requests(body, service, [prompt], code, max_tokens=most, **more)
        self.stream = bool(body.stream)
        self._head = head("chat.completion.chunk" if self.stream else "chat.completion", "chatcmpl", service)
        self._usage = Usage([prompt], body)
        forced = _forced_name(body)
        make = (lambda: service.template.parser(prompt)) if forced is None else (lambda: ForcedCalls(forced or None))
        self._choices = [Choice(make()) for _ in range(body.n)]

    def take(self, place: int, token: Token) -> list[dict[str, Any]]:
        """Takes a token in; returns the events that tell of it."""
        self._usage.see(token)
        choice = self._choices[token.index]
        deltas = choice.take(token)
        log_probs = self._log_probs(token) if self._body.logprobs else []
        choice.log_probs += log_probs
        if not choice.begun:
            choice.begun = True
            deltas = [{"role": "assistant", "content": ""}, *deltas]
        if not deltas and (log_probs or choice.reason):
            deltas = [{}]
        events = [self._event(token.index, delta) for delta in deltas]
        if events:
            (own,) = events[-1]["choices"]
            own["finish_reason"] = choice.reason
            own["logprobs"] = {"content": log_probs, "refusal": None} if self._body.logprobs else None
        return events

    def last(self) -> list[dict[str, Any]]:
        """Returns the event of the usage, if it is wanted."""
        return self._usage.last(self._head)

    def body(self) -> dict[str, Any]:
        """Returns the whole answer."""
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": {"content": choice.log_probs, "refusal": None} if self._body.logprobs else None,
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": self._usage.body()}

    def _event(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._usage.event(self._head, [choice])

    def _log_probs(self, token: Token) -> list[dict[str, Any]]:
        if token.token is None or token.model_log_prob is None:
            return []
        likeliest = list(ranked(token.token, token.model_log_prob, token.top).items())[: self._body.top_logprobs or 0]
        own = self._spell(token.token, token.model_log_prob)
        return [{**own, "top_logprobs": [self._spell(each, value) for each, value in likeliest]}]

    def _spell(self, token: int, log_prob: float) -> dict[str, Any]:
        data = self._spelling.bytes(token)
        return {"token": self._spelling.text(token), "logprob": finite(log_prob), "bytes": list(data)}


def make_chat(body: ChatRequest, service: Service, code: str) -> ChatJob:
    """Makes the job of a request; fills the template and encodes, so not on the event loop.

    Raises:
      ApiError: naming what is wrong.
    """
    check_model(body.model, service)
    if body.logprobs:
        service.vocabulary.check()
    structured = _structured(body)
    if structured is not None and body.structured_outputs is not None:
        raise ApiError(400, "response_format, a demanded tool and structured_outputs exclude each other")
    thinking, more = _thinking(body)
    constrained = structured is not None or body.structured_outputs is not None
    if thinking and constrained:
        raise ApiError(
            400, "thinking must be off where the output's format is demanded: it holds from the first token on"
        )
    prompt = encode_messages(service, body.messages, _tools(body), thinking=thinking, **more)
    return ChatJob(body, service, prompt, structured, code)


def encode_messages(
    service: Service, messages: Sequence[Message], tools: Sequence[Tool] | None, **more: Any
) -> list[int]:
    """Turns a conversation into token ids.

    Raises:
      ApiError: naming what is wrong.
    """
    plain = [message.model_dump(exclude_none=True) for message in messages]
    offered = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    try:
        return service.template.encode(plain, tools=offered or None, **more)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None


def _thinking(body: ChatRequest) -> tuple[bool, dict[str, Any]]:
    """Returns whether the model shall think, and the template's other arguments; it may be said in several ways."""
    more = dict(body.chat_template_kwargs or {})
    said = [value for name in ("thinking", "enable_thinking") if (value := more.pop(name, None)) is not None]
    if body.thinking is not None:
        said.append(body.thinking.type == "enabled")
    if body.reasoning_effort is not None:
        said.append(body.reasoning_effort != "none")
    if len({bool(value) for value in said}) > 1 or not all(isinstance(value, bool) for value in said):
        raise ApiError(400, "thinking must be said once, as true or false", param="chat_template_kwargs")
    if taken := {"tools", "messages", "add_generation_prompt"} & more.keys():
        words = f"chat_template_kwargs must have other names, got {', '.join(sorted(taken))}"
        raise ApiError(400, words, param="chat_template_kwargs")
    return bool(said and said[0]), more


def _tools(body: ChatRequest) -> list[Tool] | None:
    return None if body.tool_choice == "none" else body.tools


def _forced_name(body: ChatRequest) -> str | None:
    """Returns the function that must be called, "" where any must, None where none must."""
    if isinstance(body.tool_choice, NamedTool):
        return body.tool_choice.function.name
    return "" if body.tool_choice == "required" else None


def _structured(body: ChatRequest) -> StructuredOutputs | None:
    """Returns what the answer must be, if `response_format` or `tool_choice` demands something."""
    found = []
    if body.response_format is not None and body.response_format.json_schema is not None:
        found.append(StructuredOutputs(json=body.response_format.json_schema.schema_))
    elif body.response_format is not None and body.response_format.type == "json_object":
        found.append(StructuredOutputs(json_object=True))
    name = _forced_name(body)
    if name is not None:
        found.append(StructuredOutputs(json=_calls_schema(body.tools or [], name)))
    if len(found) > 1:
        raise ApiError(400, "response_format and a demanded tool exclude each other", param="response_format")
    return found[0] if found else None


def _calls_schema(tools: Sequence[Tool], name: str) -> dict[str, Any]:
    """Describes the arguments of a named function, or else a list of calls."""
    arguments = {tool.function.name: tool.function.parameters or {"type": "object"} for tool in tools}
    if name:
        return arguments[name]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in arguments.items()
    ]
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
