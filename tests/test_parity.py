"""Against transformers: logits, selections, per-query KL and indexer gradients of the fixtures in tests/oracle."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAST, the_first
from flax import nnx
from safetensors.numpy import load_file

from dsa_jax import Cache, Config, Transformer
from dsa_jax.hf.convert import load_hf, to_hf
from train.losses import indexer_loss

ORACLE = Path(__file__).parent / "oracle"
FIXTURES = ["deepseek_a0", "glm", "glm_shared", "deepseek_a1", "deepseek_b"]
LOGITS, KL = 2e-5, 1e-5  # absolute, in float32; measured 2e-6 and 3e-6
GRADIENT = 2e-5  # of a gradient's largest entry; measured 3e-6


@pytest.fixture(params=the_first(3, FIXTURES), scope="module")
def case(request):
    """The split model of a fixture, its configuration, and what transformers made of it."""
    config = Config.from_hf(ORACLE / request.param)
    config = dataclasses.replace(config, dtype="float32", latent_norm_eps=1e-6)  # as transformers, whatever it reads
    model = load_hf(ORACLE / request.param, config=config)
    graph, state = nnx.split(model)
    return graph, state, model.config, load_file(ORACLE / request.param / "expected.safetensors")


def close(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


@partial(jax.jit, static_argnames=("graph", "attention"), compiler_options=FAST)
def stage(state, tokens, *, graph, attention):
    """Gradients of a stage's loss by all parameters, logits, KL, and the selection if there is one."""

    def loss(state):
        model = nnx.merge(graph, state)
        out = model(tokens, attention=attention, return_selected=attention == "sparse")
        kl = indexer_loss(out.indexer_kl, jnp.ones(tokens.shape, bool), model.config) / tokens.size
        return kl, (model.unembed(out.hidden), out.indexer_kl, out.selected)

    return jax.grad(loss, has_aux=True)(state)


@partial(jax.jit, static_argnames="graph", compiler_options=FAST)
def extend(state, tokens, cache, *, graph):
    """Logits of new tokens, their selection, the cache with them."""
    model = nnx.merge(graph, state)
    out = model(tokens, cache=cache, return_selected=True)
    return model.unembed(out.hidden), out.selected, out.cache


def check_gradients(gradients, expected, config, prefix):
    """The indexer's as transformers gives them, and nothing of the loss in any other parameter."""
    gradients = {name: np.asarray(x) for name, x in to_hf(gradients, config=config)}
    compared = {name.removeprefix(prefix): x for name, x in expected.items() if name.startswith(prefix)}
    assert len(compared) == 5 * config.num_index_layers
    for name, x in compared.items():
        close(gradients.pop(name), x, GRADIENT * np.abs(x).max())
    assert all(not x.any() for x in gradients.values())


def test_sparse_training(case):
    graph, state, config, expected = case
    assert expected["tokens"].shape[1] > 3 * config.index_topk
    gradients, (logits, kl, selected) = stage(state, expected["tokens"], graph=graph, attention="sparse")
    close(logits, expected["logits"], LOGITS)
    np.testing.assert_array_equal(selected, expected["selected"])
    close(kl, expected["sparse_kl"], KL)
    check_gradients(gradients, expected, config, "sparse_grad/")


def test_dense_warmup(case):
    graph, state, config, expected = case
    gradients, (logits, kl, _) = stage(state, expected["tokens"], graph=graph, attention="dense")
    close(logits, expected["dense_logits"], LOGITS)
    close(kl, expected["dense_kl"], KL)
    check_gradients(gradients, expected, config, "dense_grad/")


def test_prefill_and_decode(case):
    """A chunk of the prompt, then a token at a time, give the logits and selections of one full forward pass."""
    graph, state, config, expected = case
    tokens, cache = expected["tokens"], Cache.empty(config, 2, 80)
    chunks = [tokens[:, :30], *np.split(tokens[:, 30:], tokens.shape[1] - 30, axis=1)]
    logits, selections = [], []
    for chunk in chunks:
        out, selected, cache = extend(state, chunk, cache, graph=graph)
        logits.append(out)
        selections.append(selected)
    close(jnp.concatenate(logits, axis=1), expected["logits"], LOGITS)
    np.testing.assert_array_equal(jnp.concatenate(selections, axis=2), expected["selected"])


def test_the_fixtures_see_a_wrong_indexer_layout():
    """The other rotary layout in the indexer changes the first layer's selections, but only past K keys."""
    folder = ORACLE / "deepseek_a0"
    model, expected = load_hf(folder, dtype="float32"), load_file(folder / "expected.safetensors")
    other = dataclasses.replace(model.config, index_rope_interleave=True)
    graph = nnx.split(nnx.eval_shape(lambda: Transformer(other, rngs=nnx.Rngs(0))))[0]
    cache, k = Cache.empty(other, 2, 64), other.index_topk
    _, selected, _ = extend(nnx.state(model), expected["tokens"], cache, graph=graph)
    same = np.all(np.asarray(selected)[0] == expected["selected"][0], axis=-1)
    assert same[:, :k].all() and same[:, k:].mean() < 0.5
