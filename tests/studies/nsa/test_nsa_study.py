"""The study of Native Sparse Attention: its runs as they are set, the conversion, and all of it in small."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from flax import nnx
from model_cases import small_config, small_model
from needle_cases import write_packages

from dsa_jax import KeyRange, NSASizes
from studies.nsa import report, settings
from studies.nsa.__main__ import main
from studies.nsa.conversion import GATES, FromDense, from_dense
from studies.nsa.settings import DENSE, SPARSE_START, VARIANTS, make_config
from train.phases import merge_groups, split_groups
from train.settings import PhaseSettings, RunConfig, Stage
from train.state import abstract_params


@pytest.mark.parametrize("preset", settings.PRESETS)
def test_all_variants_see_the_same_rows(preset, tmp_path):
    made = settings.PRESETS[preset]()
    runs = {name: make_config(made, name, tmp_path, seed=3) for name in VARIANTS}
    dense = runs[DENSE]
    assert [phase.name for phase in dense.phases] == ["BASE", "DENSE_CONTROL"]
    for name, run in runs.items():
        variant, rows = VARIANTS[name], [each for each in run.phases if each.name != "WARMUP"]
        assert run.seed == 3 and run.model == dataclasses.replace(dense.model, baseline=variant.baseline)
        assert [each.stages for each in rows] == [each.stages for each in dense.phases[-len(rows) :]]
        assert [each.phase.stream for each in rows] == [each.phase.stream for each in dense.phases[-len(rows) :]]
        assert len(rows) == 1 + (variant.first is not None) and variant.says.endswith(".")
        assert (len(run.phases) > len(rows)) == variant.warmed
        assert json.loads(json.dumps(run.to_json())) == run.to_json()
    assert settings.TIMED[preset]


def test_a_model_without_an_indexer_is_not_trained_as_if_it_had_one(tmp_path):
    run = make_config(settings.small(), "nsa", tmp_path, seed=0)
    dense = make_config(settings.small(), DENSE, tmp_path, seed=0)
    for phases in (dense.phases, make_config(settings.small(), "dsa_start", tmp_path, seed=0).phases):
        with pytest.raises(ValueError, match=f"^a model of baseline 'nsa' has no indexer .* got {phases[0].name}$"):
            dataclasses.replace(run, phases=phases)
    assert SPARSE_START.name == "SPARSE_START" and isinstance(run, RunConfig)
    assert all(isinstance(phase, PhaseSettings) for phase in run.phases)


CONFIG = small_config(first_k_dense_replace=2, nsa=NSASizes(compression=4, stride=2, block=8, blocks=4, window=24))
NATIVE = dataclasses.replace(CONFIG, baseline="nsa")


@pytest.mark.usefixtures("in_a_hurry")
def test_a_converted_model_begins_as_the_dense_one():
    """Where all keys are selected, and the gates are open for the selected blocks alone."""
    dense, fresh = (split_groups(small_model(config))[1] for config in (CONFIG, NATIVE))
    converted = from_dense(dense, fresh)
    layers = converted["backbone"]["dense_layers"]["self_attn"]
    np.testing.assert_array_equal(layers["branch_bias"], np.broadcast_to(GATES, layers["branch_bias"].shape))
    np.testing.assert_array_equal(layers["window"]["kv_b_proj"], layers["kv_b_proj"])
    assert jax.tree.structure(converted) == jax.tree.structure(abstract_params(NATIVE)[1])
    layers["branch_bias"] = jnp.broadcast_to(jnp.array([-50.0, 50.0, -50.0]), layers["branch_bias"].shape)
    x, angle, keys = normal(0, 2, 24, CONFIG.hidden_size), jnp.zeros((2, 24, 4)), KeyRange.causal(2, 24)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def attend(graph, state, attention):
        layer = next(nnx.merge(graph, state).layers()).self_attn
        return layer(x, (angle + 1, angle), keys, attention=attention, return_indexer_kl=False).x

    native = nnx.split(merge_groups(abstract_params(NATIVE)[0], converted))
    found, expected = attend(*native, "sparse"), attend(*nnx.split(small_model(CONFIG)), "dense")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_other_weights_than_dense_ones_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="baseline 'nsa' has parameters that no other attention has: .* got 'none'"):
        super(FromDense, FromDense(tmp_path)).params(NATIVE)


def found(seed=0, loss=2.0, **changes):
    """Makes up what was measured of a seed: the dense model and one that lies 10 % behind."""

    def variant(factor, right):
        losses = {"text": loss * factor, "positions 0 to 511": loss * factor, "needles": 1.0, "answers": factor}
        return {
            "setup": {"model": "1,000 parameters, 2 layers", "BASE": "3 steps", "NATIVE": "3 steps"},
            "losses": losses,
            "answers": {"1": {"512": [[right, 4]] * 8}},
            "curves": {"BASE": {"step": [1, 2], "lm_loss": [3.0, 2.0]}},
            "seconds": {"BASE": 3.0},
            "circumstances": {"date": "2026-11-30", "device": "cpu", "jax": "0.11.2"},
        }

    rows = [
        {"work": work, "attention": name, "length": 256, "seconds": 0.5, "temporary_gib": 1.0}
        for work in ("forward", "step", "decode")
        for name in (DENSE, "nsa")
    ]
    sizes = dataclasses.asdict(NSASizes()) | {"K": 64}
    corpus = {"tokenizer": "0123", "tokens": {"train": 5000, "held_out": 100}}
    made = {"seed": seed, "preset": "small", "corpus": corpus, "sizes": sizes, "timing": rows}
    return made | {"variants": {DENSE: variant(1.0, 4), "nsa": variant(1.1, 1)}} | changes


def test_the_report_sets_the_variants_beside_the_dense_model(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"seed{seed}.json").write_text(report.to_json(found(seed, 2.0 + seed)))
    paths = [str(tmp_path / f"seed{seed}.json") for seed in (1, 0)]
    assert report.main([*paths, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| positions 0–511 | 2.500 (2.000, 3.000) | 10.00 (10.00, 10.00) % |" in text
    assert "| nsa | 1 | 25.0% (16%–37%) |" in text and "Seeds 0, 1; preset `small`" in text
    assert "needles are not learnt" in text and "| forward pass, ms | nsa | 500 |" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.md", "answers.png", "gaps.png", "curves.png", "timing.png"}
    short = report.summary([found()])
    assert "| `nsa` | 25.0% of 32 |" in short and "| all text | 2.000 | 10.00 % |" in short


def test_the_cache_of_a_token():
    """In two layers, 68 bytes of a latent: 32 of e4m3, a scale and 16 rotary numbers of bfloat16; 36 of an index key.

    NSA has an entry more for every 8 latents, the window 64 of 512 latents.
    """
    text = report.summary([found()])
    for row in ("`dense` | 208 | 136", "`dsa` | 208 | 208", "`nsa` | 153 | 153", "`window` | 208 | 17"):
        assert f"| {row} |" in text


def test_what_does_not_fit_together_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="at least one seed, and each once, got \\[0, 0\\]"):
        report.check_alike([found(), found()])
    with pytest.raises(ValueError, match="one corpus, seeds 0 and 1 differ"):
        report.check_alike([found(), found(1, corpus={"tokens": {}})])
    with pytest.raises(ValueError, match="the same variants, got \\['dense'\\]"):
        report.check_alike([found(), found(1, variants={DENSE: {}})])
    (tmp_path / "seed0.json").write_text("{}")
    assert report.main([str(tmp_path / "seed0.json"), "--out", str(tmp_path)]) == 2
    assert "seed0.json must hold what was measured of a seed" in capsys.readouterr().err


def test_without_a_record_the_page_says_so():
    assert report.summary([]) == "No figures are recorded yet."


def miniature():
    """Has steps and sizes of seconds."""
    made = settings.small()
    sizes = dict(hidden_size=32, num_hidden_layers=1, index_topk=16, max_position_embeddings=256)
    stage = Stage(2, 1, 256)
    return dataclasses.replace(
        made, model=made.model | sizes, vocabulary=512, base=(stage,), warmup=(stage,), sparse=(stage,), lengths=(256,)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_hurry")
def test_it_trains_measures_and_reports_in_pieces(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(settings.PRESETS, "small", miniature)
    text = write_packages(tmp_path / "text", packages=12)
    out = tmp_path / "out"
    common = ["--preset", "small", "--out", str(out), "--data", text, "--no-timing", "--only", "nsa_converted", "dsa"]
    assert main([*common, "--stop-after", "1s"]) == 75  # wherever it is by then
    assert not (out / "report.md").exists()
    (out / "seed0").mkdir(exist_ok=True)
    assert main(common) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*common, "--resume"]) == 0
    made = report.load(out / "seed0.json")
    assert list(made["variants"]) == ["dense", "dsa", "nsa_converted"] and made["timing"] == []
    for own in made["variants"].values():
        assert all(np.isfinite(each) for each in own["losses"].values())
        assert [asked for _, asked in own["answers"]["1"]["256"]] == [2] * 8  # all depths, in a batch of rows
    assert list(made["variants"]["dsa"]["curves"]) == ["WARMUP", "SPARSE"]
    converted, dense = (made["variants"][name]["curves"] for name in ("nsa_converted", "dense"))
    # It begins with the dense model's weights, over the same rows.
    assert converted["NATIVE_LONG"]["lm_loss"][0] == pytest.approx(dense["DENSE_CONTROL"]["lm_loss"][0], abs=0.3)
    assert "Native Sparse Attention" in (out / "report.md").read_text()
