"""The numbers of every step, in `metrics.jsonl`."""

import collections
import json
import math
import os
import time
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax

from train.files import WriteError, replace_text, writing

CLOCKS = ("time", "seconds", "data_seconds", "evaluation_seconds", "compile_seconds", "rollout_seconds")

type OnStep = Callable[[int, int, dict[str, float]], None]  # of the phase's number, its step, and the step's metrics
type OnRecord = Callable[[dict[str, Any]], None]  # of a line of the file


def is_clock(name: str) -> bool:
    """Tells whether a number, or one of its parts, differs where the same is computed again."""
    return name.partition("/")[0] in CLOCKS


class DivergedError(RuntimeError):
    """A loss or a gradient that is not finite."""


class MetricsLog:
    """Writes `metrics.jsonl`, one line a step, when a later step has started: so no step waits for its numbers.

    Args:
      path: the file.
      keep: the last step whose line stays; later ones will be done again, and a line cut short goes with them.
      on_step: is called with each line's numbers.
      on_record: is called with each line, in the process that writes it.
      first: further numbers of the first line that is written.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep: int,
        on_step: OnStep | None = None,
        on_record: OnRecord | None = None,
        first: Mapping[str, float] = types.MappingProxyType({}),
    ):
        self.kept = _whole_records(path, keep)
        self._tokens_seen = sum(record.get("tokens", 0) for record in self.kept)
        if jax.process_index() == 0:
            replace_text(path, "".join(json.dumps(record) + "\n" for record in self.kept))
        # Every process sees the numbers, and stops if one is not finite; the first alone keeps them.
        self._path = path if jax.process_index() == 0 else Path(os.devnull)
        with writing(self._path):
            self._file = self._path.open("a")
        self._on_step, self._on_record, self._first = on_step, on_record, dict(first)
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

    def put(
        self,
        step: int,
        phase: int,
        name: str,
        phase_step: int,
        metrics: Mapping[str, jax.Array],
        known: Mapping[str, float] = types.MappingProxyType({}),
    ) -> None:
        """Takes the metrics of a step that may still be running, and writes those of the step before.

        Args:
          step: of the run.
          phase: the phase's number.
          name: the phase's name.
          phase_step: of the phase.
          metrics: of the step, on the device.
          known: numbers that the host has already.

        Raises:
          DivergedError: if one of the step before is not finite.
        """
        self._pending.append((step, phase, name, phase_step, metrics, dict(known)))
        if len(self._pending) > 1:
            self._write(*self._pending.popleft())

    def add(self, values: Mapping[str, float]) -> None:
        """Adds to the numbers of the step that was put last and is not yet written."""
        self._pending[-1][-1].update(values)

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

    def _write(self, step: int, phase: int, name: str, phase_step: int, metrics: Any, known: dict[str, float]) -> None:
        found = {key: value.tolist() for key, value in jax.device_get(metrics).items()} | known
        values: dict[str, float] = {key: value for key, value in found.items() if not isinstance(value, list)}
        for key, value in values.items():
            if not math.isfinite(value):
                raise DivergedError(f"{key} is {value} at step {step} (step {phase_step} of {name})")
        now = time.monotonic()
        seconds, self._time = round(now - self._time, 4), now
        self._tokens_seen += values.get("tokens", 0)
        clocks = {"tokens_seen": self._tokens_seen, "seconds": seconds, "time": round(time.time(), 3)}
        record = {"step": step, "phase": name, "phase_step": phase_step, **found, **clocks, **self._first}
        self._first = {}
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._on_step is not None:
            self._on_step(phase, phase_step, values)
        if self._on_record is not None and jax.process_index() == 0:
            self._on_record(record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a `metrics.jsonl`, none if there is no file; `seconds` are since the line before."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_record(records: Iterable[Mapping[str, Any]], phase: str) -> Mapping[str, Any] | None:
    """Finds the line of a phase with the least held-out loss, the earliest of equal ones; None where none has any."""
    measured = [record for record in records if record.get("phase") == phase and "held_out_loss" in record]
    return min(measured, key=lambda record: record["held_out_loss"], default=None)


def _whole_records(path: Path, last: int) -> list[dict[str, Any]]:
    """Reads the lines up to step `last`, or to one that was cut short."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError):
            break
        if not isinstance(step, int):
            break
        if step <= last:
            records.append(record)
    return records
