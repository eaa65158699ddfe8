"""The command `python -m train evaluate`: what it finds in a folder, measures, prints and refuses."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import pytest
from train_cases import fake_step, one_layer_run, small_params

from dsa_jax import save_hf
from train.__main__ import main
from train.commands import evaluate as evaluate_command
from train.commands.evaluate import Arguments
from train.data import DataConfig, load, load_whole
from train.evaluation.evaluate import held_out_losses
from train.evaluation.held_out import HeldOut, draw_batches
from train.evaluation.subject import find_subject
from train.phases import merge_groups
from train.run import Run
from train.saved.checkpoint import checkpoint_steps

pytestmark = pytest.mark.usefixtures("in_a_hurry")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains a run by made-up steps, each of which adds one to every parameter."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.make_step", fake_step(None))
        patch.setattr(Run, "initial_params", lambda self: jax.tree.map(jnp.array, small_params(self.config.model)))
        run = Run(one_layer_run(folder / "text"), folder / "out")
        run.train(load(run.config.data))
    return run


def refused(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 900, error
    return error


@pytest.mark.slow
def test_a_run_is_measured_after_each_phase(run, capsys, tmp_path):
    out = tmp_path / "numbers.json"
    assert main(["evaluate", str(run.folder), "--batches", "3", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert list(found["losses"]) == ["after BASE", "after WARMUP", "after SPARSE"]
    batches = draw_batches(load(run.config.data), 3, 2, 16)
    for phase in ("BASE", "SPARSE"):
        for attention in ("dense", "sparse"):
            held_out = HeldOut({"text": batches})
            want = held_out_losses(run.graphdef, run.params_after(phase), held_out, attention=attention)
            assert found["losses"][f"after {phase}"][attention]["text"] == pytest.approx(want["text"], rel=1e-5)
    assert found["selections"]["indexer"] == found["losses"]["after SPARSE"]["sparse"]
    assert [*found["selections"]["dense"]][:2] == ["text", "positions 0 to 0"]
    assert set(found["kept"]["mass"]["text"]) == {"indexer", "warmed", "oracle", "window", "random"}
    assert found["text"]["targets"] == 96 and found["text"]["seq_len"] == 16
    printed = capsys.readouterr().out
    for text in ("96 targets in 6 sequences of 16 tokens", "after WARMUP, sparse", "8 to 15", "trained indexer"):
        assert text in printed, text
    assert f"{found['losses']['after BASE']['dense']['text']:.3f}" in printed


def test_what_is_measured_in_a_folder(run, tmp_path):
    steps = checkpoint_steps(run.folder)
    assert steps == [3, 6, 8, 9]
    subject = find_subject(run.folder)
    assert list(subject.weights) == ["after BASE", "after WARMUP", "after SPARSE"]
    assert (subject.seq_len, subject.batch_size, subject.data_config()) == (16, 2, run.config.data)
    chex.assert_trees_all_equal(subject.weights["after WARMUP"](None), run.params_after("WARMUP"))
    (label,) = (one := find_subject(run.folder / "checkpoints" / "8")).weights
    assert label == "step 8" and one.warmed is not None
    assert find_subject(run.folder / "checkpoints" / "6").warmed is None  # it is the one that is measured
    best = {"step": 8, "phase": "SPARSE", "held_out_loss": 1.0}
    (run.folder / "best.json").write_text(json.dumps(best))
    try:
        names = [*find_subject(run.folder).weights]
    finally:
        (run.folder / "best.json").unlink()
    assert names == ["after BASE", "after WARMUP", "best of SPARSE, step 8", "after SPARSE"]


@pytest.mark.slow
def test_a_hugging_face_folder_is_measured(run, tmp_path):
    model = merge_groups(run.graphdef, run.params_after("SPARSE"))
    save_hf(model, tmp_path / "hf")
    subject = find_subject(tmp_path / "hf")
    assert (subject.seq_len, subject.batch_size, subject.tokenizer) == (64, 1, None)
    (read,) = subject.weights.values()
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), run.params_after("SPARSE")["indexer"])
    chex.assert_trees_all_close(jax.tree.map(lambda x: x.astype(jnp.bfloat16), read(None)["indexer"]), want)
    with pytest.raises(ValueError, match="text must be given by --data: a Hugging Face folder"):
        subject.data_config()


def test_other_text_is_measured_whole_by_the_runs_tokenizer(run, tmp_path):
    (tmp_path / "one.txt").write_text("x" * 100)
    arguments = Arguments(run.folder, data=(f"{tmp_path}/*.txt",), append=False, max_bytes=1000)
    subject = find_subject(run.folder)
    assert arguments.data_config(subject) == DataConfig(arguments.data, append=False, max_bytes=1000)
    corpus = arguments.load(subject)
    assert (corpus.tokens("held_out"), corpus.tokens("train")) == (100, 0)
    with_tokenizer = dataclasses.replace(subject, tokenizer=tmp_path / "tokenizer.json")
    assert arguments.data_config(with_tokenizer).tokenizer == tmp_path / "tokenizer.json"
    own = dataclasses.replace(subject, data={"recall": 0.5})
    with pytest.raises(ValueError, match="by --data: the run had data of its own: run.data has unknown fields"):
        own.data_config()
    assert arguments.data_config(own).data == arguments.data
    (tmp_path / "one.txt").write_text("")
    with pytest.raises(ValueError, match="files that are not empty, got 0 within max_bytes"):
        load_whole(arguments.data_config(subject))


def test_what_is_refused(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate_command, "measure_selections", lambda *_, **__: pytest.fail("was not refused"))
    monkeypatch.setattr(evaluate_command, "held_out_losses", lambda *_, **__: pytest.fail("was not refused"))
    cases = {
        "got [3, 6, 8, 9]": (run.folder / "checkpoints" / "7",),
        "evaluate needs a run's folder (with a run.json)": (tmp_path,),
        "batches must be at least 1, got 0": (run.folder, "--batches", 0),
        "batch_size must be at least 1, got 0": (run.folder, "--batch-size", 0),
        "seq_len must be at most 64, got 65": (run.folder, "--seq-len", 65),
        "nearest: data=8": (run.folder, "--mesh", "data=3"),
        "tensor=8 must divide num_attention_heads": (run.folder, "--mesh", "tensor=8"),
        "json must be a file in a folder that exists": (run.folder, "--json", tmp_path / "none" / "x.json"),
        "which matches none": (run.folder, "--data", tmp_path / "*.txt"),
        "unknown arguments: --colour": (run.folder, "--colour", "blue"),
    }
    for message, arguments in cases.items():
        assert message in refused(capsys, *arguments), message
    (tmp_path / "short.txt").write_text("x" * 16)
    assert "the held_out text has 16" in refused(capsys, run.folder, "--data", tmp_path / "short.txt")


@pytest.mark.parametrize("phases", [None, [], [{}], [{"name": "BASE", "stages": [{"steps": 0}]}]])
def test_a_damaged_run_json_is_named(run, capsys, tmp_path, phases):
    values = json.loads((run.folder / "run.json").read_text())
    values["run"]["phases"] = phases
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert "run" in refused(capsys, tmp_path)
