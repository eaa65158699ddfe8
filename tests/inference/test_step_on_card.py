"""Decoding on a card, at the widths that its kernels take: in place, the same bits in any batch, and as XLA has it."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

import dsa_jax
from dsa_jax import Config, PagedCache, Runner, Transformer, complete
from dsa_jax.inference.programs import padding_settings

pytestmark = pytest.mark.gpu

SIZES = dict(
    num_hidden_layers=2, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, index_n_heads=32,
    num_attention_heads=16, index_topk=128, hidden_size=256, max_position_embeddings=4096, dtype="bfloat16",
    index_fp8=True,
)  # fmt: skip
CONFIG = Config.tiny(**SIZES)
LENGTHS = (70, 5, 700, 131)


def model(config: Config = CONFIG) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(0))


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("cache_format", ["fp8", "bfloat16"])
def test_no_pool_is_copied(cache_format):
    runner = Runner(model(), PagedCache(CONFIG, 4000, format=cache_format))
    sequence = runner.cache.new()
    runner.prefill([sequence], [np.asarray(prompts()[2])])
    runner.cache.extend(sequence, 1)
    settings, stops = padding_settings(1, CONFIG.vocab_size), np.full(1, -1, np.int32)
    logits = np.zeros((1, CONFIG.vocab_size), np.float32)
    carry, _ = runner.first(logits, np.full(1, 700, np.int32), settings, stops, np.ones(1, bool))
    pools = runner.cache.latents, runner.cache.index_keys
    arguments = pools, carry, runner.parameters, runner.table([sequence]), settings, stops
    compiled = runner.programs.decode.lower(*arguments, "greedy").compile()
    copies = [
        line.strip()
        for line in compiled.as_text().splitlines()
        if re.search(r"\[(2,4000|8000|512000),\S* copy\(", line)
    ]
    assert not copies, copies[:4]
    assert compiled.memory_analysis().temp_size_in_bytes < min(pool.nbytes for pool in pools)


def test_kernels_and_xla_draw_the_same_tokens_where_every_key_is_selected():
    """Up to where a row's best two logits are nearer to each other than the runs are; behind it the texts differ.

    With fewer keys, one that lies at the K-th score stands for 1 / K of a random model's attention, and rounding moves
    it: then the runs are compared over the same selections, below.
    """
    options = dict(max_new_tokens=8, temperature=0.0, cache_format="fp8")
    every_key = Config.tiny(**{**SIZES, "index_topk": 1024})
    found = complete(model(every_key), prompts(), **options)
    with dsa_jax.implementation("xla"):
        expected = complete(model(every_key), prompts(), **options)
    compared = 0
    for row, differs in enumerate(found.tokens != expected.tokens):
        # The first that differs counts too: each run's best logit is there that of a text which is the same so far.
        until = int(np.argmax(differs)) + 1 if differs.any() else len(differs)
        np.testing.assert_allclose(found.log_probs[row, :until], expected.log_probs[row, :until], atol=0.1)
        compared += until - differs[:until].sum()
    assert compared >= found.tokens.size / 2, (found.tokens, expected.tokens)


def test_tokens_are_as_likely_as_in_a_forward_pass_of_xla_with_their_selections_and_experts():
    options = dict(max_new_tokens=8, temperature=0.0, cache_format="bfloat16")
    found = complete(model(), prompts(), return_selected=True, return_routed=True, **options)
    for row, prompt in enumerate(prompts()):
        text = np.concatenate([prompt, found.tokens[row]])[:-1]
        replayed = {"selected": found.selected[row][:, None], "routed": found.routed[row][:, None]}
        with dsa_jax.implementation("xla"):
            output = model()(text[None], **replayed)
            logits = model().unembed(output.hidden)[0, len(prompt) - 1 :]
        log_probs = np.take_along_axis(jax.nn.log_softmax(logits), found.tokens[row][:, None], axis=1)[:, 0]
        np.testing.assert_allclose(found.log_probs[row], log_probs, atol=0.1)


@pytest.mark.parametrize("cache_format", ["fp8", "bfloat16"])
def test_batch_invariant_logits_are_the_same_bits(cache_format):
    options = dict(
        max_new_tokens=6, temperature=0.0, cache_format=cache_format, batch_invariant=True, prefill_chunk=256
    )
    together = complete(model(), prompts(), **options)
    for row, prompt in enumerate(prompts()):
        alone = complete(model(), [prompt], **options)
        assert np.array_equal(alone.tokens[0], together.tokens[row])
        assert alone.log_probs[0].tobytes() == together.log_probs[row].tobytes()
    assert jax.default_backend() == "gpu"
