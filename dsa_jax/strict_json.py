"""Reads JSON that others wrote, strictly, and says in one line of bounded length what is wrong with it."""

import json
import math
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_MESSAGE = 900  # characters of an error's line, so that a command's words before it fit in 1,000
MAX_PATH = 240  # characters of a path in a message

_REPR = reprlib.Repr(maxlevel=3, maxlist=8, maxtuple=8, maxdict=6, maxstring=80, maxother=60, maxlong=40)


def read_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      ValueError: naming the file, if it is no such object, or holds a key twice, a NaN, or a number that no float has.
      OSError: if it cannot be read.
    """
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{shown_path(path)} {error}") from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parses one JSON object; raises ValueError as `read_object`, without the file's name."""
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("is not JSON that can be read: it is nested too deeply") from None
    except _Refused:
        raise
    except ValueError as error:
        raise ValueError(f"is not JSON: {shorten(str(error), 160)}") from None
    if not isinstance(data, dict):
        raise ValueError(f"must hold a JSON object, got {type(data).__name__}")
    return data


class _Refused(ValueError):
    """JSON that Python's parser takes and we do not."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of pairs whose keys must differ."""
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(f"holds the key {shown_name(twice)} twice")
    return data


def _finite(text: str) -> float:
    """Reads a number that must be finite."""
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"holds a number that is not finite: {shorten(text, 40)}")
    return value


def shown(value: Any) -> str:
    """Writes a value for a message: its `repr`, shortened where it is long.

    Examples:
      >>> shown([0] * 100)
      '[0, 0, 0, 0, 0, 0, 0, 0, ...]'
    """
    try:
        return shorten(_REPR.repr(value), 160)
    except ValueError:  # Python refuses to write integers of more than 4,300 digits
        return f"a value of type {type(value).__name__} too large to write"


def shown_name(name: str) -> str:
    """Writes a key or a tensor's name for a message: itself if that is readable, else as a `repr`, both shortened."""
    return shorten(name if name and name.isprintable() else repr(name), 120)


def shown_path(path: Path) -> str:
    """Writes a path for a message, its end if it is long."""
    text = str(path)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= MAX_PATH else "…" + text[1 - MAX_PATH :]


def shorten(text: str, limit: int) -> str:
    """Cuts text in the middle so that `limit` characters are left, all in one line.

    Examples:
      >>> shorten("a long story", 7)
      'a l…ory'
    """
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    return text[: limit // 2] + "…" + text[len(text) - (limit - limit // 2 - 1) :]


def one_line(head: str, problems: Iterable[str]) -> str:
    """Joins problems to one line of at most `MAX_MESSAGE` characters, which counts those that do not fit.

    Examples:
      >>> one_line("two things are wrong", ["a is 1", "b is 2"])
      'two things are wrong: a is 1; b is 2'
    """
    parts = [shorten(problem, 400) for problem in problems]
    line, used = head, 0
    for part in parts:
        separator = "; " if used else ": "
        if len(line) + len(separator) + len(part) > MAX_MESSAGE - 40 * (used + 1 < len(parts)):
            break
        line, used = line + separator + part, used + 1
    left = len(parts) - used
    return f"{line}; and {left:,} problems more" if left else line
