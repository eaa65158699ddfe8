"""How a process of a run ends: with one line, that of whoever has to say it first, and the command that resumes."""

import os
import sys
import threading
from typing import NoReturn

MAX_LINE = 900  # characters of an error
AGAIN = 75  # the exit status of a run that ended early through no fault of its own (EX_TEMPFAIL): resume it


class _Ending:
    """Holds the command that resumes, whether there is something to resume, and who speaks."""

    command: str | None = None
    begun = False
    speaks = threading.Lock()  # taken by the last line, and never given back by a thread that ends the process


_ending = _Ending()


def forget() -> None:
    """Begins a command, of which nothing is known yet."""
    _ending.command, _ending.begun = None, False


def resume_with(command: str) -> None:
    """Notes the command that resumes what this process does."""
    _ending.command = command


def mark_resumable() -> None:
    """Notes that the run's folder stands, so that there is something to resume."""
    _ending.begun = True


def resumed_by() -> str:
    """Writes how to resume, as the end of a line; nothing where there is nothing to resume."""
    return f"; resume with {_ending.command}" if _ending.begun and _ending.command else ""


def say(text: object, status: int, *, prefix: str = "error: ") -> int:
    """Prints one line on stderr, cut where it is long, and returns the exit status."""
    with _ending.speaks:
        return _print(text, status, prefix)


def say_last(text: object, status: int, *, prefix: str = "error: ") -> None:
    """Prints the last line of the process: who calls it next waits for the end."""
    _ending.speaks.acquire()
    _print(text, status, prefix)


def say_and_end(text: object, status: int, *, prefix: str = "error: ") -> NoReturn:
    """Prints the last line and ends the process at once, whatever its other threads wait for."""
    say_last(text, status, prefix=prefix)
    end_now(status)


def end_now(status: int) -> NoReturn:
    """Ends the process without its exit handlers, of which JAX's would wait for the other processes."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # a closed or a full stream keeps no process alive
    os._exit(status)


def _print(text: object, status: int, prefix: str) -> int:
    line = " ".join(str(text).encode(errors="backslashreplace").decode().split())
    hint = resumed_by()
    room = MAX_LINE - len(hint)
    line = line if len(line) <= room else f"{line[:room]}…"
    print(f"{prefix}{line}{hint}", file=sys.stderr, flush=True)
    return status
