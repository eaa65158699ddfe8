"""The arguments of training, what they make, and the command that trains by them."""

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
from train import cluster, ending
from train.command import parse
from train.data import load
from train.experiment import Experiment, seed_runs
from train.initial import InitialParams
from train.presets import PRESETS, load_preset
from train.run import Run
from train.settings import RunConfig
from train.stopping import Stopping, seconds_of


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a dense model, its indexer, and both through the selection; evaluates and reports."""

    preset: str = "tiny"
    """tiny, deepseek_v32, or a .json file like the run.json of any run's folder."""
    data: tuple[str, ...] = ()
    """Globs of text files; without it the preset's, for tiny the standard library of the running Python."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; without it bytes are the tokens."""
    append: bool = True
    """End every document with the tokenizer's end token, such as </s>, if it has one."""
    max_bytes: int | None = None
    """Read so much text at most; without it as much as the preset says, 64 MiB unless that is another number."""
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
    death_timeout: float = cluster.DEATH_TIMEOUT
    """Seconds within which all processes of a distributed run end when one has ended or was lost."""
    join_timeout: float = cluster.JOIN_TIMEOUT
    """Seconds in which all processes of a distributed run must have started."""
    stop_after: str | None = None
    """Save and stop after this time, like 3h50m, with exit status 75."""
    evaluate: bool = True
    """Evaluate and report at the end, on one device, which must be able to hold the model."""

    @property
    def name(self) -> str:
        """The run's name: the preset's, or the stem of the file's."""
        return self.preset if self.preset in PRESETS else Path(self.preset).stem

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.out or Path("runs") / self.name

    def run_config(self) -> RunConfig:
        """Makes the run of the preset, with what the arguments change of it.

        Raises:
          ValueError: if they do not go together.
        """
        config = load_preset(self.preset)
        data = dataclasses.replace(
            config.data,
            data=self.data or config.data.data,
            tokenizer=self.tokenizer or config.data.tokenizer,
            append=self.append and config.data.append,
            max_bytes=config.data.max_bytes if self.max_bytes is None else self.max_bytes,
        )
        if self.init is not None:
            config = dataclasses.replace(config, model=InitialParams(self.init).config(config.model.dtype))
        config = dataclasses.replace(config, data=data)
        config = config.select(self.phases) if self.phases else config
        first = config.phases[0].name
        if self.init is None and first != "BASE":
            raise ValueError(f"phase {first} must begin from a dense checkpoint: give --init")
        if self.controls and config.phases[-1].name != "SPARSE":
            raise ValueError("controls need a run that ends with SPARSE, whose length and batches they share")
        return config

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
        command += ["--distributed"] if self.distributed else []
        command += [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
        return shlex.join(command)

    def make_mesh(self) -> Mesh | None:
        """Makes the mesh to train on, None for one device alone."""
        if self.mesh is not None:
            return make_mesh(parse_mesh(self.mesh))
        return make_mesh({AXES[0]: jax.device_count()}) if self.distributed else None

    def runs(self) -> tuple[Run, ...]:
        """Makes the run of each seed."""
        mesh, config = self.make_mesh(), self.run_config()
        init = None if self.init is None else InitialParams(self.init)
        return seed_runs(config, self.folder, self.seeds, init=init, mesh=mesh, resume=self.resume)


def main(arguments: Sequence[str]) -> None:
    """Trains by the arguments of a command line."""
    train(parse(Arguments, arguments, "python -m train"))


def train(arguments: Arguments) -> None:
    """Trains all seeds and their controls, and reports."""
    began, after = time.monotonic(), None if arguments.stop_after is None else seconds_of(arguments.stop_after)
    ending.resume_with(arguments.resume_command())
    with Stopping(after=after) as stopping:
        arguments.join()
        console = Console(quiet=jax.process_index() > 0)
        runs = arguments.runs()
        config = runs[0].config
        Experiment(
            name=arguments.name,
            folder=arguments.folder,
            runs=runs,
            text=load(config.data, vocab_size=config.model.vocab_size),
            controls=arguments.controls,
            resume=arguments.resume,
            evaluate=arguments.evaluate,
            stopping=stopping,
        ).run(console, began=began)
