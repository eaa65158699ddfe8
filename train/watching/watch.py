"""What is watched of a run while it trains: its held-out loss and best checkpoint, TensorBoard's scalars, a trace."""

import contextlib
import dataclasses
import json
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from train.data import FollowingStream
from train.evaluation.evaluate import attention_of, held_out_losses
from train.evaluation.held_out import HeldOut
from train.files import read_json_file, replace_text
from train.phases import Params
from train.saved.checkpoint import Checkpoints
from train.saved.folder import checkpoint_steps
from train.settings import PhaseSettings, RunConfig
from train.watching.metrics import MetricsLog, OnStep, best_record
from train.watching.profile import ProfiledSteps, Profiler
from train.watching.tensorboard import Scalars, check_tensorboard

BEST_FIELDS = ("step", "phase", "held_out_loss")  # of best.json


@runtime_checkable
class CountsSources(Protocol):
    """Tells of the sources that it mixes how much was drawn; data may have this."""

    def progress(self, rows: int, *, seq_len: int) -> Mapping[str, tuple[float, float]]:
        """Gives tokens and epochs of each source in so many rows of `seq_len` tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Watch:
    """Says what is watched of a run beside the losses of its steps.

    Args:
      held_out: what `evaluate_every` measures.
      tensorboard: whether the numbers of `metrics.jsonl` go to TensorBoard too, in the run's folder `tensorboard/`.
      profile: steps whose trace goes to the run's folder `profile/`.
    """

    held_out: HeldOut | None = None
    tensorboard: bool = False
    profile: ProfiledSteps | None = None

    def check(self, config: RunConfig) -> None:
        """Checks that a run can be watched so.

        Raises:
          ValueError: if it cannot.
        """
        if config.evaluate_every and self.held_out is None:
            raise ValueError(f"evaluate_every {config.evaluate_every} needs held-out batches: give held_out, or set 0")
        if self.profile is not None:
            self.profile.check(config.steps)
        if self.tensorboard:
            check_tensorboard()


UNWATCHED = Watch()


@dataclasses.dataclass(frozen=True)
class Observer:
    """Does what a `Watch` says at the steps of a run; see `observe`."""

    watch: Watch
    config: RunConfig
    graphdef: nnx.GraphDef
    mesh: Mesh | None
    folder: Path
    log: MetricsLog
    profiler: Profiler
    best: dict[str, Any]  # the `BEST_FIELDS` of the best measurement so far

    def measure(self, settings: PhaseSettings, step: int, phase_step: int, params: Params) -> bool:
        """Measures the held-out loss where it is due, for the line of the step that was put last.

        Returns:
          whether it is the best of the phase so far and its checkpoint is to be kept.
        """
        if not self._is_due(step, phase_step == settings.steps) or self.watch.held_out is None:
            return False
        began, phase = time.monotonic(), settings.phase
        how: dict[str, Any] = dict(attention=attention_of(phase), selection=phase.selection, mesh=self.mesh)
        losses = held_out_losses(self.graphdef, params, self.watch.held_out, **how)
        first, *others = losses
        named = {"held_out_loss": losses[first], **{f"held_out_loss/{name}": losses[name] for name in others}}
        measured = {name: loss for name, loss in named.items() if loss is not None}
        self.log.add(measured | {"evaluation_seconds": round(time.monotonic() - began, 4)})
        return self.config.keep_best and self._is_best(phase.name, step, losses[first])

    def _is_due(self, step: int, at_end: bool) -> bool:
        every = self.config.evaluate_every
        return every > 0 and (at_end or step % every == 0)

    def _is_best(self, phase: str, step: int, loss: float | None) -> bool:
        if loss is None or (self.best.get("phase") == phase and not loss < self.best["held_out_loss"]):
            return False
        self.best.update(step=step, phase=phase, held_out_loss=loss)
        return True

    def keep(self, checkpoints: Checkpoints) -> None:
        """Has the best checkpoint kept, and names it in `best.json`."""
        checkpoints.keep(self.best["step"])
        if jax.process_index() == 0:
            replace_text(self.folder / "best.json", json.dumps(self.best) + "\n")

    def known(self, data: Any, step: int, data_seconds: float) -> dict[str, float]:
        """Gives the numbers of a step that the host has: seconds waited for data, and what its sources have given."""
        numbers = {"data_seconds": round(data_seconds, 4)}
        if isinstance(data, CountsSources):
            for name, (tokens, epochs) in drawn(self.config, step, data).items():
                numbers |= {f"tokens/{name}": tokens, f"epochs/{name}": epochs}
        if isinstance(data, FollowingStream):
            numbers |= data.measures()
        return numbers


@contextlib.contextmanager
def observe(
    watch: Watch,
    config: RunConfig,
    folder: Path,
    *,
    done: int,
    graphdef: nnx.GraphDef,
    mesh: Mesh | None = None,
    on_step: OnStep | None = None,
    compiled: Mapping[str, float] = types.MappingProxyType({}),
) -> Iterator[Observer]:
    """Opens the files of what watches a run of which `done` steps are done, and closes them with the run.

    `compiled` has the seconds that each program took to compile before the first step, for the first line.

    Raises:
      ValueError: if a file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        scalars = None
        if watch.tensorboard and jax.process_index() == 0:
            scalars = stack.enter_context(Scalars(folder / "tensorboard", first_step=done + 1))
        on_record = None if scalars is None else scalars.add
        first = {f"compile_seconds/{name.replace('×', 'x')}": round(each, 4) for name, each in compiled.items()}
        path = folder / "metrics.jsonl"
        log = stack.enter_context(MetricsLog(path, keep=done, on_step=on_step, on_record=on_record, first=first))
        profiler = stack.enter_context(Profiler(folder / "profile", watch.profile))
        yield Observer(watch, config, graphdef, mesh, folder, log, profiler, _best_so_far(config, folder, log))


def drawn(config: RunConfig, step: int, data: CountsSources) -> dict[str, tuple[float, float]]:
    """Adds up the tokens and epochs of each source that a run has drawn when a step is done."""
    total: dict[str, tuple[float, float]] = {}
    for stage in (stage for phase in config.phases for stage in phase.stages):
        taken = min(stage.steps, max(step, 0))
        for name, (tokens, epochs) in data.progress(taken * stage.batch_size, seq_len=stage.seq_len).items():
            before = total.get(name, (0, 0.0))
            total[name] = before[0] + tokens, before[1] + epochs
        step -= stage.steps
    return total


def _best_so_far(config: RunConfig, folder: Path, log: MetricsLog) -> dict[str, Any]:
    """Finds the best measurement of which there is a checkpoint, in the last phase that was measured."""
    steps = set(checkpoint_steps(folder))
    saved = [record for record in log.kept if record["step"] in steps and "held_out_loss" in record]
    record = best_record(saved, saved[-1]["phase"]) if saved and config.keep_best else None
    return _agreed({} if record is None else {name: record[name] for name in BEST_FIELDS}, config)


def _agreed(best: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Has all processes go by what the first one found: if they differed, not all would save at the same step."""
    if jax.process_count() == 1:
        return best
    names = [phase.name for phase in config.phases]
    place = (best["step"], names.index(best["phase"])) if best else (-1, -1)
    values = np.asarray(place, np.int32), np.float32(best.get("held_out_loss", 0.0))
    (step, phase), loss = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(values))
    return {} if step < 0 else {"step": int(step), "phase": names[phase], "held_out_loss": float(loss)}


def read_best(folder: Path) -> dict[str, Any] | None:
    """Reads which checkpoint of a run's folder has the least held-out loss; None where none was kept.

    Raises:
      ValueError: if `best.json` is damaged.
    """
    path = folder / "best.json"
    if not path.exists():
        return None
    best = read_json_file(path, "best.json")
    if not isinstance(best, dict) or set(best) != set(BEST_FIELDS):
        raise ValueError(f"{path} must have the fields {', '.join(BEST_FIELDS)}, got {str(best)[:80]}")
    return best if best["step"] in checkpoint_steps(folder) else None
