"""Tells what each choice is worth: rows of one change each, all from one dense model, at 16K tokens.

    python -m studies.needle.ablations --base BASE --corpus CORPUS            # all rows; --only k512 blocks64 for some

A row converts the dense model by WARMUP and SPARSE as the study does, with one thing changed, and is measured on
held-out text and needles beside the dense model that was continued for as many steps of the same batches.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from studies.needle import settings
from studies.needle.corpus import RECORD
from studies.needle.found import Ledger, circumstances
from studies.needle.kept import restore
from studies.needle.maps import DEPTHS, NEEDLES, has_room, questions_of
from studies.needle.questions import Cell, ask, attending
from studies.needle.rows import NeedleConfig, NeedleCorpus, draw_held_out, load
from train.commands.command import parse, run_command
from train.evaluation.evaluate import held_out_losses, measure_selections
from train.files import replace_text
from train.phases import DENSE_CONTROL, Params
from train.processes.stopping import Stopping
from train.reporting.report import markdown_table
from train.run import Run
from train.saved.initial import InitialParams
from train.settings import PhaseSettings, RunConfig, Stage
from train.state import abstract_params
from train.watching.progress import RunProgress

CONTROL, FILE = "dense", "ablations.json"


@dataclasses.dataclass(frozen=True)
class Change:
    """Describes a row of the table.

    Attributes:
      says: what it shows, in one sentence.
      model: fields of the model that differ.
      warmup: the steps of WARMUP, as a share of the usual ones.
      scratch: whether backbone and indexer are trained together from random weights instead, through the selection.
      read_with: fields that differ where the trained weights of the default row are measured, and nowhere else.
      share: which layers have an indexer (F) and which reuse a selection (S), again and again; "" for all with one.
    """

    says: str
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    warmup: float = 1.0
    scratch: bool = False
    read_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    share: str = ""

    def fields(self, layers: int) -> dict[str, Any]:
        """Lists the fields of a model of so many layers that differ."""
        kinds = {"F": "full", "S": "shared"}
        types = tuple(kinds[self.share[layer % len(self.share)]] for layer in range(layers)) if self.share else ()
        return {**self.model, **({"indexer_types": types} if types else {})}


CHANGES = {
    "default": Change("The study's own choices."),
    "fp8": Change("Index queries and keys in FP8 with the Hadamard transform, as served.", {"index_fp8": True}),
    "heads4": Change("4 index heads.", {"index_n_heads": 4}),
    "heads64": Change("64 index heads.", {"index_n_heads": 64}),
    "warmup0": Change("No warm-up: SPARSE begins with a random indexer.", warmup=0.0),
    "warmup_half": Change("Half of the warm-up.", warmup=0.5),
    "warmup_double": Change("Twice the warm-up.", warmup=2.0),
    "k256": Change("K 256.", {"index_topk": 256}),
    "k512": Change("K 512.", {"index_topk": 512}),
    "k1024": Change("K 1024.", {"index_topk": 1024}),
    "k4096": Change("K 4096.", {"index_topk": 4096}),
    "scratch": Change("No dense phase: backbone and indexer together from random weights.", scratch=True),
    "blocks8": Change("Whole blocks of 8 keys are selected.", {"baseline": "blocks", "block_size": 8}),
    "blocks64": Change("Whole blocks of 64 keys are selected.", {"baseline": "blocks", "block_size": 64}),
    "max_target": Change("The KL's target is the maximum over heads, not the sum.", {"index_kl_target": "max"}),
    "shared": Change("Every second layer reuses a selection; an indexer learns from both layers.", share="FS"),
    "shared_own": Change(
        "The same, and an indexer learns from its own layer alone.", {"index_share_kl": "own"}, share="FS"
    ),
    "wrong_rope": Change(
        "The default's weights, read with the other layout of RoPE in the indexer: it fails beyond K alone.",
        read_with={"index_rope_interleave": True},
    ),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Says how long rows are trained and how much is measured.

    Attributes:
      length: tokens of a row.
      warmup: steps of WARMUP.
      sparse: steps of SPARSE and of the dense control.
      scratch: the stages of the row without a dense phase.
      loss_rows, mass_rows, questions: as in `settings.Preset`.
    """

    length: int
    warmup: int
    sparse: int
    scratch: tuple[Stage, ...]
    loss_rows: int
    mass_rows: int
    questions: int


SIZES = {
    "card": Size(16384, 100, 100, (Stage(572, 64, 1024), Stage(153, 8, 8192), Stage(160, 1, 16384)), 8, 2, 8),
    "small": Size(512, 4, 4, (Stage(6, 4, 256), Stage(2, 1, 512)), 2, 1, 1),
}


def make_row(size: Size, preset: settings.Preset, change: Change, corpus: Path, *, control: bool = False) -> RunConfig:
    """Makes the run of a row.

    Args:
      size: of all rows.
      preset: the study's.
      change: what differs.
      corpus: the folder of the text.
      control: whether it is the dense model continued.
    """
    own = settings.make_config(preset, corpus)
    base, warmup, sparse = own.phases
    stages = (dataclasses.replace(preset.sparse[0], steps=size.sparse, seq_len=size.length),)
    model = dataclasses.replace(own.model, **change.fields(own.model.num_hidden_layers))
    sparse = dataclasses.replace(
        sparse,
        stages=stages,
        backbone=_ramped(sparse.backbone, stages),
        indexer=_ramped(sparse.indexer, stages),
    )
    if control:
        phases: tuple[PhaseSettings, ...] = (dataclasses.replace(sparse, phase=DENSE_CONTROL, indexer=None),)
    elif change.scratch:
        last = dataclasses.replace(size.scratch[-1], rates=(1.0, 0.03))
        phases = (
            dataclasses.replace(
                sparse,
                stages=(*size.scratch[:-1], last),
                backbone=_ramped(base.backbone, size.scratch),
                indexer=_ramped(warmup.indexer, size.scratch),
            ),
        )
    else:
        steps = round(change.warmup * size.warmup)
        warm = (Stage(steps, 1, size.length, rates=(1.0, 0.05)),) if steps else ()
        phases = (*((dataclasses.replace(warmup, stages=warm),) if warm else ()), sparse)
    return dataclasses.replace(own, model=model, phases=phases)


def _ramped(rates: Any, stages: tuple[Stage, ...]) -> Any:
    return dataclasses.replace(rates, warmup_steps=settings.ramp(rates.warmup_steps, stages))


@dataclasses.dataclass(frozen=True)
class Bench:
    """Trains and measures rows in one folder.

    Attributes:
      folder: of rows and of what was found.
      base: a checkpoint of the dense model.
      corpus: the text.
      corpus_folder: where it lies.
      size, preset: how much.
      console: where it says what it does.
      stopping: signals and the clock.
      beside: other work on the same device meanwhile, kept with the times.
    """

    folder: Path
    base: Path
    corpus: NeedleCorpus
    corpus_folder: Path
    size: Size
    preset: settings.Preset
    console: Console
    stopping: Stopping | None = None
    beside: str | None = None

    def row(self, name: str) -> dict[str, Any]:
        """Trains the row, unless it is, and gives its numbers."""
        ledger = Ledger(self.folder / "measured", 0, self.stopping, self.console.print)
        return ledger.once(name, lambda: self._train_and_measure(name))

    def _train_and_measure(self, name: str) -> dict[str, Any]:
        if name == CONTROL:
            return self._measure(self._train(name), dense=True)
        read_with = CHANGES[name].read_with
        return self._measure(self._train("default" if read_with else name), read_with=read_with)

    def _train(self, name: str) -> Run:
        """Trains a row, unless it is; the dense control too."""
        change = CHANGES["default" if name == CONTROL else name]
        config = make_row(self.size, self.preset, change, self.corpus_folder, control=name == CONTROL)
        init = None if change.scratch else InitialParams(self.base, label="the kept dense model")
        run = Run(config, self.folder / "rows" / name, init)
        began = time.monotonic()
        progress = RunProgress(run.config, title=name, console=self.console)
        run.train(self.corpus, progress, resume=True, stopping=self.stopping)
        self.console.print(f"{name}: trained in {time.monotonic() - began:.0f} s", highlight=False)
        return run

    def _measure(self, run: Run, *, dense: bool = False, read_with: Mapping[str, Any] | None = None) -> dict[str, Any]:
        params, graphdef = run.params_after(run.config.phases[-1].name), run.graphdef
        if read_with:
            graphdef = abstract_params(dataclasses.replace(run.config.model, **read_with))[0]
        attention: Literal["dense", "sparse"] = "dense" if dense else "sparse"
        rows = lambda count: draw_held_out(self.corpus, count, 1, self.size.length)  # noqa: E731
        losses = held_out_losses(graphdef, params, rows(self.size.loss_rows), attention=attention)
        found = {"losses": losses, "answers": self._answers(run, graphdef, params, attention)}
        if not dense:
            kept, _ = measure_selections(graphdef, params, rows(self.size.mass_rows))
            found["kept"] = {name: kept.mean(name, "text") for name in ("indexer", "oracle", "window")}
        lines = run.records()
        return found | {
            "K": run.config.model.index_topk,
            "kl": [line["kl"] for line in lines if "kl" in line][-1:],
            "train_seconds": round(sum(line["seconds"] for line in lines), 1),
            **circumstances(self.beside),
        }

    def _answers(self, run: Run, graphdef: Any, params: Params, attention: Any) -> dict[str, Any]:
        cells = {}
        for needles in NEEDLES:
            if not has_room(self.corpus, self.size.length, needles):
                continue
            drawn = questions_of(
                run, self.corpus, seq_len=self.size.length, a_row=needles, questions=self.size.questions
            )
            found = ask(graphdef, params, drawn, DEPTHS, attend=attending(attention))
            cells[str(needles)] = dataclasses.astuple(Cell.sum(found))
        return cells


def table(found: Mapping[str, Mapping[str, Any]], k: int) -> list[str]:
    """Writes the rows that were measured as a table in Markdown; losses stand beside those of the dense control.

    Args:
      found: the numbers of each row by its name, the control's among them.
      k: the K of the default, up to which and beyond which losses are told apart.
    """
    header = "change", "loss, to the dense control's", f"within K ({k:,})", "beyond", "at answers, nats"
    header += "one needle", "eight", "mass kept: indexer (oracle, window)", "KL", "training, s"
    control, rows = found[CONTROL], []
    for name, row in found.items():
        says = "The dense model, continued." if name == CONTROL else CHANGES[name].says
        within, beyond = (_by_position(row, control, k, inside=inside) for inside in (True, False))
        mass = row.get("kept") or {}
        cells = (
            f"`{name}` {says}",
            _percent(row["losses"]["text"], control["losses"]["text"]),
            within,
            beyond,
            _number(row["losses"].get("answers")),
            *(_cell(row["answers"].get(str(needles))) for needles in NEEDLES),
            f"{_number(mass['indexer'])} ({_number(mass['oracle'])}, {_number(mass['window'])})" if mass else "",
            _number(row["kl"][0]) if row["kl"] else "",
            f"{'≤ ' if 'beside' in row else ''}{row['train_seconds']:.0f}",
        )
        rows.append(cells)
    return markdown_table(header, rows)


def _by_position(row, control, k: int, *, inside: bool) -> str:
    """Averages the gap over the ranges of positions up to K, or beyond."""
    gaps = []
    for name, loss in row["losses"].items():
        if name.startswith("positions") and loss is not None:
            if (int(name.split()[-1]) < k) == inside and control["losses"].get(name):
                gaps.append(loss / control["losses"][name] - 1)
    return f"{100 * sum(gaps) / len(gaps):+.2f} %" if gaps else ""


def _percent(ours: float, theirs: float) -> str:
    return f"{100 * (ours / theirs - 1):+.2f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _cell(counts: Sequence[int] | None) -> str:
    if counts is None:
        return ""
    cell = Cell(*counts)
    low, high = cell.interval
    return f"{cell.share:.0%} ({low:.0%}–{high:.0%})"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains and measures the rows of the ablation table, each from the same dense model."""

    base: Path
    """Folder of the dense model in 8 bits, which the study keeps as `base`."""
    corpus: Path
    """Folder of the corpus that it was trained on."""
    only: tuple[Literal[tuple([CONTROL, *CHANGES])], ...] = ()  # pyright: ignore[reportInvalidTypeForm]
    """Rows to run, the control beside them; all without it."""
    preset: Literal["card", "small"] = "card"
    """The study's."""
    out: Path = Path("runs") / "needle" / "ablations"
    """Folder of the rows; what it has already is not done again."""
    stop_after: str | None = None
    """Save and stop after this time, like 9m, with exit status 75; the same command goes on."""
    beside: str | None = None
    """Other work on the same device meanwhile: the table then calls the times upper bounds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input becomes one line on stderr and exit status 2, a diverged loss status 1."""
    given = sys.argv[1:] if arguments is None else arguments

    def run() -> None:
        chosen = parse(Arguments, given, "python -m studies.needle.ablations")
        with Stopping.within(chosen.stop_after) as stopping:
            ablate(chosen, Console(), stopping)

    return run_command(run)


def ablate(arguments: Arguments, console: Console, stopping: Stopping | None = None) -> None:
    """Runs the rows, writes `ablations.json` after each, and prints the table."""
    if not (arguments.corpus / RECORD).exists():
        raise ValueError(f"corpus must be a folder that python -m studies.needle has made, got {arguments.corpus}")
    preset, size = settings.PRESETS[arguments.preset](), SIZES[arguments.preset]
    config = settings.make_config(preset, arguments.corpus)
    assert isinstance(config.data, NeedleConfig)
    bench = Bench(
        arguments.out,
        restore(arguments.base, arguments.out / "base"),
        load(config.data, vocab_size=preset.vocabulary),
        arguments.corpus,
        size,
        preset,
        console,
        stopping,
        arguments.beside,
    )
    names = dict.fromkeys([CONTROL, *(arguments.only or CHANGES)])
    tokenizer = json.loads((arguments.corpus / RECORD).read_text())["tokenizer"]
    found: dict[str, Any] = {}
    for name in names:
        found[name] = bench.row(name)
        write_rows(arguments.out, found, tokenizer)
    for line in table(found, config.model.index_topk):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_rows(folder: Path, found: Mapping[str, Any], tokenizer: str) -> None:
    """Writes `ablations.json`: the rows, and the hash of the tokenizer by which a report knows the corpus."""
    text = json.dumps({"tokenizer": tokenizer, "rows": found}, indent=1)
    replace_text(folder / FILE, text + "\n")


if __name__ == "__main__":
    sys.exit(main())
