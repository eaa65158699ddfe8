"""The configuration: its checks and overrides; Hugging Face's spellings, absent keys, and what is refused."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
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
    assert Config.deepseek_v32(rope_scaling=None) == dataclasses.replace(Config.deepseek_v32(), rope_scaling=None)
    assert Config.deepseek_v32() == Config(bos_token_id=0, eos_token_id=(1,))


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
        ("n_routed_experts", 0, "for a model without MoE layers set first_k_dense_replace = num_hidden_layers"),
        ("hidden_size", "wide", "hidden_size must be an integer, got 'wide'"),
        ("hidden_size", 2.0, "hidden_size must be an integer, got 2.0"),
        ("hidden_size", True, "hidden_size must be an integer, got True"),
        ("vocab_size", 2**31, "vocab_size must be at most 2147483647, got 2147483648"),
        ("num_hidden_layers", 10**6, "num_hidden_layers must be at most 10000, got 1000000"),
        ("rms_norm_eps", math.nan, "rms_norm_eps must be a finite number, got nan"),
        ("rms_norm_eps", 0.0, "rms_norm_eps must be above 0, got 0.0"),
        ("initializer_range", -0.1, "initializer_range must be at least 0, got -0.1"),
        ("routed_scaling_factor", 10**400, "routed_scaling_factor must be a finite number, got 1000"),
        ("rope_theta", 1.0, "rope_theta must be above 1, got 1.0"),
        ("rope_scaling", {"factor": 2}, "rope_scaling must be YaRN or None, got {'factor': 2}"),
        ("tie_word_embeddings", "no", "tie_word_embeddings must be True or False, got 'no'"),
        ("eos_token_id", (1, -1), "eos_token_id must be at least 0, got -1"),
        ("bos_token_id", "<s>", "bos_token_id must be an integer, got '<s>'"),
        ("param_dtype", None, "param_dtype must be 'float32' or 'bfloat16', got None"),
        ("dtype", jnp.float16, "dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ("baseline", "moba", "baseline must be 'none' or 'blocks' or 'window' or 'nsa', got 'moba'"),
        ("baseline", None, "baseline must be 'none' or 'blocks' or 'window' or 'nsa', got None"),
        ("block_size", 0, "block_size must be at least 1, got 0"),
        ("nsa", (32, 16, 64), "nsa must be NSASizes, got (32, 16, 64)"),
        ("index_kl_target", "mean", "index_kl_target must be 'sum' or 'max', got 'mean'"),
    ],
)
def test_values_that_do_not_fit_are_named(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.tiny(**{field: value})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.dtype(jnp.bfloat16), jnp.zeros(0, jnp.bfloat16).dtype, "bfloat16"])
def test_dtypes_are_kept_as_names(dtype):
    config = Config.tiny(dtype=dtype, param_dtype=dtype)
    assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    assert config == Config.tiny(dtype="bfloat16", param_dtype="bfloat16")


def test_an_integer_that_python_does_not_write():
    with pytest.raises(ValueError, match="vocab_size must be at most 2147483647, got a value of type int too large"):
        Config.tiny(vocab_size=10**5000)


def test_values_are_kept_as_pythons():
    config = Config.tiny(index_topk=np.int32(8), rope_theta=10**4, eos_token_id=[np.int64(5), 6])
    assert config == Config.tiny(index_topk=8, rope_theta=1e4, eos_token_id=(5, 6))
    assert [type(x) for x in (config.index_topk, config.rope_theta, config.eos_token_id[0])] == [int, float, int]
    assert Config.tiny(eos_token_id=5).eos_token_id == (5,)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("factor", math.nan, "rope_scaling factor must be a finite number, got nan"),
        ("factor", "40", "rope_scaling factor must be a finite number, got '40'"),
        ("beta_fast", 0.0, "rope_scaling beta_fast must be at least 1e-30, got 0.0"),
        ("mscale_all_dim", -1e9, "rope_scaling mscale_all_dim must give a magnitude above 0, got -1000000000.0"),
    ],
)
def test_yarn_checks_its_numbers(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(YaRN(4.0, 512), **{field: value})


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
    assert dataclasses.replace(published, num_nextn_predict_layers=0) == saved  # which transformers leaves out
    assert published.rope_scaling == YaRN(40.0, 64)
    assert "rope_scaling" in json.loads((ORACLE / "deepseek_a0" / "config.json").read_text())
    assert "rope_parameters" in json.loads((ORACLE / "deepseek_a1" / "config.json").read_text())


GLM_ROPE = {"model_type": "glm_moe_dsa", "rope_parameters": {"rope_type": "default", "rope_theta": 8e6}}
LONG = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 202752}


@pytest.mark.parametrize(
    "keys",
    [
        dict(rope_scaling=LONG),
        dict(rope_scaling={**LONG, "rope_theta": 8e6}, rope_theta=8000000),
        dict(rope_parameters={**LONG, "rope_theta": 8e6}, rope_scaling={"type": "default"}),
        dict(rope_parameters=LONG, rope_theta=8e6),
        dict(rope_parameters=LONG, rope_scaling={"rope_theta": 8e6, "type": "yarn", "factor": 4}),
    ],
)
def test_both_rope_spellings_together_are_merged(keys):
    config = Config.from_hf(GLM_ROPE | keys)
    assert config.rope_theta == 8e6
    assert config.rope_scaling == YaRN(4.0, 202752, mscale=1.0, mscale_all_dim=0.0)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (dict(rope_theta=1e4), "rope_theta 10000.0 contradicts rope_parameters.rope_theta 8000000.0"),
        (
            dict(rope_scaling={**LONG, "rope_theta": 5e5}),
            "rope_scaling.rope_theta 500000.0 contradicts rope_parameters.rope_theta 8000000.0",
        ),
        (
            dict(rope_scaling=LONG, rope_parameters={**LONG, "factor": 8.0, "rope_theta": 8e6}),
            "rope_scaling.factor 4.0 contradicts rope_parameters.factor 8.0",
        ),
        (
            dict(rope_scaling=LONG, rope_parameters={"type": "linear"}),
            "type of rope_scaling 'yarn' contradicts type of rope_parameters 'linear'",
        ),
        (
            dict(rope_scaling={**LONG, "type": "default"}),
            "rope_scaling has rope_type 'yarn' and type 'default', which must agree",
        ),
    ],
)
def test_rope_spellings_that_contradict_each_other_are_named(keys, named):
    assert named in refused(GLM_ROPE | keys)


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({}, (0, (1,), None)),
        (dict(bos_token_id=None, eos_token_id=None), (None, (), None)),
        (dict(bos_token_id=3, eos_token_id=[5, 7, 9], pad_token_id=5), (3, (5, 7, 9), 5)),
    ],
)
def test_token_ids_are_read_and_written(keys, ids):
    config = Config.from_hf(deepseek(**keys))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids
    assert Config.from_hf(config.to_hf()) == config
    stop = config.to_hf()["eos_token_id"]
    assert stop == (list(ids[1]) if len(ids[1]) > 1 else ids[1][0] if ids[1] else None)


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
        Config.tiny(bos_token_id=0, eos_token_id=(1, 2, 3), pad_token_id=4),
    ],
)
def test_round_trip(config):
    data = json.loads(json.dumps(config.to_hf()))
    assert Config.from_hf(data) == dataclasses.replace(config, dtype="bfloat16", param_dtype="float32")
    assert data["model_type"] == ("glm_moe_dsa" if config.index_rope_interleave else "deepseek_v32")


def test_blocks_must_divide_the_selection():
    assert Config.tiny(baseline="blocks", block_size=8).block_size == 8
    assert Config.tiny(block_size=64).baseline == "none"  # without blocks their size does not matter
    with pytest.raises(ValueError, match="^block_size must divide index_topk 32, got 64$"):
        Config.tiny(baseline="blocks")


def test_a_baseline_is_not_lost_in_writing():
    config = Config.tiny(index_kl_target="max")
    assert Config.from_hf(config.to_hf()) == Config.from_hf(Config.tiny().to_hf())  # what trains is no part of a model
    with pytest.raises(ValueError, match="^config.json has no key for baseline='blocks', .* not saved in [^\n]*$"):
        Config.tiny(baseline="blocks", block_size=8).to_hf()
    for key in ("baseline", "block_size", "nsa", "index_kl_target"):
        assert f"unknown key {key}" in refused(deepseek(**{key: "none"}))


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
        (dict(rope_theta=-1.0), "rope_theta must be a number above 1, got -1.0"),
        (dict(indexer_rope_interleave=1), "indexer_rope_interleave must be of type bool"),
        (dict(quantization_config={"quant_method": "awq"}), "quant_method must be 'fp8', got 'awq'"),
        (dict(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}), "weight_block_size"),
        (dict(model_type="deepseek_v2"), "model_type must be one of"),
        (dict(index_topk=0), "index_topk must be at least 1, got 0"),
        (dict(indexer_types="full"), "indexer_types must be of type list"),
        (dict(indexer_types=[[]] * 61), "indexer_types must be 'full' or 'shared' for each of the 61 layers"),
        (dict(index_topk_pattern=[{}]), "index_topk_pattern must be 'full' or 'shared' for each of the 61 layers"),
        (dict(index_topk_pattern="S" + 60 * "F"), "the first of them 'full'"),
        (dict(index_topk_freq=2, index_skip_topk_offset=0), "the first of them 'full'"),
        (dict(index_topk_freq=0), "index_topk_freq must be at least 1"),
        (dict(indexer_types=["full"] * 61, index_topk_pattern="FS" + 59 * "F"), "contradicts index_topk_pattern"),
        (dict(layer_types=[{}]), "layer_types must be 'indexed_attention' for all 61 layers, got [{}]"),
        (dict(mlp_layer_types=[None]), "mlp_layer_types must be 61 layers"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers must be at most 10,000, got 1,000,000,000"),
        (dict(vocab_size=10**400), "vocab_size must be of type int, at most 2,147,483,647"),
        (dict(rms_norm_eps=math.nan), "rms_norm_eps must be a finite number, got nan"),
        (dict(rms_norm_eps=10**400), "rms_norm_eps must be a finite number, got 1000"),
        (dict(rope_theta=1), "rope_theta must be a number above 1, got 1"),
        (dict(rope_scaling={**YARN, "type": []}), "rope_type must be 'default' or 'yarn', got []"),
        (dict(rope_scaling={**YARN, "beta_fast": "x"}), "rotary key beta_fast must be a finite number, got 'x'"),
        (dict(rope_scaling={**YARN, "mscale_all_dim": -10.0}), "mscale_all_dim must give a magnitude above 0"),
        (dict(rope_scaling={**YARN, "attention_factor": 0.0}), "attention_factor must be above 0, got 0.0"),
        (dict(attention_bias=0), "attention_bias must be False, got 0"),
        (dict(eos_token_id=[1, "2"]), "eos_token_id must hold token ids, got '2'"),
        (dict(eos_token_id=-1), "eos_token_id must be at least 0, got -1"),
        (dict(pad_token_id=0.5), "pad_token_id must be of type int"),
        (dict(n_routed_experts=0), "set first_k_dense_replace = num_hidden_layers"),
        (dict(model_type=[]), "model_type must be one of"),
        ({7: 8}, "keys must be strings, got 7"),
    ],
)
def test_what_is_not_supported_is_refused(keys, named):
    message = refused(deepseek() | keys)
    assert named in message and len(message) < 1000 and "\n" not in message


@pytest.mark.parametrize(
    ("keys", "letters"),
    [
        (dict(indexer_types=["full", "shared", "full", "shared", "shared"]), "FSFSS"),
        (dict(index_topk_pattern="FFSSF"), "FFSSF"),
        (dict(index_topk_pattern=["full", "shared", "full", "full", "full"]), "FSFFF"),
        (dict(index_topk_freq=4, index_skip_topk_offset=1), "FSSSF"),
        (dict(index_topk_freq=2), "FFSFS"),
        (dict(index_topk_freq=4, index_skip_topk_offset=3), "FFFSS"),
        (dict(indexer_types=["full"] * 4 + ["shared"], index_topk_freq=2), "FFFFS"),  # a list stands above a rule
    ],
)
@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "deepseek_v32"])
def test_every_spelling_of_shared_selections(keys, letters, model_type):
    config = Config.from_hf({"model_type": model_type, "num_hidden_layers": 5, **keys})
    assert "".join(kind[0].upper() for kind in config.indexer_types) == letters
    assert config.num_index_layers == letters.count("F")
    written = config.to_hf()
    assert written["model_type"] == "glm_moe_dsa" and written["indexer_types"] == list(config.indexer_types)
    assert Config.from_hf(written) == config


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "deepseek_v32"])
@pytest.mark.parametrize("interleave", [False, True, None])
def test_the_indexers_rotary_pairs_are_as_the_key_says(model_type, interleave):
    config = Config.from_hf({"model_type": model_type, "indexer_rope_interleave": interleave})
    assert config.index_rope_interleave == (model_type == "glm_moe_dsa" if interleave is None else interleave)
    assert Config.from_hf(config.to_hf()) == config


def test_latents_may_have_no_rotary_part():
    config = Config.from_hf({"model_type": "glm_moe_dsa", "qk_rope_head_dim": 0})
    assert config.latent_dim == config.kv_lora_rank and config.softmax_scale == 192**-0.5
    assert Config.from_hf(config.to_hf()) == config


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


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"vocab_size": 3, "vocab_size": 4}', "config.json holds the key vocab_size twice"),
        ('{"rope_scaling": {"factor": 3, "factor": 4}}', "config.json holds the key factor twice"),
        ('{"rms_norm_eps": NaN}', "config.json holds a number that is not finite: NaN"),
        ('{"rms_norm_eps": 1e999}', "config.json holds a number that is not finite: 1e999"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "config.json is not JSON: Exceeds the limit"),
        ("[" * 100_000, "config.json is not JSON"),
        ('{"' + "k" * 5000 + '": 1, "model_type": "deepseek_v32"}', "config.json is not supported: unknown key kkk"),
        ('{"a\\nb": 1, "model_type": "deepseek_v32"}', r"config.json is not supported: unknown key 'a\nb' = 1"),
        (
            '{"hidden_size": null, "model_type": "deepseek_v32", "index_topk": 0}',
            "index_topk must be at least 1, got 0",
        ),
    ],
)
def test_json_is_read_strictly(text, named, tmp_path):
    (tmp_path / "config.json").write_text(text)
    message = refused(tmp_path)
    assert named in message and len(message) < 1000 and "\n" not in message


def test_a_thousand_things_wrong_are_one_line():
    message = refused(deepseek(**{f"key_{i}": i for i in range(1000)}))
    assert len(message) < 1000 and message.startswith("this configuration is not supported: unknown key key_0 = 0; ")
    named = message.count("unknown key")
    assert message.endswith(f"; and {1000 - named} problems more") and named > 20
