"""Runs of several seeds and their controls, evaluated and reported: what a command does once its arguments are read."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from rich.console import Console

from dsa_jax import generate
from train.checks import check_integer
from train.commands.describe import describe_run, opening
from train.data import BatchSource, Corpus
from train.evaluation.evaluate import Evaluation, Weights, attention_of, check_selects, evaluate_run
from train.evaluation.held_out import HeldOut, draw_batches
from train.files import writing
from train.phases import CONTROLS, Params, Phase, merge_groups, window_selection
from train.processes.stopping import Stopping
from train.reporting.layout import PLAIN, Layout
from train.reporting.report import summary, write_report
from train.reporting.results import Results, SeedResult, max_rss, read_curves, read_seconds
from train.run import Run
from train.saved.folder import check_unused
from train.saved.initial import InitialParams
from train.settings import PhaseSettings, RunConfig
from train.watching.progress import RunProgress
from train.watching.watch import UNWATCHED, Watch, read_best

MAX_SEEDS = 1000
SEED_FOLDER = "seed{}"
PROMPT_TOKENS, CONTINUATION_TOKENS = 96, 160  # of the sample at the end

type DrawHeldOut = Callable[[RunConfig], HeldOut]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Runs of one configuration from several seeds, with what their report needs.

    Args:
      name: heads the report.
      folder: where the report goes.
      runs: one a seed.
      text: the corpus; a prompt of it begins the sample.
      data: what the runs train on; without it the text itself.
      draw_held_out: makes what they are measured on, from a run's configuration; without it held-out text.
      layout: how the report looks, its goals among it.
      controls: whether SPARSE's controls are trained too.
      resume: whether runs are continued.
      new_data: whether runs that are continued may take other data than theirs.
      evaluate: whether they are measured and reported at the end.
      watch: what is watched beside the losses; its held-out batches are drawn.
      stopping: signals and the clock, by which the runs are saved and stopped.
      compile_ahead: whether programs are compiled before the first step; see `Run.train`.

    Raises:
      ValueError: if a model that is to be measured has no indexer.
    """

    name: str
    folder: Path
    runs: tuple[Run, ...]
    text: Corpus
    data: BatchSource | None = None
    draw_held_out: DrawHeldOut | None = None
    layout: Layout = PLAIN
    controls: bool = False
    resume: bool = False
    new_data: bool = False
    evaluate: bool = True
    watch: Watch = UNWATCHED
    stopping: Stopping | None = None
    compile_ahead: bool | None = None

    def __post_init__(self):
        for run in self.runs if self.evaluate else ():
            check_selects(run.config.model)

    def run(self, console: Console, *, began: float | None = None) -> Path | None:
        """Trains all runs and their controls, and reports.

        Args:
          console: where it says what it does.
          began: the reading of `time.monotonic` from which the report counts the time; without it, now.

        Returns:
          the report's path, None where there is none.
        """
        began = time.monotonic() if began is None else began
        before = sum(record["seconds"] for run in self.runs for record in run.records())
        held_outs = [self._draw(run.config) for run in self.runs]  # here, so that too little text is said at once
        for name, value in opening(self.runs[0], self.text).items():
            console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
        for run in self.runs:
            if self.evaluate and not _has_beginning(run):
                console.print(f"{run.init} is gone: what the run began with is not measured", highlight=False)
        results, sample = [], None
        for run, held_out in zip(self.runs, held_outs, strict=True):
            params, random = self._train(run, held_out, console)
            if self.evaluate and held_out is not None:
                results.append(self._measure(run, params, held_out, console))
                sample = sample or continue_text(run, params, random, self.text)
        for line in () if jax.process_index() else outcome(self.runs):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if not results:
            return None
        setup, seconds = describe_run(self.runs[0], self.text), before + time.monotonic() - began
        found = Results(self.name, setup, results, seconds, max_rss(), sample=sample)
        return None if jax.process_index() else self._report(found, console)

    def _draw(self, config: RunConfig) -> HeldOut | None:
        """Draws what a run is measured on, if it is."""
        return (self.draw_held_out or self._held_out_text)(config) if self.evaluate or config.evaluate_every else None

    def _train(self, run: Run, held_out: HeldOut | None, console: Console) -> tuple[Params, Array]:
        """Trains a run and its controls; returns its last parameters and random state, and lets go of the rest."""
        title, data = f"seed {run.config.seed}" if len(self.runs) > 1 else "", self.data or self.text
        watch = dataclasses.replace(self.watch, held_out=held_out)
        options: dict[str, Any] = dict(resume=self.resume, new_data=self.new_data, stopping=self.stopping)
        options["compile_ahead"] = self.compile_ahead
        state = run.train(data, RunProgress(run.config, title=title, console=console), watch=watch, **options)
        params, random = state.params, state.random
        del state
        for control in self._controls(run):
            progress, watched = RunProgress(control.config, title=title, console=console), Watch(held_out)
            control.train(data, progress, watch=watched, **options)
        return params, random

    def _controls(self, run: Run) -> list[Run]:
        return [control_run(run, phase) for phase in CONTROLS] if self.controls else []

    def _measure(self, run: Run, final: Params, held_out: HeldOut, console: Console) -> SeedResult:
        begin, controls = time.monotonic(), self._controls(run)
        with console.status("evaluating"):
            evaluation = evaluate(run, final, controls, held_out)
        records = [record for each in (run, *controls) for record in each.records()]
        seconds = read_seconds(records) | {"evaluation": time.monotonic() - begin}
        return SeedResult(run.config.seed, evaluation, read_curves(records), seconds)

    def _held_out_text(self, config: RunConfig) -> HeldOut:
        return HeldOut({"text": draw_batches(self.text, *held_out_shape(config))})

    def _report(self, found: Results, console: Console) -> Path:
        with writing(self.folder / "report.md"):
            path = write_report(found, self.folder, self.layout)
        console.print(summary(found, self.layout))
        console.print("\nA sampled continuation:\n", highlight=False)
        console.print(found.sample, markup=False, highlight=False)
        console.print(f"\nReport: {path}", highlight=False)
        return path


def seed_runs(
    config: RunConfig,
    folder: Path,
    seeds: int,
    *,
    init: InitialParams | None = None,
    mesh: Mesh | None = None,
    resume: bool = False,
) -> tuple[Run, ...]:
    """Makes the run of each seed, the configuration's and those that follow, in the folder itself if it is one alone.

    Raises:
      ValueError: if `seeds` is not from 1 to `MAX_SEEDS`, or a folder holds a run that `resume` does not continue.
    """
    check_integer("seeds", seeds, most=MAX_SEEDS)
    folders = [folder] if seeds == 1 else [folder / SEED_FOLDER.format(i) for i in range(seeds)]
    runs = [Run(dataclasses.replace(config, seed=config.seed + i), each, init, mesh) for i, each in enumerate(folders)]
    for each in () if resume else (folder, *folders):
        check_unused(each)
    return tuple(runs)


def control_run(run: Run, phase: Phase) -> Run:
    """Makes a control: from the weights that SPARSE begins with, over the batches of SPARSE, for as many steps."""
    sparse = run.config.phases[-1]
    settings = dataclasses.replace(sparse, phase=phase, indexer=None)
    config = dataclasses.replace(run.config, phases=(settings,))
    begin = run.config.steps - sparse.steps
    label = f"step {begin} of the run that it controls"
    init = InitialParams(run.folder, begin, label) if begin else run.init
    return Run(config, run.folder / phase.name.lower(), init, run.mesh)


def held_out_shape(config: RunConfig) -> tuple[int, int, int]:
    """Gives number, sequences and tokens of the batches that a run is measured on: micro-batches of its last stage."""
    stage = config.phases[-1].stages[-1]
    return config.evaluation_batches, stage.batch_size // stage.micro_batches, stage.seq_len


def evaluate(run: Run, final: Params, controls: Sequence[Run], held_out: HeldOut) -> Evaluation:
    """Measures the weights that a run ended with, those that it passed through, and those of its controls.

    They are read from their checkpoints to where the run is trained, one after the other.
    """
    before = [_weights_after(run, settings) for settings in run.config.phases[:-1]]
    if run.init is not None and _has_beginning(run):
        before.insert(0, Weights("at the beginning, dense", run.initial_params, "dense"))
    return evaluate_run(
        run.graphdef,
        held_out,
        final,
        before=before,
        controls=[_weights_after(control, control.config.phases[-1], is_control=True) for control in controls],
        indexers=_earlier_indexers(run),
        seed=run.config.seed,
        mesh=run.mesh,
    )


def _weights_after(run: Run, settings: PhaseSettings, *, is_control: bool = False) -> Weights:
    phase = settings.phase
    attention = "last K keys" if phase.selection is window_selection else attention_of(phase)
    label = f"{phase.name}, {attention}" if is_control else f"after {phase.name}, {attention}"
    return Weights(label, lambda: run.params_after(phase.name), attention_of(phase), phase.selection)


def _has_beginning(run: Run) -> bool:
    """Tells whether what the run began with can be had; a run that is continued may do without."""
    return run.init is None or run.init.is_there


def _earlier_indexers(run: Run) -> dict[str, Any]:
    """Reads the indexers that the last one is compared with: after WARMUP, and before any training."""
    names = [settings.name for settings in run.config.phases]
    if "WARMUP" not in names:
        return {"initial": run.initial_params()["indexer"]} if run.init is not None and _has_beginning(run) else {}
    untrained = {"untrained": run.initial_params()["indexer"]} if _has_beginning(run) else {}
    return untrained if names[-1] == "WARMUP" else {"warmed": run.params_after("WARMUP")["indexer"], **untrained}


def continue_text(run: Run, params: Params, random: Array, corpus: Corpus) -> str:
    """Samples what the model makes of a held-out prompt, with the run's random state."""
    length = min(PROMPT_TOKENS, run.config.model.max_position_embeddings // 2)
    count = min(CONTINUATION_TOKENS, run.config.model.max_position_embeddings - length)
    prompt = corpus.prompt(length)
    tokens = generate(
        merge_groups(run.graphdef, params),
        jnp.asarray(prompt)[None],
        max_new_tokens=count,
        key=jax.random.wrap_key_data(jnp.asarray(jax.device_get(random))),
        temperature=0.8,
        mesh=run.mesh,
    )
    text = f"{corpus.decode(prompt)}▌{corpus.decode(np.asarray(tokens)[0])}"
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def outcome(runs: Sequence[Run]) -> list[str]:
    """Says what each run reached: its last numbers, where they are, and its best checkpoint if one is kept."""
    lines = []
    for run in runs:
        *_, last = run.records()
        losses = [f"{name} {last[name]:.4f}" for name in ("lm_loss", "kl", "held_out_loss") if name in last]
        tokens = f"{last['tokens_seen']:,} tokens" if "tokens_seen" in last else ""
        done = ", ".join(filter(None, (f"step {last['step']} of {run.config.steps}", tokens, *losses)))
        lines.append(f"Run: {run.folder}: {done}")
        if (best := read_best(run.folder)) is not None:
            path = run.folder / "checkpoints" / str(best["step"])
            lines.append(f"Best of {best['phase']}: held-out loss {best['held_out_loss']:.4f}, {path}")
    return lines
