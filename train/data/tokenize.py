"""Text made token files, once: shards that stay as they are when the work is killed and begun again.

One process reads the inputs in their order and writes the shards, others make the tokens. A shard depends on where in
the inputs it begins and on the settings alone, so neither the number of processes nor a new beginning changes a byte.
The folder has

    job.json         the settings and what names the inputs: what makes the folder this job's
    shards.jsonl     a line for every shard that is whole, with where in the inputs it ends
    shard-*.bin .idx
    manifest.json    last
"""

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import tokenizers

from train.checks import check_integer
from train.data.encoding import MAX_LISTED, Counts, Encoded, Settings, encode_piece, start_worker
from train.data.indexed import IndexedWriter
from train.data.inputs import PART_BYTES, Input, Kind, Part, Position, Reader, find_inputs
from train.data.journal import Journal, Record, open_journal
from train.data.manifest import Manifest, Shard, Source, hash_tokenizer, token_dtype, vocabulary_size
from train.data.tokenizing import BYTES, find_end_token, load_tokenizer

VERSION = 1
MAX_VOCABULARY = 2**31 - 1
PIECES_A_WORKER = 3  # on their way: one at work, one before it, one behind
SHARD_TOKENS = 2**27


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Says which text becomes tokens, how, and where they go."""

    inputs: tuple[str, ...]
    """Files, folders and globs: text, JSON lines and Parquet, plain, .gz or .zst."""
    out: Path
    """The folder of the shards and their manifest."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; none: bytes are the tokens."""
    field: str = "text"
    """What the text is called in JSON lines and Parquet."""
    kind: Kind | None = None
    """What the inputs hold, if their names do not say it."""
    append: bool = True
    """End every document with the tokenizer's end token, if it has one."""
    workers: int = 1
    """How many processes make tokens."""
    shard_tokens: int = SHARD_TOKENS
    """A shard is full when it has so many; a document that is not at its end may make it twice as large."""
    part_bytes: int = PART_BYTES
    """How much text a tokenizer takes at a time, for which it needs 200 times the memory; longer texts are cut."""
    on_error: Literal["stop", "skip"] = "stop"
    """What becomes of a line that cannot be read."""
    verify: bool = False
    """Also compare the checksums of the shards that are there, and make those anew that changed."""

    def __post_init__(self):
        if not self.inputs:
            raise ValueError("inputs must be files, folders or globs, got none")
        check_integer("workers", self.workers, most=1024)
        check_integer("shard_tokens", self.shard_tokens)
        check_integer("part_bytes", self.part_bytes, least=4)


@dataclasses.dataclass(frozen=True)
class Job:
    """Holds what a configuration comes to: the files that there are, and how their text becomes tokens."""

    config: TokenizeConfig
    files: tuple[Input, ...]
    settings: Settings
    left_out: tuple[int, ...]  # files and folders of each argument's that are hidden or compiled

    @classmethod
    def of(cls, config: TokenizeConfig) -> Self:
        """Reads the tokenizer and finds the files.

        Raises:
          ValueError: if there are none, or the tokenizer cannot be read.
        """
        tokenizer = load_tokenizer(config.tokenizer, MAX_VOCABULARY)
        end = None
        if tokenizer is not None and config.tokenizer is not None and config.append:
            end = find_end_token(tokenizer, config.tokenizer)
        vocab_size = BYTES if tokenizer is None else vocabulary_size(tokenizer)
        settings = Settings(
            tokenizer=config.tokenizer,
            vocab_size=vocab_size,
            dtype=token_dtype(vocab_size).name,
            end_token_id=None if end is None else end.id,
            field=config.field,
            skip_errors=config.on_error == "skip",
            part_bytes=config.part_bytes,
        )
        files, left_out = find_inputs(config.inputs, config.kind)
        out = os.path.abspath(config.out)
        if inside := next((file.path for file in files if file.path.startswith(out + os.sep)), None):
            raise ValueError(f"out must not be a folder of the inputs, got {config.out}, which holds {inside}")
        return cls(config, files, settings, left_out)

    @property
    def size(self) -> int:
        """Counts the bytes of all files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Says what the bytes of the shards depend on."""
        return {
            "version": VERSION,
            "tokenizers": tokenizers.__version__,
            "tokenizer_hash": hash_tokenizer(self.config.tokenizer),
            "end_token_id": self.settings.end_token_id,
            "field": self.config.field,
            "shard_tokens": self.config.shard_tokens,
            "part_bytes": self.config.part_bytes,
            "inputs": [self._digest(source) for source in range(len(self.config.inputs))],
        }

    def _digest(self, source: int) -> dict[str, Any]:
        """Names the files of an argument by their places, kinds, sizes and times."""
        files = [file for file in self.files if file.source == source]
        digest = hashlib.sha256()
        for file in files:
            digest.update(os.fsencode(f"{file.path}\0{file.kind}\0{file.size}\0{file.mtime_ns}\n"))
        return {"files": len(files), "size": sum(file.size for file in files), "sha256": digest.hexdigest()}

    def manifest(self, records: Sequence[Record]) -> Manifest:
        """Adds up the shards.

        Raises:
          ValueError: if the inputs have no text.
        """
        shards = tuple(record.shard for record in records if record.shard is not None)
        if not shards:
            raise ValueError(f"inputs must have text, got none in {len(self.files)} files of {self.size} bytes")
        return Manifest(
            folder=self.config.out,
            tokenizer_hash=hash_tokenizer(self.config.tokenizer),
            vocab_size=self.settings.vocab_size,
            dtype=self.settings.dtype,
            end_token_id=self.settings.end_token_id,
            shards=shards,
            sources=tuple(self._source(source, records) for source in range(len(self.config.inputs))),
            skipped=tuple(line for record in records for line in record.skipped),
        )

    def _source(self, source: int, records: Sequence[Record]) -> Source:
        counts = Counts()
        for record in records:
            counts.add(record.counts.get(source, Counts()))
        files = [file for file in self.files if file.source == source]
        size = sum(file.size for file in files)
        left_out = self.left_out[source]
        return Source(self.config.inputs[source], len(files), size, **dataclasses.asdict(counts), left_out=left_out)


# The work

type Report = Callable[[int], object]  # takes how many bytes of the inputs are done


def tokenize(job: Job, report: Report = lambda done: None) -> Manifest:
    """Makes the shards that are not there yet, and then the manifest.

    Args:
      job: what to make.
      report: is told of the progress.

    Raises:
      ValueError: if the inputs, the tokenizer or the folder cannot be used, or a worker was killed.
    """
    with open_journal(job.config.out, job.to_json()) as journal:
        try:
            make_shards(job, journal, report)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ValueError(
                "a worker ended before its time, perhaps killed for want of memory: give the same command again, with "
                f"fewer than {job.config.workers} --workers"
            ) from error
        manifest = job.manifest(journal.records)
        manifest.save()
    return manifest


def make_shards(job: Job, journal: Journal, report: Report) -> None:
    """Makes the shards that are missing, each from where the one before it ends."""
    reader = Reader(job.files, job.config.field, job.config.part_bytes)
    with _workers(job) as pool:
        at, stream = Position(), None
        for number in itertools.count():
            if journal.is_whole(number, checksums=job.config.verify):
                at, stream = journal.records[number].end, None
                continue
            if stream is None:
                stream = _encoded(pool, reader.pieces(at), job.config)
            record = make_shard(job, number, stream, report)
            if record is None:
                return
            journal.keep(number, record)
            at = record.end


@contextlib.contextmanager
def _workers(job: Job) -> Iterator[concurrent.futures.Executor]:
    """Starts processes when they are needed, anew rather than by fork, which threads do not survive."""
    pool = concurrent.futures.ProcessPoolExecutor(
        job.config.workers, multiprocessing.get_context("spawn"), start_worker, (job.settings,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _encoded(
    pool: concurrent.futures.Executor, pieces: Iterable[list[Part]], config: TokenizeConfig
) -> Iterator[Encoded]:
    """Makes tokens of pieces, in their order; few pieces are on their way at a time, and fewer if they are large."""
    pending: collections.deque[tuple[int, concurrent.futures.Future[Encoded]]] = collections.deque()
    limit = PIECES_A_WORKER * config.workers
    for piece in pieces:
        pending.append((sum(part.size for part in piece), pool.submit(encode_piece, piece)))
        while len(pending) >= limit or sum(size for size, _ in pending) >= 2 * limit * config.part_bytes:
            yield pending.popleft()[1].result()
    for _, future in pending:
        yield future.result()


def make_shard(job: Job, number: int, stream: Iterator[Encoded], report: Report) -> Record | None:
    """Writes one shard of what comes, until it is full; None if nothing comes.

    Raises:
      ValueError: if it cannot be written.
    """
    prefix = job.config.out / f"shard-{number:05d}"
    writer = IndexedWriter(prefix, job.settings.dtype)
    try:
        record = _fill(writer, stream, job.config.shard_tokens, report)
        if record is None or not writer.tokens:
            writer.discard()
            return record
        return dataclasses.replace(record, shard=Shard(prefix.name, **dataclasses.asdict(writer.close())))
    except OSError as error:
        writer.discard()
        raise ValueError(
            f"{prefix}.bin must be writable, got {error.strerror or error}: the shards before it are whole, give the "
            "same command again when it is"
        ) from error
    except BaseException:
        writer.discard()
        raise


def _fill(writer: IndexedWriter, stream: Iterator[Encoded], shard_tokens: int, report: Report) -> Record | None:
    """Writes pieces until the shard is full at the end of a document, or twice as full within one."""
    counts: dict[int, Counts] = {}
    skipped: list[str] = []
    last = None
    for encoded in stream:
        begin = 0
        for length, ends in zip(encoded.lengths, encoded.ends, strict=True):
            writer.add(encoded.tokens[begin : begin + length], ends=ends)
            begin += length
        for source, count in encoded.counts.items():
            counts.setdefault(source, Counts()).add(count)
        skipped += encoded.skipped[: MAX_LISTED - len(skipped)]
        last = encoded.last
        report(last.file.begin + last.done)
        if writer.tokens >= (2 * shard_tokens if writer.is_open else shard_tokens):
            break
    return None if last is None else Record(None, last.end, counts, tuple(skipped))
