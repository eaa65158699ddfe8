"""Checkpoints of a run: written in the background, visible only when whole."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from dsa_jax import Config
from train.files import read_json_file
from train.phases import Params
from train.settings import RunConfig, differences, listed, read_json
from train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Position:
    """Says where in a run a checkpoint stands."""

    step: int  # done since the start of the run
    phase: int  # index in the run's phases
    phase_step: int  # done since the start of the phase
    data: dict[str, Any]  # the state of the batches' iterator


class Checkpoints:
    """Writes and reads the checkpoints under one folder, each named by its step.

    The newest `config.keep_checkpoints` and the last of each phase are kept.
    """

    def __init__(self, folder: Path, config: RunConfig, *, init: str | None = None):
        self.folder = folder.absolute()
        self._identity = identity(config, init)
        ends = [sum(p.steps for p in config.phases[: i + 1]) for i in range(len(config.phases))]
        keep = AnyPreservationPolicy([LatestN(config.keep_checkpoints), CustomSteps(ends)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            with self._writing():
                self._manager.close()
        except ValueError:
            if kind is None:  # else what went wrong first is what is said
                raise

    def latest(self) -> int | None:
        """Finds the step of the newest whole checkpoint, once those under way are written."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Names the folder of the checkpoint of a step."""
        return self.folder / str(step)

    def save(self, state: TrainState, position: Position) -> None:
        """Starts writing; waits first for a write still under way. The state may be donated at once afterwards."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(_without_params(state)),
            meta=ocp.args.JsonSave({"position": dataclasses.asdict(position), "run": self._identity}),
        )
        with self._writing():
            self._manager.save(position.step, args=items, force=True)

    def position(self, step: int) -> Position:
        """Reads where in the run a checkpoint stands.

        Raises:
          ValueError: naming every setting in which its run is not this one.
        """
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        changed = differences(self._identity, restored["meta"]["run"])
        if changed:
            raise ValueError(f"the checkpoint {self.path(step)} is of another configuration: {listed(changed)}")
        return Position(**restored["meta"]["position"])

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads the state of a checkpoint; `like` gives shapes, dtypes and shardings."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                optimizer=ocp.args.StandardRestore(_without_params(target)),
            ),
        )
        return TrainState(params=restored["params"], **restored["optimizer"])

    def wait(self) -> None:
        """Waits until every checkpoint under way is written.

        Raises:
          ValueError: with what went wrong there.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk comes as any of several types, from the thread that writes
            whole = checkpoint_steps(self.folder.parent)
            last = self.path(whole[-1]) if whole else "none"
            raise ValueError(
                f"a checkpoint in {self.folder} could not be written: {str(error)[:300]}; the last whole one: {last}"
            ) from error


def _without_params(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "random": state.random}


def identity(config: RunConfig, init: str | None = None) -> dict[str, Any]:
    """Gathers what must be the same for a run to be continued: all that decides its numbers."""
    values = {**config.to_json(), "init": init}
    for name in ("checkpoint_every", "keep_checkpoints", "evaluation_batches"):
        del values[name]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # they decide no number, and older runs lack them
        del values["model"][name]
    for part in values.values():
        if isinstance(part, dict) and part.get("append"):  # of the text; older runs do not speak of this default
            del part["append"]
    return values


def load_params(folder: Path, like: Params, *, step: int | None = None) -> Params:
    """Reads the parameters of the newest checkpoint, or of that of `step`, of a run's folder.

    Raises:
      ValueError: if there is no such checkpoint.
    """
    found = checkpoint_steps(folder)
    if not found:
        raise ValueError(f"init must hold a checkpoint, got {folder} without one")
    if step is not None and step not in found:
        raise ValueError(f"{folder} must hold a checkpoint of step {step}, got {found}")
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    path = folder.absolute() / "checkpoints" / str(found[-1] if step is None else step) / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def checkpoint_steps(folder: Path) -> list[int]:
    """Lists the steps of the whole checkpoints of a run's folder, in order."""
    steps = folder / "checkpoints"
    return sorted(int(path.name) for path in steps.iterdir() if path.name.isdigit()) if steps.is_dir() else []


def read_run(folder: Path) -> dict[str, Any]:
    """Reads the `run.json` of a run's folder.

    Raises:
      ValueError: if it is not there, or says nothing of a run.
    """
    values = read_json_file(folder / "run.json", f"{folder} must hold the run.json of a run, which")
    parts = [values.get(name) if isinstance(values, dict) else None for name in ("run", "identity")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{folder} must hold the run.json of a run, got one without its run or its identity")
    return values


def read_model_config(folder: Path) -> Config:
    """Reads the model's configuration from a run's folder, whatever its phases and its data."""
    return read_json(Config, read_run(folder)["run"].get("model"), "run.model")
