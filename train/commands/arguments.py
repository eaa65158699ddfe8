"""The arguments of training, what they make of presets and folders, and the command that trains by them."""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console

from dsa_jax.parallel.sharding import AXES, make_mesh, parse_mesh
from train.commands.command import parse
from train.commands.overrides import rate_assignments, set_fields, steps_assignments
from train.compiling import describe_cache, keep_compiled
from train.data import load
from train.experiment import SEED_FOLDER, Experiment, seed_runs
from train.presets import PRESETS, load_preset
from train.processes import cluster, ending
from train.processes.stopping import Stopping
from train.run import Run
from train.saved.folder import (
    RUN_FILE,
    Command,
    read_command,
    read_model_config,
    read_run,
    recorded_origin,
    write_command,
)
from train.saved.initial import InitialParams
from train.settings import RunConfig
from train.watching.profile import ProfiledSteps
from train.watching.watch import Watch


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a dense model, its indexer, and both through the selection; evaluates and reports."""

    preset: str | None = None
    """tiny, sft, deepseek_v32, or a .json file like the run.json of any run's folder; without it tiny, or what --resume
    continues."""
    data: tuple[str, ...] = ()
    """What to train on, each a place or NAME=WEIGHT:PLACE: globs of text files, folders that `tokenize` wrote, prefixes
    of a .bin and an .idx, globs of .jsonl files of conversations; without it the preset's, for tiny the standard
    library of the running Python."""
    held_out: tuple[str, ...] = ()
    """Places that are held out; without it a part of the data, by hashes."""
    pack: Literal["concat", "best_fit"] | None = None
    """concat cuts documents wherever a row is full, best_fit those alone that are longer than a row; without it as the
    preset says."""
    min_document: int | None = None
    """Leave out documents of fewer tokens; without it as the preset says."""
    chat_template: Path | None = None
    """The Jinja template of conversations; without it that beside the tokenizer."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; without it bytes are the tokens."""
    append: bool = True
    """End every document with the tokenizer's end token, such as </s>, if it has one."""
    max_bytes: int | None = None
    """Read so much text at most; without it as much as the preset says, 64 MiB unless that is another number."""
    out: Path | None = None
    """Folder of the run; without it runs/PRESET."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in the folder, which needs no other argument; what others change of it is said and recorded."""
    init: Path | None = None
    """Parameters to begin with: a Hugging Face folder or a run's folder. They decide the model."""
    phases: tuple[Literal["BASE", "WARMUP", "SPARSE", "NATIVE", "SFT"], ...] = ()
    """Phases to run; without it all of the preset."""
    steps: tuple[str, ...] = ()
    """Steps of a phase, like SPARSE=2000; its last stage gets them."""
    learning_rate: tuple[str, ...] = ()
    """Rate of a phase, like SPARSE=1e-4, or of a group in it, like SPARSE.indexer=1e-3."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints."""
    keep_checkpoints: int | None = None
    """How many of the newest checkpoints are kept, besides the last of each phase."""
    set: tuple[str, ...] = ()
    """Any field of the run, like phases.SPARSE.backbone.clip=0.5 or phases.BASE.stages.0.micro_batches=4."""
    seeds: int | None = None
    """How many times, each from another seed; once without it."""
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
    death_timeout: float = cluster.DEATH_TIMEOUT
    """Seconds within which all processes of a distributed run end when one has ended or was lost."""
    join_timeout: float = cluster.JOIN_TIMEOUT
    """Seconds in which all processes of a distributed run must have started."""
    stop_after: str | None = None
    """Save and stop after this time, like 3h50m, with exit status 75."""
    evaluate: bool = True
    """Evaluate and report at the end."""
    evaluate_every: int | None = None
    """Measure the held-out loss every so many steps, and behind each phase; 0: never; without it as the preset says."""
    keep_best: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep the checkpoint of the least held-out loss too."""
    tensorboard: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the metrics for TensorBoard too, into the run's folder."""
    profile: str | None = None
    """FIRST:LAST, steps whose trace is written into the run's folder."""
    compile_ahead: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile the programs of all steps before the first one on CPUs too, as it is done on other devices."""
    compile_cache: Path | None = None
    """Folder where compiled programs are kept, to be read the next time; without it JAX_COMPILATION_CACHE_DIR says."""

    @property
    def name(self) -> str:
        """The run's name: the preset's, or the stem of the file's, or what the command that began it recorded."""
        if self.preset is None:
            return read_command(self.folder).name if self.continues else "tiny"
        return self.preset if self.preset in PRESETS else Path(self.preset).stem

    @property
    def folder(self) -> Path:
        """The run's folder."""
        preset = self.preset or "tiny"
        return self.out or Path("runs") / (preset if preset in PRESETS else Path(preset).stem)

    @property
    def continues(self) -> bool:
        """Says whether a run in the folder is continued."""
        return self.resume and self._begun is not None

    @property
    def _begun(self) -> Path | None:
        """Finds the folder of the first run that was begun in this one, of several seeds their first."""
        folders = (self.folder, self.folder / SEED_FOLDER.format(0))
        return next((folder for folder in folders if (folder / RUN_FILE).is_file()), None)

    def command(self) -> Command:
        """Gathers how the runs are made and measured: as given, as recorded, or as usual.

        Raises:
          ValueError: if the runs that are continued are not as many.
        """
        begun = read_command(self.folder) if self.continues else Command(self.name)
        seeds = begun.seeds if self.seeds is None else self.seeds
        if self.continues and (seeds == 1) != (begun.seeds == 1):
            raise ValueError(f"seeds must stay {begun.seeds} where {self.folder} is continued, got {seeds}")
        return Command(
            name=self.name,
            seeds=seeds,
            controls=self.controls or begun.controls,
            evaluate=self.evaluate and begun.evaluate,
            mesh=self.mesh or begun.mesh,
        )

    def run_config(self) -> RunConfig:
        """Makes the run of the preset or that of the folder, with what the arguments change of it.

        Raises:
          ValueError: if they do not go together.
        """
        config = self._begun_config() if self.continues else self._new_config()
        data = dataclasses.replace(
            config.data,
            data=self.data or config.data.data,
            tokenizer=self.tokenizer or config.data.tokenizer,
            held_out_data=self.held_out or config.data.held_out_data,
            pack=self.pack or config.data.pack,
            min_document=config.data.min_document if self.min_document is None else self.min_document,
            chat_template=self.chat_template or config.data.chat_template,
            append=self.append and config.data.append,
            max_bytes=config.data.max_bytes if self.max_bytes is None else self.max_bytes,
        )
        every = config.evaluate_every if self.evaluate_every is None else self.evaluate_every
        watched = dict(evaluate_every=every, keep_best=self.keep_best or config.keep_best)
        config = dataclasses.replace(config, data=data, **watched)
        config = config.select(self.phases) if self.phases else config
        for assignments in (steps_assignments(config, self.steps), rate_assignments(config, self.learning_rate)):
            config = set_fields(config, assignments)
        intervals = {name: getattr(self, name) for name in ("checkpoint_every", "keep_checkpoints")}
        config = dataclasses.replace(config, **{name: value for name, value in intervals.items() if value is not None})
        return set_fields(config, self.set)

    def _new_config(self) -> RunConfig:
        name = self.preset or "tiny"
        if self.resume and self.preset is None:
            raise ValueError(f"--resume must find a run in {self.folder}, got none: give --preset to begin one there")
        if self.init is None:
            return load_preset(name)
        init = InitialParams(self.init)
        model = init.config(PRESETS[name]().model.dtype if name in PRESETS else "bfloat16")
        return load_preset(name, model=model, free=init.free_fields())

    def _begun_config(self) -> RunConfig:
        """Makes the run that is recorded in the folder; of a preset that is given, the model may be left out."""
        assert self._begun is not None
        values = read_run(self._begun)["run"]
        if self.preset is None:
            return RunConfig.from_json(values)
        model = read_model_config(self._begun)
        return load_preset(self.preset, model=model, free=[field.name for field in dataclasses.fields(model)])

    def initial_params(self) -> InitialParams | None:
        """Finds the parameters that the run begins or began with; a run that has a checkpoint may do without them."""
        recorded = recorded_origin(read_run(self._begun)) if self.continues and self._begun else None
        if recorded is not None and recorded.fingerprint is not None:
            moved = self.init is not None and str(self.init.absolute()) != recorded.name
            if self.init is None or not (moved or self.init.exists()):
                return InitialParams(Path(recorded.name), recorded=recorded.fingerprint)
        where = self.init if recorded is None or self.init is not None else Path(recorded.name)
        return None if where is None else InitialParams(where)

    def watch(self) -> Watch:
        """Says what is watched beside the losses."""
        profile = None if self.profile is None else ProfiledSteps.parse(self.profile)
        return Watch(tensorboard=self.tensorboard, profile=profile)

    def join(self) -> None:
        """Joins the other processes, if it is a distributed run; before anything else of JAX.

        Raises:
          ValueError: if the arguments do not go together, or the processes do not come together.
        """
        which = self.coordinator, self.num_processes, self.process_id
        if self.distributed:
            processes = cluster.Processes(*which)
            cluster.join(processes, death_timeout=self.death_timeout, join_timeout=self.join_timeout)
        elif which != (None, None, None):
            raise ValueError("coordinator, num_processes and process_id need --distributed")

    def resume_command(self) -> str:
        """Writes the command that resumes this process's run."""
        command = ["python", "-m", "train", "--resume", "--out", str(self.folder)]
        values = {"coordinator": self.coordinator, "num-processes": self.num_processes, "process-id": self.process_id}
        values["compile-cache"] = self.compile_cache
        command += ["--distributed"] if self.distributed else []
        command += [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
        return shlex.join(command)

    def make_mesh(self, axes: str | None) -> Mesh | None:
        """Makes the mesh to train on, None for one device alone."""
        if axes is not None:
            return make_mesh(parse_mesh(axes))
        return make_mesh({AXES[0]: jax.device_count()}) if self.distributed else None

    def runs(self) -> tuple[Run, ...]:
        """Makes the run of each seed.

        Raises:
          ValueError: if the arguments do not go together.
        """
        command = self.command()
        mesh, config, init = self.make_mesh(command.mesh), self.run_config(), self.initial_params()
        first = config.phases[0].name
        if init is None and first not in ("BASE", "NATIVE"):
            raise ValueError(f"phase {first} must begin from a checkpoint: give --init")
        if command.controls and config.phases[-1].name != "SPARSE":
            raise ValueError("controls need a run that ends with SPARSE, whose length and batches they share")
        return seed_runs(config, self.folder, command.seeds, init=init, mesh=mesh, resume=self.resume)


def main(arguments: Sequence[str]) -> None:
    """Trains by the arguments of a command line."""
    train(parse(Arguments, arguments, "python -m train"))


def train(arguments: Arguments) -> None:
    """Trains all seeds and their controls, and reports."""
    began, stops = time.monotonic(), Stopping.within(arguments.stop_after)
    ending.resume_with(arguments.resume_command())
    with stops as stopping:
        arguments.join()
        keep_compiled(arguments.compile_cache)
        console = Console(quiet=jax.process_index() > 0)
        runs, watch, command = arguments.runs(), arguments.watch(), arguments.command()
        config = runs[0].config
        text = load(config.data, vocab_size=config.model.vocab_size)
        cluster.compare(runs[0].compared(text, arguments.resume) | {"started_with": dataclasses.asdict(command)})
        experiment = Experiment(
            name=command.name,
            folder=arguments.folder,
            runs=runs,
            text=text,
            controls=command.controls,
            resume=arguments.resume,
            new_data=bool(arguments.data or arguments.tokenizer),
            evaluate=command.evaluate,
            watch=watch,
            stopping=stopping,
            compile_ahead=arguments.compile_ahead or None,
        )
        if jax.process_index() == 0:
            write_command(arguments.folder, command)
        experiment.run(console, began=began)
        if (line := describe_cache()) is not None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
