"""The folder of a job of tokenising: whose it is, and which of its shards are whole."""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from train.checks import shown
from train.data.encoding import Counts
from train.data.indexed import Header, sync
from train.data.inputs import Position
from train.data.manifest import Shard, changed_files
from train.files import read_json_file, replace_text

JOB, JOURNAL = "job.json", "shards.jsonl"


@dataclasses.dataclass(frozen=True)
class Record:
    """Says what a shard came to and where in the inputs it ends; lines skipped behind the last one have no shard."""

    shard: Shard | None
    end: Position
    counts: dict[int, Counts]  # by the number of the source
    skipped: tuple[str, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Reads the values of its fields."""
        return cls(
            shard=None if values["shard"] is None else Shard(**values["shard"]),
            end=Position(**values["end"]),
            counts={int(source): Counts(**count) for source, count in values["counts"].items()},
            skipped=tuple(values["skipped"]),
        )


class Journal:
    """Keeps the records of the shards that are whole, a line each."""

    def __init__(self, folder: Path, file: BinaryIO):
        self.folder = folder
        self._file = file
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # of a process that was killed while it wrote
            file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        try:
            self.records = [Record.from_json(json.loads(line)) for line in lines]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder / JOURNAL} must have a record a line, but is damaged: begin anew") from error

    def is_whole(self, number: int, *, checksums: bool) -> bool:
        """Tells whether a shard is recorded, and its files are what the record says: their headers, or all bytes."""
        if number >= len(self.records):
            return False
        shard = self.records[number].shard
        if shard is None:
            return True
        try:
            header = Header.read(self.folder / shard.name)
        except ValueError:
            return False
        if (header.documents, header.tokens) != (shard.documents, shard.tokens):
            return False
        return not checksums or not changed_files(self.folder, shard)

    def keep(self, number: int, record: Record) -> None:
        """Records a shard that is whole.

        Raises:
          ValueError: if it was recorded before, and is not the same now.
        """
        if number < len(self.records):
            if record != self.records[number]:
                raise ValueError(f"shard {number} of {self.folder} is not what it was when made anew: begin anew")
            return
        self._file.write(json.dumps(dataclasses.asdict(record)).encode() + b"\n")
        sync(self._file)
        self.records.append(record)


@contextlib.contextmanager
def open_journal(folder: Path, job: dict[str, Any]) -> Iterator[Journal]:
    """Makes the folder, or opens it if it is this job's, for one process at a time.

    Raises:
      ValueError: if it is another job's, holds something else, or another process works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in folder.iterdir()} - {JOURNAL, f"{JOB}.tmp"}
    if others and JOB not in others:
        raise ValueError(f"out must be an empty folder or one of this job, got {folder}, which has {min(others)}")
    with (folder / JOURNAL).open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"out must be one process's at a time, but another works in {folder}") from error
        journal = Journal(folder, file)
        if journal.records:
            _compare(folder, job, read_json_file(folder / JOB, "a job"))
        else:  # of an attempt that came to nothing there is nothing to keep
            replace_text(folder / JOB, json.dumps(job, indent=2) + "\n")
        yield journal


def _compare(folder: Path, job: dict[str, Any], there: Any) -> None:
    """Compares the job with the one that the folder was begun by."""
    there = there if isinstance(there, dict) else {}
    for name, value in job.items():
        if there.get(name) != value:
            raise ValueError(
                f"out must be a folder of the same job, but {folder} was begun with {name} "
                f"{_described(there.get(name))}, got {_described(value)}: give what it was begun with, or another --out"
            )


def _described(value: Any) -> str:
    """Writes a value for a message; inputs by their files, bytes, and what names them."""
    try:
        return " and ".join(f"{v['files']} files of {v['size']} bytes ({v['sha256'][:8]})" for v in value)[:300]
    except (TypeError, KeyError):
        return shown(value)
