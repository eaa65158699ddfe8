"""The command `chat`: a conversation in a terminal, or line by line where input or output is none."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings
from rich.console import Console
from rich.text import Text

from dsa_jax.chat.display import Answer, without_controls
from dsa_jax.chat.options import STRUCTURED, SamplingOptions
from dsa_jax.chat.session import Conversation
from dsa_jax.inference import OutOfPages, SamplingParams
from dsa_jax.strict_json import shorten, shown

KEYS = "Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D ends."
PARAMETERS = {field.name for field in dataclasses.fields(SamplingOptions)} - {"n", *STRUCTURED}
SWITCHES = {"on": True, "true": True, "off": False, "false": False}


class Chat:
    """Reads what the user says, and shows the answers; lines that begin with a slash are commands.

    Args:
      conversation: whose answers are shown.
      read: returns what the user says to a prompt; raises EOFError at the end.
      out: where answers go.
      err: where errors go.
    """

    def __init__(self, conversation: Conversation, read: Callable[[str], str], out: Console, err: Console):
        self.conversation, self._read, self._out, self._err = conversation, read, out, err
        self.failed = False
        self._ended = False
        self._commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset, "system": self._system, "save": self._save, "load": self._load,
            "params": self._params, "help": self._help, "quit": self._quit,
        }  # fmt: skip

    def run(self) -> None:
        """Goes on until the user ends it."""
        while not self._ended:
            call = self.conversation.unanswered
            try:
                line = self._read("> " if call is None else f"result of {without_controls(call)}> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                self._tell(KEYS)
                continue
            try:
                self.take(line)
            except (ValueError, OSError, OutOfPages, RuntimeError) as error:
                self.failed = True
                self._err.print(Text(f"error: {shorten(without_controls(str(error)), 900)}"), soft_wrap=True)

    def take(self, line: str) -> None:
        """Does what a line says: a command, or something to answer."""
        name, _, rest = line.strip().partition(" ")
        if name.startswith("/"):
            if name[1:] not in self._commands:
                raise ValueError(f"commands are /{', /'.join(self._commands)}; got {shown(name)}")
            self._commands[name[1:]](rest.strip())
        elif line.strip():
            self._answer(line)

    def _answer(self, text: str) -> None:
        conversation = self.conversation
        conversation.say(text)
        if conversation.unanswered is not None:  # a further call of the same answer
            return
        before = len(conversation.messages)
        try:
            with Answer(self._out) as answer:
                for event in conversation.answer():
                    if event.kind in ("reasoning", "content"):
                        answer.add(event.kind, event.text)
                    else:
                        answer.note(f"calls {event.text}" if event.kind == "call" else event.text)
        finally:
            if len(conversation.messages) == before:  # nothing has come: as if it had not been said
                conversation.messages.pop()
        if not self._out.is_terminal:
            self._out.out("")
        elif conversation.last.finished in ("length", "cancelled"):
            self._tell({"length": "(ended by max_tokens)", "cancelled": "(stopped)"}[conversation.last.finished])

    def _tell(self, text: str) -> None:
        self._out.print(Text(without_controls(text), style="cyan"), soft_wrap=True)

    # Commands.

    def _reset(self, _: str) -> None:
        """Forgets the conversation, but for the system's message."""
        self.conversation.reset()

    def _system(self, text: str) -> None:
        """Shows the system's message, or sets it: /system TEXT; /system - removes it."""
        if text:
            self.conversation.system = None if text == "-" else text
        self._tell(f"system: {self.conversation.system or '(none)'}")

    def _save(self, name: str) -> None:
        """Saves the conversation: /save FILE."""
        self.conversation.save(_path(name, "/save"))

    def _load(self, name: str) -> None:
        """Goes on with a saved conversation: /load FILE."""
        self.conversation.load(_path(name, "/load"))
        self._tell(f"{len(self.conversation.messages)} messages")

    def _params(self, text: str) -> None:
        """Shows how answers are sampled, or changes it: /params temperature=0.6 max_tokens=200 thinking=on."""
        params, thinking = read_params(text, self.conversation.params, self.conversation.thinking)
        self.conversation.params, self.conversation.thinking = params, thinking
        values = {name: getattr(params, name) for name in sorted(PARAMETERS)} | {"thinking": thinking}
        self._tell("  ".join(f"{name}={value!r}" for name, value in values.items()))

    def _help(self, _: str) -> None:
        """Shows this."""
        lines = [f"/{name:8}{command.__doc__}" for name, command in self._commands.items()]
        self._tell("\n".join([*lines, KEYS]))

    def _quit(self, _: str) -> None:
        """Ends."""
        self._ended = True


def _path(name: str, command: str) -> Path:
    if not name:
        raise ValueError(f"{command} must name a file, got none")
    return Path(name).expanduser()


def read_params(text: str, params: SamplingParams, thinking: bool) -> tuple[SamplingParams, bool]:
    """Reads NAME=VALUE pairs, values as JSON or words.

    Raises:
      ValueError: naming what is no parameter, or no value of it.
    """
    changes: dict[str, Any] = {}
    names = PARAMETERS | {"thinking"}
    for pair in text.split():
        name, sign, value = pair.partition("=")
        if not sign or name not in names:
            raise ValueError(
                f"/params must be given NAME=VALUE, names of {', '.join(sorted(names))}; got {shown(pair)}"
            )
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = SWITCHES.get(value, value)
    thinking = changes.pop("thinking", thinking)
    if not isinstance(thinking, bool):
        raise ValueError(f"thinking must be on or off, got {shown(thinking)}")
    try:
        return dataclasses.replace(params, **changes), thinking
    except TypeError as error:  # a value of another type, in a comparison
        raise ValueError(f"/params must be given values of the right types, got {shown(text)}: {error}") from None


def status(conversation: Conversation) -> str:
    """Tells in one line what the last answer took, and how full the cache is."""
    last, cache, prefix = conversation.last, conversation.engine.cache, conversation.engine.prefix
    parts = [f"{last.tokens} tokens at {last.rate:.1f}/s after {last.prompt}"] if last.tokens else []
    used = f"{cache.total_pages - cache.free_pages} of {cache.total_pages} pages"
    parts.append(f"cache: {used}, {prefix.hits} of {prefix.asked} reused")
    return " · ".join([*parts, f"thinking {'on' if conversation.thinking else 'off'}", "/help"])


def history_file() -> Path:
    """Makes the file that keeps what the user has typed, for its owner alone, and returns its path."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(home) / "dsa_jax" / "chat_history"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    path.chmod(0o600)
    return path


def run_chat(conversation: Conversation) -> int:
    """Runs a conversation on this process's terminal; returns the exit status.

    Where input or output is no terminal, each line is answered by itself, and the status is 1 if one could not be.
    """
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        chat = Chat(conversation, _read_line, out, err)
        chat.run()
        return int(chat.failed)
    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session = PromptSession(
        history=FileHistory(str(history_file())), multiline=True, key_bindings=keys, prompt_continuation="  ",
        bottom_toolbar=lambda: status(conversation),
    )  # fmt: skip
    out.print(Text(KEYS + " /help shows the commands.", style="cyan"))
    Chat(conversation, session.prompt, out, err).run()
    return 0


def _read_line(_: str) -> str:
    """Reads a line of standard input."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
