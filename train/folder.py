"""A run's folder: its `run.json`, what it must share with a run that continues it, and room for checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from dsa_jax import Config
from train.files import read_json_file, replace_text
from train.settings import RunConfig, differences, listed, read_json
from train.state import abstract_params


def open_folder(folder: Path, config: RunConfig, init: str | None = None, *, resume: bool) -> None:
    """Makes a run's folder, or checks that the run in it is this one and is to be continued.

    Raises:
      ValueError: if the folder holds something else, cannot be written, or has too little room for checkpoints.
    """
    _check_folder(folder, config, init, resume)
    wait_for_all("looked into the folder")
    try:
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            values = {"run": config.to_json(), "identity": identity(config, init)}
            replace_text(folder / "run.json", json.dumps(values, indent=2) + "\n")
        wait_for_all("made the folder")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"the output folder {folder} must be writable: {error.strerror}") from error
    if free < (needed := checkpoint_bytes(config)):
        raise ValueError(
            f"{folder} must have room for the run's checkpoints, about {needed / 2**20:.0f} MiB, "
            f"got {free / 2**20:.0f} MiB free"
        )


def _check_folder(folder: Path, config: RunConfig, init: str | None, resume: bool) -> None:
    if not resume:
        check_unused(folder)
    if (folder / "run.json").exists():
        changed = differences(identity(config, init), read_run(folder)["identity"])
        if changed:
            raise ValueError(f"{folder} holds a run of another configuration: {listed(changed)}")
    elif folder.exists() and (not folder.is_dir() or checkpoint_steps(folder)):
        raise ValueError(f"{folder} must be a new or an empty folder")


def check_unused(folder: Path) -> None:
    """Checks that the folder holds no run.

    Raises:
      ValueError: if it does.
    """
    if (folder / "run.json").exists():
        raise ValueError(f"{folder} already holds a run: --resume continues it, another --out leaves it")


def checkpoint_bytes(config: RunConfig) -> int:
    """Bounds from above what a run's checkpoints take: parameters and two moments each."""
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_params(config.model)[1])]
    return 3 * sum(sizes) * (config.keep_checkpoints + config.keep_best + 1 + len(config.phases))


def identity(config: RunConfig, init: str | None = None) -> dict[str, Any]:
    """Gathers what must be the same for a run to be continued: all that decides its numbers."""
    values = {**config.to_json(), "init": init}
    for name in ("checkpoint_every", "keep_checkpoints", "evaluation_batches", "evaluate_every", "keep_best"):
        del values[name]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # they decide no number, and older runs lack them
        del values["model"][name]
    for part in values.values():
        if isinstance(part, dict) and part.get("append"):  # of the text; older runs do not speak of this default
            del part["append"]
    return values


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


def wait_for_all(what: str) -> None:
    """Waits until every process has come to this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
