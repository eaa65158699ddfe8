"""JSON lines in, JSON lines out: many prompts through an engine, continued where a run was cut."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dsa_jax.chat.options import SamplingOptions
from dsa_jax.inference import Engine, OutOfPages, Request, SamplingParams, Token
from dsa_jax.strict_json import parse_object, shorten, shown, shown_path

WAITING = 2  # times the engine's rows: requests that it holds, those that wait included
MAX_LINE = 16_000_000  # bytes

type Id = str | int


@dataclasses.dataclass(frozen=True)
class Job:
    """Asks for the continuations of a line's prompt."""

    line: int
    id: Id
    prompt: str | list[int]
    params: SamplingParams


@dataclasses.dataclass
class _Running:
    """Gathers what has come of a job."""

    job: Job
    outputs: list[dict[str, Any]]
    left: int


class Lines:
    """Continues prompts of JSON lines, each {"prompt": text or token ids} with "id" and options if wanted.

    A result is a line {"id", "outputs": [{"text", "tokens", "finished"}]}, written when its last continuation ends; the
    id is the line's number if the line has none. What the output already holds is not generated again.

    Args:
      engine: which runs nothing else.
      options: of lines that do not say otherwise.
      complain: is told of a line that cannot be continued, in one line.
    """

    def __init__(self, engine: Engine, options: SamplingOptions, complain: Callable[[str], None]):
        self.failed = 0
        self._engine, self._options, self._complain = engine, options, complain
        self._running: dict[int, _Running] = {}
        self._seen: set[Id] = set()

    def run(self, source: BinaryIO, name: str, target: Path, advance: Callable[[], None]) -> None:
        """Continues the prompts of `source`.

        Args:
          source: lines of UTF-8.
          name: of the source, for complaints.
          target: the file of results, to which they are added.
          advance: is told of each line that is done with.

        Raises:
          ValueError: if the target holds something else.
          OSError: if a file cannot be read or written.
        """
        done = repair_results(target)
        jobs = self._jobs(source, name, done, advance)
        with open(target, "ab") as out:
            more = True
            while more or self._running:
                while more and len(self._running) < WAITING * self._engine.scheduler.limits.rows:
                    job = next(jobs, None)
                    more = job is not None
                    if job is not None:
                        self._add(job, name, advance)
                for token in self._engine.step() if self._running else ():
                    self._take(token, name, out, advance)

    def _jobs(self, source: BinaryIO, name: str, done: set[Id], advance) -> Iterator[Job]:
        number = 0
        while line := source.readline(MAX_LINE + 1):
            number += 1
            if line.strip():
                try:
                    if len(line) > MAX_LINE:
                        raise ValueError(f"must have at most {MAX_LINE:,} bytes")
                    job = read_job(line, number, self._options)
                    if job.id in self._seen:
                        raise ValueError(f"has the id {shown(job.id)} of an earlier line")
                except (ValueError, TypeError) as error:
                    self._fail(name, number, error)
                    if not line.endswith(b"\n"):
                        _skip_line(source)
                else:
                    self._seen.add(job.id)
                    if job.id not in done:
                        yield job
                        continue
            advance()

    def _add(self, job: Job, name: str, advance) -> None:
        try:
            request = self._engine.add(Request(job.prompt, job.params))
        except (ValueError, OutOfPages) as error:
            self._fail(name, job.line, error)
            advance()
            return
        outputs = [{"text": "", "tokens": 0, "finished": None} for _ in range(job.params.n)]
        self._running[request] = _Running(job, outputs, job.params.n)

    def _take(self, token: Token, name: str, out: BinaryIO, advance) -> None:
        running = self._running.get(token.request)
        if running is None:  # a continuation of a request that has failed
            return
        output = running.outputs[token.index]
        output["text"] += token.text
        output["tokens"] += token.token is not None
        output["finished"] = token.finished
        running.left -= token.finished is not None
        if token.error is not None:
            self._fail(name, running.job.line, token.error)
        elif not running.left:
            line = json.dumps({"id": running.job.id, "outputs": running.outputs}, ensure_ascii=False)
            out.write(line.encode() + b"\n")
            out.flush()
        if token.error is not None or not running.left:
            del self._running[token.request]
            advance()

    def _fail(self, name: str, line: int, error: Exception | str) -> None:
        self.failed += 1
        self._complain(f"{name} line {line}: {shorten(str(error), 400)}")


def read_job(line: bytes, number: int, options: SamplingOptions) -> Job:
    """Reads a line.

    Raises:
      ValueError: in words that follow the line's name.
    """
    values = parse_object(line)
    names = {field.name for field in dataclasses.fields(SamplingOptions)}
    unknown = values.keys() - names - {"id", "prompt"}
    if unknown:
        raise ValueError(f"must have a prompt, an id and options of sampling alone, got {shown(sorted(unknown))}")
    prompt, own_id = values.pop("prompt", None), values.pop("id", number)
    are_ids = isinstance(prompt, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in prompt)
    if not isinstance(prompt, str) and not are_ids:
        raise ValueError(f"must have a prompt, text or token ids, got {shown(prompt)}")
    if not isinstance(own_id, str | int) or isinstance(own_id, bool):
        raise ValueError(f"must have text or an integer as its id, got {shown(own_id)}")
    return Job(number, own_id, prompt, dataclasses.replace(options, **values).params())


def repair_results(path: Path) -> set[Id]:
    """Takes a torn last line off a file of results, and reads the ids of the others; none if there is no file.

    Raises:
      ValueError: naming a line that is no result.
    """
    if not path.exists():
        return set()
    done: set[Id] = set()
    with open(path, "r+b") as file:
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                os.truncate(file.fileno(), whole)
                break
            whole += len(line)
            try:
                done.add(parse_object(line)["id"])
            except (ValueError, KeyError, TypeError) as error:
                problem, place = shorten(str(error), 200), f"{shown_path(path)} line {number}"
                raise ValueError(f"{place} must be a result of this command: {problem}") from None
    return done


def _skip_line(source: BinaryIO) -> None:
    """Reads up to the end of a line that is too long."""
    while (part := source.readline(MAX_LINE)) and not part.endswith(b"\n"):
        pass
