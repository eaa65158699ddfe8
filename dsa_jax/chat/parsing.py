"""A model's text as it comes, taken apart into reasoning, content and tool calls.

Formats: reasoning between think tags; calls of DeepSeek-V3.1 and V3.2-Exp, a name and JSON between control tokens;
calls of DeepSeek-V3.2, tags with a parameter each ("DSML"). What is no whole, right call is content, to the letter.
"""

import dataclasses
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from dsa_jax.chat.deepseek import CALLS, END_CALLS, END_INVOKE, END_PARAMETER, INVOKE, PARAMETER
from dsa_jax.chat.messages import END_THINK, THINK
from dsa_jax.strict_json import parse_object

_NAME = re.compile(r' name="([^"\n]+)">')
_PARAMETER = re.compile(r"\s*" + PARAMETER + r' name="([^"\n]+)" string="(true|false)">')


@dataclasses.dataclass(frozen=True)
class Markers:
    """Spells the borders of a block of calls, and of each call in it."""

    begin: str
    end: str
    call: str
    end_call: str
    separator: str = ""  # between a call's name and its arguments in JSON; none for tags


DSML = Markers(CALLS, END_CALLS, INVOKE, END_INVOKE)
V31 = Markers(
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
)


@dataclasses.dataclass(frozen=True)
class Format:
    """Says what a model's text may hold beside content.

    Attributes:
      thinks: whether reasoning stands between think tags.
      calls: how tool calls are spelled, None where there are none.
    """

    thinks: bool = False
    calls: Markers | None = None

    @classmethod
    def of(cls, tokens: Iterable[str], source: str = "") -> "Format":
        """Finds the format from a tokenizer's added tokens and the template's text."""
        known = set(tokens)
        speaks = lambda word: word in known or word in source  # noqa: E731
        calls = DSML if speaks("｜DSML｜") else V31 if speaks(V31.begin) else None
        return cls(speaks(THINK) and speaks(END_THINK), calls)

    def markers(self) -> set[str]:
        """Lists the spellings that a tokenizer must not leave out of its text."""
        calls = set(dataclasses.astuple(self.calls)) | {"｜DSML｜"} if self.calls else set()
        return (calls | ({THINK, END_THINK} if self.thinks else set())) - {""}


class Event(NamedTuple):
    """Tells of the next piece of an answer.

    A call comes as two events: "call" has its name and id, "arguments" their JSON object, whole.
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    index: int = 0  # of the call within the answer
    id: str = ""


class StreamParser:
    """Takes a model's text in pieces, wherever they are cut, and tells of what has become certain.

    Args:
      format: what to look for.
      thinking: whether the text begins within reasoning, because the prompt has opened it.
    """

    def __init__(self, format: Format, *, thinking: bool = False):
        self.format = format
        self.calls = 0  # whole ones so far
        self._held = ""
        self._state = self._reasoning if thinking else self._start if format.thinks else self._content

    def push(self, text: str) -> list[Event]:
        """Takes in a piece; returns what it makes certain."""
        self._held += text
        events: list[Event] = []
        while self._state(events, ended=False):
            pass
        return _joined(events)

    def finish(self) -> list[Event]:
        """Returns what was held back, when no text follows: the beginning of a call is content then."""
        events: list[Event] = []
        while self._state(events, ended=True):
            pass
        return _joined(events)

    # States: each takes what it can off the held text, and tells whether another state has to look at the rest.

    def _start(self, events, *, ended) -> bool:
        """Looks whether the model opens its reasoning by itself."""
        begun = self._held.lstrip()
        if not ended and THINK.startswith(begun):
            return False
        self._state = self._content
        if begun.startswith(THINK):
            self._held, self._state = begun.removeprefix(THINK), self._reasoning
        return True

    def _reasoning(self, events, *, ended) -> bool:
        found = self._emit_until(events, "reasoning", (END_THINK,), ended)
        if found:
            self._held, self._state = self._held.removeprefix(END_THINK), self._content
        return found

    def _content(self, events, *, ended) -> bool:
        calls = self.format.calls
        if calls is None:
            self._emit(events, "content", len(self._held))
            return False
        # The empty line before a block is its own.
        found = self._emit_until(events, "content", ("\n\n" + calls.begin, "\n" + calls.begin, calls.begin), ended)
        if found:
            self._opening = self._held[: self._held.index(calls.begin) + len(calls.begin)]
            self._held, self._state = self._held.removeprefix(self._opening), self._between
        return found

    def _between(self, events, *, ended) -> bool:
        """Stands in a block, before a call or the block's end."""
        assert self.format.calls is not None
        calls, rest = self.format.calls, self._held.lstrip()
        if rest.startswith(calls.call):
            return self._call(events, rest, ended)
        if rest.startswith(calls.end) and not self._opening:
            self._held, self._state = rest.removeprefix(calls.end), self._content
            return True
        if not ended and (calls.call.startswith(rest) or calls.end.startswith(rest)):
            return False
        if calls.end.startswith(rest) and not self._opening:  # cut off behind a call
            self._held = ""
            return False
        return self._give_up(events, 0)

    def _call(self, events, rest: str, ended: bool) -> bool:
        assert self.format.calls is not None
        end = rest.find(self.format.calls.end_call)
        if end < 0:
            return self._give_up(events, len(self._held)) if ended else False
        found = _read_call(rest[len(self.format.calls.call) : end], self.format.calls)
        if found is None:
            return self._give_up(events, len(self._held) - len(rest) + end)
        name, arguments = found
        events.append(Event("call", name, self.calls, f"call_{secrets.token_hex(12)}"))
        events.append(Event("arguments", arguments, self.calls))
        self.calls += 1
        self._held, self._opening = rest[end + len(self.format.calls.end_call) :], ""
        return True

    def _give_up(self, events, count: int) -> bool:
        """Lets what is no call be content, with the opening of its block if no call has come of that."""
        self._held = self._opening + self._held
        self._emit(events, "content", len(self._opening) + count)
        self._opening, self._state = "", self._content
        return bool(self._held)

    def _emit(self, events, kind, count: int) -> None:
        if count:
            events.append(Event(kind, self._held[:count]))
        self._held = self._held[count:]

    def _emit_until(self, events, kind, marks: tuple[str, ...], ended: bool) -> bool:
        """Emits what comes before the first of the marks, but for what may yet become one; returns whether one is."""
        places = [place for mark in marks if (place := self._held.find(mark)) >= 0]
        if places or ended:
            self._emit(events, kind, min(places, default=len(self._held)))
            return bool(places)
        longest = max(map(len, marks)) - 1
        tails = range(max(0, len(self._held) - longest), len(self._held))
        kept = (place for place in tails if any(mark.startswith(self._held[place:]) for mark in marks))
        self._emit(events, kind, next(kept, len(self._held)))
        return False


def message_of(events: Sequence[Event]) -> dict[str, Any]:
    """Makes the assistant's message of all events of an answer; its content is None beside calls alone."""
    joined = lambda kind: "".join(event.text for event in events if event.kind == kind)  # noqa: E731
    message: dict[str, Any] = {"role": "assistant", "content": joined("content")}
    if reasoning := joined("reasoning"):
        message["reasoning_content"] = reasoning
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.text, "arguments": arguments.text}}
        for call, arguments in zip(
            (event for event in events if event.kind == "call"),
            (event for event in events if event.kind == "arguments"),
            strict=True,
        )
    ]
    return message | ({"tool_calls": calls, "content": message["content"] or None} if calls else {})


def _read_call(text: str, markers: Markers) -> tuple[str, str] | None:
    """Reads the name and the arguments of a call; None if it is none."""
    if not markers.separator:
        return _read_tags(text)
    name, separator, arguments = text.partition(markers.separator)
    name, arguments = name.strip(), arguments.strip()
    return (name, arguments) if name and separator and _is_object(arguments) else None


def _read_tags(text: str) -> tuple[str, str] | None:
    """Reads a call whose parameters have a tag each."""
    head = _NAME.match(text)
    if head is None:
        return None
    place, values, last = head.end(), {}, len(text.rstrip())
    while place < last:
        tag = _PARAMETER.match(text, place)
        end = text.find(END_PARAMETER, tag.end()) if tag else -1
        if tag is None or end < 0 or tag[1] in values:
            return None
        value, place = text[tag.end() : end], end + len(END_PARAMETER)
        if tag[2] == "false" and not _is_value(value):
            return None
        values[tag[1]] = json.dumps(value, ensure_ascii=False) if tag[2] == "true" else value.strip()
    parts = (f"{json.dumps(name, ensure_ascii=False)}: {value}" for name, value in values.items())
    return head[1], "{" + ", ".join(parts) + "}"


def _is_object(text: str) -> bool:
    """Tells whether text is a JSON object, strictly."""
    try:
        parse_object(text)
    except ValueError:
        return False
    return True


def _is_value(text: str) -> bool:
    """Tells whether text is one JSON value, strictly."""
    try:
        return len(parse_object(f'{{"value": {text}}}')) == 1
    except ValueError:
        return False


def _joined(events: list[Event]) -> list[Event]:
    """Joins neighbouring pieces of one kind."""
    out: list[Event] = []
    for event in events:
        if out and out[-1].kind == event.kind and event.kind in ("reasoning", "content"):
            event = Event(event.kind, out.pop().text + event.text)
        out.append(event)
    return out
