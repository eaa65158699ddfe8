"""The command: what it refuses and how, what it leaves behind, and a small run from beginning to report."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import (
    fake_step,
    one_layer_run,
    small_batch,
    small_config,
    small_params,
    small_run,
    state_of,
    write_preset,
)

from dsa_jax.hf.convert import save_hf
from train.__main__ import main
from train.commands.arguments import Arguments
from train.commands.describe import describe_run
from train.data import load
from train.experiment import control_run, seed_runs
from train.phases import CONTROLS, merge_groups, split_groups
from train.run import DivergedError, Run, check_tokens, load_model
from train.saved.changes import Position
from train.saved.checkpoint import Checkpoints
from train.saved.folder import checkpoint_steps
from train.saved.initial import InitialParams
from train.state import abstract_params
from train.watching.metrics import MetricsLog


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path / "text")


@pytest.fixture
def preset(run, tmp_path):
    return str(write_preset(run, tmp_path / "small.json"))


def refused(capsys, *arguments):
    """Reads the one line that the command leaves on stderr when it refuses."""
    assert main([str(argument) for argument in arguments]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("error: ") and streams.err.count("\n") == 1, streams.err
    assert "Traceback" not in streams.err + streams.out
    return streams.err


def changed(run, path, **changes):
    """Writes a preset of the run with other numbers in its model and its stages."""
    values = run.to_json()
    values["model"].update(changes.pop("model", {}))
    for phase in values["phases"]:
        for stage in phase["stages"]:
            stage.update(changes)
    path.write_text(json.dumps(values))
    return path


def test_unknown_arguments(capsys, tmp_path):
    assert "--colour blue" in refused(capsys, "--out", tmp_path / "out", "--colour", "blue")
    with pytest.raises(SystemExit) as stop:
        main(["--phases", "COOLDOWN"])
    assert stop.value.code == 2
    assert not (tmp_path / "out").exists()


def test_bad_presets(capsys, run, tmp_path):
    assert "preset must be tiny or sft or deepseek_v32" in refused(capsys, "--preset", "huge")
    cases = {
        "index_topk must be at least 1, got 0": dict(model={"index_topk": 0}),
        "max_position_embeddings 64, got 128": dict(seq_len=128),
        "vocab_size must be at least 256 when bytes are the tokens, got 100": dict(model={"vocab_size": 100}),
    }
    for message, changes in cases.items():
        path = changed(run, tmp_path / "bad.json", **changes)
        assert message in refused(capsys, "--preset", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_data(capsys, preset, tmp_path):
    out = tmp_path / "out"
    assert "matches none" in refused(capsys, "--preset", preset, "--data", tmp_path / "*.py", "--out", out)
    (tmp_path / "empty.txt").write_text("")
    assert "not empty" in refused(capsys, "--preset", preset, "--data", tmp_path / "empty.txt", "--out", out)
    assert "tokenizer" in refused(capsys, "--preset", preset, "--tokenizer", tmp_path / "empty.txt", "--out", out)
    assert not out.exists()


def test_bad_output_folders(capsys, preset, tmp_path):
    (tmp_path / "file").write_text("precious")
    refused(capsys, "--preset", preset, "--out", tmp_path / "file")
    refused(capsys, "--preset", preset, "--out", tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "precious"
    if sys.platform == "linux":
        assert "must be writable" in refused(capsys, "--preset", preset, "--out", "/proc/out")


def test_a_run_is_not_overwritten(capsys, run, preset, tmp_path):
    out = tmp_path / "out"
    Run(run, out).open(resume=False)
    before = (out / "run.json").read_text()
    assert "--resume continues it" in refused(capsys, "--preset", preset, "--out", out)
    other = changed(run, tmp_path / "other.json", model={"index_topk": 5}, batch_size=4)
    message = refused(capsys, "--preset", other, "--out", out, "--resume")
    assert "model.index_topk 4, here 5 (the model of a run stays)" in message and "batch_size" not in message
    assert (out / "run.json").read_text() == before


def test_bad_combinations(capsys, preset, tmp_path):
    common = "--preset", preset, "--out", tmp_path / "out"
    assert "give --init" in refused(capsys, *common, "--phases", "WARMUP", "SPARSE")
    assert "ends with SPARSE" in refused(capsys, *common, "--phases", "BASE", "--controls")
    assert "init must be a folder" in refused(capsys, *common, "--init", tmp_path)
    assert main(["--seeds", "0", "--out", str(tmp_path / "out")]) == 2
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--coordinator localhost --num-processes 1 --process-id 0",
            "HOST:PORT .*, got 'localhost'",
        ),
        ("--coordinator localhost: --num-processes 1 --process-id 0", "coordinator must be HOST:PORT"),
        ("--coordinator :1234 --num-processes 1 --process-id 0", "coordinator must be HOST:PORT"),
        ("--coordinator a:x --num-processes 1 --process-id 0", "coordinator must be HOST:PORT"),
        ("--coordinator a:65536 --num-processes 1 --process-id 0", "coordinator must be HOST:PORT"),
        ("--coordinator a:1 --num-processes 0 --process-id 0", "num_processes must be at least 1, got 0"),
        ("--coordinator a:1 --num-processes 2 --process-id -1", "process_id must be from 0 to num_processes - 1 = 1"),
    ],
)
def test_bad_processes(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("was not refused"))
    assert re.search(message, refused(capsys, "--distributed", *arguments.split()))


@pytest.mark.parametrize(
    "error", [KeyError("SLURM_NODELIST"), IndexError("list index"), TypeError("no int"), RuntimeError()]
)
def test_whatever_jax_raises_where_processes_join_is_one_line(capsys, monkeypatch, error):
    def initialize(*_, **__):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert f"did not come together: {type(error).__name__}" in refused(capsys, "--distributed")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {}, "model": {}}', "the key 'model' stands twice"),
        ('{"seed": NaN}', "NaN is no number of JSON"),
        ('{"seed": -Infinity}', "-Infinity is no number of JSON"),
        ('{"seed": %s}' % ("9" * 5000), "preset must be a readable JSON file"),
        ("[" * 100_000, "nests too deep"),
        ("[]", "run must be an object"),
        ("null", "run must be an object"),
        ('{"run": null}', "run must be an object"),
        ('{"%s": 1}' % ("x" * 5000), "run has unknown fields"),
        (json.dumps({str(i): 1 for i in range(3000)}), "run has unknown fields"),
    ],
)
def test_presets_that_are_no_runs(capsys, tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    error = refused(capsys, "--preset", tmp_path / "p.json", "--out", tmp_path / "out")
    assert message in error and len(error) < 1000


def test_a_damaged_run_json_is_named(capsys, preset, tmp_path):
    (tmp_path / "out").mkdir()
    for text in ("{}", "[]", "{", '{"run": []}', '{"run": {}, "changes": [{}]}', '{"run": {}, "init": 3}'):
        (tmp_path / "out" / "run.json").write_text(text)
        error = refused(capsys, "--preset", preset, "--out", tmp_path / "out", "--resume")
        assert "must hold the run.json of a run" in error
        with pytest.raises(ValueError, match="must hold the run.json of a run"):
            load_model(tmp_path / "out")


def test_a_metrics_file_of_anything_is_cut_where_it_is_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in ("[]", "3", '{"loss": 1}', '{"step": null}'):
        path.write_text('{"step": 1}\n' + line + "\n")
        with MetricsLog(path, keep=4):
            assert path.read_text() == '{"step": 1}\n'


def test_seeds_count_from_the_presets(run, tmp_path):
    configs = [each.config.seed for each in seed_runs(dataclasses.replace(run, seed=5), tmp_path / "out", 3)]
    assert configs == [5, 6, 7]
    with pytest.raises(ValueError, match="seeds must be at most 1000"):
        seed_runs(run, tmp_path / "out", 10**9)


def test_arguments_of_text_reach_the_data(run, tmp_path):
    preset = str(write_preset(run, tmp_path / "p.json"))
    assert Arguments(preset).run_config().data == run.data
    data = Arguments(preset, append=False, max_bytes=500).run_config().data
    assert (data.append, data.max_bytes) == (False, 500)
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        Arguments(preset, max_bytes=0).run_config()


def test_the_report_says_what_was_left_out(run):
    corpus = load(run.data)
    assert "text left out" not in describe_run(Run(run, "out"), corpus)
    corpus = dataclasses.replace(corpus, left_out=(3, 60_000))
    assert describe_run(Run(run, "out"), corpus)["text left out"] == "3 files of 60,000 bytes, past max_bytes"


@pytest.mark.parametrize(("name", "value"), [("tokens", 256), ("targets", -1)])
def test_token_ids_are_checked_on_the_host(name, value):
    batch = small_batch()
    check_tokens(batch, 256)
    getattr(batch, name)[1, 2] = value
    with pytest.raises(ValueError, match=f"{name} must be ids from 0 to 255, got {value}"):
        check_tokens(batch, 256)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("train.run.make_step", fake_step(("WARMUP", 3)))
    monkeypatch.setattr(Run, "initial_params", lambda self: jax.tree.map(jnp.array, small_params(self.config.model)))
    corpus, out = load(run.data), tmp_path / "out"
    with pytest.raises(DivergedError, match=r"loss is nan at step 6 \(step 3 of WARMUP\); .*checkpoints/4"):
        Run(run, out).train(corpus)
    assert checkpoint_steps(out) == [3, 4]
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    monkeypatch.setattr("train.run.make_step", fake_step(None))
    state = Run(run, out).train(corpus, resume=True)
    np.testing.assert_allclose(
        state.params["backbone"]["lm_head"] - small_params(run.model)["backbone"]["lm_head"], 9, 1e-5
    )
    assert [record["step"] for record in Run(run, out).records()] == list(range(1, 10))


FULL_DISK = """
import asyncio, resource, sys, threading
import jax, jax.numpy as jnp
import tensorstore
import train.run
from train.__main__ import main
from train_cases import fake_step, small_params

def make_step(graphdef, settings, **options):
    if settings.name == "WARMUP":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))
    return fake_step(None)(graphdef, settings)

train.run.make_step = make_step
train.run.Run.initial_params = lambda self: jax.tree.map(jnp.array, small_params(self.config.model))
status = main(sys.argv[1:])

async def abandon(write):
    task = asyncio.ensure_future(wait(write))
    await asyncio.sleep(0)

async def wait(write):
    await write

# What a failed save does at times: a write that ends after its event loop is closed, in another thread.
end, write = tensorstore.Promise.new()
loop = asyncio.new_event_loop()
loop.run_until_complete(abandon(write))
loop.close()
thread = threading.Thread(target=end.set_result, args=(None,))
thread.start()
thread.join()
sys.exit(status)
"""


def test_a_full_disk_is_said_in_one_line_and_the_last_checkpoint_stays(preset, tmp_path, environment):
    """Limits the size of files from the second phase on, which stands in for a full disk."""
    tests = Path(__file__).parents[2]
    paths = os.pathsep.join((str(tests), str(tests.parent)))
    command = [sys.executable, "-c", FULL_DISK, "--preset", preset, "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: "), ended.stderr
    *_, last = checkpoint_steps(tmp_path / "out")  # what is to be deleted may still be there
    assert (
        "could not be written" in ended.stderr
        and f"the last whole one: {tmp_path}/out/checkpoints/{last}" in ended.stderr
    )


def test_metrics_after_the_checkpoint_are_dropped_and_a_torn_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, 6)) + '{"step": 6, "lo')
    with MetricsLog(path, keep=4) as log:
        log.put(5, 0, "BASE", 1, {"loss": jnp.asarray(0.5)})
        assert len(path.read_text().splitlines()) == 4  # not read before a later step has started
        log.flush()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records[3:]] == [(4, 1.0), (5, 0.5)]


def test_a_run_begins_from_another_runs_checkpoint(run, tmp_path):
    state = state_of(run)
    source = tmp_path / "source"
    Run(run, source).open(resume=False)
    with Checkpoints(source / "checkpoints", run) as checkpoints:
        checkpoints.save(state, Position(2, 0, 2, {}))
    arguments = Arguments(str(write_preset(run, tmp_path / "p.json")), init=source, phases=("SPARSE", "WARMUP"))
    (begun,) = arguments.runs()
    assert [phase.name for phase in begun.config.phases] == ["WARMUP", "SPARSE"]
    chex.assert_trees_all_equal(begun.initial_params(), state.params)
    chex.assert_trees_all_equal(split_groups(load_model(source))[1], state.params)


def test_a_run_begins_from_a_hugging_face_folder(run, tmp_path):
    config = small_config(dtype="bfloat16", index_topk=3, initializer_range=0.02)  # others than the preset's
    model = merge_groups(abstract_params(config)[0], jax.tree.map(jnp.array, small_params(config)))
    save_hf(model, tmp_path / "hf")
    arguments = Arguments(str(write_preset(run, tmp_path / "p.json")), init=tmp_path / "hf", phases=("WARMUP",))
    (begun,) = arguments.runs()
    assert begun.config.model == run.model
    chex.assert_trees_all_equal(begun.initial_params(), small_params(config))


def test_controls_share_the_weights_and_batches_of_sparse(run, tmp_path):
    main_run = Run(run, tmp_path / "out")
    Run(run, tmp_path / "out").open(resume=False)
    for phase in CONTROLS:
        control = control_run(main_run, phase)
        assert control.config.steps == run.phases[-1].steps
        assert control.init == InitialParams(tmp_path / "out", 6, "step 6 of the run that it controls")


@pytest.mark.slow
def test_a_small_run_from_beginning_to_report(tmp_path, environment):
    """Through the command: three phases, both controls, evaluation, report and sample."""
    out = tmp_path / "out"
    preset = str(write_preset(one_layer_run(tmp_path / "text"), tmp_path / "small.json"))
    command = [sys.executable, "-m", "train", "--preset", preset, "--out", str(out), "--controls"]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert first.returncode == 0, first.stderr
    for text in (
        "BASE 3/3",
        "WARMUP 3/3",
        "SPARSE 3/3",
        "DENSE_CONTROL 3/3",
        "WINDOW_CONTROL 3/3",
        "tokens/s",
        " left",
    ):
        assert text in first.stdout, text
    assert "KL" in first.stdout and "sampled continuation" in first.stdout
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 10))
    assert {"loss", "lm_loss", "kl", "grad_norm_backbone", "grad_norm_indexer", "expert_imbalance", "tokens"} <= set(
        records[-1]
    )
    report = (out / "report.md").read_text()
    for text in ("# small\n", "DENSE_CONTROL", "WINDOW_CONTROL", "oracle", "untrained indexer", "last K keys"):
        assert text in report, text
    for text in ("goal", "missed", "recall", "mixture"):
        assert text not in report.lower() and text not in first.stdout.lower(), text
    assert {"run.json", "results.json", "checkpoints"} <= set(os.listdir(out))
