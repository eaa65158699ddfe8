"""The command `python -m studies.tiny`: trains the demo's model on text and recall episodes, and reports."""

import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from dsa_jax.export import export_run
from studies.tiny.recall import RecallConfig, draw_held_out, load
from studies.tiny.report import LAYOUT
from studies.tiny.settings import NAME, make_config
from train.commands.command import parse, run_command
from train.experiment import Experiment, held_out_shape, seed_runs
from train.run import Run
from train.settings import RunConfig


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a small dense model, its indexer, and both through the selection, on text and a task of recall."""

    data: tuple[str, ...] = ()
    """Globs of text files; without it the standard library of the running Python."""
    out: Path = Path("runs") / NAME
    """Folder of the run."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue what the folder holds; the other arguments must be those it was begun with."""
    seeds: int = 1
    """How many times, each from another seed."""
    controls: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also train what SPARSE is compared with: the dense model continued, and one sparse with a window as selection."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input becomes one line on stderr and exit status 2, a diverged loss status 1."""
    given = sys.argv[1:] if arguments is None else arguments

    def command() -> None:
        parsed = parse(Arguments, given, "python -m studies.tiny")
        study(parsed, make_config(parsed.data), Console())

    return run_command(command)


def study(arguments: Arguments, config: RunConfig, console: Console) -> None:
    """Trains all seeds and their controls by `config`, and reports.

    Raises:
      TypeError: if its data are no `RecallConfig`.
    """
    if not isinstance(config.data, RecallConfig):
        raise TypeError(f"the demo's data must be a RecallConfig, got {type(config.data).__name__}")
    began = time.monotonic()
    runs = seed_runs(config, arguments.out, arguments.seeds, resume=arguments.resume)
    corpus = load(config.data, vocab_size=config.model.vocab_size)
    Experiment(
        name=NAME,
        folder=arguments.out,
        runs=runs,
        text=corpus.text,
        data=corpus,
        draw_held_out=lambda config: draw_held_out(corpus, *held_out_shape(config)),
        layout=LAYOUT,
        controls=arguments.controls,
        resume=arguments.resume,
    ).run(console, began=began)
    console.print(f"To talk with it: python -m dsa_jax chat {export(runs[0])}", highlight=False, soft_wrap=True)


def export(run: Run) -> Path:
    """Writes the model of a run as a checkpoint in Hugging Face's layout, into its folder; returns where that is."""
    target = run.folder / "model"
    if target.exists():  # of the same run, continued
        shutil.rmtree(target)
    export_run(run.folder, target)
    return target


if __name__ == "__main__":
    sys.exit(main())
