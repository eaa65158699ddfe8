"""A small random model and its compiled forward pass, for the tests of layers, model, export and generation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import FAST, array
from flax import nnx

from dsa_jax import Config, KeyRange, Transformer


def small_config(**changes) -> Config:
    """Two MoE layers with K = 8; dimensions that could be confused differ."""
    values: dict[str, Any] = dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=0,
        num_attention_heads=3,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        index_n_heads=4,
        index_head_dim=16,
        index_topk=8,
        intermediate_size=48,
        moe_intermediate_size=20,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        rope_scaling=None,
        max_position_embeddings=96,
        dtype="float32",
    )
    return Config(**values | changes)


def abstract_parts(config: Config):
    """The definition of a model and the shapes of its state."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


@functools.cache
def model_parts(config: Config):
    """The definition and a random state that keeps activations near 1: attention and scores are far from flat."""
    graph, shapes = abstract_parts(config)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        *_, parent, name = ("", *(key.key for key in path if hasattr(key, "key")))
        noise = rng.normal(size=leaf.shape)
        if name in ("weight", "bias") and parent.endswith("norm"):
            return array((name == "weight") + 0.2 * noise, leaf.dtype)
        if name in ("e_score_correction_bias", "embed_tokens"):
            return array(noise * (0.1 if parent == "gate" else 1.0), leaf.dtype)
        dims = leaf.shape if name == "lm_head" else leaf.shape[1:]
        fan_in = {"o_proj": np.prod(dims[:2]), "experts": dims[-2]}.get(name if name == "o_proj" else parent, dims[0])
        return array(noise * fan_in**-0.5, leaf.dtype)

    with jax.ensure_compile_time_eval():  # cached, so never a tracer of whoever asks first
        return graph, jax.tree_util.tree_map_with_path(draw, shapes)


def small_model(config: Config) -> Transformer:
    """The random model whole."""
    return nnx.merge(*model_parts(config))


def tokens(batch: int, length: int, seed: int = 0, vocab: int = 64):
    """Random token ids."""
    return array(np.random.default_rng(seed).integers(vocab, size=(batch, length)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("attention", "return_selected"), compiler_options=FAST)
def _forward(graph, state, tokens, options, *, attention, return_selected):
    model = nnx.merge(graph, state)
    out = model(tokens, attention=attention, return_selected=return_selected, **options)
    return out, model.unembed(out.hidden)


def forward(config: Config, tokens, *, attention="sparse", state=None, **options):
    """(Output, logits) of the random model, selections included where there are any."""
    graph, random_state = model_parts(config)
    state = random_state if state is None else state
    if "cache" not in options:  # the model's own defaults, so that who gives them and who does not share a program
        natural = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        options = dict(keys=KeyRange.causal(*tokens.shape), positions=natural) | options
    return _forward(graph, state, tokens, options, attention=attention, return_selected=attention == "sparse")
