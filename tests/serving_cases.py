"""What the server's tests share: a tokenizer, a scripted engine, and a server in a thread."""

import asyncio
import contextlib
import socket
import threading
from types import SimpleNamespace

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dsa_jax.chat import ChatTemplate
from dsa_jax.inference.params import PromptToken, Stats, Token
from dsa_jax.inference.text import TextStream
from dsa_jax.server import Server, Service, Settings
from dsa_jax.server.app import make_app
from dsa_jax.server.run import listening

SPECIAL = ["<s>", "</s>", "<think>", "</think>"]
VOCAB = 320
NAME = "tiny"


def make_tokenizer() -> Tokenizer:
    """Bytes, two merges, and special tokens; all ids are below VOCAB."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)} | {"he": 256, "lo": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [("h", "e"), ("l", "o")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL])
    return tokenizer


def ids_of(text):
    return make_tokenizer().encode(text).ids


class ScriptedEngine:
    """Answers every request with a text, a token at a time, as an `Engine` would.

    Attributes:
      text: of the answers.
      requests: that came.
      cancelled: how many were left before their end.
      hold: stops all answers before a token as long as it is not set.
      failure: is raised at the third token.
    """

    def __init__(self, text="hello"):
        self.tokenizer, self.max_length = make_tokenizer(), 512
        self.runner = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB))
        self.cache = SimpleNamespace(pages=64)
        self.text, self.requests, self.cancelled, self.failure = text, [], 0, None
        self.hold = threading.Event()
        self.hold.set()

    def stats(self):
        return Stats(queued=1, running=2, pages=64, pages_used=3, prefix_hits=1, prefix_asked=4, generated_tokens=5)

    async def stream(self, request):
        self.requests.append(request)
        params, done = request.params, False
        ids = self.tokenizer.encode(self.text).ids[: params.max_tokens]
        scores = None
        if params.prompt_logprobs is not None:
            tops = tuple((each, -0.5 - each) for each in range(params.prompt_logprobs))
            scores = tuple(
                PromptToken(each, -1.5 if place else None, tops if place else None)
                for place, each in enumerate(request.prompt)
            )
        try:
            for index in range(params.n):
                text = TextStream(self.tokenizer)
                for place, token in enumerate(ids or [None]):
                    while not self.hold.is_set():
                        await asyncio.sleep(0.005)
                    if self.failure is not None and place == 2:
                        raise self.failure
                    await asyncio.sleep(0)
                    yield self._token(params, index, token, text, place == len(ids or [0]) - 1, scores)
                    scores = None
            done = True
        finally:
            self.cancelled += not done

    def _token(self, params, index, token, stream, is_last, scores):
        text = ("" if token is None else stream.push(token)) + (stream.finish() if is_last else "")
        full = len(self.tokenizer.encode(self.text).ids) <= (params.max_tokens or 0)
        finished = ("stop" if full else "length") if is_last else None
        wanted = params.logprobs is not None and token is not None
        top = tuple((each, -0.25 - each) for each in range(params.logprobs)) if wanted else None
        return Token(
            len(self.requests), index, token, -1.0, text, finished, None, -2.0 if wanted else None, top, scores
        )  # fmt: skip


def make_service(engine, folder, **settings) -> Service:
    """A service over an engine, with the template of a folder."""
    template = ChatTemplate.of(folder, engine.tokenizer)
    engine.tokenizer = template.tokenizer
    return Service(
        engine, template, Settings(NAME, port=0, **settings), special={"eos_token": "</s>", "bos_token": "<s>"}
    )


def client_of(service, **options) -> httpx.AsyncClient:
    """A client that speaks to the application in process."""
    app, _ = make_app(service)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", **options)


@contextlib.contextmanager
def running(service, *, seconds=30.0, send_buffer=None):
    """A server at a port of its own, in a thread that must end in time; yields its address and itself."""
    server = Server(service)
    with listening(service.settings) as listener:
        if send_buffer is not None:  # of the system, for each connection
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join(seconds)
            assert not thread.is_alive(), f"the server must stop within {seconds} s"
            service.close()
