"""A run's folder: its `run.json`, what it must share with a run that continues it, and room for checkpoints."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jax.experimental import multihost_utils

from dsa_jax import Config
from train.checks import shown
from train.files import read_json_file, replace_text, writing
from train.processes.lock import Lock
from train.saved.changes import Change, Position, find_changes, find_data_changes
from train.saved.tokenizer_copy import keep_tokenizer
from train.settings import RunConfig, read_json
from train.state import abstract_params

RUN_FILE, COMMAND_FILE = "run.json", "command.json"


@runtime_checkable
class Fingerprinted(Protocol):
    """Describes data that can say by a short text what they hold, wherever they lie."""

    @property
    def fingerprint(self) -> str:
        """Names what the data hold."""
        ...


@dataclasses.dataclass(frozen=True)
class Origin:
    """Says where a run's first parameters came from: a name of the place, and a fingerprint of what lay there."""

    name: str
    fingerprint: str | None = None


@dataclasses.dataclass(frozen=True)
class Opened:
    """Says how a run goes on in its folder.

    Attributes:
      position: where its newest checkpoint stands, None without one.
      changes: what is other than it was at that checkpoint.
      new_data: whether the data are others, and hence begin at their start.
      saved: the configuration that the checkpoint was written with, as JSON.
    """

    position: Position | None = None
    changes: tuple[Change, ...] = ()
    new_data: bool = False
    saved: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_folder(
    folder: Path,
    config: RunConfig,
    *,
    origin: Origin | None = None,
    data: str | None = None,
    resume: bool = False,
    new_data: bool = False,
) -> Opened:
    """Makes a run's folder, or takes up the run in it, with what may change of it.

    Args:
      folder: the run's.
      config: the configuration to go on with.
      origin: where the first parameters come from, None if they are drawn.
      data: the fingerprint of the data, None if they have none.
      resume: whether a run in the folder is continued, instead of refused.
      new_data: whether the data may be others than those of the run.

    Raises:
      ValueError: if the folder holds something else, cannot be written, or has too little room for checkpoints; or if
        the run in it cannot go on so.
    """
    opened, record = look_into(folder, config, origin=origin, data=data, resume=resume, new_data=new_data)
    wait_for_all("looked into the folder")
    with writing(folder):
        if jax.process_index() == 0 and record is not None:
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(folder / RUN_FILE, json.dumps(record, indent=2) + "\n")
            if config.data.tokenizer is not None:
                keep_tokenizer(config.data.tokenizer, folder, append=config.data.append)
        wait_for_all("made the folder")
        check_room(folder, config, opened.position)
    return opened


def look_into(
    folder: Path, config: RunConfig, *, origin: Origin | None, data: str | None, resume: bool, new_data: bool
) -> tuple[Opened, dict[str, Any] | None]:
    """Looks how a run would go on in its folder, as `open_folder`, and makes nothing.

    Returns:
      How it goes on, and what its `run.json` must become, None if it is that already.

    Raises:
      ValueError: if the folder holds something else, or the run in it cannot go on so.
    """
    if not resume:
        check_unused(folder)
    if (folder / RUN_FILE).exists():
        recorded, position = read_run(folder), read_position(folder)
        opened, record = _compare(folder, config, recorded, position, origin, data, new_data)
        return opened, None if record == recorded else record
    if folder.exists() and (not folder.is_dir() or checkpoint_steps(folder)):
        raise ValueError(f"{folder} must be a new or an empty folder")
    return Opened(), _record(config, origin, data, [])


def _record(config: RunConfig, origin: Origin | None, data: str | None, changes: list[Any]) -> dict[str, Any]:
    """Gathers what `run.json` holds."""
    return {
        "run": config.to_json(),
        "init": None if origin is None else dataclasses.asdict(origin),
        "data": data,
        "changes": changes,
    }


def _compare(
    folder: Path,
    config: RunConfig,
    recorded: dict[str, Any],
    position: Position | None,
    origin: Origin | None,
    data: str | None,
    new_data: bool,
) -> tuple[Opened, dict[str, Any]]:
    """Compares a run with the one in the folder; returns how it goes on, and what `run.json` is to hold.

    What the newest checkpoint was written with decides, not `run.json`, which may have been edited, or written for a
    run that was killed before it saved.
    """
    saved = {} if position is None else read_saved(folder, position.step)
    _check_origin(folder, recorded_origin(recorded), origin)
    before, here = saved.get("run", recorded["run"]), config.to_json()
    changes = find_changes(folder, before, here, position)
    known, accepted = saved.get("data", recorded.get("data")), recorded.get("data")
    is_new = None not in (known, data) and known != data
    asked = new_data or data == accepted or before.get("data") != here["data"]
    if is_new and not asked:
        raise ValueError(
            f"the data must be those of the run in {folder}, whose fingerprint is {known}, got other data of "
            f"fingerprint {data}: name them by --data to go on with them from their start"
        )
    step = 0 if position is None else position.step
    if is_new:
        changes += find_data_changes(step, before.get("data", {}), here["data"], (known, data))
    earlier = [change for change in recorded.get("changes", []) if change["step"] < step]
    later = [dataclasses.asdict(change) for change in changes if position is not None]
    record = _record(config, origin, data, [*earlier, *later])
    return Opened(position, tuple(changes), is_new, saved.get("run", {})), record


def _check_origin(folder: Path, recorded: Origin | None, here: Origin | None) -> None:
    """Compares where first parameters came from: by content where both know it, and else by name."""
    if recorded is None or here is None:
        same = recorded is here
    elif None in (recorded.fingerprint, here.fingerprint):
        same = recorded.name == here.name
    else:
        same = recorded.fingerprint == here.fingerprint
    if not same:
        names = [None if each is None else each.name for each in (recorded, here)]
        raise ValueError(
            f"the run in {folder} cannot go on from other parameters than it began with: init {names[0]!r}, here "
            f"{names[1]!r}; leave --init out, or begin another run: --out NEW"
        )


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Lock | None]:
    """Makes a run's folder and holds its lock, in process 0 for all processes of the run.

    Raises:
      ValueError: if the folder cannot be written, or another process writes it.
    """
    if jax.process_index() > 0:
        yield None
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder) as lock:
        yield lock


def check_unused(folder: Path) -> None:
    """Checks that the folder holds no run.

    Raises:
      ValueError: if it does.
    """
    if (folder / RUN_FILE).exists():
        raise ValueError(f"{folder} already holds a run: --resume continues it, another --out leaves it")


def check_room(folder: Path, config: RunConfig, position: Position | None) -> None:
    """Checks that the disk has room for the checkpoints that are still to be written.

    Raises:
      ValueError: if it has not.
    """
    if position is not None and position.step == config.steps:
        return
    most = config.keep_checkpoints + config.keep_best + 1 + len(config.phases)
    missing = max(1, most - len(checkpoint_steps(folder)))
    needed, free = missing * checkpoint_bytes(config), shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} must have room for {missing} checkpoints, about {needed / 2**20:.0f} MiB, "
            f"got {free / 2**20:.0f} MiB free"
        )


def checkpoint_bytes(config: RunConfig) -> int:
    """Bounds from above what one checkpoint takes: parameters and two moments each."""
    return 3 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_params(config.model)[1]))


def checkpoint_steps(folder: Path) -> list[int]:
    """Lists the steps of the whole checkpoints of a run's folder, in order."""
    steps = folder / "checkpoints"
    return sorted(int(path.name) for path in steps.iterdir() if path.name.isdigit()) if steps.is_dir() else []


def read_saved(folder: Path, step: int) -> dict[str, Any]:
    """Reads what a checkpoint says beside its arrays: its position, and the run and the data that it was written with.

    Raises:
      ValueError: if it cannot be read.
    """
    path = folder / "checkpoints" / str(step) / "meta" / "metadata"
    values = read_json_file(path, f"the checkpoint of step {step} must say where it stands, which")
    position = values.get("position") if isinstance(values, dict) else None
    if not isinstance(position, dict) or position.keys() != {f.name for f in dataclasses.fields(Position)}:
        raise ValueError(f"{path} must hold the position of a checkpoint, got {shown(values)}")
    return values


def read_position(folder: Path) -> Position | None:
    """Reads where the newest checkpoint of a run's folder stands; None without one."""
    steps = checkpoint_steps(folder)
    return Position(**read_saved(folder, steps[-1])["position"]) if steps else None


def last_checkpoint(folder: Path) -> str:
    """Names the newest whole checkpoint of a run's folder for a message, whatever has become of the folder."""
    try:
        steps = checkpoint_steps(folder)
    except OSError as error:
        return f"not to be seen ({error.strerror})"
    return str(folder.absolute() / "checkpoints" / str(steps[-1])) if steps else "none"


def read_run(folder: Path) -> dict[str, Any]:
    """Reads the `run.json` of a run's folder.

    Raises:
      ValueError: if it is not there, or says nothing of a run.
    """
    values = read_json_file(folder / RUN_FILE, f"{folder} must hold the run.json of a run, which")
    parts = {"run": dict, "init": dict | str | None, "changes": list}
    sound = isinstance(values, dict) and "run" in values
    sound = sound and all(isinstance(values[name], kind) for name, kind in parts.items() if name in values)
    if not sound or not all(isinstance(c, dict) and isinstance(c.get("step"), int) for c in values.get("changes", [])):
        raise ValueError(f"{folder} must hold the run.json of a run, got {shown(values)}")
    return values


def recorded_origin(values: dict[str, Any]) -> Origin | None:
    """Takes from a `run.json` where the run's first parameters came from; older ones have it in their identity.

    Raises:
      ValueError: if it does not say so.
    """
    identity = values.get("identity")
    init = values.get("init", identity.get("init") if isinstance(identity, dict) else None)
    if init is None:
        return None
    return Origin(init) if isinstance(init, str) else read_json(Origin, init, "init")


@dataclasses.dataclass(frozen=True)
class Command:
    """Holds how a command makes and measures its runs; what they are themselves stands in their `run.json`."""

    name: str
    seeds: int = 1
    controls: bool = False
    evaluate: bool = True
    mesh: str | None = None


def read_command(folder: Path) -> Command:
    """Reads how the runs of a folder were made; as usual where that is not recorded.

    Raises:
      ValueError: if the record is damaged.
    """
    path = folder / COMMAND_FILE
    if not path.is_file():
        return Command(folder.absolute().name)
    return read_json(Command, read_json_file(path, COMMAND_FILE), COMMAND_FILE)


def write_command(folder: Path, command: Command) -> None:
    """Records how the runs of a folder are made, unless that stands there.

    Raises:
      ValueError: if the folder cannot be written, or another process writes it.
    """
    text = json.dumps(dataclasses.asdict(command), indent=2) + "\n"
    path = folder / COMMAND_FILE
    if not path.is_file() or path.read_text() != text:
        with hold(folder):
            replace_text(path, text)


def read_model_config(folder: Path) -> Config:
    """Reads the model's configuration from a run's folder, whatever its phases and its data."""
    return read_json(Config, read_run(folder)["run"].get("model"), "run.model")


def wait_for_all(what: str) -> None:
    """Waits until every process has come to this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
