"""The forward pass and the training steps lower for every platform: CPU, CUDA and TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close, the_first
from flax import nnx
from jax import export
from model_cases import abstract_parts, model_parts, small_config, tokens
from train_cases import small_batch, small_phases

from dsa_jax import Cache
from train.compiling import compiling_quickly
from train.phases import split_groups
from train.state import init_state
from train.step import make_step

PLATFORMS = ("cpu", "cuda", "tpu")
LENGTH = 4096  # long enough for several blocks of queries everywhere
ALONE = [pytest.param((platform,), marks=pytest.mark.variants) for platform in PLATFORMS]
EACH = pytest.mark.parametrize("platforms", [PLATFORMS, *ALONE], ids="+".join)
CONFIG = small_config(first_k_dense_replace=1, max_position_embeddings=LENGTH, index_topk=64)
FP8 = small_config(first_k_dense_replace=1, max_position_embeddings=LENGTH, index_topk=64, index_fp8=True)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@functools.cache
def forward(config, attention):
    """The jitted forward pass to logits of the last token; one trace serves all platforms."""
    graph, _ = abstract_parts(config)

    @jax.jit
    def forward(state, ids, cache=None):
        model = nnx.merge(graph, state)
        out = model(ids, attention=attention, cache=cache)
        return model.unembed(out.hidden[:, -1]), out.indexer_kl, out.expert_load, out.cache

    return forward


@functools.cache
def step(name):
    """The jitted step of a phase and the shapes of its arguments."""
    settings = small_phases()[name]
    graph, state = abstract_parts(CONFIG)
    graph, params = split_groups(nnx.merge(graph, state))
    batch = shapes(small_batch(1, LENGTH, vocab=CONFIG.vocab_size))
    train_state = jax.eval_shape(lambda p: init_state(p, settings, jnp.zeros(2, jnp.uint32)), params)
    return make_step(graph, settings), train_state, batch


def check(exported, platforms):
    assert exported.platforms == platforms
    assert len(exported.mlir_module_serialized) > 10_000


@EACH
@pytest.mark.parametrize(
    ("config", "attention"), [(CONFIG, "sparse"), (CONFIG, "dense"), (FP8, "sparse")], ids=["sparse", "dense", "fp8"]
)
def test_the_forward_pass_lowers(config, attention, platforms):
    _, state = abstract_parts(config)
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    check(export.export(forward(config, attention), platforms=platforms)(state, ids), platforms)


@pytest.mark.parametrize("config", [CONFIG, FP8], ids=["float32", "fp8"])
def test_decoding_lowers(config):
    _, state = abstract_parts(config)
    cache = jax.eval_shape(lambda: Cache.empty(config, 2, LENGTH))
    ids = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    check(export.export(forward(config, "sparse"), platforms=PLATFORMS)(state, ids, cache), PLATFORMS)


@EACH
@pytest.mark.parametrize("phase", ["WARMUP", "SPARSE"])
def test_training_steps_lower(phase, platforms):
    run, state, batch = step(phase)
    check(export.export(run, platforms=platforms)(state, batch), platforms)


@pytest.mark.parametrize("attention", the_first(1, ["sparse", "dense"]))
def test_what_is_exported_runs_and_gives_the_same(attention):
    config, ids = small_config(), tokens(2, 20)
    _, state = model_parts(config)
    call = forward(config, attention)
    exported = export.export(call, platforms=PLATFORMS)(shapes(state), shapes(ids))
    with compiling_quickly():
        results = jax.jit(exported.call)(state, ids)[:3], call(state, ids)[:3]
    for actual, want in zip(*results, strict=True):
        assert np.all(np.isfinite(want))
        close(actual, want, 2e-5)
