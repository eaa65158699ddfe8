"""Errors in the shape that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse

from dsa_jax.strict_json import one_line, shorten, shown, shown_name

MAX_MESSAGE = 900  # characters
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
SHOWN_ERRORS = 20  # of a body; the rest is counted
CONFLICT = "conflict"  # marks pydantic's errors that are of no single field's value


def conflict(param: str, words: str) -> PydanticCustomError:
    """Makes an error for a validator of a whole body: `words` say it all, `param` is the field for programs."""
    return PydanticCustomError(CONFLICT, "{words}", {"words": words, "param": param})


class ErrorDetail(BaseModel):
    """Tells of one error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Holds an error, as every endpoint answers it."""

    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with a status and one line.

    Args:
      status: of HTTP.
      message: says what was expected and what came.
      param: the field at fault.
      code: a word for programs.
      headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Returns what is answered."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = printable(shorten(str(self), MAX_MESSAGE))
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Makes the response."""
        return JSONResponse(self.body(), self.status, self.headers)


def invalid_body(error: ValidationError) -> ApiError:
    """Says in one line what is wrong with a request's body."""
    found = error.errors(include_url=False)
    lines = [_line(each) for each in found[:SHOWN_ERRORS]]
    hidden = len(found) - len(lines)
    words = one_line("the body is wrong", lines) if len(lines) > 1 else lines[0]
    words = f"{words}; and {hidden:,} problems more" if hidden else words
    param = found[0].get("ctx", {}).get("param") or _path(found[0]["loc"])
    return ApiError(400, words, param=param or None, code="invalid_value")


def printable(text: str) -> str:
    """Writes lone surrogates as escapes: JSON in UTF-8 has no other place for them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _line(error) -> str:
    path, words = _path(error["loc"]), error["msg"]
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {shorten(words, 160)}"
    if error["type"] == CONFLICT:  # of several fields, which the words name
        return f"{path}: {words}" if path else words
    got = "" if error["type"] == "missing" else f", got {shown(error['input'])}"
    return f"{path or 'the body'}: {words}{got}"


def _path(place) -> str:
    """Writes a field's place as programs do: `messages[0].content`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{shown_name(part)}" for part in place]
    return shorten("".join(parts).removeprefix("."), 200)
