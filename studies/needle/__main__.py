"""The command `python -m studies.needle`: trains on long text with needles, makes the model sparse, and reports."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from studies.needle import report, settings
from studies.needle.arguments import StudyArguments
from studies.needle.found import Found
from studies.needle.kept import keep
from studies.needle.measuring import found_path, measure_seed
from studies.needle.rows import NeedleConfig, NeedleCorpus, load
from train.checks import check_integer
from train.commands.command import parse, run_command
from train.commands.describe import describe_run
from train.experiment import MAX_SEEDS, SEED_FOLDER, control_run, seed_runs
from train.phases import CONTROLS, merge_groups
from train.processes.stopping import Stopping
from train.run import Run
from train.watching.progress import RunProgress


@dataclasses.dataclass(frozen=True)
class Arguments(StudyArguments):
    """Trains a dense model on long text with needles in it, makes it sparse, and measures what that costs."""

    preset: Literal["card", "long", "small"] = "card"
    """"card" is the study of one H200, "long" continues to 128K, "small" shows all of it on two CPU cores."""
    out: Path = Path("runs") / "needle"
    """Folder of the study."""
    seeds: int = 1
    """How many times, each from another seed."""
    controls: bool = True
    """Also train what SPARSE is compared with: the dense model continued, and one sparse with a window as selection."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input becomes one line on stderr and exit status 2, a diverged loss status 1."""
    given = sys.argv[1:] if arguments is None else arguments

    def run() -> None:
        chosen = parse(Arguments, given, "python -m studies.needle")
        with Stopping.within(chosen.stop_after) as stopping:
            study(chosen, Console(), stopping)

    return run_command(run)


def study(arguments: Arguments, console: Console, stopping: Stopping | None = None) -> None:
    """Makes the corpus, trains all seeds and their controls, measures and reports."""
    arguments.keep_compiled()
    preset = settings.PRESETS[arguments.preset]()
    config = settings.make_config(preset, arguments.corpus_folder)
    check_integer("seeds", arguments.seeds, most=MAX_SEEDS)
    runs: list[Run] = []
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):  # each in a folder of its own, also if alone
        own, place = dataclasses.replace(config, seed=seed), arguments.out / SEED_FOLDER.format(seed)
        runs += seed_runs(own, place, 1, resume=arguments.resume)
    record = arguments.make_corpus(preset, console)
    assert isinstance(config.data, NeedleConfig)
    corpus = load(config.data, vocab_size=preset.vocabulary)
    for stage in (stage for phase in config.phases for stage in phase.stages):  # too little text is said at once
        for split in ("train", "held_out"):
            corpus.dataset(split, batch_size=stage.batch_size, seq_len=stage.seq_len, seed=0)
    options: dict[str, Any] = dict(controls=arguments.controls, beside=arguments.beside, stopping=stopping)
    founds = [_run_seed(run, corpus, preset, record, console, resume=arguments.resume, **options) for run in runs]
    path = report.write(founds, arguments.out, learns=preset.learns)
    for goal in report.verdicts(founds) if preset.learns else ():
        console.print(f"{'met' if goal.met else 'missed'}: {goal.text}", highlight=False, soft_wrap=True)
    console.print(f"Report: {path}", highlight=False)


def _run_seed(
    run: Run,
    corpus: NeedleCorpus,
    preset: settings.Preset,
    record: dict[str, Any],
    console: Console,
    *,
    controls: bool,
    beside: str | None,
    resume: bool,
    stopping: Stopping | None,
) -> Found:
    """Trains a seed and its controls, measures it, and keeps what was found."""
    path = found_path(run.folder.parent, run.config.seed)
    if path.exists():
        return Found.load(path)
    for phase in (None, *(CONTROLS if controls else ())):  # a control begins with what the run has left
        each = run if phase is None else control_run(run, phase)
        progress = RunProgress(each.config, title=f"seed {run.config.seed}", console=console)
        each.train(corpus, progress, resume=resume, stopping=stopping)
    if not (base := run.folder.parent / f"base{run.config.seed}").exists():
        keep(merge_groups(run.graphdef, run.params_after("BASE")), base)
    found = measure_seed(
        run,
        corpus,
        preset,
        setup=describe_run(run, corpus.text),
        record=record,
        controls=controls,
        beside=beside,
        stopping=stopping,
        say=lambda text: console.print(text, highlight=False),
    )
    found.save(path)
    return found


if __name__ == "__main__":
    sys.exit(main())
