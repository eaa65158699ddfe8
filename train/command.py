"""What every command of `train` shares: arguments are read strictly, and what goes wrong is one line and a status."""

import functools
import logging
import sys
from collections.abc import Callable, Sequence

import tyro

from train.metrics import DivergedError

MAX_LINE = 900  # characters of an error


def parse[T](kind: type[T], arguments: Sequence[str], program: str) -> T:
    """Reads a command's arguments; exits with status 2 and the usage where a value cannot be.

    Raises:
      ValueError: naming arguments that are not known.
    """
    parsed, unknown = tyro.cli(kind, prog=program, args=list(arguments), return_unknown_args=True)
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}; see --help")
    return parsed


def run_command(command: Callable[[], object]) -> int:
    """Runs a command and returns its exit status; what went wrong becomes one line on stderr."""
    _quieten_checkpoints()
    try:
        command()
    except (ValueError, OSError) as error:
        return _complain(error, 2)
    except DivergedError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted; --resume continues from the last checkpoint", 130)
    return 0


@functools.cache
def _quieten_checkpoints() -> None:
    """Keeps from stderr what a failed save prints there beside the error that it raises.

    Orbax logs the error with its traceback. The writes that it leaves behind end when their event loop is closed, in
    threads of tensorstore, which print a traceback each as nobody could catch it; asyncio logs the tasks destroyed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


def _complain(error: object, status: int) -> int:
    """Prints one line, cut where it is long."""
    text = " ".join(str(error).encode(errors="backslashreplace").decode().split())
    print(f"error: {text if len(text) <= MAX_LINE else f'{text[:MAX_LINE]}…'}", file=sys.stderr)
    return status
