"""The command `python -m train`: trains, evaluates, reports, and lets the model speak."""

import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.console import Console

from dsa_jax import generate
from dsa_jax.parallel.sharding import AXES, make_mesh, parse_mesh
from train.data import Corpus, load
from train.evaluate import Evaluation, HeldOut, evaluate_run
from train.phases import CONTROLS, PHASES, Params, Phase, merge_groups
from train.planner import command as plan
from train.presets import PRESETS, RunConfig, load_preset
from train.progress import RunProgress
from train.report import Results, SeedResult, max_rss, read_curves, summary, write_report
from train.run import DivergedError, Init, Run, abstract_params, check_unused
from train.step import TrainState

LIMITS = {"tiny": (8 * 60.0, 4 * 2**30)}  # seconds and bytes that a run of the preset promises to stay within
PROMPT, CONTINUATION = 96, 160  # tokens of the sample at the end


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a dense model, its indexer, and both through the selection; evaluates and reports."""

    preset: str = "tiny"
    """tiny, deepseek_v32, or a .json file like the run.json of any run's folder."""
    data: tuple[str, ...] = ()
    """Globs of text files; without it the preset's, for tiny the standard library of the running Python."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; without it bytes are the tokens."""
    out: Path | None = None
    """Folder of the run; without it runs/PRESET."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue what the folder holds; the other arguments must be those it was begun with."""
    init: Path | None = None
    """Parameters to begin with: a Hugging Face folder or a run's folder."""
    phases: tuple[Literal["BASE", "WARMUP", "SPARSE"], ...] = ()
    """Phases to run; without it all of the preset."""
    seeds: int = 1
    """How many times, each from another seed."""
    controls: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also train what SPARSE is compared with: the dense model continued, and one sparse with a window as selection."""
    mesh: str | None = None
    """Devices to train on, like data=2,context=4,expert=1,tensor=1; without it one device, or data over all devices of
    a distributed run. A run may be resumed on another mesh."""
    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Join the other processes of this run, as SLURM or Open MPI describe them, or as the next three do."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """The number of this process."""
    evaluate: bool = True
    """Evaluate and report at the end, on one device, which must be able to hold the model."""

    @property
    def name(self) -> str:
        """What the run is called."""
        return Path(self.preset).stem if self.preset not in PRESETS else self.preset

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        return self.out or Path("runs") / self.name

    def run_config(self) -> RunConfig:
        """The preset, with what the arguments change of it."""
        config = load_preset(self.preset)
        data = dataclasses.replace(
            config.data, data=self.data or config.data.data, tokenizer=self.tokenizer or config.data.tokenizer
        )
        if self.init is not None:
            config = dataclasses.replace(config, model=Init(self.init).config(config.model.dtype))
        config = dataclasses.replace(config, data=data)
        config = config.select(self.phases) if self.phases else config
        first = config.phases[0].name
        if self.init is None and first != "BASE":
            raise ValueError(f"phase {first} must begin from a dense checkpoint: give --init")
        if self.controls and config.phases[-1].name != "SPARSE":
            raise ValueError("controls need a run that ends with SPARSE, whose length and batches they share")
        return config

    def join(self) -> None:
        """Joins the other processes, if it is a distributed run; before anything else of JAX."""
        given = [x for x in (self.coordinator, self.num_processes, self.process_id) if x is not None]
        if not self.distributed:
            if given:
                raise ValueError("coordinator, num_processes and process_id need --distributed")
            return
        if len(given) in (1, 2):
            raise ValueError(
                "coordinator, num_processes and process_id must be given together or not at all, got "
                f"{self.coordinator}, {self.num_processes} and {self.process_id}"
            )
        if self.num_processes is not None and not 0 <= (self.process_id or 0) < self.num_processes:
            raise ValueError(
                f"process_id must be from 0 to num_processes - 1 = {self.num_processes - 1}, got {self.process_id}"
            )
        try:
            jax.distributed.initialize(self.coordinator, self.num_processes, self.process_id)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"the processes of the run did not come together: {error}") from error

    def make_mesh(self) -> Mesh | None:
        """The mesh to train on, None for one device alone."""
        if self.mesh is not None:
            return make_mesh(parse_mesh(self.mesh))
        return make_mesh({AXES[0]: jax.device_count()}) if self.distributed else None

    def runs(self) -> list[Run]:
        """The run of each seed."""
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        mesh = self.make_mesh()
        config, init = self.run_config(), None if self.init is None else Init(self.init)
        folders = [self.folder] if self.seeds == 1 else [self.folder / f"seed{i}" for i in range(self.seeds)]
        return [Run(dataclasses.replace(config, seed=i), folder, init, mesh) for i, folder in enumerate(folders)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input becomes one line on stderr and exit status 2, a diverged loss status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _quieten_checkpoints()
    try:
        if arguments[:1] == ["plan"]:
            return plan.main(arguments[1:])
        parsed, unknown = tyro.cli(Arguments, prog="python -m train", args=arguments, return_unknown_args=True)
        if unknown:
            raise ValueError(f"unknown arguments: {' '.join(unknown)}; see --help")
        train(parsed)
    except (ValueError, OSError) as error:
        return _complain(error, 2)
    except DivergedError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted; --resume continues from the last checkpoint", 130)
    return 0


@functools.cache
def _quieten_checkpoints() -> None:
    """Keeps from stderr what a failed save prints there beside the error that it raises.

    Orbax logs the error with its traceback. The writes that it leaves behind end when their event loop is closed, in
    threads of tensorstore, which print a traceback each as nobody could catch it; asyncio logs the tasks destroyed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


def _complain(error: object, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def train(arguments: Arguments) -> None:
    """All seeds and their controls, then the report."""
    arguments.join()
    begin, console = time.monotonic(), Console(quiet=jax.process_index() > 0)
    runs = arguments.runs()
    if not arguments.resume:
        for folder in (arguments.folder, *(run.folder for run in runs)):
            check_unused(folder)
    corpus = load(runs[0].config.data, vocab_size=runs[0].config.model.vocab_size)
    before = sum(record["seconds"] for run in runs for record in run.records())
    results, sample = [], None
    for run in runs:
        title = f"seed {run.config.seed}" if len(runs) > 1 else ""
        state = run.train(corpus, RunProgress(run.config, title=title, console=console), resume=arguments.resume)
        controls = {}
        for phase in CONTROLS if arguments.controls else ():
            other = control_run(run, phase)
            progress = RunProgress(other.config, title=title, console=console)
            controls[phase.name] = other.train(corpus, progress, resume=arguments.resume).params
        if not arguments.evaluate:
            continue
        run, state, controls = on_one_device(run, state, controls)
        results.append(_evaluate(run, state.params, controls, corpus, console))
        sample = sample or continue_text(run, state, corpus)
    if not results:
        console.print(f"\nRun: {arguments.folder}", highlight=False)
        return
    limits = LIMITS.get(arguments.name) if arguments.seeds == 1 and not arguments.controls else None
    found = Results(
        arguments.name,
        _setup(runs[0], corpus),
        results,
        before + time.monotonic() - begin,
        max_rss(),
        *(limits or (None, None)),
        sample=sample,
    )
    if jax.process_index():
        return
    path = write_report(found, arguments.folder)
    console.print(summary(found))
    console.print("\nA sampled continuation:\n", highlight=False)
    console.print(sample, markup=False, highlight=False)
    console.print(f"\nReport: {path}", highlight=False)


def on_one_device(
    run: Run, state: TrainState, controls: dict[str, Params]
) -> tuple[Run, TrainState, dict[str, Params]]:
    """What was trained on a mesh, from its checkpoints, on this process's first device; the rest as it is."""
    if run.mesh is None:
        return run, state, controls
    run = dataclasses.replace(run, mesh=None)
    others = [control_run(run, phase) for phase in CONTROLS if phase.name in controls]
    state = dataclasses.replace(
        state, params=run.params_after(run.config.phases[-1].name), random=jnp.asarray(jax.device_get(state.random))
    )
    return (
        run,
        state,
        {other.config.phases[-1].name: other.params_after(other.config.phases[-1].name) for other in others},
    )


def control_run(run: Run, phase: Phase) -> Run:
    """A control: from the weights that SPARSE begins with, over the batches of SPARSE, for as many steps."""
    sparse = run.config.phases[-1]
    settings = dataclasses.replace(sparse, name=phase.name, indexer=None)
    config = dataclasses.replace(run.config, phases=(settings,))
    begin = run.config.steps - sparse.steps
    init = Init(run.folder, begin, f"step {begin} of the run that it controls") if begin else run.init
    return Run(config, run.folder / phase.name.lower(), init, run.mesh)


def _evaluate(run: Run, final: Params, controls: dict[str, Params], corpus: Corpus, console: Console) -> SeedResult:
    begin = time.monotonic()
    with console.status("evaluating"):
        evaluation = evaluate(run, final, controls, corpus)
    others = [control_run(run, phase) for phase in CONTROLS if phase.name in controls]
    records = [record for each in (run, *others) for record in each.records()]
    seconds: dict[str, float] = {}
    for record in records:
        seconds[record["phase"]] = seconds.get(record["phase"], 0.0) + record["seconds"]
    seconds["evaluation"] = time.monotonic() - begin
    return SeedResult(run.config.seed, evaluation, read_curves(records), seconds)


def evaluate(run: Run, final: Params, controls: dict[str, Params], corpus: Corpus) -> Evaluation:
    """Measures the weights that each phase left; where a phase was not run, those it would have begun with."""
    stage = run.config.phases[-1].stages[-1]
    held_out = HeldOut.draw(
        corpus,
        batches=run.config.evaluation_batches,
        batch_size=stage.batch_size // stage.micro_batches,
        seq_len=stage.seq_len,
    )
    initial = params = run.initial_params()
    after = {}
    for phase in PHASES:
        ends = [settings.name for settings in run.config.phases]
        params = run.params_after(phase.name) if phase.name in ends else params
        after[phase.name] = params
    weights = dict(initial=initial, base=after["BASE"], warmed=after["WARMUP"], final=final)
    return evaluate_run(run.graphdef, held_out, **weights, controls=controls, seed=run.config.seed)


def continue_text(run: Run, state: TrainState, corpus: Corpus) -> str:
    """A held-out prompt and what the model makes of it, sampled with the run's random state."""
    length = min(PROMPT, run.config.model.max_position_embeddings // 2)
    count = min(CONTINUATION, run.config.model.max_position_embeddings - length)
    prompt = np.asarray(corpus.held_out.tokens[:length], np.int32)
    tokens = generate(
        merge_groups(run.graphdef, state.params),
        jnp.asarray(prompt)[None],
        max_new_tokens=count,
        key=jax.random.wrap_key_data(state.random),
        temperature=0.8,
    )
    text = f"{corpus.decode(prompt)}▌{corpus.decode(np.asarray(tokens)[0])}"
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _setup(run: Run, corpus: Corpus) -> dict[str, str | int | float]:
    """What was run, for the report."""
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
        "training text": f"{len(corpus.train.tokens):,} tokens in {len(corpus.train)} files",
        "held-out text": f"{len(corpus.held_out.tokens):,} tokens in {len(corpus.held_out)} files",
        "jax": f"{jax.__version__} on {jax.default_backend()}",
    }


if __name__ == "__main__":
    sys.exit(main())
