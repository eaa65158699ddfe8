"""A run killed with SIGKILL wherever it hurts ends bit by bit where the unbroken run ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
from train_cases import one_layer_run, small_params, small_phases, write_preset

from train.checkpoint import Checkpoints, checkpoint_steps
from train.presets import PhaseSettings, RunConfig, Stage
from train.run import Run
from train.step import TrainState, init_state

TRAIN = """
import sys
from pathlib import Path
from train.data import load
from train.presets import load_preset
from train.progress import RunProgress
from train.run import Run
config = load_preset(sys.argv[1])
Run(config, Path(sys.argv[2])).train(load(config.data), RunProgress(config), resume=True)
"""
PATIENCE = 300.0  # seconds that a process may take on a busy machine


def start(preset: Path, out: Path, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(preset), str(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors


def kill_when(process: subprocess.Popen, moment: Callable[[], bool]) -> None:
    """Kills the process at the first sight of a moment, which must come before its end."""
    deadline = time.monotonic() + PATIENCE
    while not moment():
        assert process.poll() is None, process.communicate()[1] or "the run ended before the moment came"
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()


def lines(out: Path) -> list[str]:
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def metrics(out: Path) -> list[dict]:
    records = [json.loads(line) for line in lines(out)]
    for record in records:
        del record["seconds"]
    return records


def state_at(config: RunConfig, out: Path, step: int, phase: int) -> TrainState:
    like = init_state(
        jax.tree.map(jnp.asarray, small_params(config.model)), config.phases[phase], jnp.zeros(2, "uint32")
    )
    with Checkpoints(out / "checkpoints", config) as checkpoints:
        return checkpoints.restore(step, like)


def test_a_state_is_put_on_a_device_as_a_whole(tmp_path):
    """Beside restored parameters, which are, other parts would have the step compiled again for what it gave back."""
    run = Run(one_layer_run(tmp_path / "text"), tmp_path / "out")
    params = jax.tree.map(jnp.asarray, small_params(run.config.model))
    for given in (params, jax.device_put(params, jax.devices()[0])):
        state = run._begin(given, run.config.phases[0], jnp.zeros(2, "uint32"))
        assert all(x.committed for x in jax.tree.leaves(state))


def test_a_killed_run_ends_where_the_unbroken_one_does(tmp_path, environment):
    _, warmup, sparse = small_phases(Stage(3, 2, 16)).values()
    base = PhaseSettings("BASE", (Stage(3, 2, 16), Stage(2, 4, 8, 2)), backbone=sparse.backbone, bias_rate=1e-2)
    config = one_layer_run(tmp_path / "text", phases=(base, warmup, sparse), checkpoint_every=2)  # ends: 5, 8, 11
    preset = write_preset(config, tmp_path / "small.json")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(preset, whole, environment))

    moments = {
        "before the first checkpoint": lambda: len(lines(broken)) >= 1,
        "inside a save, in a stage of micro-batches": lambda: any(broken.glob("checkpoints/4.*")),
        "at the end of BASE": lambda: 5 in checkpoint_steps(broken),
    }
    for moment in moments.values():
        kill_when(start(preset, broken, environment), moment)
    finish(start(preset, broken, environment))

    assert [record["step"] for record in metrics(broken)] == list(range(1, 12))
    assert metrics(broken) == metrics(whole)
    for phase, step in enumerate((5, 8, 11)):
        states = [state_at(config, out, step, phase) for out in (whole, broken)]
        chex.assert_trees_all_equal(*states)
        assert int(states[0].step) == config.phases[phase].steps
