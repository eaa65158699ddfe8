"""The demo's command: what it refuses, and a small run of it from its arguments to the report."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from train_cases import fake_step, small_config, small_params, small_phases, write_documents

from dsa_jax import load_hf
from dsa_jax.inference.tokenizer import find_tokenizer
from studies.tiny.__main__ import Arguments, export, main, study
from studies.tiny.recall import RecallConfig
from studies.tiny.settings import make_config
from train.data import DataConfig
from train.presets import tiny
from train.run import Run
from train.settings import RunConfig, Stage

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def test_it_is_the_preset_with_episodes_in_half_of_the_rows():
    assert make_config() == dataclasses.replace(tiny(), data=RecallConfig(recall=0.5))
    assert type(tiny().data) is DataConfig


def test_bad_arguments(capsys, tmp_path):
    for arguments, message in (
        (("--colour", "blue"), "unknown arguments: --colour blue"),
        (("--seeds", "0"), "seeds must be at least 1, got 0"),
        (("--data", f"{tmp_path}/*.txt"), "which matches none"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run_is_reported_with_recall_and_goals(tmp_path, monkeypatch):
    """Its steps do nothing but count: training is tested elsewhere."""
    monkeypatch.setattr("train.run.make_step", fake_step(None))
    monkeypatch.setattr("train.experiment.max_rss", lambda: 2**30)  # this process has run other tests
    monkeypatch.setattr(Run, "initial_params", lambda self: jax.tree.map(jnp.array, small_params(self.config.model)))
    model = small_config(max_position_embeddings=256, num_hidden_layers=1, first_k_dense_replace=0)
    data = RecallConfig(data=(f"{write_documents(tmp_path)}/*.txt",))
    config = RunConfig(model, tuple(small_phases(Stage(2, 2, 160)).values()), data, evaluation_batches=1)
    console, out = Console(record=True, width=120), tmp_path / "out"
    study(Arguments(out=out), config, console)
    report, shown = (out / "report.md").read_text(), console.export_text()
    assert report.startswith("# tiny: goals met\n\n- Met: the run took")
    assert "| weights, attention | training's mixture | text | recall episodes | recall answers |" in report
    assert (out / "answers.png").exists() and "loss at recall answers" in shown and "A sampled continuation" in shown
    assert json.loads((out / "run.json").read_text())["run"]["data"]["recall"] == 0.5
    assert f"python -m dsa_jax chat {out / 'model'}" in shown.replace("\n", "")
    assert load_hf(out / "model").config.vocab_size == 256 and find_tokenizer(out / "model", 256) is not None
    assert export(Run(config, out)) == out / "model", "a run that is continued writes it anew"
    with pytest.raises(ValueError, match="already holds a run"):
        study(Arguments(out=out), config, Console(quiet=True))


def test_data_without_episodes_are_refused(tmp_path):
    with pytest.raises(TypeError, match="must be a RecallConfig, got DataConfig"):
        study(Arguments(out=tmp_path / "out"), tiny(), Console(quiet=True))
