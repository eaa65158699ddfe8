"""The command `python -m train`, also called `dsa-train`: trains, evaluates, reports, and lets the model speak."""

import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console

from dsa_jax.parallel.sharding import AXES, make_mesh, parse_mesh
from train import planner
from train.checks import check_integer, shown
from train.data import load
from train.experiment import Experiment, seed_runs
from train.initial import InitialParams
from train.presets import PRESETS, load_preset
from train.run import DivergedError, Run
from train.settings import RunConfig

MAX_LINE = 900  # characters of an error


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
        self._check_processes()
        try:
            jax.distributed.initialize(self.coordinator, self.num_processes, self.process_id)
        except Exception as error:  # of any type: a cluster's environment may lack a variable, or say no number
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            raise ValueError(f"the processes of the run did not come together: {reason}") from error

    def _check_processes(self) -> None:
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) < 2**16:
                raise ValueError(f"coordinator must be HOST:PORT like 10.0.0.1:1234, got {shown(self.coordinator)}")
        if self.num_processes is not None:
            check_integer("num_processes", self.num_processes)
        if self.num_processes is not None and not 0 <= (self.process_id or 0) < self.num_processes:
            raise ValueError(
                f"process_id must be from 0 to num_processes - 1 = {self.num_processes - 1}, got {self.process_id}"
            )

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input becomes one line on stderr and exit status 2, a diverged loss status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["plan"]:
        plan = planner.serving_main if "--serve" in arguments else planner.main
        return run_command(lambda: plan(arguments[1:]))
    return run_command(lambda: train(parse(Arguments, arguments, "python -m train")))


def parse[T](kind: type[T], arguments: Sequence[str], program: str) -> T:
    """Reads a command's arguments; exits with status 2 and the usage where a value cannot be.

    Raises:
      ValueError: naming arguments that are not known.
    """
    parsed, unknown = tyro.cli(kind, prog=program, args=list(arguments), return_unknown_args=True)
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}; see --help")
    return parsed


def run_command(command: Callable[[], object]) -> int:
    """Runs a command and returns its exit status; what went wrong becomes one line on stderr."""
    _quieten_checkpoints()
    try:
        command()
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
    """Prints one line, cut where it is long."""
    text = " ".join(str(error).encode(errors="backslashreplace").decode().split())
    print(f"error: {text if len(text) <= MAX_LINE else f'{text[:MAX_LINE]}…'}", file=sys.stderr)
    return status


def train(arguments: Arguments) -> None:
    """Trains all seeds and their controls, and reports."""
    arguments.join()
    began = time.monotonic()
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
    ).run(console, began=began)


if __name__ == "__main__":
    sys.exit(main())
