"""A conversation with an engine: what was said, how to go on, and where it is saved."""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsa_jax.chat.messages import check_messages
from dsa_jax.chat.parsing import Event, message_of
from dsa_jax.chat.template import ChatTemplate
from dsa_jax.inference import Engine, Request, SamplingParams
from dsa_jax.strict_json import read_object, shown

MAX_SAVED_BYTES = 100_000_000


class Interrupted:
    """Counts how often the user wants an answer to stop; a step that is under way is not torn apart at once."""

    def __init__(self):
        self.times = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Counts SIGINT while it lasts; the second one raises KeyboardInterrupt."""
        self.times = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def count(*_: Any) -> None:
            self.times += 1
            if self.times > 1:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, count)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@dataclasses.dataclass
class Statistics:
    """Counts what the last answer took."""

    prompt: int = 0
    tokens: int = 0
    seconds: float = 0.0  # between its first and its last token
    finished: str | None = None

    @property
    def rate(self) -> float:
        """Gives the tokens a second, of those behind the first."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else 0.0


class Conversation:
    """Holds what was said, and asks the engine for answers.

    Attributes:
      messages: in order; the system's first if there is one.
      params: how answers are sampled.
      thinking: whether the model thinks before it answers.
    """

    def __init__(
        self, engine: Engine, template: ChatTemplate, params: SamplingParams, *, thinking: bool = False, tools=None
    ):
        self.engine, self.template = engine, template
        self.params, self.thinking, self.tools = params, thinking, tools
        self.messages: list[dict[str, Any]] = []
        self.last = Statistics()
        self.interrupted = Interrupted()

    @property
    def system(self) -> str | None:
        """The system's message, None if there is none."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        others = self.messages[1:] if self.system is not None else self.messages
        self.messages = [{"role": "system", "content": text}, *others] if text else others

    @property
    def unanswered(self) -> str | None:
        """The name of the next function that waits for its result, None if none does."""
        results = 0
        for message in reversed(self.messages):
            if message["role"] != "tool":
                calls = message.get("tool_calls", [])
                return calls[results]["function"]["name"] if results < len(calls) else None
            results += 1
        return None

    def reset(self) -> None:
        """Forgets all but the system's message."""
        self.messages = self.messages[:1] if self.system is not None else []

    def say(self, text: str) -> None:
        """Adds what the user says: a function's result where one is waited for."""
        call = self.unanswered
        self.messages.append({"role": "user" if call is None else "tool", "content": text})

    def answer(self) -> Iterator[Event]:
        """Asks for an answer and yields it as it comes; it is among the messages at the end, interrupted or not.

        Raises:
          ValueError, OutOfPages: if the conversation cannot be encoded or has become too long.
          RuntimeError: if the engine gives it up.
        """
        prompt = self.template.encode(self.messages, tools=self.tools, thinking=self.thinking)
        stop = (*self.params.stop, *self.template.stop)
        params = dataclasses.replace(self.params, stop=stop)
        parser, found = self.template.parser(prompt), []
        self.last = Statistics(prompt=len(prompt))
        with self.interrupted.watch():
            name = self.engine.add(Request(prompt, params))
            try:
                for text in self._texts(name):
                    events = parser.push(text)
                    found += events
                    yield from events
            finally:
                if self.interrupted.times < 2:  # else a step is torn, and the program ends
                    self._end(name)
                events = parser.finish()
                self._keep(found + events)
        yield from events

    def _texts(self, name: int) -> Iterator[str]:
        """Yields the text of a request until it ends, which an interrupt makes it do."""
        first = 0.0
        while self.engine.busy:
            if self.interrupted.times:
                self.engine.cancel(name)
            for token in self.engine.step():
                if token.request != name:
                    continue
                now = time.monotonic()
                first = first or now
                self.last.tokens += token.token is not None
                self.last.seconds, self.last.finished = now - first, token.finished
                yield token.text
                if token.error is not None:
                    raise RuntimeError(token.error)

    def _end(self, name: int) -> None:
        """Ends a request that nobody reads any more; one that has ended is let be."""
        self.engine.cancel(name)
        while self.engine.busy:
            self.engine.step()

    def _keep(self, events: list[Event]) -> None:
        """Adds the answer to the messages, if anything of it has come."""
        if events:
            self.messages.append(message_of(events))

    def save(self, path: Path) -> None:
        """Writes the conversation to a file that only its owner may read, whole or not at all.

        Raises:
          OSError: if it cannot be written.
        """
        values = {"messages": self.messages, "thinking": self.thinking}
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump(values, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Reads a conversation that `save` has written; nothing changes if the file is not right.

        Raises:
          ValueError: naming what it must hold.
          OSError: if it cannot be read.
        """
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_SAVED_BYTES:
            raise ValueError(f"{path} must be a file of at most {MAX_SAVED_BYTES:,} bytes")
        values = read_object(path)
        thinking = values.get("thinking", False)
        if not isinstance(thinking, bool) or values.keys() - {"messages", "thinking"}:
            raise ValueError(f"{path} must hold messages, and thinking as a boolean, got {shown(values)}")
        messages = check_messages(values.get("messages")) if values.get("messages") != [] else []
        self.messages, self.thinking = messages, thinking
