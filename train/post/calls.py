"""Calls of code that may raise or hang, in threads of their own: errors are returned, and what hangs is left behind."""

import threading
import time
from collections.abc import Callable, Sequence


class UnansweredError(Exception):
    """Says that a call neither returned nor raised before its deadline."""


def call_all[T](calls: Sequence[Callable[[], T]], deadlines: Sequence[float]) -> list[T | BaseException]:
    """Makes all calls beside each other, and waits for each until its deadline.

    A thread cannot be ended from outside: one that hangs stays until the process ends, which does not wait for it.

    Args:
      calls: without arguments.
      deadlines: of each, on the clock of `time.monotonic`, in seconds.

    Returns:
      of each call what it returned or raised; `UnansweredError` if it did neither in time.

    Examples:
      >>> call_all([lambda: 1, lambda: [][0]], [time.monotonic() + 60] * 2)
      [1, IndexError('list index out of range')]
    """
    running = [_Call(call) for call in calls]
    return [each.wait(deadline) for each, deadline in zip(running, deadlines, strict=True)]


class _Call[T]:
    def __init__(self, call: Callable[[], T]):
        self._found: list[T | BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._found.append(call())
        except BaseException as error:  # even SystemExit: it would end this thread in silence
            self._found.append(error)

    def wait(self, deadline: float) -> T | BaseException:
        self._thread.join(max(deadline - time.monotonic(), 0.0) if deadline < threading.TIMEOUT_MAX else None)
        return self._found[0] if self._found else UnansweredError("no answer in time")
