"""The study from one command: its runs, as they are set, and as they are trained in small."""

import dataclasses
import json

import numpy as np
import pytest
from needle_cases import write_packages

from studies.needle import ablations, settings
from studies.needle.__main__ import main
from studies.needle.found import Found
from train.settings import RunConfig, Stage


@pytest.mark.parametrize("name", settings.PRESETS)
def test_presets_bring_their_rates_down_in_their_last_stages(name, tmp_path):
    preset = settings.PRESETS[name]()
    config = settings.make_config(preset, tmp_path)
    for phase in config.phases:
        assert phase.rate_scale is not None
        assert np.asarray(phase.rate_scale(phase.steps - 1)).item() == pytest.approx(phase.stages[-1].rates[1])
    values = config.to_json()
    assert json.loads(json.dumps(values)) == values
    assert max(stage.seq_len for stage in preset.sparse) >= 32 * config.model.index_topk
    assert max(stage.seq_len for stage in preset.base) == config.model.max_position_embeddings
    assert isinstance(config, RunConfig)


def test_a_k_that_chooses_nothing_is_refused(tmp_path):
    preset = settings.small()
    wide = dataclasses.replace(preset, model=preset.model | {"index_topk": 2048})
    with pytest.raises(ValueError, match="K must be below the 2048 tokens .* got 2048"):
        settings.make_config(wide, tmp_path)


def miniature():
    """Has steps and sizes of seconds."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, first_k_dense_replace=0, index_topk=16)
    sizes |= dict(max_position_embeddings=512)
    return dataclasses.replace(
        settings.small(),
        model=settings.small().model | sizes,
        base=(Stage(2, 2, 128), Stage(1, 1, 512)),
        warmup=(Stage(2, 1, 512),),
        sparse=(Stage(2, 1, 512, rates=(1.0, 0.5)),),
        vocabulary=512,
        lengths=(512,),
        questions=1,
        loss_rows=1,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_hurry")
def test_it_trains_measures_and_reports_in_pieces(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(settings.PRESETS, "small", miniature)
    text = write_packages(tmp_path / "text", packages=12)
    out = tmp_path / "out"
    common = ["--no-controls", "--preset", "small", "--out", str(out), "--data", text]
    assert main([*common, "--stop-after", "1s"]) == 75  # in its first steps, or behind them
    assert not (out / "report.md").exists()
    assert main(common) == 2
    assert "resume" in capsys.readouterr().err
    assert main([*common, "--resume"]) == 0
    report = (out / "report.md").read_text()
    assert "digits of answers" in report and "needles are not learnt" in report
    found = Found.load(out / "seed0.json")
    assert {"BASE, dense", "WARMUP, sparse", "SPARSE, sparse"} <= found.losses.keys()
    assert all(np.isfinite(each["answers"]) for each in found.losses.values())
    assert "positions 256 to 511" in found.losses["SPARSE, sparse"]
    assert set(found.answers.cells) >= {"BASE, dense", "SPARSE, sparse", "SPARSE, oracle top-K"}
    rows = [row for rows in found.answers.cells.values() for row in rows.values()]
    assert all(len(cells) == 8 for row in rows for cells in row.values())
    assert found.generated["generated"].asked == found.generated["forward"].asked == 8
    assert np.shape(found.curves["SPARSE"]["kl_layers"]) == (2, 1) and 0 <= found.waited < 1
    # The dense model that was kept begins rows of the table of changes.
    rows = ["--base", str(out / "base0"), "--corpus", str(out / "corpus"), "--preset", "small"]
    assert ablations.main([*rows, "--only", "default", "wrong_rope", "--out", str(out / "rows")]) == 0
    made = json.loads((out / "rows" / "ablations.json").read_text())["rows"]
    assert list(made) == ["dense", "default", "wrong_rope"] and made["default"]["kept"]["oracle"] > 0
    assert made["default"]["losses"]["text"] != made["wrong_rope"]["losses"]["text"]


def test_text_too_short_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    text = write_packages(tmp_path / "text", packages=12, files=1)
    preset = dataclasses.replace(settings.small(), vocabulary=512, base=(Stage(1, 1, 2**17),))
    preset = dataclasses.replace(preset, model=preset.model | {"max_position_embeddings": 2**17})
    monkeypatch.setitem(settings.PRESETS, "small", lambda: preset)
    assert main(["--preset", "small", "--out", str(tmp_path / "out"), "--data", text]) == 2
    error = capsys.readouterr().err
    assert "the train text must have a document of at least 131073 tokens" in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "seed0").exists()
