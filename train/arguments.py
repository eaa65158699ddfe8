"""The arguments of training, what they make, and the command that trains by them."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console

from dsa_jax.parallel.sharding import AXES, make_mesh, parse_mesh
from train.checks import check_integer, shown
from train.command import parse
from train.data import load
from train.experiment import Experiment, seed_runs
from train.initial import InitialParams
from train.presets import PRESETS, load_preset
from train.run import Run
from train.settings import RunConfig


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a dense model, its indexer, and both through the selection; evaluates and reports."""

    preset: str = "tiny"
    """tiny, deepseek_v32, or a .json file like the run.json of any run's folder."""
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
            held_out_data=self.held_out or config.data.held_out_data,
            pack=self.pack or config.data.pack,
            min_document=config.data.min_document if self.min_document is None else self.min_document,
            chat_template=self.chat_template or config.data.chat_template,
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


def main(arguments: Sequence[str]) -> None:
    """Trains by the arguments of a command line."""
    train(parse(Arguments, arguments, "python -m train"))


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
