"""The service under the endpoints: one engine, its tokenizer and template, and the streams of all requests."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from dsa_jax.chat import ChatTemplate
from dsa_jax.inference.engine import Engine
from dsa_jax.inference.pages import OutOfPages
from dsa_jax.inference.params import Request, Token
from dsa_jax.paged import PAGE
from dsa_jax.server.access import log
from dsa_jax.server.admission import Keys
from dsa_jax.server.errors import ApiError
from dsa_jax.server.metrics import Metrics, Timer
from dsa_jax.server.settings import Settings
from dsa_jax.server.vocabulary import Vocabulary
from dsa_jax.strict_json import shorten

THREADS = 4  # that parse bodies, fill templates and encode texts

type Event = tuple[int, Token]  # of which prompt of a run
type Item = Event | ApiError | None  # None ends a prompt


class Service:
    """Runs requests of many clients over one engine.

    Args:
      engine: with a tokenizer.
      template: turns conversations into tokens.
      settings: the server's.
      special: the tokenizer's special tokens by their names, as `/tokenizer_info` tells them.

    Attributes:
      keys: who may ask.
      failed: the last step's error, until a later step succeeds.
      sequences: continuations that have not ended.
      runs: of the clients that wait for tokens.
    """

    def __init__(self, engine: Engine, template: ChatTemplate, settings: Settings, *, special: dict[str, Any]):
        self.engine, self.template, self.settings, self.special = engine, template, settings, special
        self.keys, self.created = Keys(settings.keys), int(time.time())
        self.vocabulary = Vocabulary(engine.tokenizer, engine.runner.config.vocab_size)
        self.metrics = Metrics(engine.stats)
        self.failed: str | None = None
        self.sequences = 0
        self.runs: set[Run] = set()
        self._threads = ThreadPoolExecutor(THREADS, "dsa_jax server")

    @property
    def longest(self) -> int:
        """Tells how many tokens a sequence may have: positions and pages bound it."""
        return min(self.engine.max_length, self.engine.cache.pages * PAGE + 1)

    async def in_thread[T](self, work: Callable[..., T], *arguments: Any) -> T:
        """Runs what takes long beside the event loop, in one of a few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def run(self, requests: Sequence[Request]) -> "Run":
        """Starts requests together, as an asynchronous context that ends them."""
        return Run(self, requests)

    def reserve(self, count: int) -> None:
        """Counts continuations that begin.

        Raises:
          ApiError: if there is no room for them.
        """
        most = self.settings.max_sequences
        if count > most:
            raise ApiError(400, f"prompts × n must be at most {most:,}, got {count:,}", param="n")
        if self.sequences + count > most:
            raise ApiError(
                429, f"the queue has room for {most - self.sequences:,} of the {count:,} continuations",
                code="queue_full", headers={"Retry-After": "1"},
            )  # fmt: skip
        self.sequences += count

    async def pump(self, place: int, request: Request, queue: asyncio.Queue[Item]) -> None:
        """Puts the tokens of one request into the queue of its listener, then None, or what went wrong."""
        timer = Timer(self.metrics)
        try:
            async with contextlib.aclosing(self.engine.stream(request)) as tokens:
                async for token in tokens:
                    self.failed = None
                    timer.see(token)
                    queue.put_nowait(_judged(place, token))
            queue.put_nowait(None)
        except (ValueError, OutOfPages) as error:
            queue.put_nowait(ApiError(400, str(error)))
        except Exception as error:
            self._note(error)
            queue.put_nowait(ApiError(500, "a step of the engine has failed, and ended this request", code="step"))

    def _note(self, error: Exception) -> None:
        """Keeps a step's failure for `/health`."""
        cause = error.__cause__ or error
        self.failed = type(cause).__name__
        self.metrics.failures.inc()
        log.error("a step has failed: %s: %s", self.failed, shorten(str(cause), 300))

    def end_all(self) -> None:
        """Ends every request that runs: the server stops."""
        for run in self.runs:
            run.end(ApiError(503, "the server is shutting down", code="draining"))

    def close(self) -> None:
        """Ends the threads, once nothing runs."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Run:
    """Runs requests together, and hands out their tokens as they come.

    Leaving the context cancels what has not ended. A listener that is slower than the engine has at most all the tokens
    that it asked for waiting.

    Raises:
      ApiError: on entering, if there is no room.
    """

    def __init__(self, service: Service, requests: Sequence[Request]):
        self._service, self._requests = service, requests
        self._count = sum(request.params.n for request in requests)
        self._queue: asyncio.Queue[Item] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._left = len(requests)

    async def __aenter__(self) -> Self:
        self._service.reserve(self._count)
        self._service.runs.add(self)
        pump, queue = self._service.pump, self._queue
        self._tasks = [asyncio.create_task(pump(place, each, queue)) for place, each in enumerate(self._requests)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._service.runs.discard(self)
        self._service.sequences -= self._count
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def next(self, seconds: float | None = None) -> Event | None:
        """Returns the next token, None when all have come.

        Raises:
          ApiError: if the engine refuses a request, or a step or a request has failed.
          TimeoutError: if none comes in time; the next call goes on.
        """
        async with asyncio.timeout(seconds):
            while self._left:
                item = await self._queue.get()
                if isinstance(item, ApiError):
                    raise item
                if item is not None:
                    return item
                self._left -= 1
        return None

    def end(self, error: ApiError) -> None:
        """Ends the run with an error, behind the tokens that have come."""
        self._queue.put_nowait(error)


def _judged(place: int, token: Token) -> Event | ApiError:
    """Makes an error of a token that tells of one."""
    if token.finished in ("error", "cancelled"):
        return ApiError(500, token.error or "the request was cancelled", code="generation")
    return place, token
