"""Runs of several seeds and their controls, evaluated and reported: what a command does once its arguments are read."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from dsa_jax import generate
from train.checks import check_integer
from train.data import TEXT, BatchSource, Corpus, SplitName
from train.evaluate import Evaluation, HeldOut, draw_batches, evaluate_run
from train.folder import check_unused
from train.initial import InitialParams
from train.layout import PLAIN, Layout
from train.phases import CONTROLS, Params, Phase, merge_groups
from train.progress import RunProgress
from train.report import summary, write_report
from train.results import Results, SeedResult, max_rss, read_curves
from train.run import Run
from train.settings import RunConfig
from train.state import TrainState, abstract_params

MAX_SEEDS = 1000
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
      evaluate: whether they are measured and reported, on one device, which must be able to hold the model.
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
    evaluate: bool = True

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
        results, sample = [], None
        for run in self.runs:
            state, controls = self._train(run, console)
            if self.evaluate:
                run, state, controls = on_one_device(run, state, controls)
                results.append(self._measure(run, state.params, controls, console))
                sample = sample or continue_text(run, state, self.text)
        if not results:
            console.print(f"\nRun: {self.folder}", highlight=False)
            return None
        setup, seconds = describe_run(self.runs[0], self.text), before + time.monotonic() - began
        found = Results(self.name, setup, results, seconds, max_rss(), sample=sample)
        return None if jax.process_index() else self._report(found, console)

    def _train(self, run: Run, console: Console) -> tuple[TrainState, dict[str, Params]]:
        """Trains a run and its controls; returns its last state and their parameters."""
        title, data = f"seed {run.config.seed}" if len(self.runs) > 1 else "", self.data or self.text
        state = run.train(data, RunProgress(run.config, title=title, console=console), resume=self.resume)
        controls = {}
        for phase in CONTROLS if self.controls else ():
            control = control_run(run, phase)
            progress = RunProgress(control.config, title=title, console=console)
            controls[phase.name] = control.train(data, progress, resume=self.resume).params
        return state, controls

    def _measure(self, run: Run, final: Params, controls: dict[str, Params], console: Console) -> SeedResult:
        begin = time.monotonic()
        held_out = (self.draw_held_out or self._held_out_text)(run.config)
        with console.status("evaluating"):
            evaluation = evaluate(run, final, controls, held_out)
        others = [control_run(run, phase) for phase in CONTROLS if phase.name in controls]
        records = [record for each in (run, *others) for record in each.records()]
        seconds: dict[str, float] = {}
        for record in records:
            seconds[record["phase"]] = seconds.get(record["phase"], 0.0) + record["seconds"]
        seconds["evaluation"] = time.monotonic() - begin
        return SeedResult(run.config.seed, evaluation, read_curves(records), seconds)

    def _held_out_text(self, config: RunConfig) -> HeldOut:
        return HeldOut({"text": draw_batches(self.text, *held_out_shape(config))})

    def _report(self, found: Results, console: Console) -> Path:
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
    folders = [folder] if seeds == 1 else [folder / f"seed{i}" for i in range(seeds)]
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


def on_one_device(
    run: Run, state: TrainState, controls: dict[str, Params]
) -> tuple[Run, TrainState, dict[str, Params]]:
    """Reads what was trained on a mesh from its checkpoints to this process's first device; the rest stays as it is."""
    if run.mesh is None:
        return run, state, controls
    run = dataclasses.replace(run, mesh=None)
    others = [control_run(run, phase) for phase in CONTROLS if phase.name in controls]
    ends = [(each, each.config.phases[-1].name) for each in (run, *others)]
    params, *of_controls = [each.params_after(name) for each, name in ends]
    state = dataclasses.replace(state, params=params, random=jnp.asarray(jax.device_get(state.random)))
    return run, state, dict(zip([name for _, name in ends[1:]], of_controls, strict=True))


def held_out_shape(config: RunConfig) -> tuple[int, int, int]:
    """Gives number, sequences and tokens of the batches that a run is measured on: micro-batches of its last stage."""
    stage = config.phases[-1].stages[-1]
    return config.evaluation_batches, stage.batch_size // stage.micro_batches, stage.seq_len


def evaluate(run: Run, final: Params, controls: dict[str, Params], held_out: HeldOut) -> Evaluation:
    """Measures the weights that each phase left; where a phase was not run, those it would have begun with."""
    initial = params = run.initial_params()
    after, names = {}, [settings.name for settings in run.config.phases]
    for name in ("BASE", "WARMUP"):
        params = run.params_after(name) if name in names else params
        after[name] = params
    weights = dict(initial=initial, base=after["BASE"], warmed=after["WARMUP"], final=final)
    return evaluate_run(run.graphdef, held_out, **weights, controls=controls, seed=run.config.seed)


def continue_text(run: Run, state: TrainState, corpus: Corpus) -> str:
    """Samples what the model makes of a held-out prompt, with the run's random state."""
    length = min(PROMPT_TOKENS, run.config.model.max_position_embeddings // 2)
    count = min(CONTINUATION_TOKENS, run.config.model.max_position_embeddings - length)
    prompt = corpus.prompt(length)
    tokens = generate(
        merge_groups(run.graphdef, state.params),
        jnp.asarray(prompt)[None],
        max_new_tokens=count,
        key=jax.random.wrap_key_data(state.random),
        temperature=0.8,
    )
    text = f"{corpus.decode(prompt)}▌{corpus.decode(np.asarray(tokens)[0])}"
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def describe_run(run: Run, corpus: Corpus) -> dict[str, str | int | float]:
    """Says what was run, for the report."""
    model = run.config.model
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(model)[1])]
    stages = {
        phase.name: " + ".join(f"{s.steps} steps of {s.batch_size} × {s.seq_len} tokens" for s in phase.stages)
        for phase in run.config.phases
    }
    return {
        "model": f"{sum(sizes):,} parameters, {model.num_hidden_layers} layers, {model.num_moe_layers} of them MoE",
        "K": model.index_topk,
        **stages,
        "training text": _describe_split(corpus, "train"),
        "held-out text": _describe_split(corpus, "held_out"),
        **_describe_packing(corpus, run.config.phases[-1].stages[-1].seq_len),
        **_describe_reading(corpus),
        "jax": f"{jax.__version__} on {jax.default_backend()}",
    }


def _describe_split(corpus: Corpus, split: SplitName) -> str:
    """Counts tokens and documents, of each source where there are several."""
    sources = corpus.sources(split)
    if len(sources) == 1 and sources[0].name == TEXT:
        return f"{sources[0].documents.size:,} tokens in {len(sources[0].documents)} files"
    counts = [f"{each.name} {each.documents.size:,} in {len(each.documents):,} documents" for each in sources]
    return "tokens of " + ", ".join(counts)


def _describe_packing(corpus: Corpus, seq_len: int) -> dict[str, str]:
    """Says what rows of the run's last stage lose, where documents are packed."""
    if all(source.pack == "concat" for source in corpus.sources("train")):
        return {}
    waste = corpus.waste("train", seq_len=seq_len)
    lost = (f"{name} {each.padding:.2%} padding, {each.cut:.2%} of documents cut" for name, each in waste.items())
    return {"packing": "; ".join(lost)}


def _describe_reading(corpus: Corpus) -> dict[str, str]:
    """Says how documents end, and which text was not read."""
    rows = {} if corpus.tokenizer is None else {"end of a document": corpus.end_token or "no token"}
    files, size = corpus.left_out
    return rows | ({"text left out": f"{files:,} files of {size:,} bytes, past max_bytes"} if files else {})
