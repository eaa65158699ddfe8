"""Stops a run between two steps: by a signal, by the clock, and at the same step in all its processes."""

import contextlib
import dataclasses
import itertools
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import jax

from train.processes import cluster
from train.processes.ending import AGAIN, say_and_end

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 10.0  # that a process outside the steps of a run has to clear up after a signal
LAG = 2  # steps between a decision of process 0 and the step that it is for


class StoppedError(RuntimeError):
    """Says that a run was saved and stopped as asked for.

    Args:
      step: the step that was saved.
      status: the exit status that says by what.
    """

    def __init__(self, step: int, status: int):
        super().__init__(f"saved step {step}")
        self.step, self.status = step, status


class SignalledError(KeyboardInterrupt):
    """Says that a signal came where there is no step to finish; `status` is its exit status."""

    def __init__(self, number: int, when: str = ""):
        super().__init__(f"ended by {signal.Signals(number).name}{when}")
        self.status = 128 + number


class Stopping:
    """Takes SIGTERM and SIGINT while it is entered, and the time after which to stop.

    Between the steps of a run the first signal is a request, which the run asks for; elsewhere it raises an
    `SignalledError` in the main thread. A second one ends the process at once, and so does a first one that the main
    thread does not come to within `GRACE_SECONDS`, because it waits in a library.

    Args:
      after: seconds after which to stop, counted from now.
    """

    def __init__(self, *, after: float | None = None):
        self.status: int | None = None  # the exit status of the signal that came
        self._end = None if after is None else time.monotonic() + after
        self._stepping, self._came, self._before = False, 0, {}

    @classmethod
    def within(cls, text: str | None) -> Self:
        """Makes one that stops after a time as `seconds_of` reads it, without one at signals alone.

        Raises:
          ValueError: if it is no such time.
        """
        return cls(after=None if text is None else seconds_of(text))

    @property
    def due(self) -> int | None:
        """Gives the exit status with which to stop, None while there is no reason to."""
        if self.status is None and self._end is not None and time.monotonic() >= self._end:
            return AGAIN
        return self.status

    def check(self, step: int) -> None:
        """Checks after a run's last step that no signal is left, which came too late for a step to take it up.

        Raises:
          SignalledError: if one is.
        """
        if self.status is not None:
            raise SignalledError(self.status - 128, f" after step {step}, the last, which is saved")

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # where Python lets no signal be handled
        self._out, self._in = socket.socketpair()
        self._in.setblocking(False)
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        # Python's own handlers wait for the main thread, which may be inside a collective; a descriptor does not.
        self._fd = signal.set_wakeup_fd(self._in.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._out,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before:
            signal.set_wakeup_fd(self._fd)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._in.close()
            self._before = {}

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Leaves the first signal to the steps of a run, which ask for it by `due`."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _handle(self, number: int, _: Any) -> None:
        self.status = 128 + number
        if not self._stepping:
            raise SignalledError(number)

    def _listen(self, out: socket.socket) -> None:
        with out:
            while numbers := out.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self._take(number)

    def _take(self, number: int) -> None:
        self._came += 1
        name = signal.Signals(number).name
        if self._came > 1:
            self._end_at_once(f"ended at once by a second signal, {name}", 128 + number)
        elif not self._stepping:
            timer = threading.Timer(GRACE_SECONDS, self._end_at_once, (f"ended by {name}", 128 + number))
            timer.daemon = True
            timer.start()

    def _end_at_once(self, text: str, status: int) -> None:
        if self._before:
            cluster.tell(text, status)
            say_and_end(text, status)


@dataclasses.dataclass(frozen=True)
class Pause:
    """Says that a run saves at a step, and if it stops there, with which exit status."""

    status: int | None = None


class Pauses:
    """Agrees on the steps at which all processes of a run save besides its regular ones, and on the one where it stops.

    Process 0 decides, for a step that lies `LAG` ahead, and writes the decision down before it starts the next step.
    Another process that has the numbers of step n - 1, which need every process, is past that point of process 0; so
    at step n it finds what was decided for it. That takes one question to the coordinator a step and no collective, and
    the step's program stays what it is without.

    Args:
      last: the run's last step, which is saved anyway.
      minutes: at most so many between two checkpoints; None leaves it to the number of steps.
      stopping: signals and the clock.
    """

    _count = itertools.count()  # of the runs of this process: the same run has the same number in all processes

    def __init__(self, last: int, *, minutes: float | None = None, stopping: Stopping | None = None):
        self._last, self._seconds, self._stopping = last, None if minutes is None else 60 * minutes, stopping
        self._key, self._alone = f"pauses/{next(self._count)}", jax.process_count() == 1
        self._decided: dict[int, Pause] = {}
        self._told, self._saved_at = False, time.monotonic()

    def saved(self) -> None:
        """Takes note of a checkpoint: the minutes count from here."""
        self._saved_at = time.monotonic()

    def after(self, step: int) -> Pause | None:
        """Says whether the run saves or stops after this step, the same in every process. Call it after every step."""
        if jax.process_index() == 0:
            self._decide(step)
        else:
            self._ask()
        self._decided = {at: pause for at, pause in self._decided.items() if at >= step}
        return self._decided.pop(step, None)

    def _decide(self, step: int) -> None:
        at = step if self._alone else step + LAG
        pause = self._wish()
        pending = self._decided.values()
        if pause is None or at > self._last or any(other.status is not None for other in pending):
            return
        if pause.status is None and pending:
            return
        self._decided[at] = pause
        if not self._alone:
            cluster.put(f"{self._key}/decided/all", {str(at): pause.status for at, pause in self._decided.items()})

    def _wish(self) -> Pause | None:
        status = self._stopping.due if self._stopping else None
        if status is None and not self._alone:
            status = next(iter(cluster.read(f"{self._key}/asked").values()), None)
        if status is not None:
            return Pause(status)
        late = self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds
        return Pause() if late else None

    def _ask(self) -> None:
        if self._stopping and self._stopping.due is not None and not self._told:
            cluster.put(f"{self._key}/asked/{jax.process_index()}", self._stopping.due)
            self._told = True
        decided = cluster.read(f"{self._key}/decided").get("all", {})
        self._decided = {int(at): Pause(status) for at, status in decided.items()}


def seconds_of(text: str) -> float:
    """Reads a duration like 3h50m, 90m, 45s or 1d12h; a plain number is seconds.

    Raises:
      ValueError: if it is none, or not positive.

    Examples:
      >>> seconds_of("3h50m")
      13800.0
    """
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip(), re.ASCII)
    parts = [float(part or 0) for part in match.groups()] if match else []
    seconds = sum(part * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=False))
    if not 0 < seconds < 1e9:
        raise ValueError(f"stop-after must be a duration like 3h50m, 90m or 45s, got {text[:40]!r}")
    return seconds
