"""Models whose latents have no rotary part (R = 0): caches, pages and files. `test_layers` has them in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array, the_first
from flax import nnx
from model_cases import forward, small_config, small_model, tokens

from dsa_jax import Cache, PagedCache, Runner, load_hf, save_hf
from dsa_jax.cache_shapes import page_shapes, token_bytes
from dsa_jax.paged import latent_bytes, pack_latents, unpack_latents

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(qk_rope_head_dim=0, num_hidden_layers=1, max_position_embeddings=256)
FP8 = small_config(qk_rope_head_dim=0, num_hidden_layers=1, max_position_embeddings=256, index_fp8=True)


def test_formats_have_no_rotary_bytes():
    assert latent_bytes(512, 0) == 512 + 16
    assert [x.shape[-1] for x in page_shapes(FP8, 1, "fp8")] == [16 + 4, 16]
    assert token_bytes(FP8, "fp8") == 16 + 4 + 16 + 4
    kv = array(np.random.default_rng(0).normal(size=(3, 16)), jnp.float32)
    packed = pack_latents(kv, 16)
    chex.assert_shape(packed, (3, 20))
    np.testing.assert_allclose(unpack_latents(packed, 16, jnp.float32), kv, atol=0.2)


@pytest.mark.slow
def test_prefill_and_decode_equal_the_whole():
    ids = tokens(2, 24)
    whole, logits = forward(CONFIG, ids)
    out, first = forward(CONFIG, ids[:, :20], cache=Cache.empty(CONFIG, 2, 24))
    np.testing.assert_allclose(first, logits[:, :20], atol=2e-5)
    last, found = forward(CONFIG, ids[:, 20:], cache=out.cache)
    np.testing.assert_allclose(found, logits[:, 20:], atol=2e-5)
    np.testing.assert_array_equal(last.selected, whole.selected[:, :, 20:])


@pytest.mark.slow
@pytest.mark.parametrize("format", the_first(1, ["fp8", "float32"]))
def test_pages_serve_it(format):
    config = FP8 if format == "fp8" else CONFIG
    prompt = np.asarray(tokens(1, 70))[0]
    runner = Runner(small_model(config), PagedCache(config, 4, format=format))
    sequence = runner.cache.new()
    first = runner.prefill([sequence], [prompt[:-2]]).logits
    last = runner.extend([sequence], prompt[None, -2:])
    logits = forward(config, prompt[None])[1]
    near = 2e-5 if format == "float32" else 0.3  # latents rounded to e4m3
    np.testing.assert_allclose(first[0], logits[0, -3], atol=near)
    np.testing.assert_allclose(last[0], logits[0, -2:], atol=near)


def test_it_is_saved_and_loaded(tmp_path):
    model = small_model(CONFIG)
    save_hf(model, tmp_path / "model")
    loaded = load_hf(tmp_path / "model")
    assert loaded.config == CONFIG
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(model))
    shapes = {x.shape for x in jax.tree.leaves(nnx.state(loaded)["moe_layers"]["self_attn"])}
    assert (1, 32, 16) in shapes and (1, 24, 3, 12) in shapes
