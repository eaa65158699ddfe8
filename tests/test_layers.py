"""The lightning indexer and sparse MLA against float64 NumPy, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import FAST, array, close, keys_of, normal, same_bits, scores_of, topk_of
from layer_reference import f64, reference_attention, reference_indexer, rms_norm
from model_cases import model_parts, small_config, small_model

from dsa_jax import Cache, KeyRange
from dsa_jax.rope import rotation

B, T = 2, 24
CONFIG = small_config()
FP8 = small_config(index_fp8=True)


def first_layer(config):
    return next(small_model(config).layers()).self_attn


@pytest.fixture(scope="module")
def x():
    return normal(1, B, T, CONFIG.hidden_size)


POSITIONS = np.arange(T)[None] + np.array([[0], [5]])


@functools.partial(jax.jit, static_argnums=0, static_argnames="attention", compiler_options=FAST)
def run(config, x, keys, cache=None, *, attention="sparse"):
    """The attention of the first layer, and its projections."""
    layer, turn = first_layer(config), rotation(array(POSITIONS), config)
    return layer(x, turn, keys, attention=attention, cache=cache), layer.project(x, turn)


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=FAST)
def with_cache(config, x, keys, last):
    """The dense attention of the `last` tokens, the others being in a cache."""
    layer, turn = first_layer(config), rotation(array(POSITIONS), config)
    cache = Cache.empty(config, B, T + 5)
    for part in (slice(0, T - last), slice(T - last, T)):
        arrays = jax.tree.map(lambda leaf, part=part: leaf[:, part], (x, turn, keys))
        out = layer(*arrays, attention="dense", cache=cache)
        cache = out.cache.advance(jnp.full(B, T - last))
    return out


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("interleave", [False, True])
def test_indexer_against_float64(x, interleave, fp8):
    """RoPE first and half-split (or interleaved), then the rest; LayerNorm with bias; weights scaled J^-½ E^-½."""
    config = small_config(index_rope_interleave=interleave, index_fp8=fp8)
    indexer = first_layer(config).indexer
    q_latent = normal(2, B, T, config.q_lora_rank)
    actual = jax.jit(lambda x, y: indexer(x, y, rotation(array(POSITIONS), config)))(x, q_latent)
    for value, want in zip(actual, reference_indexer(indexer, x, q_latent, POSITIONS, config), strict=True):
        assert value.dtype == jnp.float32
        close(value, want, 2e-5)


def test_index_weights_stay_float32_in_a_bfloat16_model(x):
    config = small_config(dtype="bfloat16")
    indexer = first_layer(config).indexer
    call = jax.jit(lambda x, y: indexer(x, y, rotation(array(POSITIONS), config)))
    q, k, weights = call(x.astype("bfloat16"), normal(2, B, T, 24, dtype="bfloat16"))
    assert (q.dtype, k.dtype, weights.dtype) == ("bfloat16", "bfloat16", "float32")
    want = reference.f64(x.astype("bfloat16")) @ f64(indexer.weights_proj) / 8
    close(weights, want, 2e-5)


def test_hadamard_on_both_sides_leaves_the_scores_unchanged(x):
    keys = KeyRange.causal(B, T)
    projections = [run(config, x, keys)[1] for config in (CONFIG, FP8)]
    scores = [scores_of(p.q_index, p.k_index, p.weights, keys) for p in projections]
    close(scores[1], scores[0], 2e-5)
    assert np.abs(projections[1].q_index - projections[0].q_index).max() > 0.5
    assert np.abs(projections[1].k_index - projections[0].k_index).max() > 0.5


def test_fp8_indexer_selects_and_learns_by_the_dequantised_scores(x):
    """The module's selection is the one of the e4m3 queries and keys and their scales, and of what these stand for."""
    keys = KeyRange.causal(B, T)
    out, p = run(FP8, x, keys)
    (q, q_scale), (k, k_scale) = reference.quantize(p.q_index), reference.quantize(p.k_index)
    weights = p.weights * q_scale
    scores = scores_of(array(q), array(k), weights, keys, array(k_scale))
    wide_q, wide_k = (array(y.astype(np.float32) * s[..., None]) for y, s in ((q, q_scale), (k, k_scale)))
    same_bits(scores_of(wide_q, wide_k, p.weights, keys), scores)
    same_bits(out.selected, topk_of(scores, FP8.index_topk))
    unquantised = keys_of(p.q_index, p.k_index, p.weights, keys, FP8.index_topk)
    assert np.any(out.selected != unquantised), "rounding moved no selection: the test shows nothing"
    _, attn_q, attn_k, lse = reference_attention(first_layer(FP8), x, POSITIONS, reference.listed(out.selected, T), FP8)
    rows = reference.listed(out.selected, T)
    index = (wide_q, wide_k, p.weights)
    close(out.indexer_kl, reference.indexer_kl(*index, attn_q, attn_k, lse, rows, FP8.softmax_scale), 3e-5)


@pytest.mark.parametrize("rotary", [8, 0])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_sparse_mla_against_float64(x, attention, rotary):
    """Output, selection and KL, over packed sequences with padding at the end; with and without a rotary part."""
    config = small_config(qk_rope_head_dim=rotary)
    keys = KeyRange.packed(array([[0] * T, [0] * 9 + [1] * 11 + [-1] * 4]))
    layer = first_layer(config)
    out, p = run(config, x, keys, attention=attention)
    rows = reach = reference.reachable(keys.start, keys.stop, T)
    q_latent = rms_norm(reference.f64(x) @ f64(layer.q_a_proj), layer.q_a_layernorm.weight)
    index = reference_indexer(layer.indexer, x, q_latent, POSITIONS, config)
    if attention == "sparse":
        same_bits(out.selected, reference.select_topk(reference.index_scores(*index, reach), config.index_topk, reach))
        rows = reference.listed(out.selected, T)
    else:
        assert out.selected is None
    attended, q, k, lse = reference_attention(layer, x, POSITIONS, rows, config)
    close(out.x, attended, 3e-5)
    close(out.indexer_kl, reference.indexer_kl(*index, q, k, lse, rows, config.softmax_scale), 3e-5)
    assert not np.any(out.x[1, 20:]) and not np.any(out.indexer_kl[1, 20:])


@pytest.mark.parametrize("rotary", [8, 0])
def test_the_three_forms_agree_where_every_key_is_selected(x, rotary):
    """Sparse with K ≥ S, dense multi-head, and dense over latents (that is, with a cache): outputs and KL."""
    config, keys = small_config(index_topk=T + 3, qk_rope_head_dim=rotary), KeyRange.causal(B, T)
    sparse, _ = run(config, x, keys)
    dense, _ = run(config, x, keys, attention="dense")
    assert np.all(np.sum(np.asarray(sparse.selected) >= 0, -1) == np.arange(1, T + 1))
    close(sparse.x, dense.x, 2e-5)
    close(sparse.indexer_kl, dense.indexer_kl, 2e-5)
    for last in (4, 7):  # few queries attend to a cache's latents, more to each head's keys
        out = with_cache(config, x, keys, last)
        close(out.x, dense.x[:, -last:], 2e-5)
        close(out.indexer_kl, dense.indexer_kl[:, -last:], 2e-5)


@pytest.mark.parametrize(("given", "expected"), [(None, 0.5), (1e-6, 1e-6)])
def test_latent_norms_follow_the_config_or_have_their_own_epsilon(given, expected):
    layer = next(small_model(small_config(rms_norm_eps=0.5, latent_norm_eps=given)).layers())
    assert layer.self_attn.q_a_layernorm.eps == layer.self_attn.kv_a_layernorm.eps == expected
    y = layer.input_layernorm(jnp.full((1, 32), 0.5))
    close(y, 0.5 / np.sqrt(0.25 + 0.5) * f64(layer.input_layernorm.weight)[None], 1e-6)


def test_state_is_named_and_shaped_as_documented():
    _, state = model_parts(small_config(first_k_dense_replace=1))
    attention = state["moe_layers"]["self_attn"]
    shapes = {name: attention[name][...].shape for name in ("q_b_proj", "kv_b_proj", "o_proj")}
    assert shapes == {"q_b_proj": (1, 24, 3, 20), "kv_b_proj": (1, 16, 3, 22), "o_proj": (1, 3, 10, 32)}
    assert attention["indexer"]["wq_b"][...].shape == (1, 24, 4, 16)
    assert state["dense_layers"]["mlp"]["gate_proj"][...].shape == (1, 32, 48)
    assert state["moe_layers"]["mlp"]["experts"]["down_proj"][...].shape == (1, 8, 20, 32)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(state))
