"""The command `python -m train evaluate`: what a model loses on text, by checkpoint, position and selection."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from dsa_jax.parallel.sharding import check_batch, check_model, make_mesh, parse_mesh, shards
from train.checks import check_integer
from train.commands.command import parse
from train.data import Corpus, DataConfig, load, load_whole
from train.evaluation.evaluate import check_selects, held_out_losses, measure_selections
from train.evaluation.held_out import ByPart, HeldOut, draw_batches, position_masks
from train.evaluation.kept_mass import MIN_REACH, KeptMass
from train.evaluation.subject import Subject, find_subject
from train.files import replace_text
from train.reporting.layout import SELECTIONS
from train.reporting.results import as_text
from train.state import abstract_params

TEXT = "text"


@dataclasses.dataclass(frozen=True)
class TextArguments:
    """Says which model is measured on which text."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run's folder, one of its checkpoints (RUN/checkpoints/STEP), or a Hugging Face folder."""
    data: tuple[str, ...] = ()
    """Globs of text files, all of which is held-out text; without it what the run held out of its own."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; without it the run's, or the Hugging Face folder's own, or bytes."""
    append: bool = True
    """End every document with the tokenizer's end token, if it has one."""
    max_bytes: int | None = None
    """Read so much text at most; without it 64 MiB, or as much as the run."""
    batches: int = 16
    """How many batches are measured at most; text is measured once."""
    batch_size: int | None = None
    """Sequences of a batch; without it those of the run's last micro-batches, or one."""
    seq_len: int | None = None
    """Tokens of a sequence; without it the run's last length, or at most 4096."""
    seed: int = 0
    """Of the order of the text and of the random selections."""
    json: Path | None = None
    """Write all numbers into this file too."""

    def check(self) -> None:
        """Checks what can be before any work.

        Raises:
          ValueError: if the file of numbers cannot be written.
        """
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise ValueError(f"json must be a file in a folder that exists, got {self.json}")

    def data_config(self, subject: Subject) -> DataConfig:
        """Says which text is read."""
        config = DataConfig(self.data, tokenizer=subject.tokenizer) if self.data else subject.data_config()
        return dataclasses.replace(
            config,
            tokenizer=self.tokenizer or config.tokenizer,
            append=self.append and config.append,
            max_bytes=config.max_bytes if self.max_bytes is None else self.max_bytes,
        )

    def load(self, subject: Subject) -> Corpus:
        """Reads the text."""
        config, size = self.data_config(subject), subject.config.vocab_size
        return load_whole(config, vocab_size=size) if self.data else load(config, vocab_size=size)

    def shape(self, subject: Subject) -> tuple[int, int, int]:
        """Gives number, sequences and tokens of the batches.

        Raises:
          ValueError: if one of them cannot be.
        """
        batch_size = subject.batch_size if self.batch_size is None else self.batch_size
        seq_len = subject.seq_len if self.seq_len is None else self.seq_len
        check_integer("batches", self.batches)
        check_integer("batch_size", batch_size)
        check_integer("seq_len", seq_len, most=subject.config.max_position_embeddings)
        return self.batches, batch_size, seq_len


@dataclasses.dataclass(frozen=True)
class Arguments(TextArguments):
    """Measures a model on text: losses dense and sparse, by position, and the attention that selections keep."""

    mesh: str | None = None
    """Devices to measure on, like data=2,context=4,expert=1,tensor=1; without it one."""

    def make_mesh(self, subject: Subject) -> Mesh | None:
        """Makes the mesh, None for one device."""
        if self.mesh is None:
            return None
        mesh = make_mesh(parse_mesh(self.mesh))
        check_model(mesh, subject.config)
        _, rows, seq_len = self.shape(subject)
        check_batch(mesh, batch_size=math.lcm(rows, shards(mesh, "batch")), seq_len=seq_len)
        return mesh


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Holds what was measured of a model.

    Args:
      model: the folder that was named.
      text: what it was measured on.
      losses: by checkpoint, dense and sparse, and by position.
      selections: losses of the last checkpoint by selection.
      kept: the attention mass that its selections keep.
    """

    model: str
    text: dict[str, Any]
    losses: dict[str, dict[str, ByPart]]
    selections: dict[str, ByPart]
    kept: KeptMass


def main(arguments: Sequence[str]) -> None:
    """Runs the command.

    Raises:
      ValueError: if the model, the text or the mesh cannot be measured.
    """
    given = parse(Arguments, arguments, "python -m train evaluate")
    given.check()
    console = Console(quiet=jax.process_index() > 0)
    with console.status("evaluating"):
        found = measure(given)
    if given.json is not None and jax.process_index() == 0:
        replace_text(given.json, json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False) + "\n")
    show(found, console)


def measure(arguments: Arguments) -> Measurement:
    """Measures what the arguments say.

    Raises:
      ValueError: if the model, the text or the mesh cannot be measured.
    """
    subject = find_subject(arguments.model)
    check_selects(subject.config)
    mesh, (count, rows, seq_len) = arguments.make_mesh(subject), arguments.shape(subject)
    corpus = arguments.load(subject)
    batches = draw_batches(corpus, count, rows, seq_len, seed=arguments.seed)
    held_out = HeldOut({TEXT: batches}, {TEXT: position_masks(batches)})
    graphdef = abstract_params(subject.config)[0]
    *earlier, (newest, read) = subject.weights.items()
    losses = {}
    for name, read_earlier in earlier:
        params = read_earlier(mesh)
        losses[name] = {
            "dense": held_out_losses(graphdef, params, held_out, attention="dense", mesh=mesh),
            "sparse": held_out_losses(graphdef, params, held_out, attention="sparse", mesh=mesh),
        }
        del params  # before the next are read: one model's memory is enough
    indexers = {} if subject.warmed is None else {"warmed": subject.warmed(mesh)["indexer"]}
    kept, selections = measure_selections(
        graphdef, read(mesh), held_out, indexers=indexers, seed=arguments.seed, mesh=mesh
    )
    losses[newest] = {"dense": selections["dense"], "sparse": selections["indexer"]}
    text = {
        "tokens": corpus.tokens("held_out"),
        "documents": len(corpus.held_out),
        "targets": int(sum(batch.valid.sum() for batch in batches)),
        "sequences": len(batches) * rows,
        "seq_len": seq_len,
    }
    return Measurement(str(arguments.model), text, losses, selections, kept)


def show(found: Measurement, console: Console) -> None:
    """Prints the tables."""
    text = found.text
    console.print(
        f"{found.model}: {text['targets']:,} targets in {text['sequences']} sequences of {text['seq_len']} tokens, of "
        f"{text['tokens']:,} tokens in {text['documents']} documents",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_losses_table(found))
    console.print(_selections_table(found))


def _losses_table(found: Measurement) -> Table:
    """Makes a row of each checkpoint's losses dense and sparse, a column of each range of positions."""
    parts = list(next(iter(found.selections.values())))
    table = Table("loss, nats a token", *(part.removeprefix("positions ") for part in parts))
    for name, losses in found.losses.items():
        for attention, by_part in losses.items():
            table.add_row(f"{name}, {attention}", *(as_text([by_part[part]]) for part in parts))
    return table


def _selections_table(found: Measurement) -> Table:
    kept, table = found.kept, Table("selection", "loss", f"mass kept where {MIN_REACH * found.kept.k} keys are reached")
    part = next(iter(next(iter(found.selections.values()))))
    measured = found.selections.keys() | kept.mass.get(part, {}).keys()
    for name in (name for name in SELECTIONS if name in measured):
        mass = kept.mean(name, part) if name in kept.mass.get(part, {}) else None
        table.add_row(SELECTIONS[name][0], as_text([found.selections.get(name, {}).get(part)]), as_text([mass]))
    return table
