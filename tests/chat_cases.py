"""Tokenizers with control tokens, and an engine that says what it is told to, for the tests of conversations."""

from types import SimpleNamespace

from tokenizers import AddedToken, Tokenizer

from dsa_jax.chat import ChatTemplate
from dsa_jax.chat.session import Conversation
from dsa_jax.inference import SamplingParams, Token
from dsa_jax.inference.tokenizer import byte_tokenizer

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CONTROL = [BEGIN, END, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜User"]
CONTROL_IDS = {token: 256 + place for place, token in enumerate(CONTROL)}


def control_tokenizer(tokens=CONTROL, special=(BEGIN, END, "｜DSML｜")) -> Tokenizer:
    """Bytes, and control tokens from 256 on."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=token in special, normalized=False) for token in tokens])
    return tokenizer


def spelled(tokenizer: Tokenizer, ids) -> str:
    """The text of ids, with brackets around control tokens."""
    return b"".join(f"[{tokenizer.id_to_token(i)}]".encode() if i > 255 else bytes([i]) for i in ids).decode()


class ScriptedEngine:
    """Answers each request by the next of its scripts, a piece a step."""

    def __init__(self, *scripts, error=None, before_step=lambda: None):
        self.scripts, self.error, self.before_step = list(scripts), error, before_step
        self.requests, self.cancelled, self.left = [], False, None
        self.cache = SimpleNamespace(total_pages=10, free_pages=7)
        self.prefix = SimpleNamespace(hits=1, asked=2)

    @property
    def busy(self):
        return self.left is not None

    def add(self, request):
        self.requests.append(request)
        self.left, self.cancelled = list(self.scripts.pop(0)), False
        return len(self.requests) - 1

    def cancel(self, request):
        assert request == len(self.requests) - 1
        self.cancelled = True

    def step(self):
        self.before_step()
        name = len(self.requests) - 1
        if self.left is None:
            return []
        if self.cancelled:
            self.left = None
            return [Token(name, 0, None, None, "", "cancelled")]
        if not self.left:
            self.left = None
            error = self.error
            return [Token(name, 0, 1, 0.0, "", "error" if error else "stop", error)]
        return [Token(name, 0, 1, 0.0, self.left.pop(0))]


def conversation(tmp_path, *scripts, tokenizer=None, **options) -> Conversation:
    """A conversation with a scripted engine."""
    thinking, tools = options.pop("thinking", False), options.pop("tools", None)
    template = ChatTemplate.of(tmp_path, tokenizer or control_tokenizer())
    engine = ScriptedEngine(*scripts, **options)
    return Conversation(engine, template, SamplingParams(), thinking=thinking, tools=tools)
