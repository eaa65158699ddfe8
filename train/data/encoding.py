"""Parts of inputs made tokens, by any of several processes: documents taken out, bad lines told, texts encoded."""

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from train.checks import shown
from train.data.inputs import PART_BYTES, Part, place_to_cut
from train.data.tokenizing import encode_text, load_tokenizer

MAX_LISTED = 100  # skipped lines that are listed: of a piece, and of a shard


@dataclasses.dataclass(frozen=True)
class Settings:
    """Says how documents become tokens."""

    tokenizer: Path | None
    vocab_size: int
    dtype: str
    end_token_id: int | None
    field: str
    skip_errors: bool
    part_bytes: int = PART_BYTES


@dataclasses.dataclass
class Counts:
    """Counts what came of a source."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    skipped: int = 0

    def add(self, other: "Counts") -> None:
        """Adds those of another part."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass
class Encoded:
    """Holds the tokens of a piece, end to end: `lengths` of texts, each of which `ends` its document or not."""

    tokens: Integer[np.ndarray, " T"]
    lengths: list[int]
    ends: list[bool]
    counts: dict[int, Counts]  # by the number of the source
    skipped: list[str]
    last: Part  # of the piece, without its data


@dataclasses.dataclass(frozen=True)
class _Text:
    """Holds a document, or a part of one, and names it in messages."""

    text: Any  # str; bytes where these are the tokens
    where: str
    begins: bool = True
    ends: bool = True


class Encoder:
    """Makes tokens of pieces; what it makes depends on the piece and the settings alone."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.tokenizer, settings.vocab_size)

    def encode(self, piece: list[Part]) -> Encoded:
        """Makes the tokens of a piece.

        Raises:
          ValueError: naming file and line of what cannot be read, unless such lines are skipped.
        """
        arrays, ends, counts, skipped = [], [], {}, []
        for part in piece:
            count = counts.setdefault(part.file.source, Counts())
            problems: list[str] = []
            for text in self._texts(part, problems):
                tokens = self._tokens(text)
                if text.begins and text.ends and not (text.text and len(tokens)):
                    count.empty += 1
                    continue
                arrays.append(tokens)
                ends.append(text.ends)
                count.documents += text.ends
                count.tokens += len(tokens)
            count.skipped += len(problems)
            skipped += problems[: MAX_LISTED - len(skipped)]
        joined = np.concatenate(
            [np.zeros(0, self.settings.dtype), *arrays], dtype=self.settings.dtype, casting="unsafe"
        )
        last = dataclasses.replace(piece[-1], data=b"")
        return Encoded(joined, [len(tokens) for tokens in arrays], ends, counts, skipped, last)

    def _tokens(self, text: _Text) -> Integer[np.ndarray, " T"]:
        if self.tokenizer is None:
            raw = text.text if isinstance(text.text, bytes) else text.text.encode()
            return np.frombuffer(raw, np.uint8)
        pieces = list(_cut(text.text, self.settings.part_bytes))
        arrays = [
            encode_text(
                self.tokenizer,
                piece,
                text.where,
                vocab_size=self.settings.vocab_size,
                end_id=self.settings.end_token_id,
                begins=text.begins and i == 0,
                ends=text.ends and i == len(pieces) - 1,
            )
            for i, piece in enumerate(pieces)
        ]
        return np.concatenate(arrays)

    def _texts(self, part: Part, problems: list[str]) -> Iterator[_Text]:
        """Takes the documents out of a part; `problems` collects the lines that cannot be read."""
        if part.problem is not None:
            self._refuse(part, part.line, part.problem, problems)
        elif part.file.kind == "text":
            yield self._text(part, problems)
        else:
            for line, value in self._values(part):
                try:
                    text = _document(value, self.settings.field) if part.file.kind == "jsonl" else value
                    yield _Text(_checked(text), f"{part.file.path}:{line}")
                except ValueError as error:
                    self._refuse(part, line, str(error), problems)

    def _values(self, part: Part) -> Iterator[tuple[int, Any]]:
        """Numbers the JSON lines that are not blank, or the values of rows."""
        if isinstance(part.data, list):
            yield from enumerate(part.data, part.line)
        else:
            yield from ((i, line) for i, line in enumerate(part.data.split(b"\n"), part.line) if line.strip())

    def _text(self, part: Part, problems: list[str]) -> _Text:
        """Reads a part of a text without the lines that are not UTF-8."""
        where = f"{part.file.path}:{part.line}"
        if self.tokenizer is None:
            return _Text(part.data, where, part.begins, part.ends)
        try:
            text = part.data.decode()
        except UnicodeDecodeError:
            text = "".join(self._good_lines(part, part.data.split(b"\n"), problems))
        return _Text(text, where, part.begins, part.ends)

    def _good_lines(self, part: Part, lines: list[bytes], problems: list[str]) -> Iterator[str]:
        for i, line in enumerate(lines):
            try:
                yield _decoded(line) + ("\n" if i < len(lines) - 1 else "")
            except ValueError as error:
                self._refuse(part, part.line + i, str(error), problems)

    def _refuse(self, part: Part, line: int, problem: str, problems: list[str]) -> None:
        if not self.settings.skip_errors:
            row = "row" if part.file.kind == "parquet" else "line"
            raise ValueError(
                f"{part.file.path}, {row} {line}: {problem}; give --on-error skip to leave it out, or correct it and "
                "take another --out"
            )
        problems.append(f"{part.file.path}:{line}: {problem}")


def _document(line: bytes, field: str) -> Any:
    """Reads the text of a JSON line.

    Raises:
      ValueError: if it has none.
    """
    text = _decoded(line)
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise ValueError("a line must be JSON, got what nests too deep") from error
    except ValueError as error:
        raise ValueError(f"a line must be JSON, got {shown(text)}: {str(error)[:100]}") from error
    if not isinstance(record, dict):
        raise ValueError(f"a line must be a JSON object, got {shown(record)}")
    if field not in record:
        raise ValueError(f"a line must have the field {shown(field)}, got {shown(sorted(record))}")
    return record[field]


def _checked(text: Any) -> str:
    """Checks a document's text: values of Parquet may be bytes, and JSON may name halves of characters."""
    text = _decoded(text) if isinstance(text, bytes) else text
    if not isinstance(text, str):
        raise ValueError(f"a document must be text, got {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text must be whole characters, got {shown(text[error.start])}") from error
    return text


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text must be UTF-8, got {text[error.start :][:4]!r}") from error


def _cut(text: str, most: int) -> Iterator[str]:
    """Cuts a text where `place_to_cut` says, into pieces of at most so many bytes."""
    if 4 * len(text) <= most:
        yield text
        return
    data, begin = text.encode(), 0
    while len(data) - begin > most:
        end = begin + place_to_cut(data[begin : begin + most + 1], most)
        yield data[begin:end].decode()
        begin = end
    yield data[begin:].decode()


# In a process of its own

_encoders: list[Encoder] = []


def start_worker(settings: Settings) -> None:
    """Makes the process ready; it ends with the one that started it, and leaves interrupts to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core does more than threads
    _encoders.append(Encoder(settings))


def _end_with_parent() -> None:
    """Ends the process when its parent is gone: one that was killed could not tell."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def encode_piece(piece: list[Part]) -> Encoded:
    """Makes the tokens of a piece, in a process that `start_worker` made ready."""
    return _encoders[0].encode(piece)
