"""A run that kills itself with SIGKILL wherever it hurts ends bit by bit where the unbroken run ends."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from train_cases import one_layer_run, small_params, small_phases, write_preset

from train.phases import BASE
from train.run import Run
from train.saved.checkpoint import Checkpoints
from train.saved.folder import checkpoint_steps
from train.settings import PhaseSettings, RunConfig, Stage
from train.state import TrainState, init_state
from train.watching.metrics import is_clock

TRAIN = """
import os, re, signal, sys
from pathlib import Path
from train.data import load
from train.watching.metrics import MetricsLog
from train.presets import load_preset
from train.run import Run

preset, out, moment, where = sys.argv[1:]
put = MetricsLog.put

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def put_and_die(log, step, *rest):
    put(log, step, *rest)
    if step == int(where):
        die()

def die_before_rename(event, arguments):
    if event == "os.rename" and re.search(where, str(arguments[1])):
        die()

if moment == "step":
    MetricsLog.put = put_and_die
if moment == "rename":
    sys.addaudithook(die_before_rename)
config = load_preset(preset)
Run(config, Path(out)).train(load(config.data), resume=True)
"""
MOMENTS = {  # what kills the run, where, and the checkpoints that are whole by then
    "between two steps, before the first checkpoint": ("step", "2", []),
    "in the middle of a write, of which parts are whole": ("rename", r"/checkpoints/4\.[^/]*/params$", [2]),
    "after the write at a phase's begin, before it is committed": ("rename", "/checkpoints/6$", [4, 5]),
}
PATIENCE = 300.0  # seconds that a process may take on a busy machine


def run(preset: Path, out: Path, environment: dict[str, str], moment: str = "", where: str = "") -> tuple[int, str]:
    """Runs in a process of its own, to the end or to the moment; returns its status and what it complained of."""
    command = [sys.executable, "-c", TRAIN, str(preset), str(out), moment, where]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    return ended.returncode, ended.stderr


def metrics(out: Path) -> list[dict]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not is_clock(name)} for record in records]


def state_at(config: RunConfig, out: Path, step: int, phase: int) -> TrainState:
    like = init_state(
        jax.tree.map(jnp.asarray, small_params(config.model)), config.phases[phase], jnp.zeros(2, "uint32")
    )
    with Checkpoints(out / "checkpoints", config) as checkpoints:
        return checkpoints.restore(step, like)


def test_a_state_is_put_on_a_device_as_a_whole(tmp_path):
    """Beside restored parameters, which are, other parts would have the step compiled again for what it gave back."""
    run = Run(one_layer_run(tmp_path / "text"), tmp_path / "out")
    for given in (jnp.array, lambda x: jax.device_put(jnp.array(x), jax.devices()[0])):
        params = jax.tree.map(given, small_params(run.config.model))
        state = run._begin(params, run.config.phases[0], jnp.zeros(2, "uint32"))
        assert all(x.committed for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_a_killed_run_ends_where_the_unbroken_one_does(tmp_path, environment):
    _, warmup, sparse = small_phases(Stage(3, 2, 16)).values()
    base = PhaseSettings(BASE, (Stage(3, 2, 16), Stage(2, 4, 8, 2)), backbone=sparse.backbone, bias_rate=1e-2)
    config = one_layer_run(tmp_path / "text", phases=(base, warmup, sparse), checkpoint_every=2)  # ends: 5, 8, 11
    preset = write_preset(config, tmp_path / "small.json")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(preset, whole, environment) == (0, "")

    for name, (moment, where, checkpoints) in MOMENTS.items():
        status, errors = run(preset, broken, environment, moment, where)
        assert status == -signal.SIGKILL, (name, errors)
        assert checkpoint_steps(broken) == checkpoints, name
    assert run(preset, broken, environment) == (0, "")

    assert [record["step"] for record in metrics(broken)] == list(range(1, 12))
    assert metrics(broken) == metrics(whole)
    for phase, step in enumerate((5, 8, 11)):
        states = [state_at(config, out, step, phase) for out in (whole, broken)]
        chex.assert_trees_all_equal(*states)
        assert int(states[0].step) == config.phases[phase].steps
