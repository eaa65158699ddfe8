"""The command `python -m train tokenize`: text made token files that training reads in place."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from train.checks import shown
from train.data.inputs import CACHE, PART_BYTES
from train.data.manifest import MANIFEST, Manifest
from train.data.tokenize import SHARD_TOKENS, Job, TokenizeConfig, tokenize

INTERRUPTED = 130
MAX_SOURCES = 20  # that are printed; the manifest has all


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tokenises text into shards of the indexed format of Megatron-LM, with a manifest.

    Killed and given again, the same command makes only the shards that are missing.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders and globs: text, JSON lines (.jsonl) and Parquet, plain, .gz or .zst."""
    out: Path
    """The folder of the shards."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; without it bytes are the tokens."""
    field: str = "text"
    """The field of JSON lines, or the column of Parquet, that holds the text."""
    format: Literal["text", "jsonl", "parquet"] | None = None
    """What all inputs hold; without it their names say it."""
    append: bool = True
    """End every document with the tokenizer's end token, such as </s>, if it has one."""
    workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """Processes that make tokens; without it one a core. They change no byte of the result."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens after which a shard ends."""
    part_bytes: int = PART_BYTES
    """Text that a tokenizer takes at a time, for which it needs 200 times the memory; longer documents are cut."""
    on_error: Literal["stop", "skip"] = "stop"
    """A line that is no JSON, has no such field or is not UTF-8: stop there, or leave it out, count and list it."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare the checksums of the shards that are there, and make those anew that changed."""

    def config(self) -> TokenizeConfig:
        """Makes the configuration of the job."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return TokenizeConfig(kind=values.pop("format"), **values)


def main(arguments: Sequence[str]) -> None:
    """Makes the shards, and says what they hold.

    Raises:
      ValueError: if the arguments or what they name cannot be used.
    """
    parsed, unknown = tyro.cli(
        Arguments, prog="python -m train tokenize", args=list(arguments), return_unknown_args=True
    )
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}; see --help")
    try:
        manifest = run(parsed.config())
    except KeyboardInterrupt:
        print("interrupted; the same command makes the shards that are missing", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    show(manifest)


def run(config: TokenizeConfig) -> Manifest:
    """Makes the shards under a bar of progress, on stderr where that is a terminal."""
    job = Job.of(config)
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal) as bar:
        tasks = []

        def report(done: int) -> None:
            if not tasks:  # what was done before counts for no rate
                tasks.append(bar.add_task(f"{len(job.files)} files", total=job.size, completed=done))
            bar.update(tasks[0], completed=done)

        return tokenize(job, report)


def show(manifest: Manifest) -> None:
    """Prints what the shards hold, a line for each source, and what was left out."""
    console = Console(highlight=False, soft_wrap=True)
    for source in manifest.sources[:MAX_SOURCES]:
        left_out = "".join(
            f", {count:,} {what}"
            for count, what in (
                (source.empty, "empty"),
                (source.skipped, "lines skipped"),
                (source.left_out, f"hidden or {CACHE} left out"),
            )
            if count
        )
        console.print(
            f"{shown(source.name)}: {source.files:,} files, {source.documents:,} documents, {source.tokens:,} tokens"
            f"{left_out}",
            markup=False,
        )
    if (more := len(manifest.sources) - MAX_SOURCES) > 0:
        console.print(f"and {more:,} more")
    held = f"{len(manifest.shards):,} shards, {manifest.tokens:,} tokens of {manifest.dtype}"
    console.print(f"{manifest.folder / MANIFEST}: {held}", markup=False)
