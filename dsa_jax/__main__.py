"""Runs the command `dsa-jax`, which is `python -m dsa_jax`.

Each subcommand is a function of this file; its arguments and docstring are the subcommand's help.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dsa_jax.chat.options import SamplingOptions
from dsa_jax.hf import MAX_SHARD_BYTES, SCALE_SUFFIX, Checkpoint, convert_hf, layer_of
from dsa_jax.inference.pages import OutOfPages
from dsa_jax.strict_json import shorten

PURPOSE = "DeepSeek Sparse Attention for JAX: work with checkpoints, and with the models in them."

SERVING = ("fastapi", "jinja2", "llguidance", "prometheus_client", "prompt_toolkit", "uvicorn")  # of the extra `serve`

MAX_LINE = 950  # characters of what is wrong with the input

# Fields of the configuration that are chosen on loading, and not by the checkpoint.
CHOSEN_ON_LOADING = (
    *("dtype", "param_dtype", "expert_dtype", "index_fp8"),
    *("index_kl_target", "index_share_kl", "baseline", "block_size", "nsa"),
)

# The group in which `info` counts a parameter, by the first of these parts that its path holds.
GROUPS = {
    "indexer": "indexer",
    "norm.": "norms",
    "self_attn": "attention",
    "shared_experts": "shared experts",
    "experts": "routed experts",
    "gate.": "router",
    "mlp": "dense feed-forward",
    "eh_proj": "prediction layers",
    "embed_tokens": "embedding",
    "lm_head": "unembedding",
}


# What proposes tokens: n-grams of the text, or the model's own prediction layers (multi-token prediction).
Drafts = Literal["ngram", "mtp"]


def convert(
    src: tyro.conf.Positional[Path],
    dst: tyro.conf.Positional[Path],
    *,
    dtype: Literal["bfloat16", "float32"] | None = None,
    expert_dtype: Literal["fp8"] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    prediction_layers: bool = True,
) -> None:
    """Writes a Hugging Face checkpoint anew: sharded, FP8 as bfloat16, cast to another dtype if wanted.

    Args:
        src: Folder with config.json and safetensors files.
        dst: Folder to write, which must be empty or not exist.
        dtype: Dtype to cast to; without it every tensor keeps its own, FP8 excepted.
        expert_dtype: Dtype of the routed experts; fp8 leaves them in FP8, or rounds them to it.
        max_shard_bytes: Most bytes in one file.
        prediction_layers: Whether layers that predict further tokens are written too.
    """
    columns = TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with contextlib.ExitStack() as stack:

        def track(names: list[str]) -> Iterable[str]:
            """Shows the progress once the checkpoint has proved sound: an error before that is a line by itself."""
            return stack.enter_context(Progress(*columns, console=Console(stderr=True))).track(names)

        convert_hf(
            src, dst, dtype=dtype, expert_dtype=expert_dtype, max_shard_bytes=max_shard_bytes,
            prediction_layers=prediction_layers, track=track,
        )  # fmt: skip


def info(directory: tyro.conf.Positional[Path]) -> None:
    """Prints a checkpoint's configuration, and its parameters and bytes by group; checks its files on the way.

    Args:
        directory: Folder with config.json and safetensors files.
    """
    checkpoint = Checkpoint(directory)
    for field in dataclasses.fields(checkpoint.config):
        if field.name not in CHOSEN_ON_LOADING:
            print(f"{field.name} = {getattr(checkpoint.config, field.name)}")
    table = Table("group", "tensors", "parameters", "bytes", "dtypes")
    for column in table.columns[1:4]:
        column.justify = "right"
    rows = _count(checkpoint)
    for group, row in rows.items():
        table.add_row(
            group, f"{row.tensors:,}", f"{row.parameters:,}", f"{row.nbytes:,}", ", ".join(sorted(row.dtypes))
        )
    table.add_section()
    table.add_row(
        "all",
        f"{sum(row.tensors for row in rows.values()):,}",
        f"{sum(row.parameters for row in rows.values()):,}",
        f"{sum(row.nbytes for row in rows.values()):,}",
    )
    Console().print(table)
    held = f"in memory: {_held_bytes(checkpoint):,} bytes"
    experts = [name for name, entry in checkpoint.expected.items() if entry.experts]
    if experts and all(map(checkpoint.is_fp8, experts)):
        held += f"; with --expert-dtype fp8 {_held_bytes(checkpoint, fp8=True):,}"
    print(held)


class _Row(NamedTuple):
    """Holds what `info` counts of a group."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    dtypes: frozenset[str] = frozenset()


def _count(checkpoint: Checkpoint) -> dict[str, _Row]:
    """Counts tensors, parameters, bytes and dtypes of each group; the bytes of FP8 weights include their scales."""
    rows: dict[str, _Row] = {}
    for name, entry in checkpoint.expected.items():
        stored, scale = checkpoint.stored[name], checkpoint.stored.get(name + "_scale_inv")
        group = next(group for part, group in GROUPS.items() if part in entry.path)
        if checkpoint.config.num_hidden_layers <= layer_of(name) < math.inf:
            group = "prediction layers"
        row = rows.get(group, _Row())
        nbytes = row.nbytes + stored.nbytes + (scale.nbytes if scale else 0)
        parameters = row.parameters + math.prod(stored.shape)
        rows[group] = _Row(row.tensors + 1, parameters, nbytes, row.dtypes | {stored.dtype})
    return rows


def _held_bytes(checkpoint: Checkpoint, *, fp8: bool = False) -> int:
    """Counts the bytes of the parameters once they are loaded, experts that are stored in FP8 so or as all others."""
    total, most = 0, np.dtype(checkpoint.most_common_dtype)
    for name, entry in checkpoint.expected.items():
        count, dtype = math.prod(checkpoint.stored[name].shape), most
        if entry.always_float32 or entry.keeps_float32:
            dtype = np.dtype(np.float32) if entry.always_float32 else np.result_type(most, checkpoint.dtype(name))
        if fp8 and entry.experts:
            total += count + 4 * math.prod(checkpoint.stored[name + SCALE_SUFFIX].shape)
        else:
            total += count * dtype.itemsize
    return total


def export(
    run: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    *,
    step: int | None = None,
    dtype: Literal["bfloat16", "float32"] | None = None,
    tokenizer: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes what a run of `python -m train` has trained as a Hugging Face checkpoint, with tokenizer and end tokens.

    Args:
        run: Folder of the run.
        out: Folder to write, which must be empty or not exist.
        step: Step of the run's checkpoint; the newest if not given.
        dtype: Dtype of the weights; float32, as they were trained, if not given.
        tokenizer: Folder with the tokenizer.json; the run's own if not given.
        max_shard_bytes: Most bytes in one file.
    """
    from dsa_jax.export import export_run

    export_run(run, out, step=step, dtype=dtype, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)
    print(f"To talk with it: dsa-jax chat {out}")


def generate(
    folder: tyro.conf.Positional[Path],
    *,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    input: Path | None = None,
    output: Path | None = None,
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions(),  # noqa: B008
    expert_dtype: Literal["fp8"] | None = None,
    max_length: int | None = None,
    pages: int | None = None,
    drafts: Drafts | None = None,
    mesh: str | None = None,
) -> int:
    """Continues a prompt, to standard output as it comes, or many prompts as JSON lines.

    Args:
        folder: Folder with a checkpoint and its tokenizer.
        prompt: Text to continue.
        prompt_file: File of the text to continue; - for standard input.
        input: File of JSON lines, each with a prompt, and an id and options of its own if wanted; - for standard input.
        output: File of JSON lines to which results are added; what it holds already is not generated again.
        sampling: How to continue.
        expert_dtype: Dtype of the routed experts in memory; fp8 keeps those of an FP8 checkpoint as it has them.
        max_length: Tokens of the longest sequence; the model's positions if not given.
        pages: Pages of 64 tokens in the cache; as many as free memory has room for if not given.
        drafts: What proposes tokens, to be verified up to four in a step; what a text repeats, or the model's layers.
        mesh: How the model is split over all devices, such as expert=8; one device runs it if not given.
    """
    from dsa_jax.chat import commands

    return commands.generate(
        folder, prompt=prompt, prompt_file=prompt_file, input=input, output=output, options=sampling,
        expert_dtype=expert_dtype, max_length=max_length, pages=pages, drafts=drafts, mesh=mesh,
    )  # fmt: skip


def chat(
    folder: tyro.conf.Positional[Path],
    *,
    system: str | None = None,
    thinking: bool = False,
    tools: Path | None = None,
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions(max_tokens=1024),  # noqa: B008
    expert_dtype: Literal["fp8"] | None = None,
    max_length: int | None = None,
    pages: int | None = None,
    drafts: Drafts | None = None,
    mesh: str | None = None,
) -> int:
    """Talks with a model in the terminal; line by line where input or output is none.

    Args:
        folder: Folder with a checkpoint and its tokenizer.
        system: The system's message.
        thinking: Whether the model thinks before it answers.
        tools: File with a JSON list of functions that the model may call.
        sampling: How to sample answers.
        expert_dtype: Dtype of the routed experts in memory; fp8 keeps those of an FP8 checkpoint as it has them.
        max_length: Tokens of the longest conversation; the model's positions if not given.
        pages: Pages of 64 tokens in the cache; as many as free memory has room for if not given.
        drafts: What proposes tokens, to be verified up to four in a step; what a text repeats, or the model's layers.
        mesh: How the model is split over all devices, such as expert=8; one device runs it if not given.
    """
    from dsa_jax.chat import commands

    return commands.chat(
        folder, system=system, thinking=thinking, tools=tools, options=sampling, expert_dtype=expert_dtype,
        max_length=max_length, pages=pages, drafts=drafts, mesh=mesh,
    )  # fmt: skip


def serve(
    folder: tyro.conf.Positional[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key_file: Path | None = None,
    allow_origin: tuple[str, ...] = (),
    allow_host: tuple[str, ...] = (),
    max_requests: int = 512,
    max_sequences: int = 1024,
    max_output: int = 2**18,
    max_body: int = 2**23,
    drain_seconds: float = 30.0,
    rows: int = 64,
    expert_dtype: Literal["fp8"] | None = None,
    max_length: int | None = None,
    pages: int | None = None,
    cache_format: Literal["fp8", "bfloat16", "float32"] | None = None,
    batch_invariant: bool = False,
    drafts: Drafts | None = None,
    mesh: str | None = None,
    warm: bool = True,
) -> None:
    """Serves a model over HTTP to the clients of OpenAI's interface, and a page to chat in a browser.

    Args:
        folder: Folder with a checkpoint and its tokenizer.
        host: Address to listen at; any but a loopback one needs --api-key-file.
        port: Port to listen at; 0 takes a free one.
        name: Name of the model for clients; the folder's if not given.
        api_key_file: File with an API key a line, readable by its owner alone.
        allow_origin: Sites whose pages may ask, such as https://chat.example.org.
        allow_host: Names besides localhost by which clients call this server.
        max_requests: Requests at a time.
        max_sequences: Continuations at a time, of all requests, running or queued.
        max_output: Tokens that one request may ask for, of all its continuations.
        max_body: Bytes of a request's body.
        drain_seconds: Time for requests to end in after SIGTERM.
        rows: Continuations that run at a time.
        expert_dtype: Dtype of the routed experts in memory; fp8 keeps those of an FP8 checkpoint as it has them.
        max_length: Tokens of the longest sequence; the model's positions if not given.
        pages: Pages of 64 tokens in the cache; as many as free memory has room for if not given.
        cache_format: Format of the cache; the model's dtype if not given.
        batch_invariant: Whether outputs are the same bits whatever else runs.
        drafts: What proposes tokens, to be verified up to four in a step; what a text repeats, or the model's layers.
        mesh: How the model is split over all devices, such as expert=8; one device runs it if not given.
        warm: Whether every size of step is compiled before the server listens.
    """
    from dsa_jax import server

    keys = () if api_key_file is None else server.read_keys(api_key_file)
    settings = server.Settings(
        name or folder.resolve().name, host, port, keys, allow_origin, allow_host, max_body=max_body,
        max_requests=max_requests, max_sequences=max_sequences, max_output=max_output, drain_seconds=drain_seconds,
    )  # fmt: skip
    server.serve(
        folder, settings, warm=warm, rows=rows, expert_dtype=expert_dtype, max_length=max_length, pages=pages,
        cache_format=cache_format, batch_invariant=batch_invariant, drafts=drafts, mesh=mesh,
    )  # fmt: skip


COMMANDS = {"convert": convert, "info": info, "export": export, "generate": generate, "chat": chat, "serve": serve}


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
      arguments: the command line without the program's name, that of this process if None.

    Returns:
      The exit status: 0, 1 if some of the work failed, 2 after one line on stderr that says what is wrong with the
      input, 130 if interrupted.
    """
    program = "dsa-jax" if Path(sys.argv[0]).stem == "dsa-jax" else "python -m dsa_jax"
    try:
        status = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=program, args=arguments, description=PURPOSE)
    except (ValueError, OSError, OutOfPages) as error:
        print(f"error: {shorten(str(error), MAX_LINE)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in SERVING:
            raise
        print(f"error: this command needs {error.name}: pip install dsa-jax[serve]", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
