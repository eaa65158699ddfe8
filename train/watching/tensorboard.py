"""The numbers of every step as TensorBoard's scalars, by tensorboardX."""

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Self

PACKAGE = "tensorboardX"
NO_SCALARS = ("step", "phase_step", "time")  # numbers of a line of metrics.jsonl that say where it stands


def check_tensorboard() -> None:
    """Checks that tensorboardX is there.

    Raises:
      ValueError: if it is not.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError("tensorboard needs the package tensorboardX: pip install 'dsa-jax[tensorboard]'")


class Scalars:
    """Writes the lines of `metrics.jsonl` into an event file of a folder, each number under its name.

    TensorBoard drops what older files of the folder say of `first_step` and later: those steps are done again. Writing
    is synchronous, unlike by tensorboardX's own writer, whose thread would hide a full disk and then block.

    Args:
      folder: the folder of event files.
      first_step: the first step that is to come.
    """

    def __init__(self, folder: Path, *, first_step: int):
        # By name: what protobuf generates is known to no type checker, and the package need not be there.
        self._events, self._summaries = (import_module(f"{PACKAGE}.proto.{name}_pb2") for name in ("event", "summary"))
        self._folder, writer = folder, import_module(f"{PACKAGE}.event_file_writer")
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = writer.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        session = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(self._events.Event(wall_time=time.time(), step=first_step, session_log=session))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            with self._writing():
                self._file.close()
        except ValueError:
            if kind is None:  # else what went wrong first is what is said
                raise

    def add(self, record: Mapping[str, Any]) -> None:
        """Writes the numbers of a line.

        Raises:
          ValueError: if the file cannot be written.
        """
        values = [
            self._summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if isinstance(value, int | float) and name not in NO_SCALARS
        ]
        summary = self._summaries.Summary(value=values)
        self._write(self._events.Event(wall_time=record["time"], step=record["step"], summary=summary))

    def _write(self, event: Any) -> None:
        with self._writing():
            self._file.write_event(event)
            self._file.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"TensorBoard's file in {self._folder} could not be written: {error.strerror}") from error
