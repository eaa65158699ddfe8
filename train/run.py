"""One run from its first step to its last, through its phases, continued wherever it was cut."""

import contextlib
import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsa_jax import Transformer
from dsa_jax.parallel.sharding import check_model, place_batch
from train.checks import shown
from train.compiling import Program, compile_programs
from train.data import TOKEN_FIELDS, Batch, BatchParts, BatchSource, BatchStream, FollowingStream, PartSource
from train.files import WriteError
from train.phases import Params, merge_groups
from train.processes import cluster, ending
from train.processes.lock import Lock
from train.processes.stopping import Pauses, StoppedError, Stopping
from train.processes.versions import code_versions
from train.saved.changes import Position
from train.saved.checkpoint import Checkpoints, load_params
from train.saved.folder import Fingerprinted, Opened, hold, last_checkpoint, look_into, open_folder, read_model_config
from train.saved.initial import InitialParams, random_params
from train.saved.resuming import describe_resumption
from train.settings import PhaseSettings, RunConfig, Stage, stream_seed
from train.state import TrainState, abstract_batch, abstract_params, abstract_state, check_stage, placed
from train.step import make_begin, make_step
from train.watching.metrics import DivergedError, read_metrics
from train.watching.progress import RunProgress
from train.watching.watch import UNWATCHED, Observer, Watch, observe

__all__ = ["DivergedError", "Run", "check_batch", "check_tokens", "load_model"]


@dataclasses.dataclass(frozen=True)
class Run:
    """Trains a run in its folder: `run.json`, `metrics.jsonl`, `checkpoints/`.

    Args:
      config: what is trained, and how.
      folder: where, a path or a string; with several processes one that all of them see.
      init: where the first parameters come from; without it they are drawn.
      mesh: the devices. It is no part of what a run is: that may be continued on another mesh, or on one device (None).

    Examples:
      >>> from train.data import load
      >>> from train.presets import load_preset
      >>> config = load_preset("small.json")
      >>> state = Run(config, Path("runs/mine")).train(load(config.data))
      >>> model = load_model("runs/mine")
    """

    config: RunConfig
    folder: Path
    init: InitialParams | None = None
    mesh: Mesh | None = None

    def __post_init__(self):
        object.__setattr__(self, "folder", Path(self.folder))
        if self.mesh is not None:
            check_model(self.mesh, self.config.model)
            for stage in (stage for phase in self.config.phases for stage in phase.stages):
                check_stage(self.mesh, stage)

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The model's definition, to be merged with parameters."""
        return abstract_params(self.config.model)[0]

    def phase_end(self, name: str) -> int:
        """Finds the run's step at which a phase ends.

        Raises:
          ValueError: if the run has no such phase.
        """
        names = [phase.name for phase in self.config.phases]
        if name not in names:
            raise ValueError(f"phase must be one of the run's {names}, got {name!r}")
        return sum(phase.steps for phase in self.config.phases[: names.index(name) + 1])

    def params_after(self, name: str) -> Params:
        """Reads the parameters as a phase left them, from that phase's last checkpoint, to where the run is trained."""
        return load_params(self.folder, abstract_params(self.config.model, self.mesh)[1], step=self.phase_end(name))

    def records(self) -> list[dict[str, Any]]:
        """Reads the lines of `metrics.jsonl`; `seconds` are since the line before."""
        return read_metrics(self.folder / "metrics.jsonl")

    def initial_params(self) -> Params:
        """Reads or draws the parameters that the run starts from."""
        if self.init is not None:
            return self.init.params(self.config.model, seed=self.config.seed, mesh=self.mesh)
        return random_params(self.config.model, seed=self.config.seed, mesh=self.mesh)

    def open(self, *, resume: bool, data: Any = None, new_data: bool = False) -> Opened:
        """Makes the folder, or takes up the run in it; see `open_folder`."""
        return open_folder(self.folder, self.config, resume=resume, new_data=new_data, **self._identity(data))

    def train(
        self,
        data: BatchSource | BatchStream,
        progress: RunProgress | None = None,
        *,
        resume: bool = False,
        new_data: bool = False,
        watch: Watch = UNWATCHED,
        stopping: Stopping | None = None,
        compile_ahead: bool | None = None,
    ) -> TrainState:
        """Takes the run to its end and returns the last state.

        Args:
          data: gives the batches: a source such as a `Corpus`, or an iterator of one's own that can save its position.
            With several processes each gives the same, whole batches; of a `Corpus` each reads its own rows alone.
          progress: shows where the run stands.
          resume: continues from the newest checkpoint, if there is one; the configuration may then be another where
            `train.saved.changes` allows it.
          new_data: whether a run that is continued may take other data than its own, from their start.
          watch: what is watched beside the losses of the steps.
          stopping: signals and the clock, by which the run is saved and stopped.
          compile_ahead: whether the programs of all steps are compiled before anything runs on the devices, or each
            when it is first called; None: ahead but on CPUs, where runs are tried out, and often end before their last
            stage.

        Raises:
          ValueError: if processes differ, another process writes the folder, the folder or a checkpoint in it cannot be
            used, the run cannot go on or be watched so, a program cannot be compiled ahead, something cannot be
            written, or a batch is not what its stage says.
          DivergedError: if a loss or a gradient is not finite, with the last good checkpoint.
          StoppedError: if it was stopped, with the step that was saved.
        """
        check_data(data)
        watch.check(self.config)
        self._check_stages(data)
        options: dict[str, Any] = dict(resume=resume, new_data=new_data) | self._identity(data)
        cluster.compare(self.compared(data, resume))
        opened, record = look_into(self.folder, self.config, **options)
        if record is None and self._is_done(opened):  # nothing is left to write, not even on a full disk
            self._say(opened, progress)
            with Checkpoints(self.folder / "checkpoints", self.config, data=options["data"]) as checkpoints:
                return self._start(checkpoints, opened)[0]
        with hold(self.folder) as lock:
            opened = open_folder(self.folder, self.config, **options)
            self._say(opened, progress)
            ending.mark_resumable()
            ahead = jax.default_backend() != "cpu" if compile_ahead is None else compile_ahead
            compiled = self._compile(opened.position, progress) if ahead else {}
            return self._train(data, progress, opened, lock, watch, stopping, compiled)

    def _is_done(self, opened: Opened) -> bool:
        return opened.position is not None and opened.position.step == self.config.steps

    def _say(self, opened: Opened, progress: RunProgress | None) -> None:
        """Says where the run goes on."""
        for line in describe_resumption(self.folder, self.config, opened):
            if progress is not None:
                progress.say(line)

    def _identity(self, data: Any) -> dict[str, Any]:
        """Says where the first parameters come from, and what the data are."""
        return {
            "origin": None if self.init is None else self.init.origin,
            "data": _fingerprint(data),
        }

    def compared(self, data: BatchSource | BatchStream, resume: bool) -> dict[str, Any]:
        """Gathers what all processes of a run must have alike."""
        return {
            "run": self.config.to_json(),
            "init": None if self.init is None else str(self.init),
            "folder": str(self.folder.absolute()),
            "resume": resume,
            "mesh": None if self.mesh is None else dict(self.mesh.shape),
            "data": getattr(data, "fingerprint", None) if isinstance(data, BatchSource) else data.get_state(),
            **code_versions(),
        }

    def _train(
        self,
        data: BatchSource | BatchStream,
        progress: RunProgress | None,
        opened: Opened,
        lock: Lock | None,
        watch: Watch,
        stopping: Stopping | None,
        compiled: dict[str, float],
    ) -> TrainState:
        """Takes the run to its end, in a folder that is this run's alone."""
        on_step = None if progress is None else progress.update
        with Checkpoints(self.folder / "checkpoints", self.config, data=_fingerprint(data)) as checkpoints:
            state, position = self._start(checkpoints, opened)
            if position.step and not isinstance(data, BatchSource):
                data.set_state(position.data)
            where: dict[str, Any] = dict(done=position.step, graphdef=self.graphdef, mesh=self.mesh, compiled=compiled)
            observing = observe(watch, self.config, self.folder, on_step=on_step, **where)
            pauses = Pauses(self.config.steps, minutes=self.config.checkpoint_minutes, stopping=stopping)
            stepping = stopping.stepping() if stopping else contextlib.nullcontext()
            with progress or contextlib.nullcontext(), observing as observer, stepping:
                keeper = _Keeper(self.config, checkpoints, observer, pauses, lock)
                if observer.best:
                    observer.keep(checkpoints)
                try:
                    for index in range(position.phase, len(self.config.phases)):
                        state, position = self._train_phase(index, state, position, data, keeper)
                    checkpoints.wait()
                except DivergedError as error:
                    last = checkpoints.latest()
                    good = "none" if last is None else checkpoints.path(last)
                    raise DivergedError(f"{error}; the last good checkpoint: {good}") from None
                except WriteError as error:
                    raise ValueError(f"{error}; the last good checkpoint: {last_checkpoint(self.folder)}") from error
            if stopping:
                stopping.check(self.config.steps)
            return state

    def _start(self, checkpoints: Checkpoints, opened: Opened) -> tuple[TrainState, Position]:
        """Restores or makes the state to go on from, and finds its position."""
        random, position = jax.random.key_data(jax.random.key(self.config.seed)), opened.position
        if position is None:
            return self._begin(self.initial_params(), self.config.phases[0], random), Position(0, 0, 0, {})
        settings = self.config.phases[position.phase]
        like = placed(abstract_state(self.config.model, settings), self.mesh)
        data = {} if opened.new_data else position.data
        return checkpoints.restore(position.step, like), dataclasses.replace(position, data=data)

    def _begin(self, params: Params, settings: PhaseSettings, random: Any) -> TrainState:
        """Makes the state at the start of a phase, on the mesh if there is one; `params` are taken over."""
        return self._beginning(settings).executable()(params, np.asarray(random))

    def _compile(self, position: Position | None, progress: RunProgress | None) -> dict[str, float]:
        """Compiles all that the run calls from `position` on; gives the seconds by program."""
        return compile_programs(self._programs(position), (lambda _: None) if progress is None else progress.say)

    def _programs(self, position: Position | None) -> list[Program]:
        """Lists the programs of the steps from `position` on, in the order in which they are needed."""
        first, done = (-1, 0) if position is None else (position.phase, position.phase_step)
        programs = []
        for index, settings in enumerate(self.config.phases):
            ends = itertools.accumulate(stage.steps for stage in settings.stages)
            if index > first:
                programs.append(self._beginning(settings))
            if index >= first:
                left = [number for number, end in enumerate(ends) if index > first or end > done]
                programs += [self._step(settings, settings.stages[number]) for number in left]
        return programs

    def _beginning(self, settings: PhaseSettings) -> Program:
        """Describes the program that makes the state at the start of a phase."""
        random = jax.ShapeDtypeStruct((2,), np.uint32)
        arguments = abstract_params(self.config.model, self.mesh)[1], random
        return Program(f"the state of {settings.name}", make_begin(settings, self.mesh), arguments)

    def _step(self, settings: PhaseSettings, stage: Stage) -> Program:
        """Describes the program of a stage's steps."""
        step = make_step(self.graphdef, settings, micro_batches=stage.micro_batches, mesh=self.mesh)
        state = placed(abstract_state(self.config.model, settings), self.mesh)
        batch = abstract_batch(stage.batch_size, stage.seq_len, self.mesh)
        parts = f" ({stage.micro_batches} parts)" if stage.micro_batches > 1 else ""
        return Program(f"{settings.name} {stage.batch_size} × {stage.seq_len}{parts}", step, (state, batch))

    def _train_phase(
        self,
        index: int,
        state: TrainState,
        position: Position,
        data: BatchSource | BatchStream,
        keeper: "_Keeper",
    ) -> tuple[TrainState, Position]:
        """Trains from `position`, in this phase or at the end of the one before, to the phase's end."""
        settings, before = self.config.phases[index], sum(p.steps for p in self.config.phases[:index])
        if position.phase < index:
            state, position = self._begin(state.params, settings, state.random), Position(before, index, 0, {})
        first = 0
        for number, stage in enumerate(settings.stages):
            last = first + stage.steps
            if position.phase_step < last:
                step = self._step(settings, stage).executable()
                batches = self._batches(data, settings, number)
                if position.phase_step > first and position.data and batches is not data:
                    batches.set_state(position.data)
                for done in range(position.phase_step + 1, last + 1):
                    observer = keeper.observer
                    observer.profiler.begin(before + done)
                    if isinstance(data, FollowingStream):
                        data.follow(state.params)
                    batch, waited = self._next_batch(batches, stage)
                    state, metrics = step(state, batch)
                    observer.profiler.end(before + done, metrics)
                    position = Position(before + done, index, done, batches.get_state())
                    keeper.keep(state, position, metrics, observer.known(data, before + done, waited))
            first = last
        return state, position

    def _check_stages(self, data: BatchSource | BatchStream) -> None:
        """Begins the stream of every stage, so that data too short for a later one are refused now."""
        for settings in self.config.phases:
            for number in range(len(settings.stages)):
                self._batches(data, settings, number)

    def _batches(self, data: BatchSource | BatchStream, settings: PhaseSettings, number: int) -> Any:
        """Begins the stream of batches of a stage; an iterator of one's own goes on through all of them."""
        if not isinstance(data, BatchSource):
            return data
        stage, seed = settings.stages[number], stream_seed(self.config.seed, settings.phase.stream, number)
        shape = {"batch_size": stage.batch_size, "seq_len": stage.seq_len, "seed": seed}
        if self.mesh is not None and isinstance(data, PartSource):
            return data.parts("train", **shape, mesh=self.mesh)
        return data.batches("train", **shape)

    def _next_batch(self, batches: Any, stage: Stage) -> tuple[Batch, float]:
        """Takes the next batch, checked and on the mesh if there is one; also gives the seconds waited for it."""
        began = time.monotonic()
        try:
            batch = next(batches)
        except StopIteration:
            raise ValueError("the data must not end before the run does: give an endless iterator of batches") from None
        waited = time.monotonic() - began
        if isinstance(batch, BatchParts):
            for part in batch.parts.values():
                check_tokens(part, self.config.model.vocab_size)
            return batch.place(), waited
        check_batch(batch, (stage.batch_size, stage.seq_len))
        check_tokens(batch, self.config.model.vocab_size)
        batch = batch.canonical()  # of other dtypes the step is not compiled
        return batch if self.mesh is None else place_batch(batch, self.mesh), waited


def _fingerprint(data: Any) -> str | None:
    """Gives the fingerprint of data that have one."""
    return data.fingerprint if isinstance(data, Fingerprinted) else None


@dataclasses.dataclass(frozen=True)
class _Keeper:
    """Keeps what is left of each step: its numbers, a checkpoint where one is due, and the word that the run stops."""

    config: RunConfig
    checkpoints: Checkpoints
    observer: Observer
    pauses: Pauses
    lock: Lock | None

    def keep(
        self, state: TrainState, position: Position, metrics: dict[str, jax.Array], known: dict[str, float]
    ) -> None:
        """Takes what a step gave.

        Raises:
          StoppedError: if the run stops here, saved.
        """
        settings, step, done = self.config.phases[position.phase], position.step, position.phase_step
        self.observer.log.put(step, position.phase, settings.name, done, metrics, known)
        is_best = self.observer.measure(settings, step, done, state.params)
        pause = self.pauses.after(step)
        if pause or is_best or done == settings.steps or step % self.config.checkpoint_every == 0:
            self._save(state, position, is_best)
        if pause and pause.status is not None:
            self.checkpoints.wait()
            raise StoppedError(step, pause.status)

    def _save(self, state: TrainState, position: Position, is_best: bool) -> None:
        self.observer.log.flush()  # stops here if a number is not finite: a bad state is never saved
        if self.lock is not None:
            self.lock.check()
        if is_best:
            self.observer.keep(self.checkpoints)
        self.checkpoints.save(state, position)
        self.pauses.saved()


def load_model(folder: Path | str, *, step: int | None = None) -> Transformer:
    """Reads the model of a run's folder, from its newest checkpoint or from that of `step`.

    Raises:
      ValueError: if the folder holds no run, or no such checkpoint.
    """
    graphdef, like = abstract_params(read_model_config(Path(folder)))
    return merge_groups(graphdef, load_params(Path(folder), like, step=step))


def check_data(data: BatchSource | BatchStream) -> None:
    """Checks that data are a source of batches, or an iterator whose position can be saved as JSON.

    Raises:
      ValueError: if they are neither.
    """
    if isinstance(data, BatchSource):
        return
    if not isinstance(data, BatchStream):
        raise ValueError(
            "data must have `batches`, as a Corpus has, or be an iterator of batches with `get_state` and `set_state`, "
            f"got {shown(data)}"
        )
    state = data.get_state()
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the data's get_state must give JSON values, got {shown(state)}: {error}") from error


def check_batch(batch: Batch, shape: tuple[int, int]) -> None:
    """Checks on the host that a batch's arrays have the shape of its stage, and their kinds of values.

    Raises:
      ValueError: naming one that does not.
    """
    if not isinstance(batch, Batch):
        raise ValueError(f"data must give a train.data.Batch, got {shown(batch)}")
    for name in TOKEN_FIELDS:
        array, kinds = getattr(batch, name), "b" if name == "valid" else "iu"
        found, dtype = tuple(np.shape(array)), np.asarray(array).dtype
        if found != shape or dtype.kind not in kinds:
            kind = "booleans" if kinds == "b" else "integers"
            raise ValueError(f"{name} of a batch must be {kind} {list(shape)}, got {dtype} {list(found)}")


def check_tokens(batch: Batch, vocab_size: int) -> None:
    """Checks on the host, before the step, that tokens and targets are of the vocabulary.

    Raises:
      ValueError: naming one that is not.
    """
    for name in ("tokens", "targets"):
        ids = np.asarray(getattr(batch, name))
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} must be ids from 0 to {vocab_size - 1}, got {low if low < 0 else high}")
