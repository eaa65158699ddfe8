"""The outer door: which hosts and origins are answered, what is logged, and what is said when all else has failed."""

import ipaddress
import logging
import time
import traceback
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsa_jax.server.errors import ApiError

log = logging.getLogger("dsa_jax.server")

LOGGED_PATH = 80  # characters


class Access:
    """Refuses foreign Host and Origin headers, and logs each request.

    A page of another site whose name has been made to mean this machine (DNS rebinding) comes with that name in Host. A
    form or script of another site comes with the site's name in Origin, which CORS alone does not refuse.

    Args:
      app: what is behind the door.
      hosts: names besides `localhost` that are this server's.
      origins: of other sites that may ask.
      count: is told the path and the status of each request, 0 where the client has left before it had one.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Iterable[str], origins: Iterable[str], count: Callable[[str, int], None]
    ):
        self.app, self.count = app, count
        self.hosts = frozenset({"localhost", *(host.lower() for host in hosts)})
        self.origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, complete = time.perf_counter(), 0, False

        async def watched(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            self.check(Headers(scope=scope))
            await self.app(scope, receive, watched)
        except ApiError as error:
            await error.response()(scope, receive, watched)
        except Exception as error:
            log.error("%s", describe(error))
            if not status:
                await ApiError(500, "the server has failed at this request").response()(scope, receive, watched)
            elif not complete:
                raise _Broken(type(error).__name__) from None
        finally:
            seconds = time.perf_counter() - begin
            log.info("%s %s %s %.3f s", scope["method"], _shown(scope["path"]), status or "left", seconds)
            self.count(scope["path"], status)

    def check(self, headers: Headers) -> None:
        """Raises ApiError for a host or an origin that is not ours."""
        host = headers.get("host", "")
        name = _host_name(host)
        if name not in self.hosts and not _is_address(name):
            raise ApiError(
                403, "the Host header must be localhost, an address, or a name given by --allow-host", code="host"
            )
        origin = headers.get("origin")
        own = (f"http://{host}", f"https://{host}")
        if origin is not None and origin not in self.origins and origin.lower() not in map(str.lower, own):
            raise ApiError(403, "the Origin header must be this server's, or one of --allow-origin", code="origin")


class _Broken(RuntimeError):
    """Ends a connection whose answer had begun."""


def describe(error: BaseException) -> str:
    """Says where an error was raised, but not its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places or 'an unknown place'}"


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _shown(path: str) -> str:
    """Writes a path for the log: one line, short, nothing that a terminal obeys."""
    path = path if path.isascii() and path.isprintable() else repr(path)
    return path if len(path) <= LOGGED_PATH else path[:LOGGED_PATH] + "…"
