"""The commands `generate` and `chat`, once their arguments are read."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from dsa_jax.chat.display import without_controls
from dsa_jax.chat.lines import Lines
from dsa_jax.chat.messages import check_tools
from dsa_jax.chat.options import SamplingOptions
from dsa_jax.chat.session import Conversation
from dsa_jax.chat.template import ChatTemplate
from dsa_jax.config import Config
from dsa_jax.inference import LLM, MTP, Engine, NGram, Request
from dsa_jax.inference.engine import ROWS
from dsa_jax.inference.tokenizer import find_tokenizer
from dsa_jax.parallel.sharding import make_mesh, parse_mesh, shards
from dsa_jax.strict_json import parse_object, shown_path


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a checkpoint.

    Raises:
      ValueError: if it has none.
    """
    tokenizer = find_tokenizer(folder, Config.from_hf(folder).vocab_size)
    if tokenizer is None:
        raise ValueError(f"{shown_path(folder)} must hold a tokenizer.json, got none")
    return tokenizer


DRAFTERS = {"ngram": NGram, "mtp": MTP}


def load_llm(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    rows: int = ROWS,
    drafts: str | None = None,
    mesh: str | None = None,
    **settings: Any,
) -> LLM:
    """Loads a checkpoint for a command.

    Args:
      folder: of the checkpoint.
      tokenizer: of the model.
      rows: how many sequences run at a time, rounded up to a multiple of the mesh's shards of rows.
      drafts: names what proposes tokens.
      mesh: of all devices, as `parse_mesh` reads it; one device if None.
      **settings: others of `LLM`.
    """
    made = None if mesh is None else make_mesh(parse_mesh(mesh))
    rows = -(-rows // shards(made, "rows")) * shards(made, "rows")
    drafter = None if drafts is None else DRAFTERS[drafts]()
    return LLM(folder, tokenizer=tokenizer, rows=rows, drafter=drafter, mesh=made, **settings)


def generate_text(engine: Engine, prompt: str, options: SamplingOptions) -> int:
    """Writes the continuation of a prompt to standard output as it comes, and nothing else; returns the exit status."""
    if options.n != 1:
        raise ValueError(f"n must be 1 where text goes to standard output, got {options.n}: use --input and --output")
    name = engine.add(Request(prompt, options.params()))
    on_terminal = sys.stdout.isatty()
    while engine.busy:
        for token in engine.step():
            if token.request == name:
                sys.stdout.write(without_controls(token.text) if on_terminal else token.text)
                sys.stdout.flush()
            if token.error is not None:
                print(f"error: {token.error}", file=sys.stderr)
                return 1
    if on_terminal:
        sys.stdout.write("\n")
    return 0


def generate_lines(engine: Engine, source: Path, target: Path, options: SamplingOptions) -> int:
    """Continues the prompts of JSON lines, `-` for standard input; returns the exit status, 1 if some failed."""
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"output must be another file than input, got {target}")
    columns = TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with _opened(source) as file, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=_count_lines(file))
        complain = lambda text: progress.console.print(f"error: {text}", markup=False, highlight=False, soft_wrap=True)  # noqa: E731
        lines = Lines(engine, options, complain)
        name = "standard input" if source == Path("-") else shown_path(source)
        lines.run(file, name, target, lambda: progress.advance(task))
    return int(lines.failed > 0)


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[BinaryIO]:
    if source == Path("-"):
        yield sys.stdin.buffer
        return
    with open(source, "rb") as file:
        yield file


def _count_lines(file: BinaryIO) -> int | None:
    """Counts the lines of a file; None for what can be read but once."""
    if not file.seekable():
        return None
    count = sum(1 for _ in file)
    file.seek(0)
    return count


def generate(
    folder: Path, *, prompt: str | None, prompt_file: Path | None, input: Path | None, output: Path | None,
    options: SamplingOptions, **settings: Any,
) -> int:  # fmt: skip
    """Runs the command `generate`; returns its exit status.

    Raises:
      ValueError, OSError: for arguments or files that are not right.
    """
    if sum(each is not None for each in (prompt, prompt_file, input)) != 1:
        raise ValueError("exactly one must be given of --prompt, --prompt-file and --input")
    if (input is None) != (output is None):
        raise ValueError("--input and --output must be given together")
    options.params()
    if prompt_file is not None:
        prompt = _read_prompt(prompt_file)
    tokenizer = read_tokenizer(folder)
    if prompt is not None:
        return generate_text(load_llm(folder, tokenizer, rows=1, **settings).engine, prompt, options)
    assert input is not None and output is not None
    return generate_lines(load_llm(folder, tokenizer, **settings).engine, input, output, options)


def _read_prompt(path: Path) -> str:
    with _opened(path) as file:
        try:
            return file.read().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{shown_path(path)} must be UTF-8: {error}") from None


def chat(
    folder: Path, *, system: str | None, tools: Path | None, thinking: bool, options: SamplingOptions, **settings: Any
) -> int:
    """Runs the command `chat`; returns its exit status.

    Raises:
      ValueError, OSError: for arguments or files that are not right.
    """
    from dsa_jax.chat.terminal import run_chat  # needs an extra, of which `generate` has no need

    template = ChatTemplate.of(folder, read_tokenizer(folder))
    known = None if tools is None else check_tools(_read_tools(tools))
    if options.n != 1:
        raise ValueError(f"n must be 1 in a conversation, got {options.n}")
    template.encode([{"role": "user", "content": ""}], tools=known, thinking=thinking)
    engine = load_llm(folder, template.tokenizer, rows=1, **settings).engine
    conversation = Conversation(engine, template, options.params(), thinking=thinking, tools=known)
    conversation.system = system
    return run_chat(conversation)


def _read_tools(path: Path) -> Any:
    """Reads a JSON list of tools."""
    try:
        return parse_object(f'{{"tools": {json.dumps(json.loads(path.read_bytes()))}}}')["tools"]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown_path(path)} must hold a JSON list of tools: {error}") from None
