"""What is watched of a run: its metrics, its best checkpoint, TensorBoard's scalars, a trace; and all of it resumed."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from train_cases import fake_step, small_batch, small_params, small_run

from train import planner
from train.commands.describe import describe_memory, opening
from train.data import load
from train.evaluation.held_out import HeldOut
from train.experiment import Experiment
from train.optimizer import OptimizerSettings, learning_rates
from train.phases import BASE, SPARSE, WARMUP, window_selection
from train.run import DivergedError, Run
from train.saved.checkpoint import checkpoint_steps
from train.settings import Stage
from train.watching.metrics import MetricsLog, best_record
from train.watching.profile import ProfiledSteps
from train.watching.watch import Watch, drawn, read_best

pytestmark = pytest.mark.usefixtures("in_a_hurry")

HELD_OUT = HeldOut({"text": (small_batch(2, 16),)})
EVALUATION = dict(evaluate_every=1, keep_best=True, keep_checkpoints=1, checkpoint_every=100)
LOSSES = [5.0, 4.0, 4.5, 3.0, 2.5, 2.0, 1.5, 1.75, 1.5]  # at the nine steps of three phases; 1.5 comes twice


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes a run whose steps and measurements are made up: they add one to every parameter, and give `LOSSES`."""
    config = small_run(tmp_path / "text", **EVALUATION)
    monkeypatch.setattr("train.run.make_step", fake_step(None))
    monkeypatch.setattr(Run, "initial_params", lambda self: jax.tree.map(jnp.array, small_params(self.config.model)))
    first, measured = float(small_params(config.model)["backbone"]["lm_head"][0, 0]), []

    def measure(graphdef, params, held_out, *, attention, selection, mesh):
        step = round(float(params["backbone"]["lm_head"][0, 0]) - first)
        measured.append((step, attention, selection))
        return {"text": LOSSES[step - 1], "rare": None}

    monkeypatch.setattr("train.watching.watch.held_out_losses", measure)
    return Run(config, tmp_path / "out"), measured


def train(run, *, resume=False, **watch):
    return run.train(load(run.config.data), resume=resume, watch=Watch(HELD_OUT, **watch))


def test_the_best_checkpoint_of_a_phase_is_kept_and_named(run):
    run, measured = run
    train(run)
    assert [record["held_out_loss"] for record in run.records()] == LOSSES
    assert all(record["evaluation_seconds"] >= 0 and "held_out_loss/rare" not in record for record in run.records())
    assert measured == [(i, "dense" if i < 4 else "sparse", None) for i in range(1, 10)]
    assert checkpoint_steps(run.folder) == [3, 6, 7, 9]  # the ends of phases, and the earliest of the best
    assert read_best(run.folder) == {"step": 7, "phase": "SPARSE", "held_out_loss": 1.5}
    assert best_record(run.records(), "BASE")["step"] == 2 and best_record(run.records(), "NONE") is None


def test_a_run_that_is_continued_knows_its_best(run, monkeypatch):
    run, measured = run
    monkeypatch.setattr("train.run.make_step", fake_step(("SPARSE", 3)))
    with pytest.raises(DivergedError, match="step 9"):
        train(run)
    assert checkpoint_steps(run.folder) == [3, 6, 7]
    monkeypatch.setattr("train.run.make_step", fake_step(None))
    measured.clear()
    train(run, resume=True)
    assert [step for step, *_ in measured] == [8, 9]
    assert [record["step"] for record in run.records()] == list(range(1, 10))
    assert checkpoint_steps(run.folder) == [3, 6, 7, 9] and read_best(run.folder)["step"] == 7


def test_a_best_measurement_without_a_checkpoint_does_not_count(run):
    """As where keep_best is asked for in the middle of a run."""
    run, _ = run
    late = dataclasses.replace(run, config=dataclasses.replace(run.config, keep_best=False))
    train(late)
    assert read_best(run.folder) is None and checkpoint_steps(run.folder) == [3, 6, 9]
    train(run, resume=True)  # finished: nothing is measured anew
    assert read_best(run.folder) == {"step": 9, "phase": "SPARSE", "held_out_loss": 1.5}


def test_measurements_come_every_few_steps_and_behind_each_phase(run):
    run, _ = run
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, evaluate_every=4, keep_best=False))
    train(run)
    measured = [record["step"] for record in run.records() if "held_out_loss" in record]
    assert measured == [3, 4, 6, 8, 9] and not (run.folder / "best.json").exists()


def test_a_held_out_loss_that_is_not_finite_stops_the_run(run, monkeypatch):
    run, _ = run
    monkeypatch.setattr("train.watching.watch.held_out_losses", lambda *_, **__: {"text": np.nan})
    with pytest.raises(DivergedError, match="held_out_loss is nan at step 1"):
        train(run)
    assert checkpoint_steps(run.folder) == []


def test_metrics_hold_time_tokens_and_seconds_waited(tmp_path):
    path, seen = tmp_path / "metrics.jsonl", []
    for done in (0, 1):  # the second time from step 1 on, of two that were done
        with MetricsLog(path, keep=done, on_record=seen.append) as log:
            for step in range(done + 1, 3):
                log.put(step, 0, "BASE", step, {"tokens": jnp.asarray(10 * step)}, {"data_seconds": 0.5})
                log.add({"held_out_loss": 2.0})
            log.flush()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["tokens_seen"]) for line in lines] == [(1, 10), (2, 30)]
    assert all(line["data_seconds"] == 0.5 and line["held_out_loss"] == 2.0 for line in lines)
    assert lines[0]["time"] <= lines[1]["time"] and lines[1]["time"] > 1.7e9
    assert [record["step"] for record in seen] == [1, 2, 2] and seen[-1] == lines[-1]


def test_learning_rates_go_by_the_names_of_the_settings():
    muon = learning_rates(OptimizerSettings(0.5, muon_learning_rate=2.0, schedule="cosine", warmup_steps=1), 5)
    assert [float(muon["learning_rate"](step)) for step in (0, 1, 3, 5)] == pytest.approx([0.25, 0.5, 0.25, 0.0])
    assert [float(muon["muon_learning_rate"](step)) for step in (0, 1)] == [1.0, 2.0]
    assert list(learning_rates(OptimizerSettings(0.5), 5)) == ["learning_rate"]


def read_events(folder):
    """Reads the events of a folder, oldest file first; each record has a length and checksums around it."""
    events = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name.rpartition(".")[2]):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return events


def test_tensorboard_shows_each_step_once(run, monkeypatch):
    """As TensorBoard reads them: a session's start drops what was said of its step and later ones."""
    run, _ = run
    monkeypatch.setattr("train.run.make_step", fake_step(("SPARSE", 3)))
    with pytest.raises(DivergedError):
        train(run, tensorboard=True)
    monkeypatch.setattr("train.run.make_step", fake_step(None))
    train(run, resume=True, tensorboard=True)
    shown = []
    for event in read_events(run.folder / "tensorboard"):
        if event.session_log.status == SessionLog.START:
            shown = [(step, values) for step, values in shown if step < event.step]
        if event.summary.value:
            shown.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
    assert [step for step, _ in shown] == list(range(1, 10))
    for (_, values), record in zip(shown, run.records(), strict=True):
        numbers = {k: v for k, v in record.items() if k not in ("step", "phase", "phase_step", "time")}
        assert values == pytest.approx(numbers, rel=1e-6)


def test_a_full_disk_under_tensorboard_is_named(run, monkeypatch):
    run, _ = run
    write, written = RecordWriter.write, []

    def fill(self, data):
        written.append(data)
        if len(written) > 3:  # the head of the file, its session, a step
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", fill)
    with pytest.raises(ValueError, match=r"file in .*out/tensorboard could not be written: No space left on device"):
        train(run, tensorboard=True)


def test_steps_are_traced_and_those_that_are_left_when_it_is_continued(run, monkeypatch):
    run, _ = run
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(f"start in {folder.name}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    begin = Run._next_batch

    def next_batch(self, *arguments):
        calls.append("step")
        return begin(self, *arguments)

    monkeypatch.setattr(Run, "_next_batch", next_batch)
    steps = ProfiledSteps.parse("2:8")
    monkeypatch.setattr("train.run.make_step", fake_step(("SPARSE", 1)))
    with pytest.raises(DivergedError):
        train(run, profile=steps)
    assert calls[:3] == ["step", "start in profile", "step"] and calls[-1] == "stop"
    calls.clear()
    monkeypatch.setattr("train.run.make_step", fake_step(None))
    train(run, resume=True, profile=steps)
    assert calls == ["start in profile", "step", "step", "stop", "step"]


def test_a_trace_is_written(run):
    run, _ = run
    train(run, profile=ProfiledSteps(9, 9))
    assert list((run.folder / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["", "3", "0:2", "3:2", "a:b", "1:2:3", "1:99999999999", "-1:2"])
def test_steps_to_trace_that_are_none(text):
    with pytest.raises(ValueError, match="profile must be FIRST:LAST, two steps of the run like 10:12, got"):
        ProfiledSteps.parse(text)


def test_what_cannot_be_watched_is_refused_before_anything_is_made(run, monkeypatch):
    run, _ = run
    data = load(run.config.data)
    with pytest.raises(ValueError, match="evaluate_every 1 needs held-out batches"):
        run.train(data)
    with pytest.raises(ValueError, match="profile must name steps of the run, which has 9, got 9:10"):
        train(run, profile=ProfiledSteps(9, 10))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tensorboardX: pip install 'dsa-jax\[tensorboard\]'"):
        train(run, tensorboard=True)
    with pytest.raises(ValueError, match="keep_best needs held-out losses to choose by"):
        dataclasses.replace(run.config, evaluate_every=0)
    with pytest.raises(ValueError, match="evaluate_every must be at least 0, got -1"):
        dataclasses.replace(run.config, evaluate_every=-1)
    assert not run.folder.exists()


def test_a_damaged_best_json_is_named(tmp_path):
    (tmp_path / "best.json").write_text("[]")
    with pytest.raises(ValueError, match="best.json must have the fields step, phase, held_out_loss"):
        read_best(tmp_path)


def test_a_phase_is_measured_as_its_indexer_needs(run):
    """WARMUP trains the indexer alone, which dense attention does not show."""
    run, measured = run
    windowed = dataclasses.replace(SPARSE, trains=("backbone",), selection=window_selection)
    adamw, base = OptimizerSettings(1e-3), run.config.phases[0]
    phases = tuple(
        dataclasses.replace(base, phase=phase, indexer=adamw, backbone=adamw) for phase in (BASE, WARMUP, windowed)
    )
    train(dataclasses.replace(run, config=dataclasses.replace(run.config, phases=phases)))
    assert [tuple(each[1:]) for each in measured[::3]] == [
        ("dense", None),
        ("sparse", None),
        ("sparse", window_selection),
    ]


class Mixture:
    """Tells of two sources, of which the first has 64 tokens and gives a quarter of the rows."""

    def progress(self, rows, *, seq_len):
        return {"code": (rows * seq_len / 4, rows * seq_len / 4 / 64), "books": (rows * seq_len * 3 / 4, 0.0)}


def test_sources_are_counted_over_the_stages_of_a_run(run):
    config = dataclasses.replace(run[0].config, **dict(EVALUATION, evaluate_every=0, keep_best=False))
    base = dataclasses.replace(config.phases[0], stages=(Stage(2, 4, 16), Stage(1, 2, 8)))
    config = dataclasses.replace(config, phases=(base, *config.phases[1:]))
    assert drawn(config, 2, Mixture())["code"] == (32, 0.5)
    assert drawn(config, 4, Mixture()) == {"code": (44, 0.6875), "books": (132, 0.0)}


def test_the_first_and_last_lines_of_a_run(run):
    run, _ = run
    console = Console(record=True, width=40)
    experiment = Experiment("mine", run.folder, (run,), load(run.config.data), evaluate=False)
    assert experiment.run(console) is None
    text = console.export_text()
    shown = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    corpus = load(run.config.data)
    assert shown["training text"] == f"{len(corpus.train.tokens):,} tokens in 1 files"
    assert shown["epochs"] == f"{288 / len(corpus.train.tokens):.3g} of text"
    assert shown["devices"] == "one" and "MiB a device of parameters" in shown["memory"]
    kept = "saved every 100 steps and behind each phase, the newest 1 and the best kept; measured every 1 steps"
    assert shown["folder"] == f"{run.folder}, {kept}"
    assert shown["Run"] == f"{run.folder}: step 9 of 9, 0 tokens, lm_loss 0.3333, held_out_loss 1.5000"
    assert shown["Best of SPARSE"] == f"held-out loss 1.5000, {run.folder}/checkpoints/7"
    assert list(shown).index("folder") < list(shown).index("Run") and "goal" not in text


def test_planned_memory_is_the_phases_that_takes_most(run, monkeypatch):
    run, _ = run
    shape = {"data": 1, "context": 1, "expert": 1, "tensor": 1}
    state = describe_memory(run, shape, activations=False)
    assert state.endswith("MiB a device of parameters, gradients and optimizer state in SPARSE, by the plan")
    needed = {"BASE": 2**30, "WARMUP": 3 * 2**30, "SPARSE": 2**29}
    plan = lambda job, shape: type("Plan", (), {"bytes_needed": needed[job.settings.name]})
    monkeypatch.setattr(planner, "make_plan", plan)
    assert describe_memory(run, shape, activations=True) == "3.0 GiB a device in WARMUP, by the plan"
    assert "epochs" in opening(run, load(run.config.data))
