"""Inputs of tokenising: files found by their names, opened whatever their compression, and read in parts.

Parts are cut by what the files hold alone, so that their tokens depend neither on who makes them nor on when.
"""

import contextlib
import dataclasses
import glob
import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal, NamedTuple, Protocol

from train.checks import shown

Kind = Literal["text", "jsonl", "parquet"]
GZIP, ZSTD = (".gz", ".bgz"), (".zst",)
JSON_LINES = (".jsonl", ".ndjson")
OTHERS = (".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".arrow", ".feather", ".avro", ".orc")  # not read
PART_BYTES = 2**20
MAX_LINE_BYTES = 2**24
MAX_ROWS = 256  # of a Parquet file, in one part
CACHE = "__pycache__"  # the folder of what Python compiled from the files beside it


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """Names a file, and says how large and how old it is."""

    path: str
    kind: Kind
    source: int  # the number of the argument that it was found by
    size: int
    mtime_ns: int
    begin: int = 0  # bytes of all files before it


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """Says where the next part begins: in which input, at which byte of its text or row, and line or row from 1."""

    file: int = 0
    offset: int = 0
    line: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Holds a part of an input: of a text that may have begun or go on, whole JSON lines, or values of whole rows."""

    file: Input
    line: int
    data: Any  # bytes; a list of the values of rows
    begins: bool
    ends: bool
    end: Position
    done: int  # bytes of the file read so far, as it lies on the disk
    problem: str | None = None  # why the line is none that can be read

    @property
    def size(self) -> int:
        """Counts the bytes, or the characters of the values."""
        return len(self.data) if isinstance(self.data, bytes) else sum(len(value or "") for value in self.data)


# Finding files


class Found(NamedTuple):
    """Lists files, and counts for each argument what it names and what is left out."""

    files: tuple[Input, ...]
    left_out: tuple[int, ...]  # files and folders of each argument's


def find_inputs(inputs: Sequence[str], kind: Kind | None = None) -> Found:
    """Lists the files that the arguments name: files, globs, and folders, but for what is hidden in these or `CACHE`.

    A file that several name is the first one's. What it holds is told by its name, unless `kind` says it.

    Raises:
      ValueError: naming an argument without files, or a file of a kind that is not read.
    """
    found: dict[str, Input] = {}
    left_out: list[int] = []
    begin = 0
    for source, pattern in enumerate(inputs):
        paths, others = _paths(os.path.expanduser(pattern))
        left_out.append(others)
        if not paths:
            raise ValueError(
                f"inputs must name files, folders with files or globs of them, got {shown(pattern)}"
                + (f", of which {others} hidden or {CACHE} are left out" if others else "")
            )
        for path in sorted(map(os.path.abspath, paths)):
            if path not in found:
                status = os.stat(path)
                found[path] = Input(path, kind or kind_of(path), source, status.st_size, status.st_mtime_ns, begin)
                begin += status.st_size
    return Found(tuple(found.values()), tuple(left_out))


def _paths(pattern: str) -> tuple[list[str], int]:
    """Lists the files that an argument names, and counts the files and folders that it leaves out."""
    if not os.path.isdir(pattern):
        paths = [pattern] if os.path.exists(pattern) else glob.iglob(pattern, recursive=True)
        return [path for path in paths if os.path.isfile(path)], 0
    paths, left_out = [], 0
    for folder, folders, names in os.walk(pattern, onerror=_refuse):
        left_out += sum(map(_is_left_out, folders + names))
        folders[:] = [name for name in folders if not _is_left_out(name)]
        paths += [os.path.join(folder, name) for name in names if not _is_left_out(name)]
    return [path for path in paths if os.path.isfile(path)], left_out


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name == CACHE


def _refuse(error: OSError) -> None:
    raise ValueError(f"inputs must be readable, got {error.filename}: {error.strerror}") from error


def kind_of(path: str) -> Kind:
    """Tells by a file's name what it holds.

    Raises:
      ValueError: if it is something that is not read.
    """
    name = os.path.basename(path).lower()
    for suffix in (*GZIP, *ZSTD):
        name = name.removesuffix(suffix)
    if name.endswith(OTHERS):
        raise ValueError(
            f"inputs must be text, JSON lines or Parquet, plain, .gz or .zst, got {path}: write it as that"
        )
    return "jsonl" if name.endswith(JSON_LINES) else "parquet" if name.endswith(".parquet") else "text"


# Opening them


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


@contextlib.contextmanager
def _open(file: Input) -> Iterator[tuple[IO[bytes], Any]]:
    """Opens a file, and what comes out of it when it is unpacked.

    Raises:
      ValueError: if it cannot be read or is not whole, or changed since it was found.
    """
    try:
        with open(file.path, "rb") as raw:
            status = os.fstat(raw.fileno())
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise ValueError(
                    f"inputs must stay as they are, but {file.path} changed from {file.size} to {status.st_size} bytes "
                    "or was written anew: take another --out"
                )
            yield raw, _unpacked(file.path, raw)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"inputs must be whole and readable, got {file.path}: {reason[:300]}") from error


def _unpacked(path: str, raw: IO[bytes]) -> Any:
    if path.lower().endswith(GZIP):
        return gzip.GzipFile(fileobj=raw)
    if path.lower().endswith(ZSTD):
        return import_pyarrow(path).CompressedInputStream(raw, "zstd")
    return raw


def import_pyarrow(path: str) -> Any:
    """Imports the library that reads Parquet and .zst.

    Raises:
      ValueError: if it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow, which is not installed: pip install 'dsa-jax[data]'") from error
    return pyarrow


def _read(stream: _Stream, size: int) -> bytes:
    """Reads so many bytes; fewer only at the end."""
    blocks, left = [], size
    while left > 0 and (block := stream.read(left)):
        blocks.append(block)
        left -= len(block)
    return b"".join(blocks)


def _skip(stream: _Stream, raw: IO[bytes], size: int) -> None:
    if stream is raw:
        raw.seek(size)
        return
    while size > 0 and (block := stream.read(min(size, PART_BYTES))):
        size -= len(block)


# Reading them in parts


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads inputs in their order, in parts of at most `part_bytes`: fewer rows or bytes only where a file ends.

    A line that is longer is read whole, up to `MAX_LINE_BYTES`, if it is one of JSON.
    """

    files: Sequence[Input]
    field: str = "text"  # the column of Parquet files
    part_bytes: int = PART_BYTES

    def pieces(self, at: Position) -> Iterator[list[Part]]:
        """Reads lists of parts, each about `part_bytes` together.

        Args:
          at: where to begin: `Position()`, or the end of the last part of a piece.

        Raises:
          ValueError: if a file cannot be read.
        """
        piece: list[Part] = []
        size = 0
        for number in range(at.file, len(self.files)):
            for part in self._parts(self.files[number], at if number == at.file else Position(number)):
                piece.append(part)
                size += part.size
                if size >= self.part_bytes:
                    yield piece
                    piece, size = [], 0
        if piece:
            yield piece

    def _parts(self, file: Input, at: Position) -> Iterator[Part]:
        with _open(file) as (raw, stream):
            if file.kind == "text":
                _skip(stream, raw, at.offset)
                yield from self._texts(file, at, stream, raw)
            elif file.kind == "jsonl":
                _skip(stream, raw, at.offset)
                yield from self._lines(file, at, stream, raw)
            elif stream is raw:
                yield from self._rows(file, at, raw)
            else:
                with tempfile.TemporaryFile() as unpacked:  # Parquet is read from its end
                    shutil.copyfileobj(stream, unpacked)
                    yield from self._rows(file, at, unpacked)

    def _texts(self, file: Input, at: Position, stream: _Stream, raw: IO[bytes]) -> Iterator[Part]:
        """Cuts a text behind the last end of a line that a part has room for; in a longer line, between characters."""
        offset, line, rest = at.offset, at.line, b""
        while True:
            data = rest + _read(stream, self.part_bytes + 1 - len(rest))
            ends = len(data) <= self.part_bytes
            cut = len(data) if ends else place_to_cut(data, self.part_bytes)
            begins, first = offset == 0, line
            offset, line, rest = offset + cut, line + data.count(b"\n", 0, cut), data[cut:]
            end = Position(at.file + 1) if ends else Position(at.file, offset, line)
            yield Part(file, first, data[:cut], begins, ends, end, raw.tell())
            if ends:
                return

    def _lines(self, file: Input, at: Position, stream: _Stream, raw: IO[bytes]) -> Iterator[Part]:
        """Cuts behind the last whole line."""
        offset, line = at.offset, at.line
        for lines, passed in _blocks_of_lines(stream, self.part_bytes):
            first, offset = line, offset + len(lines) + passed
            line += lines.count(b"\n") if lines else 1
            problem = None if lines else f"a line must have at most {MAX_LINE_BYTES} bytes, got {passed}"
            yield Part(file, first, lines, True, True, Position(at.file, offset, line), raw.tell(), problem)

    def _rows(self, file: Input, at: Position, stream: IO[bytes]) -> Iterator[Part]:
        """Reads so many rows of Parquet at a time as have the bytes of a part, on the average of their group."""
        pyarrow = import_pyarrow(file.path)
        try:
            table = pyarrow.parquet.ParquetFile(stream, buffer_size=self.part_bytes, pre_buffer=False)
            column = _column(file, table, self.field)
            total, row = max(table.metadata.num_rows, 1), 0
            for number in range(table.metadata.num_row_groups):
                group = table.metadata.row_group(number)
                if row + group.num_rows <= at.offset:
                    row += group.num_rows
                    continue
                mean = group.column(column).total_uncompressed_size // max(group.num_rows, 1) + 1
                size = min(max(self.part_bytes // mean, 1), MAX_ROWS)
                for batch in table.iter_batches(size, row_groups=[number], columns=[self.field], use_threads=False):
                    first, row = row, row + batch.num_rows
                    if first >= at.offset:
                        end, done = Position(at.file, row, row + 1), file.size * row // total
                        yield Part(file, first + 1, batch.column(0).to_pylist(), True, True, end, done)
        except pyarrow.ArrowException as error:
            raise ValueError(f"inputs must be whole Parquet files, got {file.path}: {str(error)[:300]}") from error


def place_to_cut(data: bytes, most: int) -> int:
    """Finds the last end of a line; without one, the last place that divides no character of UTF-8."""
    if cut := data.rfind(b"\n", 0, most) + 1:
        return cut
    return next((most - i for i in range(min(4, most)) if data[most - i] & 0xC0 != 0x80), most)


def _blocks_of_lines(stream: _Stream, part_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Reads whole lines, with 0; or for a line that is too long nothing, with how many bytes it has."""
    data = b""
    while True:
        wanted = (len(data) // part_bytes + 1) * part_bytes
        data += _read(stream, wanted - len(data))
        ends = len(data) < wanted
        cut = len(data) if ends else data.rfind(b"\n") + 1
        if cut:
            yield data[:cut], 0
            data = data[cut:]
        elif len(data) > MAX_LINE_BYTES:
            begun = len(data)
            passed, data = _rest_of_line(stream, part_bytes)
            yield b"", begun + passed
        if ends:
            return


def _rest_of_line(stream: _Stream, part_bytes: int) -> tuple[int, bytes]:
    """Reads past a line; gives how many bytes it still had, and what was read of those behind it."""
    passed = 0
    while block := _read(stream, part_bytes):
        if cut := block.find(b"\n") + 1:
            return passed + cut, block[cut:]
        passed += len(block)
    return passed, b""


def _column(file: Input, table: Any, field: str) -> int:
    """Finds a column of text."""
    names = table.schema_arrow.names
    if field not in names:
        raise ValueError(f"{file.path} must have the column {shown(field)}, got {shown(names)}: name it by --field")
    kind = str(table.schema_arrow.field(field).type)
    if kind not in ("string", "large_string", "string_view", "binary", "large_binary"):
        raise ValueError(f"column {shown(field)} of {file.path} must hold text, got {kind}: name another by --field")
    paths = [table.schema.column(i).path for i in range(len(table.schema))]
    return paths.index(field)
