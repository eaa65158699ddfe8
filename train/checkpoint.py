"""Checkpoints of a run: written in the background, visible only when whole."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from train.folder import checkpoint_steps, identity
from train.phases import Params
from train.settings import RunConfig, differences, listed
from train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Position:
    """Says where in a run a checkpoint stands."""

    step: int  # done since the start of the run
    phase: int  # index in the run's phases
    phase_step: int  # done since the start of the phase
    data: dict[str, Any]  # the state of the batches' iterator


@dataclasses.dataclass
class _OneStep:
    """Preserves the checkpoint of one step, which may change: a policy of Orbax."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """Writes and reads the checkpoints under one folder, each named by its step.

    The newest `config.keep_checkpoints`, the last of each phase, and the one chosen by `keep` are kept.
    """

    def __init__(self, folder: Path, config: RunConfig, *, init: str | None = None):
        self.folder = folder.absolute()
        self._identity = identity(config, init)
        ends = [sum(p.steps for p in config.phases[: i + 1]) for i in range(len(config.phases))]
        self._chosen = _OneStep()
        keep = AnyPreservationPolicy([LatestN(config.keep_checkpoints), CustomSteps(ends), self._chosen])
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

    def keep(self, step: int) -> None:
        """Keeps the checkpoint of a step until that of another is chosen."""
        self._chosen.step = step

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
