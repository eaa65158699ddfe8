"""Checkpoints of a run: written in the background, visible only when whole."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from train.moments import MOMENTS
from train.phases import Params
from train.saved.changes import Position
from train.saved.folder import checkpoint_steps, last_checkpoint
from train.settings import RunConfig
from train.state import TrainState


@dataclasses.dataclass
class _OneStep:
    """Preserves the checkpoint of one step, which may change: a policy of Orbax."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """Writes and reads the checkpoints under one folder, each named by its step.

    The newest `config.keep_checkpoints`, the last of each phase, and the one chosen by `keep` are kept. Each says where
    it stands and what it was written with: the run's configuration, and `data`, the fingerprint of its data.
    """

    def __init__(self, folder: Path, config: RunConfig, *, data: str | None = None):
        self.folder = folder.absolute()
        self._written_with = {"run": config.to_json(), "data": data}
        ends = [sum(p.steps for p in config.phases[: i + 1]) for i in range(len(config.phases))]
        self._chosen = _OneStep()
        keep = AnyPreservationPolicy([LatestN(config.keep_checkpoints), CustomSteps(ends), self._chosen])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        arrays = {name: ocp.StandardCheckpointHandler() for name in ("params", "optimizer")}
        handlers = {**arrays, "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

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
            meta=ocp.args.JsonSave({"position": dataclasses.asdict(position), **self._written_with}),
        )
        with self._writing():
            self._manager.save(position.step, args=items, force=True)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads the state of a checkpoint; `like` gives shapes, dtypes and shardings.

        Raises:
          ValueError: if it holds moments of another dtype, to which Orbax would round them to the nearest.
        """
        self._check_moments(step, like)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                optimizer=ocp.args.StandardRestore(_without_params(target)),
            ),
        )
        return TrainState(params=restored["params"], **restored["optimizer"])

    def _check_moments(self, step: int, like: TrainState) -> None:
        saved = _moment_dtypes(self._manager.item_metadata(step)["optimizer"].tree["opt_state"])
        for group, dtype in _moment_dtypes(like.opt_state).items():
            if (found := saved.get(group, dtype)) != dtype:
                raise ValueError(
                    f"the checkpoint of step {step} in {self.folder} holds {found} moments of the {group}, the run's "
                    f"moment_dtype is {dtype}: the dtype of moments stays while their phase runs"
                )

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
            raise ValueError(
                f"a checkpoint in {self.folder} could not be written: {_without_paths(error, self.folder)}; "
                f"the last whole one: {last_checkpoint(self.folder.parent)}"
            ) from error


def _without_paths(error: Exception, folder: Path) -> str:
    """Writes an error without the folder, which tensorstore repeats until no room is left for the reason."""
    text = str(error).replace(f"{folder}/", "")
    return text if len(text) <= 400 else f"{text[:200]} … {text[-200:]}"


def _moment_dtypes(opt_state: Any) -> dict[str, str]:
    """Finds the dtype of each group's moments, of a state or of what Orbax says of one."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if set(MOMENTS).intersection(names):
            found[names[0]] = str(leaf.dtype)
    return found


def _without_params(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "random": state.random}


def load_params(folder: Path, like: Params, *, step: int | None = None) -> Params:
    """Reads the parameters of the newest checkpoint, or of that of `step`, of a run's folder.

    Raises:
      ValueError: if there is no such checkpoint.
    """
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    path = checkpoint_path(folder, step) / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def checkpoint_path(folder: Path, step: int | None = None) -> Path:
    """Finds the newest checkpoint, or that of `step`, of a run's folder.

    Raises:
      ValueError: if there is no such checkpoint.
    """
    found = checkpoint_steps(folder)
    if not found:
        raise ValueError(f"init must hold a checkpoint, got {folder} without one")
    if step is not None and step not in found:
        raise ValueError(f"{folder} must hold a checkpoint of step {step}, got {found}")
    return folder.absolute() / "checkpoints" / str(found[-1] if step is None else step)
