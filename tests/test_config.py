"""The configuration: its checks and overrides; Hugging Face's spellings, absent keys, and what is refused."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from dsa_jax import Config, YaRN

ORACLE = Path(__file__).parent / "oracle"
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}


def deepseek(**keys):
    """Gives a `config.json` of DeepSeek-V3.2 with these keys."""
    return {"model_type": "deepseek_v32", "rope_theta": 10000, "rope_scaling": YARN, **keys}


def refused(data):
    """Gives the message of the error that `Config.from_hf` must raise."""
    with pytest.raises(ValueError) as caught:
        Config.from_hf(data)
    return str(caught.value)


def test_overrides_replace_fields():
    assert Config.tiny(index_topk=8) == dataclasses.replace(Config.tiny(), index_topk=8)
    assert Config.deepseek_v32(rope_scaling=None) == dataclasses.replace(Config(), rope_scaling=None)
    assert Config.deepseek_v32() == Config()


@pytest.mark.parametrize("make", [Config.tiny, Config.deepseek_v32])
def test_unknown_overrides_are_named_with_their_like(make):
    with pytest.raises(TypeError, match=r"^Config has no field 'index_topkk' \(did you mean index_topk\?\), 'zzz'$"):
        make(zzz=1, index_topk=8, index_topkk=8)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 0, "hidden_size must be at least 1, got 0"),
        ("n_shared_experts", -1, "n_shared_experts must be at least 0, got -1"),
        ("first_k_dense_replace", -1, "first_k_dense_replace must be at least 0, got -1"),
        ("dtype", "float16", "dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ("qk_rope_head_dim", 15, "qk_rope_head_dim must be even, got 15"),
        ("index_head_dim", 8, "index_head_dim must be at least qk_rope_head_dim, got 8 < 16"),
        ("n_group", 3, "got 8 experts in 3 groups"),
        ("n_group", 8, "at least two experts a group, got 8 experts in 8 groups"),
        ("topk_group", 5, "topk_group must be at most n_group, got 5 > 4"),
        ("num_experts_per_tok", 5, "num_experts_per_tok must be at most the 4 experts of topk_group groups, got 5"),
    ],
)
def test_values_that_do_not_fit_are_named(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.tiny(**{field: value})


def test_limits_are_allowed():
    assert Config.tiny(n_shared_experts=0, first_k_dense_replace=0).num_dense_layers == 0
    with pytest.raises(ValueError, match="index_fp8 needs index_head_dim a power of two, got 24"):
        Config.tiny(index_fp8=True, index_head_dim=24)
    with pytest.raises(ValueError, match="rope_scaling factor must be at least 1, got 0.5"):
        YaRN(0.5, 4096)
    with pytest.raises(ValueError, match="rope_scaling original_max_position_embeddings must be at least 1, got 0"):
        YaRN(4.0, 0)


# Hugging Face's spelling.


def test_absent_keys_take_the_published_sizes():
    assert Config.from_hf(deepseek()) == Config.deepseek_v32()
    glm = Config.from_hf({"model_type": "glm_moe_dsa"})
    assert (glm.hidden_size, glm.num_hidden_layers, glm.qk_nope_head_dim, glm.n_group) == (6144, 78, 192, 1)
    assert glm.rms_norm_eps == 1e-5 and glm.rope_scaling is None and glm.index_rope_interleave


def test_a_dense_configuration_gets_the_published_indexer():
    published = {"model_type": "deepseek_v3", "rope_theta": 10000, "rope_scaling": YARN}
    assert Config.from_hf({**published, "max_position_embeddings": 163840}) == Config.deepseek_v32()
    saved = {"num_nextn_predict_layers": 1, "pretraining_tp": 1, "rope_interleave": True, "qk_head_dim": 192}
    saved |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "first_k_dense_replace": 1}
    config = Config.from_hf({"model_type": "deepseek_v3", "n_group": 4, "index_topk": 64, **saved})
    assert (config.max_position_embeddings, config.num_dense_layers, config.n_group) == (4096, 1, 4)
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (64, 128, 64)
    assert config.to_hf()["model_type"] == "deepseek_v32"
    assert "rope_interleave must be True, got False" in refused({"model_type": "deepseek_v3", "rope_interleave": False})


@pytest.mark.parametrize("key", ["q_lora_rank", "norm_topk_prob", "rope_interleave"])
def test_a_null_that_means_another_model_is_refused(key):
    assert f"{key} must not be null" in refused({"model_type": "deepseek_v3", key: None})


def test_both_rope_spellings_are_one():
    """The fixtures a0 and a1 have the same shape, one spelled as published and one as transformers saves it."""
    published, saved = Config.from_hf(ORACLE / "deepseek_a0"), Config.from_hf(ORACLE / "deepseek_a1" / "config.json")
    assert published == saved
    assert published.rope_scaling == YaRN(40.0, 64)
    assert "rope_scaling" in json.loads((ORACLE / "deepseek_a0" / "config.json").read_text())
    assert "rope_parameters" in json.loads((ORACLE / "deepseek_a1" / "config.json").read_text())


@pytest.mark.parametrize(
    ("given", "stretch", "softmax"),
    [
        (dict(mscale=1.0, mscale_all_dim=1.0), 1.0, 1.2079441541679836),
        (dict(mscale=0.707, mscale_all_dim=0.707), 1.0, 1.1470165169967643),
        (dict(), 1.2079441541679836, 1.0),
        (dict(mscale=0.5), 1.2079441541679836, 1.0),
        (dict(mscale_all_dim=0.5), 1.2079441541679836, 1.1039720770839918),
        (dict(attention_factor=1.3, mscale_all_dim=1.0), 1.3, 1.2079441541679836),
        (dict(mscale=0.0, mscale_all_dim=0.0), 1.2079441541679836, 1.0),
    ],
)
def test_absent_mscales_mean_what_transformers_says(given, stretch, softmax):
    """With factor 8: the stretch of cosines and sines, and the square root of the softmax scale's factor."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64, **given}
    config = Config.from_hf({"model_type": "deepseek_v32", "rope_parameters": rope})
    yarn = config.rope_scaling
    assert yarn is not None
    assert yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim) == pytest.approx(stretch, rel=1e-12)
    assert config.softmax_scale == pytest.approx(192**-0.5 * softmax**2, rel=1e-12)
    again = Config.from_hf(config.to_hf()).rope_scaling
    assert again is not None and math.isclose(again.mscale, yarn.mscale, rel_tol=1e-12)
    assert dataclasses.replace(again, mscale=0.0) == dataclasses.replace(yarn, mscale=0.0)


@pytest.mark.parametrize(
    "config",
    [
        Config.deepseek_v32(),
        Config.tiny(),
        Config.tiny(index_rope_interleave=True, rms_norm_eps=1e-5),
        Config.tiny(index_rope_interleave=True, rope_scaling=YaRN(4.0, 512)),
        Config.tiny(rope_scaling=YaRN(4.0, 512, mscale=0.7, mscale_all_dim=0.0)),
        Config.tiny(tie_word_embeddings=True, first_k_dense_replace=9, n_shared_experts=0),
    ],
)
def test_round_trip(config):
    data = json.loads(json.dumps(config.to_hf()))
    assert Config.from_hf(data) == dataclasses.replace(config, dtype="bfloat16", param_dtype="float32")
    assert data["model_type"] == ("glm_moe_dsa" if config.index_rope_interleave else "deepseek_v32")


def test_layer_types_say_how_many_layers_are_dense():
    types = ["dense"] * 2 + ["sparse"] * 3
    assert Config.from_hf(deepseek(num_hidden_layers=5, mlp_layer_types=types)).num_dense_layers == 2
    assert "mlp_layer_types" in refused(deepseek(num_hidden_layers=5, mlp_layer_types=types[::-1]))
    assert "mlp_layer_types" in refused(deepseek(num_hidden_layers=4, mlp_layer_types=types))
    assert "layer_types" in refused(deepseek(num_hidden_layers=1, layer_types=["full_attention"]))


def test_every_key_that_changes_the_model_is_named():
    bad = dict(attention_bias=True, hidden_act="gelu", scoring_func="softmax", topk_method="greedy", moe_layer_freq=2)
    bad |= dict(mlp_bias=True, partial_rotary_factor=0.5, sliding_window=128, hidden_size="wide", norm_topk_prob=1)
    message = refused(deepseek(**bad))
    for key, value in bad.items():
        assert key in message and repr(value) in message


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (dict(num_key_value_heads=8), "num_key_value_heads must be num_attention_heads = 128, got 8"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_type must be 'default' or 'yarn', got 'linear'"),
        (dict(rope_scaling={**YARN, "truncate": False}), "truncate"),
        (dict(rope_scaling={**YARN, "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (dict(rope_scaling={**YARN, "low_freq_factor": 1.0}), "unknown rotary key low_freq_factor"),
        (dict(rope_scaling={**YARN, "factor": 0.5}), "factor must be at least 1"),
        (dict(rope_theta=-1.0), "rope_theta must be a number above 0, got -1.0"),
        (dict(indexer_rope_interleave=True), "indexer_rope_interleave must be False"),
        (dict(quantization_config={"quant_method": "awq"}), "quant_method must be 'fp8', got 'awq'"),
        (dict(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}), "weight_block_size"),
        (dict(model_type="deepseek_v2"), "model_type must be one of"),
        (dict(index_topk=0), "index_topk must be at least 1, got 0"),
        (dict(indexer_types="full"), "indexer_types must be of type list"),
    ],
)
def test_what_is_not_supported_is_refused(keys, named):
    assert named in refused(deepseek(**keys))


@pytest.mark.parametrize(
    "keys",
    [
        dict(indexer_types=["full", "shared", "full"]),
        dict(index_topk_pattern="FFS"),
        dict(index_topk_freq=4, index_skip_topk_offset=1),
    ],
)
def test_shared_selections_are_refused(keys):
    message = refused({"model_type": "glm_moe_dsa", "num_hidden_layers": 3, **keys})
    assert "sharing a selection among layers is not supported" in message


def test_unshared_selections_and_harmless_keys_are_accepted():
    keys = dict(indexer_types=["full"] * 3, index_topk_pattern="FFF", index_topk_freq=1, index_skip_topk_offset=2)
    keys |= dict(bos_token_id=0, eos_token_id=[1, 2], torch_dtype="bfloat16", ep_size=1, use_cache=True, head_dim=64)
    keys |= dict(
        quantization_config=dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128], scale_fmt="ue8m0")
    )
    keys |= dict(pretraining_tp=None, sliding_window=None, num_nextn_predict_layers=1)
    assert Config.from_hf(deepseek(num_hidden_layers=3, **keys)).num_hidden_layers == 3


def test_a_file_that_is_no_configuration(tmp_path):
    assert "config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "JSON object" in refused(tmp_path)
