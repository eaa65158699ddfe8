"""The conversation in a terminal: its commands, what is kept of it, and what Ctrl-C does."""

import io
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from chat_cases import conversation
from model_cases import small_config, small_model
from rich.console import Console

from dsa_jax import save_hf
from dsa_jax.chat.terminal import Chat, history_file, status
from dsa_jax.inference import SamplingParams
from dsa_jax.inference.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
CALL = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>\n'
    '</｜DSML｜invoke>\n<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
)  # fmt: skip


def talk(said, lines, *, terminal=False):
    """Says lines in a conversation; returns what was shown, the errors, and whether something failed."""
    left, prompts = list(lines), []

    def read(prompt):
        prompts.append(prompt)
        if not left:
            raise EOFError
        return left.pop(0)

    out, err = (Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False) for _ in range(2))
    chat = Chat(said, read, out, err)
    chat.run()
    return out.file.getvalue(), err.file.getvalue(), chat.failed, prompts


def test_answers_are_shown_and_remembered(tmp_path):
    said = conversation(tmp_path, ["Hel", "lo"], ["!"])
    out, err, failed, prompts = talk(said, ["hi", "", "   ", "you"])
    assert out == "Hello\n!\n" and not err and not failed and set(prompts) == {"> "}
    assert [message["content"] for message in said.messages] == ["hi", "Hello", "you", "!"]
    first, second = said.engine.requests
    ids = said.template.encode(said.messages[:3])
    assert second.prompt == ids and first.prompt == ids[: len(first.prompt)], "the prompt begins as the last one did"


def test_commands(tmp_path):
    said, file = conversation(tmp_path, ["a"], ["b"]), tmp_path / "saved.json"
    lines = [
        "/system Be kind.", "hi", f"/save {file}", "/reset",
        "/params temperature=0.5 max_tokens=7 stop=[\"x\"] thinking=on", "you", f"/load {file}", "/system",
        "/help", "/quit", "never",
    ]  # fmt: skip
    out, err, failed, _ = talk(said, lines)
    assert not failed and not err, err
    assert [message["content"] for message in said.messages] == ["Be kind.", "hi", "a"]
    assert [each.params for each in said.engine.requests] == [
        SamplingParams(), SamplingParams(temperature=0.5, max_tokens=7, stop=["x"]),
    ]  # fmt: skip
    for words in ("temperature=0.5", "thinking=True", "system: Be kind.", "/load", "3 messages", "Ctrl-D"):
        assert words in out
    assert talk(said, ["/system -"])[0] == "system: (none)\n" and said.messages[0]["role"] == "user"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/what", "commands are /reset"), ("/save", "/save must name a file"), ("/load /nowhere/x", "No such file"),
        ("/params warmth=1", "got 'warmth=1'"), ("/params temperature=-1", "temperature must be"),
        ("/params temperature=hot", "must be a number"), ("/params thinking=3", "thinking must be on or off"),
        ("/save /nowhere/x", "No such file"),
    ],
)  # fmt: skip
def test_what_is_no_command_is_told_in_one_line(tmp_path, line, words):
    out, err, failed, _ = talk(conversation(tmp_path), [line])
    assert failed and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"messages": [{"role": "robot"}]}', '{"messages": [], "thinking": 3}', '{"messages": [], "x": 1}',
    '{"messages": [], "messages": []}', "\xff",
])  # fmt: skip
def test_a_file_that_is_no_conversation_changes_nothing(tmp_path, content):
    said, file = conversation(tmp_path, ["a"]), tmp_path / "file"
    file.write_text(content, encoding="latin-1")
    _, err, failed, _ = talk(said, ["hi", f"/load {file}"])
    assert failed and str(file) in err.replace("\n", "") or "messages" in err
    assert len(said.messages) == 2


def test_a_saved_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    said, file = conversation(tmp_path, ["a"]), tmp_path / "file"
    talk(said, ["hi", f"/save {file}"])
    before = file.read_text()
    monkeypatch.setattr(json, "dump", lambda values, out, **_: (out.write('{"mess'), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        said.save(file)
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]


def test_calls_are_shown_and_wait_for_their_results(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    said = conversation(tmp_path, ["Look:", *CALL], ["done"], tools=tools)
    out, err, failed, prompts = talk(said, ["hi", "one", "two"])
    assert not failed, err
    assert prompts == ["> ", "result of f> ", "result of g> ", "> "]
    assert "calls f" in out and '{"a": "x"}' in out and out.endswith("done\n")
    assert [message["role"] for message in said.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert said.messages[1]["content"] == "Look:" and len(said.engine.requests) == 2


def test_reasoning_is_shown_and_sent_back_to_the_template_alone(tmp_path):
    said = conversation(tmp_path, ["hm", "</think>", "a"], thinking=True)
    out, *_ = talk(said, ["hi"], terminal=True)
    assert "\x1b[2mhm" in out and "think>" not in out
    assert said.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    assert talk(conversation(tmp_path, ["hm", "</think>", "a"], thinking=True), ["hi"])[0] == "hm\n\na\n"


def test_an_error_keeps_the_conversation_as_it_was(tmp_path):
    said = conversation(tmp_path, [], error="request 0 has ended: NaN")
    _, err, failed, _ = talk(said, ["hi"])
    assert failed and err == "error: request 0 has ended: NaN\n" and said.messages == []
    assert not said.engine.busy
    assert "must be a file" in talk(said, ["/load /dev/zero"])[1]
    said = conversation(tmp_path, tokenizer=byte_tokenizer(), thinking=True)
    assert "thinking" in talk(said, ["hi"])[1] and said.messages == []


def test_the_status_tells_of_the_last_answer_and_the_cache(tmp_path):
    said = conversation(tmp_path, ["a", "b", "c"])
    assert status(said).startswith("cache: 3 of 10 pages, 1 of 2 reused · thinking off")
    talk(said, ["hi"])
    assert re.match(r"4 tokens at [\d.]+/s after \d+ · cache", status(said))


def test_the_history_is_its_owners_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = history_file()
    assert path == tmp_path / "dsa_jax" / "chat_history" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600


def test_an_interrupt_stops_the_answer_and_keeps_what_has_come(tmp_path):
    steps = iter(range(100))
    stop = lambda: os.kill(os.getpid(), signal.SIGINT) if next(steps) == 3 else None
    said = conversation(tmp_path, list("abcdefgh"), ["x"], before_step=stop)
    before = signal.getsignal(signal.SIGINT)
    out, err, failed, _ = talk(said, ["hi", "you"])
    assert not failed and not err and out == "abcd\nx\n"
    assert [message["content"] for message in said.messages] == ["hi", "abcd", "you", "x"]
    assert said.engine.cancelled and signal.getsignal(signal.SIGINT) is before


def test_the_second_interrupt_ends_the_program(tmp_path):
    steps = iter(range(100))
    stop = lambda: os.kill(os.getpid(), signal.SIGINT) if next(steps) in (3, 4) else None
    with pytest.raises(KeyboardInterrupt):
        talk(conversation(tmp_path, list("abcdefgh"), before_step=stop), ["hi"])


def test_who_reads_no_further_frees_the_engine(tmp_path):
    said = conversation(tmp_path, list("abc"))
    said.say("hi")
    answer = said.answer()
    assert next(answer).text == "a"
    answer.close()
    assert not said.engine.busy and said.messages[-1]["content"] == "a"


# It makes the terminal its own, so that Ctrl-C reaches it.
OWN_TERMINAL = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
SCRIPT = (
    OWN_TERMINAL
    + """
import time
from pathlib import Path
from chat_cases import conversation
from model_cases import small_config, small_model
from dsa_jax.chat.terminal import run_chat
endless = ["word "] * 100_000
said = conversation(Path(sys.argv[1]), ["**bold** \\x1b[31m"], endless, ["after"], before_step=lambda: time.sleep(0.01))
sys.exit(run_chat(said))
"""
)


class Terminal:
    """A program with a terminal of its own."""

    def __init__(self, *command, **environment):
        self.text = ""
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        own = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "PYTHONPATH": paths}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
            env=os.environ | own | environment,
        )  # fmt: skip
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, words, seconds=60):
        """Reads until words come, and forgets what came before them."""
        while words not in self.text:
            ready, _, _ = select.select([self.master], [], [], seconds)
            assert ready, self.text
            try:
                came = os.read(self.master, 1 << 16).decode(errors="replace")
            except OSError:  # the program has ended
                pytest.fail(f"{words!r} has not come: {self.text}")
            self.text += came
            for _ in range(came.count("\x1b[6n")):  # asks where the cursor is
                self.type("\x1b[1;1R")
        before, _, self.text = self.text.partition(words)
        return before


@pytest.mark.slow
def test_a_model_in_a_real_terminal(tmp_path):
    """The command itself, from a folder of bytes as training leaves it."""
    save_hf(small_model(small_config(vocab_size=256)), tmp_path / "model")
    command = [sys.executable, "-c", OWN_TERMINAL + "from dsa_jax.__main__ import main; sys.exit(main(sys.argv[1:]))"]
    arguments = ["chat", str(tmp_path / "model"), "--max-tokens", "3", "--pages", "8"]
    with Terminal(*command, *arguments, XDG_STATE_HOME=str(tmp_path)) as terminal:
        terminal.wait_for("of 8 pages", seconds=300)
        terminal.type("hello\r")
        terminal.wait_for("3 tokens at", seconds=300)
        terminal.type("/quit\r")
        assert terminal.process.wait(60) == 0


def test_a_conversation_in_a_real_terminal(tmp_path):
    """Multi-line input, Markdown, Ctrl-C within an answer and at the prompt, Ctrl-D; the history is kept."""
    state = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with Terminal(sys.executable, "-c", SCRIPT, str(tmp_path), **state) as terminal:
        terminal.wait_for("cache: 3 of 10 pages")
        terminal.type("one\x1b\rtwo\r")
        terminal.wait_for("\x1b[1mbold\x1b[0m [31m")
        terminal.wait_for("tokens at")
        terminal.type("more\r")
        terminal.wait_for("word word")
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for("tokens at")
        terminal.type("half a line\x03")
        terminal.wait_for("Ctrl-D ends")
        terminal.wait_for("tokens at")
        terminal.type("last\r")
        terminal.wait_for("after")
        terminal.wait_for("tokens at")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    history = (tmp_path / "state" / "dsa_jax" / "chat_history").read_text()
    assert "+one\n+two\n" in history and "+more\n" in history and "half" not in history
