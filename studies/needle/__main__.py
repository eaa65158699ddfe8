"""The command `python -m studies.needle`: trains on long text with needles, makes the model sparse, and reports."""

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from studies.needle import settings
from studies.needle.corpus import CorpusConfig, make_corpus
from studies.needle.maps import Maps, measure
from studies.needle.report import LAYOUT, add_maps
from studies.needle.rows import NeedleConfig, draw_held_out, load
from train.commands.command import parse, run_command
from train.experiment import Experiment, held_out_shape, seed_runs

NAME = "needle"
NEEDLES = (1, 8)  # of a row, in turn


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a dense model on long text with needles in it, makes it sparse, and measures what that costs."""

    data: tuple[str, ...] = ()
    """Globs of text files, of which a folder's are one document; without it the packages of the running Python."""
    preset: Literal["card", "long", "small"] = "card"
    """"card" is the study of one H200, "long" continues to 128K, "small" shows all of it on two CPU cores."""
    out: Path = Path("runs") / NAME
    """Folder of the study."""
    corpus: Path | None = None
    """Folder of the corpus, made if it is not there; without it that of the study."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue what the folder holds; the other arguments must be those it was begun with."""
    seeds: int = 1
    """How many times, each from another seed."""
    controls: bool = True
    """Also train what SPARSE is compared with: the dense model continued, and one sparse with a window as selection."""
    workers: int = 2
    """Processes that tokenise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input becomes one line on stderr and exit status 2, a diverged loss status 1."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(lambda: study(parse(Arguments, given, "python -m studies.needle"), Console()))


def study(arguments: Arguments, console: Console) -> None:
    """Makes the corpus, trains all seeds and their controls, and reports."""
    began = time.monotonic()
    preset = settings.PRESETS[arguments.preset]()
    folder = arguments.corpus or arguments.out / "corpus"
    config = settings.make_config(preset, folder)
    runs = seed_runs(config, arguments.out / "runs", arguments.seeds, resume=arguments.resume)
    made = CorpusConfig(arguments.data, vocab_size=preset.vocabulary)
    record = make_corpus(made, folder, workers=arguments.workers, say=lambda text: console.print(f"corpus: {text}"))
    console.print(f"corpus: {record['tokens']['train']:,} tokens, {record['tokens']['held_out']:,} held out")
    assert isinstance(config.data, NeedleConfig)
    corpus = load(config.data, vocab_size=preset.vocabulary)
    for stage in (stage for phase in config.phases for stage in phase.stages):  # too little text is said at once
        corpus.dataset("train", batch_size=stage.batch_size, seq_len=stage.seq_len, seed=0)
    experiment = Experiment(
        name=NAME,
        folder=arguments.out,
        runs=runs,
        text=corpus.text,
        data=corpus,
        draw_held_out=lambda config: draw_held_out(corpus, *held_out_shape(config)),
        layout=LAYOUT,
        controls=arguments.controls,
        resume=arguments.resume,
    )
    experiment.run(console, began=began)
    ask = functools.partial(measure, lengths=preset.lengths, needles=NEEDLES, questions=preset.questions)
    maps = Maps.add([ask(run, corpus, controls=arguments.controls, say=console.print) for run in runs])
    maps.save(arguments.out)
    add_maps(maps, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
