"""The numbers of every step, in `metrics.jsonl`."""

import collections
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax

from train.files import WriteError, replace_text, writing

type OnStep = Callable[[int, int, dict[str, float]], None]  # of the phase's number, its step, and the step's metrics


class DivergedError(RuntimeError):
    """A loss or a gradient that is not finite."""


class MetricsLog:
    """Writes `metrics.jsonl`, one line a step, when a later step has started: so no step waits for its numbers.

    Args:
      path: the file.
      keep: the last step whose line stays; later ones will be done again, and a line cut short goes with them.
      on_step: is called with each line's numbers.
    """

    def __init__(self, path: Path, *, keep: int, on_step: OnStep | None = None):
        if jax.process_index() == 0:
            replace_text(path, "".join(_whole_lines(path, keep)))
        # Every process sees the numbers, and stops if one is not finite; the first alone keeps them.
        self._path = path if jax.process_index() == 0 else Path(os.devnull)
        with writing(self._path):
            self._file = self._path.open("a")
        self._on_step = on_step
        self._pending, self._time = collections.deque(), time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            with writing(self._path):
                self._file.close()  # which writes again what could not be written
        except WriteError:
            if kind is None:
                raise

    def put(self, step: int, phase: int, name: str, phase_step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that may still be running, and writes those of the step before.

        Raises:
          DivergedError: if one of those is not finite.
        """
        self._pending.append((step, phase, name, phase_step, metrics))
        if len(self._pending) > 1:
            self._write(*self._pending.popleft())

    def flush(self) -> None:
        """Writes what is pending, to the disk itself.

        Raises:
          DivergedError: if a number is not finite.
        """
        while self._pending:
            self._write(*self._pending.popleft())
        if jax.process_index() == 0:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def _write(self, step: int, phase: int, name: str, phase_step: int, metrics: dict[str, jax.Array]) -> None:
        values = {key: value.item() for key, value in jax.device_get(metrics).items()}
        for key, value in values.items():
            if not math.isfinite(value):
                raise DivergedError(f"{key} is {value} at step {step} (step {phase_step} of {name})")
        now = time.monotonic()
        seconds, self._time = round(now - self._time, 4), now
        record = {"step": step, "phase": name, "phase_step": phase_step, **values, "seconds": seconds}
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._on_step is not None:
            self._on_step(phase, phase_step, values)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a `metrics.jsonl`, none if there is no file; `seconds` are since the line before."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _whole_lines(path: Path, last: int) -> list[str]:
    """Reads the lines up to step `last`, or to one that was cut short."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if not isinstance(step, int):
            break
        if step <= last:
            lines.append(line + "\n")
    return lines
