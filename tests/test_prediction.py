"""Prediction layers: against float64 NumPy, over documents and padding, with caches, on meshes, and left out."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import prediction_cases
import pytest
from cases import array, close, same_bits
from flax import nnx
from model_cases import model_parts, small_config, small_model, tokens
from prediction_cases import cross_entropy, module, wide_parameters
from sharded_cases import mesh_of

from dsa_jax import Cache, KeyRange
from dsa_jax.cache_shapes import cache_token_bytes
from dsa_jax.parallel.sharding import parameter_specs, path_names, spec, zigzag_order
from dsa_jax.prediction import shift_tokens, tokens_ahead

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(num_nextn_predict_layers=2)
B, T = 2, 20
IDS = tokens(B, T)
# The first row is two documents, the second one and padding.
SEGMENTS = np.array([[0] * 13 + [1] * 7, [0] * 15 + [-1] * 5])
KEYS = KeyRange.packed(array(SEGMENTS))
POSITIONS = jnp.arange(T) - KEYS.start


@functools.partial(jax.jit, static_argnums=0, static_argnames="attention")
def run(graph, state, ids, keys, positions, *, attention):
    model = nnx.merge(graph, state)
    return model(ids, keys=keys, positions=positions, attention=attention, return_predicted=True)


def forward(config=CONFIG, ids=IDS, keys=KEYS, positions=POSITIONS, attention="sparse"):
    return run(*model_parts(config), ids, keys, positions, attention=attention)


def ahead(depth):
    """The token so many places ahead, and whether it is of the same document: by the segments, one by one."""
    ids, valid = np.zeros((B, T), int), np.zeros((B, T), bool)
    for row, at in np.ndindex(B, T - depth):
        if SEGMENTS[row, at] >= 0 and SEGMENTS[row, at] == SEGMENTS[row, at + depth]:
            ids[row, at], valid[row, at] = IDS[row, at + depth], True
    return ids, valid


def keys_of(valid):
    return KeyRange(np.asarray(KEYS.start), np.where(valid, KEYS.stop, KEYS.start))


def test_tokens_ahead_stop_where_documents_end():
    ids, keys = tokens_ahead(IDS, KEYS, 3)
    for depth in (1, 2, 3):
        expected, valid = ahead(depth)
        np.testing.assert_array_equal(ids[depth - 1], expected)
        np.testing.assert_array_equal(keys.nonempty()[depth - 1], valid)
        np.testing.assert_array_equal(keys.stop[depth - 1][valid], KEYS.stop[valid])
    np.testing.assert_array_equal(tokens_ahead(IDS, KEYS, T + 1)[1].nonempty()[-1], np.zeros((B, T), bool))
    np.testing.assert_array_equal(shift_tokens(IDS, 2), np.pad(IDS[:, 2:], ((0, 0), (0, 2))))


@pytest.mark.parametrize(
    ("changes", "attention"),
    [(dict(), "sparse"), (dict(first_k_dense_replace=2, tie_word_embeddings=True), "dense")],
    ids=["experts, sparse", "no experts, dense"],
)
def test_predictions_against_float64(changes, attention):
    """Each depth, from the hidden states that the one before has: values, the indexer's KL, and experts' loads."""
    config = dataclasses.replace(CONFIG, **changes)
    out = forward(config, attention=attention)
    predicted: Any = out.predicted
    arrays = wide_parameters(config)
    hidden = np.asarray(out.hidden, np.float64)
    for depth in (1, 2):
        ids, valid = ahead(depth)
        layer = module(arrays, "prediction_layers", depth - 1)
        embedded, positions = arrays["embed_tokens"][ids], np.asarray(POSITIONS)
        options = dict(attention=attention)
        hidden, kl, _ = prediction_cases.predict(layer, hidden, embedded, positions, keys_of(valid), config, **options)
        found = predicted.hidden[depth - 1]
        np.testing.assert_array_equal(predicted.valid[depth - 1], valid)
        close(found[valid], hidden[valid], 5e-5)
        close(predicted.indexer_kl[depth - 1], kl, 5e-5)
        assert not np.any(predicted.indexer_kl[depth - 1][~valid])
        hidden = np.where(valid[..., None], hidden, np.asarray(found))  # of what is not there anything will do
    loads = predicted.expert_load.sum(-1).tolist()
    pairs = [config.num_experts_per_tok * int(ahead(depth)[1].sum()) for depth in (1, 2)]
    assert loads == (pairs if config.num_moe_layers else [])


def test_what_is_left_out_is_not_computed_and_changes_nothing():
    """The same parameters without prediction layers, and the same program's size where they are not asked for."""
    out = forward()
    graph, state = model_parts(CONFIG)
    plain = nnx.merge(graph, state)
    plain.prediction_layers = None
    plain.config = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    hidden = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids, keys=KEYS, positions=POSITIONS).hidden)
    close(out.hidden, hidden(state, IDS), 1e-6)

    def flops(model_graph, model_state):
        run = lambda state, ids: nnx.merge(model_graph, state)(ids).hidden
        return jax.jit(run).lower(model_state, IDS).cost_analysis()["flops"]

    assert flops(graph, state) == flops(*nnx.split(plain))


def test_gradients_against_differences_in_float64():
    """By every parameter that a depth's loss depends on, and by the hidden states: along random directions."""
    config = small_config(num_nextn_predict_layers=1, vocab_size=24)
    ids, targets = tokens(B, T, 0, 24), np.asarray(tokens(B, T, 1, 24))
    graph, state = model_parts(config)
    valid = np.asarray(tokens_ahead(ids, KEYS, 1)[1].nonempty()[0])
    following = np.asarray(tokens_ahead(ids, KEYS, 1)[0][0])
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, config.hidden_size))

    def loss(state, hidden):
        model = nnx.merge(graph, state)
        keys = jax.tree.map(jnp.asarray, keys_of(valid))
        h, _ = model.predict(hidden, array(following), keys=keys, positions=POSITIONS)
        logits = jax.nn.log_softmax(model.unembed(h))
        return -jnp.sum(jnp.where(valid, jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], 0.0))

    value, (by_state, by_hidden) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, jnp.float32(hidden))
    arrays = wide_parameters(config) | {"hidden": hidden}

    def definition(arrays, selected=None):
        layer = module(arrays, "prediction_layers", 0)
        embedded, positions = arrays["embed_tokens"][following], np.asarray(POSITIONS)
        options: Any = dict(attention="sparse", selected=selected)
        h, _, chosen = prediction_cases.predict(
            layer, arrays["hidden"], embedded, positions, keys_of(valid), config, **options
        )
        return cross_entropy(h, arrays["lm_head"], targets, valid), chosen

    expected, chosen = definition(arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    gradients = {".".join(path_names(path)): x for path, x in jax.tree_util.tree_leaves_with_path(by_state)}
    gradients["hidden"] = by_hidden
    constants = ("indexer", "e_score_correction_bias")  # no gradient flows there
    reached = 0
    for name, x in gradients.items():
        direction = rng.normal(size=x.shape) / np.sqrt(x.size)
        found = np.sum(np.asarray(x, np.float64) * direction)
        if not (name.startswith("prediction_layers") or name in ("embed_tokens", "lm_head", "hidden")):
            assert not np.any(x), name
            continue
        if any(part in name for part in constants):
            assert not np.any(x), name
            continue
        moved = [definition(arrays | {name: arrays[name] + step * direction}, chosen)[0] for step in (1e-6, -1e-6)]
        difference = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(found, difference, rtol=2e-3, atol=2e-4, err_msg=name)
        reached += abs(difference) > 1e-3
    assert reached > 15


# Caches


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [True, pytest.param(False, marks=pytest.mark.variants)])
def test_entries_in_a_cache_equal_the_whole_row(fp8):
    """Layer 1 on the true tokens, some at a time, as drafting does."""
    config = small_config(num_nextn_predict_layers=1, index_fp8=fp8)
    ids, keys = tokens(B, 16), KeyRange.causal(B, 16)
    positions = jnp.broadcast_to(jnp.arange(16), ids.shape)
    whole: Any = forward(config, ids, keys, positions).predicted
    graph, state = model_parts(config)

    @jax.jit
    def step(state, ids, following, cache):
        model, before = nnx.merge(graph, state), cache.lengths
        out = model(ids, cache=cache)
        own = KeyRange.causal(B, ids.shape[1], offset=before)
        place = before[:, None] + jnp.arange(ids.shape[1])
        cache = dataclasses.replace(out.cache, lengths=before)
        hidden, cache = model.predict(out.hidden, following, keys=own, positions=place, cache=cache)
        return hidden, cache.advance(out.cache.lengths - before)

    cache, found = Cache.empty(config, B, 16, predicting=True), []
    assert cache.kv.shape[0] == 3 and Cache.empty(config, B, 16).kv.shape[0] == 2
    for part in (slice(0, 5), slice(5, 10), slice(10, 15)):
        hidden, cache = step(state, ids[:, part], ids[:, part.start + 1 : part.stop + 1], cache)
        found.append(hidden)
    close(np.concatenate(found, axis=1), whole.hidden[0][:, :15], 5e-5)


def test_entries_take_their_bytes_of_a_cache():
    own, more = (cache_token_bytes(CONFIG, "float32", predicting=each) for each in (False, True))
    assert 2 * own == more  # two layers, two prediction layers


# Refusals, and meshes


def test_layers_without_an_indexer_are_refused():
    with pytest.raises(ValueError, match="num_nextn_predict_layers must be 0 under 'nsa', got 1"):
        small_config(baseline="nsa", num_nextn_predict_layers=1)


@pytest.mark.parametrize("with_cache", [False, True])
def test_what_is_not_there_is_refused(with_cache):
    model = small_model(CONFIG if with_cache else small_config())
    cache = Cache.empty(CONFIG, B, T) if with_cache else None
    with pytest.raises(ValueError, match="return_predicted needs prediction layers and no cache, got num_nextn"):
        model(IDS, return_predicted=True, cache=cache)
    with pytest.raises(ValueError, match="depth must be from 1 to the . prediction layers, got 3"):
        model.predict(jnp.zeros((B, T, 32)), IDS, keys=KEYS, positions=POSITIONS, depth=3)


def test_a_token_ahead_may_be_another_shards():
    """The sequence is sharded, in zigzag order."""
    mesh, token = mesh_of("context=4"), spec("batch", "sequence")
    ids, order = tokens(B, 16), zigzag_order(16, 4)
    keys = KeyRange.packed(array([[0] * 10 + [1] * 6, [0] * 12 + [-1] * 4]))

    def run(ids, keys):
        return *tokens_ahead(ids, keys, 2), shift_tokens(ids, 2)

    specs = dict(mesh=mesh, in_specs=(token, token), out_specs=(spec(None, "batch", "sequence"),) * 2 + (token,))
    call = jax.jit(jax.shard_map(run, **specs, check_vma=False))
    found = call(*jax.tree.map(lambda x: x[:, order], (ids, keys)))
    for one, expected in zip(jax.tree.leaves(found), jax.tree.leaves(run(ids, keys)), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[..., np.argsort(order)], expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["context=2,tensor=2", "data=2,context=2,expert=2"])
def test_a_mesh_predicts_as_one_device_does(shape):
    """The sequence is sharded: the token ahead may be another shard's."""
    config = small_config(num_nextn_predict_layers=2, num_attention_heads=4, first_k_dense_replace=0)
    mesh, (graph, state) = mesh_of(shape), model_parts(config)
    ids = tokens(B, 16)
    keys = KeyRange.packed(array([[0] * 10 + [1] * 6, [0] * 12 + [-1] * 4]))
    positions = jnp.arange(16) - keys.start
    expected: Any = forward(config, ids, keys, positions).predicted
    order = zigzag_order(16, mesh.shape["context"] * mesh.shape["expert"])
    token = spec("batch", "sequence")

    def run(state, ids, keys, positions):
        out = nnx.merge(graph, state)(ids, keys=keys, positions=positions, return_predicted=True)
        return out.predicted.hidden, out.predicted.valid, out.predicted.indexer_kl

    layer = spec(None, "batch", "sequence")
    inputs = jax.tree.map(lambda x: x[:, order], (ids, keys, positions))
    call = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(parameter_specs(state), token, token, token),
        out_specs=(layer, layer, layer),
        check_vma=False,
    )
    hidden, valid, kl = jax.jit(call)(state, *inputs)
    natural = np.argsort(order)
    same_bits(valid[:, :, natural], expected.valid)
    close(np.asarray(hidden)[:, :, natural][expected.valid], expected.hidden[expected.valid], 5e-5)
    close(np.asarray(kl)[:, :, natural], expected.indexer_kl, 5e-5)
