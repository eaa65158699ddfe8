"""From a job to its answer: whole, or as server-sent events, for as long as the client is there."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dsa_jax.inference.params import Request, Token
from dsa_jax.server.access import log
from dsa_jax.server.errors import ApiError, printable
from dsa_jax.server.service import Event, Run, Service

HEADER_SECONDS = (
    5.0  # after which a stream begins, though its first token has not come: until then errors have a status
)
ALIVE_SECONDS = 15.0  # between comments of a stream that has nothing to say, for proxies that end silent connections
WAITING = ": waiting\n\n"

EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}


class Job(Protocol):
    """Turns tokens into an endpoint's answer."""

    @property
    def requests(self) -> Sequence[Request]:
        """For the engine, one for each prompt."""
        ...

    @property
    def stream(self) -> bool:
        """Whether the client wants events."""
        ...

    def take(self, place: int, token: Token) -> list[dict[str, Any]]:
        """Takes the next token of a prompt in; returns events for a stream."""
        ...

    def last(self) -> list[dict[str, Any]]:
        """Returns the events that end a stream."""
        ...

    def body(self) -> dict[str, Any]:
        """Returns the whole answer, when all tokens are in."""
        ...


class Answer(Response):
    """Answers a job; a client that leaves cancels it, and its pages are free at the next step.

    Args:
      job: what to run.
      service: that runs it.
    """

    def __init__(self, job: Job, service: Service):
        super().__init__()
        self.job, self.service = job, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the job beside a watch on the connection, and ends with the first of them that does."""
        seconds = self.service.settings.send_seconds

        async def bounded(message) -> None:
            async with asyncio.timeout(seconds):
                await send(message)

        work = asyncio.create_task(self._work(scope, receive, bounded))
        watch = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
        if work.cancelled():
            return
        try:
            work.result()
        except TimeoutError:
            log.info("a client has read nothing for %g s, and is left", seconds)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self.service.run(self.job.requests) as run:
                if self.job.stream:
                    await self._send_stream(run, send)
                    return
                while (event := await run.next()) is not None:
                    self.job.take(*event)
            response: Response = JSONResponse(self.job.body())
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)

    async def _send_stream(self, run: Run, send: Send) -> None:
        """Sends events; raises ApiError as long as nothing is sent."""
        begin = ""
        try:
            begin = self._next(await run.next(HEADER_SECONDS))
        except TimeoutError:
            begin = WAITING
        headers = [(name.encode(), value.encode()) for name, value in EVENT_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            text: str | None = begin
            while text is not None:
                if text:
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                text = await self._wait(run)
            end = "".join(map(_event, self.job.last())) + "data: [DONE]\n\n"
        except ApiError as error:
            end = _event(error.body())
        await send({"type": "http.response.body", "body": end.encode()})

    async def _wait(self, run: Run) -> str | None:
        """Returns the text of the next events, None when all have come."""
        try:
            event = await run.next(ALIVE_SECONDS)
        except TimeoutError:
            return WAITING
        return None if event is None else self._next(event)

    def _next(self, event: Event | None) -> str:
        return "" if event is None else "".join(map(_event, self.job.take(*event)))


def _event(data: dict[str, Any]) -> str:
    return f"data: {printable(json.dumps(data, ensure_ascii=False, separators=(',', ':')))}\n\n"


async def _left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
