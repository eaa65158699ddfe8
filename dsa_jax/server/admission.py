"""The inner door: keys, content types, sizes, and how many requests are let in at a time."""

import asyncio
import hashlib
import hmac
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsa_jax.server.errors import ApiError
from dsa_jax.server.settings import Settings

OPEN_PATHS = ("/", "/health", "/health/live", "/health/ready")  # and what is below PAGE_PATH
PAGE_PATH = "/page/"
OVERRUN = 4  # times max_body that are read of a body that is too large, and dropped, so that its sender sees the answer
BUSY_SECONDS, DRAIN_SECONDS = "1", "5"  # after which a refused client may try again


class Keys:
    """Knows API keys by their codes under a secret of this process.

    A code stands for its key wherever a key would have to be kept: in the salts of the prefix cache.
    """

    def __init__(self, keys: tuple[str, ...]):
        self._secret = secrets.token_bytes(32)
        self._codes = [self._code(key.encode()) for key in keys]

    def identify(self, headers: Headers) -> str:
        """Returns the code of a request's key; of any request where there are no keys.

        Every key is compared, each in constant time.

        Raises:
          ApiError: if there are keys and the request has none of them.
        """
        if not self._codes:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        code = self._code(key.strip().encode("latin-1", "replace"))
        known = [hmac.compare_digest(code, each) for each in self._codes]
        if not any(known) or scheme.lower() != "bearer":
            raise ApiError(
                401, "an API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return code

    def salt(self, code: str, cache_salt: str | None) -> str:
        """Returns the salt of the prefixes that a request may share."""
        return self._code(f"{code}\0{cache_salt or ''}".encode(errors="surrogatepass"))

    def _code(self, data: bytes) -> str:
        return hmac.new(self._secret, data, hashlib.sha256).hexdigest()


class Admission:
    """Lets requests in that have a key, JSON of bounded size, and room.

    Their bodies are read here, as far as the limit.

    Args:
      app: what is behind the door; it finds the key's code in `request.state.code`.
      settings: the server's.
      keys: who may come in.

    Attributes:
      active: requests with a body that are in.
      draining: whether no more are let in.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, keys: Keys):
        self.app, self.settings, self.keys = app, settings, keys
        self.active, self.draining = 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self._admit(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if path not in OPEN_PATHS and not path.startswith(PAGE_PATH):
            scope.setdefault("state", {})["code"] = self.keys.identify(headers)
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        self._check(headers)
        self.active += 1
        try:
            body = await self._read(headers, receive)
            await self.app(scope, _replay(body, receive), send)
        finally:
            self.active -= 1

    def _check(self, headers: Headers) -> None:
        close = {"Connection": "close"}  # the body is not read
        if self.draining:
            raise ApiError(
                503, "the server is shutting down", code="draining", headers=close | {"Retry-After": DRAIN_SECONDS}
            )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the content type must be application/json", code="content_type", headers=close)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "the body must not be compressed", code="content_encoding", headers=close)
        if self.active >= self.settings.max_requests:
            raise ApiError(
                429, f"the server has {self.active} requests already, as many as it takes", code="queue_full",
                headers=close | {"Retry-After": BUSY_SECONDS},
            )  # fmt: skip

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """Reads a body as it comes, whatever Content-Length says."""
        most = self.settings.max_body
        said = headers.get("content-length", "0")
        too_large = ApiError(
            413, f"the body must be at most {most:,} bytes", code="body_too_large", headers={"Connection": "close"}
        )
        if said.isdecimal() and (len(said) > 18 or int(said) > OVERRUN * most):
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for part in _parts(receive):
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    elif size > OVERRUN * most:
                        break
        except TimeoutError:
            words = f"the body must come within {self.settings.body_seconds:g} s"
            raise ApiError(408, words, code="timeout", headers={"Connection": "close"}) from None
        if size > most:
            raise too_large
        return b"".join(parts)


async def _parts(receive: Receive):
    """Yields a body in the pieces in which it comes."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client has left within the body")
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hands a body that was read on, and then what else comes."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return left.pop() if left else await receive()

    return replayed
