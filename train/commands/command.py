"""What every command of `train` shares: arguments are read strictly, and what goes wrong is one line and a status."""

import functools
import logging
import sys
from collections.abc import Callable, Sequence

import tyro

from train.processes import cluster, ending
from train.processes.stopping import SignalledError, StoppedError
from train.watching.metrics import DivergedError


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
    ending.forget()
    try:
        command()
        cluster.part()
    except StoppedError as error:
        cluster.part()
        return ending.say(error, error.status, prefix="")
    except (ValueError, OSError) as error:
        return _end(error, 2)
    except DivergedError as error:
        return _end(error, 1)
    except SignalledError as error:
        return _end(error, error.status)
    except KeyboardInterrupt as error:
        return _end(error, 130)
    except Exception as error:
        cluster.end(f"{type(error).__name__}: {error}", 1, error=error)
        raise
    return 0


def _end(error: BaseException, status: int) -> int:
    """Says what ends the command; of a distributed run it ends all processes, and does not come back."""
    text = str(error) or "interrupted"
    cluster.end(text, status, error=error)
    return ending.say(text, status)


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
