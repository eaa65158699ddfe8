"""The command `python -m studies.nsa`: trains every attention on the same rows, measures, times and reports."""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from studies.needle.arguments import StudyArguments
from studies.needle.found import Ledger, circumstances
from studies.needle.maps import NEEDLES, Maps, Subject, ask_subject
from studies.needle.questions import attending
from studies.needle.rows import NeedleConfig, NeedleCorpus, draw_held_out, load
from studies.needle.scaling import measure_lengths
from studies.needle.settings import Preset
from studies.nsa import report, settings
from studies.nsa.conversion import FromDense
from studies.nsa.settings import DENSE, VARIANTS
from train.checks import check_integer
from train.commands.command import parse, run_command
from train.commands.describe import describe_run
from train.compiling import compiling_quickly
from train.evaluation.evaluate import held_out_losses
from train.experiment import SEED_FOLDER
from train.files import replace_text
from train.processes.stopping import Stopping
from train.reporting.results import read_curves, read_seconds
from train.run import Run
from train.saved.initial import InitialParams
from train.watching.progress import RunProgress


@dataclasses.dataclass(frozen=True)
class Arguments(StudyArguments):
    """Trains dense attention, DSA and Native Sparse Attention on the same rows of long text, and measures them."""

    preset: Literal["card", "small"] = "card"
    """"card" is the study of one H200, "small" shows all of it on two CPU cores."""
    out: Path = Path("runs") / "nsa"
    """Folder of the study."""
    only: tuple[Literal[tuple(VARIANTS)], ...] = ()  # pyright: ignore[reportInvalidTypeForm]
    """Attentions to train, the dense model beside them; all without it."""
    timing: bool = True
    """Also time forward passes, steps and decoding by length."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input becomes one line on stderr and exit status 2, a diverged loss status 1."""
    given = sys.argv[1:] if arguments is None else arguments

    def run() -> None:
        chosen = parse(Arguments, given, "python -m studies.nsa")
        quick = contextlib.nullcontext() if settings.PRESETS[chosen.preset]().learns else compiling_quickly()
        with Stopping.within(chosen.stop_after) as stopping, quick:
            study(chosen, Console(), stopping)

    return run_command(run)


def study(arguments: Arguments, console: Console, stopping: Stopping | None = None) -> None:
    """Makes the corpus, trains and measures all variants of a seed, times them and reports.

    Raises:
      ValueError: if the folder holds this seed already and is not to be continued, or the corpus does not fit.
    """
    check_integer("seed", arguments.seed, least=0)
    folder = arguments.out / SEED_FOLDER.format(arguments.seed)
    if folder.exists() and not arguments.resume:
        raise ValueError(f"{folder} must be new, or be continued by --resume, got a folder that is there")
    arguments.keep_compiled()
    preset, place = settings.PRESETS[arguments.preset](), arguments.corpus_folder
    config = settings.make_config(preset, DENSE, place, seed=arguments.seed)
    model, data = config.model, config.data
    record = arguments.make_corpus(preset, console)
    assert isinstance(data, NeedleConfig)
    corpus = load(data, vocab_size=preset.vocabulary)
    for length in {stage.seq_len for stage in (*preset.base, *preset.warmup, *preset.sparse)}:
        corpus.dataset("train", batch_size=1, seq_len=length, seed=0)  # too little text is said at once
    corpus.dataset("held_out", batch_size=1, seq_len=preset.lengths[-1], seed=0)
    bench = Bench(folder, corpus, place, preset, arguments.seed, console, stopping, arguments.beside)
    names = [name for name in VARIANTS if name in (DENSE, *(arguments.only or VARIANTS))]
    found: dict[str, Any] = {
        "seed": arguments.seed,
        "preset": arguments.preset,
        "corpus": {"tokenizer": record["tokenizer"], "tokens": record["tokens"]},
        "sizes": dataclasses.asdict(model.nsa) | {"K": model.index_topk},
        "variants": {name: bench.once(name, lambda name=name: bench.variant(name)) for name in names},
        "timing": bench.timing(settings.TIMED[arguments.preset]) if arguments.timing else [],
    }
    path = arguments.out / f"seed{arguments.seed}.json"
    replace_text(path, report.to_json(found))
    seeds = [report.load(each) for each in sorted(arguments.out.glob("seed*.json"))]
    console.print(f"Report: {report.write(seeds, arguments.out)}", highlight=False)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Trains, measures and times the variants of one seed, each part once, in resumable pieces.

    Attributes:
      folder: of the runs and of what was measured.
      corpus: the text, and how needles are written.
      corpus_folder: where it lies.
      preset: how much.
      seed: of weights, rows and questions.
      console: where it says what it does.
      stopping: signals and the clock.
      beside: other work on the same device meanwhile, kept with the times.
    """

    folder: Path
    corpus: NeedleCorpus
    corpus_folder: Path
    preset: Preset
    seed: int
    console: Console
    stopping: Stopping | None = None
    beside: str | None = None

    def once(self, name: str, measure: Any) -> Any:
        """Gives what was measured under a name, and measures if it was not."""
        return Ledger(self.folder / "measured", 0, self.stopping, self.console.print).once(name, measure)

    def run(self, name: str) -> Run:
        """Describes the run of a variant."""
        config = settings.make_config(self.preset, name, self.corpus_folder, seed=self.seed)
        variant, dense = VARIANTS[name], self.folder / "runs" / DENSE
        init = None
        if variant.first is None:
            kind = FromDense if variant.baseline == "nsa" else InitialParams
            init = kind(dense, step=self.run(DENSE).phase_end("BASE"), label="the dense model after BASE")
        return Run(config, self.folder / "runs" / name, init)

    def variant(self, name: str) -> dict[str, Any]:
        """Trains a variant and measures it: losses by position, answers, what training took."""
        run, variant = self.run(name), VARIANTS[name]
        progress = RunProgress(run.config, title=name, console=self.console)
        run.train(self.corpus, progress, resume=True, stopping=self.stopping)
        last = run.config.phases[-1].name
        subject = Subject(name, lambda: run.params_after(last), attending(variant.attention))
        rows = draw_held_out(self.corpus, self.preset.loss_rows, 1, self.preset.lengths[-1], seed=self.seed)
        lengths, questions = self.preset.lengths, self.preset.questions
        asked = ask_subject(run, subject, self.corpus, lengths=lengths, needles=NEEDLES, questions=questions)
        records = run.records()
        return {
            "setup": {key: str(value) for key, value in describe_run(run, self.corpus.text).items() if key != "K"},
            "losses": held_out_losses(run.graphdef, subject.read(), rows, attention=variant.attention),
            "answers": Maps({name: asked}).to_json()[name],
            "curves": read_curves(records, ("step", "lm_loss")),
            "seconds": {phase: round(each, 2) for phase, each in read_seconds(records).items()},
            "circumstances": circumstances(self.beside),
        }

    def timing(self, lengths: Sequence[int]) -> list[dict[str, Any]]:
        """Times each attention by length."""
        sides = settings.sides(self.preset, max(lengths)).items()
        say = lambda text: self.console.print(text, highlight=False)  # noqa: E731
        measure = lambda name, side: lambda: measure_lengths({name: side}, lengths, say)  # noqa: E731
        return [row for name, side in sides for row in self.once(f"timing of {name}", measure(name, side))]


if __name__ == "__main__":
    sys.exit(main())
