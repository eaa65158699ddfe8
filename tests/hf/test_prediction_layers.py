"""Checkpoints with prediction layers: read by their published names, written again, left out, and their copies."""

import dataclasses
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from convert_cases import BFLOAT16, FP8_CONFIG, SMALL, random_tensors, read, refused, same, to_fp8, write
from flax import nnx

from dsa_jax import Config, Transformer
from dsa_jax.__main__ import main
from dsa_jax.hf.convert import convert_hf, load_hf, save_hf, to_hf

CONFIG = dataclasses.replace(SMALL, num_nextn_predict_layers=1)
PLAIN = dataclasses.replace(SMALL, num_nextn_predict_layers=0)
# As DeepSeek-V3 and GLM-5 publish layer L of L layers: beside the parts of a decoder layer with experts, these.
OWN = {"enorm": (160,), "hnorm": (160,), "eh_proj": (160, 320), "shared_head.norm": (160,)}
COPIES = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}


def copies(tensors):
    return {f"model.layers.2.{name}.weight": tensors[own].copy() for name, own in COPIES.items()}


def test_the_published_names_hold_the_parameters(tmp_path):
    """A matrix [D, 2D] whose first columns are the embedding's, and a decoder layer under the same number."""
    tensors = random_tensors(PLAIN, np.float32)
    rng = np.random.default_rng(1)
    tensors |= {f"model.layers.2.{name}.weight": rng.normal(size=shape) for name, shape in OWN.items()}
    other = {name: x for name, x in tensors.items() if name.startswith("model.layers.1.")}
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in other
    tensors |= {name.replace(".1.", ".2.", 1): rng.normal(size=x.shape) for name, x in other.items()}
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    model = load_hf(write(tmp_path / "hf", tensors | copies(tensors), PLAIN, keys=dict(num_nextn_predict_layers=1)))
    assert model.config == dataclasses.replace(CONFIG, dtype="float32")
    layer, of = model.prediction_layers, lambda name: tensors[f"model.layers.2.{name}"]
    np.testing.assert_array_equal(layer.eh_proj[0], of("eh_proj.weight").T)
    np.testing.assert_array_equal(layer.norm.weight[0], of("shared_head.norm.weight"))
    np.testing.assert_array_equal(layer.enorm.weight[0], of("enorm.weight"))
    np.testing.assert_array_equal(layer.hnorm.weight[0], of("hnorm.weight"))
    np.testing.assert_array_equal(layer.self_attn.indexer.wk[0], of("self_attn.indexer.wk.weight").T)
    np.testing.assert_array_equal(layer.mlp.experts.down_proj[0, 3], of("mlp.experts.3.down_proj.weight").T)
    save_hf(model, tmp_path / "out")
    same(read(tmp_path / "out"), tensors)  # without the copies


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(num_nextn_predict_layers=2), marks=pytest.mark.variants),
        dict(index_rope_interleave=True, indexer_types=("full", "shared")),
        pytest.param(dict(first_k_dense_replace=2, tie_word_embeddings=True), marks=pytest.mark.variants),
    ],
    ids=["two of them", "glm, a shared selection before", "no experts, tied"],
)
def test_what_is_read_is_written_again(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    tensors = random_tensors(config)
    source = write(tmp_path / "hf", tensors, config)
    model = load_hf(source)
    assert model.config == dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    save_hf(model, tmp_path / "saved")
    convert_hf(source, tmp_path / "converted")
    for folder in ("saved", "converted"):
        same(read(tmp_path / folder), tensors)
        assert Config.from_hf(tmp_path / folder).num_nextn_predict_layers == config.num_nextn_predict_layers
    assert [name for name, _ in to_hf(nnx.state(model), config=config)] == [name for name, _ in to_hf(model)]


def test_fp8_is_multiplied_out(tmp_path):
    stored, expected = to_fp8(random_tensors(CONFIG), np.float32)
    assert "model.layers.2.eh_proj.weight_scale_inv" in stored
    save_hf(load_hf(write(tmp_path / "hf", stored, CONFIG, keys=FP8_CONFIG)), tmp_path / "out")
    same(read(tmp_path / "out"), expected)


def test_they_may_be_left_out_and_that_is_said(tmp_path, caplog):
    tensors = random_tensors(CONFIG)
    source = write(tmp_path / "hf", tensors | copies(tensors), CONFIG)
    count = sum(name.startswith("model.layers.2.") for name in tensors) + 2
    left = {name: x for name, x in tensors.items() if not name.startswith("model.layers.2.")}
    ways = (
        lambda: load_hf(source, prediction_layers=False),
        lambda: load_hf(source, config=PLAIN),
    )
    for way in ways:
        caplog.clear()
        model = way()
        assert model.prediction_layers is None and model.config.num_nextn_predict_layers == 0
        assert f"skipped {count} tensors of layer 2, past num_hidden_layers = 2" in caplog.text
    caplog.clear()
    main(["convert", str(source), str(tmp_path / "out"), "--no-prediction-layers"])
    assert f"skipped {count} tensors" in caplog.text and Config.from_hf(tmp_path / "out").num_nextn_predict_layers == 0
    same(read(tmp_path / "out"), left)


def test_copies_are_compared(tmp_path, caplog):
    """Equal ones say nothing; of one that differs the model's own is used, and that is said."""
    tensors = random_tensors(CONFIG)
    with caplog.at_level(logging.WARNING):
        load_hf(write(tmp_path / "hf", tensors | copies(tensors), CONFIG))
        assert not caplog.records
        other = copies(tensors)
        other["model.layers.2.shared_head.head.weight"][0, 0] += 1
        model = load_hf(write(tmp_path / "hf", tensors | other, CONFIG))
    assert [record.getMessage() for record in caplog.records] == [
        "model.layers.2.shared_head.head.weight differs from lm_head.weight, which is used in its place"
    ]
    np.testing.assert_array_equal(model.lm_head, tensors["lm_head.weight"].T)


def test_files_without_them_are_taken_for_a_model_without_them(tmp_path, caplog):
    """As transformers writes: config.json still counts one."""
    source = write(tmp_path / "hf", random_tensors(PLAIN), CONFIG)
    for model in (load_hf(source), load_hf(source, config=dataclasses.replace(CONFIG, dtype="bfloat16"))):
        assert model.config.num_nextn_predict_layers == 0 and model.prediction_layers is None
    assert "num_nextn_predict_layers = 1, of which the files hold nothing: taken for 0" in caplog.text


def test_a_missing_part_is_named(tmp_path):
    tensors = random_tensors(CONFIG)
    del tensors["model.layers.2.eh_proj.weight"]
    assert "model.layers.2.eh_proj.weight is missing" in refused(write(tmp_path / "hf", tensors, CONFIG))


def test_of_a_dense_checkpoint_they_get_an_indexer_too(tmp_path):
    tensors = {name: x for name, x in random_tensors(CONFIG).items() if ".indexer." not in name}
    model = load_hf(write(tmp_path / "hf", tensors, CONFIG, keys=dict(model_type="deepseek_v3")), seed=3)
    wk = np.asarray(model.prediction_layers.self_attn.indexer.wk[...], np.float32)
    assert wk.shape == (1, 160, 32) and 0.5 < wk.std() / CONFIG.initializer_range < 1.5
    same({"eh": np.asarray(model.prediction_layers.eh_proj[0].T)}, {"eh": tensors["model.layers.2.eh_proj.weight"]})
    assert tensors["model.layers.2.eh_proj.weight"].dtype == BFLOAT16


@pytest.mark.slow
def test_a_model_draws_the_same_with_them_and_without():
    """One seed, one backbone."""
    small = dict(num_hidden_layers=1, first_k_dense_replace=1, hidden_size=16, vocab_size=8)
    draw = lambda count: Transformer(Config.tiny(**small, num_nextn_predict_layers=count), rngs=nnx.Rngs(0))
    assert jnp.array_equal(draw(0).lm_head[...], draw(1).lm_head[...])


def test_info_counts_them_apart(tmp_path, capsys):
    tensors = random_tensors(CONFIG)
    main(["info", str(write(tmp_path / "hf", tensors, CONFIG))])
    count = sum(name.startswith("model.layers.2.") for name in tensors)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "prediction layers" in line]
    assert f" {count} " in line
