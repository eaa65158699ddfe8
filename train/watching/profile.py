"""Traces some steps of a run with JAX's profiler, for TensorBoard, XProf or Perfetto."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Self

import jax

from train.checks import MAX_COUNT, shown


@dataclasses.dataclass(frozen=True)
class ProfiledSteps:
    """Says which steps of a run are traced, the first and the last of them."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads FIRST:LAST.

        Raises:
          ValueError: if it reads otherwise.

        Examples:
          >>> ProfiledSteps.parse("10:12")
          ProfiledSteps(first=10, last=12)
        """
        match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text, re.ASCII)
        steps = None if match is None else cls(int(match[1]), int(match[2]))
        if steps is None or not 1 <= steps.first <= steps.last <= MAX_COUNT:
            raise ValueError(f"profile must be FIRST:LAST, two steps of the run like 10:12, got {shown(text)}")
        return steps

    def check(self, steps: int) -> None:
        """Checks that they are among the `steps` steps of a run.

        Raises:
          ValueError: if they are not.
        """
        if self.last > steps:
            raise ValueError(f"profile must name steps of the run, which has {steps}, got {self.first}:{self.last}")

    def __str__(self) -> str:
        return f"{self.first}:{self.last}"


class Profiler:
    """Writes the trace of the steps into a folder, each process its own; without steps it does nothing.

    A run that is continued between the first and the last of them traces those that are left.
    """

    def __init__(self, folder: Path, steps: ProfiledSteps | None):
        self._folder, self._steps, self._runs = folder, steps, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def begin(self, step: int) -> None:
        """Starts with the first of the steps."""
        if self._steps is not None and not self._runs and self._steps.first <= step <= self._steps.last:
            jax.profiler.start_trace(self._folder)
            self._runs = True

    def end(self, step: int, results: Any) -> None:
        """Stops behind the last of the steps, when the device has its results."""
        if self._runs and self._steps is not None and step == self._steps.last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()
