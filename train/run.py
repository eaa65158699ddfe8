"""One run from its first step to its last, through its phases, continued wherever it was cut."""

import collections
import dataclasses
import functools
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh

from dsa_jax import Config, Transformer
from dsa_jax.hf.convert import load_hf
from dsa_jax.parallel.sharding import check_batch, check_model, parameter_shardings, place_batch, shards
from train.checkpoint import Checkpoints, Position, checkpoint_steps, identity, load_params, read_run
from train.data import Batch, Corpus
from train.phases import PHASES, Params, merge_groups, split_groups
from train.presets import PhaseSettings, RunConfig, Stage, differences
from train.progress import RunProgress
from train.step import TrainState, init_state, make_step


class DivergedError(RuntimeError):
    """A loss or a gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class Init:
    """Where a run's first parameters come from: a Hugging Face folder, or a run's folder (its checkpoint `step`)."""

    folder: Path
    step: int | None = None
    label: str | None = None

    def __post_init__(self):
        if not self.is_run and not (self.folder / "config.json").is_file():
            raise ValueError(
                f"init must be a folder with a checkpoint's config.json or a run's run.json, got {self.folder}"
            )

    @property
    def is_run(self) -> bool:
        """Whether it is a run's folder."""
        return (self.folder / "run.json").is_file()

    def config(self, dtype: str) -> Config:
        """The model that is there, its parameters in float32 as training wants them."""
        if self.is_run:
            return RunConfig.from_json(read_run(self.folder)["run"]).model
        return dataclasses.replace(Config.from_hf(self.folder), dtype=dtype, param_dtype="float32")

    def params(self, config: Config, *, seed: int = 0, mesh: Mesh | None = None) -> Params:
        """The parameters by group; `seed` is for the indexer of a dense checkpoint that has none."""
        if self.is_run:
            return load_params(self.folder, abstract_params(config, mesh)[1], step=self.step)
        return split_groups(load_hf(self.folder, dtype=config.dtype, param_dtype="float32", seed=seed, mesh=mesh))[1]

    def __str__(self) -> str:
        return self.label or f"{self.folder.absolute()}"


class MetricsLog:
    """`metrics.jsonl`, one line a step. A step's line is written when a later one has started, so none waits."""

    def __init__(self, path: Path, progress: RunProgress, *, keep: int):
        """Drops the lines after step `keep`, which will be done again, and a line cut short."""
        lines = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                step = json.loads(line)["step"]
            except json.JSONDecodeError:
                break
            if step <= keep:
                lines.append(line + "\n")
        if jax.process_index() == 0:
            write_text(path, "".join(lines))
        # Every process sees the numbers, and stops if one is not finite; the first alone keeps them.
        self._file = (path if jax.process_index() == 0 else Path(os.devnull)).open("a")
        self._progress = progress
        self._pending, self._time = collections.deque(), time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def put(self, step: int, phase: int, name: str, phase_step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that may still be running, and writes those of the step before."""
        self._pending.append((step, phase, name, phase_step, metrics))
        if len(self._pending) > 1:
            self._write(*self._pending.popleft())

    def flush(self) -> None:
        """Writes what is pending, on the disk itself."""
        while self._pending:
            self._write(*self._pending.popleft())
        if jax.process_index() == 0:
            os.fsync(self._file.fileno())

    def _write(self, step: int, phase: int, name: str, phase_step: int, metrics: dict[str, jax.Array]) -> None:
        values = {key: value.item() for key, value in jax.device_get(metrics).items()}
        for key, value in values.items():
            if not math.isfinite(value):
                raise DivergedError(f"{key} is {value} at step {step} (step {phase_step} of {name})")
        now = time.monotonic()
        seconds, self._time = round(now - self._time, 4), now
        record = {"step": step, "phase": name, "phase_step": phase_step, **values, "seconds": seconds}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._progress.update(phase, phase_step, values)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run in its folder: `run.json`, `metrics.jsonl`, `checkpoints/`.

    The mesh is not part of what a run is: it may be continued on another, or on one device (None). With several
    processes the folder must be one that all of them see.
    """

    config: RunConfig
    folder: Path
    init: Init | None = None
    mesh: Mesh | None = None

    def __post_init__(self):
        if self.mesh is not None:
            check_model(self.mesh, self.config.model)
            for stage in (stage for phase in self.config.phases for stage in phase.stages):
                check_stage(self.mesh, stage)

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The model's definition, to be merged with parameters."""
        return abstract_params(self.config.model)[0]

    def phase_end(self, name: str) -> int:
        """The run's step at which a phase ends."""
        names = [phase.name for phase in self.config.phases]
        if name not in names:
            raise ValueError(f"phase must be one of the run's {names}, got {name!r}")
        return sum(phase.steps for phase in self.config.phases[: names.index(name) + 1])

    def params_after(self, name: str) -> Params:
        """The parameters as a phase left them, from that phase's last checkpoint."""
        return load_params(self.folder, abstract_params(self.config.model)[1], step=self.phase_end(name))

    def records(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; `seconds` are since the line before."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def initial_params(self) -> Params:
        """The parameters that the run starts from."""
        if self.init is not None:
            return self.init.params(self.config.model, seed=self.config.seed, mesh=self.mesh)
        make = lambda: split_groups(Transformer(self.config.model, rngs=nnx.Rngs(self.config.seed)))[1]  # noqa: E731
        # It runs once. Optimised on CPU, the tiny model's random bits were seen to take 25 s of compilation, so 2.
        places = None if self.mesh is None else parameter_shardings(jax.eval_shape(make), self.mesh)
        return jax.jit(make, out_shardings=places, compiler_options={"xla_backend_optimization_level": 0})()

    def open(self, *, resume: bool) -> None:
        """Makes the folder, or checks that the run in it is this one and is to be continued."""
        if not resume:
            check_unused(self.folder)
        if (self.folder / "run.json").exists():
            changed = differences(self._identity(), read_run(self.folder)["identity"])
            if changed:
                raise ValueError(f"{self.folder} holds a run of another configuration: {'; '.join(changed)}")
        else:
            occupied = self.folder.exists() and (not self.folder.is_dir() or checkpoint_steps(self.folder))
            if occupied:
                raise ValueError(f"{self.folder} must be a new or an empty folder")
        wait_for_all("looked into the folder")
        try:
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(
                    self.folder / "run.json",
                    json.dumps({"run": self.config.to_json(), "identity": self._identity()}, indent=2) + "\n",
                )
            wait_for_all("made the folder")
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise ValueError(f"the output folder {self.folder} must be writable: {error.strerror}") from error
        if free < self.checkpoint_bytes():
            raise ValueError(
                f"{self.folder} must have room for the run's checkpoints, about "
                f"{self.checkpoint_bytes() / 2**20:.0f} MiB, got {free / 2**20:.0f} MiB free"
            )

    def checkpoint_bytes(self) -> int:
        """An upper bound of what the run's checkpoints take: parameters and two moments each."""
        sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_params(self.config.model)[1])]
        return 3 * sum(sizes) * (self.config.keep_checkpoints + 1 + len(self.config.phases))

    def train(self, corpus: Corpus, progress: RunProgress, *, resume: bool = False) -> TrainState:
        """Takes the run to its end, from its newest checkpoint if it is to be resumed; returns the last state."""
        self.open(resume=resume)
        label = None if self.init is None else str(self.init)
        with Checkpoints(self.folder / "checkpoints", self.config, init=label) as checkpoints:
            state, position = self._start(checkpoints)
            with progress, MetricsLog(self.folder / "metrics.jsonl", progress, keep=position.step) as log:
                try:
                    for index in range(position.phase, len(self.config.phases)):
                        state, position = self._train_phase(index, state, position, corpus, checkpoints, log)
                    checkpoints.wait()
                    return state
                except DivergedError as error:
                    last = checkpoints.latest()
                    good = "none" if last is None else checkpoints.path(last)
                    raise DivergedError(f"{error}; the last good checkpoint: {good}") from None

    def _identity(self) -> dict[str, Any]:
        return identity(self.config, None if self.init is None else str(self.init))

    def _start(self, checkpoints: Checkpoints) -> tuple[TrainState, Position]:
        """The state and the position to go on from."""
        random = jax.random.key_data(jax.random.key(self.config.seed))
        latest = checkpoints.latest()
        if latest is None:
            return self._begin(self.initial_params(), self.config.phases[0], random), Position(0, 0, 0, {})
        position = checkpoints.position(latest)
        settings = self.config.phases[position.phase]
        params = abstract_params(self.config.model)[1]
        like = jax.eval_shape(lambda params: init_state(params, settings, random), params)
        return checkpoints.restore(latest, placed(like, self.mesh)), position

    def _begin(self, params: Params, settings: PhaseSettings, random: Any) -> TrainState:
        """The state at the start of a phase, on the mesh if there is one; `params` are taken over."""
        if self.mesh is None:  # all of it put there, as restored parameters are: else the step is compiled twice
            return jax.device_put(init_state(params, settings, random), jax.local_devices()[0])
        begin = lambda params, random: init_state(params, settings, random)  # noqa: E731
        places = parameter_shardings(jax.eval_shape(begin, params, random), self.mesh)
        return jax.jit(begin, out_shardings=places, donate_argnums=0)(params, np.asarray(random))

    def _train_phase(
        self,
        index: int,
        state: TrainState,
        position: Position,
        corpus: Corpus,
        checkpoints: Checkpoints,
        log: MetricsLog,
    ) -> tuple[TrainState, Position]:
        """From `position`, in this phase or at the end of the one before, to the phase's end."""
        settings, before = self.config.phases[index], sum(p.steps for p in self.config.phases[:index])
        if position.phase < index:
            state, position = self._begin(state.params, settings, state.random), Position(before, index, 0, {})
        first = 0
        for number, stage in enumerate(settings.stages):
            last = first + stage.steps
            if position.phase_step < last:
                step = make_step(self.graphdef, settings, micro_batches=stage.micro_batches, mesh=self.mesh)
                batches = self._batches(corpus, settings.name, number, stage)
                if position.phase_step > first:
                    batches.set_state(position.data)
                for done in range(position.phase_step + 1, last + 1):
                    batch = next(batches)
                    check_tokens(batch, self.config.model.vocab_size)
                    batch = batch if self.mesh is None else place_batch(batch, self.mesh)
                    state, metrics = step(state, batch)
                    log.put(before + done, index, settings.name, done, metrics)
                    position = Position(before + done, index, done, batches.get_state())
                    if done == settings.steps or position.step % self.config.checkpoint_every == 0:
                        log.flush()  # stops here if a number is not finite: a bad state is never saved
                        checkpoints.save(state, position)
            first = last
        return state, position

    def _batches(self, corpus: Corpus, name: str, number: int, stage: Stage) -> Any:
        """The batches of a stage; a control sees those of SPARSE."""
        phases = [phase.name for phase in PHASES]
        phase = phases.index(name) if name in phases else phases.index("SPARSE")
        seed = 1000 * self.config.seed + 100 * phase + number
        return corpus.batches("train", batch_size=stage.batch_size, seq_len=stage.seq_len, seed=seed)


def load_model(folder: Path | str, *, step: int | None = None) -> Transformer:
    """The model of a run's folder, from its newest checkpoint or from that of `step`."""
    config = RunConfig.from_json(read_run(Path(folder))["run"]).model
    graphdef, like = abstract_params(config)
    return merge_groups(graphdef, load_params(Path(folder), like, step=step))


@functools.cache
def abstract_params(config: Config, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, Params]:
    """The model's definition, and shapes, dtypes and places of its parameters, without making them."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, params = split_groups(model)
    return graphdef, placed(params, mesh)


def placed(tree: Any, mesh: Mesh | AbstractMesh | None) -> Any:
    """Shapes and dtypes of parameters or of a state, placed on a mesh, or on this process's first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: first, tree) if mesh is None else parameter_shardings(tree, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def check_stage(mesh: Mesh | AbstractMesh, stage: Stage) -> None:
    """ValueError unless batches of a stage can be split over the mesh, and a shard's rows into its micro-batches."""
    check_batch(mesh, batch_size=stage.batch_size, seq_len=stage.seq_len)
    rows = stage.batch_size // shards(mesh, "batch")
    if rows % min(rows, stage.micro_batches):
        nearest = max(n for n in range(1, stage.micro_batches + 1) if rows % n == 0)
        raise ValueError(
            f"micro_batches must divide the {rows} rows of a shard of the batch, got {stage.micro_batches}; "
            f"nearest: {nearest}"
        )


def wait_for_all(what: str) -> None:
    """Until every process has come to this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def check_unused(folder: Path) -> None:
    """ValueError if the folder holds a run."""
    if (folder / "run.json").exists():
        raise ValueError(f"{folder} already holds a run: --resume continues it, another --out leaves it")


def check_tokens(batch: Batch, vocab_size: int) -> None:
    """ValueError if a token or a target lies outside the vocabulary; on the host, before the step."""
    for name in ("tokens", "targets"):
        ids = np.asarray(getattr(batch, name))
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} must be ids from 0 to {vocab_size - 1}, got {low if low < 0 else high}")


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
