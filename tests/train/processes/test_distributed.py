"""Runs on meshes, in one process and in two: the numbers are those of one device, and a mesh may change on the way."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from sharded_cases import mesh_of
from train_cases import small_config, small_phases, small_run, write_preset

from dsa_jax.parallel.sharding import parameter_shardings
from train.__main__ import main
from train.data import load
from train.evaluation.held_out import HeldOut, draw_batches
from train.experiment import evaluate, held_out_shape
from train.reporting.results import Results
from train.run import Run
from train.saved.folder import checkpoint_steps
from train.settings import Stage
from train.watching.metrics import is_clock
from train.watching.progress import RunProgress
from train.watching.watch import Watch, read_best

pytestmark = pytest.mark.usefixtures("in_a_hurry")
PATIENCE = 300.0  # seconds that two processes may take on a busy machine
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(folder):
    """BASE alone, which the command begins from nothing, of the MoE layer alone, which compiles sooner."""
    model = small_config(num_hidden_layers=1, first_k_dense_replace=0, num_attention_heads=4)
    phases = (small_phases(Stage(STEPS, 4, 32, 2))["BASE"],)
    watched = dict(checkpoint_every=2, evaluate_every=2, keep_best=True)
    return small_run(folder / "text", model=model, phases=phases, **watched)


def draw(config):
    """Draws what a run is measured on, as the command does."""
    return HeldOut({"text": draw_batches(load(config.data), *held_out_shape(config))})


def train(config, folder, mesh, *, resume=False):
    run, watch = Run(config, folder, mesh=mesh), Watch(draw(config))
    return run.train(load(config.data), RunProgress(config), resume=resume, watch=watch)


def numbers(folder):
    """Reads the metrics of each step, without the time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "phase" and not is_clock(k)} for line in lines]


@pytest.fixture(scope="module")
def alone(config, folder):
    """Trains the run on one device."""
    state = train(config, folder / "alone", None)
    return numbers(folder / "alone"), jax.device_get(state.params)


@pytest.fixture(scope="module")
def in_two_processes(config, folder):
    """Trains the run by the command, in two processes of two devices each; gives its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    preset, out = write_preset(config, folder / "preset.json"), folder / "two"
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    command = [sys.executable, "-m", "train", "--preset", str(preset), "--out", str(out)]
    command += ["--mesh", "context=2,tensor=2", "--distributed", "--coordinator", address, "--num-processes", "2"]
    command += ["--compile-ahead"]
    processes = [
        subprocess.Popen(
            [*command, "--process-id", str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    streams = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], streams
    assert "compiled BASE 4 × 32 (2 parts) in " in streams[0][0]
    assert "BASE 4/4" in streams[0][0] and "BASE" not in streams[1][0]  # one of them speaks
    return out


@pytest.mark.slow
def test_two_processes_measure_as_one_device(config, in_two_processes):
    """Where they trained, after the end; the report is one process's to write."""
    found = Results.load(in_two_processes).seeds[0].evaluation
    run = Run(config, in_two_processes)
    alone = evaluate(run, run.params_after("BASE"), [], draw(config))
    for name, losses in alone.losses.items():
        assert found.losses[name] == pytest.approx(losses, rel=1e-5), name
    for name, layers in alone.kept.mass["text"].items():
        np.testing.assert_allclose(found.kept.mass["text"][name], layers, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_train_as_one_device(alone, in_two_processes):
    chex.assert_trees_all_close(numbers(in_two_processes), alone[0], rtol=1e-5)
    assert checkpoint_steps(in_two_processes) == [2, 4] and read_best(in_two_processes)["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,tensor=2", None])
def test_a_run_goes_on_on_another_mesh(config, alone, in_two_processes, tmp_path, mesh):
    """From the checkpoint that two processes left in its middle: step for step the run of one device."""
    out = tmp_path / "out"
    shutil.copytree(in_two_processes, out)
    shutil.rmtree(out / "checkpoints" / "4")
    mesh = None if mesh is None else mesh_of(mesh)
    state = train(config, out, mesh, resume=True)
    chex.assert_trees_all_close(numbers(out), alone[0], rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(state.params), alone[1], rtol=1e-4, atol=2e-6)
    if mesh is not None:
        places = parameter_shardings(state, mesh)
        same = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), state, places)
        assert all(jax.tree.leaves(same)), same
        q_b_proj = state.params["backbone"]["moe_layers"]["self_attn"]["q_b_proj"]
        chex.assert_shape(q_b_proj.addressable_shards[0].data, (1, 8, 2, 12))  # of [1, 16, 4, 12]


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_bad_meshes(capsys, config, tmp_path):
    common = "--preset", write_preset(config, tmp_path / "preset.json"), "--out", tmp_path / "out"
    cases = {
        "data=3": "must multiply to the 8 devices, got data=3,context=1,expert=1,tensor=1 = 3; nearest: data=8",
        "data=8": "data=8 must divide the batch size 4; nearest that does: 4",
        "tensor=8": "tensor=8 must divide num_attention_heads 4; nearest that does: 4",
        "data=2,color=4": "mesh axes must be among data, context, expert, tensor, got color",
        "data:2": "mesh must read like data=2,context=4",
    }
    for mesh, message in cases.items():
        assert message in refused(capsys, *common, "--mesh", mesh)
    longer = small_run(tmp_path / "text", model=config.model, phases=(small_phases(Stage(1, 4, 24))["BASE"],))
    path = write_preset(longer, tmp_path / "longer.json")
    message = refused(capsys, "--preset", path, "--out", tmp_path / "out", "--mesh", "context=8")
    assert (
        "must be a multiple of 16 (two chunks for each of the context=8 × expert=1 shards), got 24; nearest: 32"
        in message
    )
    assert not (tmp_path / "out").exists()


def test_bad_processes(capsys, config, tmp_path):
    common = "--preset", write_preset(config, tmp_path / "preset.json"), "--out", tmp_path / "out"
    assert "need --distributed" in refused(capsys, *common, "--num-processes", 2)
    together = "must be given together or not at all, got None, 2 and None"
    assert together in refused(capsys, *common, "--distributed", "--num-processes", 2)
    explicit = "--distributed", "--coordinator", "127.0.0.1:1", "--num-processes", 2, "--process-id", 2
    assert "process_id must be from 0 to num_processes - 1 = 1, got 2" in refused(capsys, *common, *explicit)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_models_checkpoint_is_refused_on_a_mesh(config, alone, folder):
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, index_topk=5))
    with pytest.raises(ValueError, match="index_topk 4, here 5"):
        train(other, folder / "alone", mesh_of("data=2,tensor=2"), resume=True)


def test_micro_batches_that_a_shard_cannot_have(config, tmp_path):
    phases = (small_phases(Stage(1, 12, 32, 4))["BASE"],)
    bad = small_run(tmp_path / "text", model=config.model, phases=phases)
    with pytest.raises(
        ValueError, match="micro_batches must divide the 6 rows of a shard of the batch, got 4; nearest: 3"
    ):
        Run(bad, tmp_path / "out", mesh=mesh_of("data=2,context=2"))


def test_each_step_of_a_mesh_takes_all_tokens(alone):
    assert [step["tokens"] for step in alone[0]] == [np.int32(4 * 32)] * STEPS
